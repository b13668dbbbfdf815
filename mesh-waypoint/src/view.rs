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
    model::{Backend, BackendTarget, Listener},
    route::{self, RequestHead, Table},
    snapshot::Snapshot,
};
use mesh_net::clock::Chance;

use crate::{dial::Endpoint, metrics::Party, record::Record};

/// One port of one service, ready to route.
#[derive(Debug)]
pub struct Bound {
    /// As configured.
    pub listener: Listener,
    /// Compiled routes; `None` when the configuration could not be compiled: requests are refused.
    pub table: Option<Table>,
}

/// Where a request goes.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The endpoint.
    pub endpoint: Endpoint,
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
    node: Arc<str>,
    ready: bool,
}

/// Which Gateway object a waypoint serves.
#[derive(Clone, Debug, PartialEq, Eq)]
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
                _ => {
                    let table = route::compile(listener)
                        .inspect_err(|error| {
                            problems.push(format!("{} port {}: {error}", listener.service, listener.port));
                        })
                        .ok();
                    Arc::new(Bound { listener: listener.clone(), table })
                }
            };
            listeners.extend(addresses.map(|at| (at, bound.clone())));
        }
        (Self { snapshot, listeners, node: gateway.node.clone(), ready }, problems)
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
    ) -> Result<Choice, Unroutable> {
        let bound = self.bound(authority)?;
        let listener = &bound.listener;
        self.note_service(listener, record);
        let table = bound
            .table
            .as_ref()
            .ok_or_else(|| Unroutable::NoBackend("the routes of this service cannot be compiled".into()))?;
        if listener.routes.is_empty() {
            let backend = BackendTarget {
                service: listener.service.clone(),
                port: listener.port,
                subject_alt_names: Vec::new(),
            };
            record.cluster = format!("inbound-vip|{}|http|{}", backend.port, backend.service.hostname);
            let endpoint = self.endpoint(&backend, authority.ip(), chance, record)?;
            return Ok(Choice { endpoint, request_timeout: None, backend_timeout: None });
        }
        let matched = table.matched(head).ok_or(Unroutable::NoRoute)?;
        let (route, rule) =
            (&listener.routes[matched.route], &listener.routes[matched.route].rules[matched.rule]);
        record.route = format!("{}/{}.{}", route.namespace, route.name, matched.rule);
        let backend = pick_backend(&rule.backends, chance.next())?;
        record.cluster = format!("outbound|{}||{}", backend.port, backend.service.hostname);
        let endpoint = self.endpoint(backend, authority.ip(), chance, record)?;
        Ok(Choice { endpoint, request_timeout: rule.request_timeout, backend_timeout: rule.backend_timeout })
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
        let listener = &self.bound(authority)?.listener;
        self.note_service(listener, record);
        let backend = BackendTarget {
            service: listener.service.clone(),
            port: listener.port,
            subject_alt_names: Vec::new(),
        };
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
        let candidates = balance::candidates(&self.snapshot, service, backend.port, &self.node, dialled);
        let weights = candidates.iter().map(|candidate| candidate.weight);
        let index = balance::weighted(weights, chance.next()).ok_or_else(none)?;
        let Candidate { workload, target: address, weight: _ } = &candidates[index];
        let endpoint = Endpoint {
            workload: workload.clone(),
            address: *address,
            service: backend.service.clone(),
            subject_alt_names: [&backend.subject_alt_names[..], &service.subject_alt_names].concat(),
        };
        record.upstream = Some(*address);
        record.subject.destination =
            Party { workload: Some(workload.clone()), identity: Some(workload.identity()) };
        Ok(endpoint)
    }
}

/// One of the backends by weight.
fn pick_backend(backends: &[Backend], pick: u64) -> Result<&BackendTarget, Unroutable> {
    let index = balance::weighted(backends.iter().map(|backend| backend.weight), pick)
        .ok_or_else(|| Unroutable::NoBackend("no backend with a weight above zero".into()))?;
    backends[index].target.as_ref().map_err(|why| Unroutable::NoBackend(why.clone()))
}
