//! Landings beside what a choice would have made of them, and what the last of them are evidence of.
//!
//! Job: say whether hardly anybody lands elsewhere. Input: landings as looks show them.
//! Must never take one apiserver's landings, told a moment before those of another, for all there were.

use std::{collections::VecDeque, time::Duration};

use crate::ids::Timestamp;

/// When fewer than this part of those who should land elsewhere do, moving is in vain: those few come for reasons of their own.
/// It is far less than any balancer sends to the least of its apiservers, unless one starts slowly.
const HOPELESS: f64 = 0.3;

/// That is judged by the last landings, of which so many weigh as one each, and older ones half as much.
const ENOUGH: f64 = 120.0;

/// After it was judged so, what was seen weighs as so many landings: one good try is enough to go on.
const OLD: f64 = 30.0;

/// Where an even choice sends more than this part elsewhere, fewer weigh as much.
const EVEN: f64 = 1.0 / 3.0;

/// Landings, and what they would have been by a choice: who is a donor changes, and where somebody should have landed is
/// where that was so when he did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Landings {
    pub all: f64,
    /// Those of them that were elsewhere.
    pub elsewhere: f64,
    /// As many as an even choice would have sent elsewhere.
    pub even: f64,
    /// As many as the better of two chosen by chance would have.
    pub better_of_two: f64,
}

impl Landings {
    pub fn of(landed: u64, elsewhere: u64, even: f64) -> Self {
        let all = landed as f64;
        debug_assert!((0.0..1.0).contains(&even) && even > 0.0, "a part of {even}");
        Self {
            all,
            elsewhere: elsewhere as f64,
            even: even * all,
            better_of_two: (1.0 - (1.0 - even).powi(2)) * all,
        }
    }

    /// The same, weighing no more than so many.
    fn at_most(self, most: f64) -> Self {
        let part = (most / self.all.max(1.0)).min(1.0);
        Self {
            all: self.all * part,
            elsewhere: self.elsewhere * part,
            even: self.even * part,
            better_of_two: self.better_of_two * part,
        }
    }

    pub fn and(self, more: Self) -> Self {
        Self {
            all: self.all + more.all,
            elsewhere: self.elsewhere + more.elsewhere,
            even: self.even + more.even,
            better_of_two: self.better_of_two + more.better_of_two,
        }
    }
}

/// What the last landings say. The snapshots of two apiservers are of two instants: of those who landed a moment ago only the
/// donors' may be heard of, so these count when those elsewhere of the same moment are known too.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Evidence {
    /// What is older than twice the time by which one is heard of after the other.
    old: Landings,
    lately: VecDeque<(Timestamp, Landings)>,
    /// That time.
    heard: Duration,
}

impl Evidence {
    /// So many landed; those elsewhere are heard of at most `heard` later than the others of the same moment.
    pub fn add(&mut self, new: Landings, heard: Duration, now: Timestamp) {
        self.heard = heard;
        self.lately.push_back((now, new));
        let is_old = |at: Timestamp| now.since(at) >= 2 * heard;
        while let Some((_, landings)) = self.lately.pop_front_if(|(at, _)| is_old(*at)) {
            self.old = self.old.and(landings);
        }
        if self.old.all >= 2.0 * ENOUGH {
            self.old = self.old.at_most(ENOUGH);
        }
    }

    /// Whether hardly anybody lands elsewhere. Chance makes a few less than are expected.
    pub fn is_hopeless(&self, now: Timestamp) -> bool {
        let heard = |at: Timestamp| now.since(at) >= self.heard;
        let known = self.lately.iter().filter(|(at, _)| heard(*at));
        let even = known.fold(self.old.even, |sum, (_, landings)| sum + landings.even);
        let lately = self.lately.iter().map(|(_, landings)| landings.elsewhere);
        let elsewhere = self.old.elsewhere + lately.sum::<f64>();
        elsewhere + 2.0 * (elsewhere + 1.0).sqrt() < HOPELESS * even
    }

    /// It was judged by. Where there is one donor, the next try is of one or two, and the old ones weigh as much less.
    pub fn was_used(&mut self) {
        let all = self
            .lately
            .drain(..)
            .fold(self.old, |sum, (_, landings)| sum.and(landings));
        let even = all.even / all.all.max(1.0);
        self.old = all.at_most(OLD * (EVEN / even.max(EVEN)));
    }

    /// It says nothing any more.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEARD: Duration = Duration::from_secs(6);

    fn at(ms: u64) -> Timestamp {
        Timestamp::from_millis(1_000_000 + ms)
    }

    /// So many a second, told by two donors and, `late` later, by the one that gets a third of them or what is said.
    fn flow(evidence: &mut Evidence, a_second: u64, part_elsewhere: f64, late: u64, seconds: u64) -> Vec<bool> {
        let mut judged = Vec::new();
        for ms in (0..seconds * 1_000).step_by(250) {
            let here = (a_second as f64 * (1.0 - part_elsewhere) / 4.0) as u64;
            let elsewhere = (a_second as f64 * part_elsewhere / 4.0) as u64;
            evidence.add(Landings::of(here, 0, 1.0 / 3.0), HEARD, at(ms));
            judged.push(evidence.is_hopeless(at(ms)));
            if ms >= late && elsewhere > 0 {
                evidence.add(Landings::of(elsewhere, elsewhere, 1.0 / 3.0), HEARD, at(ms));
            }
        }
        judged
    }

    #[test]
    fn however_fast_they_land_those_elsewhere_are_waited_for() {
        for a_second in [12, 120, 1_200, 12_000] {
            for late in [0, 1_000, 5_750] {
                let judged = flow(&mut Evidence::default(), a_second, 1.0 / 3.0, late, 30);
                assert!(
                    !judged.contains(&true),
                    "{a_second} a second, {late} ms late: {judged:?}"
                );
            }
        }
    }

    #[test]
    fn however_fast_they_come_back_it_is_seen_in_half_a_minute() {
        // With strangers who land elsewhere beside them.
        for (a_second, strangers) in [(12, 0.0), (40, 0.0), (120, 0.03), (12_000, 0.03)] {
            let judged = flow(&mut Evidence::default(), a_second, strangers, 0, 30);
            assert_eq!(judged.last(), Some(&true), "{a_second} a second: {judged:?}");
        }
    }

    /// However many there are: a probe finds out with some certainty, and is of one where nearly all land elsewhere.
    #[test]
    fn one_good_try_is_enough_to_go_on() {
        for (even, probe) in [(0.2, 9), (1.0 / 3.0, 5), (0.5, 3), (2.0 / 3.0, 2), (0.9, 1), (0.97, 1)] {
            let mut evidence = Evidence::default();
            for second in 0..60 {
                evidence.add(Landings::of(10, 0, even), HEARD, at(1_000 * second));
            }
            assert!(evidence.is_hopeless(at(60_000)));
            evidence.was_used();
            evidence.add(Landings::of(probe, probe, even), HEARD, at(120_000));
            assert!(!evidence.is_hopeless(at(120_000)), "{even}");
            assert!(!evidence.is_hopeless(at(130_000)), "{even}, later");
        }
    }
}
