//! Connections that do not pass through the agent: told by the kernel, decided again when the world changes.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_core::{Refusal, explain, flag::Flag, inbound, limits, model::Workload, snapshot::Snapshot};
use mesh_net::{
    access::{AccessRecord, Outcome, Path, Side},
    drain::Draining,
    telemetry::ConnectionMetrics,
};
use parking_lot::Mutex;
use serde::Serialize;

use crate::{
    agent::Agent,
    connections::{End, Swept},
    inbound::arrival,
    kernel::{self, DirectFlow, Events, Kernel, KernelError, KernelEvent, PodSlot, flag_of},
    pods::{Pod, Table},
    report::{self, Failure, Told},
    world::not_known_yet,
};

/// What is remembered of direct flows, by the cookie of the client's socket.
#[derive(Default)]
pub struct Direct {
    open: Mutex<HashMap<u64, Open>>,
    undecided: Mutex<HashMap<u64, Instant>>,
    former: Mutex<HashMap<u64, Former>>,
}

/// A flow that was open when this process started: a former one opened its record and left it to us.
#[derive(Clone, Copy, Debug, Default)]
struct Former {
    cut: bool,
}

struct Open {
    record: AccessRecord,
    ends: (SocketAddr, SocketAddr),
    /// When it was seen first that the kernel has no record of it any more.
    missed: Option<Instant>,
    /// The server's side of the same connection, in the metrics.
    arrival: ConnectionMetrics,
    cut: bool,
}

/// A direct flow as the admin endpoint lists it.
#[derive(Clone, Debug, Serialize)]
pub struct ListedDirect {
    /// Cookie of the client's socket.
    pub id: u64,
    /// Always the client's: it is one connection and one record.
    pub direction: Side,
    /// Always direct.
    pub path: Path,
    /// The client.
    pub src: End,
    /// The server.
    pub dst: End,
    /// What the client dialled.
    pub dialled: SocketAddr,
    /// The policy that decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// Why this path, in words.
    pub reason: String,
    /// The policy generation that permitted it.
    pub generation: u64,
}

/// Pods by their place in the kernel.
fn by_slot(table: &Table) -> BTreeMap<PodSlot, &Arc<Pod>> {
    table.serving.values().chain(&table.leaving).map(|pod| (pod.slot, pod)).collect()
}

impl Direct {
    /// Decides every live direct flow again and destroys what is denied now. A flow of a pod that has left the mesh is
    /// no longer the mesh's to decide. What was done is added to `swept`.
    ///
    /// # Errors
    /// The flows cannot be listed, or one that is denied lives on; the others have been dealt with.
    pub fn sweep(
        &self,
        agent: &Agent,
        world: &Snapshot,
        table: &Table,
        swept: &mut Swept,
    ) -> Result<(), KernelError> {
        let flows = agent.kernel.direct_flows()?;
        let serving: BTreeMap<PodSlot, &Arc<Pod>> =
            table.serving.values().map(|pod| (pod.slot, pod)).collect();
        let (now, mut denied) = (Instant::now(), Vec::new());
        let live: HashSet<u64> = flows.iter().map(|flow| flow.socket).collect();
        self.bury(agent, &live, now);
        let mut undecided = self.undecided.lock();
        undecided.retain(|socket, _| live.contains(socket));
        for flow in &flows {
            let (Some(src), Some(dst)) = (serving.get(&flow.src_pod), serving.get(&flow.dst_pod)) else {
                continue;
            };
            match decide(world, src, dst, flow) {
                Ok(()) => drop(undecided.remove(&flow.socket)),
                Err(refusal) if not_known_yet(refusal.flag) => {
                    let until = *undecided.entry(flow.socket).or_insert(now) + limits::HOLD;
                    if now < until {
                        swept.look_again(until);
                    } else {
                        denied.push(flow);
                    }
                }
                Err(_) => denied.push(flow),
            }
        }
        drop(undecided);
        self.cut(denied, |flow| agent.kernel.destroy(flow), &mut swept.cut)
    }

