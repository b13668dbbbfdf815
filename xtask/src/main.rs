//! `cargo xtask`: what developers and CI run. Builds without root, without the BPF toolchain, and uses nothing of
//! ours, so that it works before anything else does.

#![forbid(unsafe_code)]

mod bench;
mod check;
mod demo;
mod ebpf;
mod fuzz;
mod r#gen;
mod kernels;
mod setup;
mod shell;
mod test;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Tasks of the Undermesh workspace.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing on this machine; asks nothing.
    Setup,
    /// Build the programs for the kernel.
    BuildEbpf(ebpf::Options),
    /// Show Bookinfo on two nodes of this machine, step by step.
    Demo(demo::Options),
    /// Run the tests: all of them, or the suites named.
    Test(test::Options),
    /// Everything that CI checks before it tests.
    Check,
    /// Measure the cost of a connection against plain TCP and an Envoy pair.
    Bench(bench::Options),
    /// Write the generated files, `docs/flags.md`.
    Gen,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().task {
        Task::Setup => setup::run(),
        Task::BuildEbpf(options) => ebpf::build(&options),
        // The commands that a newcomer types first work on a machine that has nothing yet.
        Task::Demo(options) => setup::where_possible().and_then(|()| demo::run(&options)),
        Task::Test(options) => setup::where_possible().and_then(|()| test::run(&options)),
        Task::Check => check::run(),
        Task::Bench(options) => setup::where_possible().and_then(|()| bench::run(&options)),
        Task::Gen => r#gen::write(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
