//! When to fetch which certificate (pure): time and chance are arguments.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use mesh_core::{id::Identity, limits::CERTIFICATE_BACKOFF};
use tokio::time::Instant;

/// Fetches at the same time (`wire-protocol.md` C7).
pub const PARALLEL: usize = 8;
/// Renewals are spread by this share of the half-life, so that identities of one age do not come together.
const RENEW_JITTER: f64 = 0.1;
/// Retries are spread by this share of the wait.
const RETRY_JITTER: f64 = 0.2;

/// What one identity waits for, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Urgency {
    /// A connection waits.
    Live,
    /// A pod wants it, and there is none yet.
    Prefetch,
    /// The one that is there is half used up.
    Renewal,
}

#[derive(Debug)]
struct Entry {
    wanted: usize,
    urgency: Urgency,
    failures: u32,
    due: Option<Instant>,
    running: bool,
}

/// The plan for all identities.
#[derive(Debug, Default)]
pub struct Schedule {
    entries: HashMap<Identity, Entry>,
    running: usize,
}

impl Schedule {
    /// One more pod needs `identity`.
    pub fn want(&mut self, identity: &Identity, now: Instant) {
        self.entry(identity, Urgency::Prefetch, now).wanted += 1;
    }

    /// A connection needs `identity` now. Does not shorten a back-off: the CA is not asked more often because its
    /// clients suffer.
    pub fn live(&mut self, identity: &Identity, now: Instant) {
        let entry = self.entry(identity, Urgency::Live, now);
        entry.urgency = Urgency::Live;
        if entry.due.is_none() && !entry.running {
            entry.due = Some(now);
        }
    }

    fn entry(&mut self, identity: &Identity, urgency: Urgency, now: Instant) -> &mut Entry {
        self.entries.entry(identity.clone()).or_insert(Entry {
            wanted: 0,
            urgency,
            failures: 0,
            due: Some(now),
            running: false,
        })
    }

    /// One pod less needs `identity`; true when it was the last.
    pub fn forget(&mut self, identity: &Identity) -> bool {
        let Some(entry) = self.entries.get_mut(identity) else { return false };
        entry.wanted = entry.wanted.saturating_sub(1);
        if entry.wanted > 0 {
            return false;
        }
        if let Some(gone) = self.entries.remove(identity)
            && gone.running
        {
            self.running -= 1;
        }
        true
    }

    /// What to fetch now: due, most urgent first, never more than [`PARALLEL`] at a time.
    pub fn start(&mut self, now: Instant) -> Vec<Identity> {
        let mut due: Vec<_> = self
            .entries
            .iter_mut()
            .filter(|(_, entry)| !entry.running && entry.due.is_some_and(|at| at <= now))
            .collect();
        due.sort_by_key(|(identity, entry)| (entry.urgency, entry.due, (*identity).clone()));
        let mut start = Vec::new();
        for (identity, entry) in due.into_iter().take(PARALLEL.saturating_sub(self.running)) {
            entry.running = true;
            start.push(identity.clone());
        }
        self.running += start.len();
        start
    }

    /// When to call [`start`](Self::start) next; none while all slots are taken or nothing is planned.
    pub fn next_due(&self) -> Option<Instant> {
        if self.running >= PARALLEL {
            return None;
        }
        self.entries.values().filter(|entry| !entry.running).filter_map(|entry| entry.due).min()
    }

    /// A fetch succeeded; false when nobody needs it any more. The CA is back: whoever waits for a retry gets it now,
    /// not after minutes of back-off (F-40).
    pub fn succeeded(&mut self, identity: &Identity, now: Instant, renew_at: Instant) -> bool {
        for entry in self.entries.values_mut().filter(|entry| entry.failures > 0 && !entry.running) {
            entry.due = entry.due.map(|at| at.min(now));
        }
        let Some(entry) = self.ended(identity) else { return false };
        entry.failures = 0;
        entry.urgency = Urgency::Renewal;
        // What only a connection asked for is used until it expires and asked for again if need be.
        entry.due = (entry.wanted > 0).then_some(renew_at);
        true
    }

    /// A fetch failed; returns the wait before the next attempt.
    pub fn failed(&mut self, identity: &Identity, now: Instant, fraction: f64) -> Duration {
        let Some(entry) = self.ended(identity) else { return Duration::ZERO };
        let (first, last) = CERTIFICATE_BACKOFF;
        let base = first.saturating_mul(1 << entry.failures.min(16)).min(last);
        entry.failures += 1;
        let wait = spread(base, RETRY_JITTER, fraction);
        if entry.wanted > 0 {
            entry.due = Some(now + wait);
        } else {
            self.entries.remove(identity);
        }
        wait
    }

