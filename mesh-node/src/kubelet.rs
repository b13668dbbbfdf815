//! Which processes are the kubelet's: those of its unit's cgroup, in the node's own network namespace. Their connections
//! to the ports that pods declare for probes reach the application, also where mTLS is required.
//!
//! Not told by name, address or process id: a pod with the host's network may have any of these.

use std::{
    fs,
    io::ErrorKind,
    net::UdpSocket,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use mesh_net::drain::Draining;
use serde::Serialize;
use tokio::time::MissedTickBehavior;

use crate::{
    agent::Agent,
    kernel::{Kubelet, netns_cookie},
};

/// How often the unit is looked for: a restart of it makes another cgroup, whose probes fail until it is known.
const LOOK: Duration = Duration::from_secs(1);

/// Where the usual installers of Kubernetes run the kubelet, below the root of cgroup v2.
const UNITS: [&str; 8] = [
    "system.slice/kubelet.service",
    "kubelet.slice/kubelet.service",
    "podruntime.slice/kubelet.service",
    "system.slice/k3s.service",
    "system.slice/k3s-agent.service",
    "system.slice/rke2-server.service",
    "system.slice/rke2-agent.service",
    "system.slice/snap.microk8s.daemon-kubelite.service",
];

/// What is known of the kubelet, for operators.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Found {
    /// Its cgroup; none: probes are plaintext, as anything else from the host.
    pub cgroup: Option<PathBuf>,
    /// Number of it.
    pub number: Option<u64>,
    /// In words.
    pub why: String,
}

impl Default for Found {
    fn default() -> Self {
        Self { cgroup: None, number: None, why: "not looked for yet".to_owned() }
    }
}

/// Looks for the unit: the given directory, else the first of the usual ones.
pub fn find(given: Option<&Path>, root: &Path) -> Found {
    let places = given
        .map_or_else(|| UNITS.iter().map(|unit| root.join(unit)).collect(), |given| vec![root.join(given)]);
    for place in &places {
        match fs::metadata(place) {
            Ok(found) if found.is_dir() => {
                let why = format!("the kubelet is what runs in {}", place.display());
                return Found { cgroup: Some(place.clone()), number: Some(found.ino()), why };
            }
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Found { why: format!("{}: {error}", place.display()), ..Found::default() };
            }
            _ => {}
        }
    }
    let why = match given {
        Some(given) => format!("there is no cgroup {}", root.join(given).display()),
        None => {
            "no unit of a kubelet is known: pass --kubelet-cgroup, or its probes are plaintext".to_owned()
        }
    };
    Found { why, ..Found::default() }
}

/// Keeps the programs in line with the unit, until the drain is forced.
pub async fn follow(agent: Arc<Agent>, given: Option<PathBuf>, root: PathBuf, draining: Draining) {
    // The agent is in the node's own namespace, as the kubelet is.
    let node_netns = UdpSocket::bind("127.0.0.1:0").and_then(|socket| netns_cookie(socket.as_fd()));
    let node_netns = match node_netns {
        Ok(cookie) => cookie,
        Err(error) => {
            tracing::warn!(%error, "the node's network namespace is not known; probes are plaintext");
            let _ = agent.kernel.set_kubelet(None);
            return;
        }
    };
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = draining.forced() => return,
            _ = look.tick() => {}
        }
        let found = find(given.as_deref(), &root);
        if found == *agent.kubelet.lock() {
            continue;
        }
        let kubelet = found.number.map(|cgroup| Kubelet { node_netns, cgroup });
        match agent.kernel.set_kubelet(kubelet) {
            Ok(()) => {
                tracing::info!(why = found.why, "the kubelet's probes");
                *agent.kubelet.lock() = found;
            }
            Err(error) => tracing::warn!(%error, "the programs could not be told of the kubelet"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_is_what_was_given_or_the_first_of_the_usual() {
        let root = tempfile::tempdir().unwrap();
        let none = find(None, root.path());
        assert!(none.cgroup.is_none() && none.why.contains("--kubelet-cgroup"), "{none:?}");
        let k3s = root.path().join("system.slice/k3s.service");
        fs::create_dir_all(&k3s).unwrap();
        let found = find(None, root.path());
        assert_eq!(
            (found.cgroup, found.number),
            (Some(k3s.clone()), Some(fs::metadata(&k3s).unwrap().ino()))
        );
        let own = root.path().join("own");
        assert!(find(Some(&own), root.path()).why.contains("there is no cgroup"));
        fs::create_dir(&own).unwrap();
        assert_eq!(find(Some(&own), root.path()).cgroup, Some(own.clone()));
        assert_eq!(find(Some(Path::new("own")), root.path()).cgroup, Some(own));
    }
}
