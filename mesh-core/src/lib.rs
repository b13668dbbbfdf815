//! The meaning of the mesh: identities, model, snapshot and every decision about a connection or request.
//!
//! Pure: no IO, no clock, no randomness; time and chance are arguments. The agent, the waypoint, the control plane
//! and `meshctl explain` run the same code.
//!
//! ```text
//!  proto ──► delta ──► snapshot ──► outbound::plan, inbound::admit ──► explain
//!                          └──────► authz, balance, route
//! ```
#![forbid(unsafe_code)]

pub mod authz;
pub mod balance;
pub mod delta;
pub mod explain;
pub mod flag;
pub mod id;
pub mod inbound;
pub mod limits;
pub mod model;
pub mod outbound;
pub mod proto;
pub mod refusal;
pub mod rewrite;
pub mod route;
pub mod snapshot;
pub mod tunnel;

pub use refusal::Refusal;
