//! (pure) Which policies hold for which pod: AuthorizationPolicies by selector, PeerAuthentications converted into
//! DENY policies (`wire-protocol.md` 4.5), and the denials that stand in for policies of waypoints.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_core::{id::PolicyKey, model::Policy, proto::TYPE_AUTHORIZATION};

use super::{
    Output, PodKey,
    binding::Bound,
    endpoints::Endpoints,
    index::{Entry, Index, Name, selects},
};
use crate::{
    source::Severity,
    translate::{
        policy::{
            AuthorizationFacts, Mode, PeerAuthenticationFacts, Target, WaypointTarget, all_denied,
            plaintext_denied, ports_denied,
        },
        workload::PodFacts,
    },
};

/// Name of the policy that refuses plaintext on every port.
pub const STATIC_STRICT: &str = "istio_converted_static_strict";

/// All policies, and which pod names which.
#[derive(Default)]
pub struct Attached {
    /// Every policy that is sent.
    pub all: BTreeMap<PolicyKey, Arc<Policy>>,
    named: BTreeMap<PodKey, BTreeSet<PolicyKey>>,
}

impl Attached {
    /// The policies that a pod names.
    pub fn of_pod(&self, pod: &PodKey) -> Vec<PolicyKey> {
        self.named.get(pod).into_iter().flatten().cloned().collect()
    }

    fn add(&mut self, policy: Policy) {
        self.all.insert(policy.key.clone(), Arc::new(policy));
    }

    fn name(&mut self, pod: &PodKey, policy: PolicyKey) {
        self.named.entry(pod.clone()).or_default().insert(policy);
    }
}

/// What waypoints stand in front of.
pub struct Behind<'a> {
    /// The services that are bound to one.
    pub services: &'a Bound,
    /// The pods that are bound to one by themselves.
    pub pods: &'a Bound,
    /// The endpoints of services.
    pub endpoints: &'a Endpoints,
}

/// Attaches every policy.
pub fn policies(index: &Index<'_>, behind: &Behind<'_>, out: &mut Output) -> Attached {
    let mut attached = Attached::default();
    for policy in &index.authorizations {
        match &policy.facts.target {
            Target::Scope | Target::Selector { .. } => authorization(index, policy, &mut attached, out),
            Target::Waypoint(targets) => waypoint_policy(index, policy, targets, behind, &mut attached, out),
        }
    }
    let subjects: Vec<_> = subjects(index).collect();
    for (key, pod) in subjects {
        peer_authentication(index, key, pod.facts, &mut attached, out);
    }
    attached
}

/// The pods that L4 policy is for: not the waypoints, whose inbound is always a tunnel.
fn subjects<'a>(index: &'a Index<'_>) -> impl Iterator<Item = (&'a PodKey, &'a Entry<'a, PodFacts>)> {
    index
        .pods
        .iter()
        .filter(|(key, pod)| pod.facts.described() && index.waypoint_of_pod(&key.0, pod.facts).is_none())
}

fn authorization(
    index: &Index<'_>,
    entry: &Entry<'_, AuthorizationFacts>,
    attached: &mut Attached,
    out: &mut Output,
) {
    let Some(policy) = &entry.facts.policy else { return };
    if let Target::Selector { labels, everywhere } = &entry.facts.target {
        let mut found = false;
        for (pod_key, pod) in subjects(index) {
            if (*everywhere || pod_key.0 == *entry.namespace()) && selects(labels, &pod.facts.labels) {
                attached.name(pod_key, policy.key.clone());
                found = true;
            }
        }
        if !found {
            out.tell(Severity::Info, entry.of(), "spec.selector", "selects no pod");
        }
    }
    out.carry(&entry.object.key, TYPE_AUTHORIZATION, policy.key.to_string().into());
    attached.add(policy.clone());
}

/// A policy with targetRefs is for a waypoint, and ours does not evaluate policy yet. Letting the traffic pass would
/// be the silent hole, so the agents deny: the ports of a service that is a target, and everything at a pod that is
/// bound by itself. Where an endpoint of a service has no agent, the waypoint does not serve the target at all.
fn waypoint_policy(
    index: &Index<'_>,
    entry: &Entry<'_, AuthorizationFacts>,
    targets: &[WaypointTarget],
    behind: &Behind<'_>,
    attached: &mut Attached,
    out: &mut Output,
) {
    let Some(policy) = &entry.facts.policy else { return };
    if policy.dry_run {
        let reason = "waypoints do not evaluate policy yet: a policy that only counts has no effect";
        out.tell(Severity::Warning, entry.of(), "spec.targetRefs", reason);
        return;
    }
    let mut ports = BTreeSet::new();
    let mut pods = BTreeSet::new();
    let mut closed = false;
    for service in targets.iter().flat_map(|target| targeted(index, behind.services, entry, target)) {
        let mut denied = !behind.endpoints.has_others(&index.service_key(&service.0, &service.1));
        for (pod, map) in behind.endpoints.by_service.get(&service).into_iter().flatten() {
            denied &= index.pods.get(pod).is_some_and(|own| index.enrolment(&pod.0, own.facts).is_ok());
            ports.extend(map.values().copied());
            pods.insert(pod.clone());
        }
        if !denied {
            closed = true;
            out.closed.insert(service);
        }
    }
    let own: Vec<PodKey> =
        targets.iter().flat_map(|target| gated(index, behind.pods, entry, target)).collect();
    let reason = if pods.is_empty() && own.is_empty() && !closed {
        "TargetNotFound: no target with endpoints: no effect"
    } else if closed {
        "WaypointPolicyUnsupported: waypoints do not evaluate policy yet: traffic to the targets is denied, except to \
         endpoints outside of the mesh past their waypoint"
    } else {
        "WaypointPolicyUnsupported: waypoints do not evaluate policy yet: traffic to the targets is denied"
    };
    out.tell(Severity::Error, entry.of(), "spec.targetRefs", reason);
    let name = format!("converted_waypoint_policy_{}", entry.name());
    let ports: Vec<u16> = ports.into_iter().collect();
    // No name of an object has an underscore.
    let of_pods = format!("{name}_pods");
    let denials = [
        (ports_denied(PolicyKey::new(entry.namespace(), &name), &ports), pods.into_iter().collect()),
        (all_denied(PolicyKey::new(entry.namespace(), &of_pods)), own),
    ];
    for (denial, pods) in denials {
        if pods.is_empty() {
            continue;
        }
        out.carry(&entry.object.key, TYPE_AUTHORIZATION, denial.key.to_string().into());
        for pod in pods {
            attached.name(&pod, denial.key.clone());
        }
        attached.add(denial);
    }
}

