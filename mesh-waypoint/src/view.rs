//! What one waypoint serves, seen at one moment: its listeners compiled, over the snapshot that they came with. Pure.
//!
//! A request takes one [`View`] and finishes with it, so it never sees a half-changed table.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use mesh_core::{
    balance::{self, Candidate},
    flag,
    id::{Identity, ServiceKey},
    model::{
        Backend, BackendTarget, Listener, PathMatch, Redirect, Rewrite, Route, RouteRule, WaypointRef,
        Workload,
    },
    rewrite::{self, Origin},
    route::{self, Matched, RequestHead, Table, Verdict},
    snapshot::Snapshot,
};
use mesh_net::clock::Chance;

use crate::{
    dial::Endpoint,
    http::filters::{self, Compiled, RuleFilters},
    metrics::Party,
    record::Record,
};

/// One port of one service, ready to route.
#[derive(Debug)]
pub struct Bound {
    /// As configured.
    pub listener: Listener,
    /// Compiled routes, or why the configuration cannot be compiled: requests are refused then.
    pub table: Result<Table, String>,
    /// Compiled filters, by index of route and rule.
    pub filters: Vec<Vec<RuleFilters>>,
}

impl Bound {
    fn new(listener: &Listener) -> Self {
        let compiled = route::compile(listener)
            .map_err(|error| error.to_string())
            .and_then(|table| Ok((table, filters::compile(listener)?)));
        let (table, filters) = match compiled {
            Ok((table, filters)) => (Ok(table), filters),
            Err(problem) => (Err(problem), Vec::new()),
        };
        Self { listener: listener.clone(), table, filters }
    }

    /// Whether clients of this namespace speak HTTP here: all do, or a route of their own says so (consumer route).
    pub fn is_http_for(&self, client: &str) -> bool {
        let Listener { http, service, routes, .. } = &self.listener;
        let own = |route: &Route| route.namespace != service.namespace && *route.namespace == *client;
        *http || routes.iter().any(own)
    }
}

/// The rule that a request fell under, and the backend that was drawn.
#[derive(Clone, Debug)]
pub struct Routed {
    bound: Arc<Bound>,
    matched: Matched,
    /// `None` until one was drawn.
    backend: Option<usize>,
}

impl Routed {
    fn rule(&self) -> &RouteRule {
        &self.bound.listener.routes[self.matched.route].rules[self.matched.rule]
    }

    fn backend(&self) -> Option<&Backend> {
        self.backend.and_then(|index| self.rule().backends.get(index))
    }

    /// Header changes in the order in which they apply: the backend's, then the rule's.
    pub fn filters(&self) -> impl Iterator<Item = &Compiled> {
        let rule = &self.bound.filters[self.matched.route][self.matched.rule];
        let backend = self.backend.and_then(|index| rule.backends.get(index));
        backend.into_iter().chain([&rule.rule])
    }

    /// The nearest rewrite, and the path match that it refers to.
    pub fn rewrite(&self) -> Option<(&Rewrite, &PathMatch)> {
        let own = self.backend().and_then(|backend| backend.filters.rewrite.as_ref());
        let rewrite = own.or(self.rule().filters.rewrite.as_ref())?;
        Some((rewrite, self.path()))
    }

    fn path(&self) -> &PathMatch {
        &self.rule().matches[self.matched.item].path
    }

    fn redirected(self, redirect: &Redirect, head: &RequestHead<'_>) -> Redirected {
        let port = self.bound.listener.port;
        let from = Origin { scheme: "http", host: head.host, path: head.path, query: head.query, port };
        let location = rewrite::location(redirect, self.path(), &from);
        Redirected { status: redirect.status, location, routed: self }
    }
}

/// Where a client is sent.
#[derive(Clone, Debug)]
pub struct Redirected {
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
    /// The new location.
    pub location: String,
    /// The rule that says so.
    pub routed: Routed,
}

/// What becomes of a request.
#[derive(Clone, Debug)]
pub enum Chosen {
    /// It goes to an endpoint.
    Upstream(Box<Choice>),
    /// Its client goes elsewhere.
    Redirect(Box<Redirected>),
}

