//! (pure) The fragments by what they are looked up by.

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::{
    id::{ServiceKey, WorkloadKey},
    model::RouteKind,
};

use super::{Fragments, PodFact, PodKey};
use crate::translate::{
    Fragment, Labels, Mesh, OptionFacts, Translated,
    enrolment::{NotEnrolled, Place, enrolment},
    gateway::{ClassFacts, GrantFacts, OWN_CLASS, Takes, WaypointFacts},
    policy::{AuthorizationFacts, PeerAuthenticationFacts},
    route::RouteFacts,
    service::{ServiceFacts, SliceFacts},
    workload::{AGENT_ACCOUNT, GATEWAY_NAME, NodeFacts, PodFacts},
};

/// An object together with what it says.
pub struct Entry<'a, T> {
    /// Key, place, age.
    pub object: &'a Translated,
    /// What it says.
    pub facts: &'a T,
}

impl<T> Clone for Entry<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Entry<'_, T> {}

impl<'a, T> Entry<'a, T> {
    fn new(object: &'a Translated, facts: &'a T) -> Self {
        Self { object, facts }
    }

    /// Key and place, for problems.
    pub fn of(&self) -> (&'a crate::source::ObjectKey, &'a crate::source::Origin) {
        (&self.object.key, &self.object.origin)
    }

    /// Its namespace.
    pub fn namespace(&self) -> &'a Arc<str> {
        &self.object.key.namespace
    }

    /// Its name.
    pub fn name(&self) -> &'a Arc<str> {
        &self.object.key.name
    }

    /// Order of precedence: the older object first, then by namespace and name.
    pub fn age(&self) -> (i64, &'a crate::source::ObjectKey) {
        (self.object.created, &self.object.key)
    }
}

/// `(namespace, name)`.
pub type Name = (Arc<str>, Arc<str>);

