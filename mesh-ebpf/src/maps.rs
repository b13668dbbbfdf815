//! Every map, under the name that the pin, the agent and the metrics use, and the accesses that more than one program
//! needs.

use core::{
    ffi::c_void,
    intrinsics::{AtomicOrdering, atomic_xadd},
};

use aya_ebpf::{
    Global,
    bindings::{
        BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, BPF_TCP_LISTEN,
        bpf_map_type::BPF_MAP_TYPE_SK_STORAGE, bpf_sock,
    },
    btf_maps::SkStorage,
    helpers::{
        bpf_get_prandom_u32, bpf_map_lookup_elem, bpf_sk_release, bpf_sk_storage_delete, bpf_sk_storage_get,
    },
    macros::{btf_map, map},
    maps::{Array, HashMap, PerCpuArray, RingBuf, SockMap},
};
use mesh_ebpf_common::{
    event::Event,
    map::{
        Config, EVENT_BYTES, Endpoint, EndpointKey, FlowKey, FlowRecord, LocalPod, MAX_ADDRESSES,
        MAX_ENDPOINTS, MAX_FLOWS, MAX_OWN_FLOWS, MAX_PODS, MAX_PROBES, MAX_REASONS, MAX_SERVICES,
        MAX_VERDICTS, POD_CAPTURE, PodEntry, ProbeKey, Probed, SLOTS_PER_POD, Service, ServiceKey,
        SocketState, Usage, VerdictEntry, VerdictKey,
    },
    reason::Reason,
    verdict::World,
    wire::Ip,
};

#[map]
static PODS: HashMap<u64, PodEntry> = HashMap::with_max_entries(MAX_PODS, 0);
#[map]
static LOCAL: HashMap<Ip, LocalPod> = HashMap::with_max_entries(MAX_ADDRESSES, 0);
#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
static SERVICES: HashMap<ServiceKey, Service> = HashMap::with_max_entries(MAX_SERVICES, BPF_F_NO_PREALLOC);
#[map]
static ENDPOINTS: HashMap<EndpointKey, Endpoint> =
    HashMap::with_max_entries(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);
#[map]
static VERDICTS: HashMap<VerdictKey, VerdictEntry> =
    HashMap::with_max_entries(MAX_VERDICTS, BPF_F_NO_PREALLOC);
#[map]
static PROBES: HashMap<ProbeKey, Probed> = HashMap::with_max_entries(MAX_PROBES, BPF_F_NO_PREALLOC);
#[map]
static USAGE: HashMap<u32, Usage> = HashMap::with_max_entries(MAX_PODS, 0);
/// A plain hash: an evicted flow would hide from a cut by policy.
#[map]
pub static FLOWS: HashMap<FlowKey, FlowRecord> = HashMap::with_max_entries(MAX_FLOWS, BPF_F_NO_PREALLOC);
#[map]
pub static OWN_FLOWS: HashMap<FlowKey, FlowRecord> =
    HashMap::with_max_entries(MAX_OWN_FLOWS, BPF_F_NO_PREALLOC);
#[map]
pub static LISTENERS: SockMap = SockMap::with_max_entries(MAX_PODS * SLOTS_PER_POD, 0);
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(MAX_REASONS, 0);
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(EVENT_BYTES, 0);
#[btf_map]
static SOCKETS: SkStorage<SocketState> = SkStorage::new();

/// A socket storage whose value a listener hands down to what it accepts, which the one of aya-ebpf cannot say.
#[repr(C)]
pub struct InheritedStorage {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const u32,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: the fields only describe the map to the loader; nothing is behind them.
unsafe impl Sync for InheritedStorage {}

/// Sockets of the agent, marked by it through their descriptor: a pod cannot forge that, and it ends with the socket.
#[btf_map]
static OURS: InheritedStorage = InheritedStorage {
    r#type: core::ptr::null(),
    key: core::ptr::null(),
    value: core::ptr::null(),
    max_entries: core::ptr::null(),
    map_flags: core::ptr::null(),
};

/// `inbound` of one pod: cookie of its namespace.
#[unsafe(no_mangle)]
static POD_NETNS: Global<u64> = Global::new(0);
/// `inbound` of one pod: first slot of its listeners.
#[unsafe(no_mangle)]
static POD_SLOT: Global<u32> = Global::new(0);

/// The constants of this pod's `inbound`: cookie and first slot.
#[inline(always)]
pub fn this_pod() -> (u64, u32) {
    (POD_NETNS.load(), POD_SLOT.load())
}

/// The pod of this namespace; `None` when it is not enrolled.
#[inline(always)]
pub fn pod(netns: u64) -> Option<&'static PodEntry> {
    // SAFETY: the element may change while it is read; its numbers are never given twice, see `PodEntry`.
    unsafe { PODS.get(netns) }
}

