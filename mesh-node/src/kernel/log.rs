//! Log lines of the programs, where they have them: debug builds, when level debug is on for this module's target.

use aya::programs::links::{FdLink, PinnedLink};
use aya_log::EbpfLogger;
use mesh_ebpf_common::reason::Reason;
use tokio::io::unix::AsyncFd;

use super::{maps::chain, pins::Pins, types::KernelError};

/// Gives each line to the agent's own log.
struct Forward;

impl log::Log for Forward {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let line = named(&record.args().to_string());
        tracing::debug!(program = record.module_path(), "{line}");
    }

    fn flush(&self) {}
}

/// The line, with the reason's name in place of its number.
fn named(line: &str) -> String {
    let name = |rest: &str| {
        let (number, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        let reason = Reason::from_number(number.parse().ok()?)?;
        Some(format!("refused reason={} {rest}", reason.name()))
    };
    line.strip_prefix("reason=").and_then(name).unwrap_or_else(|| line.to_owned())
}

/// Forwards lines for ever. All programs write to one ring, which is pinned.
pub async fn forward(pins: &Pins) -> Result<(), KernelError> {
    let failed = |error: &dyn std::error::Error| KernelError::Program {
        what: "read the log of the programs".to_owned(),
        why: chain(error),
    };
    let link = PinnedLink::from_pin(pins.link("connect4")).map_err(|error| failed(&error))?;
    let program = FdLink::from(link).info().map_err(|error| failed(&error))?.program_id();
    let logger = EbpfLogger::init_from_id_with_logger(program, Forward).map_err(|error| failed(&error))?;
    // SAFETY: the logger keeps its descriptor open and the same for as long as it lives.
    let lines = unsafe { AsyncFd::register(logger) };
    let mut lines =
        lines.map_err(|error| KernelError::io("wait for log lines of the programs")(error.into()))?;
    loop {
        let mut ready =
            lines.readable_mut().await.map_err(KernelError::io("wait for log lines of the programs"))?;
        ready.get_inner_mut().flush();
        ready.clear_ready();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_a_reason_is_told_by_name() {
        assert_eq!(named("reason=6 netns=4 port=80"), "refused reason=policy_denied netns=4 port=80");
        for other in ["reason=999 x", "reason=x", "reason=", "something else"] {
            assert_eq!(named(other), other);
        }
    }
}
