//! The control plane: Kubernetes objects in, the mesh's configuration, certificates and status out.
//!
//! The first half is a library of pure functions, used by `meshctl` as well: [`source::parse`], `translate`,
//! `compile`. The second half serves what they say.
#![forbid(unsafe_code)]

pub mod compile;
pub mod source;
pub mod translate;
