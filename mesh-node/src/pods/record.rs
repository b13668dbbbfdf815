//! What is known of an enrolled pod, checked on entry and kept across restarts.

use std::{
    collections::BTreeMap,
    fs, io,
    io::Write as _,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::netns::NetnsId;

/// A pod as whoever enrols it describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodRecord {
    /// Kubernetes UID; in the path of the request, not in its body.
    #[serde(default)]
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Service account.
    pub service_account: String,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// Path of its network namespace.
    pub netns: PathBuf,
}

/// The field of a record that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("pod {uid}: {field}: {reason}")]
pub struct BadRecord {
    /// Which pod.
    pub uid: String,
    /// Which field.
    pub field: &'static str,
    /// What is wrong.
    pub reason: String,
}

impl PodRecord {
    /// Checks every field, and folds mapped addresses.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub fn checked(mut self) -> Result<Self, BadRecord> {
        let bad = |field, reason: &str| BadRecord { uid: self.uid.clone(), field, reason: reason.to_owned() };
        let name = |text: &str| {
            let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
            (1..=253).contains(&text.len()) && text.bytes().all(legal) && text != "." && text != ".."
        };
        for (field, value) in [
            ("uid", &self.uid),
            ("namespace", &self.namespace),
            ("name", &self.name),
            ("service_account", &self.service_account),
        ] {
            if !name(value) {
                return Err(bad(field, "must be 1 to 253 letters, digits, '-', '.' or '_'"));
            }
        }
        if self.ips.is_empty() || self.ips.len() > 8 {
            return Err(bad("ips", "must hold 1 to 8 addresses"));
        }
        if let Some(address) = self.ips.iter().map(IpAddr::to_canonical).find(|ip| !usable(ip)) {
            return Err(bad("ips", &format!("{address} cannot be a pod's address")));
        }
        if !self.netns.is_absolute() {
            return Err(bad("netns", "must be an absolute path"));
        }
        for address in &mut self.ips {
            *address = address.to_canonical();
        }
        Ok(self)
    }
}

/// Whether a pod can be known by this address.
pub fn usable(address: &IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || link_local)
}

/// A record and the namespace that it was enrolled with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The pod.
    pub pod: PodRecord,
    /// Its namespace: another one under the same path is another sandbox.
    pub netns: NetnsId,
}

/// Why the file of enrolled pods cannot be used.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Reading or writing failed.
    #[error("{}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not what this program wrote.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where.
        #[source]
        source: serde_json::Error,
    },
}

/// The enrolled pods on disk.
#[derive(Clone, Debug)]
pub struct Store {
    path: PathBuf,
}

impl Store {
    /// Kept in this directory.
    pub fn new(directory: &Path) -> Self {
        Self { path: directory.join("pods.json") }
    }

    /// What was kept last; nothing if nothing ever was.
    ///
    /// # Errors
    /// The file cannot be read or is damaged.
    pub fn load(&self) -> Result<Vec<Kept>, StoreError> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(StoreError::Io { path: self.path.clone(), source }),
        };
        serde_json::from_slice(&bytes)
            .map_err(|source| StoreError::Damaged { path: self.path.clone(), source })
    }

    /// Replaces what is kept, in one step: a crash leaves the old file or the new one.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save<'a>(&self, pods: impl Iterator<Item = &'a Kept>) -> Result<(), StoreError> {
        let failed = |source| StoreError::Io { path: self.path.clone(), source };
        let sorted: BTreeMap<&str, &Kept> = pods.map(|kept| (kept.pod.uid.as_str(), kept)).collect();
        let text = serde_json::to_vec_pretty(&sorted.values().collect::<Vec<_>>())
            .map_err(|error| failed(io::Error::other(error)))?;
        let next = self.path.with_extension("json.next");
        let mut file = fs::File::create(&next).map_err(failed)?;
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(failed)?;
        fs::rename(&next, &self.path).map_err(failed)
    }
}

/// Files of ours in a state directory.
const FILES: [&str; 6] = [
    "pods.json",
    "pods.json.next",
    "sandboxes.json",
    ".sandboxes.json.next",
    "namespaces.json",
    ".namespaces.json.next",
];

/// Removes what is ours in a state directory, and the directory if nothing else is in it.
///
/// # Errors
/// A file cannot be removed.
pub fn clean(directory: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let mut removed = Vec::new();
    for path in FILES.map(|name| directory.join(name)) {
        match fs::remove_file(&path) {
            Ok(()) => removed.push(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(StoreError::Io { path, source }),
        }
    }
    // It may be a mount point, or hold what is not ours.
    let _ = fs::remove_dir(directory);
    Ok(removed)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn record(uid: &str) -> PodRecord {
        PodRecord {
            uid: uid.to_owned(),
            namespace: "shop".to_owned(),
            name: "cart-0".to_owned(),
            service_account: "cart".to_owned(),
            ips: vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            netns: "/run/netns/cart".into(),
        }
    }

    #[test]
    fn every_field_is_checked_and_named() {
        let check = |change: &dyn Fn(&mut PodRecord), expected: Option<&'static str>| {
            let mut pod = record("u1");
            change(&mut pod);
            assert_eq!(pod.clone().checked().err().map(|bad| bad.field), expected, "{pod:?}");
        };
        check(&|_| (), None);
        check(&|pod| pod.uid = "a/b".to_owned(), Some("uid"));
        check(&|pod| pod.uid = "..".to_owned(), Some("uid"));
        check(&|pod| pod.namespace.clear(), Some("namespace"));
        check(&|pod| pod.name = "x".repeat(254), Some("name"));
        check(&|pod| pod.service_account = "a b".to_owned(), Some("service_account"));
        check(&|pod| pod.ips.clear(), Some("ips"));
        for address in
            ["127.0.0.1", "::1", "0.0.0.0", "::", "224.0.0.1", "169.254.1.1", "fe80::1", "::ffff:127.0.0.1"]
        {
            check(&|pod| pod.ips.push(address.parse().unwrap()), Some("ips"));
        }
        check(&|pod| pod.netns = "run/netns/x".into(), Some("netns"));
        let mut mapped = record("u1");
        mapped.ips = vec!["::ffff:10.0.0.9".parse().unwrap()];
        assert_eq!(mapped.checked().unwrap().ips, vec!["10.0.0.9".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn the_store_gives_back_what_it_was_given_and_says_when_it_is_damaged() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(directory.path());
        assert!(store.load().unwrap().is_empty());
        let kept = |uid| Kept { pod: record(uid), netns: NetnsId { device: 4, inode: 5 } };
        let (a, b) = (kept("a"), kept("b"));
        store.save([&b, &a].into_iter()).unwrap();
        assert_eq!(store.load().unwrap(), vec![a.clone(), b]);
        store.save([&a].into_iter()).unwrap();
        assert_eq!(store.load().unwrap(), vec![a]);
        fs::write(directory.path().join("pods.json"), "[{").unwrap();
        assert!(matches!(store.load(), Err(StoreError::Damaged { .. })));
    }
}
