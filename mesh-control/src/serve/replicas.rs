//! What replicas tell each other of their proxies, and all of it put together.
//!
//! A proxy that holds all that its replica publishes is told by the digest of that; a replica that publishes the same
//! knows then what the proxy has. Anything less counts as nothing, so that nobody says more than is true.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_core::proto::TYPES;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::proxies::{Proxy, ResourceName};
use crate::{credentials::Principal, leader::Told, publish::Published};

/// All annotations of an object may have 256 KiB together.
const MAX_TEXT_BYTES: usize = 60 << 10;
/// Rejections of one proxy that are told.
const MAX_REJECTIONS: usize = 16;
/// Longest reason that is told, characters.
const MAX_REASON: usize = 200;

/// The other replicas.
#[derive(Clone)]
pub struct Others {
    /// What they tell.
    pub told: watch::Receiver<Told>,
    /// Where their pods are.
    pub namespace: String,
}

impl Others {
    /// The proxies of all replicas; `own` are ours.
    pub fn with(&self, published: &Published, own: BTreeMap<Principal, Proxy>) -> BTreeMap<Principal, Proxy> {
        let told = self.told.borrow().clone();
        merge(published, own, &told, |replica| crate::write::alive(published, &self.namespace, replica))
    }
}

/// One proxy.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Line {
    /// Digest of what it holds; empty while something is under way.
    #[serde(rename = "d")]
    holds: String,
    /// What it rejected: type, name, version, reason.
    #[serde(rename = "n", default, skip_serializing_if = "Vec::is_empty")]
    rejected: Vec<(String, String, String, String)>,
}

/// What this replica tells of the proxies that are connected to it.
pub fn tell(published: &Published, own: &BTreeMap<Principal, Proxy>) -> String {
    let mut lines = BTreeMap::new();
    for (id, proxy) in own.iter().filter(|(_, proxy)| proxy.connected) {
        let current = proxy.acked_revision == Some(published.revision);
        let rejected = proxy.nacks.iter().take(MAX_REJECTIONS).map(|((type_url, name), (version, why))| {
            let why = why.chars().take(MAX_REASON).collect();
            ((*type_url).to_owned(), name.to_string(), version.to_string(), why)
        });
        let too_many = proxy.nacks.len() > MAX_REJECTIONS;
        let holds = if current && !too_many { published.digest.to_string() } else { String::new() };
        lines.insert(id.to_string(), Line { holds, rejected: rejected.collect() });
    }
    let text = serde_json::to_string(&lines).unwrap_or_default();
    if text.len() <= MAX_TEXT_BYTES {
        return text;
    }
    tracing::warn!(bytes = text.len(), "more proxies than can be told to the other replicas");
    String::new()
}

/// The proxies of all replicas; our own knowledge of a connected one is the better.
pub fn merge(
    published: &Published,
    mut all: BTreeMap<Principal, Proxy>,
    told: &Told,
    alive: impl Fn(&str) -> bool,
) -> BTreeMap<Principal, Proxy> {
    for text in told.iter().filter(|(replica, _)| alive(replica)).map(|(_, text)| text) {
        // Another version of us may say it in another way: then nothing is known.
        let lines: BTreeMap<String, Line> = serde_json::from_str(text).unwrap_or_default();
        for (id, line) in lines {
            let Some(id) = Principal::parse(&id) else { continue };
            if all.get(&id).is_none_or(|own| !own.connected) {
                let proxy = proxy(published, &id, line);
                all.insert(id, proxy);
            }
        }
    }
    all
}

fn proxy(published: &Published, id: &Principal, line: Line) -> Proxy {
    let current = !line.holds.is_empty() && *line.holds == *published.digest;
    let nacks: BTreeMap<ResourceName, (Arc<str>, String)> = line
        .rejected
        .into_iter()
        .filter_map(|(type_url, name, version, why)| {
            Some(((Published::type_of(&type_url)?, name.into()), (version.into(), why)))
        })
        .collect();
    let rejected: BTreeSet<&ResourceName> = nacks.keys().collect();
    let holds = TYPES.into_iter().filter(|_| current).flat_map(|type_url| {
        let visible = published.visible(id, type_url);
        visible.map(move |one| ((type_url, one.name.clone()), one.version.clone()))
    });
    let holds = holds.filter(|(name, _)| !rejected.contains(name)).collect();
    Proxy {
        connected: true,
        acked_revision: current.then_some(published.revision),
        holds,
        nacks,
        ..Proxy::default()
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::proto::{TYPE_MESH_OPTIONS, mesh};

    use super::*;
    use crate::compile::World;

    fn known(id: &str, proxy: Proxy) -> BTreeMap<Principal, Proxy> {
        BTreeMap::from([(Principal::parse(id).unwrap(), proxy)])
    }

    #[test]
    fn another_replicas_proxy_counts_where_both_publish_the_same() {
        let published = Published::default().next(World::default());
        let name: ResourceName = (TYPE_MESH_OPTIONS, mesh::NAME.into());
        let version = published.set(TYPE_MESH_OPTIONS)[mesh::NAME].version.clone();
        let mut mine =
            Proxy { connected: true, acked_revision: Some(published.revision), ..Proxy::default() };
        let merged = |told: String, alive: bool| {
            let told = Told::from([("other".to_owned(), told)]);
            merge(&published, BTreeMap::new(), &told, |_| alive)
        };
        let id = Principal::Node("n1".into());
        let told = tell(&published, &known("node:n1", mine.clone()));
        let got = merged(told.clone(), true)[&id].clone();
        assert_eq!((got.connected, got.acked_revision), (true, Some(1)));
        assert_eq!(got.holds.get(&name), Some(&version));
        // A replica that is gone tells nothing.
        assert!(merged(told.clone(), false).is_empty());
        // Ours is connected here: what others say is older.
        let own = known("node:n1", Proxy { connected: true, ..Proxy::default() });
        let kept = merge(&published, own, &Told::from([("other".to_owned(), told)]), |_| true);
        assert_eq!(kept[&id].acked_revision, None);
        // Rejected is not held; under way is not held; nonsense is nothing.
        mine.nacks.insert(name.clone(), (version, "no".to_owned()));
        let got = merged(tell(&published, &known("node:n1", mine.clone())), true)[&id].clone();
        assert_eq!((got.holds.get(&name), got.nacks.len()), (None, 1));
        mine.acked_revision = None;
        let got = merged(tell(&published, &known("node:n1", mine.clone())), true)[&id].clone();
        assert_eq!((got.connected, got.acked_revision, got.holds.len()), (true, None, 0));
        mine.connected = false;
        assert!(merged(tell(&published, &known("node:n1", mine)), true).is_empty());
        assert!(merged("{".to_owned(), true).is_empty());
    }
}
