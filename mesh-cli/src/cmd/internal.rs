//! What `meshctl local` starts itself as; not for people.

use std::{path::PathBuf, process::ExitCode, thread};

use anyhow::Context as _;
use nix::sys::{prctl, signal::Signal};

use super::local::program_path;
use crate::local::{
    cgroup::Group,
    guardian,
    layout::Layout,
    namespace::{EnterArgs, PauseArgs, enter, hold},
    node::Ground,
    rpc,
    service_proxy::{self, ServiceProxyArgs},
    supervisor,
};

/// The processes of a local mesh that are this program.
#[derive(Debug, clap::Subcommand)]
pub enum InternalCommand {
    /// Hold namespaces.
    Pause(PauseArgs),
    /// Become a program inside namespaces.
    Enter(EnterArgs),
    /// Forward service addresses on a node.
    ServiceProxy(ServiceProxyArgs),
    /// Run the mesh.
    Supervise(MeshArgs),
    /// Run the supervisor and clean up after it.
    Guardian(MeshArgs),
}

/// Which mesh, from what.
#[derive(Clone, Debug, clap::Args)]
pub struct MeshArgs {
    /// Name of the mesh.
    #[arg(long)]
    name: String,
    /// The user's folder.
    #[arg(long)]
    folder: PathBuf,
    /// The process that must live for this one to live.
    #[arg(long)]
    parent: Option<i32>,
}

/// Runs one of them.
///
/// # Errors
/// What went wrong, for the log.
pub fn run(command: InternalCommand) -> anyhow::Result<ExitCode> {
    match command {
        InternalCommand::Pause(args) => hold(&args)?,
        InternalCommand::Enter(args) => enter(&args, None)?,
        InternalCommand::ServiceProxy(args) => {
            log();
            service_proxy::run(&args)?;
        }
        InternalCommand::Supervise(args) => {
            log();
            supervise(args)?;
        }
        InternalCommand::Guardian(args) => {
            log();
            let (layout, group) = (Layout::new(&args.name)?, Group::of_mesh(&args.name)?);
            let folder = args.folder.display().to_string();
            guardian::run(&layout, &group, &["--name".to_owned(), args.name, "--folder".to_owned(), folder])?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();
}

fn supervise(args: MeshArgs) -> anyhow::Result<()> {
    // Without its guardian the supervisor ends in good order and cleans up itself.
    prctl::set_pdeathsig(Signal::SIGTERM).context("set the parent-death signal")?;
    let (layout, group) = (Layout::new(&args.name)?, Group::of_mesh(&args.name)?);
    end_on_signals(layout.clone())?;
    group.child("mesh").create().context("make a cgroup")?;
    let ground =
        Ground { layout: layout.clone(), group: group.clone(), path: program_path()?, folder: args.folder };
    supervisor::run(ground)?;
    guardian::clean(&layout, &group).context("clean up")
}

/// SIGTERM and SIGINT are requests to end.
fn end_on_signals(layout: Layout) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::spawn(move || {
        let asked: std::io::Result<()> = runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let (mut terminate, mut interrupt) =
                (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            Ok(())
        });
        if asked.and_then(|()| rpc::down(&layout.socket())).is_err() {
            // Nobody to ask: whatever cleans up after a crash will do.
            std::process::exit(1);
        }
    });
    Ok(())
}
