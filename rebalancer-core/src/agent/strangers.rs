//! Clients that come for reasons of their own, beside those who were told.
//!
//! Job: say how many of those who landed are not to be taken for somebody who was told. Input: landings, and departures of
//! clients whom nobody told. Output: how many a second come and go anyway, and how many landings are left without them.
//! Must never take for them those who only came, as after a crash or where a cluster grows, nor those who only left: who was
//! told and has landed would be in transit for ever.

use std::{collections::VecDeque, time::Duration};

/// A window in which they are counted.
const WINDOW: Duration = Duration::from_secs(10);

/// Windows that are remembered. The quietest counts: what a crash does is no rate at which clients come and go anyway.
const WINDOWS: usize = 7;

/// Fewer say nothing: an agent that just started has seen little else than a rush.
const FEWEST_WINDOWS: usize = 3;

/// No more than the strangers of this time are set off at once: the rest of a long look is not theirs.
const OWED: Duration = Duration::from_secs(30);

/// What happened in one look.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// Clients that landed, whoever they are.
    pub landings: u64,
    /// Clients that left, whom nobody had told.
    pub departures: u64,
    /// Since the look before.
    pub passed: Duration,
    /// Whether nobody is in transit or about to be told: then all who land are strangers.
    pub is_quiet: bool,
    /// Whether all apiservers were heard of: else the rest of it is seen later.
    pub is_whole: bool,
}

/// What comes and goes anyway. Where a cluster stays as large as it is, as many leave untold as come; where it grows, those
/// who come are no rate of anything, and where it shrinks those who leave are none. So it is as many as do both: as left
/// lately, and as came before anybody was told.
#[derive(Clone, Debug, Default)]
pub(super) struct Strangers {
    departures: Windows,
    landings: Windows,
    /// The rate by which `owed` grew.
    rate: f64,
    owed: f64,
}

impl Strangers {
    /// Goes on with what another process had learned.
    pub fn resumed((departures, landings): &(Vec<f64>, Vec<f64>)) -> Self {
        Self {
            departures: Windows::of(departures),
            landings: Windows::of(landings),
            ..Self::default()
        }
    }

    /// What another process needs to go on: how many left and how many came a second, in each window.
    pub fn remembered(&self) -> (Vec<f64>, Vec<f64>) {
        (self.departures.rates(), self.landings.rates())
    }

    /// How many of those who landed are left when those who come anyway are taken off; and learns from this look.
    pub fn left_of(&mut self, seen: Seen) -> u64 {
        let left = if seen.is_quiet {
            0
        } else {
            self.taken_off(seen.landings, seen.passed)
        };
        self.departures.add(seen.departures, seen.passed, seen.is_whole);
        if seen.is_quiet {
            self.landings.add(seen.landings, seen.passed, seen.is_whole);
            self.owed = 0.0;
        } else {
            self.landings.give_up();
        }
        left
    }

    fn taken_off(&mut self, landings: u64, passed: Duration) -> u64 {
        let rate = self.departures.quietest().min(self.landings.quietest());
        if rate < self.rate / 2.0 {
            // It was a rush, which owes nothing.
            self.owed = 0.0;
        }
        self.rate = rate;
        self.owed = (self.owed + rate * passed.as_secs_f64()).min(rate * OWED.as_secs_f64());
        let theirs = (self.owed.floor() as u64).min(landings);
        self.owed -= theirs as f64;
        landings - theirs
    }
}

/// How many a second, in each of the last windows.
#[derive(Clone, Debug, Default)]
struct Windows {
    rates: VecDeque<f64>,
    counted: u64,
    passed: Duration,
}

impl Windows {
    fn of(rates: &[f64]) -> Self {
        let known = rates.iter().copied().filter(|rate| rate.is_finite() && *rate >= 0.0);
        Self {
            rates: known.take(WINDOWS).collect(),
            ..Self::default()
        }
    }

    fn rates(&self) -> Vec<f64> {
        self.rates.iter().copied().collect()
    }

    /// Whoever was not heard of tells later what happened meanwhile: a window ends when all were.
    fn add(&mut self, count: u64, passed: Duration, is_whole: bool) {
        self.counted += count;
        self.passed += passed;
        if self.passed >= WINDOW && is_whole {
            self.rates.push_back(self.counted as f64 / self.passed.as_secs_f64());
            if self.rates.len() > WINDOWS {
                self.rates.pop_front();
            }
            self.give_up();
        }
    }

