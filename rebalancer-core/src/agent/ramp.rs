//! Probe, then grow: how many may be told in one plan.
//!
//! Job: begin with a few, tell four times as many each time somebody is seen to land elsewhere, and wait longer each time
//! nobody does. Input: what became of plans, and landings elsewhere. Output: the largest next plan, or how long to wait.
//! Must never cost much where moving does not help, nor give up for good: the load balancer may be another one tomorrow.
//!
//! An apiserver that came back a moment ago may not be in the load balancer yet: health checks take 15 to 150 s to admit
//! one. For that long the waits stay short, since it is expected any moment; afterwards they double from there to hours.
//!
//! And one that was admitted a moment ago may be started slowly: it gets fewer than its part until its weight has grown, and
//! whoever is told meanwhile comes straight back. So for as long, when clearly fewer land elsewhere than did before, or would
//! by an even choice, plans are a few seconds apart and no larger than what was taken lately and a little more.

use std::{collections::VecDeque, time::Duration};

use super::memory::RememberedTries;
use crate::ids::Timestamp;

/// The wait after the first plan in vain.
const FIRST_WAIT: Duration = Duration::from_secs(5);

/// The longest wait while an apiserver may only not be admitted yet.
const FRESH_WAIT: Duration = Duration::from_secs(12);

/// For so long after an apiserver came or went the load balancer may not know it yet.
const FRESH: Duration = Duration::from_secs(160);

/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(12 * 60 * 60);

/// From this wait on moving is called futile.
const FUTILE_WAIT: Duration = Duration::from_secs(120);

/// A plan after a good one is so many times as large; eight times was tried, and is no faster.
const GROWTH: usize = 4;

/// Once somebody was seen to land elsewhere, it takes so many times the landings of a probe without one to doubt it again.
const DOUBT: u64 = 3;

/// So many landings elsewhere are no accident: what was in vain before is forgotten.
const CERTAIN: u64 = 3;

/// When fewer than this part of those who should land elsewhere do, it is taken for a slow start.
const SLOW: f64 = 0.7;

/// And when so many do again, for its end.
const FAST: f64 = 0.85;

/// While an apiserver starts slowly, so many times as many are told as it was seen to take.
const CAUTION: f64 = 1.4;

/// What landed within this time is looked at for that.
const WINDOW: Duration = Duration::from_secs(4);

/// So many are all, but for some who come anyway.
const ALL: f64 = 0.95;

/// Fewer landings say nothing of it.
const FEW: f64 = 10.0;

/// More than this part of what the better of two chosen by chance sends elsewhere, while an apiserver starts slowly, is sent by
/// a balancer that seeks the emptiest.
const EMPTIEST: f64 = 0.9;

/// And a slow start is not over before so many landed: by then it is seen whether the balancer seeks the emptiest.
const ENOUGH: f64 = 40.0;

/// And so long after each plan the next one is told: those who were told are seen to land by then.
const PAUSE: Duration = Duration::from_secs(3);

/// What became of a plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// GOAWAYs of all apiservers while it went on.
    pub told: u64,
    /// Clients that landed anywhere meanwhile.
    pub landed: u64,
    /// Those of them that landed on an apiserver that is no donor.
    pub elsewhere: u64,
}

/// Those who tell, as a look shows them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Tellers {
    /// Which part of those who are told an even choice sends to apiservers that are no donors.
    pub even: f64,
    /// This agent's part of what there is to tell.
    pub part: f64,
    /// How many it tells to find out.
    pub probe: usize,
}

/// What the next plan may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// A few, to find out.
    Probe,
    /// So many.
    UpTo(usize),
    /// Nothing before that time.
    After(Timestamp),
}

