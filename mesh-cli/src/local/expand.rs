//! (pure) What the folder asks for: nodes, pods on nodes, services, waypoints.

use std::{
    collections::{BTreeMap, HashMap, hash_map::DefaultHasher},
    fmt,
    hash::{Hash as _, Hasher as _},
};

use k8s_openapi::{
    api::{
        apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet},
        batch::v1::Job,
        core::v1::{Container, Node, Pod, PodSpec, PodTemplateSpec, Service},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use mesh_control::translate::gateway;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    document::{Document, Problem},
    enrolment,
    schedule::Placement,
};

/// Namespace and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    /// The Kubernetes namespace.
    pub namespace: String,
    /// The name inside the namespace.
    pub name: String,
}

impl Key {
    /// Builds a key from its parts.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Where something was written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Source {
    /// The file, relative to the folder; empty for what nobody wrote.
    pub file: String,
    /// The document's first line, counted from 1.
    pub line: usize,
}

/// The controller that a pod belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its kind: `ReplicaSet`, `StatefulSet`, `DaemonSet` or `Job`.
    pub kind: &'static str,
    /// Its name.
    pub name: String,
}

/// A pod that is to run.
#[derive(Clone, Debug, PartialEq)]
pub struct WantedPod {
    /// Namespace and name.
    pub key: Key,
    /// Labels, as the control plane shall see them.
    pub labels: BTreeMap<String, String>,
    /// Annotations, likewise.
    pub annotations: BTreeMap<String, String>,
    /// What to run.
    pub spec: PodSpec,
    /// The object that asks for it: kind and key.
    pub workload: (String, Key),
    /// The controller, when there is one.
    pub owner: Option<Owner>,
    /// The node that it runs on.
    pub node: String,
    /// The Gateway that this pod is the waypoint of.
    pub waypoint: Option<String>,
    /// Whether the mesh shall capture it.
    pub enrol: bool,
    /// Where it was written.
    pub source: Source,
    /// Changes when the pod has to be replaced: a hash of the spec. Labels and annotations change in place.
    pub revision: u64,
}

impl WantedPod {
    /// The pod's service account.
    pub fn service_account(&self) -> &str {
        self.spec.service_account_name.as_deref().unwrap_or("default")
    }
}

/// A service that is to have addresses.
#[derive(Clone, Debug, PartialEq)]
pub struct WantedService {
    /// Namespace and name.
    pub key: Key,
    /// The object as written, or as generated for a waypoint.
    pub object: Service,
    /// Where it was written.
    pub source: Source,
}

/// A waypoint Gateway.
#[derive(Clone, Debug, PartialEq)]
pub struct WantedWaypoint {
    /// Namespace and name of the Gateway.
    pub key: Key,
    /// The Gateway as written.
    pub document: Document,
}

/// A machine of the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedNode {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Whether the user wrote it.
    pub written: bool,
}

/// Everything that the folder asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wanted {
    /// In the order in which they were written.
    pub nodes: Vec<WantedNode>,
    /// Pods, each on a node.
    pub pods: Vec<WantedPod>,
    /// Services, those of waypoints included.
    pub services: Vec<WantedService>,
    /// Waypoint Gateways.
    pub waypoints: Vec<WantedWaypoint>,
    /// What cannot be done, and why.
    pub problems: Vec<Problem>,
}

/// Port of HBONE.
pub const HBONE_PORT: i32 = 15008;
/// Nodes when the folder lists none.
const DEFAULT_NODES: [&str; 2] = ["node-1", "node-2"];
/// Pods of one workload; a typing error shall not start a million processes.
const MAX_REPLICAS: i32 = 200;

/// Kinds that become pods here, so that the control plane does not see them as written.
pub fn is_workload(kind: &str) -> bool {
    matches!(kind, "Pod" | "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet" | "Job")
}

/// Whether this Gateway is a waypoint.
pub fn is_waypoint(document: &Document) -> bool {
    let class = document.value.pointer("/spec/gatewayClassName").and_then(serde_json::Value::as_str);
    document.kind == "Gateway" && class.is_some_and(|class| gateway::WAYPOINT_CLASSES.contains(&class))
}

