//! The node agent of Undermesh: `run`, `clean`, `probe`, and questions to the one that runs.

use std::{io::Write as _, path::Path, process::ExitCode, time::Duration};

use anyhow::{Context as _, anyhow};
use clap::Parser as _;
use mesh_core::limits;
use mesh_net::{
    admin::{Method, call},
    telemetry::init_tracing,
};
use mesh_node::{
    app,
    cni::install,
    config::{CleanSettings, Cli, Command, Config, ProbeSettings, Settings},
    kernel::{self, CleanWhat, KernelConfig},
    pods,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The agent's answer to a question.
const ANSWER: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(settings) => run(&settings),
        Command::Clean(settings) => clean(&settings),
        Command::Probe(settings) => probe(&settings),
        Command::Ask(settings) => ask(&settings.admin_socket, Method::GET, &settings.path, ANSWER),
        Command::Release(settings) => {
            ask(&settings.admin_socket, Method::POST, "/release", limits::DRAIN + 2 * ANSWER)
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-node: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(settings: &Settings) -> anyhow::Result<()> {
    let filter = std::env::var("UNDERMESH_LOG").unwrap_or_else(|_| "info".to_owned());
    let log =
        init_tracing(settings.log_format, &filter).map_err(|error| anyhow!("UNDERMESH_LOG: {error}"))?;
    let config = Config::new(settings)?;
    limits()?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(app::run(config, log))
}

/// As many descriptors as are allowed, since each connection takes two; and no core dumps, which would hold keys.
fn limits() -> anyhow::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("read RLIMIT_NOFILE")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raise RLIMIT_NOFILE")?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context("switch core dumps off")
}

/// The plugin first, without which pods start as if there were no mesh; then what captures; then what is in pods.
fn clean(settings: &CleanSettings) -> anyhow::Result<()> {
    let mut removed = Vec::new();
    if let Some(place) = settings.dirs.place() {
        removed.extend(install::remove(&place).context("remove the CNI plugin")?);
    }
    let what = settings.node.as_deref().map_or(CleanWhat::All, CleanWhat::Node);
    removed.extend(kernel::clean(&settings.bpffs, what)?);
    if let Some(directory) = &settings.state_dir {
        removed.extend(pods::clean(directory, &settings.host_proc)?);
    }
    for removed in removed {
        println!("removed {}", removed.display());
    }
    Ok(())
}

/// Asks the running agent and prints its answer.
fn ask(socket: &Path, method: Method, path: &str, deadline: Duration) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (status, body) =
        runtime.block_on(call(socket, method, path, "", deadline)).context("ask the agent")?;
    std::io::stdout().write_all(&body)?;
    anyhow::ensure!((200..300).contains(&status), "the agent answered with status {status}");
    Ok(())
}

fn probe(settings: &ProbeSettings) -> anyhow::Result<()> {
    let report = kernel::probe(&KernelConfig {
        node: String::new(),
        bpffs: settings.bpffs.clone(),
        mount_bpffs: true,
        cgroup: settings.cgroup.clone(),
        pod_flows: 0,
        log: false,
    })?;
    println!(
        "kernel  {}\ncgroup  {}\nbpffs   {}",
        report.kernel,
        report.cgroup.display(),
        report.bpffs.display()
    );
    let mut missing = Vec::new();
    for feature in &report.features {
        let found = match (feature.found, feature.required) {
            (true, _) => "found",
            (false, false) => "missing",
            (false, true) => "MISSING",
        };
        println!("{found:<8}{}: {}", feature.name, feature.purpose);
        if !feature.found && feature.required {
            missing.push(feature.name);
        }
    }
    anyhow::ensure!(missing.is_empty(), "the agent cannot run here without {}", missing.join(", "));
    Ok(())
}
