//! What the kernel holds for this node: programs, maps and pins, and the only code that writes them.
//!
//! Start: [`Kernel::open`]. A pod: [`Kernel::enrol`] … [`Kernel::release`]. Policy: [`lower::lower`] tells what the
//! maps should hold, [`Kernel::sync`] writes the difference and cuts what is no longer allowed.
//!
//! The maps can be deleted and made again from a snapshot and the pods; only live flows are stored nowhere else.

mod destroy;
mod events;
mod load;
mod log;
pub mod lower;
mod maps;
mod pins;
mod pods;
mod probe;
mod sync;
mod sys;
mod types;

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::BorrowedFd,
    path::Path,
    sync::Arc,
};

use mesh_ebpf_common::{
    map::{FLOW_DIRECT, FLOW_ESTABLISHED, FLOW_OTHER, FLOW_TO_AGENT, FlowKey, FlowRecord},
    reason::Reason,
    wire::Target,
};
use parking_lot::Mutex;

pub use destroy::TcpSocket;
pub use events::Events;
pub use pins::{CleanWhat, clean};
pub use probe::{FWMARK_ACCEPT, SOCK_DESTROY};
pub use sys::{monotonic_ns, netns_cookie};
pub use types::*;

use maps::{Maps, fault};

/// The kernel's side of one node agent. Cheap to clone; every method may be called from any thread.
#[derive(Clone)]
pub struct Kernel {
    inner: Arc<Inner>,
}

struct Inner {
    pins: pins::Pins,
    maps: Maps,
    /// The pods of this process. Held while one is enrolled or released.
    pods: Mutex<pods::Served>,
    /// What the maps hold. Held while they are brought to something else.
    held: Mutex<sync::Held>,
    can_destroy: bool,
    /// What is loaded for each pod.
    object: &'static [u8],
    /// Its programs log.
    logs: bool,
}

/// Looks at what the kernel offers without changing anything but mounting bpffs.
///
/// # Errors
/// When cgroup v2 or bpffs is missing.
pub fn probe(config: &KernelConfig) -> Result<ProbeReport, KernelError> {
    probe::probe(config)
}

impl Kernel {
    /// Probes the kernel, loads the programs or takes over the pinned ones, and attaches them at the cgroup root.
    ///
    /// # Errors
    /// One line that says what is missing.
    pub fn open(config: &KernelConfig) -> Result<(Self, ProbeReport), KernelError> {
        let mut report = probe::probe(config)?;
        if let Some(what) = probe::missing(&report) {
            return Err(KernelError::Unsupported { what });
        }
        let pins = pins::Pins::own(&config.bpffs, &config.node)?;
        let (object, logs) = load::object(config.log);
        load::make_maps(&pins, object)?;
        let maps = Maps::open(&pins.maps())?;
        let hash = load::object_hash(object);
        let complete = load::CGROUP_PROGRAMS.iter().all(|name| pins.link(name).exists());
        report.reused = complete && maps.config()?.object == hash;
        if !report.reused {
            load::attach_cgroup(&pins, object, &report.cgroup)?;
            for (netns, pod) in maps.pods.entries()? {
                load::attach_inbound(&pins, object, netns, pod.slot, None)?;
            }
        }
        let pod_flows = config.pod_flows;
        maps.configure(|config| {
            config.object = hash;
            config.generation = config.generation.max(1);
            config.next_pod = config.next_pod.max(1);
            config.next_service = config.next_service.max(1);
            config.pod_flows = pod_flows;
        })?;
        let can_destroy = report.has(SOCK_DESTROY);
        let held = Mutex::new(sync::Held::read(&maps)?);
        let inner = Inner { pins, maps, pods: Mutex::default(), held, can_destroy, object, logs };
        let kernel = Self { inner: Arc::new(inner) };
        kernel.inner.remove_stale_links()?;
        Ok((kernel, report))
    }

    /// Puts a pod in force: listeners, then its addresses and its `sk_lookup` program, then capture. Enrolling a pod
    /// again (after a restart) replaces its listeners.
    ///
    /// # Errors
    /// When a map is full or the kernel refuses; nothing of a new pod is in force then.
    pub fn enrol(&self, pod: &PodIdentity, listeners: &PodListeners<'_>) -> Result<PodSlot, KernelError> {
        self.inner.enrol(pod, listeners)
    }

    /// Gives a pod other addresses while it stays captured; one that is not enrolled is no error.
    ///
    /// # Errors
    /// When an address cannot be a pod's, a map is full or the kernel refuses.
    pub fn readdress(&self, pod: PodSlot, ips: &[IpAddr]) -> Result<(), KernelError> {
        self.inner.readdress(pod, ips)
    }

