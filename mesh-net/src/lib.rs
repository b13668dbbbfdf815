//! The IO that agent, waypoint and control plane share: tasks, drain, listeners, TLS, the HBONE tunnel, workload
//! certificates, the feed from the control plane, logs and metrics.
//!
//! Nothing here knows pods, BPF, Kubernetes or HTTP routing. Only [`task`] spawns; only [`socket`] is `unsafe`.

#![deny(missing_docs)]

pub mod access;
pub mod admin;
pub mod clock;
pub mod copy;
pub mod drain;
pub mod feed;
pub mod grpc;
pub mod identity;
pub mod listen;
mod mux;
pub mod record;
pub mod socket;
pub mod task;
pub mod telemetry;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod tls;
pub mod tunnel;

/// A boxed future, for the few traits that must be object safe.
pub type BoxFuture<'a, T> = std::pin::Pin<Box<dyn Future<Output = T> + Send + 'a>>;
