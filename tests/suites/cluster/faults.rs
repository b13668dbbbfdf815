//! What dies, and what goes on without it.

use anyhow::{Context as _, ensure};
use mesh_tests::{
    cluster::{Cluster, MESH_NAMESPACE},
    peer::ping,
    wait,
};

use crate::{paths::Trio, story};

const CONTROL: &str = "control";
const CONTROL_PLANE: &str = "deployment/undermesh-control";

/// Without its agent a node keeps what the kernel decides and refuses the rest. The kubelet is down meanwhile, so that
/// nobody starts the agent again before that has been seen.
pub fn agent(cluster: &Cluster) -> anyhow::Result<()> {
    if !cluster.is_own() {
        return Ok(());
    }
    let trio = Trio::up(cluster)?;
    let node = trio.client.node.clone();
    let mut held = Vec::new();
    for to in &trio.near.addresses {
        held.push(trio.reach(*to)?.1);
    }
    for to in &trio.far.addresses {
        trio.reach(*to)?;
    }
    cluster.kill(&node, "kubelet")?;
    let outage = cluster.kill_agent(&node).and_then(|()| {
        for stream in &mut held {
            ping(stream, b"still there").context("a connection on one node, held since before")?;
        }
        for to in &trio.near.addresses {
            trio.attempt(*to).map_err(anyhow::Error::msg).with_context(|| format!("on one node, to {to}"))?;
        }
        for to in &trio.far.addresses {
            ensure!(trio.attempt(*to).is_err(), "across nodes, {to} answered without an agent");
        }
        Ok(())
    });
    cluster.start(&node, "kubelet")?;
    outage?;
    for to in trio.near.addresses.iter().chain(&trio.far.addresses) {
        trio.reach(*to).context("after the agent was started again")?;
    }
    trio.down()
}

/// Neither API server nor etcd: traffic goes on, old connections and new ones; afterwards new pods join as before.
pub fn api_server(cluster: &Cluster) -> anyhow::Result<()> {
    if !cluster.is_own() {
        return Ok(());
    }
    let trio = Trio::up(cluster)?;
    cluster.kill(CONTROL, "kube-apiserver")?;
    cluster.kill(CONTROL, "etcd")?;
    let outage = goes_on(&trio);
    cluster.start(CONTROL, "etcd")?;
    cluster.start(CONTROL, "kube-apiserver")?;
    outage?;
    wait::until("the API server", || {
        cluster.run(&["get", "--raw", "/readyz"]).map(drop).map_err(|error| format!("{error:#}"))
    })?;
    trio.down()?;
    // New pods are created, captured and served.
    Trio::up(cluster)?.down()
}

/// No control plane: traffic goes on; a pod that is new waits, with a reason, and needs nobody's hand afterwards.
pub fn control_plane(cluster: &Cluster) -> anyhow::Result<()> {
    if !cluster.is_own() {
        return Ok(());
    }
    let trio = Trio::up(cluster)?;
    let before = cluster.json(&["-n", MESH_NAMESPACE, "get", CONTROL_PLANE])?;
    let replicas = before["spec"]["replicas"].as_u64().unwrap_or(1).to_string();
    let scale = |count: &str| {
        cluster.run(&["-n", MESH_NAMESPACE, "scale", CONTROL_PLANE, &format!("--replicas={count}")])
    };
    scale("0")?;
    wait::until("the control plane to be gone", || {
        let pods = cluster.pods(MESH_NAMESPACE).map_err(|error| format!("{error:#}"))?;
        let left: Vec<_> = pods.iter().filter(|pod| pod.name.starts_with("undermesh-control-")).collect();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })?;
    let outage = goes_on(&trio).and_then(|()| new_pod_waits(cluster, &trio.client.node));
    scale(&replicas)?;
    outage?;
    story::enrolled(cluster, crate::paths::NAMESPACE)?;
    cluster.run(&[
        "-n",
        crate::paths::NAMESPACE,
        "wait",
        "pod/late",
        "--for=condition=Ready",
        "--timeout=120s",
    ])?;
    trio.down()
}

/// Connections are made and carry bytes, to every address.
fn goes_on(trio: &Trio<'_>) -> anyhow::Result<()> {
    for to in trio.near.addresses.iter().chain(&trio.far.addresses) {
        let (_, mut stream) =
            trio.attempt(*to).map_err(anyhow::Error::msg).with_context(|| to.to_string())?;
        ping(&mut stream, b"as before")?;
    }
    Ok(())
}

/// A pod whose identity nobody can give is not started, and its events say why.
fn new_pod_waits(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    let namespace = crate::paths::NAMESPACE;
    cluster.apply(&format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: late, namespace: {namespace}, labels: {{app: late}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  containers:
  - {{name: idle, image: 'docker.io/undermesh/bookinfo:0.1.0', args: [wait]}}
"
    ))?;
    wait::until("an event that says why", || {
        let selector = "--field-selector=involvedObject.name=late,reason=FailedCreatePodSandBox";
        let events = cluster.run(&["-n", namespace, "get", "events", selector, "-o", "wide"]);
        let events = events.map_err(|error| format!("{error:#}"))?;
        if events.contains("undermesh") { Ok(()) } else { Err(events) }
    })?;
    let late = cluster.pod(namespace, "late")?;
    ensure!(!late.ready, "a pod runs that nobody could vouch for");
    Ok(())
}
