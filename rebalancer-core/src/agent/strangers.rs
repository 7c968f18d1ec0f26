//! Clients that come for reasons of their own, beside those who were told.
//!
//! Job: say how many of those who landed are not to be taken for somebody who was told, and how many of them landed elsewhere
//! though nobody lands there anyway. Input: landings, and departures of clients whom nobody told. Output: how many landings
//! are left without those who come anyway.
//! Must never take for them those who only came, as after a crash or where a cluster grows, nor those who only left: who was
//! told and has landed would be in transit for ever. Must never take them for evidence that moving helps, where whoever is
//! told comes straight back: that would be told for ever.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use super::{memory::RememberedStrangers, motion::Moves};
use crate::ids::ApiserverName;

/// A window in which they are counted.
const WINDOW: Duration = Duration::from_secs(10);

/// Windows that are remembered.
const WINDOWS: usize = 13;

/// Fewer say nothing: an agent that just started has seen little else than a rush.
const FEWEST_WINDOWS: usize = 3;

/// The loudest windows, as many of these as of thirteen, say nothing: what a crash does is no rate at which clients come anyway.
const LOUDEST: usize = 2;

/// A rate that none of so many last windows shows is over.
const LATEST: usize = 3;

/// No more than the strangers of this time are set off at once: of a longer look it is not known what came in it.
const OWED: Duration = Duration::from_secs(30);

/// So many standard deviations of what lands elsewhere anyway in a window are no evidence that moving helps.
const DEVIATIONS: f64 = 2.5;

/// And so many times as many as usual after that: with less than that above what comes on average, chance would pass any bound
/// by and by.
const UNUSUAL: f64 = 1.5;

/// More clients a second are none that were counted.
const LARGEST: f64 = 1e9;

/// Clients by apiserver.
pub(super) type Counts = [(ApiserverName, u64)];

/// What happened in one look.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen<'a> {
    /// Clients that landed, whoever they are.
    pub landings: &'a Counts,
    /// Clients that left, whom nobody had told.
    pub departures: &'a Counts,
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
    /// Landings elsewhere that are no evidence; `None` when nobody was told for a window.
    usual: Option<f64>,
    /// For how long nobody was told.
    quiet: Duration,
}

impl Strangers {
    /// Goes on with what another process had learned.
    pub fn resumed(remembered: &RememberedStrangers) -> Self {
        Self {
            departures: Windows::of(&remembered.departures),
            landings: Windows::of(&remembered.landings),
            ..Self::default()
        }
    }

    /// What another process needs to go on.
    pub fn remembered(&self) -> RememberedStrangers {
        RememberedStrangers {
            departures: self.departures.windows.iter().cloned().collect(),
            landings: self.landings.windows.iter().cloned().collect(),
        }
    }

    /// How many of those who landed are left when those who come anyway are taken off; and learns from this look.
    pub fn left_of(&mut self, seen: Seen<'_>) -> u64 {
        let landings = seen.landings.iter().map(|(_, count)| count).sum();
        let left = if seen.is_quiet {
            0
        } else {
            self.taken_off(landings, seen.passed)
        };
        self.departures.add(seen.departures, seen.passed, seen.is_whole);
        if seen.is_quiet {
            self.landings.add(seen.landings, seen.passed, seen.is_whole);
            self.owed = 0.0;
            self.quiet += seen.passed;
            if self.quiet >= WINDOW {
                self.usual = None;
            }
        } else {
            self.quiet = Duration::ZERO;
            self.landings.give_up();
        }
        left
    }

    /// How many a second come and go anyway.
    fn rate(&self) -> f64 {
        // A rate that is over is none any more.
        let leave = self.departures.all.min(self.departures.latest());
        if self.landings.is_known() {
            leave.min(self.landings.all)
        } else {
            leave
        }
    }

