//! `cargo xtask check`: exactly what CI runs before the tests. Every check runs; the end says which failed.

use anyhow::bail;

use crate::{ebpf, r#gen, setup, shell, tidy};

type Check = (&'static str, fn() -> anyhow::Result<()>);

const CHECKS: &[Check] = &[
    ("lock file", lock_file),
    ("format", format),
    ("tidy", tidy::run),
    ("licences, duplicates, sources", deny),
    ("programs for the kernel", || ebpf::build(&ebpf::Options::default())),
    ("lints", lints),
    ("generated files", r#gen::verify),
];

/// Runs the checks.
///
/// # Errors
/// When one fails.
pub fn run() -> anyhow::Result<()> {
    let mut failed = Vec::new();
    for (name, check) in CHECKS {
        println!("check: {name}");
        if let Err(error) = check() {
            eprintln!("check: {name}: {error:#}");
            failed.push(*name);
        }
    }
    match failed.is_empty() {
        true => println!("check: all {} passed", CHECKS.len()),
        false => bail!("check failed: {}", failed.join(", ")),
    }
    Ok(())
}

/// With every feature, so that a fresh machine has afterwards what the checks without a network read.
fn lock_file() -> anyhow::Result<()> {
    let all = ["metadata", "--locked", "--all-features", "--format-version", "1"];
    shell::output(&mut shell::cargo(&all)).map(drop)
}

fn format() -> anyhow::Result<()> {
    shell::run(&mut shell::cargo(&["fmt", "--all", "--check"]))
}

fn lints() -> anyhow::Result<()> {
    shell::run(&mut shell::cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))
}

/// Without advisories: they need a database from the network at a moment of its own choosing, so the same commit would
/// pass today and fail tomorrow. They belong into a scheduled job.
fn deny() -> anyhow::Result<()> {
    let Some(program) = setup::cargo_deny_program() else {
        bail!("cargo-deny {} is not on PATH: run `cargo xtask setup`", setup::CARGO_DENY_VERSION);
    };
    let mut deny = shell::command(program);
    shell::run(
        deny.args(["--offline", "--log-level", "error", "--all-features", "check", "--hide-inclusion-graph"])
            .args(["bans", "licenses", "sources"]),
    )
}
