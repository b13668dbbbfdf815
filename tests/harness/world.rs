//! A mesh in local mode: the product itself is the harness, there is no second one.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

use anyhow::{Context as _, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Deserialize;
use tempfile::TempDir;

use crate::wait;

static WORLDS: AtomicU32 = AtomicU32::new(0);

/// A running local mesh; taken down when dropped.
pub struct World {
    name: String,
    folder: TempDir,
    meshctl: PathBuf,
    /// Descriptors of each agent when the world had come up.
    descriptors: BTreeMap<String, usize>,
}

/// Descriptors that an agent may hold beyond those at its start: pooled tunnels outlive their streams for minutes.
const POOLED_DESCRIPTORS: usize = 64;
static LEFT_BEHIND: AtomicBool = AtomicBool::new(false);

/// True when a world of this process could not be taken down without a trace.
pub fn left_behind() -> bool {
    LEFT_BEHIND.load(Ordering::Acquire)
}

/// A pod as `meshctl local status` describes it.
#[derive(Clone, Debug, Deserialize)]
pub struct Pod {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Node.
    pub node: String,
    /// Path of its network namespace.
    pub netns: PathBuf,
    /// Addresses.
    pub ips: Vec<IpAddr>,
    /// Captured and served.
    pub enrolled: bool,
    /// The process that holds its namespaces.
    #[serde(default)]
    pub holder: Option<u32>,
    /// SPIFFE identity.
    #[serde(default)]
    pub identity: Option<String>,
    /// Why it is not as wanted.
    #[serde(default)]
    pub why: Option<String>,
}

/// A node as `meshctl local status` describes it.
#[derive(Clone, Debug, Deserialize)]
pub struct Node {
    /// Name.
    pub name: String,
    /// Path of its network namespace.
    pub netns: PathBuf,
    /// The agent's admin socket.
    pub admin_socket: PathBuf,
    /// The agent's process.
    pub agent_pid: Option<u32>,
    /// How often it was started again.
    pub restarts: u32,
}

/// The control plane as `meshctl local status` describes it.
#[derive(Clone, Debug, Deserialize)]
pub struct Control {
    /// Where agents reach it.
    pub address: String,
    /// Its namespace.
    pub netns: PathBuf,
    /// Its process.
    pub pid: Option<u32>,
    /// How often it was started again.
    pub restarts: u32,
}

/// A service as `meshctl local status` describes it.
#[derive(Clone, Debug, Deserialize)]
pub struct Service {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Virtual addresses.
    pub vips: Vec<IpAddr>,
}

/// One end of a live connection.
#[derive(Clone, Debug, Deserialize)]
pub struct End {
    /// Address.
    pub addr: SocketAddr,
    /// SPIFFE identity, where one was proven.
    #[serde(default)]
    pub identity: Option<String>,
}

/// A live connection as an agent lists it.
#[derive(Clone, Debug, Deserialize)]
pub struct Connection {
    /// `outbound` or `inbound`.
    pub direction: String,
    /// direct, tunnel, plaintext, passthrough, plain; none until that is decided.
    pub path: Option<String>,
    /// The client's end.
    pub src: End,
    /// The server's end.
    pub dst: End,
    /// The policy that decided.
    #[serde(default)]
    pub policy: Option<String>,
}

/// `meshctl local status -o json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// Everything written is in force everywhere.
    pub in_force: bool,
    /// What is not in force yet.
    #[serde(default)]
    pub waiting: Vec<String>,
    /// The control plane.
    pub control: Control,
    /// Nodes.
    pub nodes: Vec<Node>,
    /// Pods.
    pub pods: Vec<Pod>,
    /// Services.
    #[serde(default)]
    pub services: Vec<Service>,
    /// Problems of the input.
    #[serde(default)]
    pub problems: Vec<serde_json::Value>,
}

/// A family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The first address of this family.
    ///
    /// # Errors
    /// When there is none.
    pub fn of(self, ips: &[IpAddr]) -> anyhow::Result<IpAddr> {
        ips.iter()
            .copied()
            .find(|ip| ip.is_ipv4() == (self == Self::V4))
            .with_context(|| format!("no {self:?} address in {ips:?}"))
    }
}

