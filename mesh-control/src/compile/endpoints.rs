//! (pure) Services and the workloads behind them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_core::{
    id::{ServiceKey, WorkloadKey},
    model::{
        Front, Health, LoadBalancing, Locality, NetworkMode, PortMap, Service, ServicePort, TunnelProtocol,
        Visibility, Workload,
    },
};

use super::{
    Output, PodKey,
    binding::Bound,
    index::{Entry, Index, Name, selects},
    policies::{Attached, Behind},
};
use crate::{
    source::Severity,
    translate::{
        service::{EndpointFacts, ServiceFacts, SliceFacts, Target},
        workload::PodFacts,
    },
};

/// Which pods and addresses are behind the services.
#[derive(Default)]
pub struct Endpoints {
    /// Services of each pod, with the port mapping.
    pub by_pod: BTreeMap<PodKey, BTreeMap<ServiceKey, PortMap>>,
    /// Endpoints that are no pods, by workload key.
    pub others: BTreeMap<WorkloadKey, Other>,
    /// Target ports and pods of each service.
    pub by_service: BTreeMap<Name, Vec<(PodKey, PortMap)>>,
}

/// An endpoint that is not a pod.
pub struct Other {
    name: Arc<str>,
    namespace: Arc<str>,
    address: IpAddr,
    node: Arc<str>,
    ready: bool,
    leaving: bool,
    services: BTreeMap<ServiceKey, PortMap>,
}

/// Finds the endpoints of every service: its slices, or else the pods that its selector selects.
pub fn endpoints(index: &Index<'_>, _out: &mut Output) -> Endpoints {
    let mut found = Endpoints::default();
    for (name, service) in &index.services {
        let key = index.service_key(&name.0, &name.1);
        match index.slices.get(name) {
            Some(slices) => {
                for slice in slices {
                    from_slice(index, name, &key, service.facts, slice, &mut found);
                }
            }
            None => {
                let Some(selector) = &service.facts.selector else { continue };
                let own = (name.0.clone(), Arc::from(""))..;
                let pods = index.pods.range(own).take_while(|(key, _)| key.0 == name.0);
                for (pod_key, pod) in
                    pods.filter(|(_, pod)| pod.facts.alive() && selects(selector, &pod.facts.labels))
                {
                    let ports = selected_ports(service.facts, pod.facts);
                    found.add(name, &key, pod_key, ports);
                }
            }
        }
    }
    found
}

/// Service port → port of this pod; a named port that the pod does not have is left out.
fn selected_ports(service: &ServiceFacts, pod: &PodFacts) -> PortMap {
    let ports = service.ports.iter().filter_map(|port| {
        let target = match &port.target {
            Target::Number(number) => *number,
            Target::Name(name) => *pod.ports.get(name)?,
        };
        Some((port.port, target))
    });
    ports.collect()
}

fn from_slice(
    index: &Index<'_>,
    name: &Name,
    key: &ServiceKey,
    service: &ServiceFacts,
    slice: &Entry<'_, SliceFacts>,
    found: &mut Endpoints,
) {
    let ports: PortMap = service
        .ports
        .iter()
        .filter_map(|port| {
            let (_, target) = slice.facts.ports.iter().find(|(name, _)| *name == port.name)?;
            Some((port.port, *target))
        })
        .collect();
    for EndpointFacts { pod, address, ready, leaving, node } in &slice.facts.endpoints {
        let pod_key = pod.as_ref().map(|pod| (name.0.clone(), pod.clone()));
        match pod_key.filter(|key| index.pods.contains_key(key)) {
            Some(pod_key) => found.add(name, key, &pod_key, ports.clone()),
            None => {
                let uid = format!(
                    "{}/discovery.k8s.io/EndpointSlice/{}/{}/{address}",
                    index.mesh.cluster,
                    name.0,
                    slice.name()
                );
                let other = found.others.entry(WorkloadKey(uid.into())).or_insert_with(|| Other {
                    name: slice.name().clone(),
                    namespace: name.0.clone(),
                    address: *address,
                    node: node.clone(),
                    ready: *ready,
                    leaving: *leaving,
                    services: BTreeMap::new(),
                });
                other.services.insert(key.clone(), ports.clone());
            }
        }
    }
}

