//! Who calls: bearer tokens; of files, one per caller, of mode 0600 (local mode mints them), or of Kubernetes.

use std::{
    fmt, fs, io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use aws_lc_rs::{constant_time, digest};
use parking_lot::Mutex;
use serde::Serialize;

/// Shortest token, hexadecimal digits: 32 random bytes.
const MIN_TOKEN_DIGITS: usize = 64;
/// Longest file, bytes.
const MAX_TOKEN_BYTES: u64 = 4096;
/// Faults that are shown are no older than this.
const MAX_AGE: Duration = Duration::from_secs(1);
/// A token that is not known makes the directory be read again, but not more often than this.
const MIN_AGE: Duration = Duration::from_millis(50);
/// Most files that are read.
const MAX_FILES: usize = 10_000;

pub mod review;

use review::Reviews;

/// Where callers are known from.
pub enum Callers {
    /// A directory of tokens.
    Files(Credentials),
    /// The API server.
    Reviewed(Box<Reviews>),
}

impl Callers {
    /// Who has this token.
    ///
    /// # Errors
    /// Nobody, there is none, or it cannot be found out.
    pub async fn authenticate(
        &self,
        token: Option<&str>,
        now: Instant,
    ) -> Result<Principal, Unauthenticated> {
        match self {
            Self::Files(files) => files.authenticate(token, now),
            Self::Reviewed(reviews) => {
                let token = token.map(str::trim).filter(|token| !token.is_empty());
                reviews.authenticate(token.ok_or(Unauthenticated::Missing)?, now).await
            }
        }
    }

    /// What is wrong with the tokens that are kept.
    pub fn faults(&self, now: Instant) -> Vec<String> {
        match self {
            Self::Files(files) => files.faults(now),
            Self::Reviewed(_) => Vec::new(),
        }
    }
}

/// A caller that proved itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Principal {
    /// The agent of a node.
    Node(Arc<str>),
    /// A pod that speaks for itself (a waypoint).
    Pod {
        /// Its namespace.
        namespace: Arc<str>,
        /// Its name.
        name: Arc<str>,
    },
}

impl Principal {
    /// Reads the name of a credential file: `node-<node>` or `pod-<namespace>.<pod>`.
    pub fn of_file(name: &str) -> Option<Self> {
        if let Some(node) = name.strip_prefix("node-").filter(|node| !node.is_empty()) {
            return Some(Self::Node(node.into()));
        }
        let (namespace, name) = name.strip_prefix("pod-")?.split_once('.')?;
        let complete = !namespace.is_empty() && !name.is_empty();
        complete.then(|| Self::Pod { namespace: namespace.into(), name: name.into() })
    }

    /// Reads what `Display` writes.
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(node) = text.strip_prefix("node:").filter(|node| !node.is_empty()) {
            return Some(Self::Node(node.into()));
        }
        let (namespace, name) = text.strip_prefix("pod:")?.split_once('/')?;
        Some(Self::Pod { namespace: namespace.into(), name: name.into() })
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(node) => write!(f, "node:{node}"),
            Self::Pod { namespace, name } => write!(f, "pod:{namespace}/{name}"),
        }
    }
}

impl Serialize for Principal {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Why a caller is not let in. The caller learns no more than that.
#[derive(Debug, thiserror::Error)]
pub enum Unauthenticated {
    /// No token.
    #[error("no bearer token")]
    Missing,
    /// Nobody has this token.
    #[error("unknown token")]
    Unknown,
    /// The token is good, and no live pod of that name, UID and node is known.
    #[error("the token's pod is not known, has ended, or is of another node")]
    NoPod,
    /// It cannot be found out now.
    #[error("tokens cannot be reviewed: {0}")]
    Unavailable(String),
}

/// The tokens in a directory.
#[derive(Debug)]
pub struct Credentials {
    dir: PathBuf,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    read_at: Option<Instant>,
    /// Digests of the tokens, so that comparing takes the same time for all.
    tokens: Vec<(digest::Digest, Principal, PathBuf)>,
    faults: Vec<String>,
}

impl Credentials {
    /// Reads `dir` when it is first needed.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, known: Mutex::new(Known::default()) }
    }

    /// Who has this token.
    ///
    /// # Errors
    /// Nobody, or there is none.
    pub fn authenticate(&self, token: Option<&str>, now: Instant) -> Result<Principal, Unauthenticated> {
        let token = token.map(str::trim).filter(|token| !token.is_empty()).ok_or(Unauthenticated::Missing)?;
        let digest = digest::digest(&digest::SHA256, token.as_bytes());
        let mut known = self.known.lock();
        if let Some(found) = known.find(&digest) {
            return Ok(found);
        }
        if known.age(now).is_none_or(|age| age > MIN_AGE) {
            *known = read(&self.dir, now);
        }
        known.find(&digest).ok_or(Unauthenticated::Unknown)
    }

    /// Files that do not count, with the reason.
    pub fn faults(&self, now: Instant) -> Vec<String> {
        let mut known = self.known.lock();
        if known.age(now).is_none_or(|age| age > MAX_AGE) {
            *known = read(&self.dir, now);
        }
        known.faults.clone()
    }
}

