//! (pure) The L7 configuration of every waypoint: a listener per bound service port, routes attached, backends found.

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::{
    id::ServiceKey,
    model::{Backend, BackendTarget, Listener, Route, RouteKind, RouteRule, Service, WaypointConfig},
    proto::TYPE_WAYPOINT,
};

use super::{
    Output,
    binding::Bound,
    index::{Entry, Index, Name},
    outcome::{ParentOutcome, ParentRefusal, RouteOutcome},
};
use crate::{
    source::Severity,
    status::object::ParentRef,
    translate::{
        route::{BackendFacts, BackendFault, Broken, Parent, ParentKind, RouteFacts, RuleFacts},
        service::{PortFacts, Protocol},
    },
};

/// Routes of each `(service, port)`.
type ByPort = BTreeMap<(Name, u16), Vec<Route>>;

/// Compiles every waypoint's configuration; one without services is there too, so that the waypoint can be ready.
pub fn waypoints(
    index: &Index<'_>,
    bound: &Bound,
    services: &BTreeMap<ServiceKey, Arc<Service>>,
    out: &mut Output,
) -> BTreeMap<Arc<str>, Arc<WaypointConfig>> {
    let mut attached = ByPort::new();
    for route in &index.routes {
        attach(index, bound, route, &mut attached, out);
    }
    let mut configs = BTreeMap::new();
    for (gateway, entry) in &index.waypoints {
        let name: Arc<str> = format!("{}/{}", gateway.0, gateway.1).into();
        let mut listeners = Vec::new();
        let own = bound.iter().filter(|(_, binding)| binding.gateway.as_ref() == Some(gateway));
        for (service, _) in own.filter(|(service, _)| !out.closed.contains(*service)) {
            let Some(facts) = index.services.get(service).map(|entry| entry.facts) else { continue };
            let key = index.service_key(&service.0, &service.1);
            let vips = services.get(&key).map(|service| service.vips.clone()).unwrap_or_default();
            for port in &facts.ports {
                let routes = attached.get(&(service.clone(), port.port)).cloned().unwrap_or_default();
                let http = match port.protocol {
                    Protocol::Http => true,
                    Protocol::Tcp => false,
                    // By a route of the service's own side; one of another namespace speaks for its own clients alone,
                    // which the waypoint tells apart.
                    Protocol::Undeclared => routes.iter().any(|route| route.namespace == service.0),
                };
                listeners.push(Listener {
                    service: key.clone(),
                    vips: vips.clone(),
                    port: port.port,
                    http,
                    routes,
                });
            }
        }
        out.carry(&entry.object.key, TYPE_WAYPOINT, name.clone());
        let config = WaypointConfig { namespace: gateway.0.clone(), name: gateway.1.clone(), listeners };
        configs.insert(name, Arc::new(config));
    }
    configs
}

/// One service behind a waypoint that a route is for, and the waypoint.
type Place = (Name, Name);

fn attach(
    index: &Index<'_>,
    bound: &Bound,
    route: &Entry<'_, RouteFacts>,
    attached: &mut ByPort,
    out: &mut Output,
) {
    let (resolved, unresolved) = resolve(index, route, out);
    let mut outcome = RouteOutcome {
        generation: route.object.generation,
        unresolved,
        invalid_rules: invalid_rules(route.facts),
        parents: Vec::new(),
    };
    for parent in &route.facts.parents {
        // The Gateways of others are not ours to judge.
        let name = (parent.namespace.clone(), parent.name.clone());
        if parent.kind == ParentKind::Gateway && index.gateways.contains_key(&name) {
            continue;
        }
        let placed = match (&route.facts.rejected, parent.kind) {
            (Some(reason), _) => Err((ParentRefusal::UnsupportedValue, reason.to_string())),
            (None, ParentKind::Service) => service_parent(index, bound, parent),
            (None, ParentKind::Gateway) => gateway_parent(index, bound, route, parent),
        };
        let placed = placed.and_then(|places| place(index, parent, &resolved, places, attached));
        let mut waypoints = std::collections::BTreeSet::new();
        let refused = match placed {
            Ok(gateways) => {
                waypoints.extend(gateways.iter().map(|(ns, name)| Arc::from(format!("{ns}/{name}"))));
                None
            }
            Err((refusal, text)) => {
                // What makes it inert was told with its field.
                if route.facts.rejected.is_none() {
                    let told = format!("{}: {text}", refusal.reason());
                    out.tell(Severity::Error, route.of(), &parent.field, told);
                }
                Some((refusal, text))
            }
        };
        for config in &waypoints {
            out.carry(&route.object.key, TYPE_WAYPOINT, Arc::clone(config));
        }
        outcome.parents.push(ParentOutcome { parent: reference(parent), refused, waypoints });
    }
    out.outcomes.routes.insert(route.object.key.clone(), outcome);
}

