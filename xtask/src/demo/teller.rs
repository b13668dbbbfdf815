//! How the story is told: titles, commands, assertions with their evidence.

use std::{
    fmt::Display,
    time::{Duration, Instant},
};

use anyhow::bail;

/// Counts what held.
#[derive(Debug, Default)]
pub struct Teller {
    held: usize,
}

impl Teller {
    /// Begins a step.
    pub fn step(&self, title: &str, shows: &str) {
        println!("\n━━ {title}\n   {shows}");
    }

    /// A command that the reader could type.
    pub fn command(&self, line: impl Display) {
        println!("   $ {line}");
    }

    /// Asserts, with the evidence.
    ///
    /// # Errors
    /// When it does not hold.
    pub fn holds(&mut self, what: &str, holds: bool, evidence: impl Display) -> anyhow::Result<()> {
        if !holds {
            println!("   ✗ {what}: {evidence}");
            bail!("{what}: {evidence}");
        }
        println!("   ✓ {what}: {evidence}");
        self.held += 1;
        Ok(())
    }

    /// Number of assertions that held.
    pub fn held(&self) -> usize {
        self.held
    }
}

/// Polls until there is a value; the last reason why not is in the error.
///
/// # Errors
/// When there is none in time.
pub fn until<T>(
    what: &str,
    within: Duration,
    mut look: impl FnMut() -> anyhow::Result<Result<T, String>>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + within;
    loop {
        match look()? {
            Ok(value) => return Ok(value),
            Err(why) if Instant::now() >= deadline => bail!("{what}: not within {within:?}: {why}"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
