//! Whether a connection may reach the application (`wire-protocol.md` 4), and when the kernel may decide alone. Pure.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use serde::Serialize;

use crate::{
    authz::{self, Decider, Subject, Verdict},
    flag::Flag,
    id::{Identity, PolicyKey},
    model::{Match, Policy, TunnelProtocol, WaypointRef, Workload},
    outbound::described,
    refusal::Refusal,
    snapshot::{Applicable, Snapshot},
    tunnel::{self, ILLEGAL_PORTS},
};

/// Name of the policy that stands for mTLS mode STRICT (`wire-protocol.md` I12).
pub const STRICT_POLICY: &str = "istio_converted_static_strict";
/// Prefix of policies that stand for PeerAuthentication with port modes (I12).
pub const PEER_AUTHENTICATION_PREFIX: &str = "converted_peer_authentication_";

/// One connection that has arrived for a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The identity that the peer has proven; `None`: plaintext.
    pub peer: Option<Identity>,
    /// The peer's address.
    pub source_ip: IpAddr,
    /// The pod's own address that was reached.
    pub destination_ip: IpAddr,
    /// The application's port, never 15008.
    pub port: u16,
    /// The client that the peer states in the header [`tunnel::CLIENT_HEADER`]; believed only from the bound waypoint.
    pub claimed_client: Option<Identity>,
}

/// A decision for a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Admission {
    /// The ALLOW rule that decided; `None`: no ALLOW policy applies.
    pub decider: Option<Decider>,
    /// Dry-run policies that match.
    pub dry_run: Vec<Decider>,
    /// The peer is the waypoint that is bound to this port.
    pub via_waypoint: bool,
    /// The original client, where the bound waypoint states it; else the peer.
    pub client: Option<Identity>,
}

/// Decides whether a connection may reach the application.
///
/// # Errors
/// [`Refusal`] with the reason; `POLICY_PENDING` may be asked again when the world changes.
pub fn admit(world: &Snapshot, local: &Workload, arrival: &Arrival) -> Result<Admission, Refusal> {
    if ILLEGAL_PORTS.contains(&arrival.port) {
        return Err(Refusal::new(
            Flag::IllegalPort,
            format!("port {} is one of the mesh's own", arrival.port),
        ));
    }
    let applicable = complete(world, local)?;
    let via_waypoint = passage(world, local, arrival)?;
    let claimed = arrival.claimed_client.as_ref().filter(|_| via_waypoint);
    let identities: Vec<_> = arrival.peer.iter().chain(claimed).collect();
    let subject = Subject {
        identities: &identities,
        source_ip: arrival.source_ip,
        destination_ip: arrival.destination_ip,
        destination_port: arrival.port,
    };
    let decider = match authz::evaluate(applicable.valid.iter(), &subject) {
        Verdict::AllowedByDefault => None,
        Verdict::Allowed(decider) => Some(decider),
        Verdict::Denied(decider) => return Err(denied(&decider, arrival)),
        Verdict::NotAllowed(policy) => {
            let why = format!("ALLOW policies such as {policy} apply and none allows {}", who(arrival));
            return Err(Refusal { flag: Flag::PolicyDenied, why, policy: Some(policy) });
        }
    };
    Ok(Admission {
        decider,
        dry_run: authz::dry_run(applicable.valid.iter(), &subject),
        via_waypoint,
        client: claimed.or(arrival.peer.as_ref()).cloned(),
    })
}

/// Whether PeerAuthentication refuses a connection that has proven no identity, whatever else would.
pub fn strict(world: &Snapshot, local: &Workload, arrival: &Arrival) -> bool {
    let subject = Subject {
        identities: &[],
        source_ip: arrival.source_ip,
        destination_ip: arrival.destination_ip,
        destination_port: arrival.port,
    };
    let applicable = world.applicable(local);
    let modes = applicable.valid.iter().filter(|policy| is_peer_authentication(&policy.key));
    matches!(authz::evaluate(modes, &subject), Verdict::Denied(_) | Verdict::NotAllowed(_))
}

