//! A real Kubernetes for the suites: the one that `cargo xtask test cluster` starts, or that `KUBECONFIG` names. What
//! needs the machine under it (captures, held connections, stopped programs) works on ours only.

use std::{
    fs,
    io::Write as _,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::{wait, wire::Wire, world};

/// Where the mesh is installed.
pub const MESH_NAMESPACE: &str = "undermesh-system";
/// Network namespaces that the node's container runtime made, as the node sees them.
const NETNS_RECORDS: &str = "var/lib/cni/results";

/// Set by `cargo xtask test cluster`: the binary that is kubectl when its first argument says so.
const KUBECTL: &str = "UNDERMESH_TEST_KUBECTL";
/// The name of our cluster, its description, and the xtask that runs it; not there on a cluster of somebody else.
const NAME: &str = "UNDERMESH_TEST_CLUSTER";
const STATE: &str = "UNDERMESH_TEST_CLUSTER_STATE";
const XTASK: &str = "UNDERMESH_TEST_XTASK";

/// A cluster that is up.
pub struct Cluster {
    kubectl: PathBuf,
    own: Option<Own>,
}

struct Own {
    name: String,
    index: u8,
    xtask: PathBuf,
    machines: Vec<Machine>,
}

#[derive(Clone, Debug, Deserialize)]
struct Machine {
    name: String,
    pid: u32,
    netns: PathBuf,
}

#[derive(Deserialize)]
struct State {
    index: u8,
    machines: Vec<Machine>,
}

/// A pod as the API server has it.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
    /// Node.
    pub node: String,
    /// Addresses of both families.
    pub ips: Vec<IpAddr>,
    /// How often its containers were started again.
    pub restarts: u64,
    /// Containers are ready.
    pub ready: bool,
    /// The value of its label `app`.
    pub app: String,
}

/// What `bookinfo get` in a pod brought.
#[derive(Debug)]
pub struct Fetched {
    /// It ended well: an answer, of a status below 400.
    pub ok: bool,
    /// What it printed.
    pub body: String,
    /// What it complained about.
    pub error: String,
}

impl Cluster {
    /// The cluster that the environment names.
    ///
    /// # Errors
    /// When it names none.
    pub fn from_env() -> anyhow::Result<Self> {
        let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let kubectl = variable(KUBECTL).context("this suite is run by `cargo xtask test cluster`")?;
        let own = match (variable(NAME), variable(STATE), variable(XTASK)) {
            (Some(name), Some(state), Some(xtask)) => {
                let state: State =
                    serde_json::from_slice(&fs::read(state)?).context("the cluster's state")?;
                let (index, machines) = (state.index, state.machines);
                Some(Own { name: name.to_string_lossy().into_owned(), index, xtask, machines })
            }
            _ => None,
        };
        Ok(Self { kubectl, own })
    }

    /// Whether the machine under the cluster is this one.
    pub fn is_own(&self) -> bool {
        self.own.is_some()
    }

    /// The cgroup of each kubelet, as the mesh is to be told: on a cluster of ours it is no systemd unit.
    pub fn kubelet_cgroup(&self) -> Option<String> {
        let own = self.own.as_ref()?;
        Some(format!("undermesh-cluster{}/$(UNDERMESH_NODE)/kubelet", own.index))
    }

    /// kubectl, with these arguments.
    pub fn kubectl(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.kubectl);
        command.arg("kubectl").args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs kubectl and gives what it prints.
    ///
    /// # Errors
    /// When it fails; with what it complained about.
    pub fn run(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.kubectl(arguments).output().context("start kubectl")?;
        succeeded(&output).with_context(|| format!("kubectl {}", arguments.join(" ")))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs kubectl and reads what it prints as JSON.
    ///
    /// # Errors
    /// When it fails or prints something else.
    pub fn json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let text = self.run(&[arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).context("kubectl printed no JSON")
    }

    /// Applies YAML.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub fn apply(&self, yaml: &str) -> anyhow::Result<()> {
        let mut command = self.kubectl(&["apply", "-f", "-"]);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("kubectl's input")?.write_all(yaml.as_bytes())?;
        succeeded(&child.wait_with_output()?).with_context(|| format!("apply {yaml}"))
    }

