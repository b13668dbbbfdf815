//! The L7 proxy of the mesh: HBONE in, HTTP routed by the rules of one Gateway object, HBONE out.
//!
//! ```text
//!  agent ══ mTLS, CONNECT vip:port ══► listeners ─┬─ HTTP ─► http: check → route → endpoint → upstream → record
//!                                                 └─ other ► tcp: endpoint → copy
//!                                                              │
//!  endpoint's agent ◄══ mTLS, CONNECT pod:port, x-undermesh-client: <client's proven identity> ══ pool
//! ```
//!
//! The client's identity comes from its certificate and is stated to the endpoint's agent in the head of the tunnel,
//! which believes it from this waypoint's certificate alone. Nothing that a client writes ends up there.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

use std::sync::Arc;

use ::http::HeaderValue;
use mesh_core::id::Identity;
use mesh_net::{clock::Chance, drain::Draining, task::TaskGroup};
use tokio::sync::watch;

pub mod admin;
pub mod app;
pub mod config;
pub mod dial;
pub mod http;
pub mod limits;
pub mod listeners;
pub mod metrics;
pub mod record;
pub mod tcp;
pub mod view;

use crate::{dial::Dial, http::upstream::Upstream, metrics::Metrics, view::View};

/// What every connection of one waypoint shares.
pub struct Waypoint {
    /// What is served, newest first.
    pub views: watch::Receiver<Arc<View>>,
    /// Opens streams to endpoints.
    pub dial: Arc<dyn Dial>,
    /// Connections to endpoints that are kept.
    pub upstream: Arc<Upstream>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Chance.
    pub chance: Chance,
    /// The identity that this waypoint proves.
    pub own: Identity,
    /// Parent of everything that outlives a request.
    pub tasks: TaskGroup,
    /// When to stop.
    pub draining: Draining,
}

impl Waypoint {
    /// The newest view.
    pub fn view(&self) -> Arc<View> {
        self.views.borrow().clone()
    }

    /// A fresh request identifier: a random UUID.
    pub fn request_id(&self) -> HeaderValue {
        let (high, low) = (self.chance.next(), self.chance.next());
        // Version 4, variant 1 (RFC 9562).
        let (high, low) = (high & !0xf000 | 0x4000, low & !(0b11 << 62) | 0b10 << 62);
        let text = format!(
            "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
            high >> 32,
            high >> 16 & 0xffff,
            high & 0xffff,
            low >> 48,
            low & 0xffff_ffff_ffff
        );
        HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static("-"))
    }
}
