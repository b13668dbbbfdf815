//! (pure) Outcomes and acknowledgements → the status of every object that is ours to judge.

use std::collections::BTreeMap;

use mesh_core::model::RouteKind as Kind;

use super::{
    expected, held,
    object::{
        CONTROLLER, ClassStatus, Condition, Conditions, Feature, GatewayAddress, GatewayStatus,
        ListenerStatus, ObjectStatus, ParentStatus, RouteKind, RouteStatus, Truth,
    },
};
use crate::{
    compile::outcome::{BindingOutcome, ClassOutcome, GatewayOutcome, RouteOutcome},
    credentials::Principal,
    provision::{self, apply::Refused},
    publish::Published,
    serve::proxies::Proxy,
    source::{ObjectKey, Problem, Severity},
    translate::gateway::{ListenerFacts, WaypointFacts},
};

/// Features of the Gateway API that a test of the official suite or of ours shows to work, in alphabetical order.
pub const FEATURES: &[&str] = &[
    "GRPCRoute",
    "HTTPRoute",
    "Mesh",
    "MeshHTTPRouteBackendRequestHeaderModification",
    "MeshHTTPRouteNamedRouteRule",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
];

/// The condition that says on how many proxies an object holds.
pub const IN_FORCE: &str = "undermesh.io/InForce";
/// The condition of a Service that asks for a waypoint.
pub const WAYPOINT_BOUND: &str = "istio.io/WaypointBound";

/// Conditions that nobody else writes: one that is not wanted is a leftover of ours.
pub const OURS_ALONE: [&str; 2] = [IN_FORCE, WAYPOINT_BOUND];

/// The status of every object that is ours to judge; `refused` are Gateways for which nothing could be made.
pub fn objects(
    published: &Published,
    known: &BTreeMap<Principal, Proxy>,
    refused: &Refused,
) -> BTreeMap<ObjectKey, ObjectStatus> {
    let outcomes = &published.world.outcomes;
    let expected = expected(&published.world);
    let in_force = |key: &ObjectKey, generation: i64| {
        let carried = published.world.carried.get(key)?;
        (!carried.resources.is_empty()).then(|| {
            let held = held(published, known, &expected, &carried.resources);
            condition(IN_FORCE, held.everywhere(), held.reason(), held.to_string(), generation)
        })
    };
    let mut statuses = BTreeMap::new();
    for (key, class) in &outcomes.classes {
        statuses.insert(key.clone(), ObjectStatus::Class(class_status(*class)));
    }
    for (key, gateway) in &outcomes.gateways {
        let refused = refused.get(key).map(String::as_str);
        statuses.insert(key.clone(), ObjectStatus::Gateway(gateway_status(key, gateway, refused)));
    }
    for (key, route) in &outcomes.routes {
        let in_force = in_force(key, route.generation);
        statuses.insert(key.clone(), ObjectStatus::Route(route_status(route, in_force.as_ref())));
    }
    for (key, binding) in &outcomes.bindings {
        let conditions = vec![binding_condition(binding)];
        statuses.insert(key.clone(), ObjectStatus::Conditions(Conditions { conditions }));
    }
    for key in published.world.carried.keys().filter(|key| key.kind.secures()) {
        let generation = outcomes.generations.get(key).copied().unwrap_or(0);
        let mut conditions = vec![accepted(&published.world.problems, key, generation)];
        conditions.extend(in_force(key, generation));
        statuses.insert(key.clone(), ObjectStatus::Conditions(Conditions { conditions }));
    }
    statuses
}

fn condition(
    kind: &'static str,
    holds: bool,
    reason: &str,
    message: impl Into<String>,
    observed_generation: i64,
) -> Condition {
    Condition {
        kind,
        status: holds.into(),
        reason: reason.to_owned(),
        message: message.into(),
        observed_generation,
    }
}

fn class_status(class: ClassOutcome) -> ClassStatus {
    let ClassOutcome { generation, served, parameters } = class;
    let accepted = match (served, parameters) {
        (false, _) => condition(
            "Accepted",
            false,
            "Unsupported",
            "gateways of this class are not served yet; waypoints are",
            generation,
        ),
        (true, true) => condition(
            "Accepted",
            false,
            "InvalidParameters",
            "spec.parametersRef is not supported",
            generation,
        ),
        (true, false) => condition("Accepted", true, "Accepted", "", generation),
    };
    let supported_features =
        if served { FEATURES.iter().map(|name| Feature { name }).collect() } else { Vec::new() };
    ClassStatus { conditions: vec![accepted], supported_features }
}

fn gateway_status(key: &ObjectKey, gateway: &GatewayOutcome, refused: Option<&str>) -> GatewayStatus {
    let GatewayOutcome { generation, facts, addresses, attached, pods } = gateway;
    let Some(facts) = facts else {
        let told = "gateways of this class are not served yet; waypoints are";
        let conditions = vec![
            condition("Accepted", false, "Invalid", told, *generation),
            condition("Programmed", false, "Invalid", told, *generation),
        ];
        return GatewayStatus { addresses: Vec::new(), conditions, listeners: Vec::new() };
    };
    let programmed = match refused {
        Some(why) => (false, "NoResources", why),
        None => programmed(facts, !addresses.is_empty(), *pods),
    };
    let address = |ip: &std::net::IpAddr| GatewayAddress { kind: "IPAddress", value: ip.to_string() };
    GatewayStatus {
        addresses: addresses.iter().map(address).collect(),
        conditions: vec![
            gateway_accepted(key, facts, *generation),
            condition("Programmed", programmed.0, programmed.1, programmed.2, *generation),
        ],
        listeners: facts
            .listeners
            .iter()
            .map(|listener| listener_status(listener, *attached, programmed.0, *generation))
            .collect(),
    }
}

