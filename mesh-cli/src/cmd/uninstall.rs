//! `meshctl uninstall`.

use std::{process::ExitCode, time::Duration};

use super::{duration, install::Place, within_runtime};
use crate::{
    cluster::Cluster,
    install::uninstall::{self, Wish},
};

/// Arguments of `uninstall`.
#[derive(Debug, clap::Args)]
pub struct UninstallArgs {
    #[command(flatten)]
    place: Place,
    /// Remove definitions of kinds as well: those that meshctl wrote and of which no object is left.
    #[arg(long)]
    crds: bool,
    /// How long everything together may take.
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = duration)]
    timeout: Duration,
}

/// Uninstalls.
///
/// # Errors
/// What could not be removed.
pub fn run(args: &UninstallArgs) -> anyhow::Result<ExitCode> {
    let wish =
        Wish { namespace: args.place.namespace.clone(), definitions: args.crds, timeout: args.timeout };
    within_runtime(async {
        let cluster = Cluster::connect(&args.place.target).await?;
        uninstall::run(&cluster, &wish).await
    })?;
    Ok(ExitCode::SUCCESS)
}
