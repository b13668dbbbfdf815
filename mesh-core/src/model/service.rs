//! A service: a name and addresses in front of workloads.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use serde::Serialize;

use super::workload::WaypointRef;
use crate::id::{Identity, ServiceKey};

/// One port of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct ServicePort {
    /// Port that clients dial.
    pub port: u16,
    /// Port of the endpoints; 0 = each endpoint has its own (named target port).
    pub target: u16,
}

/// An address besides the VIPs at which one port of a service is reached: a node port, a load balancer's address, an
/// external IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Front {
    /// What clients dial.
    pub at: SocketAddr,
    /// The service's port behind it.
    pub port: u16,
}

/// Which clients see a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum Visibility {
    /// Everyone.
    #[default]
    Public,
    /// Clients of the same namespace.
    Namespace,
}

/// How an endpoint is chosen (`wire-protocol.md` 3.2).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum LoadBalancing {
    /// By weight over all endpoints.
    #[default]
    All,
    /// Only endpoints of the client's own node (`internalTrafficPolicy: Local`).
    SameNode,
    /// No selection: the original destination.
    Passthrough,
}

/// A service as WDS describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Service {
    /// `namespace/hostname`.
    pub key: ServiceKey,
    /// Name of the Kubernetes object.
    pub name: Arc<str>,
    /// Virtual addresses of the default network.
    pub vips: Vec<IpAddr>,
    /// Other addresses, each for one port.
    pub fronts: Vec<Front>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// Server identities that are accepted beside the endpoint's own.
    pub subject_alt_names: Vec<Identity>,
    /// Service waypoint: calls addressed to a VIP pass it.
    pub waypoint: Option<WaypointRef>,
    /// How an endpoint is chosen.
    pub load_balancing: LoadBalancing,
    /// A client keeps its endpoint (`sessionAffinity: ClientIP`) for this long after its last new connection.
    pub sticky: Option<Duration>,
    /// Unhealthy endpoints take connections too (`publishNotReadyAddresses`).
    pub allow_unhealthy: bool,
    /// A real Kubernetes service; wins ties between services that share an address.
    pub canonical: bool,
    /// Who sees it.
    pub visibility: Visibility,
}
