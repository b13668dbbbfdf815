//! Takes the mesh out of a cluster: pods are released, agents drain, every node is cleaned, then what is left at the API
//! server goes. What users wrote stays.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use futures_util::{StreamExt as _, stream};
use mesh_control::status::object::CONTROLLER;
use serde_json::{Value, json};

use super::{
    apply, crds, facts,
    record::{self, ObjectId, Record},
    remove, wait,
};
use crate::{
    chart,
    cluster::{
        Cluster,
        kinds::{self, Kind},
    },
};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// An agent lets go of its pods within this: its drain (25 s), and what it needs around that.
const RELEASE: Duration = Duration::from_secs(45);
/// Nodes that are asked at the same time.
const AT_ONCE: usize = 8;
/// A taint of ours.
const TAINT: &str = "undermesh.io/agent-not-ready";
/// Label of the pods that clean.
const CLEANER: (&str, &str) = ("app.kubernetes.io/name", "undermesh-clean");
/// Labels of everything that is ours, and of what was made for a Gateway.
const OURS: &str = "app.kubernetes.io/part-of=undermesh";
/// ConfigMap with the agents' DaemonSet of an installation that was not made by `meshctl install`: what cleaning needs
/// when it has to be done again, and the DaemonSet is gone.
const AGENTS: &str = "undermesh-uninstall";
const PROVISIONED: &str =
    "app.kubernetes.io/part-of=undermesh,app.kubernetes.io/managed-by=undermesh.io-gateway-controller";

/// What is to be removed.
#[derive(Debug)]
pub struct Wish {
    /// Where the installation is.
    pub namespace: String,
    /// Whether definitions of kinds go as well.
    pub definitions: bool,
    /// How long all of it may take.
    pub timeout: Duration,
}

/// Removes it.
///
/// # Errors
/// What could not be removed.
pub async fn run(cluster: &Cluster, wish: &Wish) -> anyhow::Result<()> {
    let deadline = Instant::now() + wish.timeout;
    let namespace = wish.namespace.as_str();
    cluster.version().await.context("reach the API server")?;
    let elsewhere = elsewhere(&places(cluster).await?, namespace)?;
    let record = Record::read(cluster, namespace).await?;
    let agents = agents(cluster, namespace, record.as_ref()).await?;
    if let (None, Some(agents)) = (&record, &agents) {
        apply(cluster, &kept(agents, namespace)).await?;
    }
    release(cluster, namespace, deadline).await?;
    // Nothing is made anew from here on.
    delete(cluster, kinds::DEPLOYMENT, Some(namespace), wait::CONTROL.name).await?;
    gone(cluster, namespace, wait::CONTROL, deadline).await?;
    if !elsewhere {
        waypoints(cluster).await?;
    }
    delete(cluster, kinds::DAEMON_SET, Some(namespace), wait::NODE.name).await?;
    gone(cluster, namespace, wait::NODE, deadline).await?;
    let unclean = match (&agents, namespace_exists(cluster, namespace).await?) {
        // The nodes are the other's.
        _ if elsewhere => Vec::new(),
        (Some(agents), true) => clean(cluster, namespace, agents, deadline).await?,
        _ => Vec::new(),
    };
    if !elsewhere {
        untaint(cluster).await?;
    }
    if !unclean.is_empty() {
        for (node, why) in &unclean {
            eprintln!("{node} is not clean: {why}");
        }
        // What cleaning needs stays for the next attempt: the account, the record.
        bail!(
            "{} nodes are not clean; pods there stay captured. `meshctl uninstall` again when they are up, or there: \
             mesh-node clean --all",
            unclean.len()
        );
    }
    let here = record.iter().flat_map(|record| record.objects.iter().rev());
    let here = here.filter(|id| !elsewhere || id.namespace.is_some());
    for id in here.filter(|id| id.kind != "Namespace" && id.kind != "DaemonSet") {
        told(remove(cluster, id).await?, id);
    }
    delete(cluster, kinds::SECRET, Some(namespace), "undermesh-ca").await?;
    delete(cluster, kinds::LEASE, Some(namespace), "undermesh-control").await?;
    rest_of(cluster, namespace).await?;
    if !elsewhere {
        rest(cluster).await?;
    }
    // Before the definitions: a kind that is going cannot be listed.
    leave(cluster, namespace, record.as_ref(), deadline).await?;
    if wish.definitions && !elsewhere {
        definitions(cluster).await?;
    }
    // Last of all: whoever comes again must know whose the namespace is.
    delete(cluster, kinds::CONFIG_MAP, Some(namespace), AGENTS).await?;
    delete(cluster, kinds::CONFIG_MAP, Some(namespace), record::NAME).await?;
    println!(
        "Undermesh is gone; objects of users are as they were, but for the status that it wrote into them"
    );
    Ok(())
}

