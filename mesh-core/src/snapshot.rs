//! The world as one proxy sees it: immutable, indexed, cheap to clone. A new world is a new snapshot.
//!
//! Persistent maps: a change costs the entries that it touches, and readers of the old snapshot keep it.

use std::{
    collections::HashSet,
    hash::Hash,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use rpds::HashTrieMapSync;

use crate::{
    delta::{AddressName, Change},
    id::{PolicyKey, ServiceKey, WorkloadKey},
    model::{
        LocalPod, MeshOptions, NetworkMode, Policy, Scope, Service, TunnelProtocol, Visibility,
        WaypointConfig, WaypointRef, Workload,
    },
    proto,
};

/// Workloads that share a key of an index.
type Workloads = Arc<[Arc<Workload>]>;

/// A policy as this proxy knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicyState {
    /// Can be evaluated.
    Valid(Arc<Policy>),
    /// Arrived, and cannot be evaluated: denies where it applies.
    Invalid,
}

/// An immutable world.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    workloads: HashTrieMapSync<WorkloadKey, Arc<Workload>>,
    by_address: HashTrieMapSync<IpAddr, Workloads>,
    by_name: HashTrieMapSync<(Arc<str>, Arc<str>), Workloads>,
    by_service: HashTrieMapSync<ServiceKey, Workloads>,
    services: HashTrieMapSync<ServiceKey, Arc<Service>>,
    by_vip: HashTrieMapSync<IpAddr, Arc<[Arc<Service>]>>,
    by_front: HashTrieMapSync<SocketAddr, Arc<[Arc<Service>]>>,
    policies: HashTrieMapSync<PolicyKey, PolicyState>,
    /// Policies that apply without being named, and all invalid ones: few.
    unnamed: Arc<[PolicyKey]>,
    waypoints: HashTrieMapSync<PolicyKey, Arc<WaypointConfig>>,
    options: MeshOptions,
    /// Pods of this agent's node, by UID.
    pods: HashTrieMapSync<Arc<str>, Arc<LocalPod>>,
}

/// The policies that apply to one workload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applicable {
    /// Can be evaluated.
    pub valid: Vec<Arc<Policy>>,
    /// Named, not received.
    pub missing: Vec<PolicyKey>,
    /// Cannot be evaluated.
    pub invalid: Vec<PolicyKey>,
}

impl Snapshot {
    /// The next world. Work is proportional to what the changes touch.
    #[must_use]
    pub fn with(&self, changes: impl IntoIterator<Item = Change>) -> Self {
        let mut next = self.clone();
        for change in changes {
            next.apply(change);
        }
        next
    }

    fn apply(&mut self, change: Change) {
        match change {
            Change::Workload(workload) => {
                self.remove_workload(&workload.uid);
                self.index(&workload, add);
                self.workloads.insert_mut(workload.uid.clone(), workload);
            }
            Change::Service(service) => {
                self.remove_service(&service.key);
                for vip in &service.vips {
                    update(&mut self.by_vip, vip.to_canonical(), |list| add(list, &service));
                }
                for front in &service.fronts {
                    update(&mut self.by_front, front.at, |list| add(list, &service));
                }
                self.services.insert_mut(service.key.clone(), service);
            }
            Change::Policy(policy) => self.set_policy(policy.key.clone(), Some(PolicyState::Valid(policy))),
            Change::InvalidPolicy(key) => self.set_policy(key, Some(PolicyState::Invalid)),
            Change::Waypoint(config) => {
                self.waypoints.insert_mut(PolicyKey::new(&config.namespace, &config.name), config);
            }
            Change::Options(options) => self.options = options,
            Change::LocalPod(pod) => self.pods.insert_mut(pod.uid.clone(), pod),
            Change::Removed { type_url, name } => self.remove(type_url, &name),
        }
    }

    fn remove(&mut self, type_url: &str, name: &str) {
        match type_url {
            proto::TYPE_ADDRESS => {
                for candidate in AddressName::candidates(name) {
                    let known = match candidate {
                        AddressName::Workload(uid) => self.remove_workload(&uid),
                        AddressName::Service(key) => self.remove_service(&key),
                    };
                    if known {
                        return;
                    }
                }
            }
            proto::TYPE_AUTHORIZATION => {
                if let Some(key) = PolicyKey::parse(name) {
                    self.set_policy(key, None);
                }
            }
            proto::TYPE_WAYPOINT => {
                if let Some(key) = PolicyKey::parse(name) {
                    self.waypoints.remove_mut(&key);
                }
            }
            proto::TYPE_MESH_OPTIONS => self.options = MeshOptions::default(),
            proto::TYPE_LOCAL_POD => drop(self.pods.remove_mut(name)),
            _ => {}
        }
    }

