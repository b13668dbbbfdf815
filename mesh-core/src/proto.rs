//! The messages on the wire and their conversion to the model. Generated types do not leave this module's callers
//! at the edges: the feed and the control plane's server.
//!
//! Field numbers: `wire-protocol.md` 5.2, 5.6, 5.7 and 6. Reading is strict: what cannot be understood rejects the
//! resource, it never widens it.

pub mod ca;
pub mod discovery;
pub mod mesh;
pub mod node;
pub mod security;
pub mod waypoint;
pub mod workload;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use prost::Message as _;

use crate::{delta::Change, model::MeshOptions};

/// Workloads and services.
pub const TYPE_ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
/// Authorization policies.
pub const TYPE_AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";
/// L7 configuration of one waypoint; ours.
pub const TYPE_WAYPOINT: &str = "type.googleapis.com/undermesh.waypoint.v1.WaypointConfig";
/// Options of the whole mesh; ours.
pub const TYPE_MESH_OPTIONS: &str = "type.googleapis.com/undermesh.mesh.v1.MeshOptions";

/// Pods of the subscribing agent's node; ours.
pub const TYPE_LOCAL_POD: &str = "type.googleapis.com/undermesh.node.v1.LocalPod";

/// Every type that a proxy may subscribe to, in the order in which they are sent: policies come before the workloads
/// that name them, and what a pod's neighbours are before the pod.
pub const TYPES: [&str; 5] =
    [TYPE_MESH_OPTIONS, TYPE_AUTHORIZATION, TYPE_ADDRESS, TYPE_WAYPOINT, TYPE_LOCAL_POD];

/// Why a resource was rejected: the field and the reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct Malformed {
    /// Path of the field, such as `rules[0].clauses[1]`.
    pub path: String,
    /// What is wrong with it.
    pub reason: String,
}

impl Malformed {
    /// A complaint about one field.
    pub fn new(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { path: path.into(), reason: reason.into() }
    }

    /// Puts an outer field in front of the path.
    pub(crate) fn within(self, outer: &str) -> Self {
        let joint = if self.path.is_empty() || self.path.starts_with('[') { "" } else { "." };
        Self { path: format!("{outer}{joint}{}", self.path), ..self }
    }
}

/// Reads one resource of a known type.
///
/// # Errors
/// [`Malformed`] names the field; an unknown type is malformed too.
pub fn decode(type_url: &str, bytes: &[u8]) -> Result<Change, Malformed> {
    let undecodable = |error: prost::DecodeError| Malformed::new("", format!("not decodable: {error}"));
    match type_url {
        TYPE_ADDRESS => workload::Address::decode(bytes).map_err(undecodable)?.try_into(),
        TYPE_AUTHORIZATION => {
            let policy = security::Authorization::decode(bytes).map_err(undecodable)?.try_into()?;
            Ok(Change::Policy(std::sync::Arc::new(policy)))
        }
        TYPE_WAYPOINT => {
            let config = waypoint::WaypointConfig::decode(bytes).map_err(undecodable)?.try_into()?;
            Ok(Change::Waypoint(std::sync::Arc::new(config)))
        }
        TYPE_MESH_OPTIONS => {
            let options: MeshOptions = mesh::MeshOptions::decode(bytes).map_err(undecodable)?.try_into()?;
            Ok(Change::Options(options))
        }
        TYPE_LOCAL_POD => {
            let pod = node::LocalPod::decode(bytes).map_err(undecodable)?.try_into()?;
            Ok(Change::LocalPod(std::sync::Arc::new(pod)))
        }
        other => Err(Malformed::new("type_url", format!("unknown type {other:?}"))),
    }
}

/// An address as 4 or 16 bytes, a v4-mapped one as 4.
pub fn ip_bytes(ip: IpAddr) -> Vec<u8> {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// Reads 4 or 16 bytes; v4-mapped is folded.
pub(crate) fn ip(bytes: &[u8]) -> Result<IpAddr, Malformed> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(four).into());
    }
    let sixteen = <[u8; 16]>::try_from(bytes)
        .map_err(|_| Malformed::new("", format!("{} bytes are no address", bytes.len())))?;
    Ok(IpAddr::from(Ipv6Addr::from(sixteen)).to_canonical())
}

/// A port number other than 0.
pub(crate) fn port(number: u32) -> Result<u16, Malformed> {
    u16::try_from(number)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| Malformed::new("", format!("{number} is no port")))
}

/// Converts every element and names the index of the one that fails.
pub(crate) fn each<T, U>(
    field: &str,
    items: Vec<T>,
    convert: impl Fn(T) -> Result<U, Malformed>,
) -> Result<Vec<U>, Malformed> {
    items
        .into_iter()
        .enumerate()
        .map(|(index, item)| convert(item).map_err(|error| error.within(&format!("{field}[{index}]"))))
        .collect()
}
