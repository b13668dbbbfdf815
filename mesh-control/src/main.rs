//! The control plane's process.
#![forbid(unsafe_code)]

use std::{process::ExitCode, time::Duration};

use anyhow::Context;
use clap::Parser;
use mesh_control::{
    app::{App, AppError},
    config::{Ask, Settings},
};
use mesh_net::{admin, drain, task::TaskGroup, telemetry::init_tracing};
use tokio::signal::unix::{SignalKind, signal};

/// Calls that are being answered when the end is asked for.
const LAST_ANSWERS: Duration = Duration::from_millis(300);

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    if args.nth(1).is_some_and(|word| word == "ask") {
        return ask(&Ask::parse_from(std::iter::once("mesh-control ask".into()).chain(args)));
    }
    match run(&Settings::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn ask(ask: &Ask) -> ExitCode {
    match admin::ask(&ask.admin, &ask.path).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("mesh-control: {:#}", anyhow::Error::new(error));
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(settings: &Settings) -> anyhow::Result<()> {
    let _log = init_tracing(settings.log_format, &settings.log_level).map_err(anyhow::Error::msg)?;
    let (drain, _) = drain::channel();
    let tasks = TaskGroup::new();
    let mut terminated = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupted = signal(SignalKind::interrupt()).context("SIGINT")?;
    // The start itself may wait for an API server, as long as that takes.
    let running = async {
        let app = App::start(settings, &drain, &tasks).await?;
        tracing::info!(addr = %app.addr, "serving");
        std::future::pending::<Result<(), AppError>>().await
    };
    tokio::select! {
        failed = running => failed?,
        _ = terminated.recv() => {}
        _ = interrupted.recv() => {}
    }
    tracing::info!("draining");
    // Feeds are open for ever and hold no work of ours: only calls that are being answered get a moment.
    drain.run(&tasks, LAST_ANSWERS).await;
    let _ = std::fs::remove_file(&settings.admin);
    Ok(())
}
