//! The newest picture of the mesh, and waiting for a newer one.

use std::sync::Arc;

use mesh_core::{Refusal, flag::Flag, limits, snapshot::Snapshot};
use tokio::{sync::watch, time::Instant};

/// Holds the current snapshot. Empty until the control plane has answered for every type: half a world has no
/// policies and would allow too much.
#[derive(Debug)]
pub struct World {
    current: watch::Sender<Option<Arc<Snapshot>>>,
}

impl Default for World {
    fn default() -> Self {
        Self { current: watch::Sender::new(None) }
    }
}

impl World {
    /// The current snapshot.
    pub fn now(&self) -> Option<Arc<Snapshot>> {
        self.current.borrow().clone()
    }

    /// Decisions from now on see `next`.
    pub fn replace(&self, next: Arc<Snapshot>) {
        self.current.send_replace(Some(next));
    }

    /// Decides on the current snapshot; a refusal that only says that something is not known yet waits for a newer
    /// one, up to [`limits::HOLD`], and then stands.
    ///
    /// # Errors
    /// The refusal.
    pub async fn decide<T>(
        &self,
        decision: impl Fn(&Arc<Snapshot>) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let mut changes = self.current.subscribe();
        let deadline = Instant::now() + limits::HOLD;
        loop {
            let now = changes.borrow_and_update().clone();
            let outcome = match &now {
                Some(world) => decision(world),
                None => Err(unsynchronised()),
            };
            match outcome {
                Err(refusal) if not_known_yet(refusal.flag) => {
                    match tokio::time::timeout_at(deadline, changes.changed()).await {
                        Ok(Ok(())) => {}
                        Ok(Err(_)) | Err(_) => return Err(refusal),
                    }
                }
                other => return other,
            }
        }
    }
}

/// Refusals that a newer snapshot may lift without anybody changing their mind.
pub fn not_known_yet(flag: Flag) -> bool {
    matches!(flag, Flag::PolicyPending | Flag::UnknownWorkload)
}

fn unsynchronised() -> Refusal {
    Refusal {
        flag: Flag::UnknownWorkload,
        why: "the control plane has not described the mesh yet".to_owned(),
        policy: None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn refusal(flag: Flag) -> Refusal {
        Refusal { flag, why: String::new(), policy: None }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_known_yet_waits_for_a_newer_world_and_then_stands() {
        let begin = Instant::now();
        let world = World::default();
        let outcome = world.decide(|_| Ok(())).await;
        assert_eq!((outcome.unwrap_err().flag, begin.elapsed()), (Flag::UnknownWorkload, limits::HOLD));

        world.replace(Arc::new(Snapshot::default()));
        let outcome = world.decide(|_| Err::<(), _>(refusal(Flag::PolicyPending))).await;
        assert_eq!((outcome.unwrap_err().flag, begin.elapsed()), (Flag::PolicyPending, 2 * limits::HOLD));

        let outcome = world.decide(|_| Err::<(), _>(refusal(Flag::PolicyDenied))).await;
        assert_eq!((outcome.unwrap_err().flag, begin.elapsed()), (Flag::PolicyDenied, 2 * limits::HOLD));
    }

    #[tokio::test(start_paused = true)]
    async fn a_newer_world_ends_the_wait() {
        let (world, asked) = (World::default(), AtomicUsize::new(0));
        world.replace(Arc::new(Snapshot::default()));
        let deciding = world.decide(|_| match asked.fetch_add(1, Ordering::SeqCst) {
            0 => Err(refusal(Flag::PolicyPending)),
            _ => Ok(()),
        });
        let (outcome, ()) = tokio::join!(deciding, async { world.replace(Arc::new(Snapshot::default())) });
        assert!(outcome.is_ok());
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }
}