/// The services that a target means.
fn targeted(
    index: &Index<'_>,
    bound: &Bound,
    entry: &Entry<'_, AuthorizationFacts>,
    target: &WaypointTarget,
) -> Vec<Name> {
    match target {
        WaypointTarget::Service(name) => vec![(entry.namespace().clone(), name.clone())],
        WaypointTarget::Gateway(_) | WaypointTarget::Class(_) => gated(index, bound, entry, target),
    }
}

/// Those of `bound` that are behind the Gateways that a target means.
fn gated(
    index: &Index<'_>,
    bound: &Bound,
    entry: &Entry<'_, AuthorizationFacts>,
    target: &WaypointTarget,
) -> Vec<Name> {
    let namespace = entry.namespace();
    let meant = |gateway: &Name| match target {
        WaypointTarget::Service(_) => false,
        WaypointTarget::Gateway(name) => gateway.0 == *namespace && gateway.1 == *name,
        WaypointTarget::Class(class) => {
            *namespace == index.mesh.root_namespace
                && index.waypoints.get(gateway).is_some_and(|waypoint| waypoint.facts.class == *class)
        }
    };
    let behind = bound.iter().filter(|(_, binding)| binding.gateway.as_ref().is_some_and(meant));
    behind.map(|(name, _)| name.clone()).collect()
}

/// Port > workload > namespace > mesh; the oldest of a level wins (`config-istio.md` 8).
fn peer_authentication(
    index: &Index<'_>,
    key: &PodKey,
    pod: &PodFacts,
    attached: &mut Attached,
    out: &mut Output,
) {
    let root = &index.mesh.root_namespace;
    let oldest = |wanted: &dyn Fn(&Entry<'_, PeerAuthenticationFacts>) -> bool| {
        // Sorted by age already.
        index.peer_authentications.iter().find(|entry| wanted(entry)).copied()
    };
    let mesh = oldest(&|entry| entry.namespace() == root && entry.facts.selector.is_none());
    let namespace = oldest(&|entry| *entry.namespace() == key.0 && entry.facts.selector.is_none());
    let workload = oldest(&|entry| {
        *entry.namespace() == key.0
            && entry.facts.selector.as_ref().is_some_and(|labels| selects(labels, &pod.labels))
    });
    let inherited =
        [namespace, mesh].into_iter().flatten().find_map(|entry| Some((entry, entry.facts.mode?)));
    let parent = inherited.map_or(Mode::Permissive, |(_, mode)| mode);
    let mut own = workload;
    let effective = match workload {
        Some(entry) => converted(&entry, parent),
        None => Converted::of(parent),
    };
    let policy_key = match effective {
        Converted::Nothing => return,
        Converted::Strict => {
            // Carried by the object whose mode it is.
            own = own.filter(|entry| entry.facts.mode.is_some()).or(inherited.map(|(entry, _)| entry));
            let key = PolicyKey::new(root, STATIC_STRICT);
            attached.add(plaintext_denied(key.clone(), &[], &[]));
            key
        }
        Converted::Ports { on, except } => {
            let Some(entry) = workload else { return };
            let name = format!("converted_peer_authentication_{}", entry.name());
            let key = PolicyKey::new(&key.0, &name);
            attached.add(plaintext_denied(key.clone(), &on, &except));
            key
        }
    };
    if let Some(entry) = own {
        out.carry(&entry.object.key, TYPE_AUTHORIZATION, policy_key.to_string().into());
    }
    attached.name(key, policy_key);
}

/// What a pod's PeerAuthentication comes to.
#[derive(Debug, PartialEq, Eq)]
enum Converted {
    Nothing,
    Strict,
    Ports { on: Vec<u16>, except: Vec<u16> },
}

impl Converted {
    fn of(mode: Mode) -> Self {
        if mode == Mode::Strict { Self::Strict } else { Self::Nothing }
    }
}

fn converted(entry: &Entry<'_, PeerAuthenticationFacts>, parent: Mode) -> Converted {
    let PeerAuthenticationFacts { selector: _, mode, ports } = entry.facts;
    let overall = mode.unwrap_or(parent);
    let with = |wanted: &dyn Fn(Mode) -> bool| -> Vec<u16> {
        ports.iter().filter(|(_, mode)| mode.is_some_and(wanted)).map(|(port, _)| *port).collect()
    };
    if overall == Mode::Strict {
        // Under UNSET a DISABLE port makes no exception: PERMISSIVE is the way to write it.
        let except = with(&|port| port == Mode::Permissive || (port == Mode::Disable && mode.is_some()));
        return if except.is_empty() {
            Converted::Strict
        } else {
            Converted::Ports { on: Vec::new(), except }
        };
    }
    let on = with(&|port| port == Mode::Strict);
    if on.is_empty() { Converted::Nothing } else { Converted::Ports { on, except: Vec::new() } }
}
