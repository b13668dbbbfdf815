//! Key and value of every map. The kernel hashes raw bytes, so every byte has a name; sizes are asserted.
//!
//! The kernel may hand the memory of a removed element to a new one while a program still reads it. Where believing
//! such a read would permit something ([`FlowRecord`], [`VerdictEntry`]) the value repeats its key and is checked.

use crate::wire::{Ip, PortBe, Target};

/// Name of every map, in the object, in bpffs and in metrics.
pub const MAP_NAMES: [&str; 14] = [
    "PODS",
    "LOCAL",
    "CONFIG",
    "SERVICES",
    "ENDPOINTS",
    "VERDICTS",
    "PROBES",
    "USAGE",
    "FLOWS",
    "OWN_FLOWS",
    "LISTENERS",
    "SOCKETS",
    "OURS",
    "COUNTERS",
];
/// Name of the ring buffer of log lines; only in an object that was built with them.
pub const LOGS: &str = "AYA_LOGS";
/// Name of the ring buffer of events.
pub const EVENTS: &str = "EVENTS";

/// Pods of one node; Kubernetes' own limit is 110, some distributions allow 500.
pub const MAX_PODS: u32 = 1024;
/// Addresses of local pods.
pub const MAX_ADDRESSES: u32 = 4 * MAX_PODS;
/// Pairs of VIP and port of a cluster.
pub const MAX_SERVICES: u32 = 1 << 16;
/// Endpoints of all services together.
pub const MAX_ENDPOINTS: u32 = 1 << 18;
/// Endpoints of one service: what the bounded search of the kernel can reach.
pub const MAX_ENDPOINTS_OF_ONE: u32 = 1 << 16;
/// Verdicts of all pairs of local pods and their ports.
pub const MAX_VERDICTS: u32 = 1 << 18;
/// Ports of all local pods that the kubelet probes.
pub const MAX_PROBES: u32 = 16 * MAX_PODS;
/// Live captured and direct flows; a full map refuses new ones.
pub const MAX_FLOWS: u32 = 1 << 18;
/// Live sockets of the agent towards its pods: a map of their own, so that no pod can starve them, and as many as one
/// process can have descriptors, so that it cannot fill before those do.
pub const MAX_OWN_FLOWS: u32 = 1 << 20;
/// Ring buffer of events, bytes.
pub const EVENT_BYTES: u32 = 1 << 20;

/// Elements of `COUNTERS`: more than there are reasons, so that a new reason is no new layout.
pub const MAX_REASONS: u32 = 64;
const _: () = assert!(crate::reason::Reason::ALL.len() <= MAX_REASONS as usize);

/// Slots of one pod in `LISTENERS`.
pub const SLOTS_PER_POD: u32 = 6;
/// Outbound listener, IPv4; IPv6 follows.
pub const SLOT_OUTBOUND: u32 = 0;
/// Listener for plaintext, IPv4; IPv6 follows.
pub const SLOT_PLAINTEXT: u32 = 2;
/// Listener for tunnels, IPv4; IPv6 follows.
pub const SLOT_HBONE: u32 = 4;

/// `PODS`: cookie of a network namespace → the pod in it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodEntry {
    /// Number of the pod, never given twice while the maps live.
    pub id: u32,
    /// First slot of its listeners.
    pub slot: u32,
    /// [`POD_CAPTURE`].
    pub flags: u32,
    /// Bytes of `uid` that count.
    pub uid_bytes: u32,
    /// The pod's UID, for the agent that comes back after a restart.
    pub uid: [u8; 64],
}
const _: () = assert!(size_of::<PodEntry>() == 80);

/// New connections of this pod are decided; without it only arrivals are.
pub const POD_CAPTURE: u32 = 1;

/// `LOCAL`: address → the enrolled pod that has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalPod {
    /// Cookie of its network namespace.
    pub netns: u64,
    /// Its number.
    pub pod: u32,
    /// Always zero.
    pub pad: u32,
}
const _: () = assert!(size_of::<LocalPod>() == 16);

