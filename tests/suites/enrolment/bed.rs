//! A node without a container runtime: a bridge, pods on it as namespaces, control plane and agent as processes.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use mesh_node::kernel::{CleanWhat, clean};
use mesh_tests::{netns, wait, world::program};
use nix::{
    mount::{MsFlags, mount},
    sys::{
        signal::{Signal, kill},
        statfs::{BPF_FS_MAGIC, statfs},
    },
    unistd::Pid,
};
use serde_json::{Value, json};
use tempfile::TempDir;

static BEDS: AtomicU32 = AtomicU32::new(0);
const BPFFS: &str = "/sys/fs/bpf";
/// Where agents look for the control plane.
pub const CONTROL: &str = "10.45.0.1:15012";
/// Of an agent on Kubernetes.
const PRIVILEGES: &str = "-all,+bpf,+perfmon,+net_admin,+sys_admin";
/// A dial that takes longer has failed.
const DIAL: Duration = Duration::from_secs(5);

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("ip must run");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Waits for a state.
pub fn until<T>(what: &str, look: impl FnMut() -> Result<T, String>) -> T {
    wait::until(what, look).unwrap_or_else(|error| panic!("{error}"))
}

/// A sandbox.
#[derive(Clone)]
pub struct Sandbox {
    pub name: String,
    pub uid: String,
    pub netns: PathBuf,
    pub ip: IpAddr,
}

impl Sandbox {
    /// Connects from inside.
    pub fn dial(&self, to: SocketAddr) -> std::io::Result<TcpStream> {
        let dial = || {
            let stream = TcpStream::connect_timeout(&to, DIAL);
            Ok(stream.and_then(|stream| stream.set_read_timeout(Some(DIAL)).map(|()| stream)))
        };
        netns::within(&self.netns, dial).unwrap()
    }

    /// What the runtime keeps of the calls of its plugins.
    pub fn cached(&self) -> String {
        json!({
            "kind": "cniCacheV1", "containerId": self.name, "ifName": "eth0", "networkName": "net",
            "cniArgs": [["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", self.name], ["K8S_POD_UID", self.uid]],
            "result": self.result(),
        })
        .to_string()
    }

    fn result(&self) -> Value {
        json!({
            "cniVersion": "1.0.0",
            "interfaces": [{ "name": "br0" }, { "name": "eth0", "sandbox": self.netns }],
            "ips": [{ "address": format!("{}/24", self.ip), "interface": 1 }],
            "dns": {},
        })
    }
}