/// Reads the documents. `placed` says where pods that exist run, so that they stay there.
pub fn expand<'a>(
    documents: impl IntoIterator<Item = &'a Document>,
    placed: &BTreeMap<Key, String>,
) -> Wanted {
    let documents: Vec<&Document> = documents.into_iter().collect();
    let mut wanted = Wanted { nodes: nodes(&documents), ..Wanted::default() };
    let namespaces: HashMap<&str, &Document> = documents
        .iter()
        .filter(|document| document.kind == "Namespace")
        .map(|document| (document.name.as_str(), *document))
        .collect();
    let mut drafts = Vec::new();
    for document in &documents {
        let read = match document.kind.as_str() {
            "Service" => typed::<Service>(document).map(|object| {
                let key = Key::new(&document.namespace, &document.name);
                wanted.services.push(WantedService { key, object, source: source(document) });
            }),
            "Gateway" if is_waypoint(document) => {
                waypoint(document, &mut wanted, &mut drafts);
                Ok(())
            }
            kind if is_workload(kind) => workload(document).map(|more| drafts.extend(more)),
            _ => Ok(()),
        };
        wanted.problems.extend(read.err().map(|problem| *problem));
    }
    let mut placement = Placement::new(&wanted.nodes, placed);
    let mut seen = HashMap::new();
    for draft in drafts {
        for mut pod in draft.pods(&mut placement, &mut wanted.problems) {
            if let Some(first) = seen.insert(pod.key.clone(), pod.source.clone()) {
                let reason =
                    format!("a pod of this name is already written at {}:{}", first.file, first.line);
                wanted.problems.push(draft.problem("metadata.name", reason));
                continue;
            }
            let namespace = namespaces.get(pod.key.namespace.as_str());
            pod.enrol = enrolment::wanted(&pod, |label| namespace.and_then(|document| document.label(label)));
            wanted.pods.push(pod);
        }
    }
    wanted
}

/// Whether a document can be used; those that local mode does not read always can.
///
/// # Errors
/// What is wrong with it.
pub fn check(document: &Document) -> Result<(), Box<Problem>> {
    if is_workload(&document.kind) { workload(document).map(drop) } else { Ok(()) }
}

/// Reads a document as `T`, naming the field that does not fit.
pub fn typed<T: DeserializeOwned>(document: &Document) -> Result<T, Box<Problem>> {
    serde_path_to_error::deserialize(&document.value).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { "" } else { &path };
        Box::new(document.problem(field, error.into_inner().to_string()))
    })
}

fn source(document: &Document) -> Source {
    Source { file: document.file.clone(), line: document.line }
}

fn nodes(documents: &[&Document]) -> Vec<WantedNode> {
    let written: Vec<WantedNode> = documents
        .iter()
        .filter(|document| document.kind == "Node")
        .map(|document| {
            let labels =
                typed::<Node>(document).ok().and_then(|node| node.metadata.labels).unwrap_or_default();
            WantedNode { name: document.name.clone(), labels, written: true }
        })
        .collect();
    if !written.is_empty() {
        return written;
    }
    DEFAULT_NODES
        .map(|name| WantedNode { name: name.to_owned(), labels: BTreeMap::new(), written: false })
        .into()
}

/// Pods of one workload before they have a node.
struct Draft {
    document: Document,
    template: PodTemplateSpec,
    shape: Shape,
    waypoint: Option<String>,
}

/// How a workload names and counts its pods.
enum Shape {
    Single,
    Replicas(i32),
    Ordered(i32),
    Once(i32),
    EveryNode,
}

