//! Images into the nodes' containerd, as archives.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;

use super::{
    components::{COREDNS_IMAGE, PAUSE_IMAGE},
    machine::Machine,
};
use crate::{
    oci::{Content, Image},
    shell,
};

/// The images that a cluster itself needs, as archives below `folder`.
///
/// # Errors
/// When one cannot be written.
pub fn own(programs: &Path, folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let folder = folder.join("images");
    fs::create_dir_all(&folder)?;
    let mut archives = Vec::new();
    for (program, name) in [("pause", PAUSE_IMAGE), ("coredns", COREDNS_IMAGE)] {
        let archive = folder.join(format!("{program}.tar"));
        let path = format!("/{program}");
        let image = Image {
            name: name.to_owned(),
            entrypoint: vec![path.clone()],
            files: BTreeMap::from([(path, Content::Program(programs.join(program)))]),
            ..Image::default()
        };
        image.write(&archive)?;
        archives.push(archive);
    }
    Ok(archives)
}

/// Whether the node's containerd answers.
///
/// # Errors
/// When it does not.
pub fn answers(node: &Machine) -> anyhow::Result<()> {
    shell::output(ctr(node).arg("version")).map(drop)
}

/// Loads an archive into a node.
///
/// # Errors
/// When containerd refuses it.
pub fn load(node: &Machine, archive: &Path) -> anyhow::Result<()> {
    shell::output(ctr(node).args(["images", "import"]).arg(archive))
        .map(drop)
        .with_context(|| format!("load {} into {}", archive.display(), node.name))
}

/// containerd's own client, from this machine: archives need not be seen inside.
fn ctr(node: &Machine) -> Command {
    let mut ctr = Command::new("ctr");
    ctr.arg("--address").arg(node.path("/run/containerd/containerd.sock")).args(["--namespace", "k8s.io"]);
    ctr
}
