//! Wall clock and chance as values, so that whoever decides can be given scripted ones.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

/// The wall clock.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl Clock {
    /// The machine's.
    pub fn system() -> Self {
        Self(Arc::new(SystemTime::now))
    }

    /// Starts at `start` and runs with tokio's clock, which tests pause.
    pub fn following_tokio(start: SystemTime) -> Self {
        let zero = tokio::time::Instant::now();
        Self(Arc::new(move || start + (tokio::time::Instant::now() - zero)))
    }

    /// Now.
    pub fn now(&self) -> SystemTime {
        (self.0)()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

/// A source of chance; clones share their state.
#[derive(Clone, Debug)]
pub struct Chance(Arc<AtomicU64>);

impl Chance {
    /// Seeded by the operating system.
    pub fn random() -> Self {
        Self::seeded(rand::random())
    }

    /// The same sequence for the same seed.
    pub fn seeded(seed: u64) -> Self {
        Self(Arc::new(AtomicU64::new(seed)))
    }

    /// The next number (SplitMix64: one atomic addition, no lock on the data path).
    pub fn next(&self) -> u64 {
        let state = self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0.0..1.0`.
    pub fn fraction(&self) -> f64 {
        // 53 bits fill the mantissa exactly.
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// `base` scaled by a uniform factor in `1 - by ..= 1 + by`.
    pub fn jitter(&self, base: Duration, by: f64) -> Duration {
        base.mul_f64(1.0 - by + 2.0 * by * self.fraction())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chance_is_uniform_enough_and_repeatable() {
        let (a, b) = (Chance::seeded(7), Chance::seeded(7));
        assert!((0..100).all(|_| a.next() == b.next()));
        let mean = (0..10_000).map(|_| a.fraction()).sum::<f64>() / 10_000.0;
        assert!((0.48..0.52).contains(&mean), "{mean}");
    }

    #[test]
    fn jitter_stays_in_its_band() {
        let chance = Chance::seeded(1);
        for _ in 0..1000 {
            let d = chance.jitter(Duration::from_secs(100), 0.1);
            assert!((90.0..=110.0).contains(&d.as_secs_f64()), "{d:?}");
        }
    }
}
