//! The node agent of Undermesh: `run`, `clean` and `probe`.

use std::process::ExitCode;

use anyhow::{Context as _, anyhow};
use clap::Parser as _;
use mesh_net::telemetry::init_tracing;
use mesh_node::{
    app,
    config::{CleanSettings, Cli, Command, Config, ProbeSettings, Settings},
    kernel::{self, CleanWhat, KernelConfig},
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(settings) => run(&settings),
        Command::Clean(settings) => clean(&settings),
        Command::Probe(settings) => probe(&settings),
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

fn clean(settings: &CleanSettings) -> anyhow::Result<()> {
    let what = settings.node.as_deref().map_or(CleanWhat::All, CleanWhat::Node);
    for removed in kernel::clean(&settings.bpffs, what)? {
        println!("removed {}", removed.display());
    }
    Ok(())
}

fn probe(settings: &ProbeSettings) -> anyhow::Result<()> {
    let report = kernel::probe(&KernelConfig {
        node: String::new(),
        bpffs: settings.bpffs.clone(),
        cgroup: settings.cgroup.clone(),
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
