//! What operators can ask of the agent.

use std::{net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use mesh_core::{id::Identity, limits, snapshot::PolicyState};
use mesh_net::{
    BoxFuture,
    admin::{AdminRequest, AdminResponse, Handler, Method},
    feed::FeedStatus,
    telemetry::LogControl,
};
use serde::Serialize;
use tokio::sync::watch;

use crate::{
    agent::{Agent, Dismissal},
    earlier,
    kernel::ProbeReport,
    pods::{Pod, follow::Following, record::Kept},
};

/// Pods that leave are looked at this much longer than their connections may take.
const RELEASE: Duration = Duration::from_secs(5);

/// The admin endpoint.
pub struct Admin {
    /// The agent.
    pub agent: Arc<Agent>,
    /// What the kernel can do.
    pub probe: ProbeReport,
    /// How the control plane is heard.
    pub feed: watch::Receiver<FeedStatus>,
    /// Enrolment by the feed, where that is how pods come.
    pub following: Option<Following>,
    /// The log's level.
    pub log: LogControl,
    /// Starts the drain.
    pub drain: watch::Sender<bool>,
}

/// One pod as the endpoint shows it.
#[derive(Clone, Debug, Serialize)]
pub struct ShownPod {
    /// Kubernetes UID.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Addresses.
    pub ips: Vec<IpAddr>,
    /// Path of its network namespace.
    pub netns: PathBuf,
    /// `serving`, `pending`, `failed` or `leaving`.
    pub state: &'static str,
    /// What it proves.
    pub identity: Option<Identity>,
    /// Its certificate.
    pub certificate: Option<ShownCertificate>,
    /// Connections from before it was enrolled, which go on past the mesh.
    pub earlier_connections: usize,
    /// Why the state is not `serving`.
    pub why: Option<String>,
}

/// A certificate as the endpoint shows it.
#[derive(Clone, Debug, Serialize)]
pub struct ShownCertificate {
    /// End of validity, seconds since the epoch.
    pub not_after: u64,
    /// Counts certificates of this process.
    pub generation: u64,
}

/// All pods of this node.
pub fn pods(agent: &Agent) -> Vec<ShownPod> {
    let table = agent.pods.borrow().clone();
    let mut shown: Vec<ShownPod> = table.serving.values().map(|pod| served(agent, pod)).collect();
    for (kept, why) in table.failed.values() {
        shown.push(plain(kept, "failed", Some(why.clone())));
    }
    for pod in &table.leaving {
        let why = format!("{} connections are left", pod.tasks.active());
        shown.push(plain(&pod.kept.load(), "leaving", Some(why)));
    }
    shown
}

fn plain(kept: &Kept, state: &'static str, why: Option<String>) -> ShownPod {
    let pod = &kept.pod;
    ShownPod {
        uid: pod.uid.clone(),
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        ips: pod.ips.clone(),
        netns: pod.netns.clone(),
        state,
        identity: None,
        certificate: None,
        earlier_connections: 0,
        why,
    }
}

fn served(agent: &Agent, pod: &Pod) -> ShownPod {
    let mut shown = plain(&pod.kept.load(), "serving", None);
    shown.earlier_connections = pod.earlier.count();
    let Some(world) = agent.world.now() else {
        (shown.state, shown.why) = ("pending", Some("the control plane has not answered yet".to_owned()));
        return shown;
    };
    match pod.owner.workload(&world) {
        Err(refusal) => (shown.state, shown.why) = ("pending", Some(refusal.why)),
        Ok(workload) => {
            let identity = workload.identity();
            match agent.certificates.current(&identity) {
                Some(certificate) => {
                    let not_after = certificate.not_after.duration_since(std::time::UNIX_EPOCH);
                    shown.certificate = Some(ShownCertificate {
                        not_after: not_after.map(|d| d.as_secs()).unwrap_or_default(),
                        generation: certificate.generation,
                    });
                }
                None => {
                    let failure =
                        agent.certificates.status().into_iter().find(|status| status.identity == identity);
                    let failure =
                        failure.and_then(|status| status.error).unwrap_or_else(|| "not asked yet".to_owned());
                    (shown.state, shown.why) = ("pending", Some(format!("no certificate: {failure}")));
                }
            }
            shown.identity = Some(identity);
        }
    }
    shown
}

/// What keeps the agent from being ready; empty when it is.
pub fn pending(agent: &Agent) -> Vec<String> {
    let mut pending = Vec::new();
    if agent.world.now().is_none() {
        pending.push("control plane".to_owned());
    }
    if let Some(why) = &*agent.out_of_line.lock() {
        pending.push(format!("kernel: {why}"));
    }
    if agent.draining.is_started() {
        pending.push("draining".to_owned());
    }
    pending.extend(agent.problems.all());
    for pod in pods(agent).into_iter().filter(|pod| !matches!(pod.state, "serving" | "leaving")) {
        let why = pod.why.unwrap_or_default();
        pending.push(format!("pod {}/{}: {}: {why}", pod.namespace, pod.name, pod.state));
    }
    pending
}

impl Handler for Admin {
    fn handle(&self, request: AdminRequest) -> BoxFuture<'_, AdminResponse> {
        Box::pin(async move {
            match (&request.method, request.path.as_str()) {
                (&Method::GET, "/healthz/ready") => self.ready(),
                (&Method::GET, "/metrics" | "/stats/prometheus") => self.metrics(),
                (&Method::GET, "/connections") => self.connections(),
                (&Method::GET, "/pods") => AdminResponse::json(200, &pods(&self.agent)),
                (&Method::GET, "/enrolment") => self.enrolment(),
                (&Method::POST, "/release") => self.release().await,
                (&Method::GET, "/config_dump") => self.config_dump(),
                (&Method::GET, "/kernel") => self.kernel(),
                (&Method::POST, "/drain") => {
                    self.drain.send_replace(true);
                    AdminResponse::text(202, "draining\n")
                }
                (&Method::POST, "/logging") => self.logging(&request),
                _ => AdminResponse::not_found(),
            }
        })
    }
}

