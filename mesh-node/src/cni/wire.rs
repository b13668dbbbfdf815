//! What the CNI plugin and the agent say to each other: JSON over HTTP/1.1 on a Unix socket that only root may use.
//!
//! ```text
//! PUT    /sandboxes/CONTAINER  Sandbox    ADD: may this sandbox start?   200 Started, else Refused
//! POST   /sandboxes/CONTAINER  Sandbox    CHECK: is it as it should be?  200 Started, else Refused
//! DELETE /sandboxes/CONTAINER             DEL: it is gone                200
//! POST   /sandboxes            Valid      GC: only these still exist     200
//! ```

use std::{net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

/// Where sandboxes are.
pub const SANDBOXES: &str = "/sandboxes";

/// A pod's sandbox as the container runtime made it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sandbox {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// UID of the pod; some runtimes do not tell it.
    #[serde(default)]
    pub uid: Option<String>,
    /// Path of its network namespace, as the host sees it.
    pub netns: PathBuf,
    /// Its addresses, as the plugins before made them.
    pub ips: Vec<IpAddr>,
    /// Its namespace is one that must start even while the mesh cannot.
    #[serde(default)]
    pub exempt: bool,
}

/// The sandbox may start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// It is captured and served.
    pub enrolled: bool,
    /// Why not, if not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// The sandbox must not start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// In words.
    pub error: String,
    /// The code of a `Flag`.
    pub reason: String,
}

/// The sandboxes that still exist.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Valid {
    /// Their containers.
    pub containers: Vec<String>,
}
