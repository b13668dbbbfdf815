//! The meaning of the mesh: identities, model, snapshot and every decision about a connection or request.
//!
//! Pure: no IO, no clock, no randomness; time and chance are arguments. The agent, the waypoint, the control plane
//! and `meshctl explain` run the same code.

pub mod flag;
pub mod id;
pub mod limits;
pub mod model;