    fn taken_off(&mut self, landings: u64, passed: Duration) -> u64 {
        let rate = self.rate();
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

    /// How many of those who landed on none of the `donors` are evidence that whoever is told lands there: those beyond what
    /// lands there anyway, and beyond what chance makes of that.
    pub fn evidence(&mut self, landings: &Counts, donors: &[ApiserverName], passed: Duration) -> u64 {
        let rate = self.rate_elsewhere(landings.iter().map(|(name, _)| name), donors);
        let most = self.in_a_burst(rate);
        let usual = self.usual.map_or(most, |usual| usual.min(most)) + UNUSUAL * rate * passed.as_secs_f64();
        let elsewhere = Moves::elsewhere_of(landings, donors);
        let theirs = (usual.floor() as u64).min(elsewhere);
        self.usual = Some(usual - theirs as f64);
        elsewhere - theirs
    }

    /// How many who were told must land elsewhere within a window to be seen among those who land there anyway.
    pub fn hide<'a>(&self, apiservers: impl Iterator<Item = &'a ApiserverName>, donors: &[ApiserverName]) -> f64 {
        let rate = self.rate_elsewhere(apiservers, donors);
        self.in_a_burst(rate) + (UNUSUAL - 1.0) * rate * WINDOW.as_secs_f64()
    }

    /// How many of so many a second are no evidence when they land at once: what chance makes of them in a window, and as many
    /// as came together in the loudest window that counts.
    fn in_a_burst(&self, rate: f64) -> f64 {
        if rate <= 0.0 {
            return 0.0;
        }
        let loudest = self.departures.loudest.max(self.landings.loudest);
        let all = self.departures.all.max(self.landings.all).max(rate);
        chance_of(rate)
            .max(loudest * WINDOW.as_secs_f64() * rate / all)
            .max(1.0)
    }

    /// How many a second land on none of the donors: as many as leave there, which is seen at all times, and no more than came
    /// there while nobody was told. An apiserver that came back a moment ago was not called while it was away, and gets an even
    /// part of all from now on.
    fn rate_elsewhere<'a>(&self, apiservers: impl Iterator<Item = &'a ApiserverName>, donors: &[ApiserverName]) -> f64 {
        let donors: BTreeSet<&ApiserverName> = donors.iter().collect();
        let of = |windows: &Windows, name: &ApiserverName| windows.each.get(name).copied().unwrap_or_default();
        let is_known = self.landings.is_known();
        let (mut count, mut others, mut anyway) = (0, 0, 0.0);
        for name in apiservers {
            count += 1;
            if !donors.contains(name) {
                others += 1;
                // One that sheds its clients before it ends is left by them, and called by nobody.
                let (left, came) = (of(&self.departures, name), of(&self.landings, name));
                anyway += if is_known { left.min(came) } else { left };
            }
        }
        anyway.max(self.rate() * f64::from(others) / f64::from(count.max(1)))
    }
}

/// What chance adds to so many a second, in a window.
fn chance_of(rate: f64) -> f64 {
    DEVIATIONS * (rate * WINDOW.as_secs_f64()).sqrt()
}

/// How many a second, in each of the last windows, by apiserver.
#[derive(Clone, Debug, Default)]
struct Windows {
    windows: VecDeque<BTreeMap<ApiserverName, f64>>,
    counted: BTreeMap<ApiserverName, u64>,
    passed: Duration,
    /// The mean of all but the loudest windows, of all apiservers together.
    all: f64,
    /// And of each.
    each: BTreeMap<ApiserverName, f64>,
    /// The loudest of those windows.
    loudest: f64,
}

impl Windows {
    fn of(remembered: &[BTreeMap<ApiserverName, f64>]) -> Self {
        let mut windows = Self::default();
        for window in remembered.iter().rev().take(WINDOWS) {
            let known = window.iter().filter(|(_, rate)| (0.0..=LARGEST).contains(*rate));
            windows
                .windows
                .push_front(known.map(|(name, rate)| (name.clone(), *rate)).collect());
        }
        windows.reckon();
        windows
    }