fn workload(document: &Document) -> Result<Vec<Draft>, Box<Problem>> {
    let (template, shape) = match document.kind.as_str() {
        "Pod" => {
            let pod: Pod = typed(document)?;
            let template = PodTemplateSpec { metadata: Some(pod.metadata), spec: pod.spec };
            (template, Shape::Single)
        }
        "Deployment" => {
            let spec = typed::<Deployment>(document)?.spec.unwrap_or_default();
            (spec.template, Shape::Replicas(spec.replicas.unwrap_or(1)))
        }
        "ReplicaSet" => {
            let spec = typed::<ReplicaSet>(document)?.spec.unwrap_or_default();
            (spec.template.unwrap_or_default(), Shape::Replicas(spec.replicas.unwrap_or(1)))
        }
        "StatefulSet" => {
            let spec = typed::<StatefulSet>(document)?.spec.unwrap_or_default();
            let mut template = spec.template;
            let pod = template.spec.get_or_insert_default();
            pod.subdomain = pod.subdomain.take().or(spec.service_name);
            (template, Shape::Ordered(spec.replicas.unwrap_or(1)))
        }
        "Job" => {
            let spec = typed::<Job>(document)?.spec.unwrap_or_default();
            (spec.template, Shape::Once(spec.parallelism.unwrap_or(1)))
        }
        _ => (typed::<DaemonSet>(document)?.spec.unwrap_or_default().template, Shape::EveryNode),
    };
    let base = if document.kind == "Pod" { "spec" } else { "spec.template.spec" };
    let spec = template.spec.as_ref().ok_or_else(|| Box::new(document.problem(base, "required")))?;
    runnable(document, base, spec)?;
    if let Shape::Replicas(count) | Shape::Ordered(count) | Shape::Once(count) = shape
        && !(0..=MAX_REPLICAS).contains(&count)
    {
        let reason = format!("must be 0 to {MAX_REPLICAS}");
        return Err(Box::new(document.problem("spec.replicas", reason)));
    }
    Ok(vec![Draft { document: document.clone(), template, shape, waypoint: None }])
}

/// Refuses what a pod of this machine cannot be.
fn runnable(document: &Document, base: &str, spec: &PodSpec) -> Result<(), Box<Problem>> {
    let refuse =
        |field: &str, reason: &str| Err(Box::new(document.problem(&format!("{base}.{field}"), reason)));
    if spec.host_network == Some(true) {
        return refuse("hostNetwork", "not supported in local mode: every pod has a namespace of its own");
    }
    if spec.init_containers.as_ref().is_some_and(|list| !list.is_empty()) {
        return refuse("initContainers", "not supported in local mode");
    }
    if spec.containers.is_empty() {
        return refuse("containers", "at least one container is required");
    }
    for (index, container) in spec.containers.iter().enumerate() {
        if program(container).next().is_none() {
            let field = format!("containers[{index}].command");
            let reason = "required in local mode: no image is pulled, so the program of this machine that stands \
                          for it has to be named";
            return refuse(&field, reason);
        }
    }
    Ok(())
}

/// Command and arguments of a container.
pub fn program(container: &Container) -> impl Iterator<Item = &String> {
    container.command.iter().flatten().chain(container.args.iter().flatten())
}

/// A waypoint Gateway becomes a pod and a service of its name.
fn waypoint(document: &Document, wanted: &mut Wanted, drafts: &mut Vec<Draft>) {
    let class = document.value.pointer("/spec/gatewayClassName").and_then(serde_json::Value::as_str);
    let labels: BTreeMap<String, String> = [
        ("gateway.networking.k8s.io/gateway-name", document.name.as_str()),
        ("gateway.networking.k8s.io/gateway-class-name", class.unwrap_or_default()),
        ("gateway.istio.io/managed", "istio.io-mesh-controller"),
        (enrolment::DATAPLANE_MODE, "none"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    let key = Key::new(&document.namespace, &document.name);
    let object = serde_json::json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": key.name, "namespace": key.namespace, "labels": labels },
        "spec": {
            "selector": { "gateway.networking.k8s.io/gateway-name": key.name },
            "ports": [
                { "name": "status-port", "port": 15021, "targetPort": 15021, "appProtocol": "tcp" },
                { "name": "mesh", "port": HBONE_PORT, "targetPort": HBONE_PORT, "appProtocol": "hbone" },
            ],
        },
    });
    match serde_json::from_value(object) {
        Ok(object) => {
            wanted.services.push(WantedService { key: key.clone(), object, source: source(document) });
        }
        Err(error) => wanted.problems.push(document.problem("", error.to_string())),
    }
    let spec = PodSpec { service_account_name: Some(key.name.clone()), ..PodSpec::default() };
    let metadata = ObjectMeta { labels: Some(labels), ..ObjectMeta::default() };
    drafts.push(Draft {
        document: document.clone(),
        template: PodTemplateSpec { metadata: Some(metadata), spec: Some(spec) },
        shape: Shape::Replicas(1),
        waypoint: Some(key.name.clone()),
    });
    wanted.waypoints.push(WantedWaypoint { key, document: document.clone() });
}

