//! The local endpoint: ready, metrics, what is in force, what is open.

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::model::{Listener, Service, Workload};
use mesh_net::{
    BoxFuture,
    admin::{AdminRequest, AdminResponse, Handler},
    drain::Drain,
    feed::FeedHandle,
    identity::CertificateManager,
    telemetry::LogControl,
    tunnel::Pool,
};
use serde::Serialize;

use crate::Waypoint;

/// What the endpoint tells about.
pub struct Admin {
    /// The program.
    pub waypoint: Arc<Waypoint>,
    /// The control plane.
    pub feed: FeedHandle,
    /// Own certificate.
    pub certificates: CertificateManager,
    /// Tunnels to endpoints.
    pub pool: Pool,
    /// For `POST /drain`.
    pub drain: Drain,
    /// For `POST /logging`.
    pub log: LogControl,
}

#[derive(Serialize)]
struct Dump<'a> {
    ready: bool,
    own: String,
    listeners: BTreeMap<String, &'a Listener>,
    /// Ports whose routes cannot be compiled: their requests are refused.
    broken: Vec<String>,
    services: Vec<&'a Service>,
    workloads: Vec<&'a Workload>,
}

#[derive(Serialize)]
struct Connections {
    /// Requests and connections in progress.
    open: i64,
    upstream_http1_idle: usize,
    upstream_http2: usize,
    tunnels: Vec<mesh_net::tunnel::PoolStatus>,
}

impl Admin {
    /// What is still missing before requests can be served.
    fn pending(&self) -> Vec<&'static str> {
        let mut pending = Vec::new();
        if self.certificates.current(&self.waypoint.own).is_none() {
            pending.push("certificate");
        }
        if !self.feed.is_ready() {
            pending.push("control plane");
        } else if !self.waypoint.view().is_ready() {
            pending.push("configuration");
        }
        if self.waypoint.draining.is_started() {
            pending.push("draining");
        }
        pending
    }

    fn dump(&self) -> AdminResponse {
        let view = self.waypoint.view();
        let listeners = view.listeners();
        AdminResponse::json(
            200,
            &Dump {
                ready: view.is_ready(),
                own: self.waypoint.own.to_string(),
                broken: listeners
                    .clone()
                    .filter(|(_, bound)| bound.table.is_err())
                    .map(|(at, _)| at.to_string())
                    .collect(),
                listeners: listeners.map(|(at, bound)| (at.to_string(), &bound.listener)).collect(),
                services: view.snapshot().services().map(AsRef::as_ref).collect(),
                workloads: view.snapshot().workloads().map(AsRef::as_ref).collect(),
            },
        )
    }

    fn connections(&self) -> AdminResponse {
        let (http1, http2) = self.waypoint.upstream.kept();
        AdminResponse::json(
            200,
            &Connections {
                open: self.waypoint.metrics.open.get(),
                upstream_http1_idle: http1,
                upstream_http2: http2,
                tunnels: self.pool.status(),
            },
        )
    }

    fn answer(&self, request: &AdminRequest) -> AdminResponse {
        match (request.method.as_str(), request.path.as_str()) {
            ("GET", "/healthz/ready") => match self.pending() {
                pending if pending.is_empty() => AdminResponse::text(200, "ready\n"),
                pending => AdminResponse::text(503, format!("waiting for: {}\n", pending.join(", "))),
            },
            ("GET", "/metrics") => AdminResponse::metrics(self.waypoint.metrics.shared.render()),
            ("GET", "/config_dump") => self.dump(),
            ("GET", "/connections") => self.connections(),
            ("GET", "/feed") => AdminResponse::json(200, &*self.feed.status.borrow()),
            ("GET", "/certificates") => AdminResponse::json(200, &self.certificates.status()),
            ("POST", "/drain") => {
                self.drain.start();
                AdminResponse::text(202, "draining\n")
            }
            ("POST", "/logging") => match request.query_value("level").map(|level| self.log.set(level)) {
                Some(Ok(())) => AdminResponse::text(200, "set\n"),
                Some(Err(error)) => AdminResponse::text(400, format!("{error}\n")),
                None => AdminResponse::text(400, "level is missing\n"),
            },
            _ => AdminResponse::not_found(),
        }
    }
}

impl Handler for Admin {
    fn handle(&self, request: AdminRequest) -> BoxFuture<'_, AdminResponse> {
        Box::pin(std::future::ready(self.answer(&request)))
    }
}