/// Everything by its name.
pub struct Index<'a> {
    pub mesh: &'a Mesh,
    pub namespaces: BTreeMap<Arc<str>, &'a Labels>,
    pub nodes: BTreeMap<Arc<str>, &'a NodeFacts>,
    pub pods: BTreeMap<PodKey, Entry<'a, PodFacts>>,
    pub services: BTreeMap<Name, Entry<'a, ServiceFacts>>,
    /// By the Service that they belong to.
    pub slices: BTreeMap<Name, Vec<Entry<'a, SliceFacts>>>,
    /// By name; empty where the source has none (local mode).
    pub classes: BTreeMap<Arc<str>, Entry<'a, ClassFacts>>,
    pub waypoints: BTreeMap<Name, Entry<'a, WaypointFacts>>,
    /// Gateways that are no waypoints, with their class.
    pub gateways: BTreeMap<Name, (&'a Translated, Arc<str>)>,
    pub routes: Vec<Entry<'a, RouteFacts>>,
    pub grants: Vec<(Arc<str>, &'a GrantFacts)>,
    pub authorizations: Vec<Entry<'a, AuthorizationFacts>>,
    pub peer_authentications: Vec<Entry<'a, PeerAuthenticationFacts>>,
    pub options: OptionFacts,
}

static NO_LABELS: Labels = Labels::new();

impl<'a> Index<'a> {
    /// Sorts the fragments.
    pub fn of(fragments: &'a Fragments, mesh: &'a Mesh) -> Self {
        let mut index = Self {
            mesh,
            namespaces: BTreeMap::new(),
            nodes: BTreeMap::new(),
            pods: BTreeMap::new(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            classes: BTreeMap::new(),
            waypoints: BTreeMap::new(),
            gateways: BTreeMap::new(),
            routes: Vec::new(),
            grants: Vec::new(),
            authorizations: Vec::new(),
            peer_authentications: Vec::new(),
            options: OptionFacts::default(),
        };
        for object in fragments.values() {
            index.take(object);
        }
        index.disown();
        // Kinds of routes take turns by age, then by name.
        index
            .routes
            .sort_by_key(|route| (route.object.created, route.namespace(), route.name(), route.facts.kind));
        index.peer_authentications.sort_by(|a, b| a.age().cmp(&b.age()));
        index
    }

    /// Gateways whose class belongs to another controller are that one's. In a cluster a class that is not there may be
    /// anybody's, unless it has our name; in a directory nobody else is.
    fn disown(&mut self) {
        let (classes, needed) = (&self.classes, self.mesh.needs_classes);
        let foreign = |class: &str| match classes.get(class) {
            Some(class) => !class.facts.ours,
            None => needed && class != OWN_CLASS,
        };
        let (theirs, ours) = std::mem::take(&mut self.waypoints)
            .into_iter()
            .partition(|(_, entry)| foreign(&entry.facts.class));
        let theirs: BTreeMap<Name, Entry<'a, WaypointFacts>> = theirs;
        self.waypoints = ours;
        self.gateways.extend(
            theirs.into_iter().map(|(name, entry)| (name, (entry.object, entry.facts.class.clone()))),
        );
    }

    /// Whether the agent of a node says that it can do its work: the plugin is in the chain, too, by which no pod starts
    /// before it is captured.
    pub fn agent_is_ready(&self, node: &str) -> bool {
        self.pods.iter().any(|((namespace, _), pod)| {
            let facts = pod.facts;
            *namespace == self.mesh.install_namespace
                && &*facts.service_account == AGENT_ACCOUNT
                && &*facts.node == node
                && facts.ready
                && !facts.deleting
                && !facts.finished
        })
    }

    /// Which traffic a waypoint takes: as it says, else as its class says, else that to services.
    pub fn takes(&self, gateway: &WaypointFacts) -> Takes {
        let of_class = || self.classes.get(&*gateway.class)?.facts.takes;
        gateway.takes.or_else(of_class).unwrap_or(Takes::Service)
    }

    fn take(&mut self, object: &'a Translated) {
        let name = (object.key.namespace.clone(), object.key.name.clone());
        match &object.fragment {
            Fragment::Namespace(facts) => {
                self.namespaces.insert(name.1, &facts.labels);
            }
            Fragment::Node(facts) => {
                self.nodes.insert(name.1, facts);
            }
            Fragment::Pod(facts) => {
                self.pods.insert(name, Entry::new(object, facts));
            }
            Fragment::Service(facts) => {
                self.services.insert(name, Entry::new(object, facts));
            }
            Fragment::Slice(facts) => {
                let service = (name.0, facts.service.clone());
                self.slices.entry(service).or_default().push(Entry::new(object, facts));
            }
            Fragment::Class(facts) => {
                self.classes.insert(name.1, Entry::new(object, facts));
            }
            Fragment::OtherGateway(class) => {
                self.gateways.insert(name, (object, class.clone()));
            }
            Fragment::Waypoint(facts) => {
                self.waypoints.insert(name, Entry::new(object, facts));
            }
            Fragment::Options(facts) => self.options = facts.clone(),
            Fragment::Route(facts) => self.routes.push(Entry::new(object, facts)),
            Fragment::Grant(facts) => self.grants.push((name.0, facts)),
            Fragment::Authorization(facts) => self.authorizations.push(Entry::new(object, facts)),
            Fragment::PeerAuthentication(facts) => self.peer_authentications.push(Entry::new(object, facts)),
            Fragment::Nothing => {}
        }
    }

    /// Labels of a namespace; one that has no object has none.
    pub fn namespace(&self, name: &str) -> &'a Labels {
        self.namespaces.get(name).copied().unwrap_or(&NO_LABELS)
    }

    /// Key of a service.
    pub fn service_key(&self, namespace: &str, name: &str) -> ServiceKey {
        ServiceKey::new(namespace, &format!("{name}.{namespace}.{}", self.mesh.service_domain))
    }

    /// Key of a pod's workload.
    pub fn pod_uid(&self, namespace: &str, name: &str) -> WorkloadKey {
        WorkloadKey(format!("{}//Pod/{namespace}/{name}", self.mesh.cluster).into())
    }

    /// The waypoint Gateway that a pod belongs to.
    pub fn waypoint_of_pod(&self, namespace: &Arc<str>, pod: &PodFacts) -> Option<Name> {
        let gateway: Arc<str> = pod.label(GATEWAY_NAME)?.into();
        let name = (namespace.clone(), gateway);
        self.waypoints.contains_key(&name).then_some(name)
    }

    /// Whether the pod speaks HBONE: enrolled, or terminating tunnels itself.
    pub fn meshed(&self, namespace: &Arc<str>, pod: &PodFacts) -> bool {
        self.native(namespace, pod) || self.enrolment(namespace, pod).is_ok()
    }

    /// Whether the pod is to be enrolled, and why not.
    pub fn enrolment(&self, namespace: &Arc<str>, pod: &PodFacts) -> Result<(), NotEnrolled> {
        let place = Place {
            namespace,
            labels: self.namespace(namespace),
            install_namespace: &self.mesh.install_namespace,
            native: self.native(namespace, pod),
        };
        enrolment(pod, &place)
    }

    /// Whether the pod terminates tunnels itself.
    pub fn native(&self, namespace: &Arc<str>, pod: &PodFacts) -> bool {
        pod.native_tunnel() || (self.waypoint_of_pod(namespace, pod).is_some() && !pod.host_network)
    }

    /// What the certificate authority and the status need to know of a pod.
    pub fn fact(&self, key: &PodKey, pod: &Entry<'_, PodFacts>) -> PodFact {
        let facts = pod.facts;
        PodFact {
            uid: facts.uid.clone(),
            node: facts.node.clone(),
            service_account: facts.service_account.clone(),
            finished: facts.finished,
            deleting: facts.deleting,
            meshed: self.meshed(&key.0, facts),
            waypoint: self.waypoint_of_pod(&key.0, facts).map(|(ns, name)| format!("{ns}/{name}").into()),
        }
    }

    /// Whether a route of `from` may refer to the Service `name` of `to`.
    pub fn granted(&self, kind: RouteKind, from: &str, to: &str, name: &str) -> bool {
        from == to
            || self.grants.iter().any(|(namespace, grant)| {
                &**namespace == to
                    && grant.from.iter().any(|(of, allowed)| *of == kind && &**allowed == from)
                    && grant.to.iter().any(|allowed| allowed.as_deref().is_none_or(|allowed| allowed == name))
            })
    }
}

/// Whether `labels` has all of `wanted`.
pub fn selects(wanted: &Labels, labels: &Labels) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}