impl World {
    /// Starts a mesh from `files` (name → YAML) and waits until all of it is in force.
    ///
    /// # Errors
    /// When `meshctl local up` fails or the mesh does not come into force.
    pub fn up(label: &str, files: &[(&str, &str)]) -> anyhow::Result<Self> {
        Self::up_with(label, files, &[])
    }

    /// The same, with environment for the mesh's own programs.
    ///
    /// # Errors
    /// As [`World::up`].
    pub fn up_with(
        label: &str,
        files: &[(&str, &str)],
        environment: &[(&str, &str)],
    ) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("undermesh-test-").tempdir()?;
        for (name, text) in files {
            fs::write(folder.path().join(name), text)?;
        }
        // The process id tells runs apart, the counter worlds of one run.
        let name = format!("{label}-{}-{}", std::process::id(), WORLDS.fetch_add(1, Ordering::Relaxed));
        let mut world = Self { name, folder, meshctl: program("meshctl")?, descriptors: BTreeMap::new() };
        let folder = world.folder.path().to_owned();
        let arguments = ["local", "up", &folder.to_string_lossy(), "--name", &world.name];
        checked(Command::new(&world.meshctl).args(arguments).envs(environment.iter().copied()))?;
        for node in world.in_force()?.nodes {
            world.descriptors.insert(node.name.clone(), world.agent_descriptors(&node.name)?);
        }
        Ok(world)
    }

    fn agent_descriptors(&self, node: &str) -> anyhow::Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.agent_pid(node)?))?.count())
    }

    /// Waits until no agent holds anything of a connection: no entry in a kernel map, none in its list, no descriptor.
    ///
    /// # Errors
    /// When something stays; names it.
    pub fn nothing_leaks(&self) -> anyhow::Result<()> {
        for (node, before) in &self.descriptors {
            wait::until("the agents to be empty", || {
                let text = |error: anyhow::Error| format!("{error:#}");
                let connections = self.connections(node).map_err(text)?;
                if !connections.is_empty() {
                    return Err(format!(
                        "{node} lists {} connections: {:?}",
                        connections.len(),
                        connections[0]
                    ));
                }
                let kernel = self.admin(node, "/kernel").map_err(text)?;
                for map in ["FLOWS", "OWN_FLOWS"] {
                    let entries = kernel["counters"]["maps"][map]["entries"].as_u64();
                    if entries != Some(0) {
                        return Err(format!("{node} has {entries:?} entries in {map}"));
                    }
                }
                let now = self.agent_descriptors(node).map_err(text)?;
                if now > before + POOLED_DESCRIPTORS {
                    return Err(format!(
                        "the agent of {node} holds {now} descriptors, {before} at its start"
                    ));
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Writes one file of the folder; [`World::in_force`] tells when it holds.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, file: &str, text: &str) -> anyhow::Result<()> {
        // Renamed into place, so that no half-written file is ever read.
        let hidden = self.folder.path().join(format!(".{file}.tmp"));
        fs::write(&hidden, text)?;
        Ok(fs::rename(hidden, self.folder.path().join(file))?)
    }

    /// Removes one file of the folder.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn remove(&self, file: &str) -> anyhow::Result<()> {
        Ok(fs::remove_file(self.folder.path().join(file))?)
    }

    /// Writes (or removes, when the text is empty) files, then waits until the whole is in force.
    ///
    /// # Errors
    /// When it does not come into force.
    pub fn apply(&self, files: &[(&str, &str)]) -> anyhow::Result<Status> {
        for (file, text) in files {
            if !text.is_empty() {
                self.write(file, text)?;
            } else if self.folder.path().join(file).exists() {
                self.remove(file)?;
            }
        }
        self.in_force()
    }

    /// Waits until every edit so far is in force everywhere.
    ///
    /// # Errors
    /// When it does not come into force; names what is pending.
    pub fn in_force(&self) -> anyhow::Result<Status> {
        wait::until("the mesh to be in force", || {
            let status = self.status().map_err(|error| format!("{error:#}"))?;
            if status.in_force {
                Ok(status)
            } else {
                Err(format!("{:?}, problems {:?}", status.waiting, status.problems))
            }
        })
    }

    /// The status now.
    ///
    /// # Errors
    /// When `meshctl` fails or answers something else.
    pub fn status(&self) -> anyhow::Result<Status> {
        let output = self.meshctl(&["local", "status", "--name", &self.name, "-o", "json"])?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("status: {}", String::from_utf8_lossy(&output.stdout)))
    }

    /// The pod `namespace/name`; a Deployment's pods are found by their prefix.
    ///
    /// # Errors
    /// When there is none.
    pub fn pod(&self, key: &str) -> anyhow::Result<Pod> {
        let (namespace, name) = key.split_once('/').context("namespace/name")?;
        let status = self.status()?;
        let exact = status.pods.iter().find(|pod| pod.namespace == namespace && pod.name == name);
        let prefix = || {
            let start = format!("{name}-");
            status.pods.iter().find(|pod| pod.namespace == namespace && pod.name.starts_with(&start))
        };
        exact.or_else(prefix).cloned().with_context(|| format!("no pod {key}"))
    }

    /// The node of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn node(&self, name: &str) -> anyhow::Result<Node> {
        self.status()?
            .nodes
            .into_iter()
            .find(|node| node.name == name)
            .with_context(|| format!("no node {name}"))
    }

    /// A virtual address of the service `namespace/name`.
    ///
    /// # Errors
    /// When there is none of that family.
    pub fn vip(&self, key: &str, family: Family) -> anyhow::Result<IpAddr> {
        let status = self.status()?;
        let service = status
            .services
            .iter()
            .find(|service| format!("{}/{}", service.namespace, service.name) == key)
            .with_context(|| format!("no service {key}"))?;
        family.of(&service.vips)
    }

    /// GET of an agent's admin socket, as JSON.
    ///
    /// # Errors
    /// When the agent does not answer with JSON.
    pub fn admin(&self, node: &str, uri: &str) -> anyhow::Result<serde_json::Value> {
        let body = self.admin_text(node, uri)?;
        serde_json::from_str(&body).with_context(|| format!("{uri}: {body}"))
    }

    /// GET of an agent's admin socket, as text.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub fn admin_text(&self, node: &str, uri: &str) -> anyhow::Result<String> {
        let socket = self.node(node)?.admin_socket;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let asked = mesh_net::admin::call(
            &socket,
            mesh_net::admin::Method::GET,
            uri,
            Vec::new(),
            std::time::Duration::from_secs(10),
        );
        let (_, body) = runtime.block_on(asked)?;
        Ok(String::from_utf8(body.to_vec())?)
    }

    /// Live connections of the node's agent.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub fn connections(&self, node: &str) -> anyhow::Result<Vec<Connection>> {
        Ok(serde_json::from_value(self.admin(node, "/connections")?)?)
    }

    /// The record of the live connection that a client opened from `source`, at the node's agent.
    ///
    /// # Errors
    /// When the agent lists none.
    pub fn connection_from(&self, node: &str, source: SocketAddr) -> anyhow::Result<Connection> {
        wait::until("the connection to be listed", || {
            let all = self.connections(node).map_err(|error| format!("{error:#}"))?;
            all.into_iter()
                .find(|connection| connection.src.addr == source)
                .ok_or_else(|| format!("{source} not listed"))
        })
    }

    /// Process of a node's agent.
    ///
    /// # Errors
    /// When it does not run.
    pub fn agent_pid(&self, node: &str) -> anyhow::Result<u32> {
        self.node(node)?.agent_pid.with_context(|| format!("the agent of {node} does not run"))
    }

    /// Ends a node's agent with SIGKILL. It is started again.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill_agent(&self, node: &str) -> anyhow::Result<()> {
        end(self.agent_pid(node)?)
    }

    /// Ends the control plane with SIGKILL. It is started again.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill_control(&self) -> anyhow::Result<()> {
        end(self.control_pid()?)
    }

    /// Process of the control plane.
    ///
    /// # Errors
    /// When it does not run.
    pub fn control_pid(&self) -> anyhow::Result<u32> {
        self.status()?.control.pid.context("the control plane does not run")
    }

    /// Name of the local mesh.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `meshctl`.
    ///
    /// # Errors
    /// When it exits non-zero; with its output.
    pub fn meshctl(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        checked(Command::new(&self.meshctl).args(arguments))
    }

    /// What the agent of a node has logged so far, access records included.
    ///
    /// # Errors
    /// When its file cannot be read.
    pub fn log(&self, node: &str) -> anyhow::Result<String> {
        let mut all = String::new();
        for entry in fs::read_dir(self.state().join("logs"))? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().contains(node)) {
                all += &fs::read_to_string(&path)?;
            }
        }
        Ok(all)
    }

    /// Folder of the mesh's own state.
    pub fn state(&self) -> PathBuf {
        PathBuf::from("/run/undermesh/local").join(&self.name)
    }
}

