//! L7 configuration of one waypoint: which service ports it serves and how requests are routed.

use std::{net::IpAddr, sync::Arc, time::Duration};

use serde::Serialize;

use crate::id::{Identity, ServiceKey};

/// Everything one waypoint needs besides addresses and policies. Resource name: `namespace/gateway`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WaypointConfig {
    /// Namespace of the Gateway object.
    pub namespace: Arc<str>,
    /// Name of the Gateway object.
    pub name: Arc<str>,
    /// One per service and port that is bound to the waypoint.
    pub listeners: Vec<Listener>,
}

/// One port of one service behind the waypoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listener {
    /// The bound service.
    pub service: ServiceKey,
    /// Its virtual addresses: the authority of an incoming CONNECT is `vip:port`.
    pub vips: Vec<IpAddr>,
    /// Service port.
    pub port: u16,
    /// True when the port speaks HTTP; else its bytes are carried as they are.
    pub http: bool,
    /// Routes attached to the service (port), already merged; none: requests go to the service itself.
    pub routes: Vec<Route>,
}

/// One HTTPRoute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Route {
    /// Namespace of the HTTPRoute object.
    pub namespace: Arc<str>,
    /// Name of the HTTPRoute object.
    pub name: Arc<str>,
    /// Creation time in seconds since the epoch; the older route wins ties.
    pub created: i64,
    /// Host names; empty = all. `*.` prefix = one or more labels.
    pub hostnames: Vec<Arc<str>>,
    /// Rules in the order of the object.
    pub rules: Vec<RouteRule>,
}

/// One rule: any match, then backends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RouteRule {
    /// OR; never empty (Gateway API defaults to the path prefix `/`).
    pub matches: Vec<RequestMatch>,
    /// By weight; empty or all zero: 500 (`semantics.md` D9).
    pub backends: Vec<Backend>,
    /// `timeouts.request`: whole exchange; `None` = no limit.
    pub request_timeout: Option<Duration>,
    /// `timeouts.backendRequest`: one try; `None` = no limit.
    pub backend_timeout: Option<Duration>,
}

/// All parts must hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RequestMatch {
    /// Path.
    pub path: PathMatch,
    /// Upper-case method; `None` = any.
    pub method: Option<Arc<str>>,
    /// AND.
    pub headers: Vec<HeaderMatch>,
    /// AND; query parameters.
    pub query: Vec<HeaderMatch>,
}

/// How a path is compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum PathMatch {
    /// Equal.
    Exact(Arc<str>),
    /// By path element: `/foo` matches `/foo` and `/foo/x`, not `/foobar`.
    Prefix(Arc<str>),
    /// Whole string, linear-time syntax.
    Regex(Arc<str>),
}

/// One header or query parameter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HeaderMatch {
    /// Header names are lower case, query parameters are as written.
    pub name: Arc<str>,
    /// The value.
    pub value: ValueMatch,
}

/// How a value is compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum ValueMatch {
    /// Equal.
    Exact(Arc<str>),
    /// Whole string, linear-time syntax.
    Regex(Arc<str>),
}

/// One destination of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Backend {
    /// Share of the sum of weights.
    pub weight: u32,
    /// Where to; `Err` = reference that cannot be resolved: its share answers 500.
    pub target: Result<BackendTarget, Arc<str>>,
}

/// A resolved backend: the endpoints of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackendTarget {
    /// The service.
    pub service: ServiceKey,
    /// Its service port.
    pub port: u16,
    /// Identities accepted beside each endpoint's own.
    pub subject_alt_names: Vec<Identity>,
}
