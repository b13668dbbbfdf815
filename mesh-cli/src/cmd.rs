//! One file per verb.

pub mod internal;
pub mod local;