/// One test's node.
pub struct Bed {
    id: String,
    pub dir: TempDir,
    processes: Vec<(&'static str, Child)>,
    names: Vec<String>,
}

impl Bed {
    pub fn new() -> Self {
        sweep();
        let id = format!("ume{}x{}", std::process::id(), BEDS.fetch_add(1, Ordering::Relaxed));
        let dir = tempfile::Builder::new().prefix("undermesh-enrol-").tempdir().unwrap();
        let mut bed = Self { id, dir, processes: Vec::new(), names: Vec::new() };
        let host = bed.namespace("h");
        ip(&format!("-n {host} link add br0 type bridge"));
        ip(&format!("-n {host} link set br0 up"));
        ip(&format!("-n {host} addr add 10.45.0.1/24 dev br0"));
        for name in ["source", "ca", "credentials", "state", "results", "bin", "conf"] {
            fs::create_dir(bed.at(name)).unwrap();
        }
        let token = bed.at("credentials").join("node-n1");
        let mut options = File::options();
        let mut file = options.write(true).create_new(true).mode(0o600).open(token).unwrap();
        file.write_all("ab".repeat(32).as_bytes()).unwrap();
        bed.label(true);
        bed
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn namespace(&mut self, suffix: &str) -> String {
        let name = format!("{}{suffix}", self.id);
        self.names.push(name.clone());
        ip(&format!("netns add {name}"));
        ip(&format!("-n {name} link set lo up"));
        name
    }

    pub fn host(&self) -> PathBuf {
        PathBuf::from(format!("/run/netns/{}h", self.id))
    }

    /// Makes what a container runtime makes for a pod before it calls our plugin.
    pub fn sandbox(&mut self, label: &str, number: u8) -> Sandbox {
        let name = self.namespace(label);
        let host = format!("{}h", self.id);
        ip(&format!("link add v{label} netns {host} type veth peer name eth0 netns {name}"));
        ip(&format!("-n {host} link set v{label} master br0 up"));
        ip(&format!("-n {name} addr add 10.45.0.{number}/24 dev eth0"));
        ip(&format!("-n {name} link set eth0 up"));
        ip(&format!("-n {name} route add default via 10.45.0.1"));
        Sandbox {
            uid: format!("uid-{name}"),
            netns: PathBuf::from(format!("/run/netns/{name}")),
            ip: IpAddr::from([10, 45, 0, number]),
            name: label.to_owned(),
        }
    }

    /// Another pod in the place of `sandbox`, as far as anybody is told.
    pub fn sandbox_like(&self, sandbox: &Sandbox, name: &str) -> Sandbox {
        Sandbox {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            netns: sandbox.netns.clone(),
            ip: sandbox.ip,
        }
    }

    /// Gives a sandbox another address instead of its own.
    pub fn move_to(&self, sandbox: &mut Sandbox, number: u8) {
        let name = sandbox.netns.file_name().unwrap().to_string_lossy();
        ip(&format!("-n {name} addr add 10.45.0.{number}/24 dev eth0"));
        sandbox.ip = IpAddr::from([10, 45, 0, number]);
    }

    /// The cluster has a network plugin.
    pub fn primary(&self) {
        let text = r#"{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge"}]}"#;
        fs::write(self.at("conf").join("10-net.conflist"), text).unwrap();
    }

    /// Removes a sandbox.
    pub fn remove(&self, sandbox: &Sandbox) {
        ip(&format!("netns del {}", sandbox.netns.file_name().unwrap().to_string_lossy()));
    }

    /// Labels the namespace of all pods, or takes the label away.
    pub fn label(&self, ambient: bool) {
        let label = if ambient { ", labels: {istio.io/dataplane-mode: ambient}" } else { "" };
        let text = format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop{label}}}\n---\n\
             apiVersion: v1\nkind: Node\nmetadata: {{name: n1}}\n"
        );
        self.write("mesh.yaml", &text);
    }

    /// Tells the control plane of a pod, with its address or without.
    pub fn pod(&self, sandbox: &Sandbox, running: bool) {
        let status = match running {
            true => format!("{{phase: Running, podIPs: [{{ip: {}}}]}}", sandbox.ip),
            false => "{phase: Pending}".to_owned(),
        };
        let text = format!(
            "apiVersion: v1\nkind: Pod\n\
             metadata: {{name: {0}, namespace: shop, uid: {1}, labels: {{app: {0}}}}}\n\
             spec: {{nodeName: n1, serviceAccountName: {0}, containers: [{{name: c, image: c}}]}}\n\
             status: {status}\n",
            sandbox.name, sandbox.uid
        );
        self.write(&format!("{}.yaml", sandbox.name), &text);
    }

    /// Tells of a static pod: the API has its mirror under a UID of its own, which names the kubelet's.
    pub fn static_pod(&self, sandbox: &Sandbox, kubelet_uid: &str) {
        let text = format!(
            "apiVersion: v1\nkind: Pod\n\
             metadata: {{name: {0}, namespace: shop, uid: mirror-{0}, annotations: {{kubernetes.io/config.mirror: \
             {1}, kubernetes.io/config.hash: {1}}}}}\n\
             spec: {{nodeName: n1, serviceAccountName: {0}, containers: [{{name: c, image: c}}]}}\n\
             status: {{phase: Pending}}\n",
            sandbox.name, kubelet_uid
        );
        self.write(&format!("{}.yaml", sandbox.name), &text);
    }

    /// Destinations that the mesh does not know are refused.
    pub fn registry_only(&self) {
        let text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: undermesh, namespace: undermesh-system}\n\
                    data: {outboundTrafficPolicy: REGISTRY_ONLY}\n";
        self.write("options.yaml", text);
    }

    /// Gives the control plane an object, or another text instead of the last.
    pub fn write(&self, name: &str, text: &str) {
        let next = self.at("next");
        fs::write(&next, text).unwrap();
        fs::rename(next, self.at("source").join(name)).unwrap();
    }

    fn start(&mut self, name: &'static str, arguments: &[String]) {
        let log = File::options().create(true).append(true).open(self.at(&format!("{name}.log"))).unwrap();
        // Ends with the test, whatever ends that; with the privileges that docs/privileges.md lists, and no others.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--no-new-privs", "--bounding-set", PRIVILEGES, "--", "nsenter"])
            .args([&format!("--net={}", self.host().display()), "--"])
            .arg(program(name).unwrap())
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(log.try_clone().unwrap())
            .stdout(log)
            .spawn()
            .unwrap();
        self.processes.push((name, child));
    }

    pub fn control(&mut self) {
        let at = |name: &str| self.at(name).display().to_string();
        let arguments = [
            format!("--source-dir={}", at("source")),
            format!("--ca-dir={}", at("ca")),
            format!("--credentials={}", at("credentials")),
            format!("--admin={}", at("control.sock")),
            format!("--listen={CONTROL}"),
        ];
        self.start("mesh-control", &arguments);
    }

    pub fn agent(&mut self) {
        self.agent_with(&[]);
    }

    /// The agent with further flags.
    pub fn agent_with(&mut self, flags: &[&str]) {
        let at = |name: &str| self.at(name).display().to_string();
        let arguments = [
            "run".to_owned(),
            "--node=n1".to_owned(),
            format!("--control={CONTROL}"),
            format!("--control-roots={}", at("ca/root-cert.pem")),
            format!("--credential={}", at("credentials/node-n1")),
            format!("--state-dir={}", at("state")),
            format!("--admin-socket={}", at("agent.sock")),
            format!("--cni-socket={}", at("cni.sock")),
            format!("--cni-results={}", at("results")),
            format!("--cni-bin-dir={}", at("bin")),
            format!("--cni-conf-dir={}", at("conf")),
            format!("--cni-plugin={}", program("mesh-cni").unwrap().display()),
            "--enrol-from=feed".to_owned(),
            format!("--bpffs={}", self.bpffs().display()),
        ];
        let flags = flags.iter().map(|flag| (*flag).to_owned());
        self.start("mesh-node", &arguments.into_iter().chain(flags).collect::<Vec<_>>());
    }

    /// Agents of all tests are of node `n1`: each has a folder of bpffs of its own. As on Kubernetes, the agent may not
    /// mount it.
    pub fn bpffs(&self) -> PathBuf {
        static MOUNTED: Once = Once::new();
        MOUNTED.call_once(|| {
            if statfs(BPFFS).unwrap().filesystem_type() != BPF_FS_MAGIC {
                mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), Some("mode=0700")).unwrap();
            }
        });
        let path = Path::new(BPFFS).join(&self.id);
        fs::create_dir_all(&path).unwrap();
        path
    }

    pub fn kill(&mut self, name: &str) {
        let place = self.processes.iter().position(|(known, _)| *known == name).unwrap();
        let (_, mut child) = self.processes.remove(place);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Kills a process in a moment, while the test goes on.
    pub fn kill_soon(&self, name: &str, after: Duration) {
        let (_, child) = self.processes.iter().find(|(known, _)| *known == name).unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        thread::spawn(move || {
            thread::sleep(after);
            // Nobody has waited for it, so the number is still its own.
            let _ = kill(pid, Signal::SIGKILL);
        });
    }

    /// Starts the agent that was killed again.
    pub fn restarted(&mut self, name: &'static str) {
        let place = self.processes.iter().position(|(known, _)| *known == name).unwrap();
        let (_, mut child) = self.processes.remove(place);
        child.wait().unwrap();
        self.agent();
    }

    /// Notes who connects to the node itself.
    pub fn listen(&self, port: u16) -> Arrivals {
        let listener = netns::within(&self.host(), || Ok(TcpListener::bind(("0.0.0.0", port))?)).unwrap();
        listener.set_nonblocking(true).unwrap();
        Arrivals(listener)
    }

    /// Asks the agent, over its admin socket; nothing while it does not answer.
    pub fn ask(&self, path: &str) -> Option<Value> {
        let socket = self.at("agent.sock");
        let output = Command::new(program("mesh-node").unwrap())
            .args(["ask", path, "--admin-socket"])
            .arg(socket)
            .output()
            .unwrap();
        serde_json::from_slice(&output.stdout).ok()
    }

    pub fn release(&self) -> Output {
        let socket = self.at("agent.sock");
        Command::new(program("mesh-node").unwrap())
            .args(["release", "--admin-socket"])
            .arg(socket)
            .output()
            .unwrap()
    }

    pub fn clean(&self) -> Output {
        let at = |name: &str| self.at(name).display().to_string();
        Command::new(program("mesh-node").unwrap())
            .args(["clean", "--node=n1"])
            .arg(format!("--bpffs={}", self.bpffs().display()))
            .arg(format!("--state-dir={}", at("state")))
            .arg(format!("--cni-bin-dir={}", at("bin")))
            .arg(format!("--cni-conf-dir={}", at("conf")))
            .output()
            .unwrap()
    }

    /// What the agent says of one pod of the feed.
    pub fn followed(&self, sandbox: &Sandbox) -> Result<(String, String), String> {
        let all = self.ask("/enrolment").ok_or("no answer")?;
        let pod = all.as_array().and_then(|all| all.iter().find(|pod| pod["uid"] == sandbox.uid.as_str()));
        let pod = pod.ok_or_else(|| format!("not there: {all}"))?;
        let text = |field: &str| pod[field].as_str().unwrap_or_default().to_owned();
        Ok((text("state"), text("why")))
    }

    pub fn until_state(&self, sandbox: &Sandbox, state: &str) -> String {
        until(&format!("{} to be {state}", sandbox.name), || {
            let (now, why) = self.followed(sandbox)?;
            if now == state { Ok(why) } else { Err(format!("{now}: {why}")) }
        })
    }

    /// Whether the kernel captures the pod, as the agent tells.
    pub fn captured(&self, sandbox: &Sandbox) -> Result<bool, String> {
        let kernel = self.ask("/kernel").ok_or("no answer")?;
        let pods = kernel["pods"].as_array().ok_or("no pods")?;
        Ok(pods.iter().any(|pod| pod["uid"] == sandbox.uid.as_str() && pod["served"] == true))
    }

    /// Ready, or what is missing.
    pub fn ready(&self) -> Result<(), String> {
        let mut ask = Command::new(program("mesh-node").unwrap());
        ask.args(["ask", "/healthz/ready", "--admin-socket"]).arg(self.at("agent.sock"));
        let output = ask.output().unwrap();
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&output.stdout).into_owned())
        }
    }

    pub fn until_ready(&self) {
        until("the agent to be ready", || self.ready());
    }

    /// The configuration that the runtime gives our plugin, for a sandbox.
    pub fn conf(&self, sandbox: &Sandbox) -> Value {
        json!({
            "cniVersion": "1.0.0", "name": "net", "type": "undermesh-cni",
            "agentSocket": self.at("cni.sock"),
            "exemptNamespaces": ["kube-system"],
            "prevResult": sandbox.result(),
        })
    }

    pub fn add(&self, sandbox: &Sandbox) -> Called {
        call("ADD", &self.conf(sandbox), sandbox, "shop")
    }

    /// Serves greetings in a namespace: the node's (`None`) or a sandbox's.
    pub fn serve(&self, inside: Option<&Sandbox>, port: u16) -> Server {
        let path = inside.map_or_else(|| self.host(), |sandbox| sandbox.netns.clone());
        let listener = netns::within(&path, || Ok(TcpListener::bind(("0.0.0.0", port))?)).unwrap();
        let accepting = listener.try_clone().unwrap();
        thread::spawn(move || {
            for stream in accepting.incoming() {
                let Ok(mut stream) = stream else { return };
                thread::spawn(move || {
                    let mut byte = [0];
                    while stream.read(&mut byte).is_ok_and(|n| n == 1) && stream.write_all(&byte).is_ok() {}
                });
            }
        });
        Server(listener)
    }

    /// Everything that the processes said, for a test that fails.
    pub fn logs(&self) -> String {
        let read = |name: &str| fs::read_to_string(self.at(&format!("{name}.log"))).unwrap_or_default();
        format!("--- mesh-control\n{}\n--- mesh-node\n{}", read("mesh-control"), read("mesh-node"))
    }
}