impl Known {
    fn age(&self, now: Instant) -> Option<Duration> {
        self.read_at.map(|at| now.saturating_duration_since(at))
    }

    /// The owner of a token, as long as its file still holds it: what was withdrawn counts no longer.
    fn find(&self, digest: &digest::Digest) -> Option<Principal> {
        let mut found = None;
        for (known, principal, path) in &self.tokens {
            if constant_time::verify_slices_are_equal(known.as_ref(), digest.as_ref()).is_ok() {
                found = Some((principal, path));
            }
        }
        let (principal, path) = found?;
        let held = digest::digest(&digest::SHA256, token(path).ok()?.as_bytes());
        constant_time::verify_slices_are_equal(held.as_ref(), digest.as_ref()).ok()?;
        Some(principal.clone())
    }
}

fn read(dir: &Path, now: Instant) -> Known {
    let mut known = Known { read_at: Some(now), ..Known::default() };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) => {
            known.faults.push(format!("{}: {error}", dir.display()));
            return known;
        }
    };
    for entry in entries.flatten().take(MAX_FILES) {
        let name = entry.file_name().to_string_lossy().into_owned();
        // Temporary files of whoever mints.
        if name.starts_with('.') {
            continue;
        }
        match (Principal::of_file(&name), token(&entry.path())) {
            (None, _) => known.faults.push(format!("{name}: neither node-<node> nor pod-<namespace>.<pod>")),
            (_, Err(reason)) => known.faults.push(format!("{name}: {reason}")),
            (Some(principal), Ok(token)) => {
                known.tokens.push((
                    digest::digest(&digest::SHA256, token.as_bytes()),
                    principal,
                    entry.path(),
                ));
            }
        }
    }
    known
}

/// A token that others may read is no proof of anything.
fn token(path: &Path) -> Result<String, String> {
    let text = |error: io::Error| error.to_string();
    // Not through links: the checks below are of the file that is read.
    let no_follow = 0o400_000;
    let mut file = fs::OpenOptions::new().read(true).custom_flags(no_follow).open(path).map_err(text)?;
    let meta = file.metadata().map_err(text)?;
    if !meta.is_file() || meta.len() > MAX_TOKEN_BYTES {
        return Err("not a small regular file".to_owned());
    }
    if meta.mode() & 0o077 != 0 {
        return Err(format!("mode {:04o} lets others read it: must be 0600", meta.mode() & 0o7777));
    }
    let mut content = String::new();
    io::Read::read_to_string(&mut file, &mut content).map_err(text)?;
    let token = content.trim();
    if token.len() < MIN_TOKEN_DIGITS || !token.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(format!("must hold at least {MIN_TOKEN_DIGITS} hexadecimal digits"));
    }
    Ok(token.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn put(dir: &Path, name: &str, token: &str, mode: u32) {
        let path = dir.join(name);
        fs::write(&path, token).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn callers_are_known_by_their_token_alone() {
        let dir = tempfile::tempdir().unwrap();
        let credentials = Credentials::new(dir.path().to_owned());
        let (a, b) = ("a".repeat(64), "b".repeat(64));
        put(dir.path(), "node-n1", &format!("{a}\n"), 0o600);
        let start = Instant::now();
        assert_eq!(credentials.authenticate(Some(&a), start).unwrap(), Principal::Node("n1".into()));
        for bad in [None, Some(""), Some("x"), Some(b.as_str()), Some(&a[..63])] {
            assert!(credentials.authenticate(bad, start).is_err(), "{bad:?}");
        }
        // A new file counts at once, a removed one no longer.
        put(dir.path(), "pod-shop.gw-1", &b, 0o600);
        let pod = Principal::Pod { namespace: "shop".into(), name: "gw-1".into() };
        assert_eq!(credentials.authenticate(Some(&b), start + MIN_AGE * 2).unwrap(), pod);
        fs::remove_file(dir.path().join("node-n1")).unwrap();
        assert!(credentials.authenticate(Some(&a), start + MIN_AGE * 2).is_err());
    }

    #[test]
    fn files_that_prove_nothing_do_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let token = "c".repeat(64);
        for mode in [0o644, 0o660, 0o640, 0o604] {
            put(dir.path(), "node-n1", &token, mode);
            let credentials = Credentials::new(dir.path().to_owned());
            assert!(credentials.authenticate(Some(&token), Instant::now()).is_err(), "{mode:o}");
            assert!(credentials.faults(Instant::now())[0].contains("0600"), "{mode:o}");
        }
        put(dir.path(), "node-n1", "short", 0o600);
        put(dir.path(), "other", &token, 0o600);
        std::os::unix::fs::symlink(dir.path().join("other"), dir.path().join("node-n2")).unwrap();
        let credentials = Credentials::new(dir.path().to_owned());
        assert!(credentials.authenticate(Some(&token), Instant::now()).is_err());
        assert_eq!(credentials.faults(Instant::now()).len(), 3);
    }
}
