//! Waiting for a state, never for a time.

use std::{
    thread,
    time::{Duration, Instant},
};

/// How long a state may take before a test calls it a failure. Generous: speed is the bench's business.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(50);

/// Looks until `look` gives a value.
///
/// # Errors
/// After [`DEADLINE`], with `what` and the last reason given.
pub fn until<T>(what: &str, look: impl FnMut() -> Result<T, String>) -> anyhow::Result<T> {
    until_within(DEADLINE, what, look)
}

/// Looks until `look` gives a value, where that may take longer than elsewhere.
///
/// # Errors
/// After `deadline`, with `what` and the last reason given.
pub fn until_within<T>(
    deadline: Duration,
    what: &str,
    mut look: impl FnMut() -> Result<T, String>,
) -> anyhow::Result<T> {
    let end = Instant::now() + deadline;
    loop {
        match look() {
            Ok(value) => return Ok(value),
            Err(reason) if Instant::now() > end => anyhow::bail!("waited in vain for {what}: {reason}"),
            Err(_) => thread::sleep(PAUSE),
        }
    }
}

/// Looks until `look` is true.
///
/// # Errors
/// After [`DEADLINE`].
pub fn until_true(what: &str, mut look: impl FnMut() -> bool) -> anyhow::Result<()> {
    until(what, || if look() { Ok(()) } else { Err("not so yet".into()) })
}
