//! What processes and the kernel have used, from `/proc`.

use std::fs;

use anyhow::Context as _;

/// Clock ticks per second of `/proc` on every Linux that this runs on (`getconf CLK_TCK`).
const TICKS_PER_SECOND: f64 = 100.0;

/// Processes that carry load.
#[derive(Clone, Debug, Default)]
pub struct Processes(Vec<u32>);

impl Processes {
    pub fn new(pids: Vec<u32>) -> Self {
        Self(pids)
    }

    /// User and system time so far, seconds: from the scheduler's nanosecond accounting of every thread.
    pub fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let mut total = 0.0;
        for pid in &self.0 {
            for thread in
                fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid}"))?
            {
                // A thread may end between listing and reading.
                let Ok(text) = fs::read_to_string(thread?.path().join("schedstat")) else { continue };
                let nanoseconds: f64 = text.split(' ').next().context("schedstat")?.parse()?;
                total += nanoseconds / 1e9;
            }
        }
        Ok(total)
    }

    /// Resident memory now, bytes.
    pub fn resident_bytes(&self) -> anyhow::Result<u64> {
        let mut total = 0;
        for pid in &self.0 {
            let text = fs::read_to_string(format!("/proc/{pid}/status"))
                .with_context(|| format!("process {pid}"))?;
            let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
            total += line.trim().trim_end_matches(" kB").parse::<u64>()? << 10;
        }
        Ok(total)
    }
}

/// Time that all processors have spent in software interrupts, seconds.
pub fn softirq_seconds() -> anyhow::Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let ticks: f64 = text.split_whitespace().nth(7).context("/proc/stat")?.parse()?;
    Ok(ticks / TICKS_PER_SECOND)
}
