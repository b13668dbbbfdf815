//! What the maps should hold for a snapshot (pure): verdicts between the pods of this node, and how to choose an
//! endpoint for a service. Whatever needs more than that is left to the agent: no entry, or [`ServiceState::Agent`].

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_core::{
    balance,
    id::ServiceKey,
    inbound::{self, Direct},
    model::{LoadBalancing, Service, TunnelProtocol, Visibility, Workload},
    outbound::outside_the_mesh,
    snapshot::{Applicable, Snapshot},
};
use mesh_ebpf_common::is_agent_port;

use super::types::{KernelState, PairVerdict, ServiceState};

/// A pod of this node that is served.
#[derive(Clone, Debug)]
pub struct LocalWorkload {
    /// Its number in the maps.
    pub id: u32,
    /// How the control plane describes it.
    pub workload: Arc<Workload>,
    /// The addresses that it has here. The control plane may list fewer: those of its status.
    pub addresses: Vec<IpAddr>,
    /// Ports that it declares for probes.
    pub probe_ports: BTreeSet<u16>,
}

/// What the maps should hold.
pub fn lower(world: &Snapshot, node: &str, pods: &[LocalWorkload]) -> KernelState {
    Lowering::default().lower(world, node, pods)
}

/// Lowers one world after another, and asks the policies again only about what a change touched: a row of verdicts per
/// called pod is kept for as long as everything that it was made of is the same.
#[derive(Default)]
pub struct Lowering {
    rows: HashMap<u32, Row>,
    services: HashMap<(ServiceKey, IpAddr), Chosen>,
}

/// Who calls, and its verdicts.
type Pair = (Party, Vec<(u16, PairVerdict)>);

/// What a verdict depends on of each of the two pods.
struct Party {
    workload: Arc<Workload>,
    addresses: Vec<IpAddr>,
}

impl Party {
    fn of(pod: &LocalWorkload) -> Self {
        Self { workload: pod.workload.clone(), addresses: pod.addresses.clone() }
    }

    /// By identity of the description: one that was sent again counts as another.
    fn is(&self, pod: &LocalWorkload) -> bool {
        Arc::ptr_eq(&self.workload, &pod.workload) && self.addresses == pod.addresses
    }
}

/// The verdicts towards one pod.
struct Row {
    basis: Basis,
    /// Ports that may differ from the others.
    ports: BTreeSet<u16>,
    /// By calling pod.
    from: HashMap<u32, Pair>,
}

/// What the verdicts towards a pod depend on, besides who calls.
struct Basis {
    party: Party,
    policies: Applicable,
    services: Vec<Option<Arc<Service>>>,
    no_direct: bool,
}

impl Basis {
    fn of(world: &Snapshot, pod: &LocalWorkload) -> Self {
        let workload = &pod.workload;
        Self {
            party: Party::of(pod),
            policies: world.applicable(workload),
            services: workload.services.keys().map(|key| world.service(key).cloned()).collect(),
            no_direct: world.options().encrypt_same_node,
        }
    }

    /// By identity of the parts: a part that was sent again counts as changed.
    fn is(&self, other: &Self) -> bool {
        let same_service = |(a, b): (&Option<Arc<Service>>, &Option<Arc<Service>>)| match (a, b) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        };
        let (a, b) = (&self.policies, &other.policies);
        Arc::ptr_eq(&self.party.workload, &other.party.workload)
            && self.party.addresses == other.party.addresses
            && self.no_direct == other.no_direct
            && a.valid.len() == b.valid.len()
            && a.valid.iter().zip(&b.valid).all(|(a, b)| Arc::ptr_eq(a, b))
            && (&a.missing, &a.invalid) == (&b.missing, &b.invalid)
            && self.services.len() == other.services.len()
            && self.services.iter().zip(&other.services).all(same_service)
    }
}

/// The endpoints of one service at one address.
struct Chosen {
    service: Arc<Service>,
    endpoints: Vec<Arc<Workload>>,
    states: Vec<(u16, ServiceState)>,
}

impl Lowering {
    /// What the maps should hold.
    pub fn lower(&mut self, world: &Snapshot, node: &str, pods: &[LocalWorkload]) -> KernelState {
        KernelState {
            services: self.services(world, node),
            verdicts: self.verdicts(world, pods),
            probes: probes(pods),
            no_direct: world.options().encrypt_same_node,
        }
    }

