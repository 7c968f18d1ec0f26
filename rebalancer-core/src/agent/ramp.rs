//! Probe, then grow: how many may be told in one plan.
//!
//! Job: begin with a few, tell four times as many each time somebody is seen to land elsewhere, and wait longer each time
//! nobody does. Input: what became of plans, and landings elsewhere. Output: the largest next plan, or how long to wait.
//! Must never cost much where moving does not help, nor give up for good: the load balancer may be another one tomorrow.
//!
//! An apiserver that came back a moment ago may not be in the load balancer yet: health checks take 15 to 150 s to admit
//! one. For that long the waits stay short, since it is expected any moment; afterwards they double from there to hours.

use std::time::Duration;

use crate::ids::Timestamp;

/// The wait after the first plan in vain.
const FIRST_WAIT: Duration = Duration::from_secs(5);

/// The longest wait while an apiserver may only not be admitted yet.
const FRESH_WAIT: Duration = Duration::from_secs(14);

/// For so long after an apiserver came or went the load balancer may not know it yet.
const FRESH: Duration = Duration::from_secs(160);

/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(12 * 60 * 60);

/// From this wait on moving is called futile.
const FUTILE_WAIT: Duration = Duration::from_secs(120);

/// A plan after a good one is so many times as large.
const GROWTH: usize = 4;

/// Once somebody was seen to land elsewhere, it takes so many times the landings of a probe without one to doubt it again.
const DOUBT: u64 = 3;

/// So many landings elsewhere are no accident: what was in vain before is forgotten.
const CERTAIN: u64 = 3;

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
        }
    }

    /// Goes on where another process was: what is left of its wait, the wait, and who was told in vain.
    pub fn resumed(left: Duration, wait: Duration, in_vain: u64, now: Timestamp) -> Self {
        Self {
            next: if left > Duration::ZERO {
                Next::After(now + left)
            } else {
                Next::Probe
            },
            wait: wait.min(LONGEST_WAIT),
            in_vain,
            unheard: 0,
            since: now,
        }
    }

    /// The apiservers are others now: what was tried says nothing.
    pub fn renew(&mut self, now: Timestamp) {
        *self = Self::new(now);
    }

    /// Somebody who was told, here or elsewhere, landed on an apiserver that is no donor; `probe` is what a probe is here.
    pub fn helped(&mut self, elsewhere: u64, probe: usize) {
        if elsewhere == 0 {
            return;
        }
        if elsewhere >= CERTAIN {
            self.wait = Duration::ZERO;
            self.in_vain = 0;
        }
        if !matches!(self.next, Next::UpTo(_)) {
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
            self.next = Next::UpTo(before.max(told * GROWTH));
            return false;
        }
        self.unheard += seen.landed;
        let is_known = matches!(self.next, Next::UpTo(_));
        if is_known && self.unheard < DOUBT * probe {
            // So few may all land on donors by chance.
            return false;
        }
        self.unheard = 0;
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

    /// Time passes: whether a wait has just ended.
    pub fn look(&mut self, now: Timestamp) -> bool {
        let over = matches!(self.next, Next::After(until) if now >= until);
        if over {
            self.next = Next::Probe;
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
        for _ in 0..27 {
            assert!(ramp.settled(3, VAIN, PROBE, now));
            let left = ramp.limit(3, now).expect_err("it waits");
            waits.push(left.as_secs());
            assert_eq!(ramp.is_futile(), left >= FUTILE_WAIT);
            assert!(!ramp.look(now + left / 2));
            now = now + left;
            assert!(ramp.look(now) && ramp.is_probe());
        }
        assert_eq!(waits[..13], [&[5, 10][..], &[14; 11]].concat(), "{waits:?}");
        assert!(
            waits[12..]
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
        ramp.helped(1, 3);
        assert_eq!((ramp.limit(3, at(1_001)), ramp.tried()), (Ok(12), (wait, in_vain)));
        ramp.helped(CERTAIN, 3);
        assert_eq!(ramp.tried(), (Duration::ZERO, 0));
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

    #[test]
    fn a_restart_goes_on_with_what_is_left_of_a_wait() {
        let mut ramp = Ramp::resumed(Duration::from_secs(7), Duration::from_secs(3_600), 40, at(100));
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
