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

/// Which object a route was written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum RouteKind {
    /// HTTPRoute.
    Http,
    /// GRPCRoute: a service and method are the path `/service/method`.
    Grpc,
}

/// One HTTPRoute or GRPCRoute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Route {
    /// Which of the two.
    pub kind: RouteKind,
    /// Namespace of the object.
    pub namespace: Arc<str>,
    /// Name of the object.
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
    /// Name of the rule, where it has one.
    pub name: Option<Arc<str>>,
    /// OR; never empty (Gateway API defaults to the path prefix `/`).
    pub matches: Vec<RequestMatch>,
    /// What is done to its requests and responses.
    pub filters: Filters,
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
    /// What is done to requests of this share, and their responses, beside the rule's filters.
    pub filters: Filters,
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
    /// It speaks HTTP/2 with prior knowledge, whatever the client speaks; else it is spoken to as the client speaks.
    pub http2: bool,
    /// Identities accepted beside each endpoint's own.
    pub subject_alt_names: Vec<Identity>,
}

/// Changes to requests and responses; each kind at most once, as in the Gateway API.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Filters {
    /// Header fields towards the application.
    pub request: HeaderEdit,
    /// Header fields towards the client.
    pub response: HeaderEdit,
    /// The request goes to another host or path.
    pub rewrite: Option<Rewrite>,
    /// The client is sent elsewhere: there is no upstream.
    pub redirect: Option<Redirect>,
}

/// What is done to header fields, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HeaderEdit {
    /// Taken away; lower case.
    pub remove: Vec<Arc<str>>,
    /// Name in lower case and value; replaces all values.
    pub set: Vec<(Arc<str>, Arc<str>)>,
    /// Name in lower case and value; beside other values.
    pub add: Vec<(Arc<str>, Arc<str>)>,
}

impl HeaderEdit {
    /// Whether it does nothing.
    pub fn is_empty(&self) -> bool {
        let Self { remove, set, add } = self;
        remove.is_empty() && set.is_empty() && add.is_empty()
    }
}

/// `URLRewrite`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Rewrite {
    /// The new authority.
    pub hostname: Option<Arc<str>>,
    /// The new path.
    pub path: Option<PathEdit>,
}

/// `RequestRedirect`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Redirect {
    /// `http` or `https`; `None` = the request's.
    pub scheme: Option<Arc<str>>,
    /// `None` = the request's.
    pub hostname: Option<Arc<str>>,
    /// `None` = the request's.
    pub path: Option<PathEdit>,
    /// `None` = the scheme's, or the listener's.
    pub port: Option<u16>,
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
}

/// A change of a path; the query stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum PathEdit {
    /// The whole path.
    Full(Arc<str>),
    /// The prefix that the rule matched.
    Prefix(Arc<str>),
}
