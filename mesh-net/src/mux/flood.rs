//! What a peer may do too often, though each time it may.

use std::time::Instant;

/// A bucket of so many, refilled by the second: looked at only when it is empty.
#[derive(Debug)]
struct Bucket {
    left: u32,
    size: u32,
    per_second: u32,
    filled: Instant,
}

impl Bucket {
    fn new(size: u32, per_second: u32, now: Instant) -> Self {
        Self { left: size, size, per_second, filled: now }
    }

    fn add(&mut self, more: u32) {
        self.left = self.left.saturating_add(more).min(self.size);
    }

    /// Whether there was one more.
    fn take(&mut self, now: impl FnOnce() -> Instant) -> bool {
        if self.left == 0 {
            let now = now();
            let seconds = now.saturating_duration_since(self.filled).as_secs_f64();
            let more = (seconds * f64::from(self.per_second)).min(f64::from(self.size));
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "between 0 and `size`"
            )]
            let more = more as u32;
            if more == 0 {
                return false;
            }
            (self.left, self.filled) = (more, now);
        }
        self.left -= 1;
        true
    }
}

/// The buckets of a connection.
#[derive(Debug)]
pub struct Floods {
    /// Frames that bring nothing: PING, SETTINGS, empty DATA, what we do not know. An honest peer sends a few a minute.
    idle: Bucket,
    /// Streams that it breaks.
    broken: Bucket,
    /// Streams that it resets without having sent a byte (T-26). Applications that give up while a server does not answer
    /// cause some, and checks that only connect; how many are at work at the same time has its own bound.
    resets: Bucket,
}

impl Floods {
    /// For a connection that begins.
    pub fn new(now: Instant) -> Self {
        Self {
            idle: Bucket::new(10_000, 500, now),
            broken: Bucket::new(200, 50, now),
            resets: Bucket::new(500, 100, now),
        }
    }

    /// A stream has begun: frames that cross its end, either way, are no flood.
    pub fn stream(&mut self) {
        self.idle.add(4);
    }

    /// Whether the peer may send one more frame that brings nothing.
    pub fn idle(&mut self) -> bool {
        self.idle.take(Instant::now)
    }

    /// Whether one more stream may be broken.
    pub fn broken(&mut self) -> bool {
        self.broken.take(Instant::now)
    }

    /// Whether one more stream may go to waste.
    pub fn reset(&mut self) -> bool {
        self.resets.take(Instant::now)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_bucket_fills_with_time() {
        let begin = Instant::now();
        let mut bucket = Bucket::new(3, 10, begin);
        let at = |millis| move || begin + Duration::from_millis(millis);
        assert_eq!([0; 4].map(|_| bucket.take(at(50))), [true, true, true, false]);
        assert_eq!([0; 3].map(|_| bucket.take(at(200))), [true, true, false]);
        assert_eq!([0; 4].map(|_| bucket.take(at(60_000))), [true, true, true, false], "but not over");
    }
}
