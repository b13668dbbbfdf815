//! Live connections: listed for operators, decided again when the world changes, cut when they are denied then.
//!
//! A connection is registered before it is checked, so that a change which arrives between the two finds it.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use mesh_core::{
    Refusal, explain,
    flag::{Fault, Flag},
    id::{Identity, PolicyKey},
    inbound, limits,
    model::Workload,
    outbound,
    snapshot::Snapshot,
};
use mesh_net::{
    access::{Details, Party, Path, Side},
    copy::TransferCounters,
};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::watch;

use crate::world::not_known_yet;

/// Which pod a connection belongs to.
#[derive(Debug)]
pub struct Owner {
    /// Kubernetes UID.
    pub uid: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// Service account.
    pub service_account: Arc<str>,
    /// The node of this agent.
    pub node: Arc<str>,
    /// It has left the mesh: what it still has open is no longer the mesh's to decide.
    pub left: AtomicBool,
}

impl Owner {
    /// The pod as the control plane describes it.
    ///
    /// # Errors
    /// `UNKNOWN_WORKLOAD`.
    pub fn workload(&self, world: &Snapshot) -> Result<Arc<Workload>, Refusal> {
        world.local_pod(&self.namespace, &self.name, &self.service_account, &self.node).ok_or_else(|| {
            Refusal {
                flag: Flag::UnknownWorkload,
                why: format!(
                    "the control plane does not describe {}/{} on this node",
                    self.namespace, self.name
                ),
                policy: None,
            }
        })
    }
}

/// What must be asked again when the world changes.
#[derive(Clone, Debug)]
pub enum Subject {
    /// May it leave?
    Outbound(outbound::Request),
    /// May it come in?
    Inbound(inbound::Arrival),
}

/// One end of a connection, as operators see it.
#[derive(Clone, Debug, Serialize)]
pub struct End {
    /// Address.
    pub addr: SocketAddr,
    /// Name of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workload: Option<Arc<str>>,
    /// Its namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<Arc<str>>,
    /// What it proved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
}

impl End {
    /// As the record tells it; the address where it does not.
    pub fn of(party: &Party, or: SocketAddr) -> Self {
        Self {
            addr: party.addr.unwrap_or(or),
            workload: party.workload.clone(),
            namespace: party.namespace.clone(),
            identity: party.identity.clone(),
        }
    }
}

/// A connection as the admin endpoint lists it.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    /// Number of it, unique in this process.
    pub id: u64,
    /// Which end this agent serves.
    pub direction: Side,
    /// How it travels; none until that is decided.
    pub path: Option<Path>,
    /// The client.
    pub src: End,
    /// The next hop.
    pub dst: End,
    /// What the client dialled.
    pub dialled: SocketAddr,
    /// The service that was addressed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// The policy that decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// Why this path, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Age.
    pub opened_ms_ago: u64,
    /// Client to server.
    pub bytes_to_server: u64,
    /// Server to client.
    pub bytes_to_client: u64,
}

/// A connection as it is accepted.
#[derive(Clone, Debug)]
pub struct Accepted {
    /// Whose it is.
    pub owner: Arc<Owner>,
    /// Which end this agent serves.
    pub side: Side,
    /// The client.
    pub client: SocketAddr,
    /// What the client dialled.
    pub dialled: SocketAddr,
    /// Its 4-tuple exists inside the pod as it is here (plaintext; a tunnel's is that of its carrier).
    pub own_tuple: bool,
    /// What must be asked again.
    pub subject: Subject,
}

/// Why a live connection must end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The stable code.
    pub flag: Flag,
    /// In words.
    pub why: String,
    /// The policy that decided.
    pub policy: Option<PolicyKey>,
}

#[derive(Debug)]
struct Entry {
    accepted: Accepted,
    opened: Instant,
    details: Mutex<Details>,
    counters: Mutex<Arc<TransferCounters>>,
    cut: watch::Sender<Option<Cut>>,
    /// Since when it is undecided because something is not known (any more).
    undecided: Mutex<Option<Instant>>,
}

