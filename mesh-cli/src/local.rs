//! Local mode: a mesh on one Linux machine, without Kubernetes.
//!
//! ```text
//!  meshctl local up ─► guardian ─► supervisor ─┬─ holder of the fabric ── mesh-control
//!        (ends)        cleans up   reconciles  ├─ holder of node-1 ────── mesh-node, service proxy
//!                                              ├─ holder of each pod ──── its containers
//! ```
//! Namespaces have no names, only processes; every process ends with its parent, and all are in one cgroup. So when
//! the supervisor ends in whatever way, nothing is left but folders, and the guardian removes those.

pub mod address;
pub mod cgroup;
pub mod document;
pub mod enrolment;
pub mod environment;
pub mod expand;
pub mod folder;
pub mod guardian;
pub mod http;
pub mod keeper;
pub mod layout;
pub mod names;
pub mod namespace;
pub mod network;
pub mod node;
pub mod objects;
pub mod pod;
pub mod report;
pub mod rpc;
pub mod schedule;
pub mod service_proxy;
pub mod services;
pub mod status;
pub mod supervisor;