    fn verdicts(
        &mut self,
        world: &Snapshot,
        pods: &[LocalWorkload],
    ) -> BTreeMap<(u32, u32, u16), PairVerdict> {
        self.rows.retain(|id, _| pods.iter().any(|pod| pod.id == *id));
        let mut verdicts = BTreeMap::new();
        for destination in pods {
            let basis = Basis::of(world, destination);
            let known = self.rows.remove(&destination.id).filter(|row| row.basis.is(&basis));
            let mut row = known.unwrap_or_else(|| Row::new(world, basis));
            row.from.retain(|id, (party, _)| pods.iter().any(|pod| pod.id == *id && party.is(pod)));
            let served = as_served(destination);
            for source in pods.iter().filter(|source| source.id != destination.id) {
                let (_, of_pair) = row.from.entry(source.id).or_insert_with(|| {
                    (Party::of(source), pair(world, &as_served(source), &served, &row.ports))
                });
                for (port, verdict) in of_pair {
                    verdicts.insert((source.id, destination.id, *port), *verdict);
                }
            }
            self.rows.insert(destination.id, row);
        }
        verdicts
    }
}

impl Row {
    fn new(world: &Snapshot, basis: Basis) -> Self {
        let ports = inbound::ports_of_interest(world, &basis.party.workload);
        Self { basis, ports, from: HashMap::new() }
    }
}

/// What is served here is in the mesh until it is released. The world may say earlier that a pod leaves; taking its
/// verdicts back at that moment would cut the direct connections that it is to keep. And it calls from, and is called
/// at, every address that it has, whether the world lists it or not.
fn as_served(pod: &LocalWorkload) -> Arc<Workload> {
    let listed = &pod.workload.addresses;
    let unlisted: Vec<IpAddr> = pod.addresses.iter().filter(|ip| !listed.contains(ip)).copied().collect();
    if pod.workload.tunnel == TunnelProtocol::Hbone && unlisted.is_empty() {
        return pod.workload.clone();
    }
    Arc::new(Workload {
        tunnel: TunnelProtocol::Hbone,
        addresses: [&listed[..], &unlisted].concat(),
        ..(*pod.workload).clone()
    })
}

/// The verdicts of one pair: of any other port (0), and of the ports that differ from it.
fn pair(
    world: &Snapshot,
    source: &Workload,
    destination: &Workload,
    ports: &BTreeSet<u16>,
) -> Vec<(u16, PairVerdict)> {
    let judge = |port| match inbound::direct(world, source, destination, port) {
        Direct::Allow => PairVerdict::Allow,
        Direct::Deny => PairVerdict::Deny,
        Direct::Agent => PairVerdict::Agent,
    };
    let default = judge(port_besides(ports));
    // Without an entry the agent judges; the agent's own ports never go directly whatever the maps say.
    let any_other = (default != PairVerdict::Agent).then_some((0, default));
    let own = ports.iter().filter(|port| !is_agent_port(**port)).map(|port| (*port, judge(*port)));
    any_other.into_iter().chain(own.filter(|(_, verdict)| *verdict != default)).collect()
}

/// Ports of the mesh itself are nobody's to declare.
fn probes(pods: &[LocalWorkload]) -> BTreeSet<(u32, u16)> {
    let ports = |pod: &LocalWorkload| {
        let id = pod.id;
        let declared: Vec<u16> =
            pod.probe_ports.iter().copied().filter(|port| !is_agent_port(*port)).collect();
        declared.into_iter().map(move |port| (id, port))
    };
    pods.iter().flat_map(ports).collect()
}

/// A port that stands for every port without a verdict of its own.
fn port_besides(interesting: &BTreeSet<u16>) -> u16 {
    (1..=u16::MAX).find(|port| !interesting.contains(port) && !is_agent_port(*port)).unwrap_or(u16::MAX)
}

