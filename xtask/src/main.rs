//! `cargo xtask`: what developers and CI run. Builds without root, without the BPF toolchain, and uses nothing of
//! ours, so that it works before anything else does.

#![forbid(unsafe_code)]

mod bench;
mod check;
mod cluster;
mod conformance;
mod demo;
mod ebpf;
mod fuzz;
mod r#gen;
mod go;
mod image;
mod kernels;
mod oci;
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
    /// A real Kubernetes on this machine: two nodes, IPv4 and IPv6.
    Cluster(cluster::Options),
    /// Run the official Gateway API conformance suite on a cluster.
    Conformance(conformance::Options),
    /// Build the images as OCI archives, without a container engine.
    Image(image::Options),
    /// The first process of a machine of a cluster.
    #[command(hide = true)]
    Machine {
        /// What it is to be.
        spec: std::path::PathBuf,
    },
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
        Task::Cluster(options) => cluster::run(&options),
        Task::Image(options) => image::run(&options),
        Task::Conformance(options) => conformance::run(&options),
        Task::Machine { spec } => cluster::run_machine(&spec),
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