/// The parent as its status names it, defaults filled in.
fn reference(parent: &Parent) -> ParentRef {
    let (group, kind) = match parent.kind {
        ParentKind::Service => ("", "Service"),
        ParentKind::Gateway => ("gateway.networking.k8s.io", "Gateway"),
    };
    ParentRef {
        group: group.into(),
        kind: kind.into(),
        namespace: parent.namespace.clone(),
        name: parent.name.clone(),
        section_name: parent.section.clone(),
        port: parent.port,
    }
}

/// What cannot be done as written, first of it, and whether nothing of the route can.
fn invalid_rules(facts: &RouteFacts) -> Option<(String, bool)> {
    let of_rules: Vec<_> = facts.rules.iter().filter_map(|rule| rule.filters.as_ref().err()).collect();
    let of_backends = facts.rules.iter().flat_map(|rule| &rule.backends).filter_map(|backend| {
        let broken = backend.target.as_ref().err()?;
        (broken.fault == BackendFault::UnsupportedValue)
            .then(|| format!("{}: {}", backend.field, broken.text))
    });
    let first = of_rules.first().map(ToString::to_string).or_else(|| of_backends.into_iter().next())?;
    Some((first, of_rules.len() == facts.rules.len()))
}

/// Puts the route on the ports that the parent means, or, where it is refused, on none; the waypoints that carry it.
fn place(
    index: &Index<'_>,
    parent: &Parent,
    resolved: &Route,
    places: Vec<Place>,
    attached: &mut ByPort,
) -> Result<Vec<Name>, (ParentRefusal, String)> {
    let of_service = parent.kind == ParentKind::Service;
    // The port and section of a Gateway are its listener's, and mean every port behind it.
    let meant = |port: &PortFacts| {
        !of_service
            || (parent.port.is_none_or(|wanted| wanted == port.port)
                && parent.section.as_ref().is_none_or(|wanted| *wanted == port.name))
    };
    let (mut placed, mut refused) = (Vec::new(), None);
    for (service, gateway) in places {
        let Some(facts) = index.services.get(&service).map(|entry| entry.facts) else { continue };
        let mut found = false;
        for port in facts.ports.iter().filter(|port| meant(port)) {
            found = true;
            if port.protocol == Protocol::Tcp {
                let text =
                    format!("port {} is declared as something else than HTTP: not attached", port.port);
                refused.get_or_insert((ParentRefusal::NoMatchingParent, text));
                continue;
            }
            let at = (service.clone(), port.port);
            let mut there = attached.get(&at).into_iter().flatten();
            if let Some(other) = there.find(|other| conflict(other, resolved)) {
                let text = format!(
                    "{}/{} is older, of the other kind, and has the same hostnames",
                    other.namespace, other.name
                );
                refused.get_or_insert((ParentRefusal::Conflicted, text));
                continue;
            }
            placed.push((at, gateway.clone()));
        }
        if !found && of_service {
            let text = format!("Service {}/{} has no such port", service.0, service.1);
            return Err((ParentRefusal::NoMatchingParent, text));
        }
    }
    match refused {
        // Ports that cannot take it are passed over while others do, unless they are what was asked for.
        Some(refused) if placed.is_empty() && of_service => return Err(refused),
        Some(refused @ (ParentRefusal::Conflicted, _)) => return Err(refused),
        _ => {}
    }
    let mut carriers = Vec::new();
    for (at, gateway) in placed {
        let routes = attached.entry(at).or_default();
        // Two parents of one route may mean the same port.
        if !routes.contains(resolved) {
            routes.push(resolved.clone());
        }
        carriers.push(gateway);
    }
    Ok(carriers)
}

