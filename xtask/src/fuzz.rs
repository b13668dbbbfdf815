//! Short runs of the fuzz targets: enough to see a panic on near-valid input, short enough for every change.

use std::fs;

use anyhow::Context as _;

use crate::{shell, test::Totals};

/// Seconds per target.
const SECONDS: u64 = 10;

/// Runs each target, which is built, for a few seconds; one test per target.
///
/// # Errors
/// When there are none.
pub fn short() -> anyhow::Result<Totals> {
    let mut totals = Totals::default();
    for target in targets()? {
        let mut run = shell::command(shell::target_dir().join("debug/undermesh-fuzz"));
        match shell::run(run.args(["--seconds", &SECONDS.to_string(), &target])) {
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
    for entry in fs::read_dir(shell::root().join("fuzz/fuzz_targets")).context("fuzz/fuzz_targets")? {
        let path = entry?.path();
        if let Some(name) = path.file_stem().and_then(|name| name.to_str()) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}
