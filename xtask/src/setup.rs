//! `cargo xtask setup`: installs what is missing, asks nothing, says what it chose. Running it again changes nothing.

mod packages;
mod toolchain;

use crate::shell;

/// Runs every step.
///
/// # Errors
/// When something is missing and cannot be installed from here; says what to do.
pub fn run() -> anyhow::Result<()> {
    packages::install(packages::BASE)?;
    let route = toolchain::bpf_linker()?;
    println!("setup: programs for the kernel are built with {route}");
    toolchain::cargo_deny()?;
    println!("setup: done");
    Ok(())
}

/// Runs every step where that is possible without asking anybody; elsewhere what is missing says so when it is needed.
///
/// # Errors
/// As [`run`].
pub fn where_possible() -> anyhow::Result<()> {
    if may_install() { run() } else { Ok(()) }
}

/// Whether `cargo xtask setup` may install packages here.
fn may_install() -> bool {
    shell::is_root() && shell::on_path("apt-get").is_some()
}

/// Installs what a cluster needs besides: only who asks for one pays for it.
///
/// # Errors
/// When something is missing and cannot be installed from here.
pub fn cluster() -> anyhow::Result<()> {
    packages::install(packages::CLUSTER)
}

/// Installs Debian's Go, to fetch a newer one with.
///
/// # Errors
/// When it is missing and cannot be installed from here.
pub fn go_bootstrap() -> anyhow::Result<()> {
    packages::install(packages::GO)
}

pub use toolchain::{CARGO_DENY_VERSION, Route, cargo_deny_program, choose_route};