/// The pod of this namespace, when its new connections are decided.
#[inline(always)]
pub fn capturing(netns: u64) -> Option<&'static PodEntry> {
    pod(netns).filter(|pod| pod.flags & POD_CAPTURE != 0)
}

/// Generation and flags.
#[inline(always)]
pub fn config() -> (u64, u32) {
    match CONFIG.get_ptr(0) {
        // SAFETY: an element of an array lives as long as the map. Volatile: the generation must be read before what
        // it vouches for, and not be read again later.
        Some(config) => unsafe {
            ((&raw const (*config).generation).read_volatile(), (&raw const (*config).flags).read_volatile())
        },
        None => (0, u32::MAX),
    }
}

/// Cookie of the node's own namespace and number of the kubelet's cgroup; zeros where no kubelet is known.
#[inline(always)]
pub fn kubelet() -> (u64, u64) {
    match CONFIG.get_ptr(0) {
        // SAFETY: as in `config`.
        Some(config) => unsafe {
            (
                (&raw const (*config).node_netns).read_volatile(),
                (&raw const (*config).kubelet).read_volatile(),
            )
        },
        None => (0, 0),
    }
}

/// True when this pod has as many live connections as one pod may have.
#[inline(always)]
pub fn exhausted(pod: u32) -> bool {
    let bound = match CONFIG.get_ptr(0) {
        // SAFETY: as in `config`.
        Some(config) => unsafe { (&raw const (*config).pod_flows).read_volatile() },
        None => return true,
    };
    let Some(usage) = USAGE.get_ptr(pod) else { return false };
    // SAFETY: an element of a preallocated map; another pod's count at worst, while this one is being released.
    bound != 0 && unsafe { (&raw const (*usage).0).read_volatile() } >= u64::from(bound)
}

/// Counts a live connection of this pod, or that it ended. False when the pod is not counted (any more).
#[inline(always)]
pub fn use_up(pod: u32, change: i64) -> bool {
    let Some(usage) = USAGE.get_ptr_mut(pod) else { return false };
    // SAFETY: eight aligned bytes that every program changes by atomic additions only. A number of a pod is never
    // given twice, and the count of a pod that is gone goes with it.
    unsafe {
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>((&raw mut (*usage).0).cast(), change as u64)
    };
    true
}

/// True for an address of the pod in this namespace, and for the loopback.
#[inline(always)]
pub fn is_self(ip: &Ip, netns: u64) -> bool {
    ip.is_loopback() || is_own_address(ip, netns)
}

/// True for an address of the pod in this namespace.
#[inline(always)]
pub fn is_own_address(ip: &Ip, netns: u64) -> bool {
    Maps.local(ip).is_some_and(|local| local.netns == netns)
}

/// Counts one way out.
#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: the element is this CPU's own and programs are not preempted by each other on it.
        unsafe { *counter += 1 };
    }
}

/// True when the agent listens at that slot.
#[inline(always)]
pub fn listening(slot: u32) -> bool {
    // SAFETY: the key is as wide as the map's; what is found is given back below.
    let found =
        unsafe { bpf_map_lookup_elem(pointer(&LISTENERS), (&raw const slot).cast()) }.cast::<bpf_sock>();
    if found.is_null() {
        return false;
    }
    // SAFETY: a socket that the verifier knows.
    unsafe {
        let state = (&raw const (*found).state).read_volatile();
        bpf_sk_release(found.cast());
        state == BPF_TCP_LISTEN
    }
}

