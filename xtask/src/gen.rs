//! Generated files. `docs/flags.md` comes out of an example of mesh-core, because xtask uses nothing of ours.

use std::fs;

use anyhow::{Context as _, ensure};

use crate::shell;

const FLAGS: &str = "docs/flags.md";

/// Writes what is generated.
///
/// # Errors
/// When the generator fails or the file cannot be written.
pub fn write() -> anyhow::Result<()> {
    fs::write(shell::root().join(FLAGS), flags()?).context(FLAGS)?;
    println!("gen: wrote {FLAGS}");
    Ok(())
}

/// Compares what is there with what would be generated.
///
/// # Errors
/// When they differ.
pub fn verify() -> anyhow::Result<()> {
    let written = fs::read_to_string(shell::root().join(FLAGS)).context(FLAGS)?;
    ensure!(written == flags()?, "{FLAGS} is not what mesh-core/src/flag.rs says: run `cargo xtask gen`");
    Ok(())
}

fn flags() -> anyhow::Result<String> {
    shell::output(&mut shell::cargo(&["run", "--quiet", "--package", "mesh-core", "--example", "flags"]))
}
