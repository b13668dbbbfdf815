//! The plugin and its configuration on the node: put there, kept there, taken away at the end. Both stay when the agent
//! ends: while it is away no pod of the mesh starts, after a reboot neither.

use std::{
    fs, io,
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use mesh_net::drain::Draining;
use notify::Watcher as _;
use thiserror::Error;
use tokio::sync::Notify;

use super::{
    conflist::{self, BadPrimary, FILE, PLUGIN, Plugin},
    sandboxes::replace,
};
use crate::{
    agent::{Agent, Dismissal},
    pods::chain,
};

/// How often everything is looked at even if nothing was heard.
const RESCAN: Duration = Duration::from_secs(5);
/// More is not read of any file, bytes; the plugin has less than a tenth of it.
const FILE_BYTES: u64 = 256 << 20;
/// What the agent is not ready for while it stands.
pub const CONCERN: &str = "cni";

/// Where the plugin goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Directory of plugins.
    pub bin_dir: PathBuf,
    /// Directory of configurations.
    pub conf_dir: PathBuf,
}

/// What is put there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Install {
    /// Where.
    pub place: Place,
    /// The plugin's binary as it came with the agent.
    pub source: PathBuf,
    /// What its configuration says.
    pub plugin: Plugin,
}

/// Why the plugin is not in its place.
#[derive(Debug, Error)]
pub enum InstallError {
    /// A file cannot be read or written.
    #[error("{}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is nothing to chain to.
    #[error("no network configuration in {} yet", .0.display())]
    NoPrimary(PathBuf),
    /// The runtime would not read ours.
    #[error("{} sorts before {FILE}, so the container runtime uses it instead of ours", .0.display())]
    Before(PathBuf),
    /// The primary's cannot be followed.
    #[error("{}", path.display())]
    Primary {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: BadPrimary,
    },
}

impl Install {
    /// Puts the plugin there, then its configuration; what is as it should be is not touched.
    ///
    /// # Errors
    /// What is missing. A configuration of ours that is there stays.
    pub fn ensure(&self) -> Result<(), InstallError> {
        self.binary()?;
        self.configuration()
    }

    fn binary(&self) -> Result<(), InstallError> {
        let target = self.place.bin_dir.join(PLUGIN);
        let wanted = read(&self.source)?;
        if fs::read(&target).is_ok_and(|found| found == wanted) && is_executable(&target) {
            return Ok(());
        }
        let failed = |source| InstallError::Io { path: target.clone(), source };
        // Renamed into place: the old one may be running, and a half-written one may be run.
        let next = self.place.bin_dir.join(format!(".{PLUGIN}.next"));
        fs::write(&next, &wanted).map_err(failed)?;
        fs::set_permissions(&next, fs::Permissions::from_mode(0o755)).map_err(failed)?;
        fs::File::open(&next).and_then(|file| file.sync_all()).map_err(failed)?;
        fs::rename(&next, &target).map_err(failed)?;
        tracing::info!(path = %target.display(), "the CNI plugin is installed");
        Ok(())
    }

    fn configuration(&self) -> Result<(), InstallError> {
        let dir = &self.place.conf_dir;
        let names = names(dir)?;
        let primary = match conflist::primary(&names) {
            Ok(Some(name)) => dir.join(name),
            Ok(None) => return Err(InstallError::NoPrimary(dir.clone())),
            Err(before) => return Err(InstallError::Before(dir.join(before))),
        };
        let text = String::from_utf8_lossy(&read(&primary)?).into_owned();
        let wanted = conflist::chained(&text, &self.plugin)
            .map_err(|source| InstallError::Primary { path: primary.clone(), source })?;
        let target = dir.join(FILE);
        if fs::read(&target).is_ok_and(|found| found == wanted.as_bytes()) {
            return Ok(());
        }
        replace(&target, wanted.as_bytes())
            .map_err(|source| InstallError::Io { path: target.clone(), source })?;
        tracing::info!(path = %target.display(), primary = %primary.display(), "the CNI plugin is chained");
        Ok(())
    }
}

