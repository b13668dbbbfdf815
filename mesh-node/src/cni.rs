//! The agent's side of the CNI plugin: its socket, the sandboxes that it was told of, and the plugin's place on the
//! node.

pub mod answer;
pub mod conflist;
pub mod install;
pub mod results;
pub mod sandboxes;
pub mod wire;

use std::path::{Path, PathBuf};

/// Sandboxes whose place is told below `/var/run` are looked up below `/run`: on hosts the former leads to the latter,
/// in a container it need not exist.
pub fn on_node(path: &Path) -> PathBuf {
    path.strip_prefix("/var/run").map_or_else(|_| path.to_owned(), |below| Path::new("/run").join(below))
}
