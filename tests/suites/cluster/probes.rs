//! The kubelet reaches pods under STRICT, by every kind of probe; nobody else does who looks like it.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    process::{Child, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use mesh_tests::{
    cluster::{Cluster, Pod},
    grpc::grpc_health,
    peer::{Behaviour, Server, echo_only},
    wait, world,
};

const NAMESPACE: &str = "probed";
const IMAGE: &str = "docker.io/undermesh/bookinfo:0.1.0";
const HTTP: u16 = 8081;
const TCP: u16 = 8082;
const GRPC: u16 = 8083;
const DEADLINE: Duration = Duration::from_secs(10);

/// What was asked for, and by whom.
type Asked = Arc<Mutex<Vec<(String, IpAddr)>>>;

/// Answers one request of HTTP/1.1 and notes it.
fn noting(asked: &Asked) -> Behaviour {
    let asked = asked.clone();
    Arc::new(move |mut stream, peer| {
        // The whole head: what is left unread turns the end into a reset.
        let lines = BufReader::new(&stream).lines().map_while(Result::ok);
        let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
        if let Some(path) = head.first().and_then(|line| line.split(' ').nth(1)) {
            let path = path.to_owned();
            asked.lock().unwrap_or_else(PoisonError::into_inner).push((path, peer.ip().to_canonical()));
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok");
        }
    })
}

fn count(asked: &Asked, wanted: &str) -> usize {
    let asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
    asked.iter().filter(|(path, _)| path == wanted).count()
}

/// Probes of three kinds, a hook, a forwarded port; and a pod of the host's network, at the kubelet's own address.
pub fn probes(cluster: &Cluster) -> anyhow::Result<()> {
    if !cluster.is_own() {
        return Ok(());
    }
    cluster.delete_namespaces(&[NAMESPACE])?;
    let node = cluster.nodes()?.into_iter().next().context("no node")?;
    cluster.apply(&yaml(&node))?;
    let pod = wait::until("the pod to be served", || serving(cluster).map_err(|error| format!("{error:#}")))?;
    ensure!(!pod.ready, "ready, and nobody has answered a probe yet");
    let inside = cluster.enterable(&pod)?;
    let asked = Asked::default();
    let _servers = [
        Server::start(&inside, HTTP, noting(&asked))?,
        Server::start(&inside, TCP, echo_only())?,
        Server::start(&inside, GRPC, grpc_health())?,
    ];
    cluster.run(&["-n", NAMESPACE, "wait", "pod/probed", "--for=condition=Ready", "--timeout=60s"])?;
    ensure!(count(&asked, "/ready") > 0, "ready without its probe: {asked:?}");

    imitators(cluster, &pod, &asked)?;
    forwarded(cluster, &asked)?;
    greeting(cluster, &pod, &asked)?;
    cluster.run(&["-n", NAMESPACE, "delete", "pod", "probed", "--timeout=60s"])?;
    ensure!(count(&asked, "/stop") == 1, "the hook was not called: {asked:?}");
    cluster.delete_namespaces(&[NAMESPACE])
}

fn serving(cluster: &Cluster) -> anyhow::Result<Pod> {
    let pod = cluster.pod(NAMESPACE, "probed")?;
    let shown = cluster.ask(&pod.node, "/pods")?;
    let mut served = shown.as_array().into_iter().flatten();
    let own = served.find(|shown| shown["uid"] == *pod.uid).context("the agent does not know it")?;
    ensure!(own["state"] == "serving", "{own}");
    ensure!(!pod.ips.is_empty(), "its status has no address yet");
    Ok(pod)
}

/// In the host's network on the same node: the kubelet's address, another cgroup. And a process of the node itself.
fn imitators(cluster: &Cluster, pod: &Pod, asked: &Asked) -> anyhow::Result<()> {
    cluster.run(&["-n", NAMESPACE, "wait", "pod/imitator", "--for=condition=Ready", "--timeout=60s"])?;
    for ip in &pod.ips {
        let url = format!("http://{}/imitator", SocketAddr::new(*ip, HTTP));
        let got = cluster.get(NAMESPACE, "imitator", &["-m", "3", &url])?;
        ensure!(!got.ok, "{url} answered a pod of the host's network: {got:?}");
    }
    let host = world::Pod { netns: cluster.machine_netns(&pod.node)?, ..cluster.enterable(pod)? };
    for ip in &pod.ips {
        let to = SocketAddr::new(*ip, HTTP);
        ensure!(!fetched(&host, to, "/imitator"), "{to} answered a process of the node that is no kubelet");
    }
    ensure!(count(asked, "/imitator") == 0, "the application heard an imitator");
    Ok(())
}