    /// Ends `flows`, and counts those that had not ended by themselves.
    fn cut<'a>(
        &self,
        flows: impl IntoIterator<Item = &'a DirectFlow>,
        destroy: impl Fn(&DirectFlow) -> Result<bool, KernelError>,
        count: &mut usize,
    ) -> Result<(), KernelError> {
        let mut outcome = Ok(());
        for flow in flows {
            self.were_cut(std::slice::from_ref(flow));
            match destroy(flow) {
                Ok(ended) => *count += usize::from(ended),
                // One that stays does not keep the others.
                Err(error) => {
                    tracing::error!(src = %flow.src, dst = %flow.dst, %error, "a direct flow could not be cut");
                    outcome = Err(error);
                }
            }
        }
        outcome
    }

    /// Closes the records of what ended without the agent being told: the ring of events was full then.
    fn bury(&self, agent: &Agent, live: &HashSet<u64>, now: Instant) {
        let untold = |socket: &u64, open: &mut Open| {
            open.missed = if live.contains(socket) { None } else { Some(open.missed.unwrap_or(now)) };
            // Its event may only be on its way.
            open.missed.is_some_and(|since| now.duration_since(since) >= limits::HOLD)
        };
        let ended: Vec<Open> = self.open.lock().extract_if(untold).map(|(_, open)| open).collect();
        for Open { mut record, ends: (src, dst), arrival, .. } in ended {
            agent.connections.direct(src, dst, false);
            arrival.closed(None);
            record.details.reason = Some(format!("{REASON}; its end was not told"));
            record.close(Outcome::Complete);
        }
    }

    /// Destroys the direct flows of a pod.
    ///
    /// # Errors
    /// They cannot be listed, or one of them lives on.
    pub fn cut_pod(&self, kernel: &Kernel, pod: PodSlot) -> Result<(), KernelError> {
        let flows = kernel.direct_flows()?;
        let own = flows.iter().filter(|flow| flow.src_pod == pod || flow.dst_pod == pod);
        self.cut(own, |flow| kernel.destroy(flow), &mut 0)
    }

    /// Remembers that these were cut by a change of policy, for their records.
    pub fn were_cut(&self, flows: &[DirectFlow]) {
        let (mut open, mut former) = (self.open.lock(), self.former.lock());
        for flow in flows {
            if let Some(open) = open.get_mut(&flow.socket) {
                open.cut = true;
            } else if let Some(former) = former.get_mut(&flow.socket) {
                former.cut = true;
            }
        }
    }

    /// All of them.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn list(&self, agent: &Agent) -> Result<Vec<ListedDirect>, KernelError> {
        let (world, table) = (agent.world.now(), agent.pods.borrow().clone());
        let slots = by_slot(&table);
        let flows = agent.kernel.direct_flows()?;
        Ok(flows
            .iter()
            .filter(|flow| flow.established)
            .map(|flow| listed(world.as_deref(), &slots, flow))
            .collect())
    }

    /// Lets go of what goes on in the kernel while this process stops: the next one closes the records.
    pub fn stop(&self) {
        for (_, open) in self.open.lock().drain() {
            open.record.leave();
        }
    }

    fn opened(&self, agent: &Agent, flow: &DirectFlow) {
        // What was told while no agent was here has been adopted by now.
        if !self.former.lock().contains_key(&flow.socket) {
            agent.connections.direct(flow.src, flow.dst, true);
        }
        self.open.lock().insert(flow.socket, open(agent, flow));
    }

    fn closed(&self, agent: &Agent, flow: &DirectFlow, sent_bytes: u64, received_bytes: u64) {
        agent.connections.direct(flow.src, flow.dst, false);
        let (known, former) =
            (self.open.lock().remove(&flow.socket), self.former.lock().remove(&flow.socket));
        // Without a handshake nobody accepted it, and there is nothing to tell.
        let Some(Open { record, arrival, cut, .. }) =
            known.or_else(|| flow.established.then(|| open(agent, flow)))
        else {
            return;
        };
        let cut = cut || former.is_some_and(|former| former.cut);
        let counters = record.counters();
        counters.add_a_to_b(sent_bytes);
        counters.add_b_to_a(received_bytes);
        arrival.received_bytes.inc_by(sent_bytes);
        arrival.sent_bytes.inc_by(received_bytes);
        if !cut {
            arrival.closed(None);
            return record.close(Outcome::Complete);
        }
        arrival.closed(Some(Flag::PolicyChanged));
        let failure = match judge(agent, flow.src_pod, flow.src, flow.dst) {
            Some(refusal) => Failure {
                flag: Flag::PolicyChanged,
                error: refusal.to_string(),
                policy: refusal.policy.map(|key| key.to_string()),
            },
            None => Failure::new(Flag::PolicyChanged, Flag::PolicyChanged.text()),
        };
        report::close(record, Err(failure));
    }
}