    /// What was counted of this window says nothing.
    fn give_up(&mut self) {
        (self.counted, self.passed) = (0, Duration::ZERO);
    }

    fn quietest(&self) -> f64 {
        let quietest = self.rates.iter().copied().min_by(f64::total_cmp);
        quietest.filter(|_| self.rates.len() >= FEWEST_WINDOWS).unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A second in which so many landed and left.
    fn second(landings: u64, departures: u64, is_quiet: bool) -> Seen {
        Seen {
            landings,
            departures,
            passed: SECOND,
            is_quiet,
            is_whole: true,
        }
    }

    /// So many seconds without a plan, and then sixty with one, in each of which so many of those who were told land beside
    /// what comes anyway: how many are taken for them.
    fn taken_for_told(before: u64, quiet: (u64, u64), busy: (u64, u64), told_land: u64) -> u64 {
        let mut strangers = Strangers::default();
        for _ in 0..before {
            assert_eq!(strangers.left_of(second(quiet.0, quiet.1, true)), 0);
        }
        (0..60)
            .map(|_| strangers.left_of(second(busy.0 + told_land, busy.1, false)))
            .sum()
    }

    #[test]
    fn who_comes_and_goes_is_taken_off_and_who_only_does_one_is_not() {
        for (case, quiet, busy, told, expected) in [
            ("nobody comes anyway", (0, 0), (0, 0), 2, 120..=120),
            ("calls", (2, 2), (2, 2), 2, 110..=125),
            ("a rush that came and stays", (7, 0), (0, 0), 2, 120..=120),
            ("all leave, nobody comes", (0, 2), (0, 2), 2, 120..=120),
            (
                "it grows all the time: they are evidence too",
                (2, 0),
                (2, 0),
                0,
                120..=120,
            ),
            ("calls that end when a plan begins", (2, 2), (0, 0), 2, 55..=125),
            (
                "calls that begin with it: too few are in transit for a while",
                (0, 0),
                (2, 2),
                2,
                240..=240,
            ),
        ] {
            let taken = taken_for_told(80, quiet, busy, told);
            assert!(expected.contains(&taken), "{case}: {taken}");
        }
    }

    /// The first windows are of a start: an agent that has seen two of them takes nobody off.
    #[test]
    fn an_agent_that_just_began_takes_nobody_off() {
        assert_eq!(taken_for_told(25, (2, 2), (0, 0), 2), 120);
    }

    #[test]
    fn a_rate_that_is_over_owes_nothing() {
        let mut strangers = Strangers::default();
        for _ in 0..80 {
            strangers.left_of(second(9, 9, true));
        }
        // They end, and one who was told lands in ten seconds: after the first window nobody is hidden any more.
        let left: Vec<u64> = (0..30)
            .map(|at| strangers.left_of(second(u64::from(at % 10 == 9), 0, false)))
            .collect();
        assert_eq!(left.iter().sum::<u64>(), 2, "{left:?}");
    }

    /// A peer is not heard for a while: what happened there is told later, and is no quiet window before a loud one.
    #[test]
    fn a_window_ends_when_all_were_heard() {
        let mut strangers = Strangers::default();
        for round in 0..10 {
            for at in 0..14 {
                let is_whole = at < 2;
                let count = match at {
                    0 if round > 0 => 26,
                    0 | 1 => 2,
                    _ => 0,
                };
                strangers.left_of(Seen {
                    is_whole,
                    ..second(count, count, true)
                });
            }
        }
        let (departures, landings) = strangers.remembered();
        for rate in departures.iter().chain(&landings).skip(1) {
            assert!((1.6..=2.4).contains(rate), "{departures:?} {landings:?}");
        }
    }

    #[test]
    fn what_was_learned_outlives_the_process() {
        let mut strangers = Strangers::default();
        for _ in 0..80 {
            strangers.left_of(second(2, 2, true));
        }
        let mut next = Strangers::resumed(&strangers.remembered());
        assert_eq!(next.remembered(), strangers.remembered());
        assert_eq!(next.left_of(second(2, 2, false)), 0);
        assert_eq!(
            Strangers::resumed(&(vec![f64::NAN, -1.0], vec![])).remembered(),
            (vec![], vec![])
        );
    }
}