    fn ended(&mut self, identity: &Identity) -> Option<&mut Entry> {
        // An entry that was forgotten and wanted again meanwhile runs twice at worst.
        let entry = self.entries.get_mut(identity)?;
        if entry.running {
            entry.running = false;
            self.running -= 1;
        }
        Some(entry)
    }

    /// Everyone who is planned for, with the failures since the last success.
    pub fn identities(&self) -> impl Iterator<Item = (&Identity, u32)> {
        self.entries.iter().map(|(identity, entry)| (identity, entry.failures))
    }
}

/// How long to wait from `now` until the renewal of a certificate: its half-life ±10 %.
pub fn renew_in(not_before: SystemTime, not_after: SystemTime, now: SystemTime, fraction: f64) -> Duration {
    let half = not_after.duration_since(not_before).unwrap_or_default() / 2;
    let at = not_before + spread(half, RENEW_JITTER, fraction);
    // A certificate that comes half used up must not turn into a hot loop.
    at.duration_since(now).unwrap_or_default().max(CERTIFICATE_BACKOFF.0)
}

fn spread(base: Duration, by: f64, fraction: f64) -> Duration {
    base.mul_f64(1.0 - by + 2.0 * by * fraction)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: usize) -> Identity {
        Identity::new("td", "ns", &format!("sa{n:02}"))
    }

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn live_requests_go_first_and_eight_at_a_time() {
        let (mut plan, now) = (Schedule::default(), Instant::now());
        for n in 0..20 {
            plan.want(&id(n), now);
        }
        plan.live(&id(19), now);
        let first = plan.start(now);
        assert_eq!((first.len(), &first[0]), (PARALLEL, &id(19)));
        assert!(plan.start(now).is_empty(), "all slots are taken");
        assert_eq!(plan.next_due(), None);
        plan.succeeded(&first[0], now, now + secs(100));
        assert_eq!(plan.start(now).len(), 1);
    }

    #[test]
    fn retries_double_to_the_bound_and_jitter() {
        let (mut plan, now) = (Schedule::default(), Instant::now());
        plan.want(&id(0), now);
        let mut waits = Vec::new();
        let mut at = now;
        for _ in 0..10 {
            assert_eq!(plan.start(at), [id(0)]);
            let wait = plan.failed(&id(0), at, 0.5);
            waits.push(wait.as_secs());
            assert!(plan.start(at).is_empty(), "not before the wait is over");
            plan.live(&id(0), at);
            assert!(plan.start(at).is_empty(), "a waiting connection does not shorten it");
            at += wait;
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 150, 150]);
        plan.start(at);
        assert_eq!(plan.failed(&id(0), at, 0.0), secs(120));
        at += secs(120);
        plan.start(at);
        assert_eq!(plan.failed(&id(0), at, 1.0), secs(180));
    }

    #[test]
    fn one_success_ends_everybodys_wait() {
        let (mut plan, now) = (Schedule::default(), Instant::now());
        for n in 0..3 {
            plan.want(&id(n), now);
        }
        plan.start(now);
        plan.failed(&id(0), now, 0.5);
        plan.failed(&id(1), now, 0.5);
        assert!(plan.start(now).is_empty());
        plan.succeeded(&id(2), now, now + secs(1000));
        assert_eq!(plan.start(now), [id(0), id(1)]);
    }

    #[test]
    fn renewal_is_at_half_life_with_jitter() {
        let start = SystemTime::UNIX_EPOCH + secs(1_000_000);
        let end = start + secs(2000);
        for (fraction, expected) in [(0.0, 900), (0.5, 1000), (1.0, 1100)] {
            assert_eq!(renew_in(start, end, start, fraction), secs(expected));
        }
        assert_eq!(renew_in(start, end, end, 0.5), secs(1), "no hot loop on a used-up certificate");
    }

    #[test]
    fn the_last_one_out_forgets() {
        let (mut plan, now) = (Schedule::default(), Instant::now());
        plan.want(&id(0), now);
        plan.want(&id(0), now);
        assert!(!plan.forget(&id(0)));
        plan.start(now);
        assert!(plan.forget(&id(0)));
        assert!(!plan.succeeded(&id(0), now, now), "an answer for nobody is not kept");
        assert_eq!(plan.running, 0);
    }
}