/// Where a request goes.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// The endpoint speaks HTTP/2, whatever the client speaks.
    pub http2: bool,
    /// By which rule; `None` where the service has no routes.
    pub routed: Option<Routed>,
    /// Whole exchange.
    pub request_timeout: Option<Duration>,
    /// One try.
    pub backend_timeout: Option<Duration>,
}

/// Why a request or connection has nowhere to go.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unroutable {
    /// The control plane has not told yet what this waypoint serves.
    #[error("no configuration yet")]
    NotReady,
    /// No service port of this waypoint has that address.
    #[error("no service port of this waypoint has the address that was dialled")]
    NoListener,
    /// The service has routes and none of them matches.
    #[error("no route matches")]
    NoRoute,
    /// The rule has no backend that may be used.
    #[error("no usable backend: {0}")]
    NoBackend(Arc<str>),
    /// The backend has no endpoint that can take the request.
    #[error("no healthy endpoint of {0}")]
    NoEndpoint(ServiceKey),
}

impl Unroutable {
    /// The mesh's code.
    pub fn flag(&self) -> flag::Flag {
        match self {
            Self::NotReady => flag::Flag::WaypointUnavailable,
            Self::NoListener | Self::NoRoute | Self::NoBackend(_) => flag::Flag::IllegalAuthority,
            Self::NoEndpoint(_) => flag::Flag::NoHealthyUpstream,
        }
    }
}

/// The waypoint's world at one moment.
#[derive(Debug, Default)]
pub struct View {
    snapshot: Arc<Snapshot>,
    listeners: HashMap<SocketAddr, Arc<Bound>>,
    gateway: Gateway,
    ready: bool,
}

/// What an authority stands for.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// A port of a bound service.
    Service(&'a Arc<Bound>),
    /// A bound workload.
    Workload(&'a Arc<Workload>),
}

/// Which Gateway object a waypoint serves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gateway {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// The node that this waypoint runs on: services with `internalTrafficPolicy: Local` mean that one.
    pub node: Arc<str>,
}

impl View {
    /// Before the control plane has answered: refuses everything.
    pub fn not_ready() -> Self {
        Self::default()
    }

    /// Compiles what `gateway` serves out of `snapshot`; listeners that did not change are taken from `before`.
    ///
    /// Returns the problems beside the view: the listener that has one refuses its requests.
    pub fn new(snapshot: Arc<Snapshot>, gateway: &Gateway, before: &Self) -> (Self, Vec<String>) {
        let mut listeners = HashMap::new();
        let mut problems = Vec::new();
        let own = snapshot
            .waypoints()
            .find(|config| config.namespace == gateway.namespace && config.name == gateway.name);
        // Without its own configuration a waypoint knows nothing about what it is for.
        let ready = own.is_some();
        for listener in own.into_iter().flat_map(|config| &config.listeners) {
            let addresses = listener.vips.iter().map(|vip| SocketAddr::new(*vip, listener.port));
            let known = addresses.clone().find_map(|at| before.listeners.get(&at));
            let bound = match known {
                Some(bound) if bound.listener == *listener => bound.clone(),
                _ => Arc::new(Bound::new(listener)),
            };
            if let Err(problem) = &bound.table {
                problems.push(format!("{} port {}: {problem}", listener.service, listener.port));
            }
            listeners.extend(addresses.map(|at| (at, bound.clone())));
        }
        (Self { snapshot, listeners, gateway: gateway.clone(), ready }, problems)
    }

    /// The service port that was dialled.
    ///
    /// # Errors
    /// [`Unroutable::NotReady`], [`Unroutable::NoListener`].
    pub fn bound(&self, authority: SocketAddr) -> Result<&Arc<Bound>, Unroutable> {
        match self.listeners.get(&authority) {
            Some(bound) => Ok(bound),
            None if self.ready => Err(Unroutable::NoListener),
            None => Err(Unroutable::NotReady),
        }
    }

