//! Takes the mesh out of a cluster: pods are released, agents drain, every node is cleaned, then what is left at the API
//! server goes. What users wrote stays.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use mesh_control::status::object::CONTROLLER;
use serde_json::{Value, json};

use super::{
    apply, crds,
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
    let record = Record::read(cluster, namespace).await?;
    let agents = agents(cluster, namespace, record.as_ref()).await?;
    release(cluster, namespace).await?;
    // Nothing is made anew from here on.
    delete(cluster, kinds::DEPLOYMENT, Some(namespace), wait::CONTROL.name).await?;
    gone(cluster, namespace, wait::CONTROL, deadline).await?;
    waypoints(cluster).await?;
    delete(cluster, kinds::DAEMON_SET, Some(namespace), wait::NODE.name).await?;
    gone(cluster, namespace, wait::NODE, deadline).await?;
    let unclean = match (&agents, namespace_exists(cluster, namespace).await?) {
        (Some(agents), true) => clean(cluster, namespace, agents, deadline).await?,
        _ => Vec::new(),
    };
    let here = record.iter().flat_map(|record| record.objects.iter().rev());
    for id in here.filter(|id| id.kind != "Namespace" && id.kind != "DaemonSet") {
        told(remove(cluster, id).await?, id);
    }
    rest(cluster, namespace).await?;
    untaint(cluster).await?;
    if wish.definitions {
        definitions(cluster).await?;
    }
    if !unclean.is_empty() {
        for (node, why) in &unclean {
            eprintln!("{node} is not clean: {why}");
        }
        bail!(
            "{} nodes are not clean; pods there stay captured. `meshctl uninstall` again when they are up, or there: \
             mesh-node clean --all",
            unclean.len()
        );
    }
    delete(cluster, kinds::CONFIG_MAP, Some(namespace), record::NAME).await?;
    leave(cluster, namespace, deadline).await?;
    println!("Undermesh is gone; labels, routes and policies of users are as they were");
    Ok(())
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
async fn release(cluster: &Cluster, namespace: &str) -> anyhow::Result<()> {
    for pod in wait::pods(cluster, namespace, wait::NODE).await? {
        let (Some(name), node) = (pod["metadata"]["name"].as_str(), &pod["spec"]["nodeName"]) else {
            continue;
        };
        let command = [wait::NODE.program, "release"];
        match cluster.exec((namespace, name), wait::NODE.container, &command).await {
            Ok(_) => println!("released the pods of {}", node.as_str().unwrap_or("?")),
            // Cleaning takes them out as well; until then they are refused.
            Err(error) => {
                println!("{}: pods are released by cleaning: {error}", node.as_str().unwrap_or("?"))
            }
        }
    }
    Ok(())
}

/// Waits until a component has no pod left.
async fn gone(
    cluster: &Cluster,
    namespace: &str,
    component: wait::Component,
    deadline: Instant,
) -> anyhow::Result<()> {
    let mut told = None;
    loop {
        let left = wait::pods(cluster, namespace, component).await?.len();
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
    for kind in [kinds::DEPLOYMENT, kinds::SERVICE, kinds::SERVICE_ACCOUNT, kinds::CONFIG_MAP] {
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
    let mut waiting = BTreeMap::new();
    for (number, node) in nodes.iter().enumerate() {
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
    Ok(waiting.into_values().collect())
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
async fn rest(cluster: &Cluster, namespace: &str) -> anyhow::Result<()> {
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
    delete(cluster, kinds::SECRET, Some(namespace), "undermesh-ca").await?;
    delete(cluster, kinds::LEASE, Some(namespace), "undermesh-control").await
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

/// Removes the namespace when nothing of anybody else is in it.
async fn leave(cluster: &Cluster, namespace: &str, deadline: Instant) -> anyhow::Result<()> {
    let Some(found) = cluster.get(kinds::NAMESPACE, None, namespace).await? else { return Ok(()) };
    if found["metadata"]["labels"]["app.kubernetes.io/part-of"] != "undermesh" {
        println!("namespace {namespace} stays: it was not made by the installation");
        return Ok(());
    }
    let mut others = Vec::new();
    for kind in [kinds::SECRET, kinds::POD, kinds::SERVICE, kinds::CONFIG_MAP] {
        for object in cluster.list(kind, Some(namespace), "").await? {
            let id = identify(kind, &object);
            let ours = object["metadata"]["labels"]["app.kubernetes.io/part-of"] == "undermesh";
            if !ours && id.name != "kube-root-ca.crt" {
                others.push(id.to_string());
            }
        }
    }
    for kind in ["authorizationpolicies", "peerauthentications"] {
        let count = cluster.count_in("security.istio.io", "v1", kind, namespace).await?;
        if count > 0 {
            others.push(format!("{count} {kind}"));
        }
    }
    if !others.is_empty() {
        println!("namespace {namespace} stays, since it holds what is not ours: {}", others.join(", "));
        return Ok(());
    }
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
