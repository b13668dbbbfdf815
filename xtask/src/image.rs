//! `cargo xtask image`: the images of the mesh and of Bookinfo as OCI archives, without a container engine. Each holds our
//! programs, the shared libraries that they need, and nothing else: no shell, no package manager.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use clap::Args;

use crate::{
    ebpf,
    oci::{Content, Image},
    shell, test,
};

/// Which images to build.
#[derive(Args, Debug)]
pub struct Options {
    /// `node`, `control`, `waypoint`, `bookinfo`. Default: all.
    names: Vec<String>,
    /// Profile of the programs: dev or release.
    #[arg(long, default_value = "dev")]
    profile: String,
}

/// One image.
struct Recipe {
    name: &'static str,
    package: &'static str,
    /// The first is what the image starts.
    programs: &'static [&'static str],
    /// Programs that the host runs, where our libraries are not.
    static_programs: &'static [&'static str],
    /// Who runs it: numbers, so that Kubernetes can see that this is not root.
    user: Option<&'static str>,
}

/// Not root, and no user of any host.
const NOBODY: &str = "65532:65532";

const RECIPES: &[Recipe] = &[
    Recipe {
        name: "node",
        package: "mesh-node",
        programs: &["mesh-node"],
        static_programs: &["mesh-cni"],
        // It loads programs into the kernel.
        user: None,
    },
    Recipe {
        name: "control",
        package: "mesh-control",
        programs: &["mesh-control"],
        static_programs: &[],
        user: Some(NOBODY),
    },
    Recipe {
        name: "waypoint",
        package: "mesh-waypoint",
        programs: &["mesh-waypoint"],
        static_programs: &[],
        user: Some(NOBODY),
    },
    Recipe {
        name: "bookinfo",
        package: "bookinfo",
        programs: &["bookinfo"],
        static_programs: &[],
        user: Some(NOBODY),
    },
];

const PASSWD: &str = "root:x:0:0:root:/:/nonexistent\nnobody:x:65532:65532:nobody:/:/nonexistent\n";
const GROUP: &str = "root:x:0:\nnobody:x:65532:\n";
/// Where programs lie in the images.
const BIN: &str = "/usr/local/bin";

/// Builds the images and says where they are.
///
/// # Errors
/// When something does not build.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let names: Vec<_> = options.names.iter().map(String::as_str).collect();
    build(&names, &options.profile).map(drop)
}

/// Builds the images of these names, or all, and gives their archives.
///
/// # Errors
/// When something does not build.
pub fn build(names: &[&str], profile: &str) -> anyhow::Result<Vec<PathBuf>> {
    let recipes = chosen(names)?;
    let built = compile(&recipes, profile)?;
    let folder = shell::target_dir().join("images");
    let stripped = folder.join("programs");
    fs::create_dir_all(&stripped)?;
    let mut archives = Vec::new();
    for recipe in recipes {
        let image = recipe.image(&built, &stripped)?;
        let archive = folder.join(format!("{}.tar", recipe.name));
        let digest = image.write(&archive)?;
        let mib = fs::metadata(&archive)?.len() >> 20;
        println!("image: {} {mib} MiB, {digest}", image.name);
        println!("image: {}", archive.display());
        archives.push(archive);
    }
    Ok(archives)
}

/// (pure) The recipes of these names, or all.
fn chosen(names: &[&str]) -> anyhow::Result<Vec<&'static Recipe>> {
    if let Some(unknown) = names.iter().find(|name| RECIPES.iter().all(|recipe| recipe.name != **name)) {
        let known: Vec<_> = RECIPES.iter().map(|recipe| recipe.name).collect();
        bail!("no image {unknown}: {}", known.join(", "));
    }
    Ok(RECIPES.iter().filter(|recipe| names.is_empty() || names.contains(&recipe.name)).collect())
}

/// Builds the programs and gives their folder.
fn compile(recipes: &[&Recipe], profile: &str) -> anyhow::Result<PathBuf> {
    if recipes.iter().any(|recipe| recipe.name == "node") {
        ebpf::build(&ebpf::Options::default())?;
    }
    // All of them at once, as the suites do: another selection would compile the dependencies with other features.
    test::build_programs(&["--profile", profile])?;
    for recipe in recipes {
        for program in recipe.static_programs {
            // Only this program is linked so; its dependencies are those of the others.
            let mut rustc = shell::cargo(&["rustc", "--locked", "--profile", profile, "--package"]);
            rustc.args([recipe.package, "--bin", program, "--", "-C", "target-feature=+crt-static"]);
            shell::run(&mut rustc).with_context(|| format!("build {program}"))?;
        }
    }
    let folder = if profile == "dev" { "debug" } else { profile };
    Ok(shell::target_dir().join(folder))
}

impl Recipe {
    fn image(&self, built: &Path, stripped: &Path) -> anyhow::Result<Image> {
        let mut files = BTreeMap::from([
            ("/etc/passwd".to_owned(), Content::Text(PASSWD.to_owned())),
            ("/etc/group".to_owned(), Content::Text(GROUP.to_owned())),
            ("/etc/nsswitch.conf".to_owned(), Content::Text("hosts: files dns\n".to_owned())),
        ]);
        for program in self.programs.iter().chain(self.static_programs) {
            let (from, to) = (built.join(program), stripped.join(program));
            shell::output(shell::command("strip").arg("-o").arg(&to).arg(&from))
                .with_context(|| format!("strip {program} (package binutils)"))?;
            if self.programs.contains(program) {
                let libraries = shell::libraries_of(&from)?.into_iter();
                files.extend(libraries.map(|file| (file.display().to_string(), Content::Program(file))));
            }
            files.insert(format!("{BIN}/{program}"), Content::Program(to));
        }
        let first = self.programs.first().context("an image without a program")?;
        Ok(Image {
            name: image_name(self.name),
            entrypoint: vec![format!("{BIN}/{first}")],
            env: vec![format!("PATH={BIN}")],
            user: self.user.map(str::to_owned),
            files,
        })
    }
}

/// (pure) The full name of one of our images.
fn image_name(name: &str) -> String {
    format!("docker.io/undermesh/{name}:{}", env!("CARGO_PKG_VERSION"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_chosen_by_name() {
        let names = |wanted: &[&str]| {
            chosen(wanted).map(|recipes| recipes.iter().map(|recipe| recipe.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&["node"]).expect("known"), ["node"]);
        assert_eq!(names(&[]).expect("all").len(), RECIPES.len());
        assert!(names(&["nod"]).is_err());
    }

    #[test]
    fn bookinfo_is_deployed_with_the_image_that_is_built() {
        let text = fs::read_to_string(shell::root().join("examples/bookinfo/kubernetes.yaml")).expect("YAML");
        let named: Vec<_> = text.lines().filter(|line| line.contains("image:")).collect();
        assert!(named.len() > 6, "{named:?}");
        for line in named {
            assert!(line.contains(&image_name("bookinfo")), "{line}");
        }
    }
}
