//! What goes in and out of [`super::Kernel`].

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    net::{IpAddr, SocketAddr, TcpListener},
    path::PathBuf,
    sync::Arc,
};

use mesh_core::flag::Flag;
use mesh_ebpf_common::{map, reason::Reason};
use serde::Serialize;

/// Where the kernel's side of an agent lives.
#[derive(Clone, Debug)]
pub struct KernelConfig {
    /// Name of the node: the pins of two nodes on one kernel lie apart by it.
    pub node: String,
    /// Where bpffs is, or is to be mounted.
    pub bpffs: PathBuf,
    /// It is mounted when it is not there. Never in a container: what is mounted there ends with it, and the pins with
    /// that.
    pub mount_bpffs: bool,
    /// Root of the cgroup v2 hierarchy, or a hybrid one's directory; found in `/proc/self/mountinfo` when absent.
    pub cgroup: Option<PathBuf>,
    /// Live connections that one pod may have in the kernel's records; zero is no bound.
    pub pod_flows: u32,
    /// Programs with log lines, where this build has them: debug builds only.
    pub log: bool,
}

/// Which processes are the kubelet's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Kubelet {
    /// Cookie of the node's own network namespace.
    pub node_netns: u64,
    /// Number of the cgroup v2 of the kubelet's unit.
    pub cgroup: u64,
}

/// A pod to enrol.
#[derive(Debug)]
pub struct PodIdentity {
    /// UID, unique among the pods of all time; at most 64 bytes.
    pub uid: String,
    /// Its network namespace.
    pub netns: File,
    /// Its addresses, at least one.
    pub ips: Vec<IpAddr>,
}

/// The agent's listeners in the namespace of one pod, each already listening and without `SO_REUSEPORT`.
#[derive(Debug)]
pub struct PodListeners<'a> {
    /// Outbound, IPv4 (transparent).
    pub outbound_v4: &'a TcpListener,
    /// Outbound, IPv6 (transparent).
    pub outbound_v6: Option<&'a TcpListener>,
    /// Plaintext arrivals, IPv4.
    pub plaintext_v4: &'a TcpListener,
    /// Plaintext arrivals, IPv6.
    pub plaintext_v6: Option<&'a TcpListener>,
    /// Tunnels, IPv4.
    pub hbone_v4: &'a TcpListener,
    /// Tunnels, IPv6.
    pub hbone_v6: Option<&'a TcpListener>,
}

/// An enrolled pod, by the numbers that the maps use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct PodSlot {
    /// Cookie of its network namespace.
    pub netns: u64,
    /// Its number, never given twice while the maps live.
    pub id: u32,
}

/// How a pod goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// It is gone, or its namespace is: its direct flows are cut and forgotten.
    Deleted,
    /// It lives on outside of the mesh: its direct flows go on.
    Leave,
}

/// A pod as the maps hold it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HeldPod {
    /// The UID that it was enrolled with.
    pub uid: String,
    /// Its numbers.
    pub slot: PodSlot,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// This process has enrolled it; otherwise a former one did, and its listeners are gone.
    pub served: bool,
}

/// What the kernel knows about a connection that it gave to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The destination as the application dialled it.
    pub dialled: SocketAddr,
    /// The endpoint that the kernel chose when that was a service; the agent keeps it.
    pub chosen: Option<SocketAddr>,
}

/// A live connection on the direct path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct DirectFlow {
    /// The client's end.
    pub src: SocketAddr,
    /// The server's end.
    pub dst: SocketAddr,
    /// What the application dialled, when that was a service.
    pub dialled: Option<SocketAddr>,
    /// The calling pod.
    pub src_pod: PodSlot,
    /// The called pod.
    pub dst_pod: PodSlot,
    /// Both ends have finished the handshake.
    pub established: bool,
    /// The policy generation that permitted it.
    pub generation: u64,
    /// When its SYN was sent, nanoseconds of the monotonic clock.
    pub opened_ns: u64,
    /// Cookie of the client's socket.
    pub socket: u64,
    /// Cookie of the accepted socket, once there is one.
    pub server_socket: Option<u64>,
}