/// The policies that apply, if everything that decides is here and can be evaluated.
fn complete(world: &Snapshot, local: &Workload) -> Result<Applicable, Refusal> {
    let applicable = world.applicable(local);
    if let Some(policy) = applicable.invalid.first().cloned() {
        let why = format!("policy {policy} cannot be evaluated");
        return Err(Refusal { flag: Flag::PolicyInvalid, why, policy: Some(policy) });
    }
    if let Some(policy) = applicable.missing.first().cloned() {
        let why = format!("policy {policy} applies and has not been received");
        return Err(Refusal { flag: Flag::PolicyPending, why, policy: Some(policy) });
    }
    // A service that is named and unknown may be bound to a waypoint.
    if let Some(service) = local.services.keys().find(|key| world.service(key).is_none()) {
        let why = format!("service {service} has not been received, so its waypoint is not known");
        return Err(Refusal::new(Flag::PolicyPending, why));
    }
    Ok(applicable)
}

/// Whether the peer is a bound waypoint; an error when there is one and the peer is none.
///
/// One of several is enough: a connection passes the waypoint of the service, or that of the workload, by how the
/// client addressed it, and each can prove only its own identity.
fn passage(world: &Snapshot, local: &Workload, arrival: &Arrival) -> Result<bool, Refusal> {
    let bound = bound_waypoints(world, local, arrival.port);
    let proven = |waypoint: &&WaypointRef| {
        let behind = world.waypoint_workloads(waypoint);
        behind.iter().any(|workload| Some(workload.identity()) == arrival.peer)
    };
    if bound.is_empty() || bound.iter().any(proven) {
        return Ok(!bound.is_empty());
    }
    let names: Vec<_> = bound.into_iter().map(described).collect();
    let why = format!(
        "port {} is reached only through waypoint {}, not by {}",
        arrival.port,
        names.join(" or "),
        who(arrival)
    );
    Err(Refusal::new(Flag::WaypointRequired, why))
}

/// The waypoints that traffic to a port of a workload must have passed: its own for every port, a service's for the
/// target ports of that service. A waypoint's own pods are bound to none.
fn bound_waypoints<'a>(world: &'a Snapshot, local: &'a Workload, port: u16) -> Vec<&'a WaypointRef> {
    let mut bound: Vec<_> = local.waypoint.iter().collect();
    for (key, ports) in &local.services {
        let Some(service) = world.service(key) else { continue };
        let Some(waypoint) = &service.waypoint else { continue };
        let covered = service.ports.iter().any(|entry| {
            let own = ports.get(&entry.port).copied().unwrap_or(0);
            port == if own == 0 { entry.target } else { own }
        });
        if covered && !bound.contains(&waypoint) {
            bound.push(waypoint);
        }
    }
    bound
}

fn denied(decider: &Decider, arrival: &Arrival) -> Refusal {
    let Decider { policy, rule } = decider;
    let (flag, why) = if is_peer_authentication(policy) {
        (Flag::MtlsRequired, format!("mTLS is required and {} came in plaintext", who(arrival)))
    } else {
        (Flag::PolicyDenied, format!("explicitly denied by rule {rule} of {policy}: {}", who(arrival)))
    };
    Refusal { flag, why, policy: Some(policy.clone()) }
}

fn who(arrival: &Arrival) -> String {
    match &arrival.peer {
        Some(identity) => format!("{identity} from {}", arrival.source_ip),
        None => format!("{} without identity", arrival.source_ip),
    }
}