impl Endpoints {
    /// Whether a service has endpoints that are no pods.
    pub fn has_others(&self, service: &ServiceKey) -> bool {
        self.others.values().any(|other| other.services.contains_key(service))
    }

    fn add(&mut self, name: &Name, key: &ServiceKey, pod: &PodKey, ports: PortMap) {
        let of_pod = self.by_pod.entry(pod.clone()).or_default().entry(key.clone()).or_default();
        // A dual-stack service has a slice per family, each with the same pods.
        of_pod.extend(&ports);
        let of_service = self.by_service.entry(name.clone()).or_default();
        if !of_service.iter().any(|(known, _)| known == pod) {
            of_service.push((pod.clone(), ports));
        }
    }
}

/// The services as the proxies see them.
pub fn service_resources(
    index: &Index<'_>,
    bound: &Bound,
    out: &mut Output,
) -> BTreeMap<ServiceKey, Arc<Service>> {
    let mut by_age: Vec<_> = index.services.iter().collect();
    by_age.sort_by(|(_, a), (_, b)| a.age().cmp(&b.age()));
    let (mut services, mut taken) = (BTreeMap::new(), BTreeSet::new());
    for (name, service) in by_age {
        let ServiceFacts {
            labels: _,
            vips,
            externals: _,
            headless: _,
            ports,
            selector: _,
            publish_not_ready,
            node_local,
            sticky,
        } = service.facts;
        let fronts = fronts(index, service, &mut taken, out);
        let key = index.service_key(&name.0, &name.1);
        let ports = ports.iter().map(|port| ServicePort {
            port: port.port,
            target: match port.target {
                Target::Number(number) => number,
                Target::Name(_) => 0,
            },
        });
        let resource = Service {
            key: key.clone(),
            name: name.1.clone(),
            vips: out.claim(service.of(), "spec.clusterIPs", vips),
            fronts,
            ports: ports.collect(),
            subject_alt_names: Vec::new(),
            waypoint: bound.get(name).map(|binding| binding.reference.clone()),
            load_balancing: if *node_local { LoadBalancing::SameNode } else { LoadBalancing::All },
            sticky: *sticky,
            allow_unhealthy: *publish_not_ready,
            canonical: true,
            visibility: Visibility::Public,
        };
        services.insert(key, Arc::new(resource));
    }
    services
}

/// Where a service is reached besides its VIPs: its ports at its external addresses, its node ports at every node. An
/// address that a pod or a VIP has stays theirs, and of several services at one address and port the oldest has it, as
/// kube-proxy decides.
fn fronts(
    index: &Index<'_>,
    service: &Entry<'_, ServiceFacts>,
    taken: &mut BTreeSet<SocketAddr>,
    out: &mut Output,
) -> Vec<Front> {
    let mut fronts = Vec::new();
    for ip in &service.facts.externals {
        if let Some(holder) = out.claims.get(ip).map(ToString::to_string) {
            let reason = format!("AddressConflict: {ip} belongs to {holder}: not used here");
            out.tell(Severity::Error, service.of(), "spec.externalIPs", reason);
            continue;
        }
        let ports = service.facts.ports.iter();
        fronts.extend(ports.map(|port| Front { at: SocketAddr::new(*ip, port.port), port: port.port }));
    }
    for port in &service.facts.ports {
        let Some(node_port) = port.node_port else { continue };
        let nodes = index.nodes.values().flat_map(|node| &node.addresses);
        fronts.extend(nodes.map(|ip| Front { at: SocketAddr::new(*ip, node_port), port: port.port }));
    }
    fronts.retain(|front| taken.insert(front.at));
    fronts
}