/// All live connections that pass through this agent. Clones are the same registry.
#[derive(Clone, Debug, Default)]
pub struct Connections {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: AtomicU64,
    entries: Mutex<HashMap<u64, Arc<Entry>>>,
    /// Client address and destination of connections whose 4-tuple is in use inside a pod.
    tuples: Tuples,
}

/// Counted, since the end of one connection and the start of the next with the same ends may be seen in either order.
#[derive(Debug, Default)]
struct Tuples(Mutex<HashMap<(SocketAddr, SocketAddr), u32>>);

impl Tuples {
    fn add(&self, tuple: (SocketAddr, SocketAddr)) {
        *self.0.lock().entry(tuple).or_default() += 1;
    }

    fn remove(&self, tuple: (SocketAddr, SocketAddr)) {
        if let std::collections::hash_map::Entry::Occupied(mut held) = self.0.lock().entry(tuple) {
            *held.get_mut() -= 1;
            if *held.get() == 0 {
                held.remove();
            }
        }
    }

    fn contains(&self, tuple: (SocketAddr, SocketAddr)) -> bool {
        self.0.lock().contains_key(&tuple)
    }
}

/// What a sweep found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Connections that were cut.
    pub cut: usize,
    /// When to look again at those that could not be decided.
    pub again: Option<Instant>,
}

impl Swept {
    /// Remembers to look again at `until` at the latest.
    pub fn look_again(&mut self, until: Instant) {
        self.again = Some(self.again.map_or(until, |earlier| earlier.min(until)));
    }
}

impl Connections {
    /// Registers a connection for as long as the result lives.
    pub fn register(&self, accepted: Accepted) -> Live {
        let id = self.inner.next.fetch_add(1, Ordering::Relaxed) + 1;
        let tuple = accepted.own_tuple.then_some((accepted.client, accepted.dialled));
        let entry = Arc::new(Entry {
            accepted,
            opened: Instant::now(),
            details: Mutex::default(),
            counters: Mutex::default(),
            cut: watch::Sender::new(None),
            undecided: Mutex::new(None),
        });
        if let Some(tuple) = tuple {
            self.inner.tuples.add(tuple);
        }
        self.inner.entries.lock().insert(id, entry.clone());
        Live { inner: self.inner.clone(), id, tuple, entry }
    }

    /// Whether `client` has a live connection to `to` whose ends own this 4-tuple inside the pod.
    pub fn taken(&self, client: SocketAddr, to: SocketAddr) -> bool {
        self.inner.tuples.contains((client, to))
    }

    /// A connection that does not pass through the agent uses this 4-tuple, or no longer does.
    pub fn direct(&self, client: SocketAddr, to: SocketAddr, open: bool) {
        let tuples = &self.inner.tuples;
        if open { tuples.add((client, to)) } else { tuples.remove((client, to)) }
    }

    /// Decides every live connection again and cuts what is denied now.
    pub fn sweep(&self, world: &Snapshot, now: Instant) -> Swept {
        let mut swept = Swept::default();
        for entry in self.all() {
            match entry.decide(world, now) {
                Decision::Stays => {}
                Decision::Undecided(until) => {
                    swept.look_again(until);
                }
                Decision::Denied(refusal) => {
                    let why = format!("{}: {}", refusal.flag, refusal.why);
                    if let Some(policy) = &refusal.policy {
                        entry.details.lock().policy = Some(policy.to_string());
                    }
                    let cut = Cut { flag: Flag::PolicyChanged, why, policy: refusal.policy };
                    entry.cut.send_replace(Some(cut));
                    swept.cut += 1;
                }
            }
        }
        swept
    }

    /// Cuts the connections of a pod that `which` selects by their path.
    pub fn cut_pod(&self, uid: &str, flag: Flag, which: impl Fn(Option<Path>) -> bool) -> usize {
        let mut cut = 0;
        for entry in self.all() {
            if &*entry.accepted.owner.uid == uid && which(entry.details.lock().path) {
                entry.cut.send_replace(Some(Cut { flag, why: flag.text().to_owned(), policy: None }));
                cut += 1;
            }
        }
        cut
    }

