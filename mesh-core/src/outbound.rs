//! Where a connection from a pod goes (`wire-protocol.md` 3). Pure: `meshctl explain` and the agent run the same.

use std::{net::SocketAddr, sync::Arc};

use serde::Serialize;

use crate::{
    balance,
    flag::Flag,
    id::Identity,
    model::{Health, LoadBalancing, OutboundMode, Service, TunnelProtocol, WaypointRef, Workload},
    refusal::Refusal,
    snapshot::{Reached, Snapshot},
    tunnel::{HBONE_PORT, ILLEGAL_PORTS},
};

/// One connection out of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// As the application dialled it.
    pub to: SocketAddr,
    /// The endpoint that the kernel picked, or that the client keeps; taken if it may still be chosen.
    pub chosen: Option<SocketAddr>,
    /// A uniform random number for choices.
    pub pick: u64,
}

/// Where to dial, and whom we insist on meeting there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Hop {
    /// Address and HBONE port.
    pub dial: SocketAddr,
    /// Identities that are accepted; never empty.
    pub expect: Vec<Identity>,
}

/// What to do with one connection. Each variant holds exactly what its dial needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Plan {
    /// To an address where the mesh does not choose, as it is.
    Passthrough {
        /// As dialled.
        to: SocketAddr,
        /// The service there, which has no endpoint in the mesh: whose endpoint it is, the node's own proxy decides.
        service: Option<Arc<Service>>,
    },
    /// To a workload outside the mesh, in plain TCP.
    Plain {
        /// Its address and target port.
        to: SocketAddr,
        /// The workload.
        workload: Arc<Workload>,
        /// The service that was dialled.
        service: Option<Arc<Service>>,
    },
    /// To the destination's node agent.
    Tunnel {
        /// Where and whom.
        hop: Hop,
        /// The endpoint's address and target port.
        authority: SocketAddr,
        /// The endpoint.
        workload: Arc<Workload>,
        /// The service that was dialled.
        service: Option<Arc<Service>>,
    },
    /// To the waypoint, which picks the endpoint.
    Waypoint {
        /// Where and whom.
        hop: Hop,
        /// As dialled.
        authority: SocketAddr,
        /// The waypoint's workload.
        workload: Arc<Workload>,
        /// The service that was dialled.
        service: Option<Arc<Service>>,
    },
}

/// Decides where a connection goes.
///
/// # Errors
/// [`Refusal`]: there is no way that is allowed. Never a plaintext way instead of a tunnel, never around a waypoint.
pub fn plan(world: &Snapshot, from: &Workload, request: &Request) -> Result<Plan, Refusal> {
    let to = SocketAddr::new(request.to.ip().to_canonical(), request.to.port());
    // The pod's own listeners of the mesh: the connection would come back to the agent for ever (O2). The kernel
    // takes the unspecified address for loopback.
    if (to.ip().is_loopback() || to.ip().is_unspecified()) && ILLEGAL_PORTS.contains(&to.port()) {
        return Err(Refusal::new(Flag::IllegalPort, format!("{to} is a port of the mesh itself")));
    }
    if let Some(reached) = world.service_at(&from.namespace, to) {
        return plan_service(world, from, request, to, &reached);
    }
    match world.workload_by_ip(to.ip()) {
        Some(workload) => plan_workload(world, from, request, to, workload),
        None if world.options().outbound == OutboundMode::RegistryOnly => Err(Refusal::new(
            Flag::UnknownDestination,
            format!("{to} is not known to the mesh, and outbound mode is REGISTRY_ONLY"),
        )),
        None => Ok(Plan::Passthrough { to, service: None }),
    }
}

fn plan_service(
    world: &Snapshot,
    from: &Workload,
    request: &Request,
    dialled: SocketAddr,
    reached: &Reached<'_>,
) -> Result<Plan, Refusal> {
    let Reached { service, at: to, from_outside } = *reached;
    if let Some(waypoint) = service.waypoint.as_ref().filter(|waypoint| !is_waypoint(world, from, waypoint)) {
        return plan_waypoint(world, from, request, to, waypoint, Some(service));
    }
    if service.load_balancing == LoadBalancing::Passthrough {
        return Ok(Plan::Passthrough { to: dialled, service: None });
    }
    if outside_the_mesh(world, service) {
        return Ok(Plan::Passthrough { to: dialled, service: Some(service.clone()) });
    }
    let candidates = if from_outside {
        balance::candidates_anywhere(world, service, to.port(), dialled.ip())
    } else {
        balance::candidates(world, service, to.port(), &from.node, dialled.ip())
    };
    let before =
        request.chosen.and_then(|chosen| candidates.iter().find(|candidate| candidate.target == chosen));
    let weights = candidates.iter().map(|candidate| candidate.weight);
    let drawn = || candidates.get(balance::weighted(weights, request.pick)?);
    let found = before.or_else(|| match service.sticky {
        Some(_) => balance::kept(&candidates, from.uid.0.as_bytes()),
        None => drawn(),
    });
    let Some(candidate) = found else {
        let known = service.ports.iter().any(|port| port.port == to.port());
        let why = if known {
            format!("{} has no endpoint that can take a connection to port {}", service.key, to.port())
        } else {
            format!("{} has no port {}", service.key, to.port())
        };
        return Err(Refusal::new(Flag::NoHealthyUpstream, why));
    };
    reach(&candidate.workload, candidate.target, Some(service))
}

