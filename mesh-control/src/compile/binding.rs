//! (pure) Which waypoint a service or pod is bound to (`config-istio.md` 14).
//!
//! A binding that was asked for and cannot be honoured stays in force as a reference that resolves to nothing, so
//! that traffic is refused with `WAYPOINT_UNAVAILABLE` instead of going around the waypoint.

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::{id::ServiceKey, model::WaypointRef};

use super::{
    Output,
    index::{Entry, Index, Name},
};
use crate::{
    source::{ObjectKey, Origin, Severity},
    translate::{
        Labels,
        gateway::{Takes, WAYPOINT_PORT},
        workload::PodFacts,
    },
};

const USE_WAYPOINT: &str = "istio.io/use-waypoint";
const USE_WAYPOINT_NAMESPACE: &str = "istio.io/use-waypoint-namespace";

/// A binding in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// What clients are told.
    pub reference: WaypointRef,
    /// The Gateway that serves it; `None` when the binding cannot be honoured.
    pub gateway: Option<Name>,
}

/// Bindings of services by name.
pub type Bound = BTreeMap<Name, Binding>;

/// The waypoint that labels ask for, and whether the object says so itself.
struct Wanted {
    gateway: Name,
    own: bool,
}

/// The nearest label counts; `none` stops.
fn wanted(labels: &Labels, namespace: &Arc<str>, of_namespace: &Labels) -> Option<Wanted> {
    for (labels, own) in [(labels, true), (of_namespace, false)] {
        let Some(name) = labels.get(USE_WAYPOINT).filter(|name| !name.is_empty()) else { continue };
        if name == "none" {
            return None;
        }
        let there = labels.get(USE_WAYPOINT_NAMESPACE).filter(|there| !there.is_empty());
        let there = there.map_or_else(|| namespace.clone(), |there| there.as_str().into());
        return Some(Wanted { gateway: (there, name.as_str().into()), own });
    }
    None
}

/// Binds every service.
pub fn services(index: &Index<'_>, out: &mut Output) -> Bound {
    let mut bound = Bound::new();
    for (name, service) in &index.services {
        let facts = service.facts;
        if facts.of_gateway() || index.waypoints.contains_key(name) {
            continue;
        }
        let Some(wanted) = wanted(&facts.labels, &name.0, index.namespace(&name.0)) else { continue };
        if facts.headless {
            if wanted.own {
                let reason = "a headless Service has no service traffic: it is not bound to a waypoint";
                out.tell(Severity::Warning, service.of(), "metadata.labels", reason);
            }
            continue;
        }
        if let Some(binding) = bind(index, service.of(), &wanted, Takes::services, out) {
            bound.insert(name.clone(), binding);
        }
    }
    bound
}

/// Binds one pod.
pub fn pod(index: &Index<'_>, pod: &Entry<'_, PodFacts>, out: &mut Output) -> Option<WaypointRef> {
    let namespace = pod.namespace();
    if index.native(namespace, pod.facts) || !index.meshed(namespace, pod.facts) {
        return None;
    }
    let wanted = wanted(&pod.facts.labels, namespace, index.namespace(namespace))?;
    // A namespace's label means its service waypoint unless the Gateway says that it takes workloads.
    if !wanted.own
        && !index.waypoints.get(&wanted.gateway).is_some_and(|gateway| gateway.facts.takes.workloads())
    {
        return None;
    }
    Some(bind(index, pod.of(), &wanted, Takes::workloads, out)?.reference)
}

fn bind(
    index: &Index<'_>,
    of: (&ObjectKey, &Origin),
    wanted: &Wanted,
    takes: fn(Takes) -> bool,
    out: &mut Output,
) -> Option<Binding> {
    let (namespace, name) = &wanted.gateway;
    let key = index.service_key(namespace, name);
    let refused = |out: &mut Output, reason: String| {
        let reason =
            format!("{reason}: WaypointBound=False, its traffic is refused with WAYPOINT_UNAVAILABLE");
        out.tell(Severity::Error, of, "metadata.labels", reason);
        // The host name in a namespace where no such service is: the reference resolves to nothing.
        let nowhere = ServiceKey::new(&of.0.namespace, &format!("unbound.{}", key.hostname));
        let reference = WaypointRef::Service { service: nowhere, port: WAYPOINT_PORT };
        Some(Binding { reference, gateway: None })
    };
    let Some(gateway) = index.waypoints.get(&wanted.gateway) else {
        return refused(out, format!("WaypointMissing: there is no waypoint Gateway {namespace}/{name}"));
    };
    if !takes(gateway.facts.takes) {
        if wanted.own {
            let reason = format!(
                "UnsupportedTrafficType: waypoint {namespace}/{name} does not take this kind of traffic: not bound"
            );
            out.tell(Severity::Warning, of, "metadata.labels", reason);
        }
        return None;
    }
    let own = *namespace == of.0.namespace;
    if !gateway.facts.allowed.admits(own, index.namespace(&of.0.namespace)) {
        return refused(
            out,
            format!("AttachmentDenied: allowedRoutes of {namespace}/{name} do not admit this namespace"),
        );
    }
    let port = gateway.facts.port;
    let ready = index.services.get(&wanted.gateway).is_some_and(|service| {
        service.facts.ports.iter().any(|candidate| candidate.port == port) && !service.facts.vips.is_empty()
    });
    if !ready {
        let reason =
            format!("WaypointIsNotReady: {namespace}/{name} has no Service with an address and port {port}");
        out.tell(
            Severity::Warning,
            of,
            "metadata.labels",
            format!("{reason}; its traffic is refused until then"),
        );
    }
    Some(Binding {
        reference: WaypointRef::Service { service: key, port },
        gateway: Some(wanted.gateway.clone()),
    })
}
