//! One item of a feed: a change that is ready to be applied, or a resource that was refused with its path.

use std::sync::Arc;

use crate::{
    id::{PolicyKey, ServiceKey, WorkloadKey},
    model::{LocalPod, MeshOptions, Policy, Service, WaypointConfig, Workload},
    proto::{self, Malformed},
};

/// One prepared change of the world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A workload is now so.
    Workload(Arc<Workload>),
    /// A service is now so.
    Service(Arc<Service>),
    /// A policy is now so.
    Policy(Arc<Policy>),
    /// What a waypoint serves is now so.
    Waypoint(Arc<WaypointConfig>),
    /// The options of the mesh are now so.
    Options(MeshOptions),
    /// A pod of this agent's node is now so.
    LocalPod(Arc<LocalPod>),
    /// A policy arrived that cannot be understood: whoever needs it is denied until a good one comes.
    InvalidPolicy(PolicyKey),
    /// A resource is gone.
    Removed {
        /// Its type.
        type_url: &'static str,
        /// Its resource name.
        name: Arc<str>,
    },
}

/// A resource that cannot be applied; goes into the NACK.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {reason}")]
pub struct Rejected {
    /// Resource name.
    pub name: String,
    /// Field and reason.
    pub reason: String,
}

impl Change {
    /// Whether [`removed`] under this name would find it again; a slash too many in a part makes it ambiguous.
    fn is_removable(&self, name: &str) -> bool {
        match self {
            Self::Service(_) => ServiceKey::parse(name).is_some(),
            Self::Policy(_) | Self::InvalidPolicy(_) | Self::Waypoint(_) => PolicyKey::parse(name).is_some(),
            Self::Workload(_) | Self::Options(_) | Self::LocalPod(_) | Self::Removed { .. } => true,
        }
    }

    /// Type and resource name of what changes.
    pub fn resource(&self) -> (&'static str, String) {
        match self {
            Self::Workload(workload) => (proto::TYPE_ADDRESS, workload.uid.to_string()),
            Self::Service(service) => (proto::TYPE_ADDRESS, service.key.to_string()),
            Self::Policy(policy) => (proto::TYPE_AUTHORIZATION, policy.key.to_string()),
            Self::InvalidPolicy(key) => (proto::TYPE_AUTHORIZATION, key.to_string()),
            Self::Waypoint(config) => (proto::TYPE_WAYPOINT, format!("{}/{}", config.namespace, config.name)),
            Self::Options(_) => (proto::TYPE_MESH_OPTIONS, proto::mesh::NAME.to_owned()),
            Self::LocalPod(pod) => (proto::TYPE_LOCAL_POD, pod.uid.to_string()),
            Self::Removed { type_url, name } => (type_url, name.to_string()),
        }
    }
}

/// Reads one resource of a response. A resource whose own name differs from the one that it is sent under is
/// refused: it could never be removed again.
///
/// # Errors
/// [`Rejected`] with the field and the reason.
pub fn prepare(type_url: &str, resource: &proto::discovery::Resource) -> Result<Change, Rejected> {
    let rejected = |error: Malformed| Rejected { name: resource.name.clone(), reason: error.to_string() };
    let any = resource.resource.as_ref().ok_or_else(|| rejected(Malformed::new("resource", "missing")))?;
    if any.type_url != type_url {
        return Err(rejected(Malformed::new(
            "type_url",
            format!("{:?} in a response of {type_url:?}", any.type_url),
        )));
    }
    let change = proto::decode(type_url, &any.value).map_err(rejected)?;
    let (_, own) = change.resource();
    if own != resource.name {
        return Err(rejected(Malformed::new("name", format!("the resource calls itself {own:?}"))));
    }
    if !change.is_removable(&own) {
        return Err(rejected(Malformed::new("name", format!("{own:?} is not namespace and name"))));
    }
    Ok(change)
}

/// The removal of a resource; `None` for a type that is not ours.
pub fn removed(type_url: &str, name: &str) -> Option<Change> {
    let type_url = proto::TYPES.into_iter().find(|known| *known == type_url)?;
    Some(Change::Removed { type_url, name: name.into() })
}

/// How the removal of an address resource is read (`wire-protocol.md` X15).
pub(crate) enum AddressName {
    Workload(WorkloadKey),
    Service(ServiceKey),
}

impl AddressName {
    pub(crate) fn candidates(name: &str) -> impl Iterator<Item = Self> {
        let service = ServiceKey::parse(name).map(Self::Service);
        [Some(Self::Workload(WorkloadKey(name.into()))), service].into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::proto::{TYPE_ADDRESS, TYPE_AUTHORIZATION, discovery::Resource, security, workload};

    fn prepared(type_url: &str, name: &str, value: Vec<u8>) -> Result<Change, Rejected> {
        let any = prost_types::Any { type_url: type_url.to_owned(), value };
        prepare(type_url, &Resource { name: name.to_owned(), resource: Some(any), ..Resource::default() })
    }

    #[test]
    fn what_could_never_be_removed_is_refused() {
        for (hostname, fits) in [("web.shop.svc", true), ("we/b.shop.svc", false)] {
            let service = workload::Service {
                namespace: "shop".into(),
                hostname: hostname.into(),
                ..Default::default()
            };
            let kind = workload::address::Type::Service(service);
            let bytes = workload::Address { r#type: Some(kind) }.encode_to_vec();
            let got = prepared(TYPE_ADDRESS, &format!("shop/{hostname}"), bytes);
            assert_eq!(got.is_ok(), fits, "{hostname}: {got:?}");
        }
        for (name, fits) in [("p", true), ("p/q", false)] {
            let policy =
                security::Authorization { namespace: "shop".into(), name: name.into(), ..Default::default() };
            let got = prepared(TYPE_AUTHORIZATION, &format!("shop/{name}"), policy.encode_to_vec());
            assert_eq!(got.is_ok(), fits, "{name}: {got:?}");
        }
    }
}
