//! Choosing an endpoint by weight (`wire-protocol.md` 3.2). Chance is an argument.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::{
    model::{Health, LoadBalancing, Service, Workload},
    snapshot::Snapshot,
};

/// One endpoint that may be chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The workload.
    pub workload: Arc<Workload>,
    /// Its address and target port.
    pub target: SocketAddr,
    /// Its share of the sum of weights.
    pub weight: u32,
}

/// The endpoints of a service port for a client on `node` that dials an address of the family of `dialled`. In the
/// order of their keys, so that two readers of one snapshot agree.
pub fn candidates(
    world: &Snapshot,
    service: &Service,
    port: u16,
    node: &str,
    dialled: IpAddr,
) -> Vec<Candidate> {
    let only_here = service.load_balancing == LoadBalancing::SameNode;
    among(world, service, port, only_here.then_some(node), dialled)
}

/// The same for a client that dials an address from outside (node port, load balancer, external IP): the rule for clients
/// inside, to stay on their node, does not hold for it.
pub fn candidates_anywhere(
    world: &Snapshot,
    service: &Service,
    port: u16,
    dialled: IpAddr,
) -> Vec<Candidate> {
    among(world, service, port, None, dialled)
}

fn among(
    world: &Snapshot,
    service: &Service,
    port: u16,
    only_on: Option<&str>,
    dialled: IpAddr,
) -> Vec<Candidate> {
    let Some(entry) = service.ports.iter().find(|entry| entry.port == port) else { return Vec::new() };
    let near = |workload: &&Arc<Workload>| only_on.is_none_or(|node| *workload.node == *node);
    let candidate = |workload: &Arc<Workload>| {
        let own = workload.services.get(&service.key)?.get(&port).copied().unwrap_or(0);
        let target = if own == 0 { entry.target } else { own };
        let ip = address(workload, dialled)?;
        (target != 0 && workload.capacity != 0).then(|| Candidate {
            workload: workload.clone(),
            target: SocketAddr::new(ip, target),
            weight: workload.capacity,
        })
    };
    let all = || world.endpoints(&service.key).filter(near);
    let healthy = |workload: &&Arc<Workload>| workload.health == Health::Healthy || service.allow_unhealthy;
    let mut list: Vec<_> = all().filter(healthy).filter_map(candidate).collect();
    if list.is_empty() {
        // As Kubernetes does: better an endpoint that is about to go than none.
        list = all().filter(|workload| workload.leaving).filter_map(candidate).collect();
    }
    list.sort_by(|a, b| a.workload.uid.cmp(&b.workload.uid));
    list
}

/// The workload's address for a client that dialled `dialled`: that very one, else the same family, else any (O24).
pub fn address(workload: &Workload, dialled: IpAddr) -> Option<IpAddr> {
    let rank = |ip: &&IpAddr| (**ip != dialled, ip.is_ipv4() != dialled.is_ipv4());
    workload.addresses.iter().min_by_key(rank).copied()
}

/// The index that `pick` falls on, each index in proportion to its weight; `None` when all weights are zero.
pub fn weighted(weights: impl Iterator<Item = u32> + Clone, pick: u64) -> Option<usize> {
    let total: u64 = weights.clone().map(u64::from).sum();
    let mut rest = pick.checked_rem(total)?;
    for (index, weight) in weights.enumerate() {
        match rest.checked_sub(u64::from(weight)) {
            Some(less) => rest = less,
            None => return Some(index),
        }
    }
    None
}

/// The endpoint that this client keeps: the same for as long as it may be chosen, and another only for the clients of one
/// that may not. Weights do not count.
pub fn kept<'a>(candidates: &'a [Candidate], client: &[u8]) -> Option<&'a Candidate> {
    let rank = |candidate: &&Candidate| {
        let bytes = client.iter().copied().chain([0]).chain(candidate.target.to_string().into_bytes());
        // FNV-1a, then mixed, since neighbours differ in their last bytes only.
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash ^ (hash >> 33)
    };
    candidates.iter().max_by_key(rank)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_index_gets_exactly_its_share_over_one_cycle() {
        let weights = [3_u32, 0, 1, 6];
        let mut counts = [0; 4];
        for pick in 0..10 {
            counts[weighted(weights.into_iter(), pick).unwrap()] += 1;
        }
        assert_eq!(counts, weights);
        assert_eq!(weighted([0, 0].into_iter(), 7), None);
        assert_eq!(weighted([].into_iter(), 7), None);
        assert_eq!(weighted([u32::MAX, u32::MAX].into_iter(), u64::from(u32::MAX)), Some(1));
    }
}