/// Connections that arrived and nobody accepted: they wait in the queue.
pub struct Arrivals(TcpListener);

impl Arrivals {
    /// From where.
    pub fn arrived(&self) -> Vec<SocketAddr> {
        std::iter::from_fn(|| self.0.accept().ok()).map(|(_, from)| from).collect()
    }
}

/// Ends the accept loop.
pub struct Server(TcpListener);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = socket2::SockRef::from(&self.0).shutdown(std::net::Shutdown::Both);
    }
}

/// Whether an echo comes back.
pub fn echoes(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    stream.write_all(b"x").is_ok() && stream.read_exact(&mut byte).is_ok() && byte == *b"x"
}

impl Drop for Bed {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.logs());
        }
        for (_, child) in &mut self.processes {
            let _ = child.kill();
            let _ = child.wait();
        }
        let bpffs = self.bpffs();
        let _ = clean(&bpffs, CleanWhat::Node("n1"));
        let _ = fs::remove_dir_all(&bpffs);
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}

/// What came of a call of the plugin.
#[derive(Debug)]
pub struct Called {
    pub ok: bool,
    pub text: String,
}

impl Called {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {:?}", self.text))
    }

    /// The code and message of an error.
    pub fn error(&self) -> (u64, String) {
        assert!(!self.ok, "no error: {self:?}");
        let value = self.json();
        (value["code"].as_u64().unwrap(), value["msg"].as_str().unwrap().to_owned())
    }
}

