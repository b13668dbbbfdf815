//! What this kernel can do, found by trying, never by its version.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};
use nix::{
    mount::{MsFlags, mount},
    sys::{
        statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, statfs},
        utsname::uname,
    },
};

use super::{
    destroy,
    types::{Feature, KernelConfig, KernelError, ProbeReport},
};

/// Direct flows can be cut; without it there is no direct path.
pub const SOCK_DESTROY: &str = "SOCK_DESTROY";
/// The client's address is kept on the way to the application.
pub const FWMARK_ACCEPT: &str = "tcp_fwmark_accept";

/// The inode of the root of every cgroup hierarchy.
const ROOT_INODE: u64 = 1;

/// Looks at everything; `Err` only when the two file systems are missing.
pub fn probe(config: &KernelConfig) -> Result<ProbeReport, KernelError> {
    let cgroup = match &config.cgroup {
        Some(path) => true_root(path)?,
        None => cgroup_root(
            &fs::read_to_string("/proc/self/mountinfo")
                .map_err(KernelError::io("read /proc/self/mountinfo"))?,
        )
        .ok_or(KernelError::NoCgroup)?,
    };
    mounted(&config.bpffs, config.mount_bpffs)?;
    let kernel = uname().map(|names| names.release().to_string_lossy().into_owned()).unwrap_or_default();
    Ok(ProbeReport { kernel, cgroup, bpffs: config.bpffs.clone(), features: features(), reused: false })
}

/// The first required feature that is missing.
pub fn missing(report: &ProbeReport) -> Option<&'static str> {
    report.features.iter().find(|feature| feature.required && !feature.found).map(|feature| feature.name)
}

fn features() -> Vec<Feature> {
    let program = |kind| is_program_supported(kind).unwrap_or(false);
    let helper = |kind, id| is_helper_supported(kind, id).unwrap_or(false);
    let map = |kind| is_map_supported(kind).unwrap_or(false);
    let need = |name, purpose, found| Feature { name, found, required: true, purpose };
    let wish = |name, purpose, found| Feature { name, found, required: false, purpose };
    vec![
        need("BPF", "programs can be loaded at all", program(ProgramType::SocketFilter)),
        need("cgroup_sock_addr", "decide at connect()", program(ProgramType::CgroupSockAddr)),
        need("sock_ops", "record connections before their first packet", program(ProgramType::SockOps)),
        need("sk_lookup", "hand arrivals to the agent or the application", program(ProgramType::SkLookup)),
        need(
            "netns cookie in sock_ops",
            "tell whose socket it is",
            helper(ProgramType::SockOps, BpfHelper::BPF_FUNC_get_netns_cookie),
        ),
        need(
            "setsockopt in cgroup_sock_addr",
            "mark captured sockets",
            helper(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_setsockopt),
        ),
        need(
            "socket storage in sock_ops",
            "carry a decision from connect() to the first packet",
            helper(ProgramType::SockOps, BpfHelper::BPF_FUNC_sk_storage_get),
        ),
        need("ring buffer", "tell of flows opened, closed and refused", map(MapType::RingBuf)),
        need("socket map", "find the agent's listeners", map(MapType::SockMap)),
        need(
            FWMARK_ACCEPT,
            "bring replies of accepted connections back",
            Path::new("/proc/sys/net/ipv4/tcp_fwmark_accept").exists(),
        ),
        wish(
            SOCK_DESTROY,
            "cut live direct connections; without it there is no direct path",
            destroy::supported(),
        ),
    ]
}

/// The mount point of the true root of a cgroup v2 hierarchy: its fourth field is `/`.
fn cgroup_root(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let mut fields = place.split(' ');
        let (root, point) = (fields.nth(3)?, fields.next()?);
        (kind.split(' ').next() == Some("cgroup2") && root == "/").then(|| PathBuf::from(unescape(point)))
    })
}

/// The root of the hierarchy at `given`, or of the one that a hybrid host has below. A process in a cgroup namespace of
/// its own may see a part of the hierarchy as if it were the whole: only the root's inode is 1.
fn true_root(given: &Path) -> Result<PathBuf, KernelError> {
    let is_v2 = |path: &Path| statfs(path).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC);
    let refused = |why: &str| KernelError::NotCgroupRoot { path: given.to_owned(), why: why.to_owned() };
    let found = [given.to_owned(), given.join("unified")].into_iter().find(|path| is_v2(path));
    let path = found.ok_or_else(|| refused("no cgroup v2 is mounted there"))?;
    let inode = fs::metadata(&path).map_err(KernelError::io(format!("look at {}", path.display())))?.ino();
    if inode == ROOT_INODE { Ok(path) } else { Err(refused("it is a part of the hierarchy, not its root")) }
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// Makes sure that bpffs is at `path`; mounts it when that is wanted and allowed.
fn mounted(path: &Path, may_mount: bool) -> Result<(), KernelError> {
    let no = |source: io::Error| KernelError::NoBpffs { path: path.to_owned(), source };
    let is_bpffs = || statfs(path).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC);
    if is_bpffs() {
        return Ok(());
    }
    if !may_mount {
        let why = "it is not mounted on the host, or not handed into the container; on the host: mount -t bpf bpf /sys/fs/bpf";
        return Err(no(io::Error::other(why)));
    }
    fs::create_dir_all(path).map_err(no)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), path, Some("bpf"), flags, Some("mode=0700")).map_err(|errno| no(errno.into()))?;
    if is_bpffs() { Ok(()) } else { Err(no(io::Error::other("mounted, but still no bpffs"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_given_directory_must_be_the_root() {
        let directory = tempfile::tempdir().unwrap();
        let error = true_root(directory.path()).unwrap_err().to_string();
        assert!(error.contains("no cgroup v2"), "{error}");
        let Some(root) = cgroup_root(&fs::read_to_string("/proc/self/mountinfo").unwrap()) else { return };
        assert_eq!(true_root(&root).unwrap(), root);
        if let Some(parent) = root.parent().filter(|_| root.ends_with("unified")) {
            assert_eq!(true_root(parent).unwrap(), root, "a hybrid host's directory");
        }
        let part = fs::read_dir(&root).unwrap().filter_map(Result::ok).find(|entry| entry.path().is_dir());
        if let Some(part) = part {
            let error = true_root(&part.path()).unwrap_err().to_string();
            assert!(error.contains("not its root"), "{error}");
        }
    }

    #[test]
    fn only_a_true_root_of_cgroup_v2_counts() {
        let check = |text: &str, expected: Option<&str>| {
            assert_eq!(cgroup_root(text), expected.map(PathBuf::from), "{text}");
        };
        check("26 25 0:24 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw", Some("/sys/fs/cgroup"));
        check(
            "26 25 0:24 / /sys/fs/cgroup rw shared:4 master:1 - tmpfs tmpfs rw\n\
               27 26 0:25 / /sys/fs/cgroup/unified rw shared:5 - cgroup2 cgroup2 rw",
            Some("/sys/fs/cgroup/unified"),
        );
        // A container sees only its own part.
        check("26 25 0:24 /kubepods/pod1 /sys/fs/cgroup rw - cgroup2 cgroup2 rw", None);
        check("26 25 0:24 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu", None);
        check("26 25 0:24 / /a\\040b rw - cgroup2 cgroup2 rw", Some("/a b"));
        check("", None);
    }
}
