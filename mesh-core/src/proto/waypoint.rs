//! `undermesh.waypoint.v1` (ours): L7 configuration of one waypoint.
#![expect(missing_docs, reason = "fields are those of model::route")]

use std::{sync::Arc, time::Duration};

use super::{Malformed, each, ip, ip_bytes, port};
use crate::{
    id::{Identity, ServiceKey},
    model::{self, route::BackendTarget},
};

mod filters;

pub use filters::{Field, Filters, HeaderEdit, PathEdit, Redirect, Rewrite, path_edit};

#[derive(Clone, PartialEq, prost::Message)]
pub struct WaypointConfig {
    #[prost(string, tag = "1")]
    pub namespace: String,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(message, repeated, tag = "3")]
    pub listeners: Vec<Listener>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Listener {
    /// `namespace/hostname`.
    #[prost(string, tag = "1")]
    pub service: String,
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub vips: Vec<Vec<u8>>,
    #[prost(uint32, tag = "3")]
    pub port: u32,
    #[prost(bool, tag = "4")]
    pub http: bool,
    #[prost(message, repeated, tag = "5")]
    pub routes: Vec<Route>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Route {
    #[prost(string, tag = "1")]
    pub namespace: String,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(int64, tag = "3")]
    pub created: i64,
    #[prost(string, repeated, tag = "4")]
    pub hostnames: Vec<String>,
    #[prost(message, repeated, tag = "5")]
    pub rules: Vec<RouteRule>,
    #[prost(bool, tag = "6")]
    pub grpc: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct RouteRule {
    #[prost(message, repeated, tag = "1")]
    pub matches: Vec<RequestMatch>,
    #[prost(message, repeated, tag = "2")]
    pub backends: Vec<Backend>,
    #[prost(uint64, optional, tag = "3")]
    pub request_timeout_ms: Option<u64>,
    #[prost(uint64, optional, tag = "4")]
    pub backend_timeout_ms: Option<u64>,
    #[prost(message, optional, tag = "5")]
    pub filters: Option<Filters>,
    #[prost(string, optional, tag = "6")]
    pub name: Option<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct RequestMatch {
    #[prost(oneof = "request_match::Path", tags = "1, 2, 3")]
    pub path: Option<request_match::Path>,
    #[prost(string, optional, tag = "4")]
    pub method: Option<String>,
    #[prost(message, repeated, tag = "5")]
    pub headers: Vec<HeaderMatch>,
    #[prost(message, repeated, tag = "6")]
    pub query: Vec<HeaderMatch>,
}

pub mod request_match {
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Path {
        #[prost(string, tag = "1")]
        Exact(String),
        #[prost(string, tag = "2")]
        Prefix(String),
        #[prost(string, tag = "3")]
        Regex(String),
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct HeaderMatch {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(oneof = "header_match::Value", tags = "2, 3")]
    pub value: Option<header_match::Value>,
}

pub mod header_match {
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Value {
        #[prost(string, tag = "2")]
        Exact(String),
        #[prost(string, tag = "3")]
        Regex(String),
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Backend {
    #[prost(uint32, tag = "1")]
    pub weight: u32,
    #[prost(oneof = "backend::Target", tags = "2, 3")]
    pub target: Option<backend::Target>,
    #[prost(message, optional, tag = "4")]
    pub filters: Option<Filters>,
}

pub mod backend {
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Target {
        #[prost(message, tag = "2")]
        Service(super::ServiceTarget),
        /// Why the reference cannot be resolved.
        #[prost(string, tag = "3")]
        Invalid(String),
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct ServiceTarget {
    /// `namespace/hostname`.
    #[prost(string, tag = "1")]
    pub service: String,
    #[prost(uint32, tag = "2")]
    pub port: u32,
    #[prost(string, repeated, tag = "3")]
    pub subject_alt_names: Vec<String>,
    #[prost(bool, tag = "4")]
    pub http2: bool,
}

fn service_key(text: &str) -> Result<ServiceKey, Malformed> {
    ServiceKey::parse(text)
        .ok_or_else(|| Malformed::new("service", format!("{text:?} is not namespace/hostname")))
}

fn strings(list: Vec<String>) -> Vec<Arc<str>> {
    list.into_iter().map(Arc::from).collect()
}

impl TryFrom<WaypointConfig> for model::WaypointConfig {
    type Error = Malformed;

    fn try_from(message: WaypointConfig) -> Result<Self, Malformed> {
        let WaypointConfig { namespace, name, listeners } = message;
        if namespace.is_empty() || name.is_empty() {
            return Err(Malformed::new("name", "namespace and name must not be empty"));
        }
        Ok(Self {
            namespace: namespace.into(),
            name: name.into(),
            listeners: each("listeners", listeners, listener)?,
        })
    }
}

fn listener(message: Listener) -> Result<model::Listener, Malformed> {
    let Listener { service, vips, port: number, http, routes } = message;
    Ok(model::Listener {
        service: service_key(&service)?,
        vips: each("vips", vips, |bytes| ip(&bytes))?,
        port: port(number).map_err(|error| error.within("port"))?,
        http,
        routes: each("routes", routes, route)?,
    })
}

fn route(message: Route) -> Result<model::Route, Malformed> {
    let Route { namespace, name, created, hostnames, rules, grpc } = message;
    Ok(model::Route {
        kind: if grpc { model::RouteKind::Grpc } else { model::RouteKind::Http },
        namespace: namespace.into(),
        name: name.into(),
        created,
        hostnames: strings(hostnames),
        rules: each("rules", rules, rule)?,
    })
}

fn rule(message: RouteRule) -> Result<model::RouteRule, Malformed> {
    let RouteRule { matches, backends, request_timeout_ms, backend_timeout_ms, filters, name } = message;
    if matches.is_empty() {
        return Err(Malformed::new("matches", "must not be empty"));
    }
    Ok(model::RouteRule {
        name: name.map(Arc::from),
        filters: filters_of(filters)?,
        matches: each("matches", matches, request_match)?,
        backends: each("backends", backends, backend)?,
        request_timeout: request_timeout_ms.map(Duration::from_millis),
        backend_timeout: backend_timeout_ms.map(Duration::from_millis),
    })
}

fn filters_of(filters: Option<Filters>) -> Result<model::Filters, Malformed> {
    let filters = filters.map(model::Filters::try_from).transpose();
    Ok(filters.map_err(|error| error.within("filters"))?.unwrap_or_default())
}

/// No message where there is nothing to do.
fn filters_message(filters: &model::Filters) -> Option<Filters> {
    (*filters != model::Filters::default()).then(|| filters.into())
}

fn request_match(message: RequestMatch) -> Result<model::RequestMatch, Malformed> {
    let RequestMatch { path, method, headers, query } = message;
    Ok(model::RequestMatch {
        path: match path {
            Some(request_match::Path::Exact(text)) => model::PathMatch::Exact(text.into()),
            Some(request_match::Path::Prefix(text)) => model::PathMatch::Prefix(text.into()),
            Some(request_match::Path::Regex(text)) => model::PathMatch::Regex(text.into()),
            None => return Err(Malformed::new("path", "no kind of match that is known")),
        },
        method: method.map(Arc::from),
        headers: each("headers", headers, value_match)?,
        query: each("query", query, value_match)?,
    })
}

fn value_match(message: HeaderMatch) -> Result<model::HeaderMatch, Malformed> {
    let HeaderMatch { name, value } = message;
    Ok(model::HeaderMatch {
        name: name.into(),
        value: match value {
            Some(header_match::Value::Exact(text)) => model::ValueMatch::Exact(text.into()),
            Some(header_match::Value::Regex(text)) => model::ValueMatch::Regex(text.into()),
            None => return Err(Malformed::new("value", "no kind of match that is known")),
        },
    })
}

fn backend(message: Backend) -> Result<model::Backend, Malformed> {
    let Backend { weight, target, filters } = message;
    let target = match target {
        Some(backend::Target::Service(ServiceTarget { service, port: number, subject_alt_names, http2 })) => {
            let identity =
                |text: String| Identity::parse(&text).map_err(|error| Malformed::new("", error.to_string()));
            Ok(BackendTarget {
                service: service_key(&service)?,
                port: port(number).map_err(|error| error.within("port"))?,
                http2,
                subject_alt_names: each("subject_alt_names", subject_alt_names, identity)?,
            })
        }
        Some(backend::Target::Invalid(why)) => Err(why.into()),
        None => return Err(Malformed::new("target", "no kind of target that is known")),
    };
    Ok(model::Backend { weight, filters: filters_of(filters)?, target })
}

impl From<&model::WaypointConfig> for WaypointConfig {
    fn from(config: &model::WaypointConfig) -> Self {
        let model::WaypointConfig { namespace, name, listeners } = config;
        Self {
            namespace: namespace.to_string(),
            name: name.to_string(),
            listeners: listeners.iter().map(Listener::from).collect(),
        }
    }
}

impl From<&model::Listener> for Listener {
    fn from(listener: &model::Listener) -> Self {
        let model::Listener { service, vips, port, http, routes } = listener;
        Self {
            service: service.to_string(),
            vips: vips.iter().map(|vip| ip_bytes(*vip)).collect(),
            port: u32::from(*port),
            http: *http,
            routes: routes.iter().map(Route::from).collect(),
        }
    }
}

impl From<&model::Route> for Route {
    fn from(route: &model::Route) -> Self {
        let model::Route { kind, namespace, name, created, hostnames, rules } = route;
        Self {
            grpc: *kind == model::RouteKind::Grpc,
            namespace: namespace.to_string(),
            name: name.to_string(),
            created: *created,
            hostnames: hostnames.iter().map(|host| host.to_string()).collect(),
            rules: rules.iter().map(RouteRule::from).collect(),
        }
    }
}

/// Milliseconds; a time beyond the range is as good as none.
fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl From<&model::RouteRule> for RouteRule {
    fn from(rule: &model::RouteRule) -> Self {
        let model::RouteRule { name, matches, filters, backends, request_timeout, backend_timeout } = rule;
        Self {
            name: name.as_ref().map(ToString::to_string),
            filters: filters_message(filters),
            matches: matches.iter().map(RequestMatch::from).collect(),
            backends: backends.iter().map(Backend::from).collect(),
            request_timeout_ms: request_timeout.map(milliseconds),
            backend_timeout_ms: backend_timeout.map(milliseconds),
        }
    }
}

impl From<&model::RequestMatch> for RequestMatch {
    fn from(item: &model::RequestMatch) -> Self {
        let model::RequestMatch { path, method, headers, query } = item;
        Self {
            path: Some(match path {
                model::PathMatch::Exact(text) => request_match::Path::Exact(text.to_string()),
                model::PathMatch::Prefix(text) => request_match::Path::Prefix(text.to_string()),
                model::PathMatch::Regex(text) => request_match::Path::Regex(text.to_string()),
            }),
            method: method.as_ref().map(|method| method.to_string()),
            headers: headers.iter().map(HeaderMatch::from).collect(),
            query: query.iter().map(HeaderMatch::from).collect(),
        }
    }
}

impl From<&model::HeaderMatch> for HeaderMatch {
    fn from(item: &model::HeaderMatch) -> Self {
        let model::HeaderMatch { name, value } = item;
        Self {
            name: name.to_string(),
            value: Some(match value {
                model::ValueMatch::Exact(text) => header_match::Value::Exact(text.to_string()),
                model::ValueMatch::Regex(text) => header_match::Value::Regex(text.to_string()),
            }),
        }
    }
}

impl From<&model::Backend> for Backend {
    fn from(backend: &model::Backend) -> Self {
        let model::Backend { weight, filters, target } = backend;
        let target = match target {
            Ok(BackendTarget { service, port, http2, subject_alt_names }) => {
                backend::Target::Service(ServiceTarget {
                    service: service.to_string(),
                    port: u32::from(*port),
                    http2: *http2,
                    subject_alt_names: subject_alt_names.iter().map(Identity::to_string).collect(),
                })
            }
            Err(why) => backend::Target::Invalid(why.to_string()),
        };
        Self { weight: *weight, filters: filters_message(filters), target: Some(target) }
    }
}