/// Whether two routes are of different kinds for the same clients and hostnames: only the older one counts.
fn conflict(older: &Route, younger: &Route) -> bool {
    let overlap = |a: &str, b: &str| match (a.strip_prefix('*'), b.strip_prefix('*')) {
        (None, None) => a == b,
        (Some(suffix), None) => b.ends_with(suffix),
        (None, Some(suffix)) => a.ends_with(suffix),
        (Some(one), Some(other)) => one.ends_with(other) || other.ends_with(one),
    };
    older.kind != younger.kind
        && older.namespace == younger.namespace
        && (older.hostnames.is_empty()
            || younger.hostnames.is_empty()
            || older.hostnames.iter().any(|a| younger.hostnames.iter().any(|b| overlap(a, b))))
}

/// A Service that is bound to a waypoint. A route of another namespace is for the clients of that one (consumer route).
fn service_parent(
    index: &Index<'_>,
    bound: &Bound,
    parent: &Parent,
) -> Result<Vec<Place>, (ParentRefusal, String)> {
    let service = (parent.namespace.clone(), parent.name.clone());
    if !index.services.contains_key(&service) {
        let text = format!("there is no Service {}/{}", service.0, service.1);
        return Err((ParentRefusal::NoMatchingParent, text));
    }
    match bound.get(&service).map(|binding| &binding.gateway) {
        Some(Some(gateway)) => Ok(vec![(service, gateway.clone())]),
        Some(None) => {
            let text = "the Service's waypoint cannot be used, so the route has no effect".to_owned();
            Err((ParentRefusal::WaypointUnavailable, text))
        }
        None => {
            let text = "the Service is bound to no waypoint, so the route has no effect".to_owned();
            Err((ParentRefusal::AncestorNotBound, text))
        }
    }
}

/// All services of the route's own namespace behind a waypoint: a route never catches another namespace's traffic.
fn gateway_parent(
    index: &Index<'_>,
    bound: &Bound,
    route: &Entry<'_, RouteFacts>,
    parent: &Parent,
) -> Result<Vec<Place>, (ParentRefusal, String)> {
    let name = (parent.namespace.clone(), parent.name.clone());
    let Some(gateway) = index.waypoints.get(&name) else {
        let text = format!("there is no waypoint Gateway {}/{}", name.0, name.1);
        return Err((ParentRefusal::NoMatchingParent, text));
    };
    let facts = gateway.facts;
    let listener = facts.listeners.iter().find(|listener| listener.serves);
    let sectioned = parent
        .section
        .as_ref()
        .is_none_or(|wanted| listener.is_some_and(|listener| listener.name == *wanted));
    if parent.port.is_some_and(|port| port != facts.port) || !sectioned {
        let text = format!("Gateway {}/{} has no such listener", name.0, name.1);
        return Err((ParentRefusal::NoMatchingParent, text));
    }
    let own = name.0 == *route.namespace();
    if !facts.allowed.admits(own, index.namespace(route.namespace())) {
        let text = "allowedRoutes of the Gateway do not admit this namespace".to_owned();
        return Err((ParentRefusal::NotAllowedByListeners, text));
    }
    if listener.is_some_and(|listener| !listener.kinds.contains(&route.facts.kind)) {
        let text = "allowedRoutes of the Gateway do not admit this kind".to_owned();
        return Err((ParentRefusal::NotAllowedByListeners, text));
    }
    let behind = bound.iter().filter(|(service, binding)| {
        service.0 == *route.namespace() && binding.gateway.as_ref() == Some(&name)
    });
    Ok(behind.map(|(service, _)| (service.clone(), name.clone())).collect())
}

