//! Network namespaces of pods: entering them, and noticing that they are gone.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use mesh_net::socket;
use nix::sched::{CloneFlags, setns};
use thiserror::Error;

/// Why a namespace could not be entered.
#[derive(Debug, Error)]
pub enum NetnsError {
    /// The path does not lead to an open namespace.
    #[error("open the network namespace {}", path.display())]
    Open {
        /// What was opened.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The agent may not enter it.
    #[error("enter the network namespace {}", path.display())]
    Enter {
        /// What was entered.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The file is something else.
    #[error("{} is not a network namespace", path.display())]
    Other {
        /// What was opened.
        path: PathBuf,
    },
    /// It is the agent's own namespace: a pod of the host's network cannot be enrolled.
    #[error("{} is the agent's own network namespace", path.display())]
    Own {
        /// What was opened.
        path: PathBuf,
    },
    /// The thread that entered it panicked.
    #[error("the work inside the network namespace panicked")]
    Panicked,
}

impl NetnsError {
    /// Whether the path is what is wrong.
    pub fn is_the_callers(&self) -> bool {
        matches!(self, Self::Open { .. } | Self::Other { .. } | Self::Own { .. })
    }
}

/// Which namespace a path leads to, as the file system tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct NetnsId {
    /// Device of nsfs.
    pub device: u64,
    /// Inode: unique while anything holds the namespace, and this agent does.
    pub inode: u64,
}

/// What has become of the name of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    /// It still leads to the same namespace.
    Same,
    /// It is gone or leads elsewhere: the pod's sandbox has ended.
    Gone,
    /// It cannot be told now.
    Unknown,
}

/// An open network namespace. Holding it keeps the namespace and its interfaces alive, so it is dropped with the pod.
#[derive(Clone, Debug)]
pub struct Netns {
    file: Arc<File>,
    home: Arc<File>,
    path: Arc<Path>,
    id: NetnsId,
    cookie: u64,
}

impl Netns {
    /// Opens the namespace at `path`.
    ///
    /// # Errors
    /// It does not exist, is no network namespace, or is the agent's own.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let opened = |source| NetnsError::Open { path: path.to_owned(), source };
        let file = File::open(path).map_err(opened)?;
        let home = File::open("/proc/thread-self/ns/net").map_err(opened)?;
        let id = identify(&file).map_err(opened)?;
        if id == identify(&home).map_err(opened)? {
            return Err(NetnsError::Own { path: path.to_owned() });
        }
        let mut this = Self { file: Arc::new(file), home: Arc::new(home), path: path.into(), id, cookie: 0 };
        let cookie = this.on_thread(|| {
            let probe =
                std::net::UdpSocket::bind("[::]:0").or_else(|_| std::net::UdpSocket::bind("0.0.0.0:0"))?;
            socket::netns_cookie(&probe)
        })?;
        this.cookie = cookie.map_err(|source| NetnsError::Enter { path: path.to_owned(), source })?;
        Ok(this)
    }

    /// Runs `work` on a thread of its own inside the namespace, and waits for it: for work that leaves traces on its
    /// thread, takes long or brings a runtime along.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the work panicked.
    pub fn on_thread<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                enter(&self.file).map_err(|source| self.refused(source))?;
                Ok(work())
            });
            inside.join().map_err(|_| NetnsError::Panicked)?
        })
    }

    /// Runs `work` on this thread inside the namespace and returns home before anything else can run here. For the
    /// few system calls that open a socket, once per connection: a thread of its own for each would cost more than
    /// the dial (two `setns` take about a microsecond).
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> Result<T, NetnsError> {
        let _home = Visit::start(self).map_err(|source| self.refused(source))?;
        Ok(work())
    }

    /// Whether the name still leads here.
    pub fn name(&self) -> Name {
        name_of(&self.path, self.id)
    }

    /// Which namespace it is.
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// The kernel's number of it; never used twice.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn refused(&self, source: io::Error) -> NetnsError {
        if source.kind() == io::ErrorKind::InvalidInput {
            return NetnsError::Other { path: self.path.to_path_buf() };
        }
        NetnsError::Enter { path: self.path.to_path_buf(), source }
    }
}

/// The time that a thread of the runtime spends in a pod's namespace.
struct Visit<'a> {
    home: &'a File,
}

impl<'a> Visit<'a> {
    fn start(netns: &'a Netns) -> io::Result<Self> {
        enter(&netns.file)?;
        Ok(Self { home: &netns.home })
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        if let Err(error) = enter(self.home) {
            // The thread would go on to serve other pods from inside this one: their packets would leave through it.
            tracing::error!(%error, "cannot return from a pod's network namespace, aborting");
            std::process::abort();
        }
    }
}

fn enter(namespace: &File) -> io::Result<()> {
    setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
}

fn identify(file: &File) -> io::Result<NetnsId> {
    let metadata = file.metadata()?;
    Ok(NetnsId { device: metadata.dev(), inode: metadata.ino() })
}

/// What has become of `path` since it led to `id`.
pub fn name_of(path: &Path, id: NetnsId) -> Name {
    match std::fs::metadata(path) {
        Ok(found) if (found.dev(), found.ino()) == (id.device, id.inode) => Name::Same,
        Ok(_) => Name::Gone,
        // ESRCH: the process of a /proc path ended between look-up and read.
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
                || error.raw_os_error() == Some(libc::ESRCH) =>
        {
            Name::Gone
        }
        Err(_) => Name::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_leads_elsewhere_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("netns");
        std::fs::write(&path, "").unwrap();
        let id = identify(&File::open(&path).unwrap()).unwrap();
        assert_eq!(name_of(&path, id), Name::Same);
        assert_eq!(name_of(&path, NetnsId { inode: id.inode + 1, ..id }), Name::Gone);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(name_of(&path, id), Name::Gone);
        assert_eq!(name_of(&path.join("below"), id), Name::Gone);
    }

    #[test]
    fn the_agents_own_namespace_and_ordinary_files_are_refused() {
        assert!(matches!(Netns::open(Path::new("/proc/self/ns/net")), Err(NetnsError::Own { .. })));
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(Netns::open(file.path()), Err(NetnsError::Other { .. })));
        assert!(matches!(Netns::open(Path::new("/proc/1/ns/none")), Err(NetnsError::Open { .. })));
    }
}
