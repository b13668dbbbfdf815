//! The Kubernetes API as the source: one watch per kind, each starting from a complete list.
//!
//! Lists are read from the quorum, so nothing goes back in time; what was told stays in force while the API server is
//! away. A kind that is not served (its CRD is not installed) counts as empty, and is looked for again; but only the API
//! server's own list of what it serves says so, not a 404 of whatever stands in between.

use std::{sync::Arc, time::Duration};

use kube::{
    Client,
    api::{Api, DynamicObject},
    core::{ApiResource, GroupVersionKind},
    runtime::watcher::{self, Event},
};
use mesh_net::{clock::Chance, drain::Draining, task::TaskGroup};
use parking_lot::Mutex;
use serde_json::Value as Json;
use tokio::sync::{Notify, watch};
use tokio_stream::StreamExt;

use super::{Kind, Objects, Problem, Source, cluster::Cluster};

/// The kinds that are watched.
pub const KINDS: [Kind; 13] = [
    Kind::Namespace,
    Kind::Node,
    Kind::Pod,
    Kind::Service,
    Kind::EndpointSlice,
    Kind::ConfigMap,
    Kind::GatewayClass,
    Kind::Gateway,
    Kind::HttpRoute,
    Kind::GrpcRoute,
    Kind::ReferenceGrant,
    Kind::AuthorizationPolicy,
    Kind::PeerAuthentication,
];

/// The one ConfigMap that is read.
pub const OPTIONS: &str = "undermesh";
/// A kind that is not served is looked for again after this time.
const ABSENT: Duration = Duration::from_secs(5);
/// The API server says within this time what it serves.
const ANSWER: Duration = Duration::from_secs(10);
/// First and last wait after the API server refused or was away.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// Waits are spread by this share, so that replicas do not come back together.
const JITTER: f64 = 0.3;
/// A watch is asked for this long, seconds; a dead connection is noticed shortly after.
const WATCH_SECONDS: u32 = 60;

/// Objects of the API server, as its watches tell them.
pub struct Kubernetes {
    cluster: Arc<Mutex<Cluster>>,
    changed: Arc<Notify>,
    complete: watch::Sender<bool>,
}

impl Kubernetes {
    /// Starts a watch per kind; they run in `tasks` until the drain. `root_namespace` has the options.
    pub fn start(client: &Client, root_namespace: &str, draining: &Draining, tasks: &TaskGroup) -> Self {
        let cluster = Arc::new(Mutex::new(Cluster::expecting(KINDS)));
        let changed = Arc::new(Notify::new());
        let (complete, _) = watch::channel(false);
        for kind in KINDS {
            let follower = Follower {
                kind,
                client: client.clone(),
                root_namespace: root_namespace.to_owned(),
                cluster: cluster.clone(),
                changed: changed.clone(),
                complete: complete.clone(),
            };
            let draining = draining.clone();
            tasks.spawn(async move {
                tokio::select! {
                    () = follower.run() => {}
                    () = draining.started() => {}
                }
            });
        }
        Self { cluster, changed, complete }
    }

    /// Notified whenever something changed.
    pub fn changed(&self) -> Arc<Notify> {
        self.changed.clone()
    }

    /// Becomes true with the first complete list of every kind.
    pub fn complete(&self) -> watch::Receiver<bool> {
        self.complete.subscribe()
    }

    /// Kinds of which no list has come.
    pub fn missing(&self) -> Vec<Kind> {
        self.cluster.lock().missing().collect()
    }
}

impl Source for Kubernetes {
    fn refresh(&mut self) -> bool {
        // Told by the watches; a question of ours would be no newer. Nothing counts before everything was listed.
        self.cluster.lock().take_changed()
    }

    fn objects(&self) -> (Objects, Vec<Problem>) {
        self.cluster.lock().objects()
    }

    fn text(&self, _file: &str) -> Option<&str> {
        None
    }
}

struct Follower {
    kind: Kind,
    client: Client,
    root_namespace: String,
    cluster: Arc<Mutex<Cluster>>,
    changed: Arc<Notify>,
    complete: watch::Sender<bool>,
}

/// How a watch ended.
enum Ended {
    /// This version of the kind is not served.
    NotServed,
    /// The API server refused or was away.
    Failed(String),
}