/// Namespaces where an installation is, or what is left of one.
async fn places(cluster: &Cluster) -> anyhow::Result<BTreeSet<String>> {
    let mut places = BTreeSet::new();
    let marks = [
        (kinds::DEPLOYMENT, wait::CONTROL.name),
        (kinds::DAEMON_SET, wait::NODE.name),
        (kinds::CONFIG_MAP, record::NAME),
        (kinds::CONFIG_MAP, AGENTS),
    ];
    for (kind, name) in marks {
        let found = cluster.list(kind, None, OURS).await?;
        let named = found.iter().filter(|object| object["metadata"]["name"] == name);
        places.extend(named.filter_map(|object| object["metadata"]["namespace"].as_str().map(str::to_owned)));
    }
    Ok(places)
}

/// (pure) Whether there is an installation in another namespace as well: what is the cluster's is that one's then.
///
/// # Errors
/// It is only there: nothing is to be removed here.
fn elsewhere(places: &BTreeSet<String>, namespace: &str) -> anyhow::Result<bool> {
    let others: Vec<&str> = places.iter().map(String::as_str).filter(|place| *place != namespace).collect();
    if !others.is_empty() && !places.contains(namespace) {
        bail!(
            "Undermesh is not in namespace {namespace} but in {}: nothing was changed. Name it with --namespace",
            others.join(", ")
        );
    }
    Ok(!others.is_empty())
}

fn told(was_there: bool, id: &ObjectId) {
    if was_there {
        println!("removed {id}");
    }
}

async fn delete(cluster: &Cluster, kind: Kind, namespace: Option<&str>, name: &str) -> anyhow::Result<()> {
    let id = ObjectId {
        api_version: kind.api_version(),
        kind: kind.name.to_owned(),
        namespace: namespace.map(str::to_owned),
        name: name.to_owned(),
    };
    told(remove(cluster, &id).await?, &id);
    Ok(())
}

async fn namespace_exists(cluster: &Cluster, namespace: &str) -> anyhow::Result<bool> {
    Ok(cluster.get(kinds::NAMESPACE, None, namespace).await?.is_some())
}

/// The agents' DaemonSet as it runs, else as it was installed: where things are on the nodes.
async fn agents(
    cluster: &Cluster,
    namespace: &str,
    record: Option<&Record>,
) -> anyhow::Result<Option<Value>> {
    if let Some(set) = cluster.get(kinds::DAEMON_SET, Some(namespace), wait::NODE.name).await? {
        return Ok(Some(set));
    }
    if let Some(found) = cluster.get(kinds::CONFIG_MAP, Some(namespace), AGENTS).await? {
        let text = found["data"]["agents"].as_str().unwrap_or_default();
        let agents = serde_json::from_str(text);
        return agents.map(Some).with_context(|| format!("read ConfigMap {namespace}/{AGENTS}"));
    }
    let Some(record) = record else { return Ok(None) };
    let values = chart::values(chart::Profile::Default, vec![record.values.clone()])?;
    Ok(chart::objects(&values, namespace)?.into_iter().find(|object| object["kind"] == "DaemonSet"))
}