/// The workloads as the proxies see them.
pub fn workload_resources(
    index: &Index<'_>,
    behind: &Behind<'_>,
    policies: &Attached,
    out: &mut Output,
) -> BTreeMap<WorkloadKey, Arc<Workload>> {
    let mut workloads = BTreeMap::new();
    let mut by_age: Vec<_> = index.pods.iter().filter(|(_, pod)| pod.facts.described()).collect();
    by_age.sort_by(|(_, a), (_, b)| a.age().cmp(&b.age()));
    for (key, pod) in by_age {
        let facts = pod.facts;
        let addresses = if facts.host_network {
            facts.addresses.clone()
        } else {
            out.claim(pod.of(), "status.podIPs", &facts.addresses)
        };
        let workload = pod_workload(index, (key, pod), addresses, behind, policies);
        workloads.insert(workload.uid.clone(), Arc::new(workload));
    }
    for (uid, other) in &behind.endpoints.others {
        workloads.insert(uid.clone(), Arc::new(other_workload(index, uid, other)));
    }
    workloads
}

fn pod_workload(
    index: &Index<'_>,
    (key, pod): (&PodKey, &Entry<'_, PodFacts>),
    addresses: Vec<IpAddr>,
    behind: &Behind<'_>,
    policies: &Attached,
) -> Workload {
    let facts = pod.facts;
    let meshed = index.meshed(&key.0, facts) && !facts.host_network;
    let (canonical_name, canonical_revision) = facts.canonical();
    Workload {
        uid: index.pod_uid(&key.0, &key.1),
        name: key.1.clone(),
        namespace: key.0.clone(),
        addresses,
        network: "".into(),
        tunnel: if meshed { TunnelProtocol::Hbone } else { TunnelProtocol::None },
        trust_domain: index.mesh.trust_domain.clone(),
        service_account: facts.service_account.clone(),
        waypoint: behind.pods.get(key).map(|binding| binding.reference.clone()),
        node: facts.node.clone(),
        canonical_name,
        canonical_revision,
        workload_name: facts.workload_name.clone(),
        native_tunnel: index.native(&key.0, facts),
        policies: policies.of_pod(key),
        health: if facts.ready && !facts.deleting { Health::Healthy } else { Health::Unhealthy },
        leaving: facts.ready && facts.deleting,
        cluster: index.mesh.cluster.clone(),
        services: behind.endpoints.by_pod.get(key).cloned().unwrap_or_default(),
        locality: locality(index, &facts.node),
        network_mode: if facts.host_network { NetworkMode::HostNetwork } else { NetworkMode::Standard },
        capacity: 1,
    }
}

/// An address without identity, never found by address (`wire-protocol.md` W24).
fn other_workload(index: &Index<'_>, uid: &WorkloadKey, other: &Other) -> Workload {
    let Other { name, namespace, address, node, ready, leaving, services } = other;
    Workload {
        uid: uid.clone(),
        name: name.clone(),
        namespace: namespace.clone(),
        addresses: vec![*address],
        network: "".into(),
        tunnel: TunnelProtocol::None,
        trust_domain: index.mesh.trust_domain.clone(),
        service_account: "default".into(),
        waypoint: None,
        node: node.clone(),
        canonical_name: name.clone(),
        canonical_revision: "latest".into(),
        workload_name: name.clone(),
        native_tunnel: false,
        policies: Vec::new(),
        health: if *ready { Health::Healthy } else { Health::Unhealthy },
        leaving: *leaving,
        cluster: index.mesh.cluster.clone(),
        services: services.clone(),
        locality: locality(index, node),
        network_mode: NetworkMode::HostNetwork,
        capacity: 1,
    }
}

fn locality(index: &Index<'_>, node: &Arc<str>) -> Locality {
    index.nodes.get(node).map(|node| node.locality.clone()).unwrap_or_default()
}
