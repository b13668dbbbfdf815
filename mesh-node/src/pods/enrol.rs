//! The socket on which pods are enrolled and released: HTTP/1.1, root only.

use std::sync::Arc;

use mesh_net::{
    BoxFuture,
    admin::{AdminRequest, AdminResponse, Handler, Method},
};
use serde::Serialize;

use super::{EnrolError, Pods, chain, lifecycle::Release, record::PodRecord};
use crate::{admin, agent::Agent};

/// Answers requests about pods.
pub struct Enrolment {
    /// The agent.
    pub agent: Arc<Agent>,
    /// The way to the pods.
    pub pods: Pods,
}

#[derive(Serialize)]
struct Refused {
    error: String,
    reason: &'static str,
}

impl Handler for Enrolment {
    fn handle(&self, request: AdminRequest) -> BoxFuture<'_, AdminResponse> {
        Box::pin(async move {
            let uid = request.path.strip_prefix("/pods/").filter(|uid| !uid.is_empty());
            match (&request.method, uid, request.path.as_str()) {
                (&Method::GET, None, "/pods") => AdminResponse::json(200, &admin::pods(&self.agent)),
                (&Method::PUT, Some(uid), _) => self.enrol(uid, &request).await,
                (&Method::DELETE, Some(uid), _) => self.release(uid, &request).await,
                _ => AdminResponse::not_found(),
            }
        })
    }
}

impl Enrolment {
    async fn enrol(&self, uid: &str, request: &AdminRequest) -> AdminResponse {
        let mut pod: PodRecord = match serde_json::from_slice(&request.body) {
            Ok(pod) => pod,
            Err(error) => return malformed(format!("the body: {error}")),
        };
        if !pod.uid.is_empty() && pod.uid != uid {
            return malformed(format!("the body is about {}, the path about {uid}", pod.uid));
        }
        uid.clone_into(&mut pod.uid);
        match self.pods.enrol(pod).await {
            Ok(()) => AdminResponse::json(200, &serde_json::json!({ "enrolled": uid })),
            Err(error) => answer(&error),
        }
    }

    async fn release(&self, uid: &str, request: &AdminRequest) -> AdminResponse {
        let mode = request.query_value("mode").unwrap_or("deleted");
        let Some(how) = Release::parse(mode) else {
            return malformed(format!("mode must be \"deleted\" or \"leave\", not {mode:?}"));
        };
        match self.pods.release(uid.to_owned(), how).await {
            // Whoever releases wants the pod not to be enrolled: so it is.
            Ok(known) => AdminResponse::json(200, &serde_json::json!({ "released": uid, "known": known })),
            Err(error) => answer(&error),
        }
    }
}

fn malformed(error: String) -> AdminResponse {
    AdminResponse::json(400, &Refused { error, reason: mesh_core::flag::Flag::MalformedRequest.code() })
}

fn answer(error: &EnrolError) -> AdminResponse {
    AdminResponse::json(error.status(), &Refused { error: chain(error), reason: error.flag().code() })
}
