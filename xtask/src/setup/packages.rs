//! Debian packages.

use anyhow::{Context as _, bail};

use super::may_install;
use crate::shell;

/// Package, and what needs it.
type Package = (&'static str, &'static str);

/// What all tasks need.
pub const BASE: &[Package] = &[
    ("build-essential", "linking; aws-lc"),
    ("cmake", "aws-lc"),
    ("clang", "the fuzz targets' libFuzzer"),
    ("pkg-config", "bpf-linker"),
    ("rustc-web", "the compiler of the BPF programs"),
    ("libstd-rust-web-dev", "its libraries, for build scripts"),
    ("rust-web-src", "its core library, built for BPF"),
    ("llvm-22-dev", "bpf-linker"),
    ("iproute2", "namespaces in local mode"),
    ("util-linux", "nsenter"),
    ("tcpdump", "the demo's capture"),
    ("openssl", "tests: the other end of the records"),
    ("qemu-system-x86", "suite kernels: other kernels in emulation"),
    ("cpio", "suite kernels: their initramfs"),
    ("busybox-static", "suite kernels: their user space"),
    ("kmod", "suite kernels: their modules"),
    ("xz-utils", "suite kernels: their modules"),
    ("python3-pip", "bench: the wheel of Envoy"),
    ("python3-venv", "bench: the wheel of Envoy"),
];

/// What a cluster needs besides.
pub const CLUSTER: &[Package] = &[
    ("containerd", "cluster: the container runtime"),
    ("runc", "cluster: the container runtime"),
    ("containernetworking-plugins", "cluster: the nodes' network"),
    ("nftables", "cluster: kube-proxy"),
    ("iproute2", "cluster: the network between the nodes"),
    ("util-linux", "cluster: nsenter"),
];

/// Where there is no Go that is new enough.
pub const GO: &[Package] = &[("golang-go", "to fetch a newer Go")];

/// Installs the packages that are missing.
///
/// # Errors
/// When there are some and this is not root on Debian, or the mirror does not have them.
pub fn install(packages: &[Package]) -> anyhow::Result<()> {
    let missing: Vec<&str> = packages.iter().map(|(name, _)| *name).filter(|name| !installed(name)).collect();
    if missing.is_empty() {
        println!("setup: all {} packages are there", packages.len());
        return Ok(());
    }
    let reasons = packages.iter().filter(|(name, _)| missing.contains(name));
    for (name, reason) in reasons {
        println!("setup: {name} is missing (for {reason})");
    }
    if !may_install() {
        bail!(
            "packages are missing, and only root on Debian can install them here. Run `cargo xtask setup` as root, \
             or: apt-get install --no-install-recommends {}",
            missing.join(" ")
        );
    }
    shell::run(apt().arg("update")).context("refresh the package lists")?;
    shell::run(apt().args(["install", "-y", "--no-install-recommends"]).args(&missing)).with_context(|| {
        "install packages; rustc-web and llvm-22-dev are in Debian 12's security archive, which the sources of \
         apt must name"
    })
}

fn apt() -> std::process::Command {
    let mut apt = shell::command("apt-get");
    apt.arg("-q").env("DEBIAN_FRONTEND", "noninteractive");
    apt
}

fn installed(package: &str) -> bool {
    let mut query = shell::command("dpkg-query");
    query.args(["-W", "-f=${db:Status-Status}", package]);
    shell::output(&mut query).is_ok_and(|status| status == "installed")
}