/// A service whose endpoints are all outside of the mesh is the node's own proxy's: it knows every rule about choosing
/// among them. One without any endpoint is refused with a reason instead.
pub fn outside_the_mesh(world: &Snapshot, service: &Service) -> bool {
    let mut endpoints = world.endpoints(&service.key).peekable();
    service.waypoint.is_none()
        && endpoints.peek().is_some()
        && endpoints.all(|workload| workload.tunnel == TunnelProtocol::None)
}

fn plan_workload(
    world: &Snapshot,
    from: &Workload,
    request: &Request,
    to: SocketAddr,
    workload: &Arc<Workload>,
) -> Result<Plan, Refusal> {
    match workload.waypoint.as_ref().filter(|waypoint| !is_waypoint(world, from, waypoint)) {
        Some(waypoint) => plan_waypoint(world, from, request, to, waypoint, None),
        None => reach(workload, to, None),
    }
}

/// Straight to an endpoint: by tunnel if it is in the mesh, in plain TCP if it is not.
fn reach(
    workload: &Arc<Workload>,
    target: SocketAddr,
    service: Option<&Arc<Service>>,
) -> Result<Plan, Refusal> {
    let (workload, service) = (workload.clone(), service.cloned());
    if workload.tunnel == TunnelProtocol::None {
        return Ok(Plan::Plain { to: target, workload, service });
    }
    if ILLEGAL_PORTS.contains(&target.port()) {
        return Err(Refusal::new(Flag::IllegalPort, format!("{target} is a port of the mesh itself")));
    }
    let dial = SocketAddr::new(target.ip(), HBONE_PORT);
    let expect = expected(&workload, service.as_deref());
    Ok(Plan::Tunnel { hop: Hop { dial, expect }, authority: target, workload, service })
}

fn plan_waypoint(
    world: &Snapshot,
    from: &Workload,
    request: &Request,
    to: SocketAddr,
    waypoint: &WaypointRef,
    service: Option<&Arc<Service>>,
) -> Result<Plan, Refusal> {
    let usable = |workload: &&&Arc<Workload>| {
        workload.health == Health::Healthy && workload.capacity != 0 && !workload.addresses.is_empty()
    };
    let mut all = world.waypoint_workloads(waypoint);
    all.sort_by(|a, b| a.uid.cmp(&b.uid));
    let usable: Vec<_> = all.iter().filter(usable).collect();
    let weights = usable.iter().map(|workload| workload.capacity);
    let Some(workload) = balance::weighted(weights, request.pick).map(|index| Arc::clone(usable[index]))
    else {
        return Err(Refusal::new(
            Flag::WaypointUnavailable,
            format!("{to} must pass waypoint {}, which has no endpoint that is ready", described(waypoint)),
        ));
    };
    let (front, port) = match waypoint {
        WaypointRef::Service { service, port } => (world.service(service), *port),
        WaypointRef::Address { address, port } => (world.service_by_vip(&from.namespace, *address), *port),
    };
    // The waypoint listens on its pods' own addresses.
    let ip = balance::address(&workload, to.ip())
        .ok_or_else(|| Refusal::new(Flag::WaypointUnavailable, "the waypoint has no address"))?;
    let port = front.and_then(|front| workload.services.get(&front.key)?.get(&port).copied()).unwrap_or(port);
    let expect = expected(&workload, front.map(|front| &**front));
    Ok(Plan::Waypoint {
        hop: Hop { dial: SocketAddr::new(ip, port), expect },
        authority: to,
        workload,
        service: service.cloned(),
    })
}

/// Identities that a hop may prove (H12).
fn expected(workload: &Workload, service: Option<&Service>) -> Vec<Identity> {
    let mut expect = vec![workload.identity()];
    for identity in service.into_iter().flat_map(|service| &service.subject_alt_names) {
        if !expect.contains(identity) {
            expect.push(identity.clone());
        }
    }
    expect
}

/// Whether a workload is one of those behind a waypoint reference: identity and address.
fn is_waypoint(world: &Snapshot, workload: &Workload, waypoint: &WaypointRef) -> bool {
    world.waypoint_workloads(waypoint).iter().any(|behind| behind.uid == workload.uid)
}

/// A waypoint reference for people.
pub(crate) fn described(waypoint: &WaypointRef) -> String {
    match waypoint {
        WaypointRef::Service { service, .. } => service.to_string(),
        WaypointRef::Address { address, .. } => address.to_string(),
    }
}
