//! The sandboxes that the plugin told of, kept across restarts: which pod has which network namespace. All of them, also
//! those that are not enrolled, since a label may change that while they run.

use std::{
    collections::BTreeMap,
    fs, io,
    io::Write as _,
    path::{Path, PathBuf},
};

use super::{on_node, wire::Sandbox};
use crate::pods::record::StoreError;

/// The sandboxes of this node by container.
#[derive(Debug)]
pub struct Sandboxes {
    path: PathBuf,
    known: BTreeMap<String, Sandbox>,
}

impl Sandboxes {
    /// Those that were kept in this directory, as far as they still exist: after a reboot none does.
    ///
    /// # Errors
    /// The file cannot be read or is damaged.
    pub fn load(directory: &Path) -> Result<Self, StoreError> {
        let path = directory.join("sandboxes.json");
        let mut known: BTreeMap<String, Sandbox> = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|source| StoreError::Damaged { path: path.clone(), source })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(source) => return Err(StoreError::Io { path, source }),
        };
        known.retain(|_, sandbox| exists(sandbox));
        Ok(Self { path, known })
    }

    #[cfg(test)]
    fn get(&self, container: &str) -> Option<&Sandbox> {
        self.known.get(container)
    }

    /// The sandbox of a pod that still exists.
    pub fn of(&self, uid: &str, namespace: &str, name: &str) -> Option<&Sandbox> {
        let mine = |sandbox: &&Sandbox| {
            let named = sandbox.namespace == namespace && sandbox.name == name;
            named && sandbox.uid.as_ref().is_none_or(|known| known == uid)
        };
        self.known.values().filter(mine).find(|sandbox| exists(sandbox))
    }

    /// Notes one. A pod has one sandbox: what was noted of a former one is forgotten.
    ///
    /// # Errors
    /// It could not be written; it is known until the next restart.
    pub fn insert(&mut self, container: String, sandbox: Sandbox) -> Result<(), StoreError> {
        self.known.retain(|_, other| other.uid.is_none() || other.uid != sandbox.uid);
        self.known.insert(container, sandbox);
        self.save()
    }

    /// Forgets one, and gives it back.
    ///
    /// # Errors
    /// It could not be written.
    pub fn remove(&mut self, container: &str) -> Result<Option<Sandbox>, StoreError> {
        match self.known.remove(container) {
            Some(sandbox) => self.save().map(|()| Some(sandbox)),
            None => Ok(None),
        }
    }

    /// Forgets all but these, unless their namespace is still there: another network's sandboxes are not in the list.
    ///
    /// # Errors
    /// It could not be written.
    pub fn keep(&mut self, containers: &[String]) -> Result<(), StoreError> {
        let before = self.known.len();
        self.known.retain(|container, sandbox| containers.contains(container) || exists(sandbox));
        if self.known.len() == before { Ok(()) } else { self.save() }
    }

    fn save(&self) -> Result<(), StoreError> {
        let failed = |source| StoreError::Io { path: self.path.clone(), source };
        let text = serde_json::to_vec_pretty(&self.known).map_err(|error| failed(io::Error::other(error)))?;
        replace(&self.path, &text).map_err(failed)
    }
}

/// Whether its namespace is still there.
fn exists(sandbox: &Sandbox) -> bool {
    on_node(&sandbox.netns).exists()
}

/// Writes a file in one step: a crash leaves the old one or the new one. The file that is being written starts with a
/// dot and ends in `.next`, which no reader of these directories takes for one of its own.
///
/// # Errors
/// It cannot be written.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let next = path.with_file_name(format!(".{name}.next"));
    let mut file = fs::File::create(&next)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&next, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(uid: Option<&str>, netns: &Path) -> Sandbox {
        Sandbox {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            uid: uid.map(str::to_owned),
            netns: netns.to_owned(),
            ips: vec!["10.0.0.2".parse().unwrap()],
            exempt: false,
        }
    }

    #[test]
    fn what_is_told_is_found_again_as_long_as_it_exists() {
        let directory = tempfile::tempdir().unwrap();
        let (here, gone) = (directory.path().join("here"), directory.path().join("gone"));
        fs::write(&here, "").unwrap();
        fs::write(&gone, "").unwrap();
        let mut sandboxes = Sandboxes::load(directory.path()).unwrap();
        sandboxes.insert("c1".to_owned(), sandbox(Some("u1"), &here)).unwrap();
        sandboxes.insert("c0".to_owned(), sandbox(Some("u2"), &gone)).unwrap();
        fs::remove_file(&gone).unwrap();
        let again = Sandboxes::load(directory.path()).unwrap();
        assert_eq!(again.of("u1", "shop", "web"), Some(&sandbox(Some("u1"), &here)));
        assert_eq!(again.of("u1", "shop", "thief"), None, "a pod that claims another's UID");
        assert_eq!((again.of("u2", "shop", "web"), again.get("c0")), (None, None), "after a reboot");
        sandboxes.insert("a-later-one".to_owned(), sandbox(Some("u1"), &here)).unwrap();
        assert!(sandboxes.get("c1").is_none() && sandboxes.get("a-later-one").is_some());
        sandboxes.insert("c1".to_owned(), sandbox(Some("u1"), &here)).unwrap();
        // Told without a UID, it is found by name.
        sandboxes.insert("c2".to_owned(), sandbox(None, &here)).unwrap();
        assert!(sandboxes.of("u3", "shop", "web").is_some() && sandboxes.of("u3", "shop", "other").is_none());
        assert!(sandboxes.remove("c2").unwrap().is_some() && sandboxes.remove("c2").unwrap().is_none());
        sandboxes.keep(&[]).unwrap();
        assert!(sandboxes.get("c1").is_some() && sandboxes.get("c0").is_none());
        fs::write(directory.path().join("sandboxes.json"), "{").unwrap();
        assert!(matches!(Sandboxes::load(directory.path()), Err(StoreError::Damaged { .. })));
    }
}