/// (pure) The DaemonSet, to be kept until the nodes are clean.
fn kept(agents: &Value, namespace: &str) -> Value {
    let spec = json!({"spec": agents["spec"]});
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": AGENTS, "namespace": namespace, "labels": {crds::PART_OF.0: crds::PART_OF.1}},
        "data": {"agents": spec.to_string()},
    })
}

/// Asks every agent to let go of its pods, so that only what is proxied drains and nothing new is refused meanwhile.
async fn release(cluster: &Cluster, namespace: &str, deadline: Instant) -> anyhow::Result<()> {
    let down = not_ready(cluster).await?;
    let pods = wait::pods(cluster, namespace, wait::NODE).await?;
    let up = pods.iter().filter(|pod| !is_on(pod, &down));
    let each = up.map(|pod| async {
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        let node = pod["spec"]["nodeName"].as_str().unwrap_or("?");
        let limit = RELEASE.min(deadline.saturating_duration_since(Instant::now()));
        let command = [wait::NODE.program, "release"];
        match cluster.exec_within(limit, (namespace, name), wait::NODE.container, &command).await {
            Ok(_) => println!("released the pods of {node}"),
            // Cleaning takes them out as well; until then they are refused.
            Err(error) => println!("{node}: pods are released by cleaning: {error}"),
        }
    });
    stream::iter(each).buffer_unordered(AT_ONCE).collect::<Vec<()>>().await;
    Ok(())
}

/// Nodes whose kubelet is silent: their pods do not end, and nothing can be run there.
async fn not_ready(cluster: &Cluster) -> anyhow::Result<BTreeSet<String>> {
    let nodes = cluster.list(kinds::NODE, None, "").await?;
    let facts = nodes.iter().filter_map(facts::node).filter(|node| !node.ready);
    Ok(facts.map(|node| node.name).collect())
}

/// (pure) Whether a pod is on one of these nodes.
fn is_on(pod: &Value, nodes: &BTreeSet<String>) -> bool {
    pod["spec"]["nodeName"].as_str().is_some_and(|node| nodes.contains(node))
}

