//! The local endpoint: readiness, status, what is published, metrics.

use std::{sync::Arc, time::Instant};

use http::Method;
use mesh_core::proto::TYPES;
use mesh_net::{
    BoxFuture,
    admin::{AdminRequest, AdminResponse, Handler},
};
use serde_json::json;

use crate::{
    credentials::Callers,
    pipeline::Pipeline,
    publish::Published,
    serve::{proxies::Proxies, replicas::Others},
    source::{Problem, Severity},
    status,
};

/// Answers the local endpoint.
pub struct Admin {
    /// Read again for each status.
    pub pipeline: Arc<Pipeline>,
    /// Whose faults are shown.
    pub credentials: Arc<Callers>,
    /// What each proxy has.
    pub proxies: Arc<Proxies>,
    /// What other replicas tell of theirs.
    pub others: Option<Others>,
}

impl Handler for Admin {
    fn handle(&self, request: AdminRequest) -> BoxFuture<'_, AdminResponse> {
        Box::pin(async move {
            match (&request.method, request.path.as_str()) {
                // The first reading comes before the first listener.
                (&Method::GET, "/healthz/ready") => AdminResponse::text(200, "ready\n"),
                (&Method::GET, "/status") => self.status().await,
                (&Method::GET, "/config_dump") => dump(&self.published()),
                (&Method::GET, "/metrics") => AdminResponse::metrics(self.metrics()),
                _ => AdminResponse::not_found(),
            }
        })
    }
}

impl Admin {
    fn published(&self) -> Arc<Published> {
        self.pipeline.subscribe().borrow().clone()
    }

    async fn status(&self) -> AdminResponse {
        let pipeline = self.pipeline.clone();
        // An edit made before this question must be in its answer.
        let rescanned = tokio::task::spawn_blocking(move || pipeline.rescan()).await.is_ok();
        let (published, mut known) = (self.published(), self.proxies.all());
        if let Some(others) = &self.others {
            known = others.with(&published, known);
        }
        let mut told = status::status(&published, &known, rescanned);
        told.problems.extend(self.credentials.faults(Instant::now()).into_iter().map(|reason| Problem {
            file: String::new(),
            line: 0,
            object: "credentials".to_owned(),
            field: String::new(),
            reason,
            severity: Severity::Error,
        }));
        AdminResponse::json(200, &told)
    }

    fn metrics(&self) -> String {
        let published = self.published();
        let counts = self.proxies.counts();
        let mut text = String::new();
        let mut metric = |name: &str, kind: &str, help: &str, value: u64| {
            let suffix = if kind == "counter" { "_total" } else { "" };
            text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n{name}{suffix} {value}\n"));
        };
        metric("undermesh_control_revision", "gauge", "Published revision.", published.revision);
        let problems = u64::try_from(published.world.problems.len()).unwrap_or(u64::MAX);
        metric("undermesh_control_problems", "gauge", "Problems of the input.", problems);
        metric("undermesh_control_proxies", "gauge", "Connected proxies.", counts.connected);
        metric("undermesh_control_streams", "counter", "Feeds opened.", counts.streams);
        metric("undermesh_control_acks", "counter", "Responses accepted by proxies.", counts.acks);
        metric("undermesh_control_nacks", "counter", "Responses rejected by proxies.", counts.nacks);
        metric(
            "undermesh_control_unauthenticated",
            "counter",
            "Calls without a valid token.",
            counts.refused,
        );
        metric("undermesh_control_certificates", "counter", "Certificates signed.", counts.certificates);
        let refused = counts.certificates_refused;
        metric("undermesh_control_certificates_refused", "counter", "Certificates refused.", refused);
        text.push_str("# EOF\n");
        text
    }
}

fn dump(published: &Published) -> AdminResponse {
    let world = &published.world;
    let versions = TYPES.map(|type_url| {
        let set = published.set(type_url).values();
        (type_url, set.map(|resource| (resource.name.clone(), resource.version.clone())).collect())
    });
    let versions: std::collections::BTreeMap<_, std::collections::BTreeMap<_, _>> = versions.into();
    AdminResponse::json(
        200,
        &json!({
            "revision": published.revision,
            "workloads": world.workloads.values().collect::<Vec<_>>(),
            "services": world.services.values().collect::<Vec<_>>(),
            "policies": world.policies.values().collect::<Vec<_>>(),
            "waypoints": world.waypoints.values().collect::<Vec<_>>(),
            "options": world.options,
            "versions": versions,
        }),
    )
}
