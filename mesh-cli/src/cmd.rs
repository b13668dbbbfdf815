//! One file per verb.

pub mod analyze;
pub mod check;
pub mod install;
pub mod internal;
pub mod local;
pub mod status;
pub mod uninstall;
pub mod waypoint;

use std::time::Duration;

use anyhow::Context as _;

/// (pure) `30`, `30s` or `2m`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.strip_suffix('m') {
        Some(number) => (number, 60),
        None => (text.strip_suffix('s').unwrap_or(text), 1),
    };
    let number: u64 = number.parse().map_err(|_| "a number of seconds, such as 30, 30s or 2m".to_owned())?;
    number.checked_mul(unit).map(Duration::from_secs).ok_or_else(|| "too long".to_owned())
}

/// Runs what talks to a cluster.
fn within_runtime<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("start the runtime")?.block_on(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_seconds_or_minutes() {
        for (text, seconds) in
            [("30", Some(30)), ("30s", Some(30)), ("2m", Some(120)), ("", None), ("2h", None)]
        {
            assert_eq!(duration(text).ok(), seconds.map(Duration::from_secs), "{text}");
        }
    }
}