impl Admin {
    fn enrolment(&self) -> AdminResponse {
        match &self.following {
            Some(following) => AdminResponse::json(200, &*following.shown()),
            None => AdminResponse::text(404, "pods are enrolled by requests, not by the feed\n"),
        }
    }

    /// Lets go of the node; answers when nothing is left, or the time is over that connections get to end.
    async fn release(&self) -> AdminResponse {
        let Some(following) = &self.following else {
            return AdminResponse::text(404, "pods are enrolled by requests, not by the feed\n");
        };
        following.dismiss().await;
        let mut dismissal = self.agent.dismissal.subscribe();
        let mut table = self.agent.pods.clone();
        let all = async {
            // Neither sender goes before this handler.
            let _ = dismissal.wait_for(|dismissal| *dismissal == Dismissal::Done).await;
            let _ = table.wait_for(|table| table.serving.is_empty() && table.leaving.is_empty()).await;
        };
        match tokio::time::timeout(limits::DRAIN + RELEASE, all).await {
            Ok(()) => AdminResponse::text(200, "released\n"),
            Err(_) => AdminResponse::text(200, "released; what did not end in time is cut\n"),
        }
    }

    fn ready(&self) -> AdminResponse {
        let pending = pending(&self.agent);
        if pending.is_empty() {
            return AdminResponse::text(200, "ready\n");
        }
        AdminResponse::text(503, format!("not ready, pending: {}\n", pending.join(", ")))
    }

    fn metrics(&self) -> AdminResponse {
        let agent = &self.agent;
        let table = agent.pods.borrow().clone();
        let waiting = pods(agent).iter().filter(|pod| matches!(pod.state, "pending" | "failed")).count();
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        agent.metrics.active_proxies.set(count(table.serving.len()));
        agent.metrics.pending_proxies.set(count(waiting));
        AdminResponse::metrics(agent.metrics.render())
    }

    fn connections(&self) -> AdminResponse {
        let mut all: Vec<serde_json::Value> = Vec::new();
        let through = self.agent.connections.list();
        match self.agent.direct.list(&self.agent) {
            Ok(direct) => {
                all.extend(through.iter().filter_map(|one| serde_json::to_value(one).ok()));
                all.extend(direct.iter().filter_map(|one| serde_json::to_value(one).ok()));
                let earlier = earlier::list(&self.agent);
                all.extend(earlier.iter().filter_map(|one| serde_json::to_value(one).ok()));
                AdminResponse::json(200, &all)
            }
            Err(error) => AdminResponse::text(500, format!("{error}\n")),
        }
    }

    fn config_dump(&self) -> AdminResponse {
        let Some(world) = self.agent.world.now() else {
            return AdminResponse::json(503, &serde_json::json!({ "feed": *self.feed.borrow() }));
        };
        let (mut policies, mut invalid) = (Vec::new(), Vec::new());
        for (key, state) in world.policies() {
            match state {
                PolicyState::Valid(policy) => policies.push(policy),
                PolicyState::Invalid => invalid.push(key),
            }
        }
        let dump = serde_json::json!({
            "workloads": world.workloads().collect::<Vec<_>>(),
            "services": world.services().collect::<Vec<_>>(),
            "policies": policies,
            "invalid_policies": invalid,
            "feed": *self.feed.borrow(),
            "certificates": self.agent.certificates.status(),
        });
        AdminResponse::json(200, &dump)
    }

    fn kernel(&self) -> AdminResponse {
        match (self.agent.kernel.counters(), self.agent.kernel.pods()) {
            (Ok(counters), Ok(pods)) => {
                let kubelet = self.agent.kubelet.lock().clone();
                let shown = serde_json::json!({
                    "counters": counters, "pods": pods, "probe": self.probe, "kubelet": kubelet,
                });
                AdminResponse::json(200, &shown)
            }
            (Err(error), _) | (_, Err(error)) => AdminResponse::text(500, format!("{error}\n")),
        }
    }

    fn logging(&self, request: &AdminRequest) -> AdminResponse {
        let Some(level) = request.query_value("level") else {
            return AdminResponse::text(400, "level is missing: POST /logging?level=debug\n");
        };
        match self.log.set(level) {
            Ok(()) => AdminResponse::text(200, format!("{level}\n")),
            Err(error) => AdminResponse::text(400, format!("{error}\n")),
        }
    }
}