/// Tells of a flow that reached its application.
fn open(agent: &Agent, flow: &DirectFlow) -> Open {
    let (src, dst) = ends(agent, flow.src_pod, flow.src, flow.dst);
    let world = agent.world.now();
    let proven = src.as_ref().map(|src| src.identity());
    let expected = dst.as_ref().map(|dst| dst.identity());
    let mut record = AccessRecord::open_since(Side::Outbound, Some(flow.src), since(flow.opened_ns));
    record.details.src = report::party(flow.src, src.as_deref(), proven.clone());
    record.details.dst = report::party(flow.dst, dst.as_deref(), expected.clone());
    record.details.path = Some(Path::Direct);
    record.details.reason = Some(REASON.to_owned());
    let dialled = flow.dialled.filter(|dialled| *dialled != flow.dst);
    let service = match (&world, &src, dialled) {
        (Some(world), Some(src), Some(dialled)) => {
            world.service_at(&src.namespace, dialled).map(|reached| reached.service.clone())
        }
        _ => None,
    };
    record.details.service = service.as_ref().map(|service| service.key.hostname.to_string());
    if let (Some(world), Some(dst)) = (&world, &dst) {
        let arrival = arrival(proven.clone(), flow.src, flow.dst, None);
        if let Ok(admission) = inbound::admit(world, dst, &arrival) {
            record.details.policy = admission.decider.as_ref().map(|decider| decider.policy.to_string());
        }
    }
    // Identities are the kernel's knowledge here, not a handshake's.
    let told =
        Told { source: src, source_identity: None, destination: dst, destination_identity: None, service };
    told.count(&mut record, &agent.metrics, Side::Outbound);
    let arrival = agent.metrics.connection(told.labels(Side::Inbound, Path::Direct.name()));
    Open { record, ends: (flow.src, flow.dst), missed: None, arrival, cut: false }
}

/// A moment of the kernel's clock as ours; both are the monotonic one.
fn since(opened_ns: u64) -> tokio::time::Instant {
    let ago = Duration::from_nanos(kernel::monotonic_ns().saturating_sub(opened_ns));
    let now = tokio::time::Instant::now();
    now.checked_sub(ago).unwrap_or(now)
}

/// Why a direct flow is direct.
const REASON: &str = "both pods are on this node and layer 4 decides everything";

fn decide(world: &Snapshot, src: &Pod, dst: &Pod, flow: &DirectFlow) -> Result<(), Refusal> {
    let (src, dst) = (src.owner.workload(world)?, dst.owner.workload(world)?);
    let arrival = arrival(Some(src.identity()), flow.src, flow.dst, None);
    inbound::admit(world, &dst, &arrival).map(|_| ())
}

fn listed(world: Option<&Snapshot>, slots: &BTreeMap<PodSlot, &Arc<Pod>>, flow: &DirectFlow) -> ListedDirect {
    let workload = |slot| slots.get(&slot).zip(world).and_then(|(pod, world)| pod.owner.workload(world).ok());
    let (src, dst) = (workload(flow.src_pod), workload(flow.dst_pod));
    let end = |addr, workload: &Option<Arc<Workload>>| {
        End::of(&report::party(addr, workload.as_deref(), workload.as_ref().map(|w| w.identity())), addr)
    };
    let admission = world.zip(src.as_ref()).zip(dst.as_ref()).and_then(|((world, src), dst)| {
        inbound::admit(world, dst, &arrival(Some(src.identity()), flow.src, flow.dst, None)).ok()
    });
    ListedDirect {
        id: flow.socket,
        direction: Side::Outbound,
        path: Path::Direct,
        src: end(flow.src, &src),
        dst: end(flow.dst, &dst),
        dialled: flow.dialled.unwrap_or(flow.dst),
        policy: admission.as_ref().and_then(|a| a.decider.as_ref()).map(|decider| decider.policy.to_string()),
        reason: admission
            .map_or_else(|| REASON.to_owned(), |a| format!("{REASON}; {}", explain::admission(&a))),
        generation: flow.generation,
    }
}

/// Who is at the two ends, as far as the world knows.
fn ends(
    agent: &Agent,
    src_pod: PodSlot,
    src: SocketAddr,
    dst: SocketAddr,
) -> (Option<Arc<Workload>>, Option<Arc<Workload>>) {
    let Some(world) = agent.world.now() else { return (None, None) };
    let table = agent.pods.borrow().clone();
    let own = by_slot(&table).get(&src_pod).and_then(|pod| pod.owner.workload(&world).ok());
    (own.or_else(|| world.workload_by_ip(src.ip()).cloned()), world.workload_by_ip(dst.ip()).cloned())
}

/// What policy says against a direct flow now, if anything.
fn judge(agent: &Agent, src_pod: PodSlot, src: SocketAddr, dst: SocketAddr) -> Option<Refusal> {
    let (source, destination) = ends(agent, src_pod, src, dst);
    let (world, source, destination) = (agent.world.now()?, source?, destination?);
    let arrival = arrival(Some(source.identity()), chosen(Some(&source), src, dst), dst, None);
    inbound::admit(&world, &destination, &arrival).err()
}

