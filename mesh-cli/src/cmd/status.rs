//! `meshctl status`.

use std::process::ExitCode;

use super::{install::Place, within_runtime};
use crate::{
    cluster::Cluster,
    install::status,
    output::{Output, print},
};

/// Arguments of `status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    #[command(flatten)]
    place: Place,
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// Prints it; fails when not everything is in force.
///
/// # Errors
/// When the API server does not answer.
pub fn run(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let status = within_runtime(async {
        let cluster = Cluster::connect(&args.place.target).await?;
        status::gather(&cluster, &args.place.namespace).await
    })?;
    print(&match args.output {
        Output::Table => status.table(),
        Output::Json => serde_json::to_string_pretty(&status)? + "\n",
    })?;
    Ok(if status.in_force { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