    /// Adds a workload to, or takes it from, every index but the one by key.
    fn index(&mut self, workload: &Arc<Workload>, change: fn(&mut Vec<Arc<Workload>>, &Arc<Workload>)) {
        // A workload with the host's addresses is never found by them (O11).
        if workload.network_mode == NetworkMode::Standard {
            for ip in &workload.addresses {
                update(&mut self.by_address, ip.to_canonical(), |list| change(list, workload));
            }
        }
        let name = (workload.namespace.clone(), workload.name.clone());
        update(&mut self.by_name, name, |list| change(list, workload));
        for service in workload.services.keys() {
            update(&mut self.by_service, service.clone(), |list| change(list, workload));
        }
    }

    fn remove_workload(&mut self, uid: &WorkloadKey) -> bool {
        let Some(old) = self.workloads.get(uid).cloned() else { return false };
        self.index(&old, take);
        self.workloads.remove_mut(uid)
    }

    fn remove_service(&mut self, key: &ServiceKey) -> bool {
        let Some(old) = self.services.get(key).cloned() else { return false };
        for vip in &old.vips {
            update(&mut self.by_vip, vip.to_canonical(), |list| take(list, &old));
        }
        for front in &old.fronts {
            update(&mut self.by_front, front.at, |list| take(list, &old));
        }
        self.services.remove_mut(key)
    }

    fn set_policy(&mut self, key: PolicyKey, state: Option<PolicyState>) {
        let unnamed = match &state {
            Some(PolicyState::Valid(policy)) => policy.scope != Scope::WorkloadSelector,
            Some(PolicyState::Invalid) => true,
            None => false,
        };
        if unnamed != self.unnamed.contains(&key) {
            let mut list: Vec<_> = self.unnamed.iter().filter(|other| **other != key).cloned().collect();
            if unnamed {
                list.push(key.clone());
                list.sort();
            }
            self.unnamed = list.into();
        }
        match state {
            Some(state) => self.policies.insert_mut(key, state),
            None => drop(self.policies.remove_mut(&key)),
        }
    }

    /// The workload of this key.
    pub fn workload(&self, uid: &WorkloadKey) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload at an address; among several a pod wins, then one that speaks HBONE (O11).
    pub fn workload_by_ip(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        let rank = |workload: &Workload| {
            (
                workload.uid.0.contains("//Pod/"),
                workload.tunnel == TunnelProtocol::Hbone,
                std::cmp::Reverse(workload.uid.clone()),
            )
        };
        self.by_address.get(&ip.to_canonical())?.iter().max_by_key(|workload| rank(workload))
    }

    /// The pod of this name, service account and node: what an agent enrols must be what the control plane describes.
    pub fn local_pod(
        &self,
        namespace: &str,
        name: &str,
        service_account: &str,
        node: &str,
    ) -> Option<Arc<Workload>> {
        let list = self.by_name.get(&(Arc::from(namespace), Arc::from(name)))?;
        let fits = |workload: &&Arc<Workload>| {
            *workload.service_account == *service_account && *workload.node == *node
        };
        list.iter().find(fits).cloned()
    }

    /// The service of this key.
    pub fn service(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// The service at a virtual address, as a client of this namespace sees it: its own namespace's first, then a
    /// canonical one, then by key (O9).
    pub fn service_by_vip(&self, client_namespace: &str, vip: IpAddr) -> Option<&Arc<Service>> {
        preferred(client_namespace, self.by_vip.get(&vip.to_canonical())?)
    }

    /// The service that a client of this namespace reaches at an address: a VIP, or else a node port, a load balancer's
    /// address or an external IP.
    pub fn service_at(&self, client_namespace: &str, to: SocketAddr) -> Option<Reached<'_>> {
        let to = SocketAddr::new(to.ip().to_canonical(), to.port());
        if let Some(service) = self.service_by_vip(client_namespace, to.ip()) {
            return Some(Reached { service, at: to, from_outside: false });
        }
        let service = preferred(client_namespace, self.by_front.get(&to)?)?;
        let port = service.fronts.iter().find(|front| front.at == to)?.port;
        let same_family = service.vips.iter().find(|vip| vip.is_ipv4() == to.is_ipv4());
        let vip = same_family.or(service.vips.first()).copied().unwrap_or(to.ip());
        Some(Reached { service, at: SocketAddr::new(vip, port), from_outside: true })
    }

