//! Running code inside a network namespace: one short-lived thread each, so that the caller never moves.

use std::{fs::File, path::Path, thread};

use anyhow::Context as _;
use nix::sched::{CloneFlags, setns};

/// Runs `work` in the namespace behind `path` and returns its result. Sockets made inside stay there for good.
///
/// # Errors
/// When the namespace cannot be entered, or what `work` fails with.
pub fn within<T: Send>(path: &Path, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    let namespace = File::open(path).with_context(|| format!("open {}", path.display()))?;
    thread::scope(|scope| {
        let inside = scope.spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).context("setns")?;
            work()
        });
        match inside.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Starts a thread that lives in the namespace behind `path`.
///
/// # Errors
/// When the namespace cannot be opened.
pub fn spawn_within<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> T + Send + 'static,
) -> anyhow::Result<thread::JoinHandle<anyhow::Result<T>>> {
    let namespace = File::open(path).with_context(|| format!("open {}", path.display()))?;
    Ok(thread::spawn(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET).context("setns")?;
        Ok(work())
    }))
}
