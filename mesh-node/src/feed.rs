//! The control plane's word, put in force before it is acknowledged.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use mesh_core::{
    delta::{Change, Rejected},
    proto::{TYPE_ADDRESS, TYPE_AUTHORIZATION, TYPE_LOCAL_POD, TYPE_MESH_OPTIONS},
    snapshot::Snapshot,
};
use mesh_net::{
    BoxFuture,
    feed::{Again, Apply, Feed, FeedConfig, FeedHandle, node},
    grpc::{ChannelConfig, GrpcError},
};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::{agent::Agent, pods::follow::Following};

/// What an agent follows; where it enrols by the feed, the pods of its node too.
const TYPES: [&str; 4] = [TYPE_ADDRESS, TYPE_AUTHORIZATION, TYPE_MESH_OPTIONS, TYPE_LOCAL_POD];

/// Enrolment by the feed.
pub struct Enrolling {
    /// Whom to tell of the pods.
    pub following: Following,
    /// What to ask for once more.
    pub again: mpsc::Receiver<Again>,
}

/// Puts each world in force: decisions, kernel, live connections.
struct InForce {
    agent: Arc<Agent>,
    /// Types that have not been answered yet. Half a world is never acted on: without its policies it would allow too
    /// much, and a restart would cut what they permit.
    pending: Mutex<BTreeSet<&'static str>>,
    following: Option<Following>,
    followed: AtomicBool,
}

impl Apply for InForce {
    fn apply(&self, world: Arc<Snapshot>) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move {
            self.agent.world.replace(world);
            self.agent.enforce().await.map_err(|error| error.to_string())
        })
    }

    fn not_in_force<'a>(
        &'a self,
        world: Arc<Snapshot>,
        type_url: &'static str,
        changes: &'a [Change],
    ) -> BoxFuture<'a, Vec<Rejected>> {
        Box::pin(async move {
            let Some(following) = &self.following else { return Vec::new() };
            let first = !self.followed.swap(true, Ordering::Relaxed);
            if type_url != TYPE_LOCAL_POD && !first {
                following.others(world).await;
                return Vec::new();
            }
            let uids = match first {
                true => world.pods().map(|pod| pod.uid.clone()).collect(),
                false => changes.iter().filter_map(uid).collect(),
            };
            let refused = following.world(world, uids).await;
            // Of another type's answer nothing is refused for them.
            if type_url == TYPE_LOCAL_POD { refused } else { Vec::new() }
        })
    }

    fn answered(&self, type_url: &'static str) {
        self.pending.lock().remove(type_url);
    }

    fn waits(&self) -> bool {
        !self.pending.lock().is_empty()
    }
}

fn uid(change: &Change) -> Option<Arc<str>> {
    match change {
        Change::LocalPod(pod) => Some(pod.uid.clone()),
        _ => None,
    }
}

/// Starts following the control plane.
///
/// # Errors
/// The configuration cannot be used.
pub fn start(
    agent: &Arc<Agent>,
    channel: ChannelConfig,
    enrolling: Option<Enrolling>,
) -> Result<FeedHandle, GrpcError> {
    let described = node("mesh-node", &agent.node, "undermesh-system", &[("NODE_NAME", &agent.node)]);
    let types: Vec<_> =
        TYPES.into_iter().filter(|kind| enrolling.is_some() || *kind != TYPE_LOCAL_POD).collect();
    let (following, again) = enrolling.map(|Enrolling { following, again }| (following, again)).unzip();
    let in_force = InForce {
        agent: agent.clone(),
        pending: Mutex::new(types.iter().copied().collect()),
        following,
        followed: AtomicBool::new(false),
    };
    let config = FeedConfig { channel, node: described, types };
    let (mut feed, handle) =
        Feed::new(config, Arc::new(in_force), agent.metrics.clone(), agent.chance.clone())?;
    if let Some(again) = again {
        feed = feed.asking_again(again);
    }
    agent.tasks.spawn(feed.run(agent.draining.clone()));
    Ok(handle)
}
