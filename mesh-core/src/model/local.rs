//! A pod as the agent of its node must know it, before any traffic of it.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use serde::Serialize;

/// Whether a pod is to be in the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Enrolment {
    /// Captured and served.
    Wanted,
    /// Left alone.
    Not {
        /// Stable, such as `HostNetwork`.
        reason: Arc<str>,
        /// For people.
        text: Arc<str>,
    },
}

/// A pod of one node that has not ended; only the agent of that node is told.
///
/// Acknowledged it is captured and served, or rightly not. One whose sandbox does not exist yet is acknowledged too:
/// the CNI plugin has it captured before its first instruction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LocalPod {
    /// UID of the pod, also the name of the resource.
    pub uid: Arc<str>,
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Pod name.
    pub name: Arc<str>,
    /// Service account, never empty.
    pub service_account: Arc<str>,
    /// Own addresses, never v4-mapped; none before it has a sandbox.
    pub ips: Vec<IpAddr>,
    /// Whether it is to be in the mesh.
    pub enrolment: Enrolment,
    /// Ports that the kubelet calls: HTTP, TCP and gRPC probes, HTTP and TCP lifecycle hooks.
    pub probe_ports: BTreeSet<u16>,
    /// It is being deleted.
    pub terminating: bool,
    /// What the kubelet and the runtime call it, where that is not its UID: a static pod has the digest of its manifest,
    /// and the API knows only its mirror.
    pub kubelet_uid: Option<Arc<str>>,
}

impl LocalPod {
    /// The UID by which the runtime knows it.
    pub fn runtime_uid(&self) -> &str {
        self.kubelet_uid.as_ref().unwrap_or(&self.uid)
    }

    /// Whether it is to be captured.
    pub fn wanted(&self) -> bool {
        self.enrolment == Enrolment::Wanted
    }
}
