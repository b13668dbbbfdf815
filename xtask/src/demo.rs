//! `cargo xtask demo`: Bookinfo on two nodes of this machine, told in six steps. Each step prints the command, what it
//! shows and the evidence, and asserts it.

mod mesh;
mod story;
mod teller;
mod tls;
mod wire;

use std::{fs, path::Path, time::Instant};

use anyhow::{Context as _, ensure};
use clap::Args;

use crate::{ebpf, shell, test};
use mesh::Mesh;
use teller::Teller;

/// How to show it.
#[derive(Args, Debug)]
pub struct Options {
    /// Leave the mesh running at the end and print how to reach it.
    #[arg(long)]
    keep: bool,
}

/// Name of the demo's mesh.
const NAME: &str = "demo";

/// Builds, shows, takes down.
///
/// # Errors
/// When an assertion of a step fails, or the mesh cannot be built or started.
pub fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(shell::is_root(), "the demo needs root: it builds namespaces and loads programs into the kernel");
    println!("demo: building (the first time takes a few minutes)");
    ebpf::build(&ebpf::Options::default()).context("`cargo xtask setup` installs what is missing")?;
    test::build_programs(&[])?;
    test::raise_limits();

    let folder =
        tempfile::Builder::new().prefix("undermesh-demo-").tempdir().context("a folder for the YAML")?;
    copy_folder(&shell::root().join("examples/bookinfo/mesh"), folder.path())?;
    let began = Instant::now();
    let mut mesh = Mesh::new(NAME, folder.path())?;
    let mut teller = Teller::default();
    let told = story::tell(&mut mesh, &mut teller);
    if let Err(error) = &told {
        println!("\nThe story ends here: {error:#}");
        mesh.print_logs();
    }
    if options.keep {
        // The mesh watches the folder, so it stays as well.
        let folder = folder.keep();
        mesh.print_how_to_reach(&folder);
    } else {
        mesh.down()?;
    }
    told?;
    println!("\ndemo: {} assertions held, {} s after the build", teller.held(), began.elapsed().as_secs());
    Ok(())
}

fn copy_folder(from: &Path, to: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("read {}", from.display()))? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))
            .with_context(|| format!("copy {:?}", entry.path()))?;
    }
    Ok(())
}
