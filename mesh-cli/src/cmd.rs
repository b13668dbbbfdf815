//! One file per verb.

pub mod analyze;
pub mod internal;
pub mod local;
