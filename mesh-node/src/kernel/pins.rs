//! Where the kernel's side of an agent lies in bpffs, and who owns it:
//! `BPFFS/undermesh/<layout>/<node>/{maps,links}`. The running agent holds a lock on its directory.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use mesh_ebpf_common::LAYOUT;
use nix::fcntl::{Flock, FlockArg};

use super::{sys, types::KernelError};

/// One agent's directory, locked.
#[derive(Debug)]
pub struct Pins {
    root: PathBuf,
    /// Dropped with the process, however it ends.
    _lock: Flock<File>,
}

impl Pins {
    /// Makes the directory of `node` and takes its lock.
    ///
    /// # Errors
    /// When another agent of this node runs, or bpffs refuses.
    pub fn own(bpffs: &Path, node: &str) -> Result<Self, KernelError> {
        let root = directory(bpffs, node)?;
        for part in [root.clone(), root.join("maps"), root.join("links")] {
            fs::create_dir_all(&part).map_err(KernelError::io(format!("create {}", part.display())))?;
        }
        let lock = lock(&root, node)?;
        // What an agent of another layout left would go on deciding beside this one's programs, by records that nobody
        // writes any more.
        let own = root.parent().unwrap_or(&root);
        let top = own.parent().unwrap_or(own).to_owned();
        for layout in present(&top)?.into_iter().filter(|layout| layout != LAYOUT) {
            let other = top.join(&layout).join(node.replace('.', "~"));
            if other.is_dir() {
                let _held = self::lock(&other, node)?;
                remove(&other)?;
                let _ = fs::remove_dir(top.join(&layout));
            }
        }
        Ok(Self { root, _lock: lock })
    }

    /// Where the maps are.
    pub fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    /// Where one link is.
    pub fn link(&self, name: &str) -> PathBuf {
        self.root.join("links").join(name)
    }

    /// Detaches and removes one link, if it is there.
    ///
    /// # Errors
    /// When bpffs refuses.
    pub fn remove_link(&self, name: &str) -> Result<(), KernelError> {
        unpin(&self.link(name))
    }

    /// Names of the links that are there.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn links(&self) -> Result<Vec<String>, KernelError> {
        let path = self.root.join("links");
        names(&path).map_err(KernelError::io(format!("read {}", path.display())))
    }
}

fn directory(bpffs: &Path, node: &str) -> Result<PathBuf, KernelError> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if node.is_empty() || node.len() > 253 || !node.chars().all(good) {
        let source = io::Error::new(
            io::ErrorKind::InvalidInput,
            "a node name has only letters, digits, '-', '_', '.'",
        );
        return Err(KernelError::Io { what: format!("node name {node:?}"), source });
    }
    // bpffs reserves the dot.
    Ok(bpffs.join("undermesh").join(LAYOUT).join(node.replace('.', "~")))
}

fn lock(root: &Path, node: &str) -> Result<Flock<File>, KernelError> {
    let file = File::open(root).map_err(KernelError::io(format!("open {}", root.display())))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => KernelError::Busy { node: node.to_owned(), path: root.to_owned() },
        errno => KernelError::Io { what: format!("lock {}", root.display()), source: errno.into() },
    })
}

/// Which agents' remains are removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CleanWhat<'a> {
    /// Those of one node, of any layout.
    Node(&'a str),
    /// Those of every node whose agent does not run.
    All,
}

/// Removes programs, links and maps that agents have left behind; pods are no longer captured then. Returns the
/// directories that were removed.
///
/// # Errors
/// When the named node's agent runs, or bpffs refuses.
pub fn clean(bpffs: &Path, what: CleanWhat<'_>) -> Result<Vec<PathBuf>, KernelError> {
    let mut removed = Vec::new();
    let top = bpffs.join("undermesh");
    for layout in present(&top)? {
        for entry in present(&top.join(&layout))? {
            let path = top.join(&layout).join(&entry);
            let node = entry.replace('~', ".");
            if matches!(what, CleanWhat::Node(wanted) if wanted != node) {
                continue;
            }
            match lock(&path, &node) {
                Ok(_held) => remove(&path)?,
                Err(KernelError::Busy { .. }) if what == CleanWhat::All => continue,
                Err(error) => return Err(error),
            }
            removed.push(path);
        }
        // Another node's directory may be in it.
        let _ = fs::remove_dir(top.join(&layout));
    }
    let _ = fs::remove_dir(&top);
    Ok(removed)
}

/// Links first: no program may run on maps that are half gone.
fn remove(path: &Path) -> Result<(), KernelError> {
    for part in ["links", "maps"] {
        let part = path.join(part);
        for name in present(&part)? {
            unpin(&part.join(&name))?;
        }
        let _ = fs::remove_dir(&part);
    }
    fs::remove_dir(path).map_err(KernelError::io(format!("remove {}", path.display())))
}

/// Removes a pin. What a link attaches is detached at once: by itself it would be some time later.
fn unpin(path: &Path) -> Result<(), KernelError> {
    if path.parent().is_some_and(|part| part.ends_with("links")) {
        // A link whose namespace is gone has nothing to detach.
        let _ = sys::object(path).and_then(|link| sys::detach(link.as_fd()));
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(KernelError::io(format!("remove {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}

fn present(path: &Path) -> Result<Vec<String>, KernelError> {
    match names(path) {
        Ok(names) => Ok(names),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(KernelError::io(format!("read {}", path.display()))(error)),
    }
}

fn names(path: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_name_cannot_lead_out_of_its_directory() {
        let at = |node| directory(Path::new("/b"), node).ok();
        assert_eq!(at("n1.example"), Some(Path::new("/b/undermesh").join(LAYOUT).join("n1~example")));
        for bad in ["", "..", "a/b", "a b", "../x", "a~b", "ü"] {
            assert!(bad == ".." || at(bad).is_none(), "{bad}");
        }
        assert_eq!(at(".."), Some(Path::new("/b/undermesh").join(LAYOUT).join("~~")));
    }
}
