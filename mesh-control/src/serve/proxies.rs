//! What each proxy has: acknowledged versions, rejections, and whether it is there.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

use crate::credentials::Principal;

/// Reason of a rejection.
pub type Nack = String;

/// Type and name of a resource.
pub type ResourceName = (&'static str, Arc<str>);

/// End of a rejection that was too long to be told in full, by us or by the proxy.
pub(super) const CUT: &str = "...";

/// Most proxies that are remembered after they went away.
const MAX_REMEMBERED: usize = 10_000;

/// One proxy as it is known here.
#[derive(Clone, Debug, Default)]
pub struct Proxy {
    /// Number of the stream that counts; the newest.
    pub(crate) stream: u64,
    /// It is connected.
    pub connected: bool,
    /// The newest revision of which it acknowledged everything.
    pub acked_revision: Option<u64>,
    /// Resources that were sent and not answered.
    pub pending: BTreeSet<Arc<str>>,
    /// `(type, name)` → version that it holds.
    pub holds: BTreeMap<ResourceName, Arc<str>>,
    /// `(type, name)` → version that it rejected, and why.
    pub nacks: BTreeMap<ResourceName, (Arc<str>, Nack)>,
}

/// What a stream reports after each step.
pub(super) struct ProxyUpdate {
    pub revision: Option<u64>,
    pub pending: BTreeSet<Arc<str>>,
}

/// All proxies; written by their streams, read by the status.
#[derive(Debug, Default)]
pub struct Proxies {
    known: Mutex<BTreeMap<Principal, Proxy>>,
    streams: AtomicU64,
    acks: AtomicU64,
    nacks: AtomicU64,
    refused: AtomicU64,
    certificates: AtomicU64,
    certificates_refused: AtomicU64,
}

/// Totals since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Proxies that are connected now.
    pub connected: u64,
    /// Streams that were opened.
    pub streams: u64,
    /// Responses that were accepted.
    pub acks: u64,
    /// Responses that were rejected, wholly or in part.
    pub nacks: u64,
    /// Calls without a valid token.
    pub refused: u64,
    /// Certificates signed.
    pub certificates: u64,
    /// Certificates refused.
    pub certificates_refused: u64,
}

impl Proxies {
    /// All proxies as they are now.
    pub fn all(&self) -> BTreeMap<Principal, Proxy> {
        self.known.lock().clone()
    }

    /// Totals.
    pub fn counts(&self) -> Counts {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let connected = self.known.lock().values().filter(|proxy| proxy.connected).count();
        Counts {
            connected: u64::try_from(connected).unwrap_or(u64::MAX),
            streams: load(&self.streams),
            acks: load(&self.acks),
            nacks: load(&self.nacks),
            refused: load(&self.refused),
            certificates: load(&self.certificates),
            certificates_refused: load(&self.certificates_refused),
        }
    }

