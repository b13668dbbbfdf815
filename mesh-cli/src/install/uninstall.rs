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
    if !elsewhere {
        rest(cluster).await?;
        if wish.definitions {
            definitions(cluster).await?;
        }
    }
    let was_there = record.as_ref().is_some_and(|record| record.namespace_was_there);
    leave(cluster, namespace, was_there, deadline).await?;
    // Last of all: whoever comes again must know whose the namespace is.
    delete(cluster, kinds::CONFIG_MAP, Some(namespace), record::NAME).await?;
    println!("Undermesh is gone; labels, routes and policies of users are as they were");
    Ok(())
}

/// Namespaces where an installation is, or what is left of one.
async fn places(cluster: &Cluster) -> anyhow::Result<BTreeSet<String>> {
    let mut places = BTreeSet::new();
    let marks = [
        (kinds::DEPLOYMENT, wait::CONTROL.name),
        (kinds::DAEMON_SET, wait::NODE.name),
        (kinds::CONFIG_MAP, record::NAME),
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
    let Some(record) = record else { return Ok(None) };
    let values = chart::values(chart::Profile::Default, vec![record.values.clone()])?;
    Ok(chart::objects(&values, namespace)?.into_iter().find(|object| object["kind"] == "DaemonSet"))
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
    let nodes: Vec<&str> = nodes.iter().filter_map(|node| node["metadata"]["name"].as_str()).collect();
    println!("cleaning {} nodes", nodes.len());
    let down = not_ready(cluster).await?;
    let (mut waiting, mut unclean) = (BTreeMap::new(), Vec::new());
    for (number, node) in nodes.iter().enumerate() {
        if down.contains(*node) {
            unclean.push(((*node).to_owned(), "the node is not ready".to_owned()));
            continue;
        }
        let name = format!("undermesh-clean-{number}");
        // One of a former attempt has another node, or has ended.
        while cluster.delete(kinds::POD, Some(namespace), &name).await? {
            if Instant::now() >= deadline {
                bail!("pod {namespace}/{name} of a former attempt does not go");
            }
            tokio::time::sleep(LOOK).await;
        }
        apply(cluster, &cleaner(agents, namespace, (&name, node))).await?;
        waiting.insert(name, ((*node).to_owned(), "it did not start".to_owned()));
    }
    let label = format!("{}={}", CLEANER.0, CLEANER.1);
    loop {
        for pod in cluster.list(kinds::POD, Some(namespace), &label).await? {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            match pod["status"]["phase"].as_str() {
                Some("Succeeded") => {
                    if let Some((node, _)) = waiting.remove(name) {
                        println!("{node} is clean");
                    }
                }
                _ => {
                    if let (Some((_, why)), Some(now)) = (waiting.get_mut(name), why(&pod)) {
                        *why = now;
                    }
                }
            }
        }
        if waiting.is_empty() || Instant::now() >= deadline {
            break;
        }
        tokio::time::sleep(LOOK).await;
    }
    for number in 0..nodes.len() {
        delete(cluster, kinds::POD, Some(namespace), &format!("undermesh-clean-{number}")).await?;
    }
    unclean.extend(waiting.into_values());
    Ok(unclean)
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
        for object in cluster.list(kind, None, OURS).await? {
            let id = identify(kind, &object);
            // Goes last.
            if id.name != record::NAME {
                told(remove(cluster, &id).await?, &id);
            }
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
async fn leave(cluster: &Cluster, namespace: &str, was_there: bool, deadline: Instant) -> anyhow::Result<()> {
    let Some(found) = cluster.get(kinds::NAMESPACE, None, namespace).await? else { return Ok(()) };
    let why = if was_there {
        "it was there before the installation".to_owned()
    } else if !is_ours(&found) {
        "it was not made by the installation".to_owned()
    } else {
        // What cannot be seen may be there.
        let all = cluster.inhabitants(namespace).await.context("list what the namespace holds")?;
        let others: Vec<String> =
            all.iter().filter(|one| is_foreign(one)).map(|one| ObjectId::of(one).to_string()).collect();
        if others.is_empty() {
            return end(cluster, namespace, deadline).await;
        }
        format!("it holds what is not ours: {}", others.join(", "))
    };
    println!("namespace {namespace} stays: {why}");
    // Without the labels that we wrote; what others wrote is theirs.
    apply(cluster, &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})).await
}

/// (pure) Whether an object says that it is ours.
fn is_ours(object: &Value) -> bool {
    object["metadata"]["labels"][crds::PART_OF.0] == crds::PART_OF.1
}

/// (pure) Whether an object of the namespace is neither ours nor made by Kubernetes itself.
fn is_foreign(object: &Value) -> bool {
    let meta = &object["metadata"];
    let owned = meta["ownerReferences"].as_array().is_some_and(|owners| !owners.is_empty());
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
            ("ReplicaSet", "x", json!({"ownerReferences": [{"name": "undermesh-control"}]}), false),
            ("ConfigMap", "kube-root-ca.crt", json!({}), false),
            ("ConfigMap", "theirs", json!({}), true),
            ("ServiceAccount", "default", json!({}), false),
            ("ServiceAccount", "theirs", json!({}), true),
            ("Secret", "cacerts", json!({}), true),
            ("Event", "e", json!({}), false),
        ] {
            assert_eq!(is_foreign(&object(kind, name, more)), foreign, "{kind} {name}");
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
        // Every mount has its volume, and none is of what goes before the cleaning.
        let names = |list: &Value| -> std::collections::BTreeSet<String> {
            list.as_array().unwrap().iter().map(|item| item["name"].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(names(&container["volumeMounts"]), names(&pod["spec"]["volumes"]));
        assert!(!names(&pod["spec"]["volumes"]).contains("roots"));
    }
}
