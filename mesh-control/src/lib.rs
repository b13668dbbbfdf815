//! The control plane: Kubernetes objects in, the mesh's configuration, certificates and status out.
//!
//! The first half is a library of pure functions, used by `meshctl` as well: [`source::parse`], `translate`,
//! `compile`. The second half serves what they say.
#![forbid(unsafe_code)]

pub mod admin;
pub mod app;
pub mod ca;
pub mod compile;
pub mod config;
pub mod credentials;
pub mod leader;
pub mod pipeline;
pub mod provision;
pub mod publish;
pub mod serve;
pub mod source;
pub mod status;
pub mod translate;
pub mod write;

pub use pipeline::analyze;