/// Runs a program to its end.
fn checked(command: &mut Command) -> anyhow::Result<Output> {
    let output = command.output().context("run meshctl")?;
    if !output.status.success() {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        bail!("{command:?}: {}\n{out}{err}", output.status);
    }
    Ok(output)
}

fn end(pid: u32) -> anyhow::Result<()> {
    signal(pid, Signal::SIGKILL)
}

/// Sends a signal to one process of a world.
///
/// # Errors
/// It is none, or is gone.
pub fn signal(pid: u32, signal: Signal) -> anyhow::Result<()> {
    let process = i32::try_from(pid).ok().filter(|pid| *pid > 1).context("not a process of ours")?;
    kill(Pid::from_raw(process), signal).with_context(|| format!("{signal} to {pid}"))
}

impl Drop for World {
    fn drop(&mut self) {
        let processes = self.status().map(|status| status.processes()).unwrap_or_default();
        let down = self.meshctl(&["local", "down", "--name", &self.name]).map(drop);
        let gone = down.and_then(|()| {
            wait::until_true("the world to be gone", || {
                !self.state().exists()
                    && !processes.iter().any(|pid| Path::new(&format!("/proc/{pid}")).exists())
            })
        });
        if let Err(error) = gone {
            eprintln!("taking the world {} down: {error:#}", self.name);
            LEFT_BEHIND.store(true, Ordering::Release);
        }
    }
}