    pub(super) fn count_refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_certificate(&self, signed: bool) {
        let counter = if signed { &self.certificates } else { &self.certificates_refused };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// A new stream; it counts from now on, whatever an older one of the same proxy still says.
    pub(super) fn connected(&self, caller: &Principal) -> u64 {
        let stream = self.streams.fetch_add(1, Ordering::Relaxed) + 1;
        let mut known = self.known.lock();
        if known.len() >= MAX_REMEMBERED {
            known.retain(|_, proxy| proxy.connected);
        }
        known.insert(caller.clone(), Proxy { stream, connected: true, ..Proxy::default() });
        stream
    }

    pub(super) fn disconnected(&self, caller: &Principal, stream: u64) {
        self.update(caller, stream, |proxy| proxy.connected = false);
    }

    pub(super) fn claimed(
        &self,
        caller: &Principal,
        stream: u64,
        type_url: &'static str,
        claimed: &BTreeMap<Arc<str>, Arc<str>>,
    ) {
        self.update(caller, stream, |proxy| {
            let claimed = claimed.iter().map(|(name, version)| ((type_url, name.clone()), version.clone()));
            proxy.holds.extend(claimed);
        });
    }

    /// Records the answer to one response. Of a rejection the names that its text gives are rejected, the others
    /// accepted; a rejection that names nothing, or whose end is missing, rejects everything.
    pub(super) fn answered(
        &self,
        caller: &Principal,
        stream: u64,
        type_url: &'static str,
        names: &[(Arc<str>, Arc<str>)],
        rejected: Option<&str>,
    ) {
        let counter = if rejected.is_some() { &self.nacks } else { &self.acks };
        counter.fetch_add(1, Ordering::Relaxed);
        if let Some(reason) = rejected {
            tracing::warn!(proxy = %caller, type_url, reason, "resources rejected");
        }
        let mentioned = |name: &str| rejected.is_some_and(|text| text.contains(&format!("{name}: ")));
        let any =
            names.iter().any(|(name, _)| mentioned(name)) && !rejected.is_some_and(|t| t.ends_with(CUT));
        self.update(caller, stream, |proxy| {
            for (name, version) in names {
                let key = (type_url, name.clone());
                match rejected {
                    Some(text) if !any || mentioned(name) => {
                        proxy.nacks.insert(key, (version.clone(), reason_of(text, name)));
                    }
                    Some(_) | None => {
                        proxy.nacks.remove(&key);
                        if version.is_empty() {
                            proxy.holds.remove(&key);
                        } else {
                            proxy.holds.insert(key, version.clone());
                        }
                    }
                }
            }
        });
    }

    pub(super) fn reported(&self, caller: &Principal, stream: u64, update: ProxyUpdate) {
        self.update(caller, stream, |proxy| {
            if update.revision.is_some() {
                proxy.acked_revision = update.revision;
            }
            proxy.pending = update.pending;
        });
    }

    fn update(&self, caller: &Principal, stream: u64, change: impl FnOnce(&mut Proxy)) {
        if let Some(proxy) = self.known.lock().get_mut(caller).filter(|proxy| proxy.stream == stream) {
            change(proxy);
        }
    }
}

/// The part of a rejection (`<name>: <reason>; …`) that is about `name`; all of it when there is none.
fn reason_of(text: &str, name: &str) -> String {
    let mine = text.split("; ").find_map(|part| part.strip_prefix(name)?.strip_prefix(": "));
    mine.unwrap_or(text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_count_per_resource_and_only_of_the_newest_stream() {
        let proxies = Proxies::default();
        let caller = Principal::Node("n1".into());
        let old = proxies.connected(&caller);
        let new = proxies.connected(&caller);
        let names: Vec<(Arc<str>, Arc<str>)> =
            vec![("a".into(), "1".into()), ("b".into(), "2".into()), ("gone".into(), "".into())];
        proxies.answered(&caller, old, "t", &names, None);
        assert!(proxies.all()[&caller].holds.is_empty());
        proxies.answered(&caller, new, "t", &names, Some("b: ports[0]: no port; x: y"));
        let proxy = proxies.all()[&caller].clone();
        assert_eq!(proxy.holds.keys().map(|(_, name)| &**name).collect::<Vec<_>>(), ["a"]);
        assert_eq!(proxy.nacks[&("t", "b".into())], ("2".into(), "ports[0]: no port".to_owned()));
        proxies.answered(&caller, new, "t", &names[1..2], None);
        assert!(proxies.all()[&caller].nacks.is_empty());
        proxies.answered(&caller, new, "t", &names[..2], Some("no memory"));
        assert_eq!(proxies.all()[&caller].nacks.len(), 2);
        proxies.answered(&caller, new, "t", &names[..2], None);
        proxies.answered(&caller, new, "t", &names[..2], Some("b: ports[0]: no po..."));
        assert_eq!(proxies.all()[&caller].nacks.len(), 2);
        proxies.disconnected(&caller, old);
        assert!(proxies.all()[&caller].connected);
    }
}
