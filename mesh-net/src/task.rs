//! Who spawns, joins: the one place of the workspace that calls `tokio::spawn`.

use std::{
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// A parent of tasks. Clones are the same parent; when the last clone outside the tasks is gone, they are cancelled.
#[derive(Clone, Debug)]
pub struct TaskGroup {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    tracker: TaskTracker,
    cancel: CancellationToken,
    panics: Arc<AtomicU64>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

impl Default for TaskGroup {
    fn default() -> Self {
        Self::new()
    }
}

impl TaskGroup {
    /// A group without tasks.
    pub fn new() -> Self {
        let inner = Inner {
            tracker: TaskTracker::new(),
            cancel: CancellationToken::new(),
            panics: Arc::new(AtomicU64::new(0)),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Runs `work` as a task of this group. A panic ends that task alone; it is counted and logged.
    pub fn spawn<F>(&self, work: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let cancel = self.inner.cancel.clone();
        let panics = self.inner.panics.clone();
        let guarded = async move {
            tokio::select! {
                biased;
                () = cancel.cancelled() => {}
                outcome = AssertUnwindSafe(work).catch_unwind() => {
                    if let Err(payload) = outcome {
                        panics.fetch_add(1, Ordering::Relaxed);
                        tracing::error!(reason = panic_text(&*payload), "a task panicked");
                    }
                }
            }
        };
        #[expect(clippy::disallowed_methods, reason = "this is the place that the ban points to")]
        drop(tokio::spawn(self.inner.tracker.track_future(guarded)));
    }

    /// Tasks that have not ended.
    pub fn active(&self) -> usize {
        self.inner.tracker.len()
    }

    /// Tasks that panicked so far.
    pub fn panics(&self) -> u64 {
        self.inner.panics.load(Ordering::Relaxed)
    }

    /// Waits until no task is left. Tasks may still be spawned meanwhile.
    pub async fn idle(&self) {
        self.inner.tracker.close();
        self.inner.tracker.wait().await;
        self.inner.tracker.reopen();
    }

    /// Cancels (drops) every task at its next await point; new ones end at once.
    pub fn cancel(&self) {
        self.inner.cancel.cancel();
    }

    /// Waits up to `grace` for the tasks to end by themselves, then cancels the rest and joins them. Returns how many
    /// had to be cancelled.
    pub async fn shutdown(&self, grace: Duration) -> usize {
        if tokio::time::timeout(grace, self.idle()).await.is_ok() {
            self.cancel();
            return 0;
        }
        let left = self.active();
        self.cancel();
        self.idle().await;
        left
    }
}

fn panic_text(payload: &(dyn std::any::Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_panic_ends_one_task_and_is_counted() {
        let tasks = TaskGroup::new();
        tasks.spawn(async { panic!("on purpose") });
        tasks.spawn(async {});
        tasks.idle().await;
        assert_eq!((tasks.panics(), tasks.active()), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn shutdown_cancels_what_outlives_the_grace() {
        let tasks = TaskGroup::new();
        tasks.spawn(tokio::time::sleep(Duration::from_secs(1)));
        tasks.spawn(std::future::pending());
        assert_eq!(tasks.shutdown(Duration::from_secs(5)).await, 1);
        assert_eq!(tasks.active(), 0);
    }

    #[tokio::test]
    async fn the_last_handle_takes_the_tasks_with_it() {
        let tasks = TaskGroup::new();
        let (sender, receiver) = tokio::sync::oneshot::channel::<()>();
        tasks.spawn(async move {
            std::future::pending::<()>().await;
            drop(sender);
        });
        drop(tasks);
        assert!(receiver.await.is_err());
    }
}
