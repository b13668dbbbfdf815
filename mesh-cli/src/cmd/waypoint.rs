//! `meshctl waypoint`.

use std::{process::ExitCode, time::Duration};

use anyhow::{bail, ensure};

use super::{duration, within_runtime};
use crate::{
    chart,
    cluster::{Cluster, Target},
    output::{Output, print},
    waypoint::{self, Takes, Waypoint, Wish},
};

/// What to do with waypoints.
#[derive(Debug, clap::Subcommand)]
pub enum WaypointCommand {
    /// Print the Gateway that asks for a waypoint, and change nothing.
    Generate(GenerateArgs),
    /// Ask for a waypoint, wait until traffic can pass it, and bind the namespace if wanted.
    Apply(ApplyArgs),
    /// Say how waypoints are; fails when one is not programmed.
    Status(StatusArgs),
    /// List waypoints.
    List(ListArgs),
    /// Delete waypoints.
    Delete(DeleteArgs),
}

/// Where waypoints are.
#[derive(Clone, Debug, clap::Args)]
pub struct Place {
    #[command(flatten)]
    target: Target,
    /// Namespace; else that of the context.
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
}

impl Place {
    async fn connect(&self) -> anyhow::Result<(Cluster, String)> {
        let cluster = Cluster::connect(&self.target).await?;
        let namespace = self.namespace.clone().unwrap_or_else(|| cluster.namespace().to_owned());
        Ok((cluster, namespace))
    }
}

/// Arguments of `generate`.
#[derive(Debug, clap::Args)]
pub struct GenerateArgs {
    /// Name of the waypoint.
    #[arg(default_value = "waypoint")]
    name: String,
    /// Namespace.
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Which traffic it takes.
    #[arg(long = "for", value_enum, value_name = "TRAFFIC")]
    takes: Option<Takes>,
}

/// Arguments of `apply`.
#[derive(Debug, clap::Args)]
pub struct ApplyArgs {
    #[command(flatten)]
    place: Place,
    /// Name of the waypoint.
    #[arg(default_value = "waypoint")]
    name: String,
    /// Which traffic it takes; services if not said.
    #[arg(long = "for", value_enum, value_name = "TRAFFIC")]
    takes: Option<Takes>,
    /// Bind the namespace to it, once traffic can pass it.
    #[arg(long)]
    enroll_namespace: bool,
    /// Bind the namespace even if it is bound to another waypoint.
    #[arg(long)]
    overwrite: bool,
    /// Wait until traffic can pass it.
    #[arg(long, default_value_t = true, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          action = clap::ArgAction::Set, value_name = "BOOL")]
    wait: bool,
    /// How long to wait.
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = duration)]
    timeout: Duration,
}

/// Arguments of `status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    #[command(flatten)]
    place: Place,
    /// Name of the waypoint; else all of the namespace.
    name: Option<String>,
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// Arguments of `list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    #[command(flatten)]
    place: Place,
    /// Of all namespaces.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// Arguments of `delete`.
#[derive(Debug, clap::Args)]
pub struct DeleteArgs {
    #[command(flatten)]
    place: Place,
    /// Names of the waypoints.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    names: Vec<String>,
    /// All of the namespace.
    #[arg(long)]
    all: bool,
}

/// Does it.
///
/// # Errors
/// What went wrong, for the user.
pub fn run(command: &WaypointCommand) -> anyhow::Result<ExitCode> {
    match command {
        WaypointCommand::Generate(args) => {
            let object = waypoint::gateway(args.namespace.as_deref(), &args.name, args.takes);
            print(&chart::stream(&[object])?)?;
            Ok(ExitCode::SUCCESS)
        }
        WaypointCommand::Apply(args) => within_runtime(apply(args)),
        WaypointCommand::Status(args) => within_runtime(status(args)),
        WaypointCommand::List(args) => within_runtime(list(args)),
        WaypointCommand::Delete(args) => within_runtime(async {
            let (cluster, namespace) = args.place.connect().await?;
            waypoint::delete(&cluster, &namespace, &args.names).await?;
            Ok(ExitCode::SUCCESS)
        }),
    }
}

async fn apply(args: &ApplyArgs) -> anyhow::Result<ExitCode> {
    ensure!(
        !args.overwrite || args.enroll_namespace,
        "--overwrite is about the binding: --enroll-namespace is missing"
    );
    let (cluster, namespace) = args.place.connect().await?;
    let wish = Wish {
        namespace,
        name: args.name.clone(),
        takes: args.takes,
        enroll_namespace: args.enroll_namespace,
        overwrite: args.overwrite,
        wait: args.wait.then_some(args.timeout),
    };
    waypoint::apply(&cluster, &wish).await?;
    Ok(ExitCode::SUCCESS)
}

async fn status(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let (cluster, namespace) = args.place.connect().await?;
    let mut found = waypoint::list(&cluster, Some(&namespace)).await?;
    found.retain(|one| args.name.as_ref().is_none_or(|name| one.name == *name));
    if let (Some(name), true) = (&args.name, found.is_empty()) {
        bail!("Gateway {namespace}/{name}: there is no waypoint of that name");
    }
    show(&found, args.output)?;
    Ok(if found.iter().all(Waypoint::is_programmed) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn list(args: &ListArgs) -> anyhow::Result<ExitCode> {
    let (cluster, namespace) = args.place.connect().await?;
    let namespace = Some(namespace.as_str()).filter(|_| !args.all_namespaces);
    show(&waypoint::list(&cluster, namespace).await?, args.output)?;
    Ok(ExitCode::SUCCESS)
}

fn show(waypoints: &[Waypoint], output: Output) -> anyhow::Result<()> {
    print(&match output {
        Output::Table if waypoints.is_empty() => "no waypoints\n".to_owned(),
        Output::Table => waypoint::table(waypoints),
        Output::Json => serde_json::to_string_pretty(waypoints)? + "\n",
    })?;
    Ok(())
}
