//! The initramfs: busybox, iproute2, our programs, the suites, the modules, and a script that runs them.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, ensure};

use super::{END_MARK, SUITE_MARK, package::Kernel};
use crate::{shell, test::cargo_test};

/// Programs of the mesh.
const PROGRAMS: &[&str] = &["meshctl", "mesh-control", "mesh-node"];
/// Programs of this machine that busybox has none or a lesser one of.
const TOOLS: &[&str] = &["ip", "nsenter", "bash", "sleep"];
/// Suites that run in each kernel: the BPF programs themselves, and the matrix of paths in a small world.
const SUITES: &[&str] = &["kernel", "world"];

const INIT: &str = r#"#!/bin/sh
export PATH=/usr/local/bin:/usr/bin:/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount --make-rprivate /
ulimit -n 65536
echo "kernel $(uname -r)"
for module in $(cat /modules/order); do insmod "/modules/$module" || echo "insmod $module failed"; done
ip link set lo up
cd /app
"#;

/// What every image holds, whatever the kernel.
pub struct Contents {
    programs: Vec<PathBuf>,
    suites: Vec<(String, PathBuf)>,
}

impl Contents {
    /// Builds the suites and finds everything.
    ///
    /// # Errors
    /// When something does not build or is not installed.
    pub fn collect() -> anyhow::Result<Self> {
        let built = shell::target_dir().join("debug");
        let programs = PROGRAMS.iter().map(|name| built.join(name)).collect();
        Ok(Self { programs, suites: suites()? })
    }
}

/// The suites' executables.
fn suites() -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut cargo = cargo_test(&["--no-run", "--message-format=json"]);
    for name in SUITES {
        cargo.args(["--test", name]);
    }
    let messages = shell::output(&mut cargo).context("build the suites")?;
    let mut found = Vec::new();
    for line in messages.lines() {
        let message: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        let name = message["target"]["name"].as_str().unwrap_or_default();
        if let Some(file) = message["executable"].as_str()
            && SUITES.contains(&name)
        {
            found.push((name.to_owned(), PathBuf::from(file)));
        }
    }
    ensure!(found.len() == SUITES.len(), "cargo built {found:?}, not {SUITES:?}");
    Ok(found)
}

/// Packs the image for one kernel.
///
/// # Errors
/// When a file cannot be copied or cpio fails.
pub fn pack(contents: &Contents, kernel: &Kernel, folder: &Path) -> anyhow::Result<PathBuf> {
    let root = folder.join("root");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    for dir in [
        "bin", "usr/bin", "app", "modules", "dev", "proc", "sys", "run", "tmp", "etc", "lib64", "lib", "root",
    ] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).context("busybox (package busybox-static)")?;
    symlink("busybox", root.join("bin/sh"))?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\n")?;
    fs::write(root.join("etc/hosts"), "127.0.0.1 localhost\n")?;
    fs::write(root.join("etc/resolv.conf"), "")?;

    let mut libraries = BTreeSet::new();
    for tool in TOOLS {
        let file = shell::on_path(tool).with_context(|| format!("{tool} is not installed"))?;
        libraries.extend(shell::libraries_of(&file)?);
        fs::copy(&file, root.join("usr/bin").join(tool))?;
    }
    let named = contents.programs.iter().map(|file| (file.file_name().unwrap_or_default().into(), file));
    let suites = contents.suites.iter().map(|(name, file)| (PathBuf::from(name), file));
    for (name, file) in named.chain(suites) {
        libraries.extend(shell::libraries_of(file)?);
        let copy = root.join("app").join(name);
        // Without debug information: the image is held in memory twice.
        shell::output(shell::command("strip").arg("-o").arg(&copy).arg(file))?;
    }
    for library in libraries {
        let copy = root.join(library.strip_prefix("/").unwrap_or(&library));
        fs::create_dir_all(copy.parent().unwrap_or(&root))?;
        fs::copy(&library, copy).with_context(|| format!("copy {}", library.display()))?;
    }
    add_modules(kernel, &root.join("modules"))?;
    write_init(contents, &root.join("init"))?;
    archive(&root, folder.join("initramfs"))
}

fn add_modules(kernel: &Kernel, folder: &Path) -> anyhow::Result<()> {
    let mut order = String::new();
    for module in &kernel.modules {
        let name = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let plain = name.trim_end_matches(".xz").to_owned();
        if plain == name {
            fs::copy(module, folder.join(&name))?;
        } else {
            // busybox inserts what it is given.
            let out = File::create(folder.join(&plain))?;
            let status = shell::command("xz").arg("-dc").arg(module).stdout(out).status()?;
            ensure!(status.success(), "xz: {}", module.display());
        }
        order += &format!("{plain}\n");
    }
    Ok(fs::write(folder.join("order"), order)?)
}

fn write_init(contents: &Contents, file: &Path) -> anyhow::Result<()> {
    let mut script = INIT.to_owned();
    script += &format!("./mesh-node probe; echo \"{SUITE_MARK}probe $?\"\n");
    for (name, _) in &contents.suites {
        script += &format!("./{name} --test-threads 1; echo \"{SUITE_MARK}{name} $?\"\n");
    }
    script += &format!("echo {END_MARK}\npoweroff -f\n");
    fs::write(file, script)?;
    Ok(fs::set_permissions(file, fs::Permissions::from_mode(0o755))?)
}

/// Not compressed: emulated unpacking costs more than the disk.
fn archive(root: &Path, file: PathBuf) -> anyhow::Result<PathBuf> {
    let mut find = shell::command("find").arg(".").current_dir(root).stdout(Stdio::piped()).spawn()?;
    let names = find.stdout.take().context("the output of find")?;
    let mut cpio = shell::command("cpio");
    cpio.args(["--quiet", "-o", "-H", "newc"]).current_dir(root).stdin(names).stdout(File::create(&file)?);
    let status = cpio.status().context("start cpio")?;
    ensure!(find.wait()?.success() && status.success(), "cpio: {status}");
    Ok(file)
}
