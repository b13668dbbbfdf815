//! Debian's kernel packages: fetched, unpacked, never installed.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use crate::shell;

/// Modules that a mesh needs and that these kernels do not have built in.
const MODULES: &[&str] = &["ipv6", "veth", "bridge", "inet_diag", "tcp_diag", "dummy"];

/// An unpacked kernel.
#[derive(Debug)]
pub struct Kernel {
    /// As `uname -r` says.
    pub version: String,
    /// The image to boot.
    pub image: PathBuf,
    /// Files of modules, in the order in which they must be inserted.
    pub modules: Vec<PathBuf>,
}

/// The newest cloud kernel of a release; what was unpacked before is used again.
///
/// # Errors
/// When the mirror has none, or the package is not as expected.
pub fn fetch(release: &str, folder: &Path) -> anyhow::Result<Kernel> {
    let unpacked = folder.join(release);
    if !unpacked.join("boot").is_dir() {
        let package = newest(release)?;
        println!("kernels: fetching {package}");
        let download = folder.join(format!("{release}.download"));
        fs::create_dir_all(&download)?;
        shell::output(shell::command("apt-get").args(["download", "-q", &package]).current_dir(&download))?;
        let file = only_entry(&download)?;
        // Unpacked aside and moved: a broken attempt is not taken for a kernel later.
        let aside = folder.join(format!("{release}.part"));
        shell::output(shell::command("dpkg-deb").arg("-x").args([&file, &aside]))?;
        fs::rename(&aside, &unpacked)?;
        fs::remove_dir_all(&download)?;
    }
    let version = only_name(&unpacked.join("lib/modules"))?;
    shell::output(shell::command("depmod").arg("-b").arg(&unpacked).arg(&version))
        .context("index the modules")?;
    let image = unpacked.join("boot").join(format!("vmlinuz-{version}"));
    let modules = unpacked.join("lib/modules").join(&version);
    let index = fs::read_to_string(modules.join("modules.dep"))?;
    let modules = order(&index, MODULES).into_iter().map(|file| modules.join(file)).collect();
    Ok(Kernel { version, image, modules })
}

fn newest(release: &str) -> anyhow::Result<String> {
    let pattern = format!(r"^linux-image-{}\.[0-9.+a-z-]*cloud-amd64$", release.replace('.', r"\."));
    let listed = shell::output(shell::command("apt-cache").args(["search", "--names-only", &pattern]))?;
    let names = listed.lines().filter_map(|line| line.split_whitespace().next());
    let newest = names.max_by_key(|name| numbers(name)).map(str::to_owned);
    newest.with_context(|| format!("the package mirror has no kernel {release}: run `apt-get update`"))
}

/// (pure) The numbers of a name, so that 56 is newer than 6.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// (pure) Files of these modules and of what they depend on, dependencies first, out of `modules.dep`.
fn order<'a>(index: &'a str, wanted: &[&str]) -> Vec<&'a str> {
    let mut files = Vec::new();
    for module in wanted {
        let line = index.lines().filter_map(|line| line.split_once(':')).find(|(file, _)| {
            let name = file.rsplit('/').next().unwrap_or_default();
            name.split('.').next().is_some_and(|name| name.replace('-', "_") == *module)
        });
        // Built in, when the index does not have it.
        let Some((file, dependencies)) = line else { continue };
        // The index lists the nearest dependency first.
        for needed in dependencies.split_whitespace().rev().chain([file]) {
            if !files.contains(&needed) {
                files.push(needed);
            }
        }
    }
    files
}

fn only_entry(folder: &Path) -> anyhow::Result<PathBuf> {
    let entry = fs::read_dir(folder)?.next().with_context(|| format!("{} is empty", folder.display()))?;
    Ok(entry?.path())
}

fn only_name(folder: &Path) -> anyhow::Result<String> {
    let path = only_entry(folder)?;
    Ok(path.file_name().unwrap_or_default().to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_is_by_number() {
        let mut names = ["linux-image-6.1.0-9-cloud-amd64", "linux-image-6.1.0-56-cloud-amd64"];
        names.sort_by_key(|name| numbers(name));
        assert_eq!(names[1], "linux-image-6.1.0-56-cloud-amd64");
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let index = "kernel/net/llc/llc.ko:\n\
                     kernel/net/802/stp.ko: kernel/net/llc/llc.ko\n\
                     kernel/net/bridge/bridge.ko: kernel/net/802/stp.ko kernel/net/llc/llc.ko\n\
                     kernel/drivers/net/veth.ko:\n\
                     kernel/net/ipv4/tcp_diag.ko.xz: kernel/net/ipv4/inet_diag.ko.xz\n\
                     kernel/net/ipv4/inet_diag.ko.xz:\n";
        let files = order(index, &["bridge", "veth", "inet_diag", "tcp_diag", "ipv6"]);
        let names: Vec<_> = files.iter().filter_map(|file| file.rsplit('/').next()).collect();
        assert_eq!(names, ["llc.ko", "stp.ko", "bridge.ko", "veth.ko", "inet_diag.ko.xz", "tcp_diag.ko.xz"]);
    }
}