/// Waits until a component has no pod left on any node that is ready.
async fn gone(
    cluster: &Cluster,
    namespace: &str,
    component: wait::Component,
    deadline: Instant,
) -> anyhow::Result<()> {
    let mut told = None;
    loop {
        let down = not_ready(cluster).await?;
        let pods = wait::pods(cluster, namespace, component).await?;
        let left = pods.iter().filter(|pod| !is_on(pod, &down)).count();
        if left == 0 {
            return Ok(());
        }
        if told != Some(left) {
            println!("{}: {left} pods are ending", component.title);
            told = Some(left);
        }
        if Instant::now() >= deadline {
            bail!("{}: {left} pods do not end: kubectl -n {namespace} get pods", component.title);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What was made for Gateways; the Gateways are the users'.
async fn waypoints(cluster: &Cluster) -> anyhow::Result<()> {
    let made = [
        kinds::DEPLOYMENT,
        kinds::DISRUPTION_BUDGET,
        kinds::SERVICE,
        kinds::SERVICE_ACCOUNT,
        kinds::CONFIG_MAP,
    ];
    for kind in made {
        for object in cluster.list(kind, None, PROVISIONED).await? {
            let id = identify(kind, &object);
            told(remove(cluster, &id).await?, &id);
        }
    }
    Ok(())
}

/// Items of a list have no kind of their own.
fn identify(kind: Kind, object: &Value) -> ObjectId {
    let id = ObjectId::of(object);
    ObjectId { api_version: kind.api_version(), kind: kind.name.to_owned(), ..id }
}

/// Runs `mesh-node clean` on every node and returns the nodes where it did not end well, with the reason.
async fn clean(
    cluster: &Cluster,
    namespace: &str,
    agents: &Value,
    deadline: Instant,
) -> anyhow::Result<Vec<(String, String)>> {
    let selector = agents["spec"]["template"]["spec"]["nodeSelector"].as_object();
    let labels: Vec<String> = selector
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or("")))
        .collect();
    let nodes = cluster.list(kinds::NODE, None, &labels.join(",")).await?;
    println!("cleaning {} nodes", nodes.len());
    let down = not_ready(cluster).await?;
    let mut cleaning: BTreeMap<String, Cleaning> = BTreeMap::new();
    for node in &nodes {
        let name = node["metadata"]["name"].as_str().unwrap_or_default();
        let (state, why) = match down.contains(name) {
            true => (State::Impossible, "the node is not ready"),
            false => (State::Due, "a pod of a former attempt does not go"),
        };
        let cleaning_here = Cleaning { node: name.to_owned(), state, why: why.to_owned() };
        cleaning.insert(cleaner_name(node), cleaning_here);
    }
    let label = format!("{}={}", CLEANER.0, CLEANER.1);
    loop {
        for (name, at) in cleaning.iter_mut().filter(|(_, at)| at.state == State::Due) {
            // One of a former attempt may be on its way out, or have ended.
            if !cluster.delete(kinds::POD, Some(namespace), name).await? {
                apply(cluster, &cleaner(agents, namespace, (name, &at.node))).await?;
                (at.state, at.why) = (State::Running, "it did not start".to_owned());
            }
        }
        for pod in cluster.list(kinds::POD, Some(namespace), &label).await? {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            let Some(at) = cleaning.get_mut(name).filter(|at| at.state == State::Running) else { continue };
            if pod["status"]["phase"] == "Succeeded" {
                println!("{} is clean", at.node);
                at.state = State::Clean;
            } else if let Some(now) = why(&pod) {
                at.why = now;
            }
        }
        let open = |at: &Cleaning| matches!(at.state, State::Due | State::Running);
        if !cleaning.values().any(open) || Instant::now() >= deadline {
            break;
        }
        tokio::time::sleep(LOOK).await;
    }
    for name in cleaning.iter().filter(|(_, at)| at.state != State::Impossible).map(|(name, _)| name) {
        delete(cluster, kinds::POD, Some(namespace), name).await?;
    }
    let unclean = cleaning.into_values().filter(|at| at.state != State::Clean);
    Ok(unclean.map(|at| (at.node, at.why)).collect())
}

/// How far the cleaning of a node is.
struct Cleaning {
    node: String,
    state: State,
    /// Why it is not clean.
    why: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing can run there.
    Impossible,
    /// Its pod is to be made.
    Due,
    Running,
    Clean,
}

/// (pure) The pod that cleans a node: the same in every attempt, whatever other nodes there are. A node's name may be as
/// long as a pod's.
fn cleaner_name(node: &Value) -> String {
    format!("undermesh-clean-{}", node["metadata"]["uid"].as_str().unwrap_or_default())
}

fn why(pod: &Value) -> Option<String> {
    let found = super::progress::trouble(pod, &[])?;
    Some(format!("{}: {}", found.reason, found.message))
}

/// (pure) A pod that cleans one node, with the mounts and rights of the agent there.
fn cleaner(agents: &Value, namespace: &str, (name, node): (&str, &str)) -> Value {
    let template = &agents["spec"]["template"]["spec"];
    let mut container = template["containers"][0].clone();
    let unneeded = ["token", "roots"];
    let without = |list: &Value| -> Vec<Value> {
        let items = list.as_array().into_iter().flatten();
        items.filter(|item| !unneeded.iter().any(|name| item["name"] == *name)).cloned().collect()
    };
    container["name"] = "clean".into();
    container["args"] = json!([
        "clean",
        format!("--node={node}"),
        "--bpffs=/sys/fs/bpf",
        "--state-dir=/var/lib/undermesh",
        "--cni-bin-dir=/host/opt/cni/bin",
        "--cni-conf-dir=/host/etc/cni/net.d",
        "--host-proc=/host/proc",
    ]);
    container["env"] = json!([]);
    container["volumeMounts"] = without(&container["volumeMounts"]).into();
    if let Some(container) = container.as_object_mut() {
        for field in ["ports", "readinessProbe", "resources"] {
            container.remove(field);
        }
    }
    let field = |field: &str| template.get(field).cloned().unwrap_or(Value::Null);
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {CLEANER.0: CLEANER.1, "app.kubernetes.io/part-of": "undermesh", "istio.io/dataplane-mode": "none"},
        },
        "spec": {
            "nodeName": node,
            "hostNetwork": true,
            "restartPolicy": "OnFailure",
            "serviceAccountName": field("serviceAccountName"),
            "automountServiceAccountToken": false,
            "priorityClassName": field("priorityClassName"),
            "imagePullSecrets": field("imagePullSecrets"),
            "tolerations": [{"operator": "Exists"}],
            "securityContext": field("securityContext"),
            "containers": [container],
            "volumes": without(&template["volumes"]),
        },
    })
}

