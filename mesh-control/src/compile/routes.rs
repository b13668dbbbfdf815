//! (pure) The L7 configuration of every waypoint: a listener per bound service port, routes attached, backends found.

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::{
    id::ServiceKey,
    model::{Backend, BackendTarget, Listener, Route, RouteRule, Service, WaypointConfig},
    proto::TYPE_WAYPOINT,
};

use super::{
    Output,
    binding::Bound,
    index::{Entry, Index, Name},
};
use crate::{
    source::Severity,
    translate::{
        route::{BackendFacts, Parent, ParentKind, RouteFacts, RuleFacts},
        service::Protocol,
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
                    Protocol::Undeclared => !routes.is_empty(),
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

fn attach(
    index: &Index<'_>,
    bound: &Bound,
    route: &Entry<'_, RouteFacts>,
    attached: &mut ByPort,
    out: &mut Output,
) {
    let resolved = resolve(index, route, out);
    for parent in &route.facts.parents {
        let services = match parent.kind {
            ParentKind::Service => service_parent(index, bound, route, parent, out),
            ParentKind::Gateway => gateway_parent(index, bound, route, parent, out),
        };
        for (service, gateway) in services {
            let Some(facts) = index.services.get(&service).map(|entry| entry.facts) else { continue };
            // The port of a Gateway is that of its listener, and means every port behind it.
            let wanted = parent.port.filter(|_| parent.kind == ParentKind::Service);
            let mut ports =
                facts.ports.iter().filter(|port| wanted.is_none_or(|wanted| wanted == port.port)).peekable();
            if ports.peek().is_none() && parent.kind == ParentKind::Service {
                let reason =
                    format!("NoMatchingParent: Service {}/{} has no such port", service.0, service.1);
                out.tell(Severity::Error, route.of(), &format!("{}.port", parent.field), reason);
            }
            for port in ports {
                if port.protocol == Protocol::Tcp {
                    if wanted.is_some() {
                        let reason = "the port is declared as something else than HTTP: not attached";
                        out.tell(Severity::Warning, route.of(), &format!("{}.port", parent.field), reason);
                    }
                    continue;
                }
                let routes = attached.entry((service.clone(), port.port)).or_default();
                // Two parents of one route may mean the same port.
                if !routes.contains(&resolved) {
                    routes.push(resolved.clone());
                }
                let config = format!("{}/{}", gateway.0, gateway.1);
                out.carry(&route.object.key, TYPE_WAYPOINT, config.into());
            }
        }
    }
}

/// A Service of the route's own namespace, bound to a waypoint.
fn service_parent(
    index: &Index<'_>,
    bound: &Bound,
    route: &Entry<'_, RouteFacts>,
    parent: &Parent,
    out: &mut Output,
) -> Vec<(Name, Name)> {
    let service = (parent.namespace.clone(), parent.name.clone());
    let refused = if parent.namespace != *route.namespace() {
        "NotSupported: a route for a Service of another namespace (consumer route) cannot be honoured at the \
         Service's waypoint: not attached"
            .to_owned()
    } else if !index.services.contains_key(&service) {
        format!("NoMatchingParent: there is no Service {}/{}", service.0, service.1)
    } else {
        match bound.get(&service).map(|binding| &binding.gateway) {
            Some(Some(gateway)) => return vec![(service, gateway.clone())],
            Some(None) => "the Service's waypoint cannot be used, so the route has no effect".to_owned(),
            None => "the Service is bound to no waypoint, so the route has no effect".to_owned(),
        }
    };
    out.tell(Severity::Error, route.of(), &parent.field, refused);
    Vec::new()
}

/// All services of the route's own namespace behind a waypoint: a route never catches another namespace's traffic.
fn gateway_parent(
    index: &Index<'_>,
    bound: &Bound,
    route: &Entry<'_, RouteFacts>,
    parent: &Parent,
    out: &mut Output,
) -> Vec<(Name, Name)> {
    let name = (parent.namespace.clone(), parent.name.clone());
    let Some(gateway) = index.waypoints.get(&name) else {
        let reason = format!("NoMatchingParent: there is no waypoint Gateway {}/{}", name.0, name.1);
        out.tell(Severity::Error, route.of(), &parent.field, reason);
        return Vec::new();
    };
    if parent.port.is_some_and(|port| port != gateway.facts.port) {
        let reason = format!("NoMatchingParent: Gateway {}/{} has no listener of that port", name.0, name.1);
        out.tell(Severity::Error, route.of(), &format!("{}.port", parent.field), reason);
        return Vec::new();
    }
    let own = name.0 == *route.namespace();
    if !gateway.facts.allowed.admits(own, index.namespace(route.namespace())) {
        let reason = "NotAllowedByListeners: allowedRoutes of the Gateway do not admit this namespace";
        out.tell(Severity::Error, route.of(), &parent.field, reason);
        return Vec::new();
    }
    let behind = bound.iter().filter(|(service, binding)| {
        service.0 == *route.namespace() && binding.gateway.as_ref() == Some(&name)
    });
    behind.map(|(service, _)| (service.clone(), name.clone())).collect()
}

fn resolve(index: &Index<'_>, route: &Entry<'_, RouteFacts>, out: &mut Output) -> Route {
    let RouteFacts { parents: _, hostnames, rules } = route.facts;
    let rules = rules.iter().map(|rule| {
        let RuleFacts { matches, backends, request_timeout, backend_timeout } = rule;
        RouteRule {
            matches: matches.clone(),
            backends: backends.iter().map(|backend| backend_of(index, route, backend, out)).collect(),
            request_timeout: *request_timeout,
            backend_timeout: *backend_timeout,
        }
    });
    Route {
        namespace: route.namespace().clone(),
        name: route.name().clone(),
        created: route.object.created,
        hostnames: hostnames.clone(),
        rules: rules.collect(),
    }
}

/// A backend that cannot be found keeps its share, which is answered with 500.
fn backend_of(
    index: &Index<'_>,
    route: &Entry<'_, RouteFacts>,
    backend: &BackendFacts,
    out: &mut Output,
) -> Backend {
    let BackendFacts { field, weight, target } = backend;
    let target = target.clone().and_then(|(namespace, name, port)| {
        let missing = || match index.services.get(&(namespace.clone(), name.clone())) {
            None => Some(format!("BackendNotFound: there is no Service {namespace}/{name}")),
            Some(service) if !service.facts.ports.iter().any(|candidate| candidate.port == port) => {
                Some(format!("BackendNotFound: Service {namespace}/{name} has no port {port}"))
            }
            Some(_) => None,
        };
        let reason = if index.granted(route.namespace(), &namespace, &name) {
            missing()
        } else {
            Some(format!(
                "RefNotPermitted: no ReferenceGrant in {namespace} lets this route refer to Service {name}"
            ))
        };
        match reason {
            None => {
                let service = index.service_key(&namespace, &name);
                Ok(BackendTarget { service, port, subject_alt_names: Vec::new() })
            }
            Some(reason) => {
                let told = format!("{reason}: its share of the requests is answered with 500");
                out.tell(Severity::Error, route.of(), field, told);
                Err(reason.into())
            }
        }
    });
    Backend { weight: *weight, target }
}