/// Takes plugin and configuration away; returns what was there. The configuration first: without the plugin it would
/// keep every pod from starting.
///
/// # Errors
/// Something cannot be removed.
pub fn remove(place: &Place) -> io::Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    let (conf, bin) = (&place.conf_dir, &place.bin_dir);
    let next = |dir: &Path, name: &str| dir.join(format!(".{name}.next"));
    for path in [conf.join(FILE), next(conf, FILE), bin.join(PLUGIN), next(bin, PLUGIN)] {
        match fs::remove_file(&path) {
            Ok(()) => removed.push(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(removed)
}

/// Keeps the plugin in place until the drain: the primary writes its configuration when it likes. Takes it away when the
/// agent is dismissed.
pub async fn keep(install: Install, agent: Arc<Agent>, draining: Draining) {
    let changed = Arc::new(Notify::new());
    let _watcher = watch(&install.place.conf_dir, changed.clone());
    let mut dismissal = agent.dismissal.subscribe();
    loop {
        if *dismissal.borrow_and_update() != Dismissal::No {
            match remove(&install.place) {
                Ok(removed) => tracing::info!(?removed, "the CNI plugin is taken away"),
                Err(error) => tracing::error!(%error, "the CNI plugin is not taken away"),
            }
            agent.problems.set(CONCERN, None);
            agent.dismissal.send_replace(Dismissal::Done);
            return;
        }
        let now = install.clone();
        let outcome = tokio::task::spawn_blocking(move || now.ensure()).await;
        let problem = match outcome {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(chain(&error)),
            Err(_) => Some("the work of installing panicked".to_owned()),
        };
        agent.problems.set(CONCERN, problem);
        tokio::select! {
            () = draining.started() => return,
            () = changed.notified() => {}
            // Never fails: the agent holds the sender.
            _ = dismissal.changed() => {}
            () = tokio::time::sleep(RESCAN) => {}
        }
    }
}

/// Tells of changes in the directory; none when that is not possible, then it is looked at from time to time.
fn watch(dir: &Path, changed: Arc<Notify>) -> Option<impl notify::Watcher + use<>> {
    let told = move |event: notify::Result<notify::Event>| {
        // Reading it is an event too.
        if !event.is_ok_and(|event| matches!(event.kind, notify::EventKind::Access(_))) {
            changed.notify_one();
        }
    };
    let mut watcher = notify::recommended_watcher(told).ok()?;
    match watcher.watch(dir, notify::RecursiveMode::NonRecursive) {
        Ok(()) => Some(watcher),
        Err(error) => {
            tracing::warn!(dir = %dir.display(), %error, "changes are noticed only every few seconds");
            None
        }
    }
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o777 == 0o755)
}

fn read(path: &Path) -> Result<Vec<u8>, InstallError> {
    let failed = |source| InstallError::Io { path: path.to_owned(), source };
    let file = fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

fn names(dir: &Path) -> Result<Vec<String>, InstallError> {
    let failed = |source| InstallError::Io { path: dir.to_owned(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        names.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bed {
        dir: tempfile::TempDir,
        install: Install,
    }

    impl Bed {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let at = |name: &str| dir.path().join(name);
            for name in ["bin", "conf"] {
                fs::create_dir(at(name)).unwrap();
            }
            fs::write(at("plugin"), "#!one").unwrap();
            let plugin = Plugin { socket: "/run/s".to_owned(), exempt: vec![], known: None };
            let place = Place { bin_dir: at("bin"), conf_dir: at("conf") };
            let install = Install { place, source: at("plugin"), plugin };
            Self { dir, install }
        }

        fn primary(&self, name: &str, bridge: &str) {
            let text =
                format!(r#"{{"cniVersion":"1.0.0","name":"{bridge}","plugins":[{{"type":"bridge"}}]}}"#);
            fs::write(self.install.place.conf_dir.join(name), text).unwrap();
        }

        fn ours(&self) -> Option<serde_json::Value> {
            let bytes = fs::read(self.install.place.conf_dir.join(FILE)).ok()?;
            Some(serde_json::from_slice(&bytes).unwrap())
        }

        fn all(&self) -> Vec<String> {
            let mut all: Vec<String> =
                ["bin", "conf"].iter().flat_map(|dir| names(&self.dir.path().join(dir)).unwrap()).collect();
            all.sort();
            all
        }
    }

    #[test]
    fn ours_follows_the_primarys_and_stays_without_it() {
        let bed = Bed::new();
        assert!(matches!(bed.install.ensure(), Err(InstallError::NoPrimary(_))));
        bed.primary("10-net.conflist", "one");
        bed.install.ensure().unwrap();
        assert_eq!(bed.ours().unwrap()["name"], "one");
        bed.primary("10-net.conflist", "two");
        fs::write(&bed.install.source, "#!two").unwrap();
        bed.install.ensure().unwrap();
        assert_eq!(bed.ours().unwrap()["name"], "two");
        assert_eq!(fs::read(bed.install.place.bin_dir.join(PLUGIN)).unwrap(), b"#!two");
        assert_eq!(bed.all(), [FILE, "10-net.conflist", PLUGIN], "nothing else is left behind");
        // A primary that breaks or goes changes nothing: its owner will write it again.
        fs::write(bed.install.place.conf_dir.join("10-net.conflist"), "{").unwrap();
        assert!(matches!(bed.install.ensure(), Err(InstallError::Primary { .. })));
        fs::remove_file(bed.install.place.conf_dir.join("10-net.conflist")).unwrap();
        assert!(bed.install.ensure().is_err());
        assert_eq!(bed.ours().unwrap()["name"], "two");
        let mut removed = remove(&bed.install.place).unwrap();
        removed.sort();
        assert_eq!(removed.len(), 2);
        assert!(bed.all().is_empty() && remove(&bed.install.place).unwrap().is_empty());
    }

    #[test]
    fn a_plugin_that_cannot_be_run_is_mended() {
        let bed = Bed::new();
        bed.primary("10-net.conflist", "one");
        bed.install.ensure().unwrap();
        let target = bed.install.place.bin_dir.join(PLUGIN);
        fs::set_permissions(&target, fs::Permissions::from_mode(0o644)).unwrap();
        bed.install.ensure().unwrap();
        assert!(is_executable(&target));
    }

    #[test]
    fn one_that_sorts_before_ours_is_told() {
        let bed = Bed::new();
        bed.primary("00-multus.conf", "x");
        let error = bed.install.ensure().unwrap_err().to_string();
        assert!(error.contains("00-multus.conf sorts before"), "{error}");
    }
}
