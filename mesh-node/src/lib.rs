//! The agent of one node: captures pods by eBPF, carries their connections, and enforces identity and policy.
//!
//! Start at [`app`]: it builds everything in the order in which bytes meet it.

pub mod admin;
pub mod affinity;
pub mod agent;
pub mod app;
pub mod cni;
pub mod config;
pub mod connections;
pub mod direct;
pub mod earlier;
pub mod feed;
pub mod inbound;
pub mod kernel;
pub mod kubelet;
pub mod listeners;
pub mod outbound;
pub mod plaintext;
pub mod pods;
pub mod report;
pub mod source;
pub mod world;
