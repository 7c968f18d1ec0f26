//! Who sends what brings him nothing is read more slowly: floods of SETTINGS or PING, rapid reset and their like cost the
//! apiserver more than those who send them, and it serves others meanwhile.
//!
//! Input: glitches as they are found. Output: whether the client may be read. Must never end a connection, nor slow one
//! that makes a few: a burst is free, and so is a steady trickle.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

use super::registry::Connection;

/// What one takes off what is free: a hundred a second are.
const EACH: Duration = Duration::from_millis(10);

/// How many are free at once, in time: 250, as many as kube-apiserver lets a client have streams to reset
/// (`--http2-max-streams-per-connection`).
const FREE: Duration = Duration::from_millis(2500);

/// How long nothing is read at most: who has gone is to be noticed.
const LONGEST: Duration = Duration::from_secs(5);

/// One connection's (the generic cell rate algorithm, ITU-T I.371).
#[derive(Default)]
pub struct Slowing {
    /// When all that was sent would have been sent at the rate that is free.
    due: Option<Instant>,
    wait: Option<Pin<Box<Sleep>>>,
    /// It has been slowed before.
    is_known: bool,
}

impl Slowing {
    /// Takes so many more glitches; pending while nothing is to be read.
    pub fn poll(&mut self, glitches: u32, connection: &Connection, context: &mut Context<'_>) -> Poll<()> {
        if glitches > 0
            && let Some(until) = self.take(glitches, Instant::now())
        {
            self.wait = Some(Box::pin(sleep_until(until)));
            if !std::mem::replace(&mut self.is_known, true) {
                connection.slowed();
            }
        }
        if let Some(wait) = &mut self.wait {
            ready!(wait.as_mut().poll(context));
            self.wait = None;
        }
        Poll::Ready(())
    }

    /// Takes so many more; until when nothing is to be read, if that is so.
    fn take(&mut self, glitches: u32, now: Instant) -> Option<Instant> {
        let due = self.due.map_or(now, |due| due.max(now)) + EACH.saturating_mul(glitches);
        let due = due.min(now + FREE + LONGEST);
        self.due = Some(due);
        (due > now + FREE).then(|| due - FREE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends so many glitches at a time, so often, each when the one before is read and a pause is over: how long that
    /// takes, and how often it had to wait.
    fn takes(glitches: u32, times: u32, pause: Duration) -> (Duration, u32) {
        let mut slowing = Slowing::default();
        let began = Instant::now();
        let mut now = began;
        let mut waits = 0;
        for _ in 0..times {
            if let Some(until) = slowing.take(glitches, now) {
                assert!(until > now && until <= now + LONGEST);
                now = until;
                waits += 1;
            }
            now += pause;
        }
        (now - began, waits)
    }

    #[test]
    fn a_burst_and_a_trickle_are_free_and_a_flood_is_slow() {
        assert_eq!(takes(250, 1, Duration::ZERO), (Duration::ZERO, 0));
        assert_eq!(takes(1, 10_000, EACH), (EACH * 10_000, 0));
        assert_eq!(takes(56, 100, Duration::ZERO).0, EACH * 5600 - FREE);
        // However many come at once, who goes is noticed in time.
        assert_eq!(takes(u32::MAX, 3, Duration::ZERO), (3 * LONGEST, 3));
    }
}
