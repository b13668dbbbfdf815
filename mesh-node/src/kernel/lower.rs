//! What the maps should hold for a snapshot (pure): verdicts between the pods of this node, and how to choose an
//! endpoint for a service. Whatever needs more than that is left to the agent: no entry, or [`ServiceState::Agent`].

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_core::{
    balance,
    inbound::{self, Direct},
    model::{LoadBalancing, Service, TunnelProtocol, Visibility, Workload},
    snapshot::Snapshot,
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
}

/// What the maps should hold.
pub fn lower(world: &Snapshot, node: &str, pods: &[LocalWorkload]) -> KernelState {
    KernelState {
        services: services(world, node),
        verdicts: verdicts(world, pods),
        no_direct: world.options().encrypt_same_node,
    }
}

fn verdicts(world: &Snapshot, pods: &[LocalWorkload]) -> BTreeMap<(u32, u32, u16), PairVerdict> {
    let mut verdicts = BTreeMap::new();
    // What is served here is in the mesh until it is released. The world may say earlier that a pod leaves; taking its
    // verdicts back at that moment would cut the direct connections that it is to keep.
    let served = |pod: &LocalWorkload| {
        let workload = Workload { tunnel: TunnelProtocol::Hbone, ..(*pod.workload).clone() };
        LocalWorkload { id: pod.id, workload: Arc::new(workload) }
    };
    let pods: Vec<_> = pods.iter().map(served).collect();
    for destination in &pods {
        let interesting = inbound::ports_of_interest(world, &destination.workload);
        let other = port_besides(&interesting);
        for source in pods.iter().filter(|source| source.id != destination.id) {
            let judge = |port| match inbound::direct(world, &source.workload, &destination.workload, port) {
                Direct::Allow => PairVerdict::Allow,
                Direct::Deny => PairVerdict::Deny,
                Direct::Agent => PairVerdict::Agent,
            };
            let default = judge(other);
            // Without an entry the agent judges; the agent's own ports never go directly whatever the maps say.
            if default != PairVerdict::Agent {
                verdicts.insert((source.id, destination.id, 0), default);
            }
            for port in interesting.iter().filter(|port| !is_agent_port(**port)) {
                let verdict = judge(*port);
                if verdict != default {
                    verdicts.insert((source.id, destination.id, *port), verdict);
                }
            }
        }
    }
    verdicts
}

/// A port that stands for every port without a verdict of its own.
fn port_besides(interesting: &BTreeSet<u16>) -> u16 {
    (1..=u16::MAX).find(|port| !interesting.contains(port) && !is_agent_port(*port)).unwrap_or(u16::MAX)
}

fn services(world: &Snapshot, node: &str) -> BTreeMap<SocketAddr, ServiceState> {
    let mut owners: BTreeMap<IpAddr, Vec<&Arc<Service>>> = BTreeMap::new();
    for service in world.services() {
        for vip in &service.vips {
            owners.entry(vip.to_canonical()).or_default().push(service);
        }
    }
    let mut states = BTreeMap::new();
    for (vip, owners) in owners {
        for service in &owners {
            // Whose service it is depends on who asks: the kernel does not know namespaces.
            let clear = owners.len() == 1 && service.visibility == Visibility::Public;
            for port in &service.ports {
                let state =
                    if clear { choice(world, service, port.port, node, vip) } else { ServiceState::Agent };
                states.insert(SocketAddr::new(vip, port.port), state);
            }
        }
    }
    states
}

fn choice(world: &Snapshot, service: &Service, port: u16, node: &str, vip: IpAddr) -> ServiceState {
    if service.waypoint.is_some() || service.load_balancing == LoadBalancing::Passthrough {
        return ServiceState::Agent;
    }
    let candidates = balance::candidates(world, service, port, node, vip);
    ServiceState::Endpoints(
        candidates.into_iter().map(|candidate| (candidate.target, candidate.weight)).collect(),
    )
}

#[cfg(test)]
mod tests;
