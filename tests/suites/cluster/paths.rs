//! {one node, across nodes} × {v4, v6} × {service, pod}: reached, and by the path that it should take.

use std::net::{SocketAddr, TcpStream};

use anyhow::{Context as _, ensure};
use mesh_tests::{
    cluster::{Cluster, Pod},
    peer::{Outcome, Server, greet_and_echo, ping, talk},
    wait, world,
};

use crate::story;

/// Namespace of the pods.
pub const NAMESPACE: &str = "paths";
const PORT: u16 = 8080;

/// A client, a server on its node and one on another: pods that do nothing by themselves; this process talks from inside
/// their namespaces, so that connections can be held whatever happens to the programs of the cluster.
pub struct Trio<'a> {
    cluster: &'a Cluster,
    /// The client.
    pub client: Pod,
    client_inside: world::Pod,
    /// On the client's node.
    pub near: Peer,
    /// On another node.
    pub far: Peer,
}

/// A server.
pub struct Peer {
    /// Its pod.
    pub pod: Pod,
    /// Addresses of its service, then of its pod.
    pub addresses: Vec<SocketAddr>,
    _server: Server,
}

impl<'a> Trio<'a> {
    /// Makes the pods in a namespace of their own and waits until the mesh serves them.
    pub fn up(cluster: &'a Cluster) -> anyhow::Result<Self> {
        let nodes = cluster.nodes()?;
        let (near, far) = (nodes.first().context("no node")?, nodes.get(1).context("one node only")?);
        cluster.delete_namespaces(&[NAMESPACE])?;
        let pods = [("client", near), ("near", near), ("far", far)];
        let pods: String = pods.iter().map(|(name, node)| pod_yaml(name, node)).collect();
        cluster.apply(&format!("{NAMESPACE_YAML}{pods}"))?;
        cluster.run(&["-n", NAMESPACE, "wait", "pod", "--all", "--for=condition=Ready", "--timeout=60s"])?;
        story::enrolled(cluster, NAMESPACE)?;
        let client = cluster.pod(NAMESPACE, "client")?;
        Ok(Self {
            cluster,
            client_inside: cluster.enterable(&client)?,
            client,
            near: Peer::up(cluster, "near")?,
            far: Peer::up(cluster, "far")?,
        })
    }

    /// Takes the pods away.
    pub fn down(self) -> anyhow::Result<()> {
        self.cluster.delete_namespaces(&[NAMESPACE])
    }

    /// One attempt to talk.
    pub fn attempt(&self, to: SocketAddr) -> Result<(SocketAddr, TcpStream), String> {
        match talk(&self.client_inside, to) {
            Outcome::Greeted { seen, stream } => Ok((seen, stream)),
            Outcome::Refused(why) => Err(why),
        }
    }

    /// A connection, as soon as there is one.
    pub fn reach(&self, to: SocketAddr) -> anyhow::Result<(SocketAddr, TcpStream)> {
        wait::until(&format!("an answer of {to}"), || self.attempt(to))
    }
}

impl Peer {
    fn up(cluster: &Cluster, name: &str) -> anyhow::Result<Self> {
        let pod = cluster.pod(NAMESPACE, name)?;
        let server = Server::start(&cluster.enterable(&pod)?, PORT, greet_and_echo())?;
        let service = cluster.service_ips(NAMESPACE, name)?;
        ensure!(service.len() == 2 && pod.ips.len() == 2, "{name} has not both families");
        let addresses = service.iter().chain(&pod.ips).map(|ip| SocketAddr::new(*ip, PORT)).collect();
        Ok(Self { pod, addresses, _server: server })
    }
}

const NAMESPACE_YAML: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: paths, labels: {istio.io/dataplane-mode: ambient}}
";

fn pod_yaml(name: &str, node: &str) -> String {
    format!(
        "
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {NAMESPACE}}}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {{app: {name}}}
  ports: [{{name: tcp, port: {PORT}, targetPort: {PORT}}}]
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {NAMESPACE}, labels: {{app: {name}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  containers:
  - {{name: idle, image: 'docker.io/undermesh/bookinfo:0.1.0', args: [wait]}}
"
    )
}

/// All of them.
pub fn paths(cluster: &Cluster) -> anyhow::Result<()> {
    if !cluster.is_own() {
        return Ok(());
    }
    let trio = Trio::up(cluster)?;
    let mut failures = Vec::new();
    for (server, path) in [(&trio.near, "direct"), (&trio.far, "tunnel")] {
        for to in &server.addresses {
            if let Err(error) = one(&trio, server, *to, path) {
                failures.push(format!("{} at {to}: {error:#}", server.pod.name));
            }
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    trio.down()
}

/// A connection that is held: reached, the client's address kept, and listed with its path by the server's agent.
fn one(trio: &Trio<'_>, server: &Peer, to: SocketAddr, path: &str) -> anyhow::Result<()> {
    let (client, server) = (&trio.client, &server.pod);
    let (seen, mut stream) = trio.reach(to)?;
    ensure!(client.ips.contains(&seen.ip()), "the server saw {seen}, the client is {:?}", client.ips);
    ping(&mut stream, b"held")?;
    let listed = wait::until("the connection to be listed", || {
        let all = trio.cluster.ask(&server.node, "/connections").map_err(|error| format!("{error:#}"))?;
        let is_it = |connection: &&serde_json::Value| {
            let address = |end: &str| connection[end]["addr"].as_str()?.parse::<SocketAddr>().ok();
            let to_server = address("dst").is_some_and(|dst| server.ips.contains(&dst.ip()));
            let from_client = address("src").is_some_and(|src| client.ips.contains(&src.ip()));
            to_server && from_client && connection["path"].is_string()
        };
        all.as_array().into_iter().flatten().find(is_it).cloned().ok_or_else(|| all.to_string())
    })?;
    ensure!(listed["path"] == path, "by path {}, not {path}: {listed}", listed["path"]);
    Ok(())
}