/// The client's end; what it would have been, where connect was refused before the kernel chose an address.
fn chosen(source: Option<&Workload>, src: SocketAddr, dst: SocketAddr) -> SocketAddr {
    let own = source.filter(|_| src.ip().is_unspecified());
    let address = own.and_then(|own| own.addresses.iter().find(|ip| ip.is_ipv4() == dst.is_ipv4()));
    address.map_or(src, |address| SocketAddr::new(*address, src.port()))
}

/// Tells what the kernel did, until the drain is forced.
pub async fn listen(agent: Arc<Agent>, mut events: Events, draining: Draining) {
    for flow in agent.kernel.direct_flows().unwrap_or_default() {
        agent.connections.direct(flow.src, flow.dst, true);
        agent.direct.former.lock().insert(flow.socket, Former::default());
    }
    loop {
        let event = tokio::select! {
            () = draining.forced() => return,
            event = events.next() => event,
        };
        match event {
            Ok(event) => told(&agent, event),
            Err(error) => {
                tracing::error!(%error, "the kernel's events cannot be read; direct flows have no records");
                return;
            }
        }
    }
}

fn told(agent: &Agent, event: KernelEvent) {
    match event {
        KernelEvent::DirectOpened(flow) => agent.direct.opened(agent, &flow),
        KernelEvent::DirectClosed { flow, sent_bytes, received_bytes, rtt_us, retransmits } => {
            tracing::trace!(src = %flow.src, dst = %flow.dst, rtt_us, retransmits, "direct flow ended");
            agent.direct.closed(agent, &flow, sent_bytes, received_bytes);
        }
        KernelEvent::Refused { reason, flag, src_pod, src, dst, dialled, .. } => {
            refused(agent, (src_pod, src, dst, dialled), flag, reason.text());
        }
        KernelEvent::Cut { reason, src, dst, .. } => {
            let flag = flag_of(reason);
            agent.metrics.refuse(flag);
            let mut record = AccessRecord::open(Side::Inbound, Some(src));
            record.details.dst.addr = Some(dst);
            record.fail(flag, reason.text());
        }
    }
}

/// A refusal of the kernel, with the policy that it followed.
fn refused(
    agent: &Agent,
    (src_pod, src, dst, dialled): (PodSlot, SocketAddr, SocketAddr, Option<SocketAddr>),
    flag: Flag,
    text: &str,
) {
    let (source, destination) = ends(agent, src_pod, src, dst);
    let src = chosen(source.as_deref(), src, dst);
    let mut record = AccessRecord::open(Side::Outbound, Some(src));
    record.details.src = report::party(src, source.as_deref(), None);
    record.details.dst = report::party(dst, destination.as_deref(), None);
    record.details.path = Some(Path::Direct);
    let world = agent.world.now();
    let failure = match judge(agent, src_pod, src, dst).filter(|_| flag == Flag::PolicyDenied) {
        Some(refusal) => Failure::from(refusal),
        None => Failure::new(flag, text),
    };
    if let (Some(world), Some(source), Some(dialled)) = (&world, &source, dialled) {
        let reached = world.service_at(&source.namespace, dialled);
        record.details.service = reached.map(|reached| reached.service.key.hostname.to_string());
    }
    Told { source, destination, ..Told::default() }.count(&mut record, &agent.metrics, Side::Outbound);
    report::close(record, Err(failure));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(socket: u64) -> DirectFlow {
        let pod = PodSlot { netns: 1, id: 1 };
        DirectFlow {
            src: "10.0.0.1:4660".parse().unwrap(),
            dst: "10.0.0.2:80".parse().unwrap(),
            dialled: None,
            src_pod: pod,
            dst_pod: pod,
            established: true,
            generation: 1,
            opened_ns: 0,
            socket,
            server_socket: None,
        }
    }

    #[test]
    fn a_flow_that_cannot_be_cut_is_an_error_and_keeps_no_other() {
        let (direct, flows, mut count) = (Direct::default(), [flow(1), flow(2), flow(3)], 0);
        let tried = Mutex::new(Vec::new());
        let destroy = |flow: &DirectFlow| {
            tried.lock().push(flow.socket);
            match flow.socket {
                1 => Err(KernelError::Program { what: "end".to_owned(), why: "no".to_owned() }),
                socket => Ok(socket == 2),
            }
        };
        assert!(direct.cut(&flows, destroy, &mut count).is_err());
        assert_eq!((tried.into_inner(), count), (vec![1, 2, 3], 1));
        assert!(direct.cut(&flows[..0], |_| Ok(true), &mut count).is_ok());
    }
}
