//! The watchdog on the agent's loop: it beats, and somebody notices when it does not.
//!
//! Job: say for how long the loop has stood still, to `/livez` and to the log. Must never need the loop for that.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::service;

/// How often the loop beats when nothing else happens.
pub const BEAT: Duration = Duration::from_secs(1);

/// A loop that has not beaten for so long stands still.
pub const STANDSTILL: Duration = Duration::from_secs(10);

/// The loop's heart.
#[derive(Debug)]
pub struct Heart {
    origin: Instant,
    beat_ms: AtomicU64,
}

impl Heart {
    /// Beats now for the first time; a thread of its own looks after it, for as long as it is there.
    ///
    /// # Errors
    ///
    /// The thread cannot be started.
    pub fn start() -> std::io::Result<Arc<Self>> {
        let heart = Arc::new(Self::new());
        let watched = Arc::downgrade(&heart);
        thread::Builder::new().name("watchdog".to_owned()).spawn(move || {
            let mut stood = false;
            let is_awaited = service::watchdog().is_some();
            while let Some(heart) = watched.upgrade() {
                let stands = heart.standstill();
                match stands {
                    Some(since) if !stood => tracing::error!(
                        "the agent's loop has stood still for {} s: nothing is decided or answered, and /livez says so",
                        since.as_secs()
                    ),
                    None if stood => tracing::warn!("the agent's loop goes on"),
                    _ => {}
                }
                stood = stands.is_some();
                if is_awaited && !stood {
                    service::alive();
                }
                drop(heart);
                thread::sleep(BEAT);
            }
        })?;
        Ok(heart)
    }

    fn new() -> Self {
        Self {
            origin: Instant::now(),
            beat_ms: AtomicU64::new(0),
        }
    }

    /// The loop is alive.
    pub fn beat(&self) {
        self.beat_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// For how long the loop has stood still, when it does.
    pub fn standstill(&self) -> Option<Duration> {
        let age = self.now_ms().saturating_sub(self.beat_ms.load(Ordering::Relaxed));
        let age = Duration::from_millis(age);
        (age >= STANDSTILL).then_some(age)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_does_not_beat_stands_still() {
        let mut heart = Heart::new();
        assert_eq!(heart.standstill(), None);
        // As if it had been made so long ago.
        heart.origin = Instant::now()
            .checked_sub(STANDSTILL * 2)
            .expect("the machine runs for longer");
        assert!(heart.standstill().is_some_and(|since| since >= STANDSTILL * 2));
        heart.beat();
        assert_eq!(heart.standstill(), None);
    }
}
