//! The socket on which the CNI plugin asks: HTTP/1.1, root only. See [`super::wire`].

use std::{sync::Arc, time::Duration};

use mesh_core::flag::Flag;
use mesh_net::{
    BoxFuture,
    admin::{AdminRequest, AdminResponse, Handler, Method},
};

use super::wire::{Refused, SANDBOXES, Sandbox, Started, Valid};
use crate::{
    agent::Agent,
    pods::follow::{Answer, Following},
};

/// A pod waits this long for its certificate before its first instruction; afterwards its connections are refused, with
/// the reason, until the certificate comes.
const CERTIFICATE: Duration = Duration::from_secs(2);

/// Answers the plugin.
pub struct CniAnswer {
    /// The agent.
    pub agent: Arc<Agent>,
    /// The way to the pods.
    pub following: Following,
}

impl Handler for CniAnswer {
    fn handle(&self, request: AdminRequest) -> BoxFuture<'_, AdminResponse> {
        Box::pin(async move {
            let container = request.path.strip_prefix(SANDBOXES).and_then(|rest| rest.strip_prefix('/'));
            let container = container.filter(|container| !container.is_empty()).map(str::to_owned);
            match (&request.method, container) {
                (&Method::PUT, Some(container)) => self.add(container, &request).await,
                (&Method::POST, Some(_)) => self.check(&request).await,
                (&Method::DELETE, Some(container)) => {
                    self.following.del(container).await;
                    AdminResponse::json(200, &serde_json::json!({}))
                }
                (&Method::POST, None) if request.path == SANDBOXES => self.keep(&request).await,
                _ => AdminResponse::not_found(),
            }
        })
    }
}

impl CniAnswer {
    async fn add(&self, container: String, request: &AdminRequest) -> AdminResponse {
        let sandbox: Sandbox = match serde_json::from_slice(&request.body) {
            Ok(sandbox) => sandbox,
            Err(error) => return malformed(&error),
        };
        let (namespace, name) = (sandbox.namespace.clone(), sandbox.name.clone());
        let given = self.following.add(container, sandbox).await;
        match &given {
            Ok(Started { enrolled, why }) => {
                if *enrolled {
                    self.certified(&namespace, &name).await;
                }
                tracing::debug!(namespace, name, enrolled, ?why, "a sandbox may start");
            }
            Err(denied) => tracing::warn!(
                namespace,
                name,
                reason = denied.refused.reason,
                error = denied.refused.error,
                "a sandbox must not start"
            ),
        }
        answer(given)
    }

    async fn check(&self, request: &AdminRequest) -> AdminResponse {
        match serde_json::from_slice(&request.body) {
            Ok(sandbox) => answer(self.following.check(sandbox).await),
            Err(error) => malformed(&error),
        }
    }

    async fn certified(&self, namespace: &str, name: &str) {
        let table = self.agent.pods.borrow().clone();
        let mut serving = table.serving.values();
        let Some(pod) = serving.find(|pod| &*pod.owner.namespace == namespace && &*pod.owner.name == name)
        else {
            return;
        };
        let world = self.agent.world.now();
        let identity = self.agent.identity(world.as_deref(), &pod.owner);
        let got = tokio::time::timeout(CERTIFICATE, self.agent.certificates.get(&identity)).await;
        if !matches!(got, Ok(Ok(_))) {
            tracing::warn!(namespace, name, %identity, "a pod starts before its certificate has come");
        }
    }

    async fn keep(&self, request: &AdminRequest) -> AdminResponse {
        match serde_json::from_slice::<Valid>(&request.body) {
            Ok(valid) => {
                self.following.keep(valid.containers).await;
                AdminResponse::json(200, &serde_json::json!({}))
            }
            Err(error) => malformed(&error),
        }
    }
}

fn answer(answer: Answer) -> AdminResponse {
    match answer {
        Ok(started) => AdminResponse::json(200, &started),
        Err(denied) => AdminResponse::json(denied.status, &denied.refused),
    }
}

fn malformed(error: &serde_json::Error) -> AdminResponse {
    let reason = Flag::MalformedRequest.code().to_owned();
    AdminResponse::json(400, &Refused { error: format!("the body: {error}"), reason })
}