    /// Applies a file of the workspace.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn apply_file(&self, path: &str) -> anyhow::Result<()> {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
        self.apply(&fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?)
    }

    /// Deletes namespaces with all that is in them, and waits until they are gone.
    ///
    /// # Errors
    /// When they do not go.
    pub fn delete_namespaces(&self, names: &[&str]) -> anyhow::Result<()> {
        let fixed = ["delete", "namespace", "--ignore-not-found", "--timeout=120s"];
        self.run(&[&fixed, names].concat()).map(drop)
    }

    /// Waits until every Deployment of the namespace has all its pods.
    ///
    /// # Errors
    /// When one has not, after a while; with how the pods are.
    pub fn settled(&self, namespace: &str) -> anyhow::Result<()> {
        let fixed = ["-n", namespace, "rollout", "status", "deployment", "--timeout=120s"];
        self.run(&fixed).map(drop).or_else(|error| {
            let pods = self.run(&["-n", namespace, "get", "pods,events", "-o", "wide"])?;
            Err(error).context(pods)
        })
    }

    /// Binds the pods of a Deployment to a node.
    ///
    /// # Errors
    /// When there is no such Deployment.
    pub fn place(&self, namespace: &str, deployment: &str, node: &str) -> anyhow::Result<()> {
        let patch = serde_json::json!({
            "spec": {"template": {"spec": {"nodeSelector": {"kubernetes.io/hostname": node}}}},
        });
        self.run(&["-n", namespace, "patch", "deployment", deployment, "-p", &patch.to_string()]).map(drop)
    }

    /// The pods of a namespace.
    ///
    /// # Errors
    /// When the API server cannot be asked.
    pub fn pods(&self, namespace: &str) -> anyhow::Result<Vec<Pod>> {
        let list = self.json(&["-n", namespace, "get", "pods"])?;
        Ok(list["items"].as_array().into_iter().flatten().map(pod).collect())
    }

    /// The pod whose label `app` is so; of several, the first.
    ///
    /// # Errors
    /// When there is none.
    pub fn pod(&self, namespace: &str, app: &str) -> anyhow::Result<Pod> {
        let pods = self.pods(namespace)?;
        let found = pods.into_iter().find(|pod| pod.app == app);
        found.with_context(|| format!("no pod {app} in {namespace}"))
    }

    /// The addresses of a service.
    ///
    /// # Errors
    /// When there is none.
    pub fn service_ips(&self, namespace: &str, name: &str) -> anyhow::Result<Vec<IpAddr>> {
        let service = self.json(&["-n", namespace, "get", "service", name])?;
        Ok(ips(&service["spec"]["clusterIPs"], |ip| ip.as_str()))
    }

    /// Runs `bookinfo get` in the pod of a Deployment, or in a pod.
    ///
    /// # Errors
    /// When kubectl cannot be started.
    pub fn get(&self, namespace: &str, from: &str, arguments: &[&str]) -> anyhow::Result<Fetched> {
        let fixed = ["-n", namespace, "exec", from, "--", "bookinfo", "get"];
        let output = self.kubectl(&[&fixed, arguments].concat()).output().context("start kubectl")?;
        Ok(Fetched {
            ok: output.status.success(),
            body: String::from_utf8_lossy(&output.stdout).into_owned(),
            error: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }

    /// The names of the nodes, in order.
    ///
    /// # Errors
    /// When the API server cannot be asked.
    pub fn nodes(&self) -> anyhow::Result<Vec<String>> {
        let list = self.json(&["get", "nodes"])?;
        let name = |node: &Value| Some(node["metadata"]["name"].as_str()?.to_owned());
        Ok(list["items"].as_array().into_iter().flatten().filter_map(name).collect())
    }

    /// The agent of a node.
    ///
    /// # Errors
    /// When it has none.
    pub fn agent(&self, node: &str) -> anyhow::Result<Pod> {
        let agents = self.pods(MESH_NAMESPACE)?.into_iter();
        let mut ours = agents.filter(|pod| pod.node == node && pod.name.starts_with("undermesh-node-"));
        ours.next().with_context(|| format!("no agent on {node}"))
    }

    /// What the agents say that holds `what` and is about `namespace`, a line each.
    ///
    /// # Errors
    /// When a node has no agent, or its log cannot be read.
    pub fn agents_say(&self, what: &str, namespace: &str) -> anyhow::Result<Vec<String>> {
        let of_namespace = format!("namespace={namespace:?}");
        let mut said = Vec::new();
        for node in self.nodes()? {
            let log = self.run(&["-n", MESH_NAMESPACE, "logs", &self.agent(&node)?.name])?;
            let lines = log.lines().filter(|line| line.contains(what) && line.contains(&of_namespace));
            said.extend(lines.map(str::to_owned));
        }
        Ok(said)
    }

    /// What the agent of a node answers on its admin socket.
    ///
    /// # Errors
    /// When it does not.
    pub fn ask(&self, node: &str, path: &str) -> anyhow::Result<Value> {
        let answer = self.said(node, path)?;
        serde_json::from_str(&answer).with_context(|| format!("{path} of {node}: {answer}"))
    }

    /// The same as text.
    ///
    /// # Errors
    /// When it does not, or with another status than 200.
    pub fn said(&self, node: &str, path: &str) -> anyhow::Result<String> {
        let agent = self.agent(node)?;
        self.run(&["-n", MESH_NAMESPACE, "exec", &agent.name, "--", "/usr/local/bin/mesh-node", "ask", path])
    }

    /// A pod whose network namespace this process can enter: its peers run there.
    ///
    /// # Errors
    /// When the cluster is not ours, or its node has no record of the pod.
    pub fn enterable(&self, pod: &Pod) -> anyhow::Result<world::Pod> {
        let root = PathBuf::from(format!("/proc/{}/root", self.machine(&pod.node)?.pid));
        let found = wait::until(&format!("the network namespace of {}", pod.name), || {
            netns_of(&root, pod).ok_or_else(|| "no record".to_owned())
        })?;
        Ok(world::Pod {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            node: pod.node.clone(),
            netns: root.join(found.trim_start_matches('/')),
            ips: pod.ips.clone(),
            enrolled: false,
            holder: None,
            identity: None,
            why: None,
        })
    }

    /// The network namespace of a machine.
    ///
    /// # Errors
    /// When the cluster is not ours.
    pub fn machine_netns(&self, name: &str) -> anyhow::Result<PathBuf> {
        Ok(self.machine(name)?.netns.clone())
    }

    /// Captures all that any interface of a machine sees. On `control` that is what goes between the machines, and its own
    /// business; on a node, what goes between its pods as well.
    ///
    /// # Errors
    /// When the cluster is not ours.
    pub fn tap(&self, node: &str) -> anyhow::Result<Wire> {
        Wire::tap(&self.machine(node)?.netns)
    }

    /// Kills a program of a machine of ours: it stays down until it is started.
    ///
    /// # Errors
    /// When the cluster is not ours or has no such program.
    pub fn kill(&self, machine: &str, program: &str) -> anyhow::Result<()> {
        self.cluster(&["stop", machine, program, "--kill"])
    }

    /// Kills the agent of a node, as the kernel would: no word of farewell.
    ///
    /// # Errors
    /// When the cluster is not ours, or no agent runs there.
    pub fn kill_agent(&self, node: &str) -> anyhow::Result<()> {
        // The node has a PID namespace of its own: these are its processes and no other's.
        let found = self.on(node, &["pgrep", "-x", "mesh-node"])?;
        let pids: Vec<_> = found.split_whitespace().collect();
        self.on(node, &[&["kill", "-9"], &pids[..]].concat()).map(drop)
    }

    /// Starts a program that was killed.
    ///
    /// # Errors
    /// When the cluster is not ours or has no such program.
    pub fn start(&self, machine: &str, program: &str) -> anyhow::Result<()> {
        self.cluster(&["start", machine, program])
    }

    /// Runs a program of this machine inside one of the cluster's.
    ///
    /// # Errors
    /// When it fails.
    pub fn on(&self, machine: &str, command: &[&str]) -> anyhow::Result<String> {
        let pid = self.machine(machine)?.pid.to_string();
        let mut nsenter = Command::new("nsenter");
        let output = nsenter.args(["--target", &pid, "--all", "--"]).args(command).output()?;
        succeeded(&output).with_context(|| format!("{} on {machine}", command.join(" ")))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A path of a machine, as this process reaches it.
    ///
    /// # Errors
    /// When the cluster is not ours.
    pub fn path(&self, machine: &str, inside: &str) -> anyhow::Result<PathBuf> {
        let root = PathBuf::from(format!("/proc/{}/root", self.machine(machine)?.pid));
        Ok(root.join(inside.trim_start_matches('/')))
    }

    fn own(&self) -> anyhow::Result<&Own> {
        self.own.as_ref().context("only on a cluster of `cargo xtask cluster`")
    }

    fn machine(&self, name: &str) -> anyhow::Result<&Machine> {
        let machines = &self.own()?.machines;
        machines.iter().find(|machine| machine.name == name).with_context(|| format!("no machine {name}"))
    }

    fn cluster(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let own = self.own()?;
        let mut command = Command::new(&own.xtask);
        let output = command.args(["cluster", "--name", &own.name]).args(arguments).output()?;
        succeeded(&output).with_context(|| format!("xtask cluster {}", arguments.join(" ")))
    }
}

/// Runs the mesh's own command-line tool.
///
/// # Errors
/// When it fails; with what it said.
pub fn meshctl(arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = Command::new(world::program("meshctl")?);
    let output = command.args(arguments).stdin(Stdio::null()).output().context("start meshctl")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    succeeded(&output).with_context(|| format!("meshctl {}: {text}", arguments.join(" ")))?;
    Ok(text)
}

fn succeeded(output: &Output) -> anyhow::Result<()> {
    ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// (pure) A pod out of its object.
fn pod(object: &Value) -> Pod {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let containers = object["status"]["containerStatuses"].as_array().map(Vec::as_slice).unwrap_or_default();
    Pod {
        namespace: text(&object["metadata"]["namespace"]),
        name: text(&object["metadata"]["name"]),
        uid: text(&object["metadata"]["uid"]),
        node: text(&object["spec"]["nodeName"]),
        ips: ips(&object["status"]["podIPs"], |entry| entry["ip"].as_str()),
        restarts: containers.iter().filter_map(|container| container["restartCount"].as_u64()).sum(),
        ready: !containers.is_empty() && containers.iter().all(|container| container["ready"] == true),
        app: text(&object["metadata"]["labels"]["app"]),
    }
}

fn ips(list: &Value, text: impl Fn(&Value) -> Option<&str>) -> Vec<IpAddr> {
    list.as_array().into_iter().flatten().filter_map(|entry| text(entry)?.parse().ok()).collect()
}

/// The network namespace of a pod, as its node sees it: from what the container runtime keeps of the CNI's results.
fn netns_of(root: &Path, pod: &Pod) -> Option<String> {
    let records = fs::read_dir(root.join(NETNS_RECORDS)).ok()?;
    records.filter_map(Result::ok).find_map(|entry| {
        let record: Value = serde_json::from_slice(&fs::read(entry.path()).ok()?).ok()?;
        netns_in(&record, &pod.uid)
    })
}

/// (pure) The namespace in one record, if it is of the pod with this UID.
fn netns_in(record: &Value, uid: &str) -> Option<String> {
    let mut arguments = record["cniArgs"].as_array()?.iter();
    arguments.find(|pair| pair[0] == "K8S_POD_UID" && pair[1] == uid)?;
    let interfaces = record["result"]["interfaces"].as_array()?;
    let sandbox = interfaces.iter().find_map(|interface| interface["sandbox"].as_str());
    // Inside, /var/run leads to /run by a link that is relative to another root.
    sandbox.filter(|path| !path.is_empty()).map(|path| path.replacen("/var/run/", "/run/", 1))
}

/// One of the nodes, not this one.
///
/// # Errors
/// When there is only one.
pub fn other(nodes: &[String], node: &str) -> anyhow::Result<String> {
    match nodes.iter().find(|name| *name != node) {
        Some(name) => Ok(name.clone()),
        None => bail!("the cluster has no node besides {node}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_namespace_belongs_to_the_pod_with_the_uid() {
        let record = json!({
            "cniArgs": [["IgnoreUnknown", "1"], ["K8S_POD_UID", "u1"]],
            "result": {"interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/var/run/netns/cni-1"}]},
        });
        assert_eq!(netns_in(&record, "u1").as_deref(), Some("/run/netns/cni-1"));
        assert_eq!(netns_in(&record, "u2"), None);
        assert_eq!(netns_in(&json!({}), "u1"), None);
    }

    #[test]
    fn a_pod_is_read() {
        let object = json!({
            "metadata": {"namespace": "n", "name": "p", "uid": "u", "labels": {"app": "a"}},
            "spec": {"nodeName": "node-a"},
            "status": {
                "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
                "containerStatuses": [{"restartCount": 2, "ready": true}],
            },
        });
        let pod = pod(&object);
        assert_eq!((pod.ips.len(), pod.restarts, pod.ready, pod.app.as_str()), (2, 2, true, "a"));
    }
}