/// What the record does not have: made by the control plane, or by Helm, or by another version.
async fn rest(cluster: &Cluster) -> anyhow::Result<()> {
    for class in cluster.list(kinds::GATEWAY_CLASS, None, "").await? {
        if class["spec"]["controllerName"] == CONTROLLER {
            delete(
                cluster,
                kinds::GATEWAY_CLASS,
                None,
                class["metadata"]["name"].as_str().unwrap_or_default(),
            )
            .await?;
        }
    }
    for kind in [kinds::CLUSTER_ROLE_BINDING, kinds::CLUSTER_ROLE, kinds::CONFIG_MAP] {
        labelled(cluster, kind, None).await?;
    }
    Ok(())
}

/// The same in the installation's own namespace.
async fn rest_of(cluster: &Cluster, namespace: &str) -> anyhow::Result<()> {
    let kinds = [
        kinds::DISRUPTION_BUDGET,
        kinds::SERVICE,
        kinds::ROLE_BINDING,
        kinds::ROLE,
        kinds::SERVICE_ACCOUNT,
        kinds::CONFIG_MAP,
    ];
    for kind in kinds {
        labelled(cluster, kind, Some(namespace)).await?;
    }
    Ok(())
}

/// Removes everything of a kind that says that it is ours, but for what goes last.
async fn labelled(cluster: &Cluster, kind: Kind, namespace: Option<&str>) -> anyhow::Result<()> {
    for object in cluster.list(kind, namespace, OURS).await? {
        let id = identify(kind, &object);
        if id.name != record::NAME && id.name != AGENTS {
            told(remove(cluster, &id).await?, &id);
        }
    }
    Ok(())
}

/// Takes the taint off nodes, else nothing would ever run on those that were waiting for an agent.
async fn untaint(cluster: &Cluster) -> anyhow::Result<()> {
    for node in cluster.list(kinds::NODE, None, "").await? {
        let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
        let kept: Vec<&Value> = taints.iter().filter(|taint| taint["key"] != TAINT).collect();
        if kept.len() == taints.len() {
            continue;
        }
        let name = node["metadata"]["name"].as_str().unwrap_or_default();
        // The version makes somebody else's change of the taints a conflict instead of a loss.
        let patch = json!({
            "metadata": {"resourceVersion": node["metadata"]["resourceVersion"]},
            "spec": {"taints": kept},
        });
        cluster.merge(kinds::NODE, (None, name), &patch).await.with_context(|| format!("untaint {name}"))?;
        println!("removed the taint of {name}");
    }
    Ok(())
}

