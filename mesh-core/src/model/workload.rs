//! A workload: one pod, or one address that is not a pod.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use serde::Serialize;

use crate::id::{Identity, PolicyKey, ServiceKey, WorkloadKey};

/// How a workload is reached (WDS `tunnel_protocol`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum TunnelProtocol {
    /// Plain TCP: not in the mesh.
    #[default]
    None,
    /// HBONE on port 15008.
    Hbone,
}

/// Whether a workload takes new connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum Health {
    /// Ready.
    #[default]
    Healthy,
    /// Not ready or terminating.
    Unhealthy,
}

/// Whether the workload has an address of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum NetworkMode {
    /// Its addresses are its own.
    #[default]
    Standard,
    /// It shares the node's addresses: never found by address (`wire-protocol.md` O11).
    HostNetwork,
}

/// Where a workload runs, for locality preferences.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Locality {
    /// The region, may be empty.
    pub region: Arc<str>,
    /// The zone, may be empty.
    pub zone: Arc<str>,
    /// The subzone, may be empty.
    pub subzone: Arc<str>,
}

/// Service port to target port for one service (WDS `PortList`); target 0 means unknown.
pub type PortMap = BTreeMap<u16, u16>;

/// The proxy that L7 traffic for a service or workload must pass (WDS `GatewayAddress`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum WaypointRef {
    /// By the waypoint's service.
    Service {
        /// Its service.
        service: ServiceKey,
        /// Its HBONE port.
        port: u16,
    },
    /// By an address of it.
    Address {
        /// Address of a service or workload.
        address: IpAddr,
        /// Its HBONE port.
        port: u16,
    },
}

/// A workload as WDS describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Workload {
    /// Unique key.
    pub uid: WorkloadKey,
    /// Pod name.
    pub name: Arc<str>,
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Own addresses, never v4-mapped.
    pub addresses: Vec<IpAddr>,
    /// Network name; empty is the default network.
    pub network: Arc<str>,
    /// How it is reached.
    pub tunnel: TunnelProtocol,
    /// Trust domain, never empty.
    pub trust_domain: Arc<str>,
    /// Service account, never empty.
    pub service_account: Arc<str>,
    /// Workload waypoint: calls addressed to the workload itself pass it.
    pub waypoint: Option<WaypointRef>,
    /// Kubernetes node.
    pub node: Arc<str>,
    /// Canonical service name, for telemetry.
    pub canonical_name: Arc<str>,
    /// Canonical revision, for telemetry.
    pub canonical_revision: Arc<str>,
    /// Controller name, for telemetry.
    pub workload_name: Arc<str>,
    /// The workload terminates HBONE itself (waypoints and gateways).
    pub native_tunnel: bool,
    /// Policies bound to it by selector.
    pub policies: Vec<PolicyKey>,
    /// Whether it takes new connections.
    pub health: Health,
    /// It is being deleted and still serves: taken where a service has no healthy endpoint.
    pub leaving: bool,
    /// Cluster.
    pub cluster: Arc<str>,
    /// Services that it is an endpoint of, with their port mapping.
    pub services: BTreeMap<ServiceKey, PortMap>,
    /// Where it runs.
    pub locality: Locality,
    /// Whether its addresses are its own.
    pub network_mode: NetworkMode,
    /// Load-balancing weight; 0 never.
    pub capacity: u32,
}

impl Workload {
    /// The identity that this workload proves in TLS.
    pub fn identity(&self) -> Identity {
        Identity {
            trust_domain: self.trust_domain.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
        }
    }
}
