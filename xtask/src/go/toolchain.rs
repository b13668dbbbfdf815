//! A Go toolchain: the machine's when it is new enough, else one that Debian's older Go fetches as a module, checked
//! against the checksum database.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

use super::cache_dir;
use crate::{setup, shell};

/// The oldest Go that builds all our modules.
pub const MINIMUM: (u32, u32, u32) = (1, 26, 4);
/// The toolchain that is fetched where there is none.
const FETCHED: &str = "go1.26.8";

/// Where a Go toolchain may be, besides PATH.
const USUAL: &[&str] = &["/usr/local/go/bin/go"];

/// The `go` to build with, fetched if need be.
///
/// # Errors
/// When there is none and none can be fetched.
pub fn ensure_toolchain() -> anyhow::Result<PathBuf> {
    let usual = USUAL.iter().map(PathBuf::from).filter(|file| file.is_file());
    let fetched = cache_dir()?.join(FETCHED).join("bin/go");
    let candidates = shell::on_path("go").into_iter().chain(usual).chain([fetched]);
    if let Some(go) = candidates.filter(|file| file.is_file()).find(|go| new_enough(go)) {
        return Ok(go);
    }
    fetch()
}

fn new_enough(go: &Path) -> bool {
    let mut version = shell::command(go);
    version.args(["env", "GOVERSION"]).env("GOTOOLCHAIN", "local");
    shell::output(&mut version).is_ok_and(|text| parse(&text).is_some_and(|version| version >= MINIMUM))
}

/// (pure) `go1.26.8` as numbers; a release candidate counts as older than its release.
fn parse(version: &str) -> Option<(u32, u32, u32)> {
    let mut numbers = version.trim().strip_prefix("go")?.split_whitespace().next()?.split('.');
    let mut number = || numbers.next().map_or(Some(0), |text| text.parse().ok());
    Some((number()?, number()?, number()?))
}

/// Debian's Go is too old to switch toolchains, but it can download one as what it is: a module.
fn fetch() -> anyhow::Result<PathBuf> {
    if shell::on_path("go").is_none() {
        setup::go_bootstrap().context("a Go to fetch a newer one with")?;
    }
    let Some(bootstrap) = shell::on_path("go") else {
        bail!("there is no Go {}.{}.{} or newer: install one", MINIMUM.0, MINIMUM.1, MINIMUM.2);
    };
    let platform = match std::env::consts::ARCH {
        "x86_64" => "linux-amd64",
        "aarch64" => "linux-arm64",
        other => bail!("no Go toolchain is fetched for {other}: install Go {FETCHED} or newer"),
    };
    println!("go: fetching {FETCHED}");
    let cache = cache_dir()?;
    let mut download = shell::command(bootstrap);
    download.args(["mod", "download", "-json", &format!("golang.org/toolchain@v0.0.1-{FETCHED}.{platform}")]);
    // Outside any module, so that ours are not asked for.
    download.current_dir(&cache).env("GOFLAGS", "").env("GOTOOLCHAIN", "local").env("GO111MODULE", "on");
    let told: serde_json::Value = serde_json::from_str(&shell::output(&mut download)?)?;
    let module = told["Dir"].as_str().context("go mod download named no folder")?;
    let (partial, done) = (cache.join(format!("{FETCHED}.partial")), cache.join(FETCHED));
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    // Modules are read-only and not executable; a toolchain needs both otherwise.
    shell::output(shell::command("cp").args(["-r", "--no-preserve=mode", module]).arg(&partial))?;
    for folder in ["bin", &format!("pkg/tool/{}", platform.replace('-', "_"))] {
        for entry in fs::read_dir(partial.join(folder)).with_context(|| format!("{folder} of {FETCHED}"))? {
            fs::set_permissions(entry?.path(), fs::Permissions::from_mode(0o755))?;
        }
    }
    if done.exists() {
        fs::remove_dir_all(&done)?;
    }
    fs::rename(&partial, &done)?;
    Ok(done.join("bin/go"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(parse("go1.26.8\n"), Some((1, 26, 8)));
        assert_eq!(parse("go1.19"), Some((1, 19, 0)));
        assert_eq!(parse("go1.27rc1"), None);
        assert_eq!(parse("devel"), None);
        assert!(parse("go1.30.0") > Some(MINIMUM));
    }
}