/// Tells the agent; without room the loss is counted.
#[inline(always)]
pub fn emit(kind: u32, reason: Reason, record: &FlowRecord, figures: Figures) {
    let Some(mut entry) = EVENTS.reserve::<Event>(0) else {
        return count(Reason::EventLost);
    };
    let Figures { sent_bytes, received_bytes, rtt_us, retransmits } = figures;
    entry.write(Event {
        kind,
        reason: reason as u32,
        record: *record,
        sent_bytes,
        received_bytes,
        rtt_us,
        retransmits,
    });
    entry.submit(0);
}

/// What a socket has carried.
#[derive(Clone, Copy, Default)]
pub struct Figures {
    pub sent_bytes: u64,
    pub received_bytes: u64,
    pub rtt_us: u32,
    pub retransmits: u32,
}

/// A socket as the verifier knows it.
pub type Sock = *mut bpf_sock;

/// True for a socket of the agent.
#[inline(always)]
pub fn is_ours(sk: Sock) -> bool {
    // SAFETY: the verifier checks that `sk` is a socket.
    !unsafe { bpf_sk_storage_get(pointer(&OURS), sk.cast(), core::ptr::null_mut(), 0) }.is_null()
}

/// What connect decided for this socket.
#[inline(always)]
pub fn state(sk: Sock) -> Option<&'static mut SocketState> {
    // SAFETY: the value lives as long as the socket, which the running hook holds; hooks of one socket run one at a
    // time, under its lock.
    unsafe {
        bpf_sk_storage_get(pointer(&SOCKETS), sk.cast(), core::ptr::null_mut(), 0)
            .cast::<SocketState>()
            .as_mut()
    }
}

/// The same, made when absent; `None` when the kernel has no memory.
#[inline(always)]
pub fn state_or_new(sk: Sock) -> Option<&'static mut SocketState> {
    let flags = u64::from(BPF_SK_STORAGE_GET_F_CREATE);
    // SAFETY: as in `state`; a new value is all zero.
    unsafe {
        bpf_sk_storage_get(pointer(&SOCKETS), sk.cast(), core::ptr::null_mut(), flags)
            .cast::<SocketState>()
            .as_mut()
    }
}

/// Forgets what connect decided for this socket.
#[inline(always)]
pub fn forget(sk: Sock) {
    // SAFETY: the verifier checks that `sk` is a socket; there may be nothing to delete.
    unsafe { bpf_sk_storage_delete(pointer(&SOCKETS), sk.cast()) };
}

#[inline(always)]
fn pointer<T>(map: &'static T) -> *mut c_void {
    core::ptr::from_ref(map).cast_mut().cast()
}

/// The maps as `decide` asks for them.
pub struct Maps;

impl World for Maps {
    #[inline(always)]
    fn service(&self, key: &ServiceKey) -> Option<&Service> {
        // SAFETY: a list is never changed in place, see `Service::id`.
        unsafe { SERVICES.get(key) }
    }
    #[inline(always)]
    fn endpoint(&self, key: &EndpointKey) -> Option<&Endpoint> {
        // SAFETY: as above; a wrong endpoint is still judged by its own verdict.
        unsafe { ENDPOINTS.get(key) }
    }
    #[inline(always)]
    fn local(&self, ip: &Ip) -> Option<&LocalPod> {
        // SAFETY: changes of an address raise the generation, which is checked before the SYN and at its arrival.
        unsafe { LOCAL.get(ip) }
    }
    #[inline(always)]
    fn verdict(&self, key: &VerdictKey) -> Option<&VerdictEntry> {
        // SAFETY: `decide` compares the key that the value repeats.
        unsafe { VERDICTS.get(key) }
    }
    #[inline(always)]
    fn probed(&self, key: &ProbeKey) -> bool {
        PROBES.get_ptr(key).is_some()
    }
    #[inline(always)]
    fn chance(&self) -> u32 {
        // SAFETY: no preconditions.
        unsafe { bpf_get_prandom_u32() }
    }
}
