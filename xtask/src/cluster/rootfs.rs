//! The root file system of a machine of the cluster: the paths that a node has anywhere, so that manifests need nothing
//! special, over this machine's programs, which are only read.

use std::{
    fs,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, symlink},
    path::Path,
};

use anyhow::{Context as _, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::{chdir, pivot_root},
};

use super::unit::MachineSpec;

/// Where a machine sees its folder of this machine.
pub const FOLDER: &str = "/cluster";
/// Where a machine sees the programs of Kubernetes, and under which names.
const PROGRAMS: &str = "/opt/cluster/programs";
/// Each by its own name.
pub const BIN: &str = "/opt/cluster/bin";
/// Folders of a node that must lie on a disk: images, and the volumes of pods.
const ON_DISK: &[&str] = &["/var/lib/containerd", "/var/lib/kubelet"];
const EMPTY: &[&str] = &[
    "/etc",
    "/etc/cni/net.d",
    "/home",
    "/mnt",
    "/opt/cni/bin",
    "/proc",
    "/root",
    "/run/lock",
    "/run/netns",
    "/srv",
    "/sys",
    "/dev",
    "/var/lib",
    "/var/log/pods",
    "/var/log/containers",
];
/// Files of this machine's /etc that programs read.
const COPIED: &[&str] =
    &["group", "ld.so.cache", "nsswitch.conf", "os-release", "passwd", "protocols", "services"];
/// Where Debian's package has the CNI plugins, and those that the node's network needs.
const PLUGINS: (&str, &[&str]) = ("/usr/lib/cni", &["host-local", "loopback", "portmap", "ptp"]);
/// What the kubelet sets for the whole kernel. The machine shows it the value that it wants, and keeps its own.
const KUBELET_SYSCTLS: &[(&str, &str)] = &[
    ("kernel/keys/root_maxbytes", "25000000"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
];

/// Builds the root in mount and PID namespaces of this process's own, and makes it the root.
///
/// # Errors
/// When something cannot be mounted.
pub fn enter(spec: &MachineSpec) -> anyhow::Result<()> {
    // Nothing of this may reach the machine itself.
    change("/", MsFlags::MS_PRIVATE | MsFlags::MS_REC)?;
    let root = spec.folder.join("root");
    fs::create_dir_all(&root)?;
    filesystem("tmpfs", &root, "mode=0755")?;
    let inside = |path: &str| root.join(path.trim_start_matches('/'));

    for folder in EMPTY {
        fs::create_dir_all(inside(folder))?;
    }
    fs::DirBuilder::new().mode(0o755).create(inside("/tmp"))?;
    fs::set_permissions(inside("/tmp"), fs::Permissions::from_mode(0o1777))?;
    symlink("../run", inside("/var/run"))?;
    symlink("/proc/self/mounts", inside("/etc/mtab"))?;
    programs(&root)?;
    etc(spec, &root)?;
    kernel(&root)?;
    bind(&spec.folder, &inside(FOLDER), false)?;
    bind(&spec.programs, &inside(PROGRAMS), true)?;
    fs::create_dir_all(inside(BIN))?;
    for name in &spec.links {
        // Called by its own name: that is what lists of processes show.
        symlink(Path::new(PROGRAMS).join("kubernetes"), inside(BIN).join(name))?;
    }
    if spec.is_node {
        node(spec, &root)?;
    }

    chdir(&root).context("enter the root")?;
    pivot_root(".", ".").context("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH).context("leave the old root")?;
    chdir("/")?;
    // As systemd has it: mounts of the node show in pods that ask for it, and the other way.
    change("/", MsFlags::MS_SHARED | MsFlags::MS_REC)
}

fn programs(root: &Path) -> anyhow::Result<()> {
    bind(Path::new("/usr"), &root.join("usr"), true)?;
    for name in ["bin", "sbin", "lib", "lib32", "lib64"] {
        let outside = Path::new("/").join(name);
        match fs::read_link(&outside) {
            Ok(target) => symlink(target, root.join(name))?,
            Err(_) if outside.is_dir() => bind(&outside, &root.join(name), true)?,
            Err(_) => {}
        }
    }
    Ok(())
}

fn etc(spec: &MachineSpec, root: &Path) -> anyhow::Result<()> {
    for name in COPIED {
        let outside = Path::new("/etc").join(name);
        if outside.is_file() {
            fs::copy(&outside, root.join("etc").join(name))?;
        }
    }
    for (path, content) in &spec.files {
        let file = root.join(path.strip_prefix("/").unwrap_or(path));
        if let Some(folder) = file.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&file, content).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

fn kernel(root: &Path) -> anyhow::Result<()> {
    filesystem("proc", &root.join("proc"), "")?;
    filesystem("sysfs", &root.join("sys"), "")?;
    // Hybrid hosts mount the hierarchies on a tmpfs; on others this is one hierarchy.
    bind(Path::new("/sys/fs/cgroup"), &root.join("sys/fs/cgroup"), false)?;
    filesystem("bpf", &root.join("sys/fs/bpf"), "mode=0700")?;
    bind(Path::new("/dev"), &root.join("dev"), false)
}

fn node(spec: &MachineSpec, root: &Path) -> anyhow::Result<()> {
    for path in ON_DISK {
        let name = path.rsplit('/').next().unwrap_or(path);
        let disk = spec.folder.join(name);
        fs::create_dir_all(&disk)?;
        bind(&disk, &root.join(path.trim_start_matches('/')), false)?;
    }
    let (folder, names) = PLUGINS;
    for name in names {
        let plugin = Path::new(folder).join(name);
        // Copies: an agent's pod that mounts this folder finds programs, not links to what it does not see.
        fs::copy(&plugin, root.join("opt/cni/bin").join(name))
            .with_context(|| format!("copy {} (package containernetworking-plugins)", plugin.display()))?;
    }
    for (name, value) in KUBELET_SYSCTLS {
        let shown = root.join("run/sysctl").join(name);
        fs::create_dir_all(shown.parent().unwrap_or(root))?;
        fs::write(&shown, format!("{value}\n"))?;
        let real = root.join("proc/sys").join(name);
        ensure!(real.exists(), "this kernel has no {name}");
        bind(&shown, &real, false)?;
    }
    Ok(())
}

fn filesystem(kind: &str, at: &Path, options: &str) -> anyhow::Result<()> {
    let options = Some(options).filter(|options| !options.is_empty());
    mount(Some(kind), at, Some(kind), MsFlags::empty(), options)
        .with_context(|| format!("mount {kind} at {}", at.display()))
}

/// Shows `outside` at `inside`, with what is mounted below it.
fn bind(outside: &Path, inside: &Path, read_only: bool) -> anyhow::Result<()> {
    if outside.is_dir() {
        fs::create_dir_all(inside)?;
    }
    let none: Option<&str> = None;
    mount(Some(outside), inside, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
        .with_context(|| format!("bind {} to {}", outside.display(), inside.display()))?;
    if read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(none, inside, none, flags, none)
            .with_context(|| format!("make {} read-only", inside.display()))?;
    }
    Ok(())
}

fn change(at: &str, flags: MsFlags) -> anyhow::Result<()> {
    let none: Option<&str> = None;
    mount(none, at, none, flags, none).with_context(|| format!("change the propagation of {at}"))
}
