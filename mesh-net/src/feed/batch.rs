//! One response, prepared (pure): what is good, what is gone, what is refused.

use std::collections::HashMap;

use mesh_core::{
    delta::{Change, Rejected, prepare, removed},
    id::PolicyKey,
    proto::{TYPE_AUTHORIZATION, discovery::DeltaDiscoveryResponse},
};

/// One response, prepared.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// For the next world, in order: updates, then removals.
    pub changes: Vec<Change>,
    /// Refused, with the reason.
    pub rejected: Vec<Rejected>,
    accepted: Vec<(String, String)>,
    removed: Vec<String>,
}

impl Batch {
    pub(super) fn prepare(type_url: &str, response: &DeltaDiscoveryResponse) -> Self {
        let mut batch = Self::default();
        for resource in &response.resources {
            match prepare(type_url, resource) {
                Ok(change) => {
                    batch.changes.push(change);
                    batch.accepted.push((resource.name.clone(), resource.version.clone()));
                }
                Err(rejected) => {
                    // Whoever the policy would apply to is denied, rather than left to an older idea of it.
                    if type_url == TYPE_AUTHORIZATION
                        && let Some(key) = PolicyKey::parse(&resource.name)
                    {
                        batch.changes.push(Change::InvalidPolicy(key));
                    }
                    batch.rejected.push(rejected);
                }
            }
        }
        batch.changes.extend(response.removed_resources.iter().filter_map(|name| removed(type_url, name)));
        batch.removed.clone_from(&response.removed_resources);
        batch
    }

    /// Notes versions for the next reconnect. What was refused, or is not in force, is remembered by name alone: the
    /// server sends it again, or tells that it is gone.
    pub(super) fn remember(&self, versions: &mut HashMap<String, String>, in_force: bool) {
        for (name, version) in &self.accepted {
            let version = if in_force { version.clone() } else { String::new() };
            versions.insert(name.clone(), version);
        }
        for rejected in &self.rejected {
            versions.insert(rejected.name.clone(), String::new());
        }
        for name in &self.removed {
            versions.remove(name);
        }
    }

    /// Refuses what turned out not to be in force.
    pub(super) fn refuse(&mut self, refused: Vec<Rejected>) {
        self.accepted.retain(|(name, _)| refused.iter().all(|refused| refused.name != *name));
        self.rejected.extend(refused);
    }

    /// Names that are no longer refused, whatever they were before.
    pub(super) fn settled(&self) -> impl Iterator<Item = &str> {
        self.accepted.iter().map(|(name, _)| name.as_str()).chain(self.removed.iter().map(String::as_str))
    }
}
