//! One node: its namespaces, its agent and its service proxy.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{
    address::{CONTROL, NodeNet},
    cgroup::Group,
    keeper::{Keeper, KeeperWatch, Program, Restart},
    layout::{Layout, private_dir, replace_file},
    namespace::{Holder, Holding, SELF, netns},
    network,
    services::ForwardTable,
};

/// Port of the control plane.
pub const CONTROL_PORT: u16 = 15012;
/// Before an agent that died is started again, unless `UNDERMESH_LOCAL_RESTART_DELAY` (seconds) says otherwise.
const RESTART_DELAY: Duration = Duration::from_secs(1);
const RESTART_DELAY_MAX: Duration = Duration::from_secs(10);

/// What all processes of a mesh have in common.
#[derive(Clone, Debug)]
pub struct Ground {
    /// Paths of the mesh.
    pub layout: Layout,
    /// All its processes.
    pub group: Group,
    /// `PATH` of every program: where `meshctl` is, then the user's.
    pub path: String,
    /// The user's folder.
    pub folder: PathBuf,
}

impl Ground {
    /// A program of the mesh itself, kept running inside the namespaces of `holder`.
    pub fn daemon(&self, name: &str, holder: u32, command: Vec<String>) -> Program {
        let group = self.group.child("mesh");
        let mut env = BTreeMap::from([("PATH".to_owned(), self.path.clone())]);
        // How much the mesh's own processes say, how long certificates live, and what bounds a pod, is chosen where it is
        // started.
        for name in [
            "RUST_LOG",
            "RUST_BACKTRACE",
            "UNDERMESH_LOG",
            "UNDERMESH_MAX_CERTIFICATE_TTL",
            "UNDERMESH_POD_CONNECTIONS",
        ] {
            env.extend(std::env::var(name).map(|value| (name.to_owned(), value)));
        }
        Program {
            name: name.to_owned(),
            place: vec![
                format!("--parent={}", std::process::id()),
                format!("--cgroup={}", group.path().display()),
                format!("--holder={holder}"),
            ],
            command,
            env,
            log: self.layout.log(name),
            restart: Restart::Always,
            delay: restart_delay(),
            max_delay: RESTART_DELAY_MAX,
        }
    }
}

fn restart_delay() -> Duration {
    let seconds = std::env::var("UNDERMESH_LOCAL_RESTART_DELAY").ok().and_then(|text| text.parse().ok());
    seconds.map_or(RESTART_DELAY, Duration::from_secs_f32)
}

/// Where the control plane listens.
pub fn control_address() -> SocketAddr {
    SocketAddr::new(IpAddr::V4(CONTROL), CONTROL_PORT)
}

/// What a pod needs of its node.
#[derive(Clone, Debug)]
pub struct NodeLink {
    /// The holder of the node's namespaces.
    pub holder: u32,
    /// The agent's enrolment socket.
    pub enrol_socket: PathBuf,
    agent: KeeperWatch,
}

impl NodeLink {
    /// The agent's process, when it runs.
    pub fn agent(&self) -> Option<u32> {
        self.agent.state().pid
    }
}

/// A node that is up.
#[derive(Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its number.
    pub net: NodeNet,
    holder: Holder,
    dir: PathBuf,
    agent: Keeper,
    _service_proxy: Keeper,
    table: ForwardTable,
    outside: Vec<IpAddr>,
}

impl Node {
    /// Makes the namespaces, joins them to the fabric and starts the node's processes.
    ///
    /// # Errors
    /// When a namespace or its network cannot be made.
    pub fn start(
        ground: &Ground,
        fabric: u32,
        name: &str,
        net: NodeNet,
        changed: Arc<dyn Fn() + Send + Sync>,
    ) -> anyhow::Result<Self> {
        let dir = ground.layout.node(name);
        let node = Self::start_in(dir.clone(), ground, fabric, (name, net), changed);
        if node.is_err() {
            // The next attempt begins anew.
            let _ = std::fs::remove_dir_all(&dir);
        }
        node
    }