/// A connection of a pod that was open before the pod was captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Unseen {
    /// The pod's end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// Cookie of the pod's socket.
    pub cookie: u64,
    /// The pod accepted it; otherwise it dialled.
    pub accepted: bool,
}

/// What the maps should hold, apart from pods: the result of [`super::lower::lower`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelState {
    /// VIP and port → how to choose.
    pub services: BTreeMap<SocketAddr, ServiceState>,
    /// (calling pod, called pod, port; 0 is any other port) → verdict; no entry: the agent decides.
    pub verdicts: BTreeMap<(u32, u32, u16), PairVerdict>,
    /// (pod, port) that the kubelet may reach without the mesh.
    pub probes: BTreeSet<(u32, u16)>,
    /// No direct path at all.
    pub no_direct: bool,
}

/// How the kernel chooses for one service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServiceState {
    /// The agent chooses.
    Agent,
    /// By weight among these; none is right too, then the agent answers.
    Endpoints(Arc<[(SocketAddr, u32)]>),
}

/// What policy says about a pair of local pods and a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PairVerdict {
    /// Permitted, directly.
    Allow,
    /// Refused at connect.
    Deny,
    /// The agent decides: an exception to what any other port has.
    Agent,
}

/// What a [`super::Kernel::sync`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SyncReport {
    /// The policy generation now in force.
    pub generation: u64,
    /// Entries written.
    pub written: usize,
    /// Entries removed.
    pub removed: usize,
    /// Direct flows that were cut.
    pub cut: Vec<DirectFlow>,
}

/// Counters of the programs and the fill of the maps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// By reason; see [`Reason::text`].
    pub reasons: BTreeMap<&'static str, u64>,
    /// Entries and capacity of each map that can fill.
    pub maps: BTreeMap<&'static str, MapFill>,
}

impl Counters {
    /// One counter.
    pub fn get(&self, reason: Reason) -> u64 {
        self.reasons.get(reason.name()).copied().unwrap_or_default()
    }
}

/// How full a map is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MapFill {
    /// Entries now.
    pub entries: u64,
    /// Most that fit.
    pub capacity: u32,
}

/// Something that a program tells.
#[derive(Clone, Debug, PartialEq)]
pub enum KernelEvent {
    /// A direct flow reached its application.
    DirectOpened(DirectFlow),
    /// A direct flow ended.
    DirectClosed {
        /// Which.
        flow: DirectFlow,
        /// Bytes of the application from client to server that were acknowledged.
        sent_bytes: u64,
        /// Bytes of the application from server to client.
        received_bytes: u64,
        /// Smoothed round-trip time, microseconds.
        rtt_us: u32,
        /// Segments that the client sent again.
        retransmits: u32,
    },
    /// The kernel refused a connection of a pod.
    Refused {
        /// Why, for people and metrics.
        reason: Reason,
        /// Its flag.
        flag: Flag,
        /// The calling pod.
        src_pod: PodSlot,
        /// The called pod, where known (0 is none).
        dst_pod: u32,
        /// The client's end; the port is 0 when refused before one was chosen.
        src: SocketAddr,
        /// The destination, after translation.
        dst: SocketAddr,
        /// What the application dialled.
        dialled: Option<SocketAddr>,
    },
    /// A connection that reached an application without right was cut.
    Cut {
        /// Why.
        reason: Reason,
        /// Cookie of the namespace of the socket that accepted it.
        netns: u64,
        /// The client's end as it claimed.
        src: SocketAddr,
        /// The application's end.
        dst: SocketAddr,
    },
}

/// What the kernel can do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProbeReport {
    /// Release string of the kernel.
    pub kernel: String,
    /// The cgroup v2 root.
    pub cgroup: PathBuf,
    /// bpffs.
    pub bpffs: PathBuf,
    /// Each feature, in the order of the report.
    pub features: Vec<Feature>,
    /// Pinned programs of a former process go on.
    pub reused: bool,
}