/// How far this agent trusts that moving helps.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Ramp {
    next: Next,
    /// The last wait.
    wait: Duration,
    /// Told in vain since somebody landed elsewhere.
    in_vain: u64,
    /// Landings in a row of which none was elsewhere, in plans that were too small to say anything.
    unheard: u64,
    /// When the set of apiservers last changed.
    since: Timestamp,
    /// When somebody first landed elsewhere since then.
    admitted: Option<Timestamp>,
    /// Whether all who landed did so elsewhere, once since then: the balancer seeks the emptiest.
    takes_all: bool,
    /// What landed lately: when, how many, and how many of them elsewhere.
    window: VecDeque<(Timestamp, u64, u64)>,
    /// Whether an apiserver seems to start slowly.
    is_slow: bool,
    /// What landed since it does: how many, and how many of them elsewhere. `None` while those land who were told before that
    /// was seen: they say nothing of what it takes.
    meanwhile: Option<(f64, f64)>,
    /// Who told, at the last landing.
    tellers: Tellers,
}

impl Ramp {
    /// Nothing is known of the load balancer.
    pub fn new(now: Timestamp) -> Self {
        Self {
            next: Next::Probe,
            wait: Duration::ZERO,
            in_vain: 0,
            unheard: 0,
            since: now,
            admitted: None,
            takes_all: false,
            window: VecDeque::new(),
            is_slow: false,
            meanwhile: None,
            tellers: Tellers::default(),
        }
    }

    /// Goes on where another process was, `down` before now: what is left of its wait, the wait, who was told in vain; how
    /// many it would have told, and an apiserver that starts slowly, where that is not long ago.
    pub fn resumed(tries: &RememberedTries, down: Duration, now: Timestamp) -> Self {
        let left = tries.left.saturating_sub(down).min(tries.wait.max(PAUSE));
        let admitted = tries
            .admitted
            .map(|ago| ago.saturating_add(down))
            .filter(|ago| *ago < FRESH);
        let is_recent = down < FRESH;
        let next = if left > Duration::ZERO {
            Next::After(now + left)
        } else if is_recent && tries.limit > 0 && !(tries.is_slow && admitted.is_some()) {
            Next::UpTo(tries.limit)
        } else {
            Next::Probe
        };
        Self {
            next,
            wait: tries.wait.min(LONGEST_WAIT),
            in_vain: tries.in_vain,
            admitted: admitted.map(|ago| now.back(ago)),
            takes_all: tries.takes_all && is_recent,
            is_slow: tries.is_slow && admitted.is_some(),
            ..Self::new(now)
        }
    }

    /// What another process needs to go on.
    pub fn remembered(&self, now: Timestamp) -> RememberedTries {
        RememberedTries {
            wait: self.wait,
            left: self.ends().map_or(Duration::ZERO, |until| until.since(now)),
            in_vain: self.in_vain,
            limit: match self.next {
                Next::UpTo(limit) => limit,
                Next::Probe | Next::After(_) => 0,
            },
            admitted: self.admitted.map(|at| now.since(at)),
            takes_all: self.takes_all,
            is_slow: self.is_slow,
        }
    }

    /// The apiservers are others now: what was tried says nothing.
    pub fn renew(&mut self, now: Timestamp) {
        *self = Self::new(now);
    }

    /// So many of those who were told landed since the last look, here or elsewhere, and so many of them on apiservers that
    /// are no donors. Returns whether more are not to be told now: an apiserver is seen to start slowly.
    pub fn landed(&mut self, landed: u64, elsewhere: u64, tellers: Tellers, now: Timestamp) -> bool {
        if landed == 0 {
            return false;
        }
        self.tellers = tellers;
        if elsewhere > 0 {
            self.admitted.get_or_insert(now);
            self.helped(elsewhere, tellers.probe);
        }
        self.notice(landed, elsewhere, now)
    }

    fn helped(&mut self, elsewhere: u64, probe: usize) {
        if elsewhere >= CERTAIN {
            self.wait = Duration::ZERO;
            self.in_vain = 0;
        }
        // Who starts slowly takes somebody now and then: that ends no wait.
        if !matches!(self.next, Next::UpTo(_)) && !self.is_slow {
            self.next = Next::UpTo(probe * GROWTH);
        }
    }

