//! The control plane's word, put in force before it is acknowledged.

use std::{collections::BTreeSet, sync::Arc};

use mesh_core::{
    delta::Change,
    proto::{TYPE_ADDRESS, TYPE_AUTHORIZATION, TYPE_MESH_OPTIONS},
    snapshot::Snapshot,
};
use mesh_net::{
    BoxFuture,
    feed::{Apply, Feed, FeedConfig, FeedHandle, node},
    grpc::{ChannelConfig, GrpcError},
};
use parking_lot::Mutex;

use crate::agent::Agent;

/// What an agent follows.
const TYPES: [&str; 3] = [TYPE_ADDRESS, TYPE_AUTHORIZATION, TYPE_MESH_OPTIONS];

/// Puts each world in force: decisions, kernel, live connections.
struct InForce {
    agent: Arc<Agent>,
    /// Types that have not been answered yet. Half a world is never acted on: without its policies it would allow too
    /// much, and a restart would cut what they permit.
    pending: Mutex<BTreeSet<&'static str>>,
}

impl Apply for InForce {
    fn apply<'a>(&'a self, world: Arc<Snapshot>, _: &'a [Change]) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            if !self.pending.lock().is_empty() {
                return Ok(());
            }
            self.agent.world.replace(world);
            self.agent.enforce().map_err(|error| error.to_string())
        })
    }

    fn answered(&self, type_url: &'static str) {
        self.pending.lock().remove(type_url);
    }
}

/// Starts following the control plane.
///
/// # Errors
/// The configuration cannot be used.
pub fn start(agent: &Arc<Agent>, channel: ChannelConfig) -> Result<FeedHandle, GrpcError> {
    let described = node("mesh-node", &agent.node, "undermesh-system", &[("NODE_NAME", &agent.node)]);
    let config = FeedConfig { channel, node: described, types: TYPES.to_vec() };
    let in_force = InForce { agent: agent.clone(), pending: Mutex::new(TYPES.into()) };
    let (feed, handle) = Feed::new(config, Arc::new(in_force), agent.metrics.clone(), agent.chance.clone())?;
    agent.tasks.spawn(feed.run(agent.draining.clone()));
    Ok(handle)
}
