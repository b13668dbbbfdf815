//! Promise: on Kubernetes a pod that is to be in the mesh is captured before its first instruction, or when the label
//! comes; what cannot be captured says why; nothing of it depends on the agent being there all the time.
//!
//! Real plugin, agent and control plane; the container runtime is played by the test.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic like the tests themselves")]

#[path = "enrolment/bed.rs"]
mod bed;
#[path = "enrolment/follow.rs"]
mod follow;
#[path = "enrolment/plugin.rs"]
mod plugin;
#[path = "enrolment/withheld.rs"]
mod withheld;
