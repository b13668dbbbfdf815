//! Pods in and out of the maps. A pod's entry goes in first and out last, capture goes on last and off first: at no
//! moment is a pod captured without a listener, or served by the application without a decision.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, TcpListener},
    ops::RangeInclusive,
    os::fd::{AsFd as _, AsRawFd as _},
};

use mesh_ebpf_common::{
    is_agent_port,
    map::{
        FLOW_DIRECT, LocalPod, MAX_PODS, POD_CAPTURE, PodEntry, SLOT_HBONE, SLOT_OUTBOUND, SLOT_PLAINTEXT,
        SLOTS_PER_POD, Usage,
    },
    wire::Ip,
};

use super::{
    Inner,
    destroy::{Diag, TcpSocket},
    direct, load,
    maps::fault,
    sys,
    types::{DirectFlow, HeldPod, KernelError, PodIdentity, PodListeners, PodSlot, Release, Unseen},
};

/// The pods of this process, by the cookie of their namespace: what ends sockets there. It keeps the namespace alive
/// until the pod is released.
pub type Served = BTreeMap<u64, Diag>;

/// Ends both sockets of a direct flow. False when there was none any more.
pub fn end(served: &Served, flow: &DirectFlow) -> Result<bool, KernelError> {
    let (mut ended, mut refused) = (false, None);
    // The server first: it must not get another byte.
    let ends = [
        (flow.dst_pod.netns, flow.dst, flow.src, flow.server_socket),
        (flow.src_pod.netns, flow.src, flow.dst, Some(flow.socket)),
    ];
    for (netns, local, remote, cookie) in ends {
        let (Some(diag), Some(cookie)) = (served.get(&netns), cookie) else { continue };
        match diag.end(local, remote, cookie) {
            Ok(one) => ended |= one,
            // The other end may let itself be ended.
            Err(error) => refused = Some(KernelError::io(format!("end {local} - {remote}"))(error)),
        }
    }
    refused.map_or(Ok(ended), Err)
}

impl Inner {
    pub fn enrol(&self, pod: &PodIdentity, listeners: &PodListeners<'_>) -> Result<PodSlot, KernelError> {
        let bad = |why| KernelError::BadPod { uid: pod.uid.clone(), why };
        check(pod).map_err(bad)?;
        let mut served = self.pods.lock();
        let diag = Diag::open(&pod.netns)
            .map_err(KernelError::io(format!("enter the namespace of pod {}", pod.uid)))?;
        let netns = diag.netns();
        for (_, listener) in slots(listeners) {
            let cookie =
                sys::netns_cookie(listener.as_fd()).map_err(KernelError::io("ask for a namespace"))?;
            if cookie != netns {
                return Err(bad("a listener is in another network namespace"));
            }
        }
        let known = match self.maps.pods.get(&netns)? {
            Some(entry) if uid(&entry) == pod.uid => Some(entry),
            Some(entry) => {
                self.forget(PodSlot { netns, id: entry.id }, Release::Deleted, &mut served)?;
                None
            }
            None => None,
        };
        let entry = match known {
            Some(entry) => entry,
            None => self.new_entry(pod)?,
        };
        let slot = PodSlot { netns, id: entry.id };
        served.insert(netns, diag);
        let result = self.put_in_force(pod, listeners, netns, &entry);
        if result.is_err() && known.is_none() {
            let _ = self.forget(slot, Release::Deleted, &mut served);
        }
        result.map(|()| slot)
    }

    fn put_in_force(
        &self,
        pod: &PodIdentity,
        listeners: &PodListeners<'_>,
        netns: u64,
        entry: &PodEntry,
    ) -> Result<(), KernelError> {
        for (slot, listener) in slots(listeners) {
            // Inherited by what it accepts: the programs know the agent's connections from the application's.
            self.maps.ours.lock().insert(&listener.as_raw_fd(), 1, 0).map_err(fault("OURS"))?;
            self.maps.listeners.lock().set(entry.slot + slot, listener, 0).map_err(fault("LISTENERS"))?;
        }
        // An entry that is there is being counted in.
        if self.maps.usage.get(&entry.id)?.is_none() {
            self.maps.usage.set(&entry.id, &Usage(0))?;
        }
        self.maps.pods.set(&netns, entry)?;
        self.give_addresses(&pod.ips, netns, entry.id)?;
        load_inbound(self, netns, entry.slot, pod)?;
        self.maps.pods.set(&netns, &PodEntry { flags: entry.flags | POD_CAPTURE, ..*entry })
    }

