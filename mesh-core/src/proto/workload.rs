//! `istio.workload` (`wire-protocol.md` 5.6).
#![expect(missing_docs, reason = "fields are Istio's, described in wire-protocol.md 5.6")]

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use super::{Malformed, each, ip, ip_bytes, port};
use crate::{
    delta::Change,
    id::{Identity, PolicyKey, ServiceKey, WorkloadKey},
    model::{
        self, Health, LoadBalancing, NetworkMode, PortMap, ServicePort, TunnelProtocol, Visibility,
        WaypointRef,
    },
    tunnel::HBONE_PORT,
};

#[derive(Clone, PartialEq, prost::Message)]
pub struct Address {
    #[prost(oneof = "address::Type", tags = "1, 2")]
    pub r#type: Option<address::Type>,
}

pub mod address {
    #[expect(clippy::large_enum_variant, reason = "the shape is the wire's; values live for one conversion")]
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Type {
        #[prost(message, tag = "1")]
        Workload(super::Workload),
        #[prost(message, tag = "2")]
        Service(super::Service),
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Service {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub namespace: String,
    #[prost(string, tag = "3")]
    pub hostname: String,
    #[prost(message, repeated, tag = "4")]
    pub addresses: Vec<NetworkAddress>,
    #[prost(message, repeated, tag = "5")]
    pub ports: Vec<Port>,
    #[prost(string, repeated, tag = "6")]
    pub subject_alt_names: Vec<String>,
    #[prost(message, optional, tag = "7")]
    pub waypoint: Option<GatewayAddress>,
    #[prost(message, optional, tag = "8")]
    pub load_balancing: Option<LoadBalancingMessage>,
    #[prost(int32, tag = "9")]
    pub ip_families: i32,
    #[prost(bool, tag = "11")]
    pub canonical: bool,
    #[prost(int32, tag = "14")]
    pub visibility: i32,
    /// Ours: `model::Service::fronts`.
    #[prost(message, repeated, tag = "1001")]
    pub fronts: Vec<FrontMessage>,
    /// Ours: `model::Service::sticky` in seconds; 0: none.
    #[prost(uint32, tag = "1003")]
    pub sticky_seconds: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct FrontMessage {
    #[prost(bytes = "vec", tag = "1")]
    pub address: Vec<u8>,
    #[prost(uint32, tag = "2")]
    pub port: u32,
    #[prost(uint32, tag = "3")]
    pub service_port: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct LoadBalancingMessage {
    #[prost(int32, repeated, tag = "1")]
    pub routing_preference: Vec<i32>,
    #[prost(int32, tag = "2")]
    pub mode: i32,
    #[prost(int32, tag = "3")]
    pub health_policy: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Workload {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub namespace: String,
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub addresses: Vec<Vec<u8>>,
    #[prost(string, tag = "4")]
    pub network: String,
    #[prost(int32, tag = "5")]
    pub tunnel_protocol: i32,
    #[prost(string, tag = "6")]
    pub trust_domain: String,
    #[prost(string, tag = "7")]
    pub service_account: String,
    #[prost(message, optional, tag = "8")]
    pub waypoint: Option<GatewayAddress>,
    #[prost(string, tag = "9")]
    pub node: String,
    #[prost(string, tag = "10")]
    pub canonical_name: String,
    #[prost(string, tag = "11")]
    pub canonical_revision: String,
    #[prost(int32, tag = "12")]
    pub workload_type: i32,
    #[prost(string, tag = "13")]
    pub workload_name: String,
    #[prost(bool, tag = "14")]
    pub native_tunnel: bool,
    #[prost(string, repeated, tag = "16")]
    pub authorization_policies: Vec<String>,
    #[prost(int32, tag = "17")]
    pub status: i32,
    #[prost(string, tag = "18")]
    pub cluster_id: String,
    #[prost(string, tag = "20")]
    pub uid: String,
    #[prost(map = "string, message", tag = "22")]
    pub services: HashMap<String, PortList>,
    #[prost(message, optional, tag = "24")]
    pub locality: Option<Locality>,
    #[prost(int32, tag = "25")]
    pub network_mode: i32,
    /// `google.protobuf.UInt32Value`.
    #[prost(message, optional, tag = "27")]
    pub capacity: Option<u32>,
    /// Ours: `model::Workload::leaving`.
    #[prost(bool, tag = "1001")]
    pub leaving: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Locality {
    #[prost(string, tag = "1")]
    pub region: String,
    #[prost(string, tag = "2")]
    pub zone: String,
    #[prost(string, tag = "3")]
    pub subzone: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct PortList {
    #[prost(message, repeated, tag = "1")]
    pub ports: Vec<Port>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Port {
    #[prost(uint32, tag = "1")]
    pub service_port: u32,
    #[prost(uint32, tag = "2")]
    pub target_port: u32,
    #[prost(int32, tag = "3")]
    pub app_protocol: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct GatewayAddress {
    #[prost(oneof = "gateway_address::Destination", tags = "1, 2")]
    pub destination: Option<gateway_address::Destination>,
    #[prost(uint32, tag = "3")]
    pub hbone_mtls_port: u32,
}

pub mod gateway_address {
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Destination {
        #[prost(message, tag = "1")]
        Hostname(super::NamespacedHostname),
        #[prost(message, tag = "2")]
        Address(super::NetworkAddress),
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct NetworkAddress {
    #[prost(string, tag = "1")]
    pub network: String,
    #[prost(bytes = "vec", tag = "2")]
    pub address: Vec<u8>,
    #[prost(uint32, optional, tag = "3")]
    pub length: Option<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct NamespacedHostname {
    #[prost(string, tag = "1")]
    pub namespace: String,
    #[prost(string, tag = "2")]
    pub hostname: String,
}

/// `Scope.NODE`.
const SCOPE_NODE: i32 = 4;
/// `Mode.STRICT`.
const MODE_STRICT: i32 = 1;
/// `Mode.PASSTHROUGH`.
const MODE_PASSTHROUGH: i32 = 3;

impl TryFrom<Address> for Change {
    type Error = Malformed;

    fn try_from(message: Address) -> Result<Self, Malformed> {
        match message.r#type {
            Some(address::Type::Workload(workload)) => Ok(Self::Workload(Arc::new(workload.try_into()?))),
            Some(address::Type::Service(service)) => Ok(Self::Service(Arc::new(service.try_into()?))),
            None => Err(Malformed::new("type", "neither a workload nor a service")),
        }
    }
}

/// A choice out of an enumeration: an unknown number rejects the resource.
fn choice<T>(field: &str, number: i32, known: &[(i32, T)]) -> Result<T, Malformed>
where
    T: Clone,
{
    let found = known.iter().find(|(value, _)| *value == number).map(|(_, meaning)| meaning.clone());
    found.ok_or_else(|| Malformed::new(field, format!("unknown value {number}")))
}

fn or(text: String, default: &str) -> Arc<str> {
    if text.is_empty() { default.into() } else { text.into() }
}

fn required(field: &str, text: String) -> Result<String, Malformed> {
    if text.is_empty() { Err(Malformed::new(field, "must not be empty")) } else { Ok(text) }
}

impl TryFrom<GatewayAddress> for WaypointRef {
    type Error = Malformed;

    fn try_from(message: GatewayAddress) -> Result<Self, Malformed> {
        let GatewayAddress { destination, hbone_mtls_port } = message;
        let port = if hbone_mtls_port == 0 {
            HBONE_PORT
        } else {
            port(hbone_mtls_port).map_err(|error| error.within("hbone_mtls_port"))?
        };
        match destination {
            Some(gateway_address::Destination::Hostname(NamespacedHostname { namespace, hostname })) => {
                let (namespace, hostname) =
                    (required("namespace", namespace)?, required("hostname", hostname)?);
                Ok(Self::Service { service: ServiceKey::new(&namespace, &hostname), port })
            }
            Some(gateway_address::Destination::Address(address)) => {
                Ok(Self::Address { address: host(address).map_err(|error| error.within("address"))?, port })
            }
            None => Err(Malformed::new("destination", "missing")),
        }
    }
}

impl From<&WaypointRef> for GatewayAddress {
    fn from(waypoint: &WaypointRef) -> Self {
        let (destination, port) = match waypoint {
            WaypointRef::Service { service, port } => (
                gateway_address::Destination::Hostname(NamespacedHostname {
                    namespace: service.namespace.to_string(),
                    hostname: service.hostname.to_string(),
                }),
                port,
            ),
            WaypointRef::Address { address, port } => (
                gateway_address::Destination::Address(NetworkAddress {
                    network: String::new(),
                    address: ip_bytes(*address),
                    length: None,
                }),
                port,
            ),
        };
        Self { destination: Some(destination), hbone_mtls_port: u32::from(*port) }
    }
}

/// A host address of the default network; ranges are not supported and rejected.
fn host(message: NetworkAddress) -> Result<std::net::IpAddr, Malformed> {
    let NetworkAddress { network, address, length } = message;
    if !network.is_empty() {
        return Err(Malformed::new("network", format!("network {network:?} is not ours")));
    }
    let full = address.len() * 8;
    if length.is_some_and(|length| length as usize != full) {
        return Err(Malformed::new("length", "ranges of addresses are not supported"));
    }
    ip(&address).map_err(|error| error.within("address"))
}

fn service_port(message: Port) -> Result<ServicePort, Malformed> {
    // The application protocol is a hint that L4 ignores (W5).
    let Port { service_port, target_port, app_protocol: _ } = message;
    let target = u16::try_from(target_port)
        .map_err(|_| Malformed::new("target_port", format!("{target_port} is no port")))?;
    Ok(ServicePort { port: port(service_port).map_err(|error| error.within("service_port"))?, target })
}

impl TryFrom<Service> for model::Service {
    type Error = Malformed;

    fn try_from(message: Service) -> Result<Self, Malformed> {
        let Service {
            name,
            namespace,
            hostname,
            addresses,
            ports,
            subject_alt_names,
            waypoint,
            load_balancing,
            ip_families,
            canonical,
            visibility,
            fronts,
            sticky_seconds,
        } = message;
        choice("ip_families", ip_families, &[(0, ()), (1, ()), (2, ()), (3, ())])?;
        let (load_balancing, allow_unhealthy) = match load_balancing {
            Some(message) => balancing(message).map_err(|error| error.within("load_balancing"))?,
            None => (LoadBalancing::All, false),
        };
        let identity = |text: String| {
            Identity::parse(&text).map_err(|error| Malformed::new("", format!("{error}: {text:?}")))
        };
        Ok(Self {
            key: ServiceKey::new(&required("namespace", namespace)?, &required("hostname", hostname)?),
            name: name.into(),
            vips: each("addresses", addresses, host)?,
            fronts: each("fronts", fronts, front)?,
            sticky: (sticky_seconds > 0).then(|| Duration::from_secs(sticky_seconds.into())),
            ports: each("ports", ports, service_port)?,
            subject_alt_names: each("subject_alt_names", subject_alt_names, identity)?,
            waypoint: waypoint
                .map(WaypointRef::try_from)
                .transpose()
                .map_err(|error| error.within("waypoint"))?,
            load_balancing,
            allow_unhealthy,
            canonical,
            visibility: choice(
                "visibility",
                visibility,
                &[(0, Visibility::Public), (1, Visibility::Namespace)],
            )?,
        })
    }
}

fn front(message: FrontMessage) -> Result<model::Front, Malformed> {
    let FrontMessage { address, port: dialled, service_port } = message;
    let ip = ip(&address).map_err(|error| error.within("address"))?;
    Ok(model::Front {
        at: SocketAddr::new(ip.to_canonical(), port(dialled).map_err(|error| error.within("port"))?),
        port: port(service_port).map_err(|error| error.within("service_port"))?,
    })
}

fn front_message(front: &model::Front) -> FrontMessage {
    let model::Front { at, port } = front;
    FrontMessage { address: ip_bytes(at.ip()), port: at.port().into(), service_port: u32::from(*port) }
}

fn balancing(message: LoadBalancingMessage) -> Result<(LoadBalancing, bool), Malformed> {
    let LoadBalancingMessage { routing_preference, mode, health_policy } = message;
    for (index, scope) in routing_preference.iter().enumerate() {
        choice(
            &format!("routing_preference[{index}]"),
            *scope,
            &[1, 2, 3, 4, 5, 6].map(|known| (known, ())),
        )?;
    }
    let allow_unhealthy = choice("health_policy", health_policy, &[(0, false), (1, true)])?;
    let balancing = match (mode, routing_preference.as_slice()) {
        (MODE_STRICT, [SCOPE_NODE]) => LoadBalancing::SameNode,
        (MODE_PASSTHROUGH, _) => LoadBalancing::Passthrough,
        (MODE_STRICT, other) => {
            return Err(Malformed::new("routing_preference", format!("strict {other:?} is not supported")));
        }
        // FAILOVER is a preference: all endpoints are a correct, if less local, choice.
        (0 | 2, _) => LoadBalancing::All,
        (other, _) => return Err(Malformed::new("mode", format!("unknown value {other}"))),
    };
    Ok((balancing, allow_unhealthy))
}

impl From<&model::Service> for Service {
    fn from(service: &model::Service) -> Self {
        let model::Service {
            key,
            name,
            vips,
            fronts,
            ports,
            subject_alt_names,
            waypoint,
            load_balancing,
            sticky,
            allow_unhealthy,
            canonical,
            visibility,
        } = service;
        let (mode, routing_preference) = match load_balancing {
            LoadBalancing::All => (0, vec![]),
            LoadBalancing::SameNode => (MODE_STRICT, vec![SCOPE_NODE]),
            LoadBalancing::Passthrough => (MODE_PASSTHROUGH, vec![]),
        };
        let plain = *load_balancing == LoadBalancing::All && !allow_unhealthy;
        Self {
            name: name.to_string(),
            namespace: key.namespace.to_string(),
            hostname: key.hostname.to_string(),
            addresses: vips
                .iter()
                .map(|vip| NetworkAddress { network: String::new(), address: ip_bytes(*vip), length: None })
                .collect(),
            ports: ports.iter().map(|port| port_message(port.port, port.target)).collect(),
            subject_alt_names: subject_alt_names.iter().map(Identity::to_string).collect(),
            waypoint: waypoint.as_ref().map(GatewayAddress::from),
            load_balancing: (!plain).then(|| LoadBalancingMessage {
                routing_preference,
                mode,
                health_policy: i32::from(*allow_unhealthy),
            }),
            ip_families: 0,
            canonical: *canonical,
            visibility: i32::from(*visibility == Visibility::Namespace),
            fronts: fronts.iter().map(front_message).collect(),
            sticky_seconds: sticky.map_or(0, |time| u32::try_from(time.as_secs()).unwrap_or(u32::MAX)),
        }
    }
}

fn port_message(port: u16, target: u16) -> Port {
    Port { service_port: port.into(), target_port: target.into(), app_protocol: 0 }
}

impl TryFrom<Workload> for model::Workload {
    type Error = Malformed;

    fn try_from(message: Workload) -> Result<Self, Malformed> {
        let Workload {
            name,
            namespace,
            addresses,
            network,
            tunnel_protocol,
            trust_domain,
            service_account,
            waypoint,
            node,
            canonical_name,
            canonical_revision,
            workload_type,
            workload_name,
            native_tunnel,
            authorization_policies,
            status,
            cluster_id,
            uid,
            services,
            locality,
            network_mode,
            capacity,
            leaving,
        } = message;
        choice("workload_type", workload_type, &[(0, ()), (1, ()), (2, ()), (3, ())])?;
        let locality = locality.unwrap_or_default();
        let policy = |text: String| {
            PolicyKey::parse(&text)
                .ok_or_else(|| Malformed::new("", format!("{text:?} is not namespace/name")))
        };
        let workload = Self {
            uid: WorkloadKey(required("uid", uid)?.into()),
            name: name.into(),
            namespace: required("namespace", namespace)?.into(),
            addresses: each("addresses", addresses, |bytes| ip(&bytes))?,
            network: network.into(),
            tunnel: choice(
                "tunnel_protocol",
                tunnel_protocol,
                &[(0, TunnelProtocol::None), (1, TunnelProtocol::Hbone)],
            )?,
            trust_domain: or(trust_domain, "cluster.local"),
            service_account: or(service_account, "default"),
            waypoint: waypoint
                .map(WaypointRef::try_from)
                .transpose()
                .map_err(|error| error.within("waypoint"))?,
            node: node.into(),
            canonical_name: canonical_name.into(),
            canonical_revision: canonical_revision.into(),
            workload_name: workload_name.into(),
            native_tunnel,
            policies: each("authorization_policies", authorization_policies, policy)?,
            health: choice("status", status, &[(0, Health::Healthy), (1, Health::Unhealthy)])?,
            cluster: or(cluster_id, "Kubernetes"),
            services: services.into_iter().map(endpoint_ports).collect::<Result<_, _>>()?,
            locality: model::Locality {
                region: locality.region.into(),
                zone: locality.zone.into(),
                subzone: locality.subzone.into(),
            },
            network_mode: choice(
                "network_mode",
                network_mode,
                &[(0, NetworkMode::Standard), (1, NetworkMode::HostNetwork)],
            )?,
            capacity: capacity.unwrap_or(1),
            leaving,
        };
        // The identity must be one that a certificate can prove.
        Identity::parse(&workload.identity().to_string())
            .map_err(|error| Malformed::new("service_account", error.to_string()))?;
        Ok(workload)
    }
}

fn endpoint_ports((key, ports): (String, PortList)) -> Result<(ServiceKey, PortMap), Malformed> {
    let field = format!("services[{key}]");
    let parsed =
        ServiceKey::parse(&key).ok_or_else(|| Malformed::new(&field, "is not namespace/hostname"))?;
    let ports = each("ports", ports.ports, service_port).map_err(|error| error.within(&field))?;
    Ok((parsed, ports.into_iter().map(|port| (port.port, port.target)).collect()))
}

impl From<&model::Workload> for Workload {
    fn from(workload: &model::Workload) -> Self {
        let model::Workload {
            uid,
            name,
            namespace,
            addresses,
            network,
            tunnel,
            trust_domain,
            service_account,
            waypoint,
            node,
            canonical_name,
            canonical_revision,
            workload_name,
            native_tunnel,
            policies,
            health,
            cluster,
            services,
            locality,
            network_mode,
            capacity,
            leaving,
        } = workload;
        let model::Locality { region, zone, subzone } = locality;
        let ports = |ports: &PortMap| PortList {
            ports: ports.iter().map(|(port, target)| port_message(*port, *target)).collect(),
        };
        Self {
            name: name.to_string(),
            namespace: namespace.to_string(),
            addresses: addresses.iter().map(|ip| ip_bytes(*ip)).collect(),
            network: network.to_string(),
            tunnel_protocol: i32::from(*tunnel == TunnelProtocol::Hbone),
            trust_domain: trust_domain.to_string(),
            service_account: service_account.to_string(),
            waypoint: waypoint.as_ref().map(GatewayAddress::from),
            node: node.to_string(),
            canonical_name: canonical_name.to_string(),
            canonical_revision: canonical_revision.to_string(),
            // POD, as every control plane of this protocol labels them (W33).
            workload_type: 2,
            workload_name: workload_name.to_string(),
            native_tunnel: *native_tunnel,
            authorization_policies: policies.iter().map(PolicyKey::to_string).collect(),
            status: i32::from(*health == Health::Unhealthy),
            cluster_id: cluster.to_string(),
            uid: uid.to_string(),
            services: services.iter().map(|(key, map)| (key.to_string(), ports(map))).collect(),
            locality: (*locality != model::Locality::default()).then(|| Locality {
                region: region.to_string(),
                zone: zone.to_string(),
                subzone: subzone.to_string(),
            }),
            network_mode: i32::from(*network_mode == NetworkMode::HostNetwork),
            capacity: (*capacity != 1).then_some(*capacity),
            leaving: *leaving,
        }
    }
}
