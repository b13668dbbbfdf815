//! (pure) All fragments → the World: references resolved, precedence applied, waypoints bound, policies attached.
//!
//! It is written as one pass over all fragments. What is published is compared by content, so an unchanged resource
//! is not sent again; each of the four steps takes the index and one object, which is the seam along which the pass
//! becomes proportional to a change.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use mesh_core::{
    id::{PolicyKey, ServiceKey, WorkloadKey},
    model::{LocalPod, MeshOptions, OutboundMode, Policy, Service, WaypointConfig, Workload},
};

use crate::{
    source::{ObjectKey, Origin, Problem, Severity},
    translate::{Fragment, Mesh, Translated},
};

mod binding;
mod endpoints;
mod gateways;
mod index;
mod local;
pub mod outcome;
mod policies;
mod routes;

use index::Index;
use outcome::Outcomes;
use policies::Behind;

/// Every object, translated.
pub type Fragments = BTreeMap<ObjectKey, Arc<Translated>>;

/// What the mesh is to do, and what is wrong with what was asked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct World {
    /// Workloads by key.
    pub workloads: BTreeMap<WorkloadKey, Arc<Workload>>,
    /// Services by key.
    pub services: BTreeMap<ServiceKey, Arc<Service>>,
    /// Policies by key, converted ones included.
    pub policies: BTreeMap<PolicyKey, Arc<Policy>>,
    /// L7 configuration by `namespace/gateway`.
    pub waypoints: BTreeMap<Arc<str>, Arc<WaypointConfig>>,
    /// Options of the mesh.
    pub options: MeshOptions,
    /// Who runs where: what certificates may be asked for, and which proxies are expected.
    pub pods: BTreeMap<PodKey, PodFact>,
    /// What each node's agent is told of its pods, by UID.
    pub local: BTreeMap<Arc<str>, BTreeMap<Arc<str>, Arc<LocalPod>>>,
    /// Nodes that are listed.
    pub nodes: BTreeSet<Arc<str>>,
    /// Nodes that wait for their agent.
    pub waiting: BTreeSet<Arc<str>>,
    /// Problems of objects by themselves and with each other.
    pub problems: Vec<Problem>,
    /// The objects that a user watches, with the resources that carry them.
    pub carried: BTreeMap<ObjectKey, Carried>,
    /// What became of them.
    pub outcomes: Outcomes,
}

/// `(namespace, name)` of a pod.
pub type PodKey = (Arc<str>, Arc<str>);

/// What the certificate authority and the status need to know of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFact {
    /// UID; empty where none was written.
    pub uid: Arc<str>,
    /// Its node.
    pub node: Arc<str>,
    /// Its service account.
    pub service_account: Arc<str>,
    /// It has ended.
    pub finished: bool,
    /// It is being deleted.
    pub deleting: bool,
    /// It is or should be enrolled, or terminates tunnels itself.
    pub meshed: bool,
    /// `namespace/gateway` if it is a pod of a waypoint.
    pub waypoint: Option<Arc<str>>,
}

/// How an object reaches the proxies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// `(type, name)` of the resources.
    pub resources: BTreeSet<(&'static str, Arc<str>)>,
}

/// Compiles everything.
pub fn compile(fragments: &Fragments, mesh: &Mesh) -> World {
    let index = Index::of(fragments, mesh);
    let mut out = Output::default();
    for translated in fragments.values() {
        out.problems.extend(translated.problems.iter().cloned());
        if matters(&translated.fragment, &translated.key) {
            out.carried.entry(translated.key.clone()).or_default();
            out.outcomes.generations.insert(translated.key.clone(), translated.generation);
        }
    }
    let bound = binding::services(&index, &mut out);
    let bound_pods = binding::pods(&index, &mut out);
    let endpoints = endpoints::endpoints(&index, &mut out);
    let of_waypoints = Behind { services: &bound, pods: &bound_pods, endpoints: &endpoints };
    let policies = policies::policies(&index, &of_waypoints, &mut out);
    // Pods claim their addresses first: the kernel gave them, while a clusterIP is only written.
    let workloads = endpoints::workload_resources(&index, &of_waypoints, &policies, &mut out);
    let services = endpoints::service_resources(&index, &bound, &mut out);
    let waypoints = routes::waypoints(&index, &bound, &services, &mut out);
    gateways::outcomes(&index, &services, &mut out);
    let Output { mut problems, carried, outcomes, .. } = out;
    problems.sort();
    problems.dedup();
    World {
        options: MeshOptions {
            encrypt_same_node: index.options.encrypt_same_node,
            outbound: if index.options.registry_only {
                OutboundMode::RegistryOnly
            } else {
                OutboundMode::AllowAny
            },
        },
        pods: index.pods.iter().map(|(key, pod)| (key.clone(), index.fact(key, pod))).collect(),
        local: local::pods(&index),
        nodes: index.nodes.keys().cloned().collect(),
        waiting: index
            .nodes
            .iter()
            .filter(|(name, node)| node.waits_for_agent && index.agent_is_ready(name))
            .map(|(n, _)| n.clone())
            .collect(),
        workloads,
        services,
        policies: policies.all,
        waypoints,
        problems,
        carried,
        outcomes,
    }
}

/// Whether the object's effect is reported to users as conditions.
fn matters(fragment: &Fragment, key: &ObjectKey) -> bool {
    use crate::source::Kind;
    !matches!(fragment, Fragment::Namespace(_) | Fragment::Node(_) | Fragment::Pod(_) | Fragment::Slice(_))
        && !matches!(
            key.kind,
            Kind::ServiceAccount
                | Kind::ConfigMap
                | Kind::Service
                | Kind::ReferenceGrant
                | Kind::GatewayClass
        )
}

/// What the steps of a compilation write besides their results.
#[derive(Default)]
struct Output {
    problems: Vec<Problem>,
    carried: BTreeMap<ObjectKey, Carried>,
    /// Who holds an address, so that a second claim is refused.
    claims: BTreeMap<IpAddr, ObjectKey>,
    /// Services that their waypoint does not serve: a policy that nobody else would enforce denies them.
    closed: BTreeSet<index::Name>,
    outcomes: Outcomes,
}

impl Output {
    fn tell(
        &mut self,
        severity: Severity,
        of: (&ObjectKey, &Origin),
        field: &str,
        reason: impl Into<String>,
    ) {
        let (key, origin) = of;
        self.problems.push(Problem {
            file: origin.file.to_string(),
            line: origin.line,
            object: key.to_string(),
            field: field.to_owned(),
            reason: reason.into(),
            severity,
        });
    }

    fn carry(&mut self, key: &ObjectKey, type_url: &'static str, name: Arc<str>) {
        self.carried.entry(key.clone()).or_default().resources.insert((type_url, name));
    }

    /// The addresses that nobody else holds: whoever comes first (the older object) keeps an address.
    fn claim(&mut self, of: (&ObjectKey, &Origin), field: &str, addresses: &[IpAddr]) -> Vec<IpAddr> {
        let mut own = Vec::new();
        for address in addresses {
            match self.claims.get(address).filter(|holder| *holder != of.0).map(ToString::to_string) {
                Some(holder) => {
                    let reason =
                        format!("AddressConflict: {address} belongs to {holder} already: not used here");
                    self.tell(Severity::Error, of, field, reason);
                }
                None => {
                    self.claims.insert(*address, of.0.clone());
                    own.push(*address);
                }
            }
        }
        own
    }
}

#[cfg(test)]
mod tests;
