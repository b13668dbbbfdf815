//! A group of processes that can be ended as a whole, whatever they forked meanwhile: cgroup v2.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use super::layout::insist;

/// Our folder at the root of the hierarchy; one group per mesh in it.
const OURS: &str = "undermesh-local";
/// The kernel ends the processes of a killed group at once; this is for a machine under load.
const EMPTY_DEADLINE: Duration = Duration::from_secs(10);
/// There is no way to wait for an empty group without a watch on `cgroup.events`.
const POLL: Duration = Duration::from_millis(10);

/// A group; that of a mesh holds one per pod.
#[derive(Clone, Debug)]
pub struct Group(PathBuf);

impl Group {
    /// The group of the mesh `name`, whether it exists or not.
    ///
    /// # Errors
    /// When this machine has no cgroup v2 hierarchy.
    pub fn of_mesh(name: &str) -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let root = unified(&mounts).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, "no cgroup v2 hierarchy is mounted on this machine")
        })?;
        Ok(Self(root.join(OURS).join(name)))
    }

    /// A group inside this one.
    pub fn child(&self, name: &str) -> Self {
        Self(self.0.join(name))
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the group of a mesh; nothing happens when it exists.
    ///
    /// # Errors
    /// When the hierarchy is read-only.
    pub fn create(&self) -> io::Result<()> {
        // The folder of all meshes goes with the last of them, which may be this moment.
        insist(|| fs::create_dir_all(&self.0))
    }

    /// Makes a group inside one that exists. Where the outer one was removed meanwhile, the mesh is ending and gets
    /// no new processes.
    ///
    /// # Errors
    /// When there is no outer group.
    pub fn create_inside(&self) -> io::Result<()> {
        match fs::create_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        }
    }

    /// Ends every process in it and below, waits for them, and removes the groups. Fine when it does not exist.
    ///
    /// # Errors
    /// When the processes do not end within ten seconds.
    pub fn destroy(&self) -> io::Result<()> {
        if !self.0.exists() {
            return Ok(());
        }
        let deadline = Instant::now() + EMPTY_DEADLINE;
        loop {
            // Each time: a process may have been on its way in. Someone else may have removed the group by now.
            match fs::write(self.0.join("cgroup.kill"), "1") {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            match remove_tree(&self.0) {
                Ok(()) => break,
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => thread::sleep(POLL),
            }
        }
        // The folder of all meshes goes with the last of them.
        if let Some(parent) = self.0.parent().filter(|parent| parent.ends_with(OURS)) {
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

/// Removes a group and those below; fails while a process is in one.
fn remove_tree(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// (pure) Where the cgroup v2 hierarchy is mounted; `/sys/fs/cgroup/unified` on hybrid machines.
fn unified(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        (after.split(' ').next()? == "cgroup2").then_some(())?;
        before.split(' ').nth(4).map(PathBuf::from)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchy_is_found_on_pure_and_hybrid_machines() {
        for (mounts, expected) in [
            ("25 20 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw", Some("/sys/fs/cgroup")),
            (
                "30 20 0:3 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n41 31 0:38 / /sys/fs/cgroup/unified rw - \
                 cgroup2 cgroup2 rw",
                Some("/sys/fs/cgroup/unified"),
            ),
            ("30 20 0:3 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids", None),
        ] {
            assert_eq!(unified(mounts), expected.map(PathBuf::from));
        }
    }
}