/// `CONFIG`, its only element.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Goes up with every change that takes a permission away.
    pub generation: u64,
    /// [`CONFIG_NO_DIRECT`].
    pub flags: u32,
    /// Number for the next pod.
    pub next_pod: u32,
    /// Number for the next list of endpoints.
    pub next_service: u32,
    /// Live connections that one pod may have in `FLOWS`; zero is no bound.
    pub pod_flows: u32,
    /// Cookie of the node's own network namespace; zero where no kubelet is known.
    pub node_netns: u64,
    /// Number of the cgroup of the kubelet; zero where none is known.
    pub kubelet: u64,
    /// Hash of the object whose programs are attached.
    pub object: [u8; 32],
}
const _: () = assert!(size_of::<Config>() == 72);

/// No direct path (`encryptSameNode: always`, or the kernel cannot cut live connections).
pub const CONFIG_NO_DIRECT: u32 = 1;

/// `SERVICES`: VIP and port → list of endpoints.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Number of the list in `ENDPOINTS`; a changed list gets a new one, so that no reader sees a mixture.
    pub id: u32,
    /// Length of the list.
    pub count: u32,
    /// Sum of the weights.
    pub weight: u32,
    /// [`SERVICE_AGENT`].
    pub flags: u32,
}
const _: () = assert!(size_of::<Service>() == 16);

/// The agent has to choose: a waypoint, or a rule that needs more than a weight.
pub const SERVICE_AGENT: u32 = 1;

/// Key of `ENDPOINTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EndpointKey {
    /// The list.
    pub service: u32,
    /// Position in it.
    pub index: u32,
}
const _: () = assert!(size_of::<EndpointKey>() == 8);

/// `ENDPOINTS`: one endpoint of one list.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it is.
    pub to: Target,
    /// Sum of the weights up to and including this one.
    pub cumulative: u32,
}
const _: () = assert!(size_of::<Endpoint>() == 24);

/// Key of `VERDICTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VerdictKey {
    /// Number of the calling pod.
    pub src: u32,
    /// Number of the called pod.
    pub dst: u32,
    /// The called port, or [`ANY_OTHER_PORT`].
    pub port: PortBe,
    /// Always zero.
    pub pad: u16,
}
const _: () = assert!(size_of::<VerdictKey>() == 12);

impl VerdictKey {
    /// Of a pair of pods and a port in host order.
    #[inline(always)]
    pub const fn new(src: u32, dst: u32, port: PortBe) -> Self {
        Self { src, dst, port, pad: 0 }
    }
}

/// The verdict for ports that have none of their own.
pub const ANY_OTHER_PORT: PortBe = PortBe::from_host(0);

/// `VERDICTS`: what the policies say about a pair of local pods; no entry means that the agent has to ask them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerdictEntry {
    /// The key again.
    pub key: VerdictKey,
    /// [`VERDICT_ALLOW`], [`VERDICT_DENY`] or [`VERDICT_AGENT`].
    pub verdict: u32,
}
const _: () = assert!(size_of::<VerdictEntry>() == 16);

/// Admitted whatever the bytes are.
pub const VERDICT_ALLOW: u32 = 1;
/// Refused whatever the bytes are.
pub const VERDICT_DENY: u32 = 2;
/// The agent has to ask the policies, although any other port has a verdict.
pub const VERDICT_AGENT: u32 = 3;

/// Key of `PROBES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProbeKey {
    /// Number of the pod.
    pub pod: u32,
    /// The port that its manifest declares for a probe.
    pub port: PortBe,
    /// Always zero.
    pub pad: u16,
}
const _: () = assert!(size_of::<ProbeKey>() == 8);

/// `PROBES`: a port that the kubelet may reach without the mesh.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probed(pub u32);

/// `USAGE`: number of a pod → its live connections in `FLOWS`, counted by the programs.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage(pub u64);

