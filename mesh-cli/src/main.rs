//! `meshctl`: the operator's tool.

#![forbid(unsafe_code)]

mod cmd;
mod local;

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
        Verb::Local(command) => cmd::local::run(command),
        Verb::Analyze(args) => cmd::analyze::run(&args),
        Verb::Internal(command) => cmd::internal::run(command),
    };
    done.unwrap_or_else(|error| {
        eprintln!("meshctl: {error:#}");
        ExitCode::FAILURE
    })
}