    /// All of them, oldest first.
    pub fn list(&self) -> Vec<Listed> {
        let mut entries: Vec<_> =
            self.inner.entries.lock().iter().map(|(id, entry)| (*id, entry.clone())).collect();
        entries.sort_unstable_by_key(|(id, _)| *id);
        entries.into_iter().map(|(id, entry)| entry.listed(id)).collect()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.inner.entries.lock().len()
    }

    fn all(&self) -> Vec<Arc<Entry>> {
        self.inner.entries.lock().values().cloned().collect()
    }
}

enum Decision {
    Stays,
    Undecided(Instant),
    Denied(Refusal),
}

impl Entry {
    fn decide(&self, world: &Snapshot, now: Instant) -> Decision {
        if self.accepted.owner.left.load(Ordering::Relaxed) {
            return Decision::Stays;
        }
        let verdict = self.accepted.owner.workload(world).and_then(|own| match &self.accepted.subject {
            Subject::Inbound(arrival) => {
                inbound::admit(world, &own, arrival).map(|admission| self.admitted(&admission))
            }
            // Only a decision against the connection ends it: that an endpoint would not be chosen today says nothing
            // about one that is in use.
            Subject::Outbound(request) => match outbound::plan(world, &own, request) {
                Err(refusal) if refusal.flag.fault() == Fault::Policy => Err(refusal),
                _ => Ok(()),
            },
        });
        let mut undecided = self.undecided.lock();
        match verdict {
            Ok(()) => {
                *undecided = None;
                Decision::Stays
            }
            Err(refusal) if not_known_yet(refusal.flag) => {
                let until = *undecided.get_or_insert(now) + limits::HOLD;
                if now < until { Decision::Undecided(until) } else { Decision::Denied(refusal) }
            }
            Err(refusal) => Decision::Denied(refusal),
        }
    }

    /// What decides about it may be another policy than the one that let it in.
    fn admitted(&self, admission: &inbound::Admission) {
        let mut details = self.details.lock();
        details.policy = admission.decider.as_ref().map(|decider| decider.policy.to_string());
        details.reason = Some(explain::admission(admission));
    }

    fn listed(&self, id: u64) -> Listed {
        let (transfer, details) = (self.counters.lock().transfer(), self.details.lock().clone());
        let Accepted { side, client, dialled, .. } = self.accepted;
        Listed {
            id,
            direction: side,
            path: details.path,
            src: End::of(&details.src, client),
            dst: End::of(&details.dst, dialled),
            dialled,
            service: details.service,
            policy: details.policy,
            reason: details.reason,
            opened_ms_ago: u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX),
            bytes_to_server: transfer.a_to_b,
            bytes_to_client: transfer.b_to_a,
        }
    }
}

/// A registered connection; dropping it ends the registration.
#[derive(Debug)]
pub struct Live {
    inner: Arc<Inner>,
    id: u64,
    tuple: Option<(SocketAddr, SocketAddr)>,
    entry: Arc<Entry>,
}

impl Live {
    /// Shows what is known by now, and where its bytes are counted.
    pub fn show(&self, details: &Details, counters: Arc<TransferCounters>) {
        *self.entry.details.lock() = details.clone();
        *self.entry.counters.lock() = counters;
    }

    /// Runs `work` until it ends or the connection is cut.
    ///
    /// # Errors
    /// It was cut; `work` is dropped.
    pub async fn until_cut<T>(&self, work: impl Future<Output = T>) -> Result<T, Cut> {
        let mut cut = self.entry.cut.subscribe();
        let cut = async {
            match cut.wait_for(Option::is_some).await.ok().and_then(|seen| seen.clone()) {
                Some(cut) => cut,
                // The sender lives in the entry, which this guard holds.
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            cut = cut => Err(cut),
            done = work => Ok(done),
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.inner.entries.lock().remove(&self.id);
        if let Some(tuple) = self.tuple {
            self.inner.tuples.remove(tuple);
        }
    }
}

#[cfg(test)]
mod tests;