/// Definitions that we wrote and nobody uses.
async fn definitions(cluster: &Cluster) -> anyhow::Result<()> {
    for definition in cluster.list(kinds::CUSTOM_RESOURCE, None, OURS).await? {
        let name = definition["metadata"]["name"].as_str().unwrap_or_default();
        if !crds::ours(&definition) {
            continue;
        }
        match cluster.count(&definition).await? {
            0 => delete(cluster, kinds::CUSTOM_RESOURCE, None, name).await?,
            used => println!("{name} stays: {used} objects of it"),
        }
    }
    Ok(())
}

/// Removes the namespace when the installation made it and nothing of anybody else is in it.
async fn leave(
    cluster: &Cluster,
    namespace: &str,
    record: Option<&Record>,
    deadline: Instant,
) -> anyhow::Result<()> {
    let Some(found) = cluster.get(kinds::NAMESPACE, None, namespace).await? else { return Ok(()) };
    let why = if record.is_some_and(|record| record.namespace_was_there) {
        "it was there before the installation".to_owned()
    } else if !is_ours(&found) {
        "it was not made by the installation".to_owned()
    } else {
        match cluster.inhabitants(namespace).await.map(|all| foreign(&all)) {
            Ok(others) if others.is_empty() => return end(cluster, namespace, deadline).await,
            Ok(others) => format!("it holds what is not ours: {}", others.join(", ")),
            // What cannot be seen may be there.
            Err(error) => format!("what it holds cannot be listed: {error}"),
        }
    };
    println!("namespace {namespace} stays: {why}");
    // Without the labels that we wrote; what others wrote is theirs, and what we overwrote is again as it was.
    apply(cluster, &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}))
        .await?;
    match record.map(|record| &record.namespace_labels).filter(|labels| !labels.is_empty()) {
        Some(labels) => {
            let patch = json!({"metadata": {"labels": labels}});
            let restored = cluster.merge(kinds::NAMESPACE, (None, namespace), &patch).await;
            restored.with_context(|| format!("give namespace {namespace} its labels back"))
        }
        None => Ok(()),
    }
}

/// (pure) Whether an object says that it is ours.
fn is_ours(object: &Value) -> bool {
    object["metadata"]["labels"][crds::PART_OF.0] == crds::PART_OF.1
}

/// (pure) What is neither ours nor made by Kubernetes itself. What has its owner here goes with it.
fn foreign(all: &[Value]) -> Vec<String> {
    let here: BTreeSet<&str> = all.iter().filter_map(|one| one["metadata"]["uid"].as_str()).collect();
    let foreign = all.iter().filter(|one| is_foreign(one, &here));
    foreign.map(|one| ObjectId::of(one).to_string()).collect()
}

fn is_foreign(object: &Value, here: &BTreeSet<&str>) -> bool {
    let meta = &object["metadata"];
    let mut owners = meta["ownerReferences"].as_array().into_iter().flatten();
    let owned = owners.any(|owner| owner["uid"].as_str().is_some_and(|uid| here.contains(uid)));
    // Whoever made the Service has the Endpoints; an Event or a metric holds nothing.
    let shadow = ["Event", "Endpoints", "PodMetrics"].iter().any(|kind| object["kind"] == *kind);
    let made = match object["kind"].as_str() {
        Some("ConfigMap") => meta["name"] == "kube-root-ca.crt" || meta["name"] == "istio-ca-root-cert",
        Some("ServiceAccount") => meta["name"] == "default",
        _ => false,
    };
    !(owned || is_ours(object) || shadow || made)
}