    /// Workloads that name this service.
    pub fn endpoints(&self, service: &ServiceKey) -> impl Iterator<Item = &Arc<Workload>> + Clone {
        self.by_service.get(service).map_or(&[][..], |list| list).iter()
    }

    /// A policy as this proxy knows it.
    pub fn policy(&self, key: &PolicyKey) -> Option<&PolicyState> {
        self.policies.get(key)
    }

    /// The policies that apply to a workload: global ones, those of its namespace, and those that it names. An invalid
    /// policy whose scope cannot be known applies to everyone: fail closed.
    pub fn applicable(&self, workload: &Workload) -> Applicable {
        let mut applicable = Applicable::default();
        let mut seen = HashSet::new();
        for key in self.unnamed.iter() {
            match self.policies.get(key) {
                Some(PolicyState::Valid(policy)) => {
                    let own = policy.scope == Scope::Global || policy.key.namespace == workload.namespace;
                    if !own {
                        // Another namespace's; it may still be named below (I5).
                        continue;
                    }
                    applicable.valid.push(policy.clone());
                }
                Some(PolicyState::Invalid) => applicable.invalid.push(key.clone()),
                None => continue,
            }
            seen.insert(key);
        }
        for key in workload.policies.iter().filter(|key| !seen.contains(key)) {
            match self.policies.get(key) {
                Some(PolicyState::Valid(policy)) => applicable.valid.push(policy.clone()),
                // Every invalid policy is among the unnamed ones.
                Some(PolicyState::Invalid) => {}
                None => applicable.missing.push(key.clone()),
            }
        }
        applicable
    }

    /// The workloads behind a waypoint reference.
    pub fn waypoint_workloads(&self, waypoint: &WaypointRef) -> Vec<&Arc<Workload>> {
        match waypoint {
            WaypointRef::Service { service, .. } => self.endpoints(service).collect(),
            WaypointRef::Address { address, .. } => match self.service_by_vip("", *address) {
                Some(service) => self.endpoints(&service.key).collect(),
                None => self.workload_by_ip(*address).into_iter().collect(),
            },
        }
    }

    /// Every workload.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// Every service.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// Every policy.
    pub fn policies(&self) -> impl Iterator<Item = (&PolicyKey, &PolicyState)> {
        self.policies.iter()
    }

    /// What waypoints serve; a waypoint sees its own only.
    pub fn waypoints(&self) -> impl Iterator<Item = &Arc<WaypointConfig>> {
        self.waypoints.values()
    }

    /// The pod of this UID, if it is of this agent's node.
    pub fn pod(&self, uid: &str) -> Option<&Arc<LocalPod>> {
        self.pods.get(uid)
    }

    /// The pods of this agent's node that have not ended; none for any other proxy.
    pub fn pods(&self) -> impl Iterator<Item = &Arc<LocalPod>> {
        self.pods.values()
    }

    /// Options of the mesh.
    pub fn options(&self) -> &MeshOptions {
        &self.options
    }
}

/// A service, as it was reached.
#[derive(Clone, Copy, Debug)]
pub struct Reached<'a> {
    /// The service.
    pub service: &'a Arc<Service>,
    /// The VIP and port of the service that stand for what was dialled.
    pub at: SocketAddr,
    /// By an address that is meant for clients outside of the cluster.
    pub from_outside: bool,
}

/// Among several with one address: the client's own namespace's first, then a canonical one, then by key (O9).
fn preferred<'a>(client_namespace: &str, services: &'a [Arc<Service>]) -> Option<&'a Arc<Service>> {
    let own = |service: &Service| *service.key.namespace == *client_namespace;
    let visible = |service: &&Arc<Service>| service.visibility == Visibility::Public || own(service);
    let rank = |service: &Service| (!own(service), !service.canonical, service.key.clone());
    services.iter().filter(visible).min_by_key(|service| rank(service))
}

fn add<T>(list: &mut Vec<Arc<T>>, item: &Arc<T>) {
    list.push(item.clone());
}

fn take<T>(list: &mut Vec<Arc<T>>, item: &Arc<T>) {
    list.retain(|other| !Arc::ptr_eq(other, item));
}

/// Changes the list at `key`; an empty list leaves the map.
fn update<K: Clone + Eq + Hash, T: Clone>(
    map: &mut HashTrieMapSync<K, Arc<[T]>>,
    key: K,
    change: impl FnOnce(&mut Vec<T>),
) {
    let mut list = map.get(&key).map(|list| list.to_vec()).unwrap_or_default();
    change(&mut list);
    if list.is_empty() {
        map.remove_mut(&key);
    } else {
        map.insert_mut(key, list.into());
    }
}
