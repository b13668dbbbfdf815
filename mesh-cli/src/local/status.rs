//! What `meshctl local status` says, as JSON and as a table.

use std::{fmt::Write as _, net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::document::Problem;
use crate::output::columns;

/// A local mesh as it is now.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// The folder that it is made from.
    pub folder: PathBuf,
    /// The process that runs the mesh.
    pub supervisor: u32,
    /// Its parent, which cleans up after it.
    pub guardian: u32,
    /// Everything that is written now holds everywhere.
    pub in_force: bool,
    /// Revision of the control plane's world.
    pub revision: u64,
    /// What is not in force yet, and why.
    pub waiting: Vec<String>,
    /// What is wrong in the folder.
    pub problems: Vec<Problem>,
    /// The control plane.
    pub control: ControlStatus,
    /// Nodes.
    pub nodes: Vec<NodeStatus>,
    /// Pods, those of waypoints included.
    pub pods: Vec<PodStatus>,
    /// Waypoints.
    pub waypoints: Vec<WaypointStatus>,
    /// Services.
    pub services: Vec<ServiceStatus>,
}

/// The control plane.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ControlStatus {
    /// Where agents reach it, inside the mesh.
    pub address: String,
    /// Its admin socket.
    pub admin_socket: PathBuf,
    /// Its network namespace.
    pub netns: PathBuf,
    /// Its process.
    pub pid: Option<u32>,
    /// How often it was started again.
    pub restarts: u32,
    /// Its log.
    pub log: PathBuf,
}

/// A node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Its network namespace.
    pub netns: PathBuf,
    /// Its addresses on the wire.
    pub ips: Vec<IpAddr>,
    /// The agent's admin socket.
    pub admin_socket: PathBuf,
    /// The agent's enrolment socket.
    pub enrol_socket: PathBuf,
    /// The agent serves all its pods.
    pub ready: bool,
    /// Why it does not.
    pub why: Option<String>,
    /// The agent's process.
    pub agent_pid: Option<u32>,
    /// How often it was started again.
    pub restarts: u32,
    /// The agent's log.
    pub log: PathBuf,
}

/// A pod.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PodStatus {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Its network namespace, a path for `nsenter --net=`.
    pub netns: PathBuf,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// Its UID.
    pub uid: String,
    /// The agent has captured it.
    pub enrolled: bool,
    /// Its identity, when it is enrolled or a waypoint.
    pub identity: Option<String>,
    /// All its containers run.
    pub ready: bool,
    /// What is not as wanted.
    pub why: Option<String>,
    /// The first container's process.
    pub pid: Option<u32>,
    /// The process that holds its namespaces.
    pub holder: Option<u32>,
    /// Restarts of its containers.
    pub restarts: u32,
    /// The first container's log.
    pub log: PathBuf,
}

/// A waypoint.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct WaypointStatus {
    /// Namespace of the Gateway.
    pub namespace: String,
    /// Name of the Gateway.
    pub name: String,
    /// Its pod.
    pub pod: String,
    /// Its service address.
    pub address: Option<IpAddr>,
    /// Its admin socket.
    pub admin_socket: PathBuf,
}

/// A service.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub vips: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<u16>,
}

/// What the control plane's admin socket answers to `GET /status`, as far as it is of interest here.
#[derive(Debug, Default, Deserialize)]
pub struct ControlAnswer {
    /// Revision of its world.
    #[serde(default)]
    pub revision: u64,
    /// Every proxy acknowledged all that it shall hold.
    #[serde(default)]
    pub in_force: bool,
    /// What is wrong with the objects.
    #[serde(default)]
    pub problems: Vec<Problem>,
    /// Why it is not in force.
    #[serde(default)]
    pub why: Vec<String>,
}

impl Status {
    /// For people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let word = if self.in_force { "in force" } else { "NOT in force" };
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "mesh {} from {}: {word}, revision {}",
            self.name,
            self.folder.display(),
            self.revision
        );
        let list = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let rows = self.nodes.iter().map(|node| {
            let state = if node.ready { "ready" } else { "not ready" };
            [
                node.name.clone(),
                state.to_owned(),
                list(&node.ips),
                node.restarts.to_string(),
                node.why.clone().unwrap_or_default(),
            ]
        });
        out += &columns(["NODE", "AGENT", "ADDRESSES", "RESTARTS", "WHY"], rows);
        let rows = self.pods.iter().map(|pod| {
            let mesh = if pod.enrolled { "enrolled" } else { "-" };
            [
                format!("{}/{}", pod.namespace, pod.name),
                format!("{} {mesh}", pod.node),
                list(&pod.ips),
                pod.restarts.to_string(),
                pod.why.clone().unwrap_or_default(),
            ]
        });
        out += &columns(["POD", "NODE MESH", "ADDRESSES", "RESTARTS", "WHY"], rows);
        let rows = self.services.iter().map(|service| {
            let ports: Vec<String> = service.ports.iter().map(ToString::to_string).collect();
            let name = format!("{}/{}", service.namespace, service.name);
            [name, ports.join(","), list(&service.vips), String::new(), String::new()]
        });
        out += &columns(["SERVICE", "PORTS", "ADDRESSES", "", ""], rows);
        for line in &self.waiting {
            let _ = writeln!(out, "waiting: {line}");
        }
        for problem in &self.problems {
            let _ = writeln!(out, "problem: {problem}");
        }
        out += "Containers run programs of this machine: images are not pulled. UDP is not captured.\n";
        out
    }
}
