//! Programs from Go modules whose versions are pinned in `xtask/go`: built once into a cache that all checkouts of this
//! user share, keyed by the module's files.

mod toolchain;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, ensure};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest as _, Sha256};

use crate::shell;

pub use toolchain::{MINIMUM, ensure_toolchain};

/// One of our Go modules.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// Folder below `xtask/go`.
    pub folder: &'static str,
    /// Programs: what `go build` or `go test -c` makes.
    pub programs: &'static [Program],
}

/// One program of a module.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Name of the file.
    pub name: &'static str,
    /// Package, as `go build` takes it.
    pub package: &'static str,
    /// For the linker.
    pub linker_flags: &'static str,
    /// A test binary, made by `go test -c`.
    pub is_test: bool,
    /// Seconds that it took on two cores with nothing cached: said before it begins.
    pub seconds: u32,
}

impl Module {
    /// The folder with the module's programs, built if they are not there yet.
    ///
    /// # Errors
    /// When there is no Go toolchain, or something does not build.
    pub fn built(&self) -> anyhow::Result<PathBuf> {
        let source = shell::root().join("xtask/go").join(self.folder);
        let cache = cache_dir()?;
        let programs = cache.join(format!("{}-{}", self.folder, key(&source)?));
        if self.complete(&programs) {
            return Ok(programs);
        }
        fs::create_dir_all(&programs).with_context(|| format!("make {}", programs.display()))?;
        // Two checkouts that ask at the same time: the second waits and finds it done.
        let lock = File::create(cache.join(format!("{}.lock", self.folder)))?;
        let _held = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error).context("lock")?;
        let go = ensure_toolchain()?;
        for program in self.programs {
            program.build(&go, &source, &programs)?;
        }
        Ok(programs)
    }

    fn complete(&self, folder: &Path) -> bool {
        self.programs.iter().all(|program| folder.join(program.name).is_file())
    }
}

impl Program {
    fn build(&self, go: &Path, source: &Path, folder: &Path) -> anyhow::Result<()> {
        let done = folder.join(self.name);
        if done.is_file() {
            return Ok(());
        }
        println!("go: building {} (about {} s on two cores, once)", self.name, self.seconds);
        let began = Instant::now();
        // Renamed when complete: an interrupted link leaves no program behind.
        let partial = folder.join(format!("{}.partial", self.name));
        let mut build = command(go, source);
        if self.is_test {
            build.args(["test", "-c"]);
        } else {
            build.arg("build");
        }
        build.args(["-trimpath", "-buildvcs=false", "-ldflags", self.linker_flags, "-o"]).arg(&partial);
        shell::run(build.arg(self.package))
            .with_context(|| format!("build {} in {}", self.name, source.display()))?;
        ensure!(partial.is_file(), "{} built nothing", self.package);
        fs::rename(&partial, &done)?;
        println!("go: {} took {} s", self.name, began.elapsed().as_secs());
        Ok(())
    }
}

/// A `go` that builds static programs with the versions that are written down, in the folder of a module.
pub fn command(go: &Path, folder: &Path) -> Command {
    let mut command = Command::new(go);
    command.current_dir(folder).env("CGO_ENABLED", "0").env("GOTOOLCHAIN", "local");
    command.env("GOFLAGS", "-mod=readonly").env("GOWORK", "off");
    command
}

/// Where what is built once is kept.
///
/// # Errors
/// When it cannot be made.
pub fn cache_dir() -> anyhow::Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    let folder = base.context("neither XDG_CACHE_HOME nor HOME is set")?.join("undermesh/go");
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    Ok(folder)
}

/// Names a module's content: every file, by name and bytes.
fn key(folder: &Path) -> anyhow::Result<String> {
    let mut files = Vec::new();
    collect(folder, &mut files)?;
    files.sort();
    let mut hash = Sha256::new();
    hash.update(format!("{MINIMUM:?}"));
    for file in files {
        let content = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        hash.update(format!("{} {}\n", file.strip_prefix(folder).unwrap_or(&file).display(), content.len()));
        hash.update(content);
    }
    Ok(hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect())
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        match path.is_dir() {
            true => collect(&path, files)?,
            false => files.push(path),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_follows_names_and_content() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("write");
        let now = || key(folder.path()).expect("a key");
        write("go.mod", "module a");
        let first = now();
        assert_eq!(first, now());
        write("go.sum", "");
        let second = now();
        assert_ne!(first, second);
        write("go.mod", "module b");
        assert_ne!(second, now());
    }
}
