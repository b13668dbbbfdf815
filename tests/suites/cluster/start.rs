//! Pods that send a marker from their first instruction, while everything around them starts, restarts or dies: the
//! marker is never seen on a node's links, and arrives in the end.

use std::net::SocketAddr;

use anyhow::{Context as _, ensure};
use mesh_tests::{
    cluster::{Cluster, Pod},
    wait,
};

/// Namespace of the pods.
pub const NAMESPACE: &str = "starts";
/// Nothing else on this machine says this.
const MARKER: &str = "UNDERMESH-START-MARKER-7f3a";
/// Pods that start in each round, each with one sender per address of the server.
const PODS: usize = 2;
const PORT: u16 = 9080;
const CONTAINERS: [&str; 3] = ["service", "v4", "v6"];

/// What happens while the pods start.
#[derive(Clone, Copy, Debug)]
enum Round {
    Calm,
    AgentRestarts,
    AgentKilled,
    KubeletKilled,
    RuntimeKilled,
    /// The node has no agent, no plugin and the taint of one that is new; then its kubelet starts, and with it the agent.
    NodeIsNew,
}

const ROUNDS: [Round; 6] = [
    Round::Calm,
    Round::AgentRestarts,
    Round::AgentKilled,
    Round::KubeletKilled,
    Round::RuntimeKilled,
    Round::NodeIsNew,
];
/// Taken away by the control plane when the node's agent is in force.
const TAINT: &str = "undermesh.io/agent-not-ready";
/// What the agent puts on its node for the runtime.
const PLUGIN: [&str; 2] = ["/etc/cni/net.d/00-undermesh.conflist", "/opt/cni/bin/undermesh-cni"];

/// Every round.
pub fn no_leak(cluster: &Cluster) -> anyhow::Result<()> {
    if !cluster.is_own() {
        return Ok(());
    }
    let nodes = cluster.nodes()?;
    let (near, far) = (nodes.first().context("no node")?, nodes.get(1).context("one node only")?);
    cluster.delete_namespaces(&[NAMESPACE])?;
    cluster.apply(&server_yaml(far))?;
    cluster.run(&["-n", NAMESPACE, "wait", "pod/server", "--for=condition=Ready", "--timeout=60s"])?;
    let server = cluster.pod(NAMESPACE, "server")?;
    ensure!(server.ips.len() == 2, "the server has not both families: {:?}", server.ips);
    for round in ROUNDS {
        one(cluster, round, near, far, &server).with_context(|| format!("{round:?}"))?;
    }
    cluster.delete_namespaces(&[NAMESPACE])
}

fn one(cluster: &Cluster, round: Round, near: &str, far: &str, server: &Pod) -> anyhow::Result<()> {
    let taps = [cluster.tap(near)?, cluster.tap(far)?];
    // Half of the pods are on their way when it happens, the others come in the middle of it.
    if matches!(round, Round::NodeIsNew) {
        make_new(cluster, near)?;
    }
    cluster.apply(&senders_yaml("before", near, server))?;
    happens(cluster, round, near)?;
    cluster.apply(&senders_yaml("after", near, server))?;
    recovers(cluster, round, near)?;
    let arrived = ["before", "after"].iter().try_for_each(|part| all_arrived(cluster, part));
    for (tap, node) in taps.into_iter().zip([near, far]) {
        let seen = tap.finish().holding(MARKER.as_bytes());
        ensure!(seen == 0, "{seen} frames on {node} hold the marker");
    }
    arrived?;
    let (sandboxes, waited) = longest_wait(cluster)?;
    println!(
        "report: {round:?}: of {sandboxes} sandboxes none waited longer than {waited} ms to have its pod known"
    );
    let fixed = ["-n", NAMESPACE, "delete", "pod", "-l", "app=sender", "--wait=true", "--timeout=60s"];
    cluster.run(&fixed).map(drop)
}

fn happens(cluster: &Cluster, round: Round, node: &str) -> anyhow::Result<()> {
    match round {
        Round::Calm => Ok(()),
        Round::NodeIsNew => {
            ensure!(is_tainted(cluster, node)?, "the taint went although no agent runs");
            cluster.start(node, "kubelet")
        }
        Round::AgentRestarts => {
            let agent = cluster.agent(node)?;
            let fixed = ["-n", mesh_tests::cluster::MESH_NAMESPACE, "delete", "pod", "--wait=false"];
            cluster.run(&[&fixed[..], &[&agent.name]].concat()).map(drop)
        }
        Round::AgentKilled => cluster.kill_agent(node),
        Round::KubeletKilled => cluster.kill(node, "kubelet"),
        Round::RuntimeKilled => cluster.kill(node, "containerd"),
    }
}

