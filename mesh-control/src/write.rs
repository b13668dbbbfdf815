//! What the leader writes into the cluster: status of objects, Events, the roots where waypoints are, and nodes set free
//! when their agent is in force. Only what changed is written, and never anything of others.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::{
    api::core::v1::{Node, ObjectReference, Service},
    jiff::Timestamp,
};
use kube::{
    Api, Client, ResourceExt,
    api::{ApiResource, DynamicObject, ListParams, Patch, PatchParams},
    core::GroupVersionKind,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use mesh_net::drain::Draining;
use serde_json::json;
use tokio::sync::watch;

use crate::{
    ca::secret::{self, MANAGER},
    credentials::Principal,
    leader::{Told, lost},
    provision::apply::Refused,
    publish::Published,
    serve::{
        proxies::{Proxies, Proxy},
        replicas,
    },
    source::{Kind, ObjectKey, kubernetes::reason},
    status::{
        self,
        object::{Conditions, ObjectStatus},
        objects::WAYPOINT_BOUND,
    },
    translate::workload::AGENT_TAINT,
};

mod events;
mod merge;

/// How often it is looked whether something is to be written.
const LOOK: Duration = Duration::from_secs(1);
/// What was written is compared with what is there at least this often: others may have overwritten it.
const VERIFY: Duration = Duration::from_secs(300);
/// The API server's time for one object.
const ANSWER: Duration = Duration::from_secs(10);
/// A write that failed is tried again after this time.
const AGAIN: Duration = Duration::from_secs(5);
/// Objects of one list.
const PAGE: u32 = 500;
/// Writes of one look: the rest is written in the next, so that a large change does not starve the Lease.
const MAX_WRITES: usize = 100;

/// What the leader needs.
pub struct Writer {
    /// The API server.
    pub client: Client,
    /// This replica.
    pub me: String,
    /// Where the mesh is installed.
    pub namespace: String,
    /// Roots as PEM.
    pub roots: String,
    /// What is published here.
    pub published: watch::Receiver<Arc<Published>>,
    /// Proxies that are connected here.
    pub proxies: Arc<Proxies>,
    /// What the other replicas tell of theirs.
    pub told: watch::Receiver<Told>,
    /// Gateways whose objects cannot be made.
    pub refused: watch::Receiver<Arc<Refused>>,
}

/// What was written, for as long as this replica leads.
#[derive(Default)]
struct Written {
    status: BTreeMap<ObjectKey, ObjectStatus>,
    /// Services that have a condition of ours and should have none.
    leftover: BTreeSet<ObjectKey>,
    roots: BTreeSet<String>,
    events: BTreeSet<events::Told>,
    /// Not before this time again.
    failed: BTreeMap<String, Instant>,
    verified: Option<Instant>,
}

/// Whether a replica's pod is there.
pub fn alive(published: &Published, namespace: &str, replica: &str) -> bool {
    published.world.pods.get(&(namespace.into(), replica.into())).is_some_and(|pod| !pod.finished)
}

/// Writes while this replica leads, until the drain.
pub async fn run(writer: Writer, mut leads: watch::Receiver<bool>, draining: Draining) {
    let mut written = Written::default();
    let reporter = Reporter { controller: secret::MANAGER.to_owned(), instance: Some(writer.me.clone()) };
    let recorder = Recorder::new(writer.client.clone(), reporter);
    loop {
        tokio::select! {
            () = draining.started() => return,
            () = tokio::time::sleep(LOOK) => {}
            changed = leads.changed() => if changed.is_err() { return },
        }
        if !*leads.borrow() {
            // What is there when we lead again is not what we wrote.
            written = Written::default();
            continue;
        }
        tokio::select! {
            () = draining.started() => return,
            // Another may write by now.
            () = lost(&mut leads) => {}
            () = writer.look(&mut written, &recorder) => {}
        }
    }
}

impl Writer {
    async fn look(&self, written: &mut Written, recorder: &Recorder) {
        let now = Instant::now();
        if written.verified.is_none_or(|at| now.saturating_duration_since(at) > VERIFY) {
            written.status.clear();
            written.roots.clear();
            written.verified = Some(now);
            self.find_leftovers(written).await;
        }
        written.failed.retain(|_, until| *until > now);
        let published = self.published.borrow().clone();
        let told = self.told.borrow().clone();
        let all = replicas::merge(&published, self.proxies.all(), &told, |replica| {
            alive(&published, &self.namespace, replica)
        });
        self.free_nodes(&published, &all, written).await;
        self.publish_roots(&published, written).await;
        self.write_status(&published, &all, written).await;
        self.tell_events(&published, &all, written, recorder).await;
    }

    /// Does one write with a deadline; one that fails is left alone for a while.
    async fn attempt<F>(&self, what: String, written: &mut Written, write: F) -> bool
    where
        F: Future<Output = Result<(), kube::Error>>,
    {
        if written.failed.contains_key(&what) {
            return false;
        }
        let error = match tokio::time::timeout(ANSWER, write).await {
            Ok(Ok(())) => return true,
            // Somebody else wrote in between: what is there is looked at anew.
            Ok(Err(kube::Error::Api(status))) if status.code == 409 => return false,
            // It is gone, or its CRD is.
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => {
                written.failed.insert(what, Instant::now() + AGAIN);
                return false;
            }
            Ok(Err(error)) => reason(&error),
            Err(_) => "no answer in time".to_owned(),
        };
        tracing::warn!(what, error, "cannot be written");
        written.failed.insert(what, Instant::now() + AGAIN);
        false
    }

    /// A node whose agent holds all that is published may run what it is given.
    async fn free_nodes(
        &self,
        published: &Published,
        all: &BTreeMap<Principal, Proxy>,
        written: &mut Written,
    ) {
        for node in &published.world.waiting {
            let agent = all.get(&Principal::Node(node.clone()));
            let in_force = agent
                .is_some_and(|agent| agent.connected && agent.acked_revision == Some(published.revision));
            if in_force && self.attempt(format!("Node {node}"), written, self.free(node)).await {
                tracing::info!(%node, "the agent is in force: the taint is removed");
            }
        }
    }

    async fn free(&self, node: &str) -> Result<(), kube::Error> {
        let api = Api::<Node>::all(self.client.clone());
        let Some(found) = api.get_opt(node).await? else { return Ok(()) };
        let taints = found.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        let kept: Vec<_> = taints.filter(|taint| taint.key != AGENT_TAINT).collect();
        let patch = json!({
            "metadata": {"resourceVersion": found.metadata.resource_version},
            "spec": {"taints": kept},
        });
        api.patch(node, &params(), &Patch::Merge(&patch)).await.map(drop)
    }

    /// Waypoints read the roots in their own namespace.
    async fn publish_roots(&self, published: &Published, written: &mut Written) {
        let waypoints = published.world.waypoints.keys().filter_map(|name| name.split_once('/'));
        let wanted: BTreeSet<String> =
            waypoints.map(|(namespace, _)| namespace.to_owned()).chain([self.namespace.clone()]).collect();
        for namespace in wanted {
            if written.roots.contains(&namespace) {
                continue;
            }
            let write =
                async { secret::publish_roots(&self.client, &namespace, &self.roots).await.map(drop) };
            if self.attempt(format!("roots of {namespace}"), written, write).await {
                written.roots.insert(namespace);
            }
        }
    }

    async fn write_status(
        &self,
        published: &Published,
        all: &BTreeMap<Principal, Proxy>,
        written: &mut Written,
    ) {
        let wanted = status::objects(published, all, &self.refused.borrow().clone());
        let (kept, gone) =
            std::mem::take(&mut written.status).into_iter().partition(|(key, _)| wanted.contains_key(key));
        let gone: BTreeMap<ObjectKey, ObjectStatus> = gone;
        written.status = kept;
        // A route without parents of ours, a policy and a Gateway are always judged while they are there.
        written.leftover.extend(gone.into_keys().filter(|key| key.kind == Kind::Service));
        written.leftover.retain(|key| !wanted.contains_key(key));
        let nothing = ObjectStatus::Conditions(Conditions::default());
        let leftover = written.leftover.clone().into_iter().map(|key| (key, nothing.clone()));
        let mut writes = 0;
        for (key, want) in leftover.chain(wanted) {
            let what = format!("status of {key}");
            // What is left alone for a while must not keep the others from their turn.
            if written.status.get(&key) == Some(&want) || written.failed.contains_key(&what) {
                continue;
            }
            writes += 1;
            if writes > MAX_WRITES {
                return;
            }
            if self.attempt(what, written, self.write_one(&key, &want)).await
                && !written.leftover.remove(&key)
            {
                written.status.insert(key, want);
            }
        }
    }

    /// Services that a former leader wrote about, or that lost their binding while nobody led.
    async fn find_leftovers(&self, written: &mut Written) {
        let api = Api::<Service>::all(self.client.clone());
        let mut page = ListParams::default().limit(PAGE);
        loop {
            let listed = match tokio::time::timeout(ANSWER, api.list(&page)).await {
                Ok(Ok(listed)) => listed,
                // Looked for again with the next verification.
                Ok(Err(error)) => return tracing::warn!(error = reason(&error), "Services cannot be listed"),
                Err(_) => return tracing::warn!("Services cannot be listed: no answer in time"),
            };
            let marked = listed.items.iter().filter(|service| {
                let conditions = service.status.iter().flat_map(|status| status.conditions.iter().flatten());
                conditions.into_iter().any(|condition| condition.type_ == WAYPOINT_BOUND)
            });
            written.leftover.extend(marked.map(|service| {
                ObjectKey::new(Kind::Service, &service.namespace().unwrap_or_default(), &service.name_any())
            }));
            match listed.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => page = page.continue_token(&token),
                None => return,
            }
        }
    }

    async fn write_one(&self, key: &ObjectKey, want: &ObjectStatus) -> Result<(), kube::Error> {
        let mut found = None;
        for version in key.kind.versions() {
            let api = self.api(key, version);
            found = api.get_opt(&key.name).await?.map(|found| (api, found));
            if found.is_some() {
                break;
            }
        }
        let Some((api, found)) = found else { return Ok(()) };
        let now = Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default().to_string();
        let Some(status) = merge::merged(found.data.get("status"), want, &now) else { return Ok(()) };
        let patch = json!({
            "metadata": {"resourceVersion": found.resource_version()},
            "status": status,
        });
        api.patch_status(&key.name, &params(), &Patch::Merge(&patch)).await.map(drop)
    }

    /// An older API server may not serve the newest version of a kind, which looks like an object that is gone.
    fn api(&self, key: &ObjectKey, version: &str) -> Api<DynamicObject> {
        let gvk = GroupVersionKind::gvk(key.kind.group(), version, key.kind.name());
        let resource = ApiResource::from_gvk_with_plural(&gvk, key.kind.plural());
        if key.kind.namespaced() {
            Api::namespaced_with(self.client.clone(), &key.namespace, &resource)
        } else {
            Api::all_with(self.client.clone(), &resource)
        }
    }

    async fn tell_events(
        &self,
        published: &Published,
        all: &BTreeMap<Principal, Proxy>,
        written: &mut Written,
        recorder: &Recorder,
    ) {
        let wanted = events::wanted(published, all);
        // What is over may be told again when it comes back.
        written.events.retain(|told| wanted.contains(told));
        let what = |told: &events::Told| format!("Event {} of {}", told.reason, told.object);
        // As with status: what is left alone for a while must not keep the others from their turn.
        let due = wanted.difference(&written.events).filter(|told| !written.failed.contains_key(&what(told)));
        let new: Vec<_> = due.take(MAX_WRITES).cloned().collect();
        for told in new {
            let write = self.tell(&told, recorder);
            if self.attempt(what(&told), written, write).await {
                written.events.insert(told);
            }
        }
    }

    async fn tell(&self, told: &events::Told, recorder: &Recorder) -> Result<(), kube::Error> {
        let key = &told.object;
        // The object's UID, without which `kubectl describe` does not show the Event.
        let mut found = None;
        for version in key.kind.versions() {
            found = self.api(key, version).get_metadata_opt(&key.name).await?.map(|found| (*version, found));
            if found.is_some() {
                break;
            }
        }
        let Some((version, found)) = found else { return Ok(()) };
        let group = key.kind.group();
        let reference = ObjectReference {
            api_version: Some(if group.is_empty() {
                version.to_owned()
            } else {
                format!("{group}/{version}")
            }),
            kind: Some(key.kind.name().to_owned()),
            name: Some(key.name.to_string()),
            namespace: key.kind.namespaced().then(|| key.namespace.to_string()),
            uid: found.metadata.uid,
            ..ObjectReference::default()
        };
        let event = Event {
            type_: EventType::Warning,
            reason: told.reason.clone(),
            note: Some(told.text.clone()),
            action: if key.kind == Kind::Pod { "Enrol" } else { "Apply" }.to_owned(),
            secondary: None,
        };
        recorder.publish(&event, &reference).await
    }
}

fn params() -> PatchParams {
    PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() }
}
