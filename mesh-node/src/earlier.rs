//! Connections that were open before their pod was enrolled. They go on as they were, past the mesh: counted, listed, and
//! ended where PeerAuthentication STRICT refuses plaintext, also when it comes to do so later.

use std::{collections::HashSet, net::SocketAddr};

use mesh_core::{flag::Flag, inbound, snapshot::Snapshot};
use mesh_net::access::{AccessRecord, Path, Side};
use parking_lot::Mutex;
use serde::Serialize;

use crate::{
    agent::Agent,
    connections::Swept,
    inbound::arrival,
    kernel::{Kernel, KernelError, PodSlot, Unseen},
    pods::{Pod, Table},
    report,
};

/// Those of one pod. With the pod, so that there is no moment at which one is known and the other is not.
#[derive(Debug)]
pub struct Earlier(Mutex<Vec<Unseen>>);

/// One as the admin endpoint lists it.
#[derive(Clone, Debug, Serialize)]
pub struct ListedEarlier {
    /// Cookie of the pod's socket.
    pub id: u64,
    /// Which end the pod is.
    pub direction: Side,
    /// Always `earlier`.
    pub path: &'static str,
    /// The client.
    pub src: ListedEnd,
    /// The server.
    pub dst: ListedEnd,
    /// What the client dialled.
    pub dialled: SocketAddr,
    /// In words.
    pub reason: &'static str,
}

/// One end, by its address alone: nobody proved anything.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ListedEnd {
    /// Address.
    pub addr: SocketAddr,
}

impl Earlier {
    /// What a pod has open at the moment that it is captured.
    ///
    /// # Errors
    /// When it cannot be listed.
    pub fn of(kernel: &Kernel, pod: PodSlot) -> Result<Self, KernelError> {
        let unseen = kernel.unseen(pod)?;
        if !unseen.is_empty() {
            tracing::info!(count = unseen.len(), "connections from before the pod was enrolled go on");
        }
        Ok(Self(Mutex::new(unseen)))
    }

    /// Those that are still open, as far as the kernel tells.
    fn refreshed(&self, kernel: &Kernel, pod: PodSlot) -> Vec<Unseen> {
        let mut known = self.0.lock();
        if !known.is_empty()
            && let Ok(open) = kernel.unseen(pod)
        {
            let open: HashSet<u64> = open.iter().map(|unseen| unseen.cookie).collect();
            known.retain(|unseen| open.contains(&unseen.cookie));
        }
        known.clone()
    }

    /// How many there are, as far as was seen last.
    pub fn count(&self) -> usize {
        self.0.lock().len()
    }
}

/// Ends those that STRICT refuses now, and counts them in `swept`. One that cannot be ended is tried again.
///
/// # Errors
/// The first of those.
pub fn sweep(agent: &Agent, world: &Snapshot, table: &Table, swept: &mut Swept) -> Result<(), KernelError> {
    let mut outcome = Ok(());
    for pod in table.serving.values() {
        let known = pod.earlier.refreshed(&agent.kernel, pod.slot);
        for unseen in known.iter().filter(|unseen| refused(world, pod, unseen)) {
            match agent.kernel.end_unseen(pod.slot, unseen) {
                Ok(false) => {}
                Ok(true) => {
                    swept.cut += 1;
                    tell(agent, world, pod, unseen);
                }
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
    }
    outcome
}

/// All that are still open.
pub fn list(agent: &Agent) -> Vec<ListedEarlier> {
    let table = agent.pods.borrow().clone();
    let open = table.serving.values().flat_map(|pod| pod.earlier.refreshed(&agent.kernel, pod.slot));
    open.map(|unseen| listed(&unseen)).collect()
}

fn refused(world: &Snapshot, pod: &Pod, unseen: &Unseen) -> bool {
    let Ok(own) = pod.owner.workload(world) else { return false };
    unseen.accepted && inbound::strict(world, &own, &arrival(None, unseen.remote, unseen.local, None))
}

fn tell(agent: &Agent, world: &Snapshot, pod: &Pod, unseen: &Unseen) {
    let (from, to) = (unseen.remote, unseen.local);
    let own = pod.owner.workload(world).ok();
    let mut record = AccessRecord::open(Side::Inbound, Some(from));
    record.details.src = report::party(from, world.workload_by_ip(from.ip()).map(|w| &**w), None);
    record.details.dst = report::party(to, own.as_deref(), None);
    record.details.path = Some(Path::Plaintext);
    agent.metrics.refuse(Flag::MtlsRequired);
    record.fail(Flag::MtlsRequired, "it was open before the pod was enrolled, and mTLS is required");
}

fn listed(unseen: &Unseen) -> ListedEarlier {
    let Unseen { local, remote, cookie, accepted } = *unseen;
    let (direction, src, dst) =
        if accepted { (Side::Inbound, remote, local) } else { (Side::Outbound, local, remote) };
    ListedEarlier {
        id: cookie,
        direction,
        path: "earlier",
        src: ListedEnd { addr: src },
        dst: ListedEnd { addr: dst },
        dialled: dst,
        reason: "open since before the pod was enrolled",
    }
}