fn recovers(cluster: &Cluster, round: Round, node: &str) -> anyhow::Result<()> {
    match round {
        Round::KubeletKilled => cluster.start(node, "kubelet"),
        Round::RuntimeKilled => cluster.start(node, "containerd"),
        Round::NodeIsNew => {
            wait::until_within(wait::DEADLINE * 2, "the taint to go", || match is_tainted(cluster, node) {
                Ok(false) => Ok(()),
                other => Err(format!("{other:?}")),
            })?;
            PLUGIN.iter().try_for_each(|file| cluster.on(node, &["test", "-e", file]).map(drop))?;
            // By then, not soon after: what it says now is of the agent that began with the kubelet.
            let said = cluster.said(node, "/healthz/ready")?;
            ensure!(said.starts_with("ready"), "the taint went before the agent was in force: {said}");
            Ok(())
        }
        Round::Calm | Round::AgentRestarts | Round::AgentKilled => Ok(()),
    }
}

/// Makes a node what it is before its first agent.
fn make_new(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    cluster.kill(node, "kubelet")?;
    cluster.kill_agent(node)?;
    cluster.on(node, &[&["rm"], &PLUGIN[..]].concat())?;
    cluster.run(&["taint", "node", node, &format!("{TAINT}=:NoExecute")]).map(drop)
}

fn is_tainted(cluster: &Cluster, node: &str) -> anyhow::Result<bool> {
    let taints = cluster.run(&["get", "node", node, "-o", "jsonpath={.spec.taints[*].key}"])?;
    Ok(taints.split_whitespace().any(|key| key == TAINT))
}

/// Of how many sandboxes of ours the agents that run now say how long they waited for the control plane to tell of their
/// pod, and the longest wait, milliseconds.
fn longest_wait(cluster: &Cluster) -> anyhow::Result<(usize, u64)> {
    let millis = |line: &String| {
        let (_, rest) = line.split_once("waited_ms=")?;
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    let waits: Vec<u64> = cluster.agents_say("waited_ms=", NAMESPACE)?.iter().filter_map(millis).collect();
    Ok((waits.len(), waits.into_iter().max().unwrap_or_default()))
}

/// Each sender has had an answer: what was not seen was sent all the same.
fn all_arrived(cluster: &Cluster, part: &str) -> anyhow::Result<()> {
    for number in 0..PODS {
        for container in CONTAINERS {
            let name = format!("{part}-{number}");
            wait::until_within(wait::DEADLINE * 2, &format!("an answer to {container} of {name}"), || {
                let log = cluster.run(&["-n", NAMESPACE, "logs", &name, "-c", container, "--tail=50"]);
                let log = log.map_err(|error| format!("{error:#}"))?;
                if log.lines().any(|line| line.starts_with("200 ")) { Ok(()) } else { Err(log) }
            })?;
        }
    }
    Ok(())
}

fn server_yaml(node: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Namespace
metadata: {{name: {NAMESPACE}, labels: {{istio.io/dataplane-mode: ambient}}}}
---
apiVersion: v1
kind: Service
metadata: {{name: server, namespace: {NAMESPACE}}}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {{app: server}}
  ports: [{{name: http, port: {PORT}, targetPort: {PORT}}}]
---
apiVersion: v1
kind: Pod
metadata: {{name: server, namespace: {NAMESPACE}, labels: {{app: server}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  containers:
  - {{name: server, image: 'docker.io/undermesh/bookinfo:0.1.0', args: [details]}}
"
    )
}

/// Senders to the service by name, and to the pod by each address: the latter need not even wait for DNS.
fn senders_yaml(part: &str, node: &str, server: &Pod) -> String {
    let by_address = server.ips.iter().map(|ip| SocketAddr::new(*ip, PORT).to_string());
    let hosts: Vec<String> = std::iter::once(format!("server:{PORT}")).chain(by_address).collect();
    let containers: String = CONTAINERS
        .iter()
        .zip(&hosts)
        .map(|(name, host)| {
            format!(
                "
  - name: {name}
    image: 'docker.io/undermesh/bookinfo:0.1.0'
    args: [get, -n, '1000000', --pause, '0.05', -m, '1', -H, 'x-marker: {MARKER}', 'http://{host}/details/0']"
            )
        })
        .collect();
    (0..PODS)
        .map(|number| {
            format!(
                "
---
apiVersion: v1
kind: Pod
metadata: {{name: {part}-{number}, namespace: {NAMESPACE}, labels: {{app: sender}}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: {node}}}
  terminationGracePeriodSeconds: 0
  containers:{containers}
"
            )
        })
        .collect()
}