fn gateway_accepted(key: &ObjectKey, facts: &WaypointFacts, generation: i64) -> Condition {
    if let Err(unfit) = provision::fit(&key.name) {
        return condition("Accepted", false, "Invalid", unfit.to_string(), generation);
    }
    let served = facts.listeners.iter().filter(|listener| listener.serves).count();
    if facts.parameters {
        let told = "spec.infrastructure.parametersRef is not supported";
        return condition("Accepted", false, "InvalidParameters", told, generation);
    }
    if served == facts.listeners.len() && served > 0 {
        return condition("Accepted", true, "Accepted", "", generation);
    }
    let told = "a waypoint has one listener, of protocol HBONE";
    condition("Accepted", served > 0, "ListenersNotValid", told, generation)
}

fn programmed(facts: &WaypointFacts, addressed: bool, pods: usize) -> (bool, &'static str, &'static str) {
    match (facts.listeners.iter().any(|listener| listener.serves), addressed, pods) {
        (false, ..) => (false, "Invalid", "no listener is valid"),
        (true, false, _) => (false, "AddressNotAssigned", "the waypoint's Service has no address yet"),
        (true, true, 0) => (false, "Pending", "no pod of the waypoint is ready"),
        (true, true, _) => (true, "Programmed", ""),
    }
}

fn route_kind(kind: Kind) -> RouteKind {
    let kind = match kind {
        Kind::Http => "HTTPRoute",
        Kind::Grpc => "GRPCRoute",
    };
    RouteKind { group: "gateway.networking.k8s.io", kind }
}

fn listener_status(
    listener: &ListenerFacts,
    attached: usize,
    programmed: bool,
    generation: i64,
) -> ListenerStatus {
    let ListenerFacts { name, port: _, serves, unsupported, kinds, invalid_kinds } = listener;
    let accepted = match (serves, unsupported) {
        (true, _) => condition("Accepted", true, "Accepted", "", generation),
        (false, Some(protocol)) => {
            let told = format!("a waypoint has no listener of protocol {protocol:.60}");
            condition("Accepted", false, "UnsupportedProtocol", told, generation)
        }
        (false, None) => {
            condition("Accepted", false, "UnsupportedValue", "a waypoint has one listener", generation)
        }
    };
    let resolved = if *invalid_kinds {
        let told = "a waypoint takes HTTPRoute and GRPCRoute";
        condition("ResolvedRefs", false, "InvalidRouteKinds", told, generation)
    } else {
        condition("ResolvedRefs", true, "ResolvedRefs", "", generation)
    };
    let ready = *serves && programmed;
    let reason = match (ready, serves) {
        (true, _) => "Programmed",
        (false, true) => "Pending",
        (false, false) => "Invalid",
    };
    ListenerStatus {
        name: name.clone(),
        supported_kinds: kinds.iter().map(|kind| route_kind(*kind)).collect(),
        attached_routes: if *serves { attached } else { 0 },
        conditions: vec![
            accepted,
            condition("Conflicted", false, "NoConflicts", "", generation),
            resolved,
            condition("Programmed", ready, reason, "", generation),
        ],
    }
}

fn route_status(route: &RouteOutcome, in_force: Option<&Condition>) -> RouteStatus {
    let RouteOutcome { generation, parents, unresolved, invalid_rules } = route;
    let resolved = match unresolved {
        Some((fault, text)) => condition("ResolvedRefs", false, fault.reason(), text.as_str(), *generation),
        None => condition("ResolvedRefs", true, "ResolvedRefs", "", *generation),
    };
    let parents = parents.iter().map(|parent| {
        let mut conditions = Vec::with_capacity(4);
        conditions.push(match (&parent.refused, invalid_rules) {
            (Some((refusal, text)), _) => {
                condition("Accepted", false, refusal.reason(), text.as_str(), *generation)
            }
            // None of it does what it says.
            (None, Some((text, true))) => {
                condition("Accepted", false, "UnsupportedValue", text.as_str(), *generation)
            }
            (None, _) => condition("Accepted", true, "Accepted", "", *generation),
        });
        conditions.push(resolved.clone());
        if let (None, Some((text, false))) = (&parent.refused, invalid_rules) {
            let told = format!("some rules answer with 500: {text}");
            conditions.push(condition("PartiallyInvalid", true, "UnsupportedValue", told, *generation));
        }
        if parent.refused.is_none() {
            conditions.extend(in_force.cloned());
        }
        ParentStatus { parent_ref: parent.parent.clone(), controller_name: CONTROLLER, conditions }
    });
    RouteStatus { parents: parents.collect() }
}

fn binding_condition(binding: &BindingOutcome) -> Condition {
    let BindingOutcome { generation, gateway, refused } = binding;
    match refused {
        Some((reason, text)) => condition(WAYPOINT_BOUND, false, reason, text.as_str(), *generation),
        None => {
            let told = format!("bound to waypoint {gateway}");
            condition(WAYPOINT_BOUND, true, "WaypointAccepted", told, *generation)
        }
    }
}

/// A policy is accepted when nothing of it is an error.
fn accepted(problems: &[Problem], key: &ObjectKey, generation: i64) -> Condition {
    let name = key.to_string();
    let mine = problems.iter().filter(|problem| problem.object == name && problem.severity > Severity::Info);
    let mine: Vec<&Problem> = mine.collect();
    let legacy = super::accepted(mine);
    Condition {
        kind: legacy.kind,
        status: if legacy.status == "True" { Truth::True } else { Truth::False },
        reason: legacy.reason,
        message: legacy.message,
        observed_generation: generation,
    }
}

#[cfg(test)]
mod tests;