    /// What was dialled: a service port, or a workload that is bound to this waypoint (`istio.io/waypoint-for`).
    ///
    /// Routes are for services: what is addressed to a workload is carried to that very one.
    ///
    /// # Errors
    /// [`Unroutable::NotReady`], [`Unroutable::NoListener`].
    pub fn target(&self, authority: SocketAddr) -> Result<Target<'_>, Unroutable> {
        self.bound(authority).map(Target::Service).or_else(|why| {
            let workload =
                self.snapshot.workload_by_ip(authority.ip()).filter(|workload| self.binds(workload));
            workload.filter(|_| self.ready).map(Target::Workload).ok_or(why)
        })
    }

    /// Whether a workload is bound to the Gateway that this waypoint serves.
    fn binds(&self, workload: &Workload) -> bool {
        let Some(WaypointRef::Service { service, port: _ }) = &workload.waypoint else { return false };
        let service = self.snapshot.service(service);
        service.is_some_and(|service| {
            service.key.namespace == self.gateway.namespace && service.name == self.gateway.name
        })
    }

    /// The workload that was dialled, as the endpoint of its own traffic.
    fn itself(&self, workload: &Arc<Workload>, address: SocketAddr, record: &mut Record) -> Endpoint {
        record.cluster = format!("inbound-vip|{}|tcp|{}", address.port(), workload.name);
        record.upstream = Some(address);
        record.subject.destination =
            Party { workload: Some(workload.clone()), identity: Some(workload.identity()) };
        Endpoint { workload: workload.clone(), address, service: None, subject_alt_names: Vec::new() }
    }

    /// Whether the control plane has told what to serve.
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// The snapshot underneath.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Every service port, for the admin endpoint.
    pub fn listeners(&self) -> impl Iterator<Item = (&SocketAddr, &Arc<Bound>)> + Clone {
        self.listeners.iter()
    }

    /// The client for telemetry: the workload at its address, believed only when the proven identity is that
    /// workload's.
    pub fn client(&self, identity: &Identity, address: IpAddr) -> Party {
        let workload =
            self.snapshot.workload_by_ip(address).filter(|workload| workload.identity() == *identity);
        Party { workload: workload.cloned(), identity: Some(identity.clone()) }
    }

    /// Route, backend and endpoint of one request, noted in `record` as far as it comes.
    ///
    /// # Errors
    /// [`Unroutable`] tells how far it came.
    pub fn choose(
        &self,
        authority: SocketAddr,
        head: &RequestHead<'_>,
        chance: &Chance,
        record: &mut Record,
    ) -> Result<Chosen, Unroutable> {
        let bound = self.bound(authority)?;
        let listener = &bound.listener;
        self.note_service(listener, record);
        let table = bound
            .table
            .as_ref()
            .map_err(|_| Unroutable::NoBackend("the routes of this service cannot be compiled".into()))?;
        let matched = match table.judge(head) {
            Verdict::Matched(matched) => matched,
            Verdict::NoMatch => return Err(Unroutable::NoRoute),
            Verdict::Unrouted => {
                let backend = own_backend(listener);
                record.cluster = format!("inbound-vip|{}|http|{}", backend.port, backend.service.hostname);
                let endpoint = self.endpoint(&backend, authority.ip(), chance, record)?;
                let (request_timeout, backend_timeout) = (None, None);
                let choice =
                    Choice { endpoint, http2: false, routed: None, request_timeout, backend_timeout };
                return Ok(Chosen::Upstream(Box::new(choice)));
            }
        };
        let routed = Routed { bound: bound.clone(), matched, backend: None };
        let route = &listener.routes[matched.route];
        let rule = &route.rules[matched.rule];
        record.route = match &rule.name {
            Some(name) => format!("{}/{}.{name}", route.namespace, route.name),
            None => format!("{}/{}.{}", route.namespace, route.name, matched.rule),
        };
        if let Some(redirect) = &rule.filters.redirect {
            return Ok(Chosen::Redirect(Box::new(routed.redirected(redirect, head))));
        }
        let index = pick_backend(&rule.backends, chance.next())?;
        let backend = &rule.backends[index];
        let routed = Routed { backend: Some(index), ..routed };
        if let Some(redirect) = &backend.filters.redirect {
            return Ok(Chosen::Redirect(Box::new(routed.redirected(redirect, head))));
        }
        let target = backend.target.as_ref().map_err(|why| Unroutable::NoBackend(why.clone()))?;
        record.cluster = format!("outbound|{}||{}", target.port, target.service.hostname);
        Ok(Chosen::Upstream(Box::new(Choice {
            endpoint: self.endpoint(target, authority.ip(), chance, record)?,
            http2: target.http2,
            routed: Some(routed),
            request_timeout: rule.request_timeout,
            backend_timeout: rule.backend_timeout,
        })))
    }

    /// The endpoint of a connection that is not HTTP.
    ///
    /// # Errors
    /// [`Unroutable`].
    pub fn endpoint_of(
        &self,
        authority: SocketAddr,
        chance: &Chance,
        record: &mut Record,
    ) -> Result<Endpoint, Unroutable> {
        let bound = match self.target(authority)? {
            Target::Service(bound) => bound,
            Target::Workload(workload) => return Ok(self.itself(workload, authority, record)),
        };
        let listener = &bound.listener;
        self.note_service(listener, record);
        let backend = own_backend(listener);
        record.cluster = format!("inbound-vip|{}|tcp|{}", backend.port, backend.service.hostname);
        self.endpoint(&backend, authority.ip(), chance, record)
    }

    fn note_service(&self, listener: &Listener, record: &mut Record) {
        record.subject.service = Some(listener.service.clone());
        record.subject.described = self.snapshot.service(&listener.service).cloned();
    }

    /// One endpoint of a backend, by weight; the family that the client `dialled` is preferred where the endpoint has
    /// both.
    fn endpoint(
        &self,
        backend: &BackendTarget,
        dialled: IpAddr,
        chance: &Chance,
        record: &mut Record,
    ) -> Result<Endpoint, Unroutable> {
        let none = || Unroutable::NoEndpoint(backend.service.clone());
        let service = self.snapshot.service(&backend.service).ok_or_else(none)?;
        let candidates =
            balance::candidates(&self.snapshot, service, backend.port, &self.gateway.node, dialled);
        let weights = candidates.iter().map(|candidate| candidate.weight);
        let index = balance::weighted(weights, chance.next()).ok_or_else(none)?;
        let Candidate { workload, target: address, weight: _ } = &candidates[index];
        let endpoint = Endpoint {
            workload: workload.clone(),
            address: *address,
            service: Some(backend.service.clone()),
            subject_alt_names: [&backend.subject_alt_names[..], &service.subject_alt_names].concat(),
        };
        record.upstream = Some(*address);
        record.subject.destination =
            Party { workload: Some(workload.clone()), identity: Some(workload.identity()) };
        Ok(endpoint)
    }
}