impl Draft {
    fn problem(&self, field: &str, reason: String) -> Problem {
        self.document.problem(field, reason)
    }

    /// The pods with their names and nodes. A pod that fits no node is a problem.
    fn pods(&self, placement: &mut Placement<'_>, problems: &mut Vec<Problem>) -> Vec<WantedPod> {
        let spec = self.template.spec.clone().unwrap_or_default();
        let revision = revision(&spec);
        let hash = short(revision);
        let base = &self.document.name;
        let names: Vec<(String, Option<String>)> = match self.shape {
            Shape::Single => vec![(base.clone(), None)],
            Shape::Replicas(count) => (0..count).map(|n| (format!("{base}-{hash}-{n}"), None)).collect(),
            Shape::Ordered(count) | Shape::Once(count) => {
                (0..count).map(|n| (format!("{base}-{n}"), None)).collect()
            }
            Shape::EveryNode => placement
                .fitting(&spec)
                .into_iter()
                .map(|node| (format!("{base}-{node}"), Some(node)))
                .collect(),
        };
        let mut pods = Vec::new();
        for (name, node) in names {
            let key = Key::new(&self.document.namespace, &name);
            let workload = Key::new(&self.document.namespace, base);
            let Some(node) = placement.place(&key, &workload, &spec, node) else {
                let reason = "no node of this mesh fits nodeName and nodeSelector".to_owned();
                problems.push(self.problem("spec", reason));
                break;
            };
            pods.push(self.pod(key, node, spec.clone(), revision));
        }
        pods
    }

    fn pod(&self, key: Key, node: String, mut spec: PodSpec, revision: u64) -> WantedPod {
        let metadata = self.template.metadata.clone().unwrap_or_default();
        let mut labels = metadata.labels.unwrap_or_default();
        let base = &self.document.name;
        let owner = match self.shape {
            Shape::Single => None,
            Shape::Replicas(_) => {
                labels.insert("pod-template-hash".to_owned(), short(revision));
                Some(Owner { kind: "ReplicaSet", name: format!("{base}-{}", short(revision)) })
            }
            Shape::Ordered(_) => {
                labels.insert("statefulset.kubernetes.io/pod-name".to_owned(), key.name.clone());
                spec.hostname = Some(key.name.clone());
                Some(Owner { kind: "StatefulSet", name: base.clone() })
            }
            Shape::Once(_) => {
                labels.insert("batch.kubernetes.io/job-name".to_owned(), base.clone());
                // Kubernetes demands that one be written; the sensible one of the two is taken here.
                spec.restart_policy.get_or_insert_with(|| "OnFailure".to_owned());
                Some(Owner { kind: "Job", name: base.clone() })
            }
            Shape::EveryNode => Some(Owner { kind: "DaemonSet", name: base.clone() }),
        };
        WantedPod {
            workload: (self.document.kind.clone(), Key::new(&self.document.namespace, base)),
            key,
            labels,
            annotations: metadata.annotations.unwrap_or_default(),
            spec,
            owner,
            node,
            waypoint: self.waypoint.clone(),
            enrol: false,
            source: source(&self.document),
            revision,
        }
    }
}

/// A number that changes with the spec.
fn revision(spec: &PodSpec) -> u64 {
    let mut hasher = DefaultHasher::new();
    // A PodSpec has no maps with keys that are not strings, so writing it cannot fail; were it to, equal specs would
    // still hash equal.
    serde_json::to_string(spec).unwrap_or_default().hash(&mut hasher);
    hasher.finish()
}

