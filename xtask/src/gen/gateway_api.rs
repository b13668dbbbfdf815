//! The Gateway API's definitions of kinds, standard channel, as its Go module has them, each under a line that says
//! whose they are.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};

use crate::shell;

const MODULE: &str = "sigs.k8s.io/gateway-api";
/// The version that the conformance suite insists on.
const VERSION: &str = "v1.6.3";
const FOLDER: &str = "deploy/helm/undermesh/crds";
const PREFIX: &str = "gateway.networking.k8s.io_";

/// Fetches the module, whose contents the checksum database of Go vouches for, and copies the definitions.
///
/// # Errors
/// When there is no Go, or the module cannot be fetched.
pub fn write() -> anyhow::Result<()> {
    let Some(go) = shell::on_path("go") else {
        println!("gen: no Go here: the Gateway API's definitions stay as they are");
        return Ok(());
    };
    let mut fetch = shell::command(go);
    let told = shell::output(fetch.args(["mod", "download", "-json", &format!("{MODULE}@{VERSION}")]))?;
    let folder = told
        .lines()
        .find_map(|line| line.trim().strip_prefix("\"Dir\": \"")?.strip_suffix("\","))
        .context("go mod download names no folder")?;
    let mut count = 0;
    for file in definitions(&Path::new(folder).join("config/crd/standard"))? {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        fs::write(shell::root().join(FOLDER).join(&name), header() + &text).context(name)?;
        count += 1;
    }
    println!("gen: wrote {count} definitions of {MODULE} {VERSION}");
    Ok(())
}

/// Checks that those in the tree are of one version: without the module nothing more can be said.
///
/// # Errors
/// When one is not.
pub fn verify() -> anyhow::Result<()> {
    let all = definitions(&shell::root().join(FOLDER))?;
    ensure!(!all.is_empty(), "{FOLDER} has none of the Gateway API's definitions: run `cargo xtask gen`");
    for file in all {
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let version = format!("gateway.networking.k8s.io/bundle-version: {VERSION}\n");
        let right = text.starts_with(&header()) && text.contains(&version);
        ensure!(right, "{} is not of {MODULE} {VERSION}: run `cargo xtask gen`", file.display());
    }
    Ok(())
}

fn header() -> String {
    format!(
        "# Copyright The Kubernetes Authors. Apache-2.0. From {MODULE} {VERSION}, written by cargo xtask gen.\n"
    )
}

/// The definitions in a folder; it has a policy for upgrades as well, which is not ours to install.
fn definitions(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with(PREFIX) && !name.contains("_vap_") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