    /// Takes a pod out of force, also one that a former process enrolled. A pod that is not enrolled is no error.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn release(&self, pod: PodSlot, how: Release) -> Result<(), KernelError> {
        self.inner.release(pod, how)
    }

    /// The pods that the maps hold, those of a former process included.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn pods(&self) -> Result<Vec<HeldPod>, KernelError> {
        self.inner.held_pods()
    }

    /// Marks a socket of the agent as its own, before it connects. The mark ends with the socket.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn exempt(&self, socket: BorrowedFd<'_>) -> Result<(), KernelError> {
        use std::os::fd::AsRawFd as _;
        self.inner.maps.ours.lock().insert(&socket.as_raw_fd(), 1, 0).map_err(fault("OURS"))
    }

    /// The record of a connection that the outbound listener of `pod` accepted from `src`, dialled to `dst`; `None`
    /// when there is none, and then the connection must be refused.
    pub fn flow(&self, pod: PodSlot, src: SocketAddr, dst: SocketAddr) -> Option<Flow> {
        let (from, to) = (Target::from(src), Target::from(dst));
        let (sport, dport) = (from.port, to.port);
        let key = FlowKey { netns: pod.netns, src: from.ip, dst: to.ip, sport, dport, pad: 0 };
        let record = self.inner.maps.flows.get(&key).ok().flatten()?;
        let chosen = (record.flags & FLOW_OTHER != 0).then(|| record.other.to_socket());
        (record.kind == FLOW_TO_AGENT && record.key == key).then(|| Flow { dialled: to.to_socket(), chosen })
    }

    /// Brings services, verdicts and options to `want`; raises the generation when a permission was taken away and
    /// cuts the direct flows that it had let through.
    ///
    /// # Errors
    /// When a map is full or the kernel refuses; what permits less has been written then.
    pub fn sync(&self, want: &KernelState) -> Result<SyncReport, KernelError> {
        self.inner.sync(want)
    }

    /// Live direct flows.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn direct_flows(&self) -> Result<Vec<DirectFlow>, KernelError> {
        let records = self.inner.maps.flows.entries()?;
        Ok(records
            .iter()
            .filter(|(_, record)| record.kind == FLOW_DIRECT)
            .map(|(_, record)| direct(record))
            .collect())
    }

    /// Ends both sockets of a direct flow at once. False when both had ended already.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn destroy(&self, flow: &DirectFlow) -> Result<bool, KernelError> {
        pods::end(&self.inner.pods.lock(), flow)
    }

    /// Connections of a pod that the programs have never seen: open since before the pod was captured. Calls to oneself
    /// are left out.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unseen(&self, pod: PodSlot) -> Result<Vec<Unseen>, KernelError> {
        self.inner.unseen(pod)
    }

    /// Ends one of them at once. False when it had ended already.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn end_unseen(&self, pod: PodSlot, unseen: &Unseen) -> Result<bool, KernelError> {
        let Unseen { local, remote, cookie, .. } = *unseen;
        let served = self.inner.pods.lock();
        let Some(diag) = served.get(&pod.netns) else { return Ok(false) };
        diag.end(local, remote, cookie).map_err(KernelError::io(format!("end {local} - {remote}")))
    }

    /// Counters by reason, since the maps were made, and the fill of the maps.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn counters(&self) -> Result<Counters, KernelError> {
        let mut counters = Counters::default();
        for reason in Reason::ALL {
            counters.reasons.insert(reason.name(), self.inner.maps.counter(*reason)?);
        }
        let maps = &self.inner.maps;
        for (name, capacity) in FILLABLE {
            let entries = match name {
                "PODS" => maps.pods.entries()?.len(),
                "LOCAL" => maps.local.entries()?.len(),
                "SERVICES" => maps.services.entries()?.len(),
                "ENDPOINTS" => maps.endpoints.entries()?.len(),
                "VERDICTS" => maps.verdicts.entries()?.len(),
                "PROBES" => maps.probes.entries()?.len(),
                "FLOWS" => maps.flows.entries()?.len(),
                _ => maps.own_flows.entries()?.len(),
            };
            counters.maps.insert(name, MapFill { entries: entries as u64, capacity });
        }
        Ok(counters)
    }

    /// The events of the programs. One reader at a time: two would share them out.
    ///
    /// # Errors
    /// When outside of a tokio runtime, or the kernel refuses.
    pub fn events(&self) -> Result<Events, KernelError> {
        let ring = Maps::events(&self.inner.pins.maps())?;
        Events::new(ring, self.inner.clone())
    }

    /// Tells the programs which processes are the kubelet's: those in the cgroup of this number, in the network namespace
    /// of this cookie. `None`: none are.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_kubelet(&self, kubelet: Option<Kubelet>) -> Result<(), KernelError> {
        let Kubelet { node_netns, cgroup } = kubelet.unwrap_or_default();
        self.inner
            .maps
            .configure(|config| (config.node_netns, config.kubelet) = (node_netns, cgroup))
            .map(drop)
    }

    /// Forwards the programs' log lines for ever; ends at once where the programs have none.
    ///
    /// # Errors
    /// When outside of a tokio runtime, or the kernel refuses.
    pub async fn forward_log(&self) -> Result<(), KernelError> {
        if self.inner.logs { log::forward(&self.inner.pins).await } else { Ok(()) }
    }

    /// The policy generation in force.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn generation(&self) -> Result<u64, KernelError> {
        Ok(self.inner.maps.config()?.generation)
    }

    /// True when direct flows can be cut; otherwise the direct path stays off whatever is wanted.
    pub fn can_destroy(&self) -> bool {
        self.inner.can_destroy
    }

    /// Where the maps are pinned.
    pub fn pinned_maps(&self) -> impl AsRef<Path> {
        self.inner.pins.maps()
    }
}

/// A record as the agent speaks of it.
fn direct(record: &FlowRecord) -> DirectFlow {
    let key = &record.key;
    DirectFlow {
        src: Target::new(key.src, key.sport).to_socket(),
        dst: Target::new(key.dst, key.dport).to_socket(),
        dialled: (record.flags & FLOW_OTHER != 0).then(|| record.other.to_socket()),
        src_pod: PodSlot { netns: record.client_netns, id: record.src_pod },
        dst_pod: PodSlot { netns: key.netns, id: record.dst_pod },
        established: record.flags & FLOW_ESTABLISHED != 0,
        generation: record.generation,
        opened_ns: record.opened_ns,
        socket: record.socket,
        server_socket: (record.server_socket != 0).then_some(record.server_socket),
    }
}