/// Where a CONNECT leads: only to the pod whose listener was reached (`wire-protocol.md` 2.9, ours is stricter).
///
/// # Errors
/// `ILLEGAL_AUTHORITY` for another destination, `ILLEGAL_PORT` for a port of the mesh, `MALFORMED_REQUEST` for what is
/// no address.
pub fn serves(own: IpAddr, authority: &str) -> Result<SocketAddr, Refusal> {
    let to = tunnel::parse_authority(authority)
        .map_err(|error| Refusal::new(Flag::MalformedRequest, format!("the authority is {error}")))?;
    if to.ip() != own.to_canonical() {
        let why = format!("the tunnel asks for {to} at {}", own.to_canonical());
        return Err(Refusal::new(Flag::IllegalAuthority, why));
    }
    if ILLEGAL_PORTS.contains(&to.port()) {
        return Err(Refusal::new(Flag::IllegalPort, format!("port {} is one of the mesh's own", to.port())));
    }
    Ok(to)
}

/// What the kernel is told about connections between two pods of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direct {
    /// They may flow directly.
    Allow,
    /// They are refused.
    Deny,
    /// The agent decides each.
    Agent,
}

/// What the kernel may decide alone about connections from `source` to `port` of `destination`, both enrolled on this
/// node. Anything that needs more than L4 policy is the agent's.
pub fn direct(world: &Snapshot, source: &Workload, destination: &Workload, port: u16) -> Direct {
    let enrolled = source.tunnel == TunnelProtocol::Hbone && destination.tunnel == TunnelProtocol::Hbone;
    if !enrolled || world.options().encrypt_same_node || ILLEGAL_PORTS.contains(&port) {
        return Direct::Agent;
    }
    if !bound_waypoints(world, destination, port).is_empty() {
        return Direct::Agent;
    }
    let Ok(applicable) = complete(world, destination) else { return Direct::Agent };
    // Dry-run policies must be logged for every connection, which the agent does.
    if applicable.valid.iter().any(|policy| policy.dry_run) {
        return Direct::Agent;
    }
    let identity = source.identity();
    let mut verdicts = BTreeSet::new();
    for source_ip in &source.addresses {
        for destination_ip in destination.addresses.iter().filter(|ip| ip.is_ipv4() == source_ip.is_ipv4()) {
            let subject = Subject {
                identities: &[&identity],
                source_ip: *source_ip,
                destination_ip: *destination_ip,
                destination_port: port,
            };
            verdicts.insert(match authz::evaluate(applicable.valid.iter(), &subject) {
                Verdict::AllowedByDefault | Verdict::Allowed(_) => true,
                Verdict::Denied(_) | Verdict::NotAllowed(_) => false,
            });
        }
    }
    match (verdicts.contains(&true), verdicts.contains(&false)) {
        (true, false) => Direct::Allow,
        (false, true) => Direct::Deny,
        // No common family, or the verdict depends on the address.
        _ => Direct::Agent,
    }
}

/// Ports of a workload on which [`direct`] may differ from its verdict on all other ports.
pub fn ports_of_interest(world: &Snapshot, destination: &Workload) -> BTreeSet<u16> {
    let mut ports: BTreeSet<u16> = ILLEGAL_PORTS.into();
    for policy in &world.applicable(destination).valid {
        ports.extend(ports_of(policy));
    }
    for (key, own) in &destination.services {
        if let Some(service) = world.service(key).filter(|service| service.waypoint.is_some()) {
            ports.extend(service.ports.iter().map(|entry| entry.target).chain(own.values().copied()));
        }
    }
    ports.remove(&0);
    ports
}

fn ports_of(policy: &Policy) -> impl Iterator<Item = u16> {
    let matches = policy.rules.iter().flat_map(|rule| &rule.clauses).flat_map(|clause| &clause.matches);
    let ports = |item: &Match| [item.destination_ports.clone(), item.not_destination_ports.clone()].concat();
    matches.flat_map(ports).collect::<Vec<_>>().into_iter()
}

/// Whether a policy stands for a PeerAuthentication.
pub fn is_peer_authentication(policy: &PolicyKey) -> bool {
    &*policy.name == STRICT_POLICY || policy.name.starts_with(PEER_AUTHENTICATION_PREFIX)
}