    /// A plan of this agent that told `told` has settled; a probe of all donors together would have told `probe`. Returns
    /// whether it was in vain.
    pub fn settled(&mut self, told: usize, seen: Seen, probe: u64, now: Timestamp) -> bool {
        if told == 0 || seen.landed == 0 {
            // Nobody has landed anywhere: that says nothing.
            return false;
        }
        if seen.elsewhere > 0 {
            self.unheard = 0;
            let before = match self.next {
                Next::UpTo(limit) => limit,
                Next::Probe | Next::After(_) => 0,
            };
            self.next = if self.is_slow {
                Next::After(now + PAUSE)
            } else {
                Next::UpTo(before.max(told * GROWTH))
            };
            return false;
        }
        self.unheard += seen.landed;
        let is_known = self.is_slow || matches!(self.next, Next::UpTo(_));
        if is_known && self.unheard < DOUBT * probe {
            // So few may all land on donors by chance.
            return false;
        }
        self.unheard = 0;
        self.is_slow = false;
        self.in_vain += told as u64;
        let longest = if now.since(self.since) < FRESH {
            FRESH_WAIT
        } else {
            LONGEST_WAIT
        };
        self.wait = (self.wait * 2).max(FIRST_WAIT).min(longest.max(self.wait));
        self.next = Next::After(now + self.wait);
        true
    }

    /// What landed since the last look: whether an apiserver is seen by it to start slowly, which was not known before.
    fn notice(&mut self, landed: u64, elsewhere: u64, now: Timestamp) -> bool {
        self.window.push_back((now, landed, elsewhere));
        while self.window.front().is_some_and(|(at, ..)| now.since(*at) >= WINDOW) {
            self.window.pop_front();
        }
        if let Some((all, there)) = &mut self.meanwhile {
            *all += landed as f64;
            *there += elsewhere as f64;
        }
        let (landed, elsewhere) = self.lately();
        if landed >= FEW && elsewhere >= ALL * landed || self.seeks_the_emptiest() {
            self.takes_all = true;
        }
        let expected = self.expected();
        if self.is_slow {
            let is_enough = landed >= FEW && self.meanwhile.is_some_and(|(all, _)| all >= ENOUGH);
            let is_over = is_enough && elsewhere >= FAST * expected * landed;
            self.is_slow = !is_over && self.is_fresh(now);
            return false;
        }
        // Snapshots are of different instants: while the rate changes, what is seen of it is askew.
        let is_even = (2.0..=3.0).contains(&(5.0 * self.older(now) / landed));
        // Chance makes a few less.
        let is_short = elsewhere + 2.0 * (elsewhere + 1.0).sqrt() < SLOW * expected * landed;
        self.is_slow = is_short && is_even && self.is_fresh(now) && matches!(self.next, Next::UpTo(_));
        if self.is_slow {
            self.meanwhile = None;
            self.next = Next::After(now + PAUSE);
        }
        self.is_slow
    }

    /// Whether more landed elsewhere while few were told than an even choice or the better of two sends there, though an
    /// apiserver starts slowly: then it gets as many as it takes, and more told are no more taken.
    fn seeks_the_emptiest(&self) -> bool {
        let Some((landed, elsewhere)) = self.meanwhile.filter(|_| self.is_slow) else {
            return false;
        };
        let better_of_two = 1.0 - (1.0 - self.tellers.even).powi(2);
        landed >= 2.0 * FEW && elsewhere - elsewhere.sqrt() > EMPTIEST * better_of_two * landed
    }

    /// Landings in the window, and those of them that were elsewhere.
    fn lately(&self) -> (f64, f64) {
        let sum = |of: fn(&(Timestamp, u64, u64)) -> u64| self.window.iter().map(of).sum::<u64>() as f64;
        (sum(|(_, landed, _)| *landed), sum(|(.., elsewhere)| *elsewhere))
    }

