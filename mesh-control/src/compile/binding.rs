//! (pure) Which waypoint a service or pod is bound to (`config-istio.md` 14).
//!
//! A binding that was asked for and cannot be honoured stays in force as a reference that resolves to nothing, so
//! that traffic is refused with `WAYPOINT_UNAVAILABLE` instead of going around the waypoint.

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::{id::ServiceKey, model::WaypointRef};

use super::{
    Output,
    index::{Entry, Index, Name},
    outcome::BindingOutcome,
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
/// Beside `use-waypoint`, with the value `allow`: traffic goes without the waypoint while that cannot be used.
const BYPASS: &str = "undermesh.io/waypoint-bypass";

/// A binding in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// What clients are told.
    pub reference: WaypointRef,
    /// The Gateway that serves it; `None` when the binding cannot be honoured.
    pub gateway: Option<Name>,
}

/// Bindings of services, or of pods, by name.
pub type Bound = BTreeMap<Name, Binding>;

/// The waypoint that labels ask for, and whether the object says so itself.
struct Wanted {
    gateway: Name,
    own: bool,
    /// [`BYPASS`] stands beside the label.
    bypass: bool,
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
        let bypass = labels.get(BYPASS).is_some_and(|value| value == "allow");
        return Some(Wanted { gateway: (there, name.as_str().into()), own, bypass });
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
        let (binding, refused) = bind(index, service.of(), &wanted, Takes::services, out);
        let outcome = BindingOutcome {
            generation: service.object.generation,
            gateway: format!("{}/{}", wanted.gateway.0, wanted.gateway.1).into(),
            refused,
        };
        out.outcomes.bindings.insert(service.object.key.clone(), outcome);
        if let Some(binding) = binding {
            bound.insert(name.clone(), binding);
        }
    }
    bound
}

/// Binds every pod.
pub fn pods(index: &Index<'_>, out: &mut Output) -> Bound {
    let alive = index.pods.iter().filter(|(_, pod)| pod.facts.described());
    alive.filter_map(|(key, entry)| Some((key.clone(), pod(index, entry, out)?))).collect()
}

fn pod(index: &Index<'_>, pod: &Entry<'_, PodFacts>, out: &mut Output) -> Option<Binding> {
    let namespace = pod.namespace();
    if index.native(namespace, pod.facts) || !index.meshed(namespace, pod.facts) {
        return None;
    }
    let wanted = wanted(&pod.facts.labels, namespace, index.namespace(namespace))?;
    // A namespace's label means its service waypoint unless the Gateway says that it takes workloads.
    if !wanted.own
        && !index.waypoints.get(&wanted.gateway).is_some_and(|gateway| index.takes(gateway.facts).workloads())
    {
        return None;
    }
    bind(index, pod.of(), &wanted, Takes::workloads, out).0
}

/// The waypoint does not take this kind of traffic.
const UNSUPPORTED: &str = "UnsupportedTrafficType";

/// The binding in force, and why it is not as asked.
type Bind = (Option<Binding>, Option<(&'static str, String)>);

fn bind(
    index: &Index<'_>,
    of: (&ObjectKey, &Origin),
    wanted: &Wanted,
    takes: fn(Takes) -> bool,
    out: &mut Output,
) -> Bind {
    let (namespace, name) = &wanted.gateway;
    let key = index.service_key(namespace, name);
    let refused = |out: &mut Output, reason: &'static str, text: String| {
        if wanted.bypass {
            let text = format!("{text}: bypassed, as {BYPASS} allows");
            out.tell(Severity::Warning, of, "metadata.labels", format!("{reason}: {text}"));
            return (None, Some((reason, text)));
        }
        let text = format!("{text}: its traffic is refused with WAYPOINT_UNAVAILABLE");
        out.tell(Severity::Error, of, "metadata.labels", format!("{reason}: {text}"));
        // The host name in a namespace where no such service is: the reference resolves to nothing.
        let nowhere = ServiceKey::new(&of.0.namespace, &format!("unbound.{}", key.hostname));
        let reference = WaypointRef::Service { service: nowhere, port: WAYPOINT_PORT };
        (Some(Binding { reference, gateway: None }), Some((reason, text)))
    };
    let Some(gateway) = index.waypoints.get(&wanted.gateway) else {
        let text = format!("there is no waypoint Gateway {namespace}/{name}");
        return refused(out, "WaypointMissing", text);
    };
    let taken = index.takes(gateway.facts);
    if !takes(taken) {
        let text = format!("waypoint {namespace}/{name} does not take this kind of traffic");
        // Somebody meant this very object to be behind it; a waypoint for nothing says that nobody is.
        if wanted.own && taken != Takes::Nothing {
            return refused(out, UNSUPPORTED, text);
        }
        return (None, Some((UNSUPPORTED, format!("{text}: not bound"))));
    }
    let own = *namespace == of.0.namespace;
    if !gateway.facts.allowed.admits(own, index.namespace(&of.0.namespace)) {
        let text = format!("allowedRoutes of {namespace}/{name} do not admit this namespace");
        return refused(out, "AttachmentDenied", text);
    }
    let port = gateway.facts.port;
    let ready = index.services.get(&wanted.gateway).is_some_and(|service| {
        service.facts.ports.iter().any(|candidate| candidate.port == port) && !service.facts.vips.is_empty()
    });
    let mut waiting = None;
    if !ready {
        let text = format!("{namespace}/{name} has no Service with an address and port {port}");
        if wanted.bypass {
            return refused(out, NOT_READY, text);
        }
        let text = format!("{text}; its traffic is refused until then");
        out.tell(Severity::Warning, of, "metadata.labels", format!("{NOT_READY}: {text}"));
        waiting = Some((NOT_READY, text));
    }
    let reference = WaypointRef::Service { service: key, port };
    (Some(Binding { reference, gateway: Some(wanted.gateway.clone()) }), waiting)
}

/// The waypoint's Service has no address yet.
const NOT_READY: &str = "WaypointIsNotReady";
