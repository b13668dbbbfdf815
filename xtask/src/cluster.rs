//! `cargo xtask cluster`: a real Kubernetes on this machine, two nodes, IPv4 and IPv6. A machine of it is a set of
//! namespaces with a first process of its own; all of it ends with that.

mod cgroups;
mod components;
mod images;
mod init;
mod machine;
mod network;
mod plan;
mod programs;
mod rootfs;
mod state;
mod unit;
mod up;

use std::{
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail, ensure};
use clap::{Args, Subcommand};

use crate::{setup, shell};
use state::State;

pub use init::run as run_machine;

/// The cluster of a checkout that is not named otherwise.
pub const DEFAULT_NAME: &str = "dev";

/// What to do with which cluster.
#[derive(Args, Debug)]
pub struct Options {
    #[command(subcommand)]
    action: Action,
    /// Name of the cluster; several run side by side.
    #[arg(long, global = true, default_value = DEFAULT_NAME)]
    name: String,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Start it, and wait until its nodes and its DNS are ready.
    Up,
    /// End it; nothing of it stays.
    Down,
    /// Tell how its machines, programs and nodes are.
    Status,
    /// Run kubectl on it. Options of kubectl come after the first word.
    Kubectl {
        /// kubectl's arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Load images into its nodes: names of `cargo xtask image`, or archives.
    Load {
        /// `node`, `control`, `waypoint`, `bookinfo`, or the path of an archive.
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Run a program of this machine inside one of its machines: control, node-a, node-b.
    Exec {
        /// Which machine.
        machine: String,
        /// Program and arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
    /// Stop a program: etcd, kube-apiserver, … of control; kubelet, containerd, kube-proxy of a node.
    Stop {
        /// Which machine.
        machine: String,
        /// Which program.
        program: String,
        /// Kill it instead of asking it to end.
        #[arg(long)]
        kill: bool,
    },
    /// Start a program that was stopped.
    Start {
        /// Which machine.
        machine: String,
        /// Which program.
        program: String,
    },
}

/// Does it.
///
/// # Errors
/// When it cannot be done.
pub fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(shell::is_root(), "a cluster needs root: it is made of namespaces, cgroups and mounts");
    let name = &options.name;
    state::check_name(name)?;
    match &options.action {
        Action::Up => up(name),
        Action::Down => up::down(name),
        Action::Status => status(name),
        Action::Kubectl { arguments } => {
            State::running(name)?;
            // What it ends with is what this ends with.
            let error =
                programs::kubectl(&programs::built()?, &state::kubeconfig(name)).args(arguments).exec();
            Err(error).context("start kubectl")
        }
        Action::Load { images } => {
            let archives: Vec<_> = images.iter().map(|image| archive(image)).collect::<Result<_, _>>()?;
            load(name, &archives)
        }
        Action::Exec { machine, command } => {
            let state = State::running(name)?;
            let (program, arguments) = command.split_first().context("no program")?;
            Err(state.machine(machine)?.command(program).args(arguments).exec()).context("start nsenter")
        }
        Action::Stop { machine, program, kill } => {
            let signal = if *kill { nix::libc::SIGKILL } else { nix::libc::SIGTERM };
            up::stop(&State::running(name)?, machine, program, signal)
        }
        Action::Start { machine, program } => up::start(&State::running(name)?, machine, program),
    }
}

/// Starts a cluster that is not up yet.
///
/// # Errors
/// When something that it needs cannot be had, or a step fails.
pub fn up(name: &str) -> anyhow::Result<()> {
    if State::running(name).is_ok() {
        println!("cluster: {name} is up already");
        return Ok(());
    }
    setup::cluster()?;
    let programs = programs::built()?;
    // What an earlier one left that did not end well.
    up::down(name)?;
    up::up(name, &programs)?;
    println!("cluster: export KUBECONFIG={}", state::kubeconfig(name).display());
    Ok(())
}

/// Whether a cluster of ours runs.
pub fn is_up(name: &str) -> bool {
    State::running(name).is_ok()
}

/// Ends a cluster.
///
/// # Errors
/// When something of it stays.
pub fn down(name: &str) -> anyhow::Result<()> {
    up::down(name)
}

/// The file that describes a cluster of ours.
pub fn state_file(name: &str) -> PathBuf {
    state::folder(name).join("state.json")
}

/// The credentials of a cluster of ours.
pub fn kubeconfig(name: &str) -> PathBuf {
    state::kubeconfig(name)
}

/// The cgroup of each kubelet, as agents are to be told: it is no systemd unit.
///
/// # Errors
/// When the cluster is not up.
pub fn kubelet_cgroup(name: &str) -> anyhow::Result<String> {
    Ok(format!("{}/$(UNDERMESH_NODE)/kubelet", State::running(name)?.plan().cgroup()))
}

/// The binary that is kubectl when its first argument says so.
///
/// # Errors
/// When it does not build.
pub fn kubernetes() -> anyhow::Result<PathBuf> {
    Ok(programs::built()?.join("kubernetes"))
}

/// The credentials of a cluster to work on.
pub struct Kubeconfig {
    /// The file.
    pub file: PathBuf,
    /// It is one of ours: images can be loaded, programs stopped.
    pub is_own: bool,
}

/// The cluster that `KUBECONFIG` names, else one of ours, started if it is not up.
///
/// # Errors
/// When it cannot be started, or the file is not there.
pub fn ensure(name: &str) -> anyhow::Result<Kubeconfig> {
    let own = state::kubeconfig(name);
    if let Some(file) = std::env::var_os("KUBECONFIG").filter(|file| !file.is_empty()).map(PathBuf::from)
        && file != own
    {
        ensure!(file.is_file(), "KUBECONFIG is {}, which is not there", file.display());
        return Ok(Kubeconfig { file, is_own: false });
    }
    up(name)?;
    Ok(Kubeconfig { file: own, is_own: true })
}

/// kubectl with the credentials of a file.
///
/// # Errors
/// When it does not build.
pub fn kubectl(kubeconfig: &Path) -> anyhow::Result<Command> {
    Ok(programs::kubectl(&programs::built()?, kubeconfig))
}

/// A certificate of its own authority, and its key, for a test server; made once per folder.
///
/// # Errors
/// When it cannot be made.
pub fn certificate(folder: &Path, host: &str) -> anyhow::Result<(PathBuf, PathBuf)> {
    let (certificate, key) = (folder.join("server.crt"), folder.join("server.key"));
    if !certificate.is_file() || !key.is_file() {
        std::fs::create_dir_all(folder)?;
        let order = components::server_certificate(folder, host);
        up::fed(programs::command(&programs::built()?, "pki"), &serde_json::to_vec(&order)?)?;
    }
    Ok((certificate, key))
}

/// Loads archives into every node.
///
/// # Errors
/// When a node refuses one.
pub fn load(name: &str, archives: &[PathBuf]) -> anyhow::Result<()> {
    let state = State::running(name)?;
    for node in state.nodes() {
        for archive in archives {
            images::load(node, archive)?;
        }
    }
    Ok(())
}

/// (pure but for the look at the file) An image's archive: by path, or by the name of one that was built.
fn archive(image: &str) -> anyhow::Result<PathBuf> {
    let built = shell::target_dir().join("images").join(format!("{image}.tar"));
    let given = Path::new(image);
    // Like cargo's, paths count from where the command was typed.
    match (built.is_file(), given.is_file()) {
        (true, _) => Ok(built),
        (false, true) => Ok(given.to_owned()),
        (false, false) => {
            bail!("there is no {}, and no archive {image}: `cargo xtask image {image}`", built.display())
        }
    }
}

fn status(name: &str) -> anyhow::Result<()> {
    let Some(state) = State::load(name)? else {
        println!("cluster {name}: not there");
        return Ok(());
    };
    println!("cluster {name}: {}", if state.complete { "up" } else { "not complete" });
    for machine in &state.machines {
        let alive = if machine.alive() { "" } else { " (gone)" };
        println!("{} process {}{alive}", machine.name, machine.pid);
    }
    for ((machine, program), health) in up::health(&state)? {
        let now = health.pid.map_or_else(|| "stopped".to_owned(), |pid| format!("runs as {pid}"));
        let ends =
            health.last_end.map(|how| format!(", ended {} times by itself, last: {how}", health.ended));
        println!("{machine} {program}: {now}{}", ends.unwrap_or_default());
    }
    let mut kubectl: Command = programs::kubectl(&programs::built()?, &state::kubeconfig(name));
    shell::run(kubectl.args(["get", "nodes", "-o", "wide"]))
}
