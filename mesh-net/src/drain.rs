//! Shutdown in two steps: *drain* (accept nothing new, let what runs finish), then *force*.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::task::TaskGroup;

/// The signalling side. Clones signal the same drain.
#[derive(Clone, Debug)]
pub struct Drain {
    started: CancellationToken,
    forced: CancellationToken,
}

/// The watching side; cheap to clone.
#[derive(Clone, Debug)]
pub struct Draining {
    started: CancellationToken,
    forced: CancellationToken,
}

/// A drain and its watcher.
pub fn channel() -> (Drain, Draining) {
    let drain = Drain { started: CancellationToken::new(), forced: CancellationToken::new() };
    let draining = drain.watch();
    (drain, draining)
}

impl Drain {
    /// Step one.
    pub fn start(&self) {
        self.started.cancel();
    }

    /// Step two; implies step one.
    pub fn force(&self) {
        self.started.cancel();
        self.forced.cancel();
    }

    /// A watcher of this drain.
    pub fn watch(&self) -> Draining {
        Draining { started: self.started.clone(), forced: self.forced.clone() }
    }

    /// Both steps: start, give `tasks` the `grace`, force, join.
    pub async fn run(&self, tasks: &TaskGroup, grace: Duration) -> usize {
        self.start();
        if tokio::time::timeout(grace, tasks.idle()).await.is_ok() {
            self.force();
            return 0;
        }
        let left = tasks.active();
        self.force();
        // Forced connections need a moment to say goodbye; what is still there then is dropped.
        tasks.shutdown(Duration::from_secs(1)).await;
        left
    }
}

impl Draining {
    /// A drain of a part (one pod): signalled by itself or with the whole.
    pub fn child(&self) -> (Drain, Draining) {
        let drain = Drain { started: self.started.child_token(), forced: self.forced.child_token() };
        let draining = drain.watch();
        (drain, draining)
    }

    /// A watcher that nobody signals.
    pub fn never() -> Self {
        channel().1
    }

    /// Returns when step one is signalled, at once if it was.
    pub async fn started(&self) {
        self.started.cancelled().await;
    }

    /// Returns when step two is signalled, at once if it was.
    pub async fn forced(&self) {
        self.forced.cancelled().await;
    }

    /// Whether step one was signalled.
    pub fn is_started(&self) -> bool {
        self.started.is_cancelled()
    }

    /// Whether step two was signalled.
    pub fn is_forced(&self) -> bool {
        self.forced.is_cancelled()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_follow_their_parent_and_not_the_reverse() {
        let (all, watch) = channel();
        let (pod, pod_watch) = watch.child();
        pod.force();
        assert!(pod_watch.is_started() && pod_watch.is_forced());
        assert!(!watch.is_started());
        let (_other, other_watch) = watch.child();
        all.start();
        assert!(other_watch.is_started() && !other_watch.is_forced());
    }

    #[tokio::test(start_paused = true)]
    async fn run_forces_what_does_not_finish() {
        let (drain, watch) = channel();
        let tasks = TaskGroup::new();
        tasks.spawn(async move { watch.forced().await });
        assert_eq!(drain.run(&tasks, Duration::from_secs(3)).await, 1);
        assert_eq!(tasks.active(), 0);
    }
}
