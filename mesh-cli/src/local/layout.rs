//! Where a local mesh keeps what it needs while it runs; all of it vanishes with the mesh.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::expand::Key;

/// Folder of all local meshes.
const ROOT: &str = "/run/undermesh/local";

/// Tries to remove a folder in which something may still appear.
const REMOVALS: usize = 100;

/// Paths of one mesh.
#[derive(Clone, Debug)]
pub struct Layout {
    dir: PathBuf,
}

/// Why a name cannot be one of a mesh.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no name of a local mesh: 1 to 40 letters, digits and dashes are")]
pub struct BadName(String);

impl Layout {
    /// The mesh called `name`.
    ///
    /// # Errors
    /// When the name is no file name, or so long that socket paths below it would not fit.
    pub fn new(name: &str) -> Result<Self, BadName> {
        let fits = (1..=40).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !name.starts_with('-');
        if !fits {
            return Err(BadName(name.to_owned()));
        }
        Ok(Self { dir: Path::new(ROOT).join(name) })
    }

    /// The mesh's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Who runs the mesh, for those who find it after a crash.
    pub fn owner(&self) -> PathBuf {
        self.dir.join("owner.json")
    }

    /// The supervisor's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("supervisor.sock")
    }

    /// The folder that the control plane reads.
    pub fn objects(&self) -> PathBuf {
        self.dir.join("objects")
    }

    /// Bearer tokens, one file per caller of the control plane.
    pub fn credentials(&self) -> PathBuf {
        self.dir.join("credentials")
    }

    /// The CA's state.
    pub fn ca(&self) -> PathBuf {
        self.dir.join("ca")
    }

    /// The root certificates.
    pub fn roots(&self) -> PathBuf {
        self.ca().join("root-cert.pem")
    }

    /// The control plane's folder.
    pub fn control(&self) -> PathBuf {
        self.dir.join("control")
    }

    /// A node's folder.
    pub fn node(&self, name: &str) -> PathBuf {
        self.dir.join(format!("node-{name}"))
    }

    /// A waypoint's folder.
    pub fn waypoint(&self, gateway: &Key) -> PathBuf {
        self.dir.join(format!("waypoint-{}.{}", gateway.namespace, gateway.name))
    }

    /// A pod's folder.
    pub fn pod(&self, pod: &Key) -> PathBuf {
        self.dir.join("pods").join(format!("{}.{}", pod.namespace, pod.name))
    }

    /// A log file.
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join("logs").join(format!("{name}.log"))
    }

    /// Makes the mesh's folder. It existing already is an error, so two meshes of a name never meet.
    ///
    /// # Errors
    /// When it exists, or `/run` is not writable.
    pub fn create(&self) -> io::Result<()> {
        // Another mesh that was the last one may remove the folder of all meanwhile.
        insist(|| {
            fs::create_dir_all(ROOT)?;
            private_dir(&self.dir)
        })?;
        for below in ["objects", "credentials", "ca", "control", "pods", "logs"] {
            private_dir(&self.dir.join(below))?;
        }
        Ok(())
    }

    /// Removes everything, and the folders of all meshes when this was the last.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn remove(&self) -> io::Result<()> {
        let mut tries = 0;
        loop {
            match fs::remove_dir_all(&self.dir) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                // Something was made in it meanwhile; by processes that have ended, so not for long.
                Err(_) if tries < REMOVALS => tries += 1,
                Err(error) => return Err(error),
                Ok(()) => break,
            }
        }
        let _ = fs::remove_dir(ROOT);
        let _ = fs::remove_dir("/run/undermesh");
        Ok(())
    }
}

/// Tries again where a folder above vanished in between.
///
/// # Errors
/// What `make` fails with in the end.
pub fn insist(mut make: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match make() {
            Err(error) if error.kind() == io::ErrorKind::NotFound && tries < REMOVALS => tries += 1,
            result => return result,
        }
    }
}

/// Makes a folder that only root reads.
///
/// # Errors
/// When it exists or cannot be made.
pub fn private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(path)
}

/// Writes a file that only root reads.
///
/// # Errors
/// When it cannot be written.
pub fn private_file(path: &Path, text: &str) -> io::Result<()> {
    use io::Write as _;
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

/// Writes a file so that a reader sees the former or the new text, never a part.
///
/// # Errors
/// When it cannot be written.
pub fn replace_file(path: &Path, text: &str) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let hidden = path.with_file_name(format!(".{name}.tmp"));
    private_file(&hidden, text)?;
    fs::rename(hidden, path)
}

/// A process that cannot be mistaken for a later one with its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks since boot.
    pub started: u64,
}

impl ProcessId {
    /// The process of this number, if there is one that is not a zombie.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (state, started) = state_and_start(&stat)?;
        (state != 'Z' && state != 'X').then_some(Self { pid, started })
    }

    /// Whether it still runs.
    pub fn alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

/// (pure) Fields 3 and 22 of `/proc/PID/stat`; the second is a name that may hold anything.
fn state_and_start(stat: &str) -> Option<(char, u64)> {
    let rest = stat.rsplit_once(')')?.1;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_paths_are_refused() {
        for (name, good) in
            [("default", true), ("a-1", true), ("", false), ("..", false), ("a/b", false), ("-a", false)]
        {
            assert_eq!(Layout::new(name).is_ok(), good, "{name}");
        }
        assert!(Layout::new(&"a".repeat(41)).is_err());
    }

    #[test]
    fn a_process_is_told_by_its_start() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 1 2";
        assert_eq!(state_and_start(stat), Some(('S', 4242)));
        let own = ProcessId::of(std::process::id()).unwrap();
        assert!(own.alive());
        assert!(!ProcessId { started: own.started + 1, ..own }.alive());
    }
}