impl Status {
    /// Processes that end with the mesh; namespaces end with them.
    fn processes(&self) -> Vec<u32> {
        let holders = self.pods.iter().filter_map(|pod| pod.holder);
        let agents = self.nodes.iter().filter_map(|node| node.agent_pid);
        holders.chain(agents).chain(self.control.pid).collect()
    }
}

impl Pod {
    /// An address of this pod with a port.
    ///
    /// # Errors
    /// When it has no address of that family.
    pub fn at(&self, family: Family, port: u16) -> anyhow::Result<SocketAddr> {
        Ok(SocketAddr::new(family.of(&self.ips)?, port))
    }
}

/// A program of this workspace, from the directory that the running test was built into.
///
/// # Errors
/// When it has not been built.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let here = std::env::current_exe()?;
    let found =
        here.ancestors().skip(1).take(3).map(|directory| directory.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} is not built: run `cargo xtask test`, which builds it first"))
}

/// The label that enrols, as it stands in [`two_nodes`].
pub const ENROLLED: &str = ", labels: {istio.io/dataplane-mode: ambient}";

/// YAML of the world that most suites share: nodes `n1` and `n2`, namespace `mesh` (enrolled) and `plain` (not), and for
/// each `(namespace, name, node)` a pod that does nothing with a service of its own in front.
pub fn two_nodes(pods: &[(&str, &str, &str)], port: u16) -> String {
    let mut text = format!(
        "
apiVersion: v1
kind: Namespace
metadata: {{name: mesh{ENROLLED}}}
---
apiVersion: v1
kind: Namespace
metadata: {{name: plain}}
---
{{apiVersion: v1, kind: Node, metadata: {{name: n1}}}}
---
{{apiVersion: v1, kind: Node, metadata: {{name: n2}}}}
"
    );
    for (namespace, name, node) in pods {
        text += &sleeper(namespace, name, node);
        text += &service(namespace, name, port);
    }
    text
}

/// YAML of a pod that does nothing: suites run their peers inside its namespace. Its service account is its name.
pub fn sleeper(namespace: &str, name: &str, node: &str) -> String {
    format!(
        "
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {name}, namespace: {namespace}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}
spec:
  nodeName: {node}
  serviceAccountName: {name}
  containers:
  - {{name: main, image: none, command: [sleep, infinity]}}
"
    )
}

/// YAML of a service in front of the pods whose label `app` is `name`.
pub fn service(namespace: &str, name: &str, port: u16) -> String {
    format!(
        "
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  selector: {{app: {name}}}
  ipFamilyPolicy: PreferDualStack
  ports:
  - {{name: tcp, port: {port}, targetPort: {port}}}
"
    )
}
