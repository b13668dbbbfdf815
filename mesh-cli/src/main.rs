//! `meshctl`: the operator's tool.

#![forbid(unsafe_code)]

mod chart;
mod cluster;
mod cmd;
mod install;
mod local;
mod output;
mod waypoint;

use std::process::ExitCode;

use clap::Parser as _;

/// Undermesh from the command line.
#[derive(Debug, clap::Parser)]
#[command(name = "meshctl", version, about)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Put the mesh into a cluster, or make it be as said here.
    Install(cmd::install::InstallArgs),
    /// Bring this version into a cluster and keep what was set.
    Upgrade(cmd::install::InstallArgs),
    /// Say whether a cluster can take the mesh, or what is wrong with the one that it has.
    Check(cmd::check::CheckArgs),
    /// Say how the mesh of a cluster is, and what is not in force and why.
    Status(cmd::status::StatusArgs),
    /// Ask for waypoints, look at them, delete them.
    #[command(subcommand)]
    Waypoint(cmd::waypoint::WaypointCommand),
    /// Take the mesh out of a cluster, nodes included.
    Uninstall(cmd::uninstall::UninstallArgs),
    /// A mesh on this machine, without Kubernetes.
    #[command(subcommand)]
    Local(cmd::local::LocalCommand),
    /// Say what is wrong in a folder of Kubernetes YAML.
    Analyze(cmd::analyze::AnalyzeArgs),
    /// What `local` starts itself as.
    #[command(subcommand, hide = true)]
    Internal(cmd::internal::InternalCommand),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().verb {
        Verb::Install(args) => cmd::install::install(&args),
        Verb::Upgrade(args) => cmd::install::upgrade(&args),
        Verb::Check(args) => cmd::check::run(&args),
        Verb::Status(args) => cmd::status::run(&args),
        Verb::Waypoint(command) => cmd::waypoint::run(&command),
        Verb::Uninstall(args) => cmd::uninstall::run(&args),
        Verb::Local(command) => cmd::local::run(command),
        Verb::Analyze(args) => cmd::analyze::run(&args),
        Verb::Internal(command) => cmd::internal::run(command),
    };
    done.unwrap_or_else(|error| {
        eprintln!("meshctl: {error:#}");
        ExitCode::FAILURE
    })
}