    /// Whoever was not heard of tells later what happened meanwhile: a window ends when all were.
    fn add(&mut self, counts: &Counts, passed: Duration, is_whole: bool) {
        for (name, count) in counts.iter().filter(|(_, count)| *count > 0) {
            *self.counted.entry(name.clone()).or_default() += count;
        }
        self.passed += passed;
        if self.passed >= WINDOW && is_whole {
            let seconds = self.passed.as_secs_f64();
            let counted = std::mem::take(&mut self.counted);
            let rates = counted.into_iter().map(|(name, count)| (name, count as f64 / seconds));
            self.windows.push_back(rates.collect());
            if self.windows.len() > WINDOWS {
                self.windows.pop_front();
            }
            self.give_up();
            self.reckon();
        }
    }

    /// What was counted of this window says nothing.
    fn give_up(&mut self) {
        self.counted.clear();
        self.passed = Duration::ZERO;
    }

    /// As many as the loudest of the last windows says, and what chance may have taken from it.
    fn latest(&self) -> f64 {
        let latest = self
            .windows
            .iter()
            .rev()
            .take(LATEST)
            .map(|window| window.values().sum());
        let latest = latest.fold(0.0, f64::max);
        latest + chance_of(latest) / WINDOW.as_secs_f64()
    }

    fn is_known(&self) -> bool {
        self.windows.len() >= FEWEST_WINDOWS
    }

