//! What a peer may send us: windows that follow what a stream needs, under one budget.
//!
//! A window begins as large as the constant says. When half of it is used up within two round trips, it is the window
//! that holds the stream back: it is doubled, as long as the process has bytes to promise. The window of a connection
//! also gives in advance what waits for readers that stall, from the same budget: so a reader that stalls pushes back
//! on its own stream, until the budget is spent.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use super::frame::LARGEST;

/// All that may be promised beyond the windows that every stream and connection begin with, bytes.
const BUDGET_BYTES: usize = 256 << 20;
/// The part of it that larger windows may take. The rest is for what waits: windows that are large for some must not
/// leave others behind a reader that stalls.
const GROWN_BYTES: usize = BUDGET_BYTES / 2;
/// Largest window of a stream or connection, bytes: 10 Gbit/s over 50 ms.
const LARGEST_WINDOW_BYTES: u64 = 64 << 20;
/// The peer tells the round trip, by when it answers; it does not tell us to believe in longer ones.
const LONGEST_ROUND_TRIP: Duration = Duration::from_millis(300);

/// What the process has promised: the memory that it bounds is the process's, so it is one for all connections.
static PROMISED: AtomicUsize = AtomicUsize::new(0);

/// A part of the budget; given back when dropped.
#[derive(Debug, Default)]
struct Promise(u64);

impl Promise {
    /// Takes `bytes` more, if that leaves the process below `most`.
    fn grow(&mut self, bytes: u64, most: usize) -> bool {
        let Ok(size) = usize::try_from(bytes) else { return false };
        let more = |now: usize| now.checked_add(size).filter(|sum| *sum <= most);
        let taken = PROMISED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok();
        self.0 += if taken { bytes } else { 0 };
        taken
    }

    fn give_back(&mut self, bytes: u64) {
        let bytes = bytes.min(self.0);
        self.0 -= bytes;
        PROMISED.fetch_sub(usize::try_from(bytes).unwrap_or(0), Ordering::Relaxed);
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.give_back(self.0);
    }
}

/// The window of a stream or of a connection.
#[derive(Debug)]
pub struct Window {
    size: u64,
    /// All that was permitted, all that came, and all that was read, since the beginning.
    granted: u64,
    received: u64,
    released: u64,
    updated: Option<Instant>,
    grown: Promise,
    /// Granted in advance for what waits.
    advance: Promise,
}

impl Window {
    /// One of `size` bytes, which the peer knows of.
    pub fn new(size: u32) -> Self {
        let size = u64::from(size);
        Self {
            size,
            granted: size,
            received: 0,
            released: 0,
            updated: None,
            grown: Promise::default(),
            advance: Promise::default(),
        }
    }

    /// Bytes came. Whether they were permitted.
    pub fn receive(&mut self, bytes: u32) -> bool {
        self.received += u64::from(bytes);
        self.received <= self.granted
    }

    /// Bytes were read: `size` of those that came.
    pub fn release(&mut self, size: usize) {
        self.released = (self.released + size as u64).min(self.received);
        // What was given in advance is not given again.
        let settled = self.advance.0.saturating_sub(self.received - self.released);
        self.advance.give_back(settled);
    }

    /// Bytes that came and were not read.
    pub fn waiting(&self) -> u64 {
        self.received - self.released
    }

    /// What the peer is to be told now, if anything: half a window at a time.
    pub fn due(&mut self, now: impl FnOnce() -> Instant, round_trip: Duration) -> Option<u32> {
        let target = self.released + self.advance.0 + self.size;
        if target.saturating_sub(self.granted) < self.size / 2 {
            return None;
        }
        let now = now();
        let round_trip = round_trip.min(LONGEST_ROUND_TRIP);
        let rushed = self.updated.is_some_and(|then| now.saturating_duration_since(then) < 2 * round_trip);
        self.updated = Some(now);
        if rushed && self.size < LARGEST_WINDOW_BYTES && self.grown.grow(self.size, GROWN_BYTES) {
            self.size *= 2;
        }
        self.grant()
    }

    /// Gives in advance what waits for readers, if more than half of the window does.
    pub fn relieve(&mut self) -> Option<u32> {
        let hidden = self.waiting().saturating_sub(self.advance.0);
        if hidden < self.size / 2 || !self.advance.grow(hidden, BUDGET_BYTES) {
            return None;
        }
        self.grant()
    }

    /// Whether nothing has come.
    pub fn is_untouched(&self) -> bool {
        self.received == 0
    }

    fn grant(&mut self) -> Option<u32> {
        let target = self.released + self.advance.0 + self.size;
        // Never more at a time than a window may be.
        let most = (self.received + u64::from(LARGEST)).saturating_sub(self.granted);
        let more = target.saturating_sub(self.granted).min(most);
        self.granted += more;
        u32::try_from(more).ok().filter(|more| *more > 0)
    }
}

#[cfg(test)]
mod tests;