    /// The pod has these addresses from now on. It stays captured all the while.
    pub fn readdress(&self, pod: PodSlot, ips: &[IpAddr]) -> Result<(), KernelError> {
        let _served = self.pods.lock();
        let Some(entry) = self.maps.pods.get(&pod.netns)?.filter(|entry| entry.id == pod.id) else {
            return Ok(());
        };
        usable(ips).map_err(|why| KernelError::BadPod { uid: uid(&entry), why })?;
        self.give_addresses(ips, pod.netns, pod.id)
    }

    /// An address that another pod had is taken from it, and one that this pod has no more is taken from this one; with
    /// it goes everything that was permitted by it.
    fn give_addresses(&self, ips: &[IpAddr], netns: u64, id: u32) -> Result<(), KernelError> {
        let wanted: Vec<Ip> = ips.iter().map(|ip| Ip::from(*ip)).collect();
        let held = self.maps.local.entries()?;
        for ip in &wanted {
            self.maps.local.set(ip, &LocalPod { netns, pod: id, pad: 0 })?;
        }
        let mut taken = false;
        for (ip, local) in held {
            let (ours, stays) = (local.netns == netns, wanted.contains(&ip));
            if ours && !stays {
                self.maps.local.remove(&ip)?;
            }
            taken |= ours != stays;
        }
        if taken {
            self.raise_generation()?;
        }
        Ok(())
    }

    fn new_entry(&self, pod: &PodIdentity) -> Result<PodEntry, KernelError> {
        let used: Vec<u32> =
            self.maps.pods.entries()?.iter().map(|(_, entry)| entry.slot / SLOTS_PER_POD).collect();
        let free = (0..MAX_PODS).find(|place| !used.contains(place));
        let place = free.ok_or(KernelError::MapFull { map: "PODS", capacity: MAX_PODS })?;
        let id = self.maps.config()?.next_pod;
        self.maps.configure(|config| config.next_pod += 1)?;
        let mut uid = [0; 64];
        uid[..pod.uid.len()].copy_from_slice(pod.uid.as_bytes());
        Ok(PodEntry { id, slot: place * SLOTS_PER_POD, flags: 0, uid_bytes: pod.uid.len() as u32, uid })
    }

    pub fn release(&self, pod: PodSlot, how: Release) -> Result<(), KernelError> {
        let mut served = self.pods.lock();
        self.forget(pod, how, &mut served)
    }

    fn forget(&self, pod: PodSlot, how: Release, served: &mut Served) -> Result<(), KernelError> {
        let Some(entry) = self.maps.pods.get(&pod.netns)?.filter(|entry| entry.id == pod.id) else {
            return Ok(());
        };
        self.maps.pods.set(&pod.netns, &PodEntry { flags: 0, ..entry })?;
        let link = load::inbound_link(pod.netns);
        if how == Release::Leave {
            // From here on its application is reached as before it was enrolled.
            self.pins.remove_link(&link)?;
        }
        for (ip, local) in self.maps.local.entries()? {
            if local.netns == pod.netns {
                self.maps.local.remove(&ip)?;
            }
        }
        self.forget_verdicts(pod.id)?;
        self.forget_probes(pod.id)?;
        self.raise_generation()?;
        self.end_flows(pod.netns, how, served)?;
        self.pins.remove_link(&link)?;
        for slot in 0..SLOTS_PER_POD {
            // An empty slot is an error of the library's, not ours.
            let _ = self.maps.listeners.lock().clear_index(&(entry.slot + slot));
        }
        served.remove(&pod.netns);
        self.maps.usage.remove(&pod.id)?;
        self.maps.pods.remove(&pod.netns)
    }

    /// Records must not outlive the address of a pod that is gone; those of one that leaves end with their sockets.
    fn end_flows(&self, netns: u64, how: Release, served: &Served) -> Result<(), KernelError> {
        if how == Release::Leave {
            return Ok(());
        }
        for (key, record) in self.maps.flows.entries()? {
            if key.netns != netns && record.client_netns != netns {
                continue;
            }
            if record.kind == FLOW_DIRECT {
                // A namespace may be going; the record goes anyway.
                let _ = end(served, &direct(&record));
            }
            self.maps.flows.remove(&key)?;
        }
        for (key, _) in self.maps.own_flows.entries()? {
            if key.netns == netns {
                self.maps.own_flows.remove(&key)?;
            }
        }
        Ok(())
    }