    /// Landings in the older half of the window.
    fn older(&self, now: Timestamp) -> f64 {
        let is_older = |at: Timestamp| now.since(at) >= WINDOW / 2;
        let older = self.window.iter().filter(|(at, ..)| is_older(*at));
        older.map(|(_, landed, _)| *landed).sum::<u64>() as f64
    }

    /// The share of landings that should be elsewhere: all where that was so before, else an even choice's.
    fn expected(&self) -> f64 {
        if self.takes_all {
            1.0
        } else {
            self.tellers.even.max(0.01)
        }
    }

    fn is_fresh(&self, now: Timestamp) -> bool {
        self.admitted.is_some_and(|at| now.since(at) < FRESH)
    }

    /// Time passes: whether a wait has just ended. Where an apiserver starts slowly, what comes next is this agent's part of
    /// what that took lately, and some more.
    pub fn look(&mut self, now: Timestamp) -> bool {
        let over = matches!(self.next, Next::After(until) if now >= until);
        if over {
            self.next = if self.is_slow {
                // The first after it was seen shows what kind of balancer it is: as many as one is sure to get that seeks the
                // emptiest, which is fewer than another one needs.
                let expected = if self.meanwhile.is_none() { 1.0 } else { self.expected() };
                self.meanwhile.get_or_insert_default();
                let (_, elsewhere) = self.lately();
                Next::UpTo((CAUTION * elsewhere / expected * self.tellers.part).ceil() as usize)
            } else {
                Next::Probe
            };
        }
        over
    }

    /// Connections that the next plan may have at most, when a probe has `probe`; or what is left of the wait.
    pub fn limit(&self, probe: usize, now: Timestamp) -> Result<usize, Duration> {
        match self.next {
            Next::Probe => Ok(probe),
            Next::UpTo(limit) => Ok(limit.max(probe)),
            Next::After(until) => Err(until.since(now)),
        }
    }

    /// Whether the next plan only finds out.
    pub fn is_probe(&self) -> bool {
        self.next == Next::Probe
    }

    /// When a wait ends, if one is on.
    pub fn ends(&self) -> Option<Timestamp> {
        match self.next {
            Next::After(until) => Some(until),
            Next::Probe | Next::UpTo(_) => None,
        }
    }

    /// Whether it waits for an apiserver that starts slowly.
    pub fn is_slow(&self) -> bool {
        self.is_slow
    }

    /// Whether so much was tried that moving is taken for futile.
    pub fn is_futile(&self) -> bool {
        self.wait >= FUTILE_WAIT
    }