/// Five characters of Kubernetes' alphabet for generated names.
fn short(mut number: u64) -> String {
    const SAFE: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut text = String::new();
    for _ in 0..5 {
        text.push(char::from(SAFE[(number % 27) as usize]));
        number /= 27;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::document::parse;

    fn expanded(yaml: &str) -> Wanted {
        expand(&parse("m.yaml", yaml).unwrap(), &BTreeMap::new())
    }

    /// `namespace/name node enrolled` of every pod, with the template hash written as `#`.
    fn check(yaml: &str, expected: &[&str]) {
        let wanted = expanded(yaml);
        let seen: Vec<String> = wanted
            .pods
            .iter()
            .map(|pod| {
                let hash = pod.labels.get("pod-template-hash").map_or("#", String::as_str);
                let enrol = if pod.enrol { " enrolled" } else { "" };
                format!("{} {}{enrol}", pod.key, pod.node).replace(hash, "#")
            })
            .collect();
        assert_eq!(seen, expected, "{:?}", wanted.problems);
    }

    fn deployment(name: &str, rest: &str) -> String {
        format!(
            "kind: Deployment\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  {rest}\n  template:\n    \
             metadata: {{labels: {{app: {name}}}}}\n    spec: {{containers: [{{name: c, command: [sleep, '1']}}]}}\n"
        )
    }

    #[test]
    fn replicas_are_spread_over_two_nodes_when_none_is_listed() {
        check(
            &deployment("web", "replicas: 3"),
            &["shop/web-#-0 node-1", "shop/web-#-1 node-2", "shop/web-#-2 node-1"],
        );
        let two = format!("{}---\n{}", deployment("a", "replicas: 1"), deployment("b", "replicas: 1"));
        check(&two, &["shop/a-#-0 node-1", "shop/b-#-0 node-2"]);
    }

    #[test]
    fn listed_nodes_replace_the_default_and_daemons_run_on_each() {
        let nodes = "kind: Node\nmetadata: {name: alpha}\n---\nkind: Node\nmetadata: {name: beta}\n---\n";
        let daemon = deployment("d", "selector: {}").replace("Deployment", "DaemonSet");
        check(&format!("{nodes}{daemon}"), &["shop/d-alpha alpha", "shop/d-beta beta"]);
    }

    #[test]
    fn the_labels_of_namespace_and_pod_enrol() {
        let namespace =
            "kind: Namespace\nmetadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}\n---\n";
        check(&format!("{namespace}{}", deployment("web", "replicas: 1")), &["shop/web-#-0 node-1 enrolled"]);
    }

    #[test]
    fn a_waypoint_is_a_pod_and_a_service_that_is_not_enrolled() {
        let yaml = "kind: Namespace\nmetadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}\n---\n\
                    kind: Gateway\nmetadata: {name: waypoint, namespace: shop}\nspec: {gatewayClassName: istio-waypoint}\n";
        check(yaml, &["shop/waypoint-#-0 node-1"]);
        let wanted = expanded(yaml);
        assert_eq!(wanted.waypoints.len(), 1);
        assert_eq!(wanted.services[0].key, Key::new("shop", "waypoint"));
        assert_eq!(wanted.pods[0].service_account(), "waypoint");
    }

    #[test]
    fn what_cannot_run_is_a_problem_that_names_the_field() {
        let problem = |yaml: &str| {
            let wanted = expanded(yaml);
            assert_eq!(wanted.pods, []);
            (wanted.problems[0].field.clone(), wanted.problems[0].line)
        };
        let no_command = "\n\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c, image: x}]}\n";
        assert_eq!(problem(no_command), ("spec.containers[0].command".to_owned(), 1));
        let wrong_type = "kind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c, command: sleep}]}\n";
        assert_eq!(problem(wrong_type).0, "spec.containers[0].command");
        let nowhere =
            "kind: Pod\nmetadata: {name: a}\nspec: {nodeName: x, containers: [{name: c, command: [a]}]}\n";
        assert_eq!(problem(nowhere).0, "spec");
        assert_eq!(problem(&deployment("web", "replicas: 100000")).0, "spec.replicas");
    }

    #[test]
    fn a_label_does_not_replace_a_pod_but_its_program_does() {
        let one = expanded(&deployment("web", "replicas: 1"));
        let label = expanded(&deployment("web", "replicas: 1").replace("app: web", "app: web, x: y"));
        let other = expanded(&deployment("web", "replicas: 1").replace("'1'", "'2'"));
        assert_eq!(one.pods[0].key, label.pods[0].key);
        assert_ne!(one.pods[0].labels, label.pods[0].labels);
        assert_ne!(one.pods[0].key, other.pods[0].key);
    }
}
