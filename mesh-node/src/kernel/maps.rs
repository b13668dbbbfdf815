//! Handles to the pinned maps, typed as `mesh-ebpf-common` declares them. Every write of the agent goes through here.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf, SkStorage, SockMap},
};
use mesh_ebpf_common::{
    map::{
        Config, Endpoint, EndpointKey, FlowKey, FlowRecord, LocalPod, PodEntry, ProbeKey, Probed, Service,
        ServiceKey, Usage, VerdictEntry, VerdictKey,
    },
    reason::Reason,
    wire::Ip,
};
use parking_lot::Mutex;

use super::{
    sys,
    types::{FILLABLE, KernelError},
};

/// A hash map. Calls are single system calls; the lock only satisfies the library, which wants a unique reference.
pub struct Table<K: Pod, V: Pod> {
    name: &'static str,
    map: Mutex<HashMap<MapData, K, V>>,
    /// The same map, for what the library does not offer.
    fd: OwnedFd,
}

impl<K: Pod, V: Pod> Table<K, V> {
    fn open(directory: &Path, name: &'static str) -> Result<Self, KernelError> {
        let map = HashMap::try_from(open(directory, name)?).map_err(fault(name))?;
        let fd = sys::object(&directory.join(name))
            .map_err(KernelError::io(format!("open the kernel map {name}")))?;
        Ok(Self { name, map: Mutex::new(map), fd })
    }

    /// The value of a key.
    pub fn get(&self, key: &K) -> Result<Option<V>, KernelError> {
        match self.map.lock().get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(fault(self.name)(error)),
        }
    }

    /// Writes one entry.
    pub fn set(&self, key: &K, value: &V) -> Result<(), KernelError> {
        self.map.lock().insert(key, value, 0).map_err(|error| match errno(&error) {
            Some(libc::E2BIG) => KernelError::MapFull { map: self.name, capacity: self.capacity() },
            _ => fault(self.name)(error),
        })
    }

    /// Removes one entry, if it is there.
    pub fn remove(&self, key: &K) -> Result<(), KernelError> {
        match self.map.lock().remove(key) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(error) if errno(&error) == Some(libc::ENOENT) => Ok(()),
            Err(error) => Err(fault(self.name)(error)),
        }
    }

    /// Every entry.
    pub fn entries(&self) -> Result<Vec<(K, V)>, KernelError> {
        sys::entries(self.fd.as_fd()).map_err(KernelError::io(format!("read the kernel map {}", self.name)))
    }

    fn capacity(&self) -> u32 {
        FILLABLE.iter().find(|(name, _)| *name == self.name).map_or(0, |(_, capacity)| *capacity)
    }
}

/// All maps of one agent.
pub struct Maps {
    pub pods: Table<u64, PodEntry>,
    pub local: Table<Ip, LocalPod>,
    pub services: Table<ServiceKey, Service>,
    pub endpoints: Table<EndpointKey, Endpoint>,
    pub verdicts: Table<VerdictKey, VerdictEntry>,
    pub probes: Table<ProbeKey, Probed>,
    pub usage: Table<u32, Usage>,
    pub flows: Table<FlowKey, FlowRecord>,
    pub own_flows: Table<FlowKey, FlowRecord>,
    pub config: Mutex<Array<MapData, Config>>,
    pub listeners: Mutex<SockMap<MapData>>,
    pub ours: Mutex<SkStorage<MapData, u32>>,
    counters: PerCpuArray<MapData, u64>,
}

impl Maps {
    /// Opens every map that is pinned in `directory`.
    pub fn open(directory: &Path) -> Result<Self, KernelError> {
        Ok(Self {
            pods: Table::open(directory, "PODS")?,
            local: Table::open(directory, "LOCAL")?,
            services: Table::open(directory, "SERVICES")?,
            endpoints: Table::open(directory, "ENDPOINTS")?,
            verdicts: Table::open(directory, "VERDICTS")?,
            probes: Table::open(directory, "PROBES")?,
            usage: Table::open(directory, "USAGE")?,
            flows: Table::open(directory, "FLOWS")?,
            own_flows: Table::open(directory, "OWN_FLOWS")?,
            config: Mutex::new(Array::try_from(open(directory, "CONFIG")?).map_err(fault("CONFIG"))?),
            listeners: Mutex::new(
                SockMap::try_from(open(directory, "LISTENERS")?).map_err(fault("LISTENERS"))?,
            ),
            ours: Mutex::new(SkStorage::try_from(open(directory, "OURS")?).map_err(fault("OURS"))?),
            counters: PerCpuArray::try_from(open(directory, "COUNTERS")?).map_err(fault("COUNTERS"))?,
        })
    }

    /// The configuration.
    pub fn config(&self) -> Result<Config, KernelError> {
        self.config.lock().get(&0, 0).map_err(fault("CONFIG"))
    }

    /// Changes the configuration; the agent is its only writer.
    pub fn configure(&self, change: impl FnOnce(&mut Config)) -> Result<Config, KernelError> {
        let mut map = self.config.lock();
        let mut config = map.get(&0, 0).map_err(fault("CONFIG"))?;
        change(&mut config);
        map.set(0, config, 0).map_err(fault("CONFIG"))?;
        Ok(config)
    }

    /// One counter, all CPUs together.
    pub fn counter(&self, reason: Reason) -> Result<u64, KernelError> {
        let values = self.counters.get(&(reason as u32), 0).map_err(fault("COUNTERS"))?;
        Ok(values.iter().sum())
    }

    /// The ring buffer of events.
    pub fn events(directory: &Path) -> Result<RingBuf<MapData>, KernelError> {
        RingBuf::try_from(open(directory, "EVENTS")?).map_err(fault("EVENTS"))
    }
}

fn open(directory: &Path, name: &'static str) -> Result<Map, KernelError> {
    let data = MapData::from_pin(directory.join(name)).map_err(fault(name))?;
    Map::from_map_data(data).map_err(fault(name))
}

pub(super) fn fault(name: &'static str) -> impl Fn(MapError) -> KernelError {
    move |error| KernelError::Program { what: format!("kernel map {name}"), why: chain(&error) }
}

/// The number of the system error behind a map error.
fn errno(error: &MapError) -> Option<i32> {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(at) = cause {
        if let Some(io) = at.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        cause = at.source();
    }
    None
}

/// An error and its causes in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(at) = cause {
        let more = at.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = at.source();
    }
    // A verifier's log ends with what it refuses.
    let text = text.replace('\n', " ");
    match text.char_indices().nth_back(MOST_TEXT) {
        Some((from, _)) => format!("{}… {}", &text[..text.floor_char_boundary(120).min(from)], &text[from..]),
        None => text,
    }
}

/// Characters of an error's text that are kept.
const MOST_TEXT: usize = 600;