    /// The last wait, and clients told in vain.
    pub fn tried(&self) -> (Duration, u64) {
        (self.wait, self.in_vain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_millis(seconds * 1_000)
    }

    /// Of two donors of three.
    const PROBE: u64 = 5;
    const TELLERS: Tellers = Tellers {
        even: 1.0 / 3.0,
        part: 0.5,
        probe: 3,
    };

    fn seen(told: u64, elsewhere: u64) -> Seen {
        Seen {
            told,
            landed: told,
            elsewhere,
        }
    }

    const VAIN: Seen = Seen {
        told: 6,
        landed: 6,
        elsewhere: 0,
    };

    #[test]
    fn each_plan_that_helps_makes_the_next_four_times_as_large() {
        let mut ramp = Ramp::new(at(0));
        assert_eq!(ramp.limit(3, at(0)), Ok(3));
        for (told, next) in [(3, 12), (12, 48), (48, 192), (5, 192)] {
            assert!(!ramp.settled(told, seen(told as u64, 1 + told as u64 / 3), PROBE, at(1)));
            assert_eq!(ramp.limit(3, at(1)), Ok(next), "after {told}");
        }
        assert!(!ramp.settled(6, VAIN, PROBE, at(2)), "six may all come back by chance");
        assert!(!ramp.settled(6, VAIN, PROBE, at(2)));
        assert!(ramp.settled(6, VAIN, PROBE, at(2)), "and what is no chance ends it");
        assert_eq!(ramp.limit(3, at(2)), Err(FIRST_WAIT));
    }

    #[test]
    fn waits_stay_short_while_an_apiserver_may_not_be_admitted_and_double_to_hours_then() {
        let mut ramp = Ramp::new(at(0));
        let mut now = at(0);
        let mut waits = Vec::new();
        for _ in 0..31 {
            assert!(ramp.settled(3, VAIN, PROBE, now));
            let left = ramp.limit(3, now).expect_err("it waits");
            waits.push(left.as_secs());
            assert_eq!(ramp.is_futile(), left >= FUTILE_WAIT);
            assert!(!ramp.look(now + left / 2));
            now = now + left;
            assert!(ramp.look(now) && ramp.is_probe());
        }
        assert_eq!(waits[..15], [&[5, 10][..], &[12; 13]].concat(), "{waits:?}");
        assert!(
            waits[14..]
                .windows(2)
                .all(|pair| pair[1] == (pair[0] * 2).min(12 * 3_600)),
            "{waits:?}"
        );
        assert_eq!(waits.last(), Some(&(12 * 3_600)));
    }

    #[test]
    fn who_lands_elsewhere_ends_every_wait_and_a_few_do_not_make_the_past_forgotten() {
        let mut ramp = Ramp::new(at(0));
        ramp.settled(3, VAIN, PROBE, at(0));
        ramp.settled(3, VAIN, PROBE, at(1_000));
        let (wait, in_vain) = ramp.tried();
        assert_eq!((wait, in_vain), (Duration::from_secs(10), 6));
        ramp.landed(1, 1, TELLERS, at(1_001));
        assert_eq!((ramp.limit(3, at(1_001)), ramp.tried()), (Ok(12), (wait, in_vain)));
        ramp.landed(CERTAIN, CERTAIN, TELLERS, at(1_002));
        assert_eq!(ramp.tried(), (Duration::ZERO, 0));
    }

    /// Leastconn with a slow start: the first all land elsewhere, then only as many as the weight has grown for.
    #[test]
    fn an_apiserver_that_starts_slowly_gets_what_it_takes_and_little_more() {
        let mut ramp = Ramp::new(at(0));
        assert!(!ramp.landed(5, 5, TELLERS, at(1)));
        ramp.settled(3, seen(5, 5), PROBE, at(1));
        assert!(!ramp.landed(24, 24, TELLERS, at(4)));
        ramp.settled(12, seen(24, 24), PROBE, at(4));
        assert_eq!(ramp.limit(3, at(4)), Ok(48), "all of them land elsewhere");
        assert!(!ramp.landed(48, 10, TELLERS, at(7)), "one look says nothing");
        assert!(ramp.landed(48, 10, TELLERS, at(10)), "more are not to be told now");
        ramp.settled(48, seen(96, 20), PROBE, at(11));
        assert_eq!(ramp.limit(3, at(11)), Err(PAUSE));
        ramp.landed(6, 4, TELLERS, at(12));
        assert_eq!(ramp.limit(3, at(12)), Err(Duration::from_secs(2)), "that ends no wait");
        assert!(ramp.look(at(14)));
        let Ok(next) = ramp.limit(3, at(14)) else {
            panic!("the wait is over");
        };
        assert!(
            (9..=11).contains(&next),
            "{next}: its half of 14 taken in five seconds, and some more"
        );
        // Nearly all land elsewhere again: it has started.
        for second in [20, 21] {
            ramp.landed(34, 34, TELLERS, at(second));
        }
        ramp.settled(17, seen(34, 34), PROBE, at(21));
        assert_eq!(ramp.limit(3, at(21)), Ok(4 * 17));
        // Long after it was admitted, fewer are no slow start.
        assert!(!ramp.landed(96, 20, TELLERS, at(200)));
    }

    /// A balancer that seeks the emptiest is known by the first few that are told while one starts slowly; and another one not.
    #[test]
    fn what_kind_of_balancer_starts_one_slowly_is_seen() {
        for (kind, elsewhere, seeks) in [
            ("leastconn", 28, true),
            ("the better of two", 21, false),
            ("in turn", 8, false),
        ] {
            let mut ramp = Ramp::new(at(0));
            ramp.landed(5, 2, TELLERS, at(1));
            ramp.settled(12, seen(5, 2), PROBE, at(1));
            for second in [6, 8] {
                ramp.landed(90, 14, TELLERS, at(second));
            }
            assert!(ramp.is_slow() && !ramp.takes_all, "{kind}: {ramp:?}");
            // Who was told before that was seen says nothing.
            ramp.landed(60, 60, TELLERS, at(10));
            assert!(ramp.is_slow(), "{kind}");
            assert!(ramp.look(at(11)));
            for _ in 0..2 {
                ramp.landed(20, elsewhere / 2, TELLERS, at(13));
            }
            assert_eq!(ramp.takes_all, seeks, "{kind}: {ramp:?}");
        }
    }

    /// In turn, or by chance, a third lands elsewhere: that is what is expected, however lucky the first were.
    #[test]
    fn an_even_choice_is_no_slow_start() {
        let mut ramp = Ramp::new(at(0));
        for (second, told, landed, elsewhere) in [(1, 3, 5, 4), (11, 12, 24, 5), (21, 48, 90, 22), (31, 192, 380, 110)]
        {
            for later in [0, 3] {
                let slow = ramp.landed(landed / 2, elsewhere / 2, TELLERS, at(second + later));
                assert!(!slow, "{elsewhere} of {landed}");
            }
            ramp.settled(told, seen(landed, elsewhere), PROBE, at(second));
            assert_eq!(ramp.limit(3, at(second)), Ok(4 * told), "{elsewhere} of {landed}");
        }
    }

    #[test]
    fn nobody_who_has_landed_yet_says_nothing() {
        let mut ramp = Ramp::new(at(0));
        assert!(!ramp.settled(
            3,
            Seen {
                told: 3,
                ..Seen::default()
            },
            PROBE,
            at(10)
        ));
        assert_eq!(ramp.limit(3, at(10)), Ok(3));
    }

    /// What was seen of the balancer is not found out again, unless it is long ago.
    #[test]
    fn a_restart_goes_on_with_as_many_as_before_and_knows_a_slow_start() {
        let mut ramp = Ramp::new(at(0));
        ramp.landed(5, 5, TELLERS, at(1));
        ramp.settled(12, seen(24, 24), PROBE, at(4));
        let next = Ramp::resumed(&ramp.remembered(at(5)), Duration::from_secs(2), at(7));
        assert_eq!(next.limit(3, at(7)), Ok(48));
        let next = Ramp::resumed(&ramp.remembered(at(5)), FRESH, at(170));
        assert!(next.is_probe() && !next.is_slow(), "{next:?}");
        ramp.landed(24, 24, TELLERS, at(5));
        ramp.landed(48, 10, TELLERS, at(6));
        assert!(ramp.landed(48, 10, TELLERS, at(8)) && ramp.is_slow(), "{ramp:?}");
        let next = Ramp::resumed(&ramp.remembered(at(8)), Duration::from_secs(1), at(9));
        assert!(next.is_slow() && next.takes_all, "{next:?}");
        assert_eq!(next.limit(3, at(9)), Err(Duration::from_secs(2)));
    }

    #[test]
    fn a_restart_goes_on_with_what_is_left_of_a_wait() {
        let tries = RememberedTries {
            wait: Duration::from_secs(3_600),
            left: Duration::from_secs(9),
            in_vain: 40,
            ..RememberedTries::default()
        };
        let mut ramp = Ramp::resumed(&tries, Duration::from_secs(2), at(100));
        assert_eq!(ramp.limit(3, at(100)), Err(Duration::from_secs(7)));
        assert!(ramp.look(at(107)) && ramp.is_futile());
        ramp.settled(3, VAIN, PROBE, at(108));
        assert_eq!(
            ramp.tried(),
            (Duration::from_secs(3_600), 43),
            "short waits while it is fresh never shorten it"
        );
    }
}