impl Follower {
    async fn run(self) {
        let versions = self.kind.versions();
        let (mut version, mut failures, chance) = (0, 0_u32, Chance::random());
        loop {
            let (mut ended, worked) = self.follow(versions[version]).await;
            if worked {
                failures = 0;
            }
            let mut wait = BACKOFF.0;
            if matches!(ended, Ended::NotServed) {
                match self.served().await {
                    Ok(Some(found)) if found != version => version = found,
                    Ok(Some(_)) => ended = Ended::Failed("404 for what is served".to_owned()),
                    Ok(None) => {
                        self.take(|cluster| cluster.replace(self.kind, Vec::new()));
                        wait = ABSENT;
                    }
                    Err(reason) => ended = Ended::Failed(reason),
                }
            }
            let wait = match ended {
                Ended::NotServed => wait,
                Ended::Failed(reason) => {
                    failures = failures.saturating_add(1);
                    tracing::warn!(kind = %self.kind, reason, "cannot be watched; what is known stays in force");
                    (BACKOFF.0 * 2_u32.saturating_pow(failures.min(8) - 1)).min(BACKOFF.1)
                }
            };
            tokio::time::sleep(chance.jitter(wait, JITTER)).await;
        }
    }

    /// Which of the versions that are read the API server serves, by its own list; none when it has none of them.
    async fn served(&self) -> Result<Option<usize>, String> {
        let asked = tokio::time::timeout(ANSWER, self.discover()).await;
        asked.map_err(|_| "no answer in time".to_owned())?.map_err(|error| reason(&error))
    }

    async fn discover(&self) -> Result<Option<usize>, kube::Error> {
        let group = self.kind.group();
        // What every API server has.
        if group.is_empty() {
            return Ok(Some(0));
        }
        let groups = self.client.list_api_groups().await?.groups;
        let Some(found) = groups.into_iter().find(|found| found.name == group) else { return Ok(None) };
        for (number, version) in self.kind.versions().iter().enumerate() {
            if !found.versions.iter().any(|served| served.version == *version) {
                continue;
            }
            let list = self.client.list_api_group_resources(&format!("{group}/{version}")).await?;
            if list.resources.iter().any(|resource| resource.name == self.kind.plural()) {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }

    fn api(&self, version: &str) -> Api<DynamicObject> {
        let gvk = GroupVersionKind::gvk(self.kind.group(), version, self.kind.name());
        let resource = ApiResource::from_gvk_with_plural(&gvk, self.kind.plural());
        match self.kind {
            Kind::ConfigMap => Api::namespaced_with(self.client.clone(), &self.root_namespace, &resource),
            _ => Api::all_with(self.client.clone(), &resource),
        }
    }

    /// Lists and watches until something fails; says also whether anything was told.
    async fn follow(&self, version: &str) -> (Ended, bool) {
        let mut config = watcher::Config::default().timeout(WATCH_SECONDS);
        if self.kind == Kind::ConfigMap {
            config = config.fields(&format!("metadata.name={OPTIONS}"));
        }
        let mut events = Box::pin(watcher::watcher(self.api(version), config));
        let (mut listing, mut worked) = (Vec::new(), false);
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => listing.clear(),
                Ok(Event::InitApply(object)) => listing.extend(self.json(&object, version)),
                Ok(Event::InitDone) => {
                    worked = true;
                    let listed = std::mem::take(&mut listing);
                    tracing::debug!(kind = %self.kind, objects = listed.len(), "listed");
                    self.take(|cluster| cluster.replace(self.kind, listed));
                }
                Ok(Event::Apply(object)) => {
                    worked = true;
                    if let Some(value) = self.json(&object, version) {
                        self.take(|cluster| cluster.set(self.kind, value));
                    }
                }
                Ok(Event::Delete(object)) => {
                    worked = true;
                    if let Some(value) = self.json(&object, version) {
                        self.take(|cluster| cluster.remove(self.kind, &value));
                    }
                }
                Err(watcher::Error::InitialListFailed(kube::Error::Api(status))) if status.code == 404 => {
                    return (Ended::NotServed, worked);
                }
                // The position is too old: the watcher lists anew by itself.
                Err(watcher::Error::WatchError(status)) if status.code == 410 => {}
                Err(error) => return (Ended::Failed(reason(&error)), worked),
            }
        }
        (Ended::Failed("the watch ended".to_owned()), worked)
    }

    /// Items of a list do not say what they are.
    fn json(&self, object: &DynamicObject, version: &str) -> Option<Json> {
        let mut value = serde_json::to_value(object).ok()?;
        let fields = value.as_object_mut()?;
        let group = self.kind.group();
        let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
        fields.insert("apiVersion".to_owned(), api_version.into());
        fields.insert("kind".to_owned(), self.kind.name().into());
        Some(value)
    }

    fn take(&self, change: impl FnOnce(&mut Cluster) -> bool) {
        let mut cluster = self.cluster.lock();
        let changed = change(&mut cluster);
        let complete = cluster.complete();
        drop(cluster);
        if complete {
            self.complete.send_replace(true);
        }
        if changed {
            self.changed.notify_one();
        }
    }
}

/// An error with everything that is behind it, in one line.
pub(crate) fn reason(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        source = inner.source();
    }
    text
}