/// Key of `FLOWS` and `OWN_FLOWS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowKey {
    /// Cookie of the namespace in which the SYN arrives: loopback flows of two pods differ, and an address that went
    /// to another pod leads nowhere.
    pub netns: u64,
    /// The client's address.
    pub src: Ip,
    /// The address that the SYN carries.
    pub dst: Ip,
    /// The client's port.
    pub sport: PortBe,
    /// The port that the SYN carries.
    pub dport: PortBe,
    /// Always zero.
    pub pad: u32,
}
const _: () = assert!(size_of::<FlowKey>() == 48);

/// The agent accepts it; `other` is the endpoint that the kernel chose, when [`FLOW_OTHER`].
pub const FLOW_TO_AGENT: u32 = 1;
/// A pod's call to itself.
pub const FLOW_SELF: u32 = 2;
/// Authorised between two pods; `other` is what was dialled, when [`FLOW_OTHER`].
pub const FLOW_DIRECT: u32 = 3;
/// Refused after connect had let it go on: its SYN is answered by a reset.
pub const FLOW_REFUSED: u32 = 4;
/// A socket of the agent.
pub const FLOW_OWN: u32 = 5;
/// The kubelet probes a declared port.
pub const FLOW_PROBE: u32 = 6;

/// `other` holds something.
pub const FLOW_OTHER: u32 = 1;
/// The client's socket has seen the SYN-ACK.
pub const FLOW_ESTABLISHED: u32 = 2;
/// The client's socket has seen a FIN after its own; only on the socket.
pub const FLOW_PEER_FIN: u32 = 4;
/// The record is counted in `USAGE`; only on the socket.
pub const FLOW_COUNTED: u32 = 8;

/// `FLOWS`, `OWN_FLOWS`: one live connection, from before its SYN to the close of the client's socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowRecord {
    /// The key again.
    pub key: FlowKey,
    /// Policy generation of the decision.
    pub generation: u64,
    /// Cookie of the client's socket: only that one removes the record.
    pub socket: u64,
    /// Cookie of the accepted socket of a direct flow; zero before there is one.
    pub server_socket: u64,
    /// Cookie of the client's namespace.
    pub client_netns: u64,
    /// When its SYN was sent, nanoseconds of the monotonic clock.
    pub opened_ns: u64,
    /// `FLOW_TO_AGENT` and so on.
    pub kind: u32,
    /// [`FLOW_OTHER`], [`FLOW_ESTABLISHED`].
    pub flags: u32,
    /// Number of the calling pod.
    pub src_pod: u32,
    /// Number of the called pod, of direct flows.
    pub dst_pod: u32,
    /// See `kind`.
    pub other: Target,
    /// Always zero.
    pub pad: u32,
}
const _: () = assert!(size_of::<FlowRecord>() == 128);

/// `SOCKETS`: what connect decided, on the socket itself, so that it ends with it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketState {
    /// The record as it will be written; `key.dst` and `key.dport` bind the decision to its destination. Kind zero
    /// means that there is no decision.
    pub record: FlowRecord,
    /// The record stands in its map.
    pub recorded: u32,
    /// Always zero.
    pub pad: u32,
}
const _: () = assert!(size_of::<SocketState>() == 136);

#[cfg(feature = "user")]
mod pod {
    macro_rules! pod {
        ($($name:ty),*) => { $(
            // SAFETY: `repr(C)`, only integers, every byte named, sizes asserted above; any bit pattern is valid.
            unsafe impl aya::Pod for $name {}
        )* };
    }
    pod!(
        super::PodEntry,
        super::LocalPod,
        super::Config,
        super::Service,
        super::ServiceKey,
        super::EndpointKey,
        super::Endpoint,
        super::VerdictKey,
        super::VerdictEntry,
        super::ProbeKey,
        super::Probed,
        super::Usage,
        super::FlowKey,
        super::FlowRecord,
        super::SocketState,
        crate::wire::Ip
    );
}

/// Key of `SERVICES`: VIP and port.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey(pub Target);
