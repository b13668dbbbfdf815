//! What the mesh is, free of Kubernetes and protobuf. One fragment per file.

pub mod local;
pub mod options;
pub mod policy;
pub mod route;
pub mod service;
pub mod workload;

pub use local::{Enrolment, LocalPod};
pub use options::{MeshOptions, OutboundMode};
pub use policy::{Action, Clause, Match, Policy, Rule, Scope, StringMatch};
pub use route::{
    Backend, BackendTarget, Filters, HeaderEdit, HeaderMatch, Listener, PathEdit, PathMatch, Redirect,
    RequestMatch, Rewrite, Route, RouteKind, RouteRule, ValueMatch, WaypointConfig,
};
pub use service::{Front, LoadBalancing, Service, ServicePort, Visibility};
pub use workload::{Health, Locality, NetworkMode, PortMap, TunnelProtocol, WaypointRef, Workload};