/// Calls the plugin as a container runtime does.
pub fn call(command: &str, conf: &Value, sandbox: &Sandbox, namespace: &str) -> Called {
    let arguments = format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID={}",
        sandbox.name, sandbox.uid
    );
    call_with(command, &conf.to_string(), sandbox, &arguments)
}

/// The same, with any text and arguments.
pub fn call_with(command: &str, conf: &str, sandbox: &Sandbox, arguments: &str) -> Called {
    let mut child = Command::new(program("mesh-cni").unwrap())
        .env_clear()
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", format!("container-{}", sandbox.name))
        .env("CNI_NETNS", &sandbox.netns)
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/opt/cni/bin")
        .env("CNI_ARGS", arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(conf.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    Called { ok: output.status.success(), text: String::from_utf8(output.stdout).unwrap() }
}

/// A sandbox of which only the name counts.
pub fn nowhere() -> Sandbox {
    Sandbox {
        name: "web".to_owned(),
        uid: "u".to_owned(),
        netns: "/run/netns/none".into(),
        ip: IpAddr::from([10, 0, 0, 9]),
    }
}

/// What a test that was killed left behind.
fn sweep() {
    let dead = |name: &str| {
        let pid = name.strip_prefix("ume").and_then(|rest| rest.split('x').next());
        pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
    };
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if dead(&name) {
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
    }
    for entry in fs::read_dir(BPFFS).into_iter().flatten().flatten() {
        if dead(&entry.file_name().to_string_lossy()) {
            let _ = clean(&entry.path(), CleanWhat::All);
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
