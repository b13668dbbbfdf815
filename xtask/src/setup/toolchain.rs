//! The compiler of the BPF programs, its linker, and cargo-deny.

use std::{fmt, path::PathBuf};

use anyhow::{Context as _, bail};

use crate::shell;

const BPF_LINKER_VERSION: &str = "0.13.0";
/// Pinned: a newer one may judge differently.
pub const CARGO_DENY_VERSION: &str = "0.20.2";

/// How the BPF programs are compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// rustup's nightly with `rust-src`.
    Nightly,
    /// Debian's `rustc-web` with `rust-web-src`.
    Debian,
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nightly => "rustup's nightly toolchain (it has rust-src)",
            Self::Debian => "Debian's rustc-web (/usr/bin/rustc with rust-web-src)",
        })
    }
}

/// The first route whose compiler is complete.
///
/// # Errors
/// When neither is; says what each lacks.
pub fn choose_route() -> anyhow::Result<Route> {
    let nightly = nightly_lacks();
    let Some(nightly) = nightly else { return Ok(Route::Nightly) };
    let Some(debian) = debian_lacks() else { return Ok(Route::Debian) };
    bail!(
        "no compiler for BPF programs. rustup's nightly: {nightly}. Debian's rustc-web: {debian}. Run `cargo xtask \
         setup` as root on Debian 12, or `rustup toolchain install nightly -c rust-src`"
    )
}

/// What rustup's nightly lacks. It is often there without `rust-src`, so that is looked for, not assumed.
fn nightly_lacks() -> Option<String> {
    if shell::on_path("rustup").is_none() {
        return Some("there is no rustup".to_owned());
    }
    let mut rustc = shell::command("rustup");
    rustc.args(["run", "nightly", "rustc", "--print", "sysroot"]);
    match shell::output(&mut rustc) {
        Err(_) => Some("it is not installed".to_owned()),
        Ok(sysroot) if has_core_source(&sysroot) => None,
        Ok(_) => Some("it has no rust-src".to_owned()),
    }
}

fn debian_lacks() -> Option<String> {
    match shell::output(shell::command("/usr/bin/rustc").args(["--print", "sysroot"])) {
        Err(_) => Some("there is no /usr/bin/rustc (package rustc-web)".to_owned()),
        Ok(sysroot) if has_core_source(&sysroot) => None,
        Ok(_) => Some("it has no source of core (package rust-web-src)".to_owned()),
    }
}

fn has_core_source(sysroot: &str) -> bool {
    PathBuf::from(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file()
}

/// Installs bpf-linker when it is missing and says which route is taken.
///
/// # Errors
/// When it cannot be built.
pub fn bpf_linker() -> anyhow::Result<Route> {
    let route = choose_route()?;
    let version = shell::output(shell::command("bpf-linker").arg("--version")).unwrap_or_default();
    if version.split_whitespace().any(|word| word == BPF_LINKER_VERSION) {
        println!("setup: bpf-linker {BPF_LINKER_VERSION} is there");
        return Ok(route);
    }
    println!("setup: building bpf-linker {BPF_LINKER_VERSION} (a minute or two)");
    let mut install = shell::cargo(&["install", "bpf-linker", "--version", BPF_LINKER_VERSION, "--locked"]);
    // Either compiler's output links with it, as long as this LLVM is not older than the compiler's.
    install
        .args(["--force", "--no-default-features", "--features", "llvm-22"])
        .env("LLVM_SYS_221_PREFIX", "/usr/lib/llvm-22")
        .env("RUSTFLAGS", "-L/usr/lib/llvm-22/lib");
    shell::run(&mut install).context("build bpf-linker; it needs Debian's llvm-22-dev")?;
    Ok(route)
}

/// Installs cargo-deny when it is missing.
///
/// # Errors
/// When it cannot be built.
pub fn cargo_deny() -> anyhow::Result<()> {
    if cargo_deny_program().is_some() {
        println!("setup: cargo-deny {CARGO_DENY_VERSION} is there");
        return Ok(());
    }
    println!("setup: building cargo-deny {CARGO_DENY_VERSION} (three minutes on two cores)");
    let mut install = shell::cargo(&["install", "cargo-deny", "--version", CARGO_DENY_VERSION, "--locked"]);
    shell::run(install.args(["--force", "--no-default-features"])).context("build cargo-deny")
}

/// cargo-deny of the pinned version.
pub fn cargo_deny_program() -> Option<PathBuf> {
    let program = shell::on_path("cargo-deny")?;
    let version = shell::output(shell::command(&program).arg("--version")).ok()?;
    version.split_whitespace().any(|word| word == CARGO_DENY_VERSION).then_some(program)
}