/// The first backend that cannot be served.
type Unresolved = Option<(BackendFault, String)>;

fn resolve(index: &Index<'_>, route: &Entry<'_, RouteFacts>, out: &mut Output) -> (Route, Unresolved) {
    let RouteFacts { kind, rejected: _, parents: _, hostnames, rules } = route.facts;
    let mut unresolved = None;
    let rules = rules.iter().map(|rule| {
        let RuleFacts { name, matches, filters, backends, request_timeout, backend_timeout } = rule;
        RouteRule {
            name: name.clone(),
            matches: matches.clone(),
            filters: filters.clone().unwrap_or_default(),
            backends: backends
                .iter()
                .map(|backend| backend_of(index, route, backend, &mut unresolved, out))
                .collect(),
            request_timeout: *request_timeout,
            backend_timeout: *backend_timeout,
        }
    });
    let resolved = Route {
        kind: *kind,
        namespace: route.namespace().clone(),
        name: route.name().clone(),
        created: route.object.created,
        hostnames: hostnames.clone(),
        rules: rules.collect(),
    };
    (resolved, unresolved)
}

/// A backend that cannot be found keeps its share, which is answered with 500.
fn backend_of(
    index: &Index<'_>,
    route: &Entry<'_, RouteFacts>,
    backend: &BackendFacts,
    unresolved: &mut Unresolved,
    out: &mut Output,
) -> Backend {
    let BackendFacts { field, weight, filters, target } = backend;
    let found = target.clone().and_then(|(namespace, name, port)| {
        target_of(index, route, namespace, name, port).inspect_err(|Broken { fault, text }| {
            let told = format!("{}: {text}: its share of the requests is answered with 500", fault.reason());
            out.tell(Severity::Error, route.of(), field, told);
        })
    });
    if let Err(Broken { fault, text }) = &found
        && *fault != BackendFault::UnsupportedValue
    {
        unresolved.get_or_insert_with(|| (*fault, format!("{field}: {text}")));
    }
    let target = found.map_err(|Broken { fault, text }| format!("{}: {text}", fault.reason()).into());
    Backend { weight: *weight, filters: filters.clone(), target }
}

fn target_of(
    index: &Index<'_>,
    route: &Entry<'_, RouteFacts>,
    namespace: Arc<str>,
    name: Arc<str>,
    port: u16,
) -> Result<BackendTarget, Broken> {
    let broken = |fault: BackendFault, text: String| Err(Broken { fault, text: text.into() });
    // What a consumer's clients asked for anyway needs nobody's permission.
    let parent = |parent: &Parent| {
        parent.kind == ParentKind::Service && parent.namespace == namespace && parent.name == name
    };
    let permitted = index.granted(route.facts.kind, route.namespace(), &namespace, &name)
        || route.facts.parents.iter().any(parent);
    if !permitted {
        let text = format!("no ReferenceGrant in {namespace} lets this route refer to Service {name}");
        return broken(BackendFault::RefNotPermitted, text);
    }
    let Some(service) = index.services.get(&(namespace.clone(), name.clone())) else {
        return broken(BackendFault::BackendNotFound, format!("there is no Service {namespace}/{name}"));
    };
    let Some(declared) = service.facts.ports.iter().find(|candidate| candidate.port == port) else {
        let text = format!("Service {namespace}/{name} has no port {port}");
        return broken(BackendFault::BackendNotFound, text);
    };
    Ok(BackendTarget {
        service: index.service_key(&namespace, &name),
        port,
        // Whatever the port is declared as: gRPC is HTTP/2.
        http2: declared.http2 || route.facts.kind == RouteKind::Grpc,
        subject_alt_names: Vec::new(),
    })
}
