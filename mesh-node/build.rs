//! Embeds the object that `cargo xtask build-ebpf` made; without one the build ends with one line that says so.

use std::{env, fs, path::PathBuf, process::exit};

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
}
