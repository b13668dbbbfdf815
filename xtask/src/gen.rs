//! Generated files. What comes out of our crates is printed by examples of theirs, because xtask uses nothing of ours.

mod gateway_api;

use std::fs;

use anyhow::{Context as _, ensure};

use crate::shell;

/// A generated file, and the package, example and arguments that print it.
type Generated = (&'static str, &'static [&'static str]);

const FILES: &[Generated] = &[
    ("docs/flags.md", &["mesh-core", "flags"]),
    (
        "deploy/helm/undermesh/crds/security.istio.io_authorizationpolicies.yaml",
        &["mesh-control", "definitions", "authorizationpolicies"],
    ),
    (
        "deploy/helm/undermesh/crds/security.istio.io_peerauthentications.yaml",
        &["mesh-control", "definitions", "peerauthentications"],
    ),
];

/// Writes what is generated.
///
/// # Errors
/// When a generator fails or a file cannot be written.
pub fn write() -> anyhow::Result<()> {
    for (file, generator) in FILES {
        fs::write(shell::root().join(file), print(generator)?).context(*file)?;
        println!("gen: wrote {file}");
    }
    gateway_api::write()
}

/// Compares what is there with what would be generated.
///
/// # Errors
/// When they differ.
pub fn verify() -> anyhow::Result<()> {
    for (file, generator) in FILES {
        let written = fs::read_to_string(shell::root().join(file)).context(*file)?;
        ensure!(written == print(generator)?, "{file} is not what its source says: run `cargo xtask gen`");
    }
    gateway_api::verify()
}

fn print(generator: &[&str]) -> anyhow::Result<String> {
    let [package, example, arguments @ ..] = generator else {
        unreachable!("package and example are in the table")
    };
    let run = ["run", "--quiet", "--package", package, "--example", example, "--"];
    shell::output(&mut shell::cargo(&[&run, arguments].concat()))
}
