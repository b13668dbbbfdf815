//! Short runs of the fuzz targets, on the stable compiler and without cargo-fuzz: the coverage that libFuzzer reads is
//! an LLVM pass that stable has; only the sanitizers are nightly's, and our code has next to no unsafe to sanitise.

use std::fs;

use anyhow::Context as _;

use crate::{shell, test::Totals};

/// Seconds per target: enough to see a panic on near-valid input, short enough for every change.
const SECONDS: u64 = 15;
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// What `cargo fuzz` passes, without a sanitizer.
const COVERAGE: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                        -Cllvm-args=-sanitizer-coverage-pc-table -Cdebug-assertions -Ccodegen-units=1";

/// Runs each target for a few seconds; one test per target.
///
/// # Errors
/// When the targets do not build.
pub fn short() -> anyhow::Result<Totals> {
    let fuzz = shell::root().join("fuzz");
    let mut build = shell::cargo(&["build", "--release", "--bins", "--target", TRIPLE, "--manifest-path"]);
    build
        .arg(fuzz.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(fuzz.join("target"))
        .env("RUSTFLAGS", COVERAGE);
    shell::run(&mut build).context("build the fuzz targets")?;
    let mut totals = Totals::default();
    for target in targets()? {
        let corpus = fuzz.join("corpus").join(&target);
        let artifacts = fuzz.join("artifacts").join(&target);
        fs::create_dir_all(&corpus)?;
        fs::create_dir_all(&artifacts)?;
        let mut run = shell::command(fuzz.join("target").join(TRIPLE).join("release").join(&target));
        run.arg(format!("-max_total_time={SECONDS}")).args([
            "-max_len=4096",
            "-rss_limit_mb=1024",
            "-verbosity=0",
        ]);
        run.arg(format!("-artifact_prefix={}/", artifacts.display())).arg(&corpus);
        let seeds = fuzz.join("seeds").join(&target);
        if seeds.is_dir() {
            run.arg(seeds);
        }
        match shell::run(&mut run) {
            Ok(()) => totals.passed += 1,
            Err(error) => {
                eprintln!("fuzz: {target}: {error:#}");
                totals.failed += 1;
            }
        }
    }
    Ok(totals)
}

/// The targets: one file each.
fn targets() -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(shell::root().join("fuzz/targets")).context("fuzz/targets")? {
        let path = entry?.path();
        if let Some(name) = path.file_stem().and_then(|name| name.to_str()) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}
