//! `cargo xtask build-ebpf`: the programs for the kernel, with the first compiler that can build them.

use std::process::Command;

use anyhow::{Context as _, ensure};
use clap::Args;

use crate::{
    setup::{self, Route},
    shell,
};

/// How to build the programs for the kernel.
#[derive(Args, Debug, Default)]
pub struct Options {
    /// Only the object without log lines, which is the only one that release builds of the agent hold.
    #[arg(long)]
    pub plain: bool,
}

/// Builds the object `ebpf/bpfel-unknown-none/release/mesh-ebpf` below the target directory, and the same with log lines
/// below `ebpf-log`, for debug builds of the agent.
///
/// # Errors
/// When there is no compiler or linker for BPF, or the programs do not compile.
pub fn build(options: &Options) -> anyhow::Result<()> {
    let route = setup::choose_route()?;
    ensure!(
        shell::on_path("bpf-linker").is_some(),
        "bpf-linker is not on PATH: run `cargo xtask setup`, and see that ~/.cargo/bin is on PATH"
    );
    println!("build-ebpf: with {route}");
    object(route, "ebpf", &[])?;
    if options.plain { Ok(()) } else { object(route, "ebpf-log", &["--features", "log"]) }
}

fn object(route: Route, directory: &str, features: &[&str]) -> anyhow::Result<()> {
    let mut cargo = compiler(route);
    // A target directory of its own: another compiler, and no waiting for the lock of the workspace's.
    cargo.args(["build", "--locked", "--release", "--package", "mesh-ebpf"]).args([
        "-Zbuild-std=core",
        "--target",
        "bpfel-unknown-none",
    ]);
    cargo.arg("--target-dir").arg(shell::target_dir().join(directory)).args(features);
    shell::run(&mut cargo).context("build the programs for the kernel")
}

fn compiler(route: Route) -> Command {
    let mut cargo = match route {
        Route::Nightly => {
            let mut rustup = shell::command("rustup");
            rustup.args(["run", "nightly", "cargo"]).env_remove("RUSTUP_TOOLCHAIN").env_remove("RUSTC");
            rustup
        }
        Route::Debian => {
            let mut cargo = shell::cargo(&[]);
            // The stable compiler of Debian takes unstable flags with this variable; its core must be built for BPF.
            cargo.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
            cargo
        }
    };
    cargo.env("RUSTFLAGS", "-C debuginfo=2 -C link-arg=--btf").env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo
}
