//! Connections that were open before their pod was enrolled. They go on as they were, past the mesh: counted, listed, and
//! ended where PeerAuthentication STRICT refuses plaintext, also when it comes to do so later.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
};

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

/// What is known of them.
#[derive(Default)]
pub struct Earlier(Mutex<HashMap<PodSlot, Vec<Unseen>>>);

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
    /// Notes what a pod has open at the moment that it is captured.
    ///
    /// # Errors
    /// When it cannot be listed.
    pub fn note(&self, kernel: &Kernel, pod: PodSlot) -> Result<(), KernelError> {
        let unseen = kernel.unseen(pod)?;
        if unseen.is_empty() {
            self.0.lock().remove(&pod);
        } else {
            tracing::info!(count = unseen.len(), "connections from before the pod was enrolled go on");
            self.0.lock().insert(pod, unseen);
        }
        Ok(())
    }

    /// Lets go of what has ended and of pods that have left.
    fn refresh(&self, kernel: &Kernel, table: &Table) {
        let mut all = self.0.lock();
        all.retain(|slot, known| {
            if !table.serving.values().any(|pod| pod.slot == *slot) {
                return false;
            }
            if let Ok(open) = kernel.unseen(*slot) {
                let open: HashSet<u64> = open.iter().map(|unseen| unseen.cookie).collect();
                known.retain(|unseen| open.contains(&unseen.cookie));
            }
            !known.is_empty()
        });
    }

    /// Ends those that STRICT refuses now, and counts them in `swept`. One that cannot be ended is tried again.
    ///
    /// # Errors
    /// The first of those.
    pub fn sweep(
        &self,
        agent: &Agent,
        world: &Snapshot,
        table: &Table,
        swept: &mut Swept,
    ) -> Result<(), KernelError> {
        if self.0.lock().is_empty() {
            return Ok(());
        }
        self.refresh(&agent.kernel, table);
        let mut outcome = Ok(());
        for pod in table.serving.values() {
            let known = self.0.lock().get(&pod.slot).cloned().unwrap_or_default();
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
    pub fn list(&self, agent: &Agent) -> Vec<ListedEarlier> {
        self.refresh(&agent.kernel, &agent.pods.borrow().clone());
        self.0.lock().values().flatten().map(listed).collect()
    }

    /// How many a pod has, as far as was seen last.
    pub fn count(&self, pod: PodSlot) -> usize {
        self.0.lock().get(&pod).map_or(0, Vec::len)
    }
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