    fn start_in(
        dir: PathBuf,
        ground: &Ground,
        fabric: u32,
        (name, net): (&str, NodeNet),
        changed: Arc<dyn Fn() + Send + Sync>,
    ) -> anyhow::Result<Self> {
        private_dir(&dir)?;
        private_dir(&dir.join("state"))?;
        private_dir(&dir.join("services"))?;
        let group = ground.group.child("mesh");
        // Pins live in the node's own BPF file system: nodes of one machine do not meet in one folder, and pins
        // vanish with the node, whatever ends it.
        let holder =
            Holder::start(&Holding { group: &group, hostname: Some(name), binds: Vec::new(), bpffs: true })?;
        let settings = [network::QUIET, network::FORWARD].concat();
        network::batch(&netns(holder.pid()), &settings, "")?;
        network::batch(&netns(fabric), &[], &network::plug_node(net, holder.pid()))?;
        network::batch(&netns(holder.pid()), &[], &network::node(net))?;
        let table = dir.join("services").join("table.json");
        write_table(&table, &ForwardTable::default())?;
        let agent = {
            let command = agent_command(&ground.layout, name, &dir);
            let changed = Arc::clone(&changed);
            Keeper::start(ground.daemon(&format!("agent-{name}"), holder.pid(), command), move || changed())
        };
        let proxy = vec![
            SELF.to_owned(),
            "internal".to_owned(),
            "service-proxy".to_owned(),
            format!("--netns={}", netns(holder.pid()).display()),
            format!("--table={}", table.display()),
        ];
        let proxy = ground.daemon(&format!("service-proxy-{name}"), holder.pid(), proxy);
        Ok(Self {
            name: name.to_owned(),
            net,
            holder,
            dir,
            agent,
            _service_proxy: Keeper::start(proxy, || {}),
            table: ForwardTable::default(),
            outside: Vec::new(),
        })
    }

    /// The holder of its namespaces.
    pub fn holder(&self) -> u32 {
        self.holder.pid()
    }

    /// What its pods need.
    pub fn link(&self) -> NodeLink {
        NodeLink { holder: self.holder(), enrol_socket: self.enrol_socket(), agent: self.agent.watch() }
    }

    /// The agent's state.
    pub fn agent(&self) -> super::keeper::State {
        self.agent.state()
    }

    /// The agent's admin socket.
    pub fn admin_socket(&self) -> PathBuf {
        self.dir.join("admin.sock")
    }

    /// The agent's enrolment socket.
    pub fn enrol_socket(&self) -> PathBuf {
        self.dir.join("enrol.sock")
    }

    /// Hands the service proxy a new table. `outside` are service addresses that no route of the node covers yet.
    ///
    /// # Errors
    /// When the table cannot be written or a route cannot be made.
    pub fn serve(&mut self, table: &ForwardTable, outside: &[IpAddr]) -> anyhow::Result<()> {
        if self.outside != outside {
            network::batch(&netns(self.holder()), &[], &network::own_addresses(outside))?;
            self.outside = outside.to_vec();
        }
        if self.table != *table {
            write_table(&self.dir.join("services").join("table.json"), table)?;
            self.table = table.clone();
        }
        Ok(())
    }

    /// Ends its processes and removes its files; its namespaces and their network vanish with them.
    pub fn stop(mut self) {
        self.agent.stop(Duration::from_secs(2));
        let dir = self.dir.clone();
        drop(self);
        let _ = fs::remove_dir_all(dir);
    }
}

fn write_table(path: &Path, table: &ForwardTable) -> anyhow::Result<()> {
    let rows: Vec<_> = table.0.iter().collect();
    Ok(replace_file(path, &serde_json::to_string(&rows)?)?)
}

fn agent_command(layout: &Layout, name: &str, dir: &Path) -> Vec<String> {
    vec![
        "mesh-node".to_owned(),
        "run".to_owned(),
        format!("--node={name}"),
        format!("--control={}", control_address()),
        format!("--control-roots={}", layout.roots().display()),
        format!("--credential={}", layout.credentials().join(format!("node-{name}")).display()),
        format!("--state-dir={}", dir.join("state").display()),
        format!("--enrol-socket={}", dir.join("enrol.sock").display()),
        format!("--admin-socket={}", dir.join("admin.sock").display()),
        "--bpffs=/sys/fs/bpf".to_owned(),
    ]
}