/// The service itself.
fn own_backend(listener: &Listener) -> BackendTarget {
    BackendTarget {
        service: listener.service.clone(),
        port: listener.port,
        http2: false,
        subject_alt_names: Vec::new(),
    }
}

/// Index of one of the backends, by weight.
fn pick_backend(backends: &[Backend], pick: u64) -> Result<usize, Unroutable> {
    balance::weighted(backends.iter().map(|backend| backend.weight), pick)
        .ok_or_else(|| Unroutable::NoBackend("no backend with a weight above zero".into()))
}

#[cfg(test)]
mod tests {
    use mesh_core::model::RouteKind;

    use super::*;

    #[test]
    fn a_route_of_a_clients_own_namespace_makes_a_port_http_for_that_client_alone() {
        let route = |namespace: &str| Route {
            kind: RouteKind::Http,
            namespace: namespace.into(),
            name: "r".into(),
            created: 0,
            hostnames: Vec::new(),
            rules: Vec::new(),
        };
        let bound = |http, routes| {
            let service = ServiceKey::new("shop", "db");
            Bound::new(&Listener { service, vips: Vec::new(), port: 5432, http, routes })
        };
        let undeclared = bound(false, vec![route("bank")]);
        assert!(undeclared.is_http_for("bank"));
        assert!(!undeclared.is_http_for("shop") && !undeclared.is_http_for("else"));
        let declared = bound(true, vec![route("shop")]);
        assert!(declared.is_http_for("shop") && declared.is_http_for("else"));
    }
}