fn fetched(from: &world::Pod, to: SocketAddr, path: &str) -> bool {
    let Ok(stream) = mesh_tests::peer::dial(from, to) else { return false };
    ask(stream, path).is_ok_and(|answer| answer.contains("200 OK"))
}

fn ask(mut stream: TcpStream, path: &str) -> std::io::Result<String> {
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// kubectl while it forwards.
struct Forwarding(Child);

impl Drop for Forwarding {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The container runtime dials inside the pod.
fn forwarded(cluster: &Cluster, asked: &Asked) -> anyhow::Result<()> {
    let ports = format!(":{HTTP}");
    let mut command = cluster.kubectl(&["-n", NAMESPACE, "port-forward", "pod/probed", &ports]);
    let mut child = command.stdout(Stdio::piped()).spawn().context("start kubectl")?;
    let output = child.stdout.take().context("kubectl's output")?;
    let _forwarding = Forwarding(child);
    let mut line = String::new();
    // Open for as long as kubectl has something to say.
    let mut output = BufReader::new(output);
    output.read_line(&mut line)?;
    // `Forwarding from 127.0.0.1:40123 -> 8081`
    let local = line.split(' ').nth(2).and_then(|local| local.parse::<SocketAddr>().ok());
    let local = local.with_context(|| format!("kubectl said {line:?}"))?;
    let answer = ask(TcpStream::connect_timeout(&local, DEADLINE)?, "/forwarded")?;
    ensure!(answer.contains("200 OK") && count(asked, "/forwarded") == 1, "{answer:?}, {asked:?}");
    Ok(())
}

/// A pod that calls from its `postStart` hook, which runs before its status has an address.
fn greeting(cluster: &Cluster, to: &Pod, asked: &Asked) -> anyhow::Result<()> {
    let url = format!("http://{}/greeting", SocketAddr::new(*to.ips.first().context("no address")?, HTTP));
    cluster.apply(&format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: greeter, namespace: {NAMESPACE}}}
spec:
  nodeName: {}
  terminationGracePeriodSeconds: 0
  containers:
  - name: greeter
    image: {IMAGE}
    args: [wait]
    lifecycle: {{postStart: {{exec: {{command: [bookinfo, get, -m, '20', '{url}']}}}}}}
",
        to.node
    ))?;
    cluster.run(&["-n", NAMESPACE, "wait", "pod/greeter", "--for=condition=Ready", "--timeout=60s"])?;
    let greeter = cluster.json(&["-n", NAMESPACE, "get", "pod", "greeter"])?;
    let restarts = &greeter["status"]["containerStatuses"][0]["restartCount"];
    ensure!(
        *restarts == 0 && count(asked, "/greeting") == 1,
        "the hook failed: {restarts} restarts, {asked:?}"
    );
    Ok(())
}

fn yaml(node: &str) -> String {
    let image = IMAGE;
    format!(
        "
apiVersion: v1
kind: Namespace
metadata: {{name: {NAMESPACE}, labels: {{istio.io/dataplane-mode: ambient}}}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: default, namespace: {NAMESPACE}}}
spec: {{mtls: {{mode: STRICT}}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: probed, namespace: {NAMESPACE}, labels: {{app: probed}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 5
  containers:
  - name: http
    image: {image}
    args: [wait]
    readinessProbe: {{httpGet: {{path: /ready, port: {HTTP}}}, periodSeconds: 1}}
    lifecycle: {{preStop: {{httpGet: {{path: /stop, port: {HTTP}}}}}}}
  - name: tcp
    image: {image}
    args: [wait]
    readinessProbe: {{tcpSocket: {{port: {TCP}}}, periodSeconds: 1}}
  - name: grpc
    image: {image}
    args: [wait]
    readinessProbe: {{grpc: {{port: {GRPC}}}, periodSeconds: 1}}
---
apiVersion: v1
kind: Pod
metadata: {{name: imitator, namespace: {NAMESPACE}}}
spec:
  nodeName: {node}
  hostNetwork: true
  terminationGracePeriodSeconds: 0
  containers:
  - {{name: imitator, image: {image}, args: [wait]}}
"
    )
}