impl Lowering {
    fn services(&mut self, world: &Snapshot, node: &str) -> BTreeMap<SocketAddr, ServiceState> {
        let mut owners: BTreeMap<IpAddr, Vec<&Arc<Service>>> = BTreeMap::new();
        for service in world.services() {
            for vip in &service.vips {
                owners.entry(vip.to_canonical()).or_default().push(service);
            }
        }
        let mut known = std::mem::take(&mut self.services);
        let mut states = BTreeMap::new();
        for (vip, owners) in owners {
            for service in &owners {
                // Whose service it is depends on who asks: the kernel does not know namespaces.
                if owners.len() != 1 || service.visibility != Visibility::Public {
                    let ports = service.ports.iter();
                    states.extend(ports.map(|port| (SocketAddr::new(vip, port.port), ServiceState::Agent)));
                    continue;
                }
                let key = (service.key.clone(), vip);
                let same = known.remove(&key).filter(|chosen| chosen.is(world, service));
                let chosen = same.unwrap_or_else(|| Chosen::of(world, service, node, vip));
                states.extend(
                    chosen.states.iter().map(|(port, state)| (SocketAddr::new(vip, *port), state.clone())),
                );
                self.services.insert(key, chosen);
            }
        }
        self.fronts(world, &mut known, &mut states);
        states
    }

    /// Addresses for clients outside, which pods may dial as well. A VIP wins over them, as in the agent's plan.
    fn fronts(
        &mut self,
        world: &Snapshot,
        known: &mut HashMap<(ServiceKey, IpAddr), Chosen>,
        states: &mut BTreeMap<SocketAddr, ServiceState>,
    ) {
        let mut owners: BTreeMap<SocketAddr, Vec<&Arc<Service>>> = BTreeMap::new();
        for service in world.services() {
            for front in &service.fronts {
                owners.entry(front.at).or_default().push(service);
            }
        }
        for (at, owners) in owners {
            if world.service_by_vip("", at.ip()).is_some() || states.contains_key(&at) {
                continue;
            }
            let [service] = owners[..] else {
                states.insert(at, ServiceState::Agent);
                continue;
            };
            if service.visibility != Visibility::Public {
                states.insert(at, ServiceState::Agent);
                continue;
            }
            let key = (service.key.clone(), at.ip());
            if !self.services.contains_key(&key) {
                let same = known.remove(&key).filter(|chosen| chosen.is(world, service));
                let chosen = same.unwrap_or_else(|| Chosen::from_outside(world, service, at.ip()));
                self.services.insert(key.clone(), chosen);
            }
            let port = service.fronts.iter().find(|front| front.at == at).map(|front| front.port);
            let state = self.services[&key].states.iter().find(|(known, _)| Some(*known) == port);
            states.insert(at, state.map_or(ServiceState::Agent, |(_, state)| state.clone()));
        }
    }
}

impl Chosen {
    fn of(world: &Snapshot, service: &Arc<Service>, node: &str, vip: IpAddr) -> Self {
        let state = |port: u16| (port, choice(world, service, port, node, vip));
        Self {
            service: service.clone(),
            endpoints: world.endpoints(&service.key).cloned().collect(),
            states: service.ports.iter().map(|port| state(port.port)).collect(),
        }
    }

    fn from_outside(world: &Snapshot, service: &Arc<Service>, dialled: IpAddr) -> Self {
        let state = |port: u16| {
            let candidates = || balance::candidates_anywhere(world, service, port, dialled);
            (port, chosen_among(world, service, candidates))
        };
        Self {
            service: service.clone(),
            endpoints: world.endpoints(&service.key).cloned().collect(),
            states: service.ports.iter().map(|port| state(port.port)).collect(),
        }
    }

    fn is(&self, world: &Snapshot, service: &Arc<Service>) -> bool {
        Arc::ptr_eq(&self.service, service)
            && self.endpoints.len() == world.endpoints(&service.key).count()
            && self.endpoints.iter().zip(world.endpoints(&service.key)).all(|(a, b)| Arc::ptr_eq(a, b))
    }
}

fn choice(world: &Snapshot, service: &Service, port: u16, node: &str, vip: IpAddr) -> ServiceState {
    chosen_among(world, service, || balance::candidates(world, service, port, node, vip))
}

fn chosen_among(
    world: &Snapshot,
    service: &Service,
    candidates: impl FnOnce() -> Vec<balance::Candidate>,
) -> ServiceState {
    let passed_on = service.load_balancing == LoadBalancing::Passthrough || outside_the_mesh(world, service);
    // Which endpoint a client keeps is more than a weight.
    if service.waypoint.is_some() || service.sticky.is_some() || passed_on {
        return ServiceState::Agent;
    }
    ServiceState::Endpoints(
        candidates().into_iter().map(|candidate| (candidate.target, candidate.weight)).collect(),
    )
}

#[cfg(test)]
mod tests;