    fn reckon(&mut self) {
        (self.all, self.each, self.loudest) = (0.0, BTreeMap::new(), 0.0);
        if !self.is_known() {
            return;
        }
        let mut windows: Vec<(f64, &BTreeMap<ApiserverName, f64>)> = self
            .windows
            .iter()
            .map(|window| (window.values().sum(), window))
            .collect();
        windows.sort_by(|(one, _), (other, _)| one.total_cmp(other));
        windows.truncate(windows.len() - (LOUDEST * windows.len()).div_ceil(WINDOWS));
        let count = windows.len() as f64;
        for (all, window) in windows {
            self.all += all / count;
            self.loudest = self.loudest.max(all);
            for (name, rate) in window {
                *self.each.entry(name.clone()).or_default() += rate / count;
            }
        }
        debug_assert!((self.each.values().sum::<f64>() - self.all).abs() <= 1e-6 * (1.0 + self.all));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// On three apiservers, of which the last is no donor: so many on each of the donors, and there.
    fn counts(donors: u64, elsewhere: u64) -> Vec<(ApiserverName, u64)> {
        let name = ApiserverName::new;
        vec![
            (name("a"), donors / 2),
            (name("b"), donors - donors / 2),
            (name("c"), elsewhere),
        ]
    }

    fn donors() -> Vec<ApiserverName> {
        ["a", "b"].map(ApiserverName::new).to_vec()
    }

    /// A second in which so many landed and left.
    fn second(strangers: &mut Strangers, landings: u64, departures: u64, is_quiet: bool) -> u64 {
        strangers.left_of(Seen {
            landings: &counts(landings, 0),
            departures: &counts(departures, 0),
            passed: SECOND,
            is_quiet,
            is_whole: true,
        })
    }

    /// So many seconds without a plan, and then sixty with one, in each of which so many of those who were told land beside
    /// what comes anyway: how many are taken for them.
    fn taken_for_told(before: u64, quiet: (u64, u64), busy: (u64, u64), told_land: u64) -> u64 {
        let mut strangers = Strangers::default();
        for _ in 0..before {
            assert_eq!(second(&mut strangers, quiet.0, quiet.1, true), 0);
        }
        (0..60)
            .map(|_| second(&mut strangers, busy.0 + told_land, busy.1, false))
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

    /// The first windows are of a start: an agent that has seen two of them takes hardly anybody off.
    #[test]
    fn an_agent_that_just_began_takes_hardly_anybody_off() {
        let taken = taken_for_told(25, (2, 2), (0, 0), 2);
        assert!((80..=120).contains(&taken), "{taken}");
    }

    #[test]
    fn a_rate_that_is_over_owes_nothing() {
        let mut strangers = Strangers::default();
        for _ in 0..80 {
            second(&mut strangers, 9, 9, true);
        }
        // They end, and one who was told lands in ten seconds: after three windows nobody is hidden any more.
        let left: Vec<u64> = (0..60)
            .map(|at| second(&mut strangers, u64::from(at % 10 == 9), 0, false))
            .collect();
        assert_eq!(left.iter().sum::<u64>(), 3, "{left:?}");
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
                    landings: &counts(count, 0),
                    departures: &counts(count, 0),
                    passed: SECOND,
                    is_quiet: true,
                    is_whole,
                });
            }
        }
        let RememberedStrangers { departures, landings } = strangers.remembered();
        for window in departures.iter().chain(&landings).skip(1) {
            let rate: f64 = window.values().sum();
            assert!((1.6..=2.4).contains(&rate), "{departures:?} {landings:?}");
        }
    }

    /// Whoever is told comes straight back, and two a second land anyway, one of three of them elsewhere, by chance: that is no
    /// evidence, however long it goes on. Where those who are told land there too, it is seen at once.
    #[test]
    fn what_lands_elsewhere_anyway_is_no_evidence_and_what_lands_there_beside_it_is() {
        for (told_elsewhere, expected) in [(0, 0..=10), (2, 800..=1_200)] {
            let mut strangers = Strangers::default();
            // A third of two a second, by chance: another one each time, and the same ones in each run.
            let mut random = 1_u64;
            let mut elsewhere = || {
                let mut draw = || {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    u64::from((random >> 33).is_multiple_of(15))
                };
                (0..10).map(|_| draw()).sum::<u64>()
            };
            let look = |strangers: &mut Strangers, calls: u64, told: u64, is_quiet: bool| {
                let landings = counts(1, calls + told);
                strangers.left_of(Seen {
                    landings: &landings,
                    departures: &counts(1, calls),
                    passed: SECOND,
                    is_quiet,
                    is_whole: true,
                });
                landings
            };
            for _ in 0..80 {
                look(&mut strangers, elsewhere(), 0, true);
            }
            let evidence: u64 = (0..600)
                .map(|_| {
                    let landings = look(&mut strangers, elsewhere(), told_elsewhere, false);
                    strangers.evidence(&landings, &donors(), SECOND)
                })
                .sum();
            assert!(
                expected.contains(&evidence),
                "{told_elsewhere} a second elsewhere: {evidence}"
            );
        }
        // Nobody comes anyway: each is evidence.
        let mut strangers = Strangers::default();
        assert_eq!(strangers.evidence(&counts(7, 1), &donors(), SECOND), 1);
        assert!(strangers.hide(donors().iter(), &donors()).abs() < f64::EPSILON);
    }

    #[test]
    fn what_was_learned_outlives_the_process() {
        let mut strangers = Strangers::default();
        for _ in 0..80 {
            second(&mut strangers, 2, 2, true);
        }
        let mut next = Strangers::resumed(&strangers.remembered());
        assert_eq!(next.remembered(), strangers.remembered());
        assert!(second(&mut next, 2, 2, false) <= 1);
        // More windows than there may be, and what is no rate.
        let window = |rate: f64| BTreeMap::from([(ApiserverName::new("a"), rate)]);
        let landings: Vec<_> = (0..15).map(|rate| window(f64::from(rate))).collect();
        let odd = RememberedStrangers {
            departures: vec![window(f64::NAN), window(-1.0), window(1e308)],
            landings: landings.clone(),
        };
        let remembered = Strangers::resumed(&odd).remembered();
        assert_eq!(remembered.landings, landings[2..], "the newest");
        assert!(remembered.departures.iter().all(BTreeMap::is_empty), "{remembered:?}");
    }
}
