//! Worlds for the end-to-end suites: a mesh in local mode, its pods as namespaces, and small peers inside them.

pub mod cluster;
pub mod grpc;
pub mod netns;
pub mod peer;
pub mod suite;
pub mod wait;
pub mod wire;
pub mod world;

pub use suite::Suite;
pub use world::{Pod, World};