    /// See [`super::Kernel::unseen`].
    pub fn unseen(&self, pod: PodSlot) -> Result<Vec<Unseen>, KernelError> {
        // The list first: whatever of it was captured has its record by then.
        let (sockets, ephemeral) = {
            let served = self.pods.lock();
            let Some(diag) = served.get(&pod.netns) else { return Ok(Vec::new()) };
            let sockets = diag.sockets().map_err(KernelError::io("list the sockets of a pod"))?;
            (sockets, diag.ephemeral().clone())
        };
        let (flows, own) = (self.maps.flows.entries()?, self.maps.own_flows.entries()?);
        let recorded: BTreeSet<u64> =
            flows.iter().chain(&own).flat_map(|(_, record)| [record.socket, record.server_socket]).collect();
        let addresses: BTreeSet<Ip> = self
            .maps
            .local
            .entries()?
            .into_iter()
            .filter_map(|(ip, local)| (local.netns == pod.netns).then_some(ip))
            .collect();
        let own = |ip: IpAddr| ip.is_loopback() || addresses.contains(&Ip::from(ip));
        let listening: BTreeSet<u16> =
            sockets.iter().filter(|socket| socket.listening).map(|socket| socket.local.port()).collect();
        let unseen = |socket: &TcpSocket| {
            !socket.listening
                // The agent's sockets have other ends, or a record.
                && own(socket.local.ip())
                && !own(socket.remote.ip())
                && !is_agent_port(socket.local.port())
                && !recorded.contains(&socket.cookie)
        };
        let told = |socket: TcpSocket| Unseen {
            local: socket.local,
            remote: socket.remote,
            cookie: socket.cookie,
            accepted: listening.contains(&socket.local.port()) || !has_dialled(&socket, &ephemeral),
        };
        Ok(sockets.into_iter().filter(unseen).map(told).collect())
    }

    pub fn held_pods(&self) -> Result<Vec<HeldPod>, KernelError> {
        let served = self.pods.lock();
        let addresses = self.maps.local.entries()?;
        let held = self.maps.pods.entries()?.into_iter().map(|(netns, entry)| {
            let ips = addresses.iter().filter(|(_, local)| local.netns == netns).map(|(ip, _)| ip.to_ip());
            HeldPod {
                uid: uid(&entry),
                slot: PodSlot { netns, id: entry.id },
                ips: ips.collect(),
                served: served.contains_key(&netns),
            }
        });
        Ok(held.collect())
    }

    /// Links whose pod is in no map: a process ended between the two.
    pub fn remove_stale_links(&self) -> Result<(), KernelError> {
        for name in self.pins.links()? {
            let Some(netns) = name.strip_prefix("inbound-").and_then(|text| text.parse().ok()) else {
                continue;
            };
            if self.maps.pods.get(&netns)?.is_none() {
                self.pins.remove_link(&name)?;
            }
        }
        Ok(())
    }
}

/// (pure) Whether a connection was certainly dialled from its own end, when nothing listens there any more: its port is
/// one that the kernel gives to clients, and the other end's is not. What may have been accepted counts as accepted, or
/// a server that closes its listener would keep plaintext connections under STRICT.
fn has_dialled(socket: &TcpSocket, ephemeral: &RangeInclusive<u16>) -> bool {
    ephemeral.contains(&socket.local.port()) && !ephemeral.contains(&socket.remote.port())
}

/// The program of a pod stays when it is the same object; [`super::Kernel::open`] has replaced it otherwise.
fn load_inbound(inner: &Inner, netns: u64, slot: u32, pod: &PodIdentity) -> Result<(), KernelError> {
    if inner.pins.link(&load::inbound_link(netns)).exists() {
        return Ok(());
    }
    load::attach_inbound(&inner.pins, inner.object, netns, slot, Some(&pod.netns))
}

fn slots<'a>(listeners: &PodListeners<'a>) -> impl Iterator<Item = (u32, &'a TcpListener)> {
    let all = [
        (SLOT_OUTBOUND, Some(listeners.outbound_v4)),
        (SLOT_OUTBOUND + 1, listeners.outbound_v6),
        (SLOT_PLAINTEXT, Some(listeners.plaintext_v4)),
        (SLOT_PLAINTEXT + 1, listeners.plaintext_v6),
        (SLOT_HBONE, Some(listeners.hbone_v4)),
        (SLOT_HBONE + 1, listeners.hbone_v6),
    ];
    all.into_iter().filter_map(|(slot, listener)| Some((slot, listener?)))
}

fn check(pod: &PodIdentity) -> Result<(), &'static str> {
    if pod.uid.is_empty() || pod.uid.len() > 64 {
        return Err("its UID must have 1 to 64 bytes");
    }
    usable(&pod.ips)
}

fn usable(ips: &[IpAddr]) -> Result<(), &'static str> {
    let usable = |ip: &IpAddr| !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast();
    match () {
        () if ips.is_empty() => Err("it has no address"),
        () if ips.len() > 16 => Err("it has more than 16 addresses"),
        () if !ips.iter().all(usable) => Err("an address is a loopback, unspecified or multicast one"),
        () => Ok(()),
    }
}

fn uid(entry: &PodEntry) -> String {
    let bytes = entry.uid.get(..entry.uid_bytes as usize).unwrap_or(&entry.uid);
    String::from_utf8_lossy(bytes).into_owned()
}
