//! Control groups of a cluster, in every hierarchy of the machine: one tree in v2, several in v1, both on hybrid hosts.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

/// A killed process leaves its group a moment later.
const EMPTY_DEADLINE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

/// Where the hierarchies are mounted.
///
/// # Errors
/// When the mounts of this process cannot be read, or there is no cgroup v2.
pub fn hierarchies() -> anyhow::Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read the mounts")?;
    let found = roots(&mounts);
    if !found.iter().any(|folder| is_v2(folder)) {
        bail!("no cgroup v2 is mounted below /sys/fs/cgroup; the mesh needs one");
    }
    Ok(found)
}

/// (pure) Mount points of whole hierarchies.
fn roots(mountinfo: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for line in mountinfo.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let fields: Vec<_> = before.split(' ').collect();
        let is_cgroup = after.starts_with("cgroup ") || after.starts_with("cgroup2 ");
        if let (true, Some(&"/"), Some(point)) = (is_cgroup, fields.get(3), fields.get(4))
            && point.starts_with("/sys/fs/cgroup")
            && !found.iter().any(|known| known == Path::new(point))
        {
            found.push(PathBuf::from(point));
        }
    }
    found
}

fn is_v2(hierarchy: &Path) -> bool {
    hierarchy.join("cgroup.controllers").exists()
}

/// Makes `group` and what is above it everywhere, with every controller handed down to it.
///
/// # Errors
/// When a hierarchy refuses.
pub fn make(hierarchies: &[PathBuf], group: &Path) -> anyhow::Result<()> {
    for hierarchy in hierarchies {
        let mut folder = hierarchy.clone();
        hand_down(&folder);
        for part in group {
            folder.push(part);
            if !folder.exists() {
                fs::create_dir(&folder).with_context(|| format!("make {}", folder.display()))?;
            }
            inherit_cpus(&folder)?;
        }
    }
    Ok(())
}

/// Hands every controller down from `group` to its children, in v2.
pub fn delegate(hierarchies: &[PathBuf], group: &Path) {
    for hierarchy in hierarchies {
        let mut folder = hierarchy.clone();
        hand_down(&folder);
        for part in group {
            folder.push(part);
            hand_down(&folder);
        }
    }
}

/// Enables one controller after the other: one that is refused takes no other with it. What is missing in the end, the
/// kubelet names.
fn hand_down(folder: &Path) {
    let controllers = fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
    for controller in controllers.split_whitespace() {
        let _ = fs::write(folder.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// In v1 a new cpuset is empty and takes no process.
fn inherit_cpus(folder: &Path) -> anyhow::Result<()> {
    let Some(parent) = folder.parent() else { return Ok(()) };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = folder.join(file);
        let empty = !folder.join("cgroup.controllers").exists()
            && fs::read_to_string(&own).is_ok_and(|value| value.trim().is_empty());
        if empty {
            fs::write(&own, fs::read_to_string(parent.join(file))?)
                .with_context(|| format!("write {}", own.display()))?;
        }
    }
    Ok(())
}

/// Moves this process into `group`, in every hierarchy.
///
/// # Errors
/// When one refuses.
pub fn enter(hierarchies: &[PathBuf], group: &Path) -> anyhow::Result<()> {
    for hierarchy in hierarchies {
        let file = hierarchy.join(group).join("cgroup.procs");
        fs::write(&file, "0").with_context(|| format!("enter {}", file.display()))?;
    }
    Ok(())
}

/// Removes `group` and all below it, once their processes are gone.
///
/// # Errors
/// When one is still in use after a while.
pub fn remove(hierarchies: &[PathBuf], group: &Path) -> anyhow::Result<()> {
    let end = Instant::now() + EMPTY_DEADLINE;
    for hierarchy in hierarchies {
        let folder = hierarchy.join(group);
        while let Err(error) = remove_tree(&folder) {
            if Instant::now() > end {
                return Err(error).with_context(|| format!("remove {}", folder.display()));
            }
            thread::sleep(PAUSE);
        }
    }
    Ok(())
}

/// Removes `group` where nothing is in it.
pub fn remove_empty(hierarchies: &[PathBuf], group: &Path) {
    for hierarchy in hierarchies {
        let _ = fs::remove_dir(hierarchy.join(group));
    }
}

fn remove_tree(folder: &Path) -> std::io::Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_hierarchies_are_found_once() {
        let hybrid = "\
30 20 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw
31 30 0:27 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
32 30 0:28 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
33 30 0:28 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
34 30 0:28 /some/group /sys/fs/cgroup/other rw - cgroup2 cgroup2 rw
35 30 0:28 / /elsewhere rw - cgroup2 cgroup2 rw";
        assert_eq!(roots(hybrid), ["/sys/fs/cgroup/memory", "/sys/fs/cgroup/unified"].map(PathBuf::from));
        let pure = "30 20 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate";
        assert_eq!(roots(pure), ["/sys/fs/cgroup"].map(PathBuf::from));
    }
}