/// One feature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Feature {
    /// What.
    pub name: &'static str,
    /// Found.
    pub found: bool,
    /// The agent cannot start without it.
    pub required: bool,
    /// What it is for.
    pub purpose: &'static str,
}

impl ProbeReport {
    /// True when that feature was found.
    pub fn has(&self, name: &str) -> bool {
        self.features.iter().any(|feature| feature.name == name && feature.found)
    }
}

/// Why the kernel's side failed. Each text is one line that an operator can act on.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A feature that is needed is not there.
    #[error("this kernel lacks {what}: Linux 5.15 or later with cgroup v2 and BPF is needed")]
    Unsupported {
        /// The feature.
        what: &'static str,
    },
    /// There is no cgroup v2 hierarchy.
    #[error("no cgroup v2 root is mounted (looked in /proc/self/mountinfo): mount one or pass --cgroup")]
    NoCgroup,
    /// What was given is not the root of a cgroup v2 hierarchy.
    #[error("--cgroup {}: {why}; give the host's /sys/fs/cgroup", path.display())]
    NotCgroupRoot {
        /// What was given.
        path: PathBuf,
        /// What it is.
        why: String,
    },
    /// bpffs is missing and cannot be mounted.
    #[error("{path} is no bpffs and cannot be mounted: {source}")]
    NoBpffs {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another agent of this node name runs.
    #[error("another agent of node {node} runs and holds {path}")]
    Busy {
        /// The node.
        node: String,
        /// Its directory.
        path: PathBuf,
    },
    /// A map is full.
    #[error("the kernel map {map} is full ({capacity} entries)")]
    MapFull {
        /// Which.
        map: &'static str,
        /// Its size.
        capacity: u32,
    },
    /// A pod is not as it must be.
    #[error("pod {uid}: {why}")]
    BadPod {
        /// Which.
        uid: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The programs could not be loaded or attached.
    #[error("{what}: {why}")]
    Program {
        /// What was tried.
        what: String,
        /// The kernel's answer.
        why: String,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl KernelError {
    /// The stable code.
    pub fn flag(&self) -> Flag {
        match self {
            Self::MapFull { .. } => Flag::MapFull,
            Self::BadPod { .. } => Flag::IllegalSource,
            _ => Flag::KernelFault,
        }
    }

    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// Names of the maps that can fill, with their capacity.
pub(super) const FILLABLE: [(&str, u32); 8] = [
    ("PODS", map::MAX_PODS),
    ("LOCAL", map::MAX_ADDRESSES),
    ("SERVICES", map::MAX_SERVICES),
    ("ENDPOINTS", map::MAX_ENDPOINTS),
    ("VERDICTS", map::MAX_VERDICTS),
    ("PROBES", map::MAX_PROBES),
    ("FLOWS", map::MAX_FLOWS),
    ("OWN_FLOWS", map::MAX_OWN_FLOWS),
];

/// The flag of a kernel reason that refuses.
pub fn flag_of(reason: Reason) -> Flag {
    match reason {
        Reason::PolicyDenied => Flag::PolicyDenied,
        Reason::IllegalPort | Reason::LookupIllegalPort => Flag::IllegalPort,
        Reason::UnsupportedSocket => Flag::UnsupportedSocket,
        Reason::IllegalSource | Reason::OpenedForged => Flag::IllegalSource,
        Reason::StaleGeneration | Reason::OpenedStale | Reason::LookupStale => Flag::StaleGeneration,
        Reason::MapFull => Flag::MapFull,
        Reason::PodQuota => Flag::PodQuota,
        Reason::AgentAbsent => Flag::Drain,
        Reason::Undecided
        | Reason::DestinationChanged
        | Reason::OpenedUnrecorded
        | Reason::LookupNoRecord
        | Reason::LookupSelfUnrecorded
        | Reason::LookupRefused => Flag::NoFlowRecord,
        _ => Flag::KernelFault,
    }
}
