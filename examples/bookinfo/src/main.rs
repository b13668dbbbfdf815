//! One binary for the four services of Bookinfo and a client.

#![forbid(unsafe_code)]

use std::{process::ExitCode, sync::Arc};

use anyhow::Context as _;
use bookinfo::{
    client::Get,
    details::Details,
    productpage::Productpage,
    ratings::Ratings,
    reviews::Reviews,
    web::{self, App},
};
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

/// Bookinfo as small programs. The services read the environment variables of the original.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The page, on `[::]:9080`.
    Productpage(Listen),
    /// Details of a book.
    Details(Listen),
    /// Reviews of a book.
    Reviews(Listen),
    /// Ratings of a book.
    Ratings(Listen),
    /// Fetch a URL, like curl.
    Get(Get),
    /// Do nothing until told to end: a pod to call from.
    Wait,
}

#[derive(clap::Args)]
struct Listen {
    /// Port, on all addresses of both families.
    #[arg(long, default_value_t = 9080)]
    port: u16,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bookinfo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> anyhow::Result<()> {
    let env = |name: &str| std::env::var(name).ok();
    match Arguments::parse().command {
        Command::Productpage(at) => serve(&at, Productpage::from_env(&env)?).await,
        Command::Details(at) => serve(&at, Details::from_env(&env)?).await,
        Command::Reviews(at) => serve(&at, Reviews::from_env(&env)?).await,
        Command::Ratings(at) => serve(&at, Ratings::from_env(&env)).await,
        Command::Get(get) => get.run().await,
        Command::Wait => wait().await,
    }
}

/// As the first process of a container it gets no signal that it does not ask for.
async fn wait() -> anyhow::Result<()> {
    let mut told = signal(SignalKind::terminate()).context("SIGTERM")?;
    told.recv().await;
    Ok(())
}

async fn serve(at: &Listen, app: impl App) -> anyhow::Result<()> {
    let listener = web::listen(at.port).with_context(|| format!("listen on port {}", at.port))?;
    println!("listening on [::]:{}", at.port);
    tokio::select! {
        () = web::serve(listener, Arc::new(app)) => Ok(()),
        told = wait() => told,
    }
}
