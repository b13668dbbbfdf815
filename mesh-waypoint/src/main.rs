//! `mesh-waypoint`: parse settings, run, exit code.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;
use mesh_waypoint::{
    app,
    config::{Ask, Settings},
};

fn main() -> ExitCode {
    // `ask` has none of the flags that serving needs, so it is not a subcommand beside them.
    let mut arguments: Vec<_> = std::env::args_os().collect();
    if arguments.get(1).is_some_and(|word| word == "ask") {
        arguments.remove(1);
        return ask(&Ask::parse_from(arguments));
    }
    let settings = Settings::parse();
    match run(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-waypoint: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn ask(ask: &Ask) -> ExitCode {
    let asked = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| Ok(runtime.block_on(mesh_net::admin::ask(&ask.admin_socket, &ask.path))?));
    match asked {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("mesh-waypoint: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(settings: Settings) -> anyhow::Result<()> {
    let log =
        mesh_net::telemetry::init_tracing(settings.log_format, &settings.log).map_err(anyhow::Error::msg)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(app::run(settings, log))?;
    Ok(())
}
