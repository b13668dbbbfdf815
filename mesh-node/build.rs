//! Embeds the object that `cargo xtask build-ebpf` made; without one the build ends with one line that says so. Debug
//! builds get the object with log lines beside it, when that was made; release builds never.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::exit,
};

fn main() {
    println!("cargo:rerun-if-env-changed=UNDERMESH_EBPF_OBJECT");
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| here.join("../target"), PathBuf::from);
    let object = env::var_os("UNDERMESH_EBPF_OBJECT")
        .map_or_else(|| target.join("ebpf/bpfel-unknown-none/release/mesh-ebpf"), PathBuf::from);
    println!("cargo:rerun-if-changed={}", object.display());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("mesh-ebpf.o");
    if fs::copy(&object, out).is_err() {
        println!(
            "cargo::error=there are no programs for the kernel yet: run `cargo xtask build-ebpf` (or `cargo xtask setup`, \
             which installs its compiler first)"
        );
        exit(0);
    }
    with_log_lines(&target);
}

fn with_log_lines(target: &Path) {
    println!("cargo::rustc-check-cfg=cfg(kernel_log)");
    let object = target.join("ebpf-log/bpfel-unknown-none/release/mesh-ebpf");
    println!("cargo:rerun-if-changed={}", object.display());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("mesh-ebpf-log.o");
    if env::var("PROFILE").is_ok_and(|profile| profile == "debug") && fs::copy(&object, out).is_ok() {
        println!("cargo::rustc-cfg=kernel_log");
    }
}
