//! Why something is not done: a stable code, a sentence, and the policy that decided.

use serde::Serialize;

use crate::{flag::Flag, id::PolicyKey};

/// A decision against a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{flag}: {why}")]
pub struct Refusal {
    /// The stable code.
    pub flag: Flag,
    /// A sentence with the names involved.
    pub why: String,
    /// The policy that decided, if one did.
    pub policy: Option<PolicyKey>,
}

impl Refusal {
    /// A refusal that no policy decided.
    pub fn new(flag: Flag, why: impl Into<String>) -> Self {
        Self { flag, why: why.into(), policy: None }
    }
}
