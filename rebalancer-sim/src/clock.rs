//! A node's own clock: what its agent takes for the time, whatever the world's is.
//!
//! Input: the world's milliseconds. Output: the clock's, and back. A clock that is slewed (NTP) runs fast or slow and is never
//! set: CLOCK_MONOTONIC, by which the agent and its timers go, is slewed with it. adjtimex(2) slews by 500 ppm, chrony by
//! 83,333 unless told otherwise.
//! Must never go back.

use rebalancer_core::ids::Timestamp;

/// How a clock runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clock {
    /// Its milliseconds in one of the world's.
    pace: f64,
    /// Since when it runs like that, by the world's time.
    since: u64,
    /// What it showed then.
    shown: f64,
}

/// The pace of a clock that is so much fast, or slow, in parts of a million.
pub fn pace(ppm: i32) -> f64 {
    1.0 + f64::from(ppm) / 1e6
}

impl Clock {
    /// One that shows the world's time plus `ahead`.
    pub fn new(ahead: u64, now: u64) -> Self {
        Self {
            pace: 1.0,
            since: now,
            shown: (now + ahead) as f64,
        }
    }

    /// Runs fast or slow from now on.
    pub fn slew(&mut self, ppm: i32, now: u64) {
        *self = Self {
            pace: pace(ppm),
            since: now,
            shown: self.exactly(now),
        };
    }

    /// From now on it shows that and what passes: a process that starts has a clock of its own.
    pub fn restart(&mut self, shown: u64, now: u64) {
        self.since = now;
        self.shown = shown as f64;
    }

    fn exactly(&self, now: u64) -> f64 {
        self.shown + (now as f64 - self.since as f64) * self.pace
    }

    /// What it shows.
    pub fn at(&self, now: u64) -> Timestamp {
        Timestamp::from_millis(self.exactly(now).max(0.0) as u64)
    }

    /// When it shows that, by the world's time.
    pub fn when(&self, at: Timestamp) -> u64 {
        let ahead = (at.as_millis() as f64 - self.shown) / self.pace;
        let mut when = (self.since as f64 + ahead).ceil().max(0.0) as u64;
        while self.at(when) < at {
            when += 1;
        }
        when
    }

    /// How long something of that length by this clock takes in the world.
    pub fn takes(&self, millis: u64) -> u64 {
        (millis as f64 / self.pace).round() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_runs_at_its_pace_never_goes_back_and_says_when_it_shows_a_time() {
        let mut clock = Clock::new(77, 1_000);
        assert_eq!(
            (clock.at(1_000), clock.when(clock.at(5_000))),
            (Timestamp::from_millis(1_077), 5_000)
        );
        let mut last = clock.at(1_000);
        for (number, ppm) in [0, 500, -500, 83_333, -83_333, 100_000, 0].into_iter().enumerate() {
            let from = 1_000 + 10_000 * number as u64;
            clock.slew(ppm, from);
            for now in from..from + 10_000 {
                let shows = clock.at(now);
                assert!(shows >= last, "{ppm} ppm at {now}");
                last = shows;
                let when = clock.when(shows);
                assert!(
                    when <= now && clock.at(when) == shows,
                    "{ppm} ppm: {shows:?} at {when}, not {now}"
                );
            }
        }
        // Two thousandths of ten seconds are no rounding.
        let passed = last.as_millis() - 1_077;
        let expected = 10_000.0
            * [0, 500, -500, 83_333, -83_333, 100_000, 0]
                .map(pace)
                .iter()
                .sum::<f64>();
        assert!((passed as f64 - expected).abs() <= 2.0, "{passed}, {expected}");
    }
}