async fn end(cluster: &Cluster, namespace: &str, deadline: Instant) -> anyhow::Result<()> {
    delete(cluster, kinds::NAMESPACE, None, namespace).await?;
    while namespace_exists(cluster, namespace).await? {
        if Instant::now() >= deadline {
            bail!("namespace {namespace} does not go: kubectl get namespace {namespace} -o yaml");
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_installation_elsewhere_is_not_touched() {
        let places = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        assert!(!elsewhere(&places(&[]), "mesh").unwrap(), "leftovers may be removed");
        assert!(!elsewhere(&places(&["mesh"]), "mesh").unwrap());
        assert!(elsewhere(&places(&["mesh", "other"]), "mesh").unwrap());
        let said = elsewhere(&places(&["other"]), "mesh").unwrap_err().to_string();
        assert!(
            said.contains("namespace mesh but in other") && said.contains("nothing was changed"),
            "{said}"
        );
    }

    #[test]
    fn a_namespace_goes_with_nothing_of_anybody_else() {
        let object = |kind: &str, name: &str, more: Value| {
            let mut metadata = json!({"name": name, "namespace": "mesh"});
            crate::chart::values::overlay(&mut metadata, more);
            json!({"apiVersion": "v1", "kind": kind, "metadata": metadata})
        };
        for (kind, name, more, foreign) in [
            ("PersistentVolumeClaim", "data", json!({}), true),
            ("CronJob", "backup", json!({}), true),
            ("Deployment", "theirs", json!({}), true),
            (
                "Deployment",
                "undermesh-control",
                json!({"labels": {"app.kubernetes.io/part-of": "undermesh"}}),
                false,
            ),
            (
                "ReplicaSet",
                "x",
                json!({"ownerReferences": [{"name": "undermesh-control", "uid": "u"}]}),
                false,
            ),
            ("ReplicaSet", "y", json!({"ownerReferences": [{"name": "of-the-cluster", "uid": "v"}]}), true),
            ("ConfigMap", "kube-root-ca.crt", json!({}), false),
            ("ConfigMap", "theirs", json!({}), true),
            ("ServiceAccount", "default", json!({}), false),
            ("ServiceAccount", "theirs", json!({}), true),
            ("Secret", "cacerts", json!({}), true),
            ("Event", "e", json!({}), false),
        ] {
            let all = [object(kind, name, more), object("Event", "owner", json!({"uid": "u"}))];
            assert_eq!(super::foreign(&all).len(), usize::from(foreign), "{kind} {name}");
        }
    }

    #[test]
    fn pods_of_a_silent_node_are_not_waited_for() {
        let silent = BTreeSet::from(["b".to_owned()]);
        let pod = |node: &str| json!({"spec": {"nodeName": node}});
        assert!(is_on(&pod("b"), &silent) && !is_on(&pod("a"), &silent) && !is_on(&json!({}), &silent));
    }

    #[test]
    fn a_cleaner_is_an_agent_that_ends() {
        let values = chart::values(chart::Profile::Demo, Vec::new()).unwrap();
        let objects = chart::objects(&values, "mesh").unwrap();
        let agents = objects.iter().find(|object| object["kind"] == "DaemonSet").unwrap();
        let pod = cleaner(agents, "mesh", ("undermesh-clean-0", "a"));
        let container = &pod["spec"]["containers"][0];
        assert_eq!((&pod["spec"]["nodeName"], &container["args"][1]), (&"a".into(), &"--node=a".into()));
        assert_eq!(container["image"], format!("docker.io/undermesh/node:{}", chart::VERSION));
        assert!(container.get("readinessProbe").is_none());
        // It is made of what is kept as well.
        let again = kept(agents, "mesh");
        let again: Value = serde_json::from_str(again["data"]["agents"].as_str().unwrap()).unwrap();
        assert_eq!(cleaner(&again, "mesh", ("undermesh-clean-0", "a")), pod);
        // Every mount has its volume, and none is of what goes before the cleaning.
        let names = |list: &Value| -> std::collections::BTreeSet<String> {
            list.as_array().unwrap().iter().map(|item| item["name"].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(names(&container["volumeMounts"]), names(&pod["spec"]["volumes"]));
        assert!(!names(&pod["spec"]["volumes"]).contains("roots"));
    }
}
