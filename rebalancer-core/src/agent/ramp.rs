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

use super::{
    landings::{Evidence, Landings},
    memory::RememberedTries,
};
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

/// What others tell so long after a wait began is another try than the one before it.
const SAME_TRY: Duration = Duration::from_secs(30);

/// A plan after a good one is so many times as large; eight times was tried, and is no faster.
const GROWTH: usize = 4;

/// Once somebody was seen to land elsewhere, it takes so many times the landings of a probe without one to doubt it again.
const DOUBT: u64 = 3;

/// A snapshot tells a landing at most so long after it counts. It counts at an age that each apiserver's agent learns, up to
/// an interval; so those that are elsewhere may be seen as much later than others, and for so long nothing is doubted.
const TOLD: Duration = Duration::from_secs(1);

/// Landings that are so long ago belong to another rebalancing. Where loads are measured, plans are some looks apart.
const LONG_AGO: Duration = Duration::from_secs(60);

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

/// Landings of those who were told, since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Landed {
    /// Here or elsewhere.
    pub landed: u64,
    /// On apiservers that are no donors.
    pub elsewhere: u64,
    /// Those of them that are evidence that whoever is told lands there.
    pub evidence: u64,
}

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
    /// The longest time from one apiserver's landings until those of the same moment count on another.
    pub interval: Duration,
}

/// What is known by now to have been in vain, of all apiservers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Vain {
    /// GOAWAYs.
    pub told: u64,
    /// Clients that landed, all on donors.
    pub landed: u64,
}

/// Landings since one was elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Unheard {
    /// When the first of them was seen.
    since: Timestamp,
    /// And the last.
    last: Timestamp,
    landed: u64,
    /// Told by plans that settled meanwhile and said nothing: by this agent, and by all.
    told: u64,
    told_by_all: u64,
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
    /// Landings that were evidence since a plan was in vain.
    helped: u64,
    unheard: Option<Unheard>,
    /// Until then an apiserver that came may not be admitted yet.
    fresh_until: Timestamp,
    /// Until then one that was admitted may start slowly.
    slow_until: Option<Timestamp>,
    /// Whether all who landed did so elsewhere, once since then: the balancer seeks the emptiest.
    takes_all: bool,
    /// What landed lately, and when.
    window: VecDeque<(Timestamp, Landings)>,
    /// Whether an apiserver seems to start slowly.
    is_slow: bool,
    /// What landed since it does. `None` while those land who were told before that was seen: they say nothing of what it
    /// takes.
    meanwhile: Option<Landings>,
    /// Who told, at the last landing.
    tellers: Tellers,
    /// What landed while no apiserver was seen to start slowly.
    evidence: Evidence,
}

impl Ramp {
    /// Nothing is known of the load balancer.
    pub fn new(now: Timestamp) -> Self {
        Self {
            next: Next::Probe,
            wait: Duration::ZERO,
            in_vain: 0,
            helped: 0,
            unheard: None,
            fresh_until: now + FRESH,
            slow_until: None,
            takes_all: false,
            window: VecDeque::new(),
            is_slow: false,
            meanwhile: None,
            tellers: Tellers::default(),
            evidence: Evidence::default(),
        }
    }

    /// Goes on where another process was, `down` before now: what is left of its wait, the wait, who was told in vain; how
    /// many it would have told, and an apiserver that starts slowly, where that is not long ago.
    pub fn resumed(tries: &RememberedTries, down: Duration, now: Timestamp) -> Self {
        let left = tries.left.saturating_sub(down).min(tries.wait.max(PAUSE));
        let left_of_fresh = |ago: Duration| FRESH.saturating_sub(ago.saturating_add(down));
        // One that was admitted long ago starts slowly no more, whoever lands on it next; whoever was away for long knows nothing of
        // what was admitted meanwhile.
        let slow_left = tries.admitted.map(left_of_fresh).filter(|_| down < FRESH);
        let may_be_slow = slow_left.is_some_and(|left| !left.is_zero());
        let is_recent = down < FRESH;
        let next = if left > Duration::ZERO {
            Next::After(now + left)
        } else if is_recent && tries.limit > 0 && !(tries.is_slow && may_be_slow) {
            Next::UpTo(tries.limit)
        } else {
            Next::Probe
        };
        Self {
            next,
            wait: tries.wait.min(LONGEST_WAIT),
            in_vain: tries.in_vain,
            // Who is started again and again must not take the load balancer for one that is slow to admit for ever.
            fresh_until: now + tries.changed.map_or(FRESH, left_of_fresh),
            slow_until: slow_left.map(|left| now + left),
            takes_all: tries.takes_all && is_recent,
            is_slow: tries.is_slow && may_be_slow,
            ..Self::new(now)
        }
    }

    /// What another process needs to go on. A probe that told so many and has not settled would have to be told again: the next
    /// process takes it for one in vain, until somebody lands elsewhere.
    pub fn remembered(&self, told: usize, now: Timestamp) -> RememberedTries {
        let probed = told > 0 && self.next == Next::Probe;
        let wait = if probed { self.next_wait(now) } else { self.wait };
        let left = self.ends().map_or(Duration::ZERO, |until| until.since(now));
        let ago = |until: Timestamp| FRESH.saturating_sub(until.since(now));
        RememberedTries {
            wait,
            left: if probed { wait } else { left },
            in_vain: self.in_vain + if probed { told as u64 } else { 0 },
            limit: match self.next {
                Next::UpTo(limit) => limit,
                Next::Probe | Next::After(_) => 0,
            },
            changed: Some(ago(self.fresh_until)),
            admitted: self.slow_until.map(ago),
            takes_all: self.takes_all,
            is_slow: self.is_slow,
        }
    }

    /// The apiservers are others now: what was tried says nothing.
    pub fn renew(&mut self, now: Timestamp) {
        *self = Self::new(now);
    }

    /// So many of those who were told landed since the last look, here or elsewhere, and so many of them on apiservers that
    /// are no donors, of whom so many are evidence that whoever is told lands there. Returns whether more are not to be told now:
    /// an apiserver is seen to start slowly.
    pub fn landed(&mut self, seen: Landed, tellers: Tellers, now: Timestamp) -> bool {
        let Landed {
            landed,
            elsewhere,
            evidence,
        } = seen;
        if landed == 0 {
            return false;
        }
        self.tellers = tellers;
        self.evidence
            .add(Landings::of(landed, evidence, tellers.even), self.heard(), now);
        if evidence > 0 {
            self.slow_until.get_or_insert(now + FRESH);
            self.unheard = None;
            self.helped += evidence;
            self.helped(evidence, tellers.probe, now);
        } else {
            self.unheard_of(landed, now);
        }
        // How fast an apiserver takes them is measured by all of them, whatever they are evidence of.
        self.notice(Landings::of(landed, elsewhere, tellers.even), now)
    }

    /// Others tell. A try is all donors' together, or what each tells is too little to be seen among strangers who land elsewhere
    /// anyway: whoever waits for long, and does not rest from the same try, joins. He has waited half his time by then, or those
    /// who try one after the other would have each other try for ever. Whether he joins now.
    pub fn others_tell(&mut self, now: Timestamp) -> bool {
        if let Next::After(until) = self.next
            && !self.is_slow
            && self.wait >= FUTILE_WAIT
            && self.wait.saturating_sub(until.since(now)) >= SAME_TRY.max(self.wait / 2)
        {
            self.next = Next::Probe;
            return true;
        }
        false
    }

    /// Whether hardly anybody lands elsewhere.
    fn is_hopeless(&self, now: Timestamp) -> bool {
        !self.is_slow && self.evidence.is_hopeless(now)
    }

    fn unheard_of(&mut self, landed: u64, now: Timestamp) {
        let new = Unheard {
            since: now,
            last: now,
            landed: 0,
            told: 0,
            told_by_all: 0,
        };
        let before = self.unheard.filter(|unheard| now.since(unheard.last) < LONG_AGO);
        let unheard = before.unwrap_or(new);
        self.unheard = Some(Unheard {
            last: now,
            landed: unheard.landed + landed,
            ..unheard
        });
    }

    /// From one apiserver's landings until those of the same moment are heard of on another.
    fn heard(&self) -> Duration {
        self.tellers.interval + TOLD
    }

    fn helped(&mut self, elsewhere: u64, probe: usize, now: Timestamp) {
        if self.is_hopeless(now) {
            return;
        }
        if elsewhere >= CERTAIN {
            self.wait = Duration::ZERO;
            self.in_vain = 0;
        }
        // Who starts slowly takes somebody now and then: that ends no wait.
        if !matches!(self.next, Next::UpTo(_)) && !self.is_slow {
            // One or two after a long wait may be anybody: that is worth another look, and no more.
            self.next = if elsewhere < CERTAIN && self.wait >= FUTILE_WAIT {
                Next::Probe
            } else {
                Next::UpTo(probe * GROWTH)
            };
        }
    }

    /// A plan of this agent that told `told` has settled; a probe of all donors together would have told `probe`. Returns
    /// what was in vain, if that is known by now.
    pub fn settled(&mut self, told: usize, seen: Seen, probe: u64, now: Timestamp) -> Option<Vain> {
        if told == 0 || seen.landed == 0 {
            // Nobody has landed anywhere: that says nothing.
            return None;
        }
        if seen.elsewhere > 0 && !self.is_hopeless(now) {
            let before = match self.next {
                Next::UpTo(limit) => limit,
                Next::Probe | Next::After(_) => 0,
            };
            self.next = if self.is_slow {
                Next::After(now + PAUSE)
            } else {
                Next::UpTo(before.max(told * GROWTH))
            };
            return None;
        }
        let is_known = self.is_slow || matches!(self.next, Next::UpTo(_));
        if is_known && !self.is_doubted(probe, now) && !self.is_hopeless(now) {
            if let Some(unheard) = &mut self.unheard {
                unheard.told += told as u64;
                unheard.told_by_all += seen.told;
            }
            return None;
        }
        let before = self.unheard.take();
        self.evidence.was_used();
        self.is_slow = false;
        self.in_vain += told as u64 + before.map_or(0, |before| before.told);
        self.wait = self.next_wait(now);
        self.helped = 0;
        self.next = Next::After(now + self.wait);
        Some(Vain {
            told: seen.told + before.map_or(0, |before| before.told_by_all),
            landed: before.map_or(seen.landed, |before| before.landed),
        })
    }

    /// The load is level: whether what was in vain is forgotten, since more than an accident landed elsewhere until it was.
    pub fn levelled(&mut self, now: Timestamp) -> bool {
        let is_forgotten = self.helped >= CERTAIN && self.in_vain > 0 && !self.is_hopeless(now);
        if is_forgotten {
            self.wait = Duration::ZERO;
            self.in_vain = 0;
        }
        is_forgotten
    }

    /// How long is waited after another one in vain.
    fn next_wait(&self, now: Timestamp) -> Duration {
        let longest = if now < self.fresh_until {
            FRESH_WAIT
        } else {
            LONGEST_WAIT
        };
        (self.wait * 2).max(FIRST_WAIT).min(longest.max(self.wait))
    }

    /// Whether so many landed on donors alone, and for so long.
    fn is_doubted(&self, probe: u64, now: Timestamp) -> bool {
        self.unheard
            .is_some_and(|unheard| unheard.landed >= DOUBT * probe && now.since(unheard.since) >= self.heard())
    }

    /// What landed since the last look: whether an apiserver is seen by it to start slowly, which was not known before.
    fn notice(&mut self, new: Landings, now: Timestamp) -> bool {
        self.window.push_back((now, new));
        while self.window.front().is_some_and(|(at, _)| now.since(*at) >= WINDOW) {
            self.window.pop_front();
        }
        self.meanwhile = self.meanwhile.map(|before| before.and(new));
        let lately = self.lately();
        if lately.all >= FEW && lately.elsewhere >= ALL * lately.all || self.seeks_the_emptiest() {
            self.takes_all = true;
        }
        let expected = self.expected(lately);
        if self.is_slow {
            let is_enough = lately.all >= FEW && self.meanwhile.is_some_and(|since| since.all >= ENOUGH);
            let is_over = is_enough && lately.elsewhere >= FAST * expected;
            self.is_slow = !is_over && self.is_fresh(now);
            self.evidence.forget();
            return false;
        }
        // Snapshots are of different instants: while the rate changes, what is seen of it is askew.
        let is_even = (2.0..=3.0).contains(&(5.0 * self.older(now) / lately.all));
        // Chance makes a few less.
        let is_short = lately.elsewhere + 2.0 * (lately.elsewhere + 1.0).sqrt() < SLOW * expected;
        self.is_slow = is_short && is_even && self.is_fresh(now) && matches!(self.next, Next::UpTo(_));
        if self.is_slow {
            self.evidence.forget();
            self.meanwhile = None;
            self.next = Next::After(now + PAUSE);
        }
        self.is_slow
    }

    /// Whether more landed elsewhere while few were told than an even choice or the better of two sends there, though an
    /// apiserver starts slowly: then it gets as many as it takes, and more told are no more taken.
    fn seeks_the_emptiest(&self) -> bool {
        let Some(since) = self.meanwhile.filter(|_| self.is_slow) else {
            return false;
        };
        since.all >= 2.0 * FEW && since.elsewhere - since.elsewhere.sqrt() > EMPTIEST * since.better_of_two
    }

    /// Landings in the window.
    fn lately(&self) -> Landings {
        self.sum(|_| true)
    }

    /// As many in the older half of the window.
    fn older(&self, now: Timestamp) -> f64 {
        self.sum(|at| now.since(at) >= WINDOW / 2).all
    }

    fn sum(&self, is_then: impl Fn(Timestamp) -> bool) -> Landings {
        let them = self.window.iter().filter(|(at, _)| is_then(*at));
        them.fold(Landings::default(), |sum, (_, landings)| sum.and(*landings))
    }

    /// How many of these should have been elsewhere: all where that was so before, else an even choice's.
    fn expected(&self, landings: Landings) -> f64 {
        if self.takes_all { landings.all } else { landings.even }
    }

    fn is_fresh(&self, now: Timestamp) -> bool {
        self.slow_until.is_some_and(|until| now < until)
    }

    /// Time passes: whether a wait has just ended. Where an apiserver starts slowly, what comes next is this agent's part of
    /// what that took lately, and some more.
    pub fn look(&mut self, now: Timestamp) -> bool {
        let over = matches!(self.next, Next::After(until) if now >= until);
        if over {
            self.next = if self.is_slow {
                // The first after it was seen shows what kind of balancer it is: as many as one is sure to get that seeks the
                // emptiest, which is fewer than another one needs.
                let share = if self.meanwhile.is_none() || self.takes_all {
                    1.0
                } else {
                    self.tellers.even.max(0.01)
                };
                self.meanwhile.get_or_insert_default();
                let taken = self.lately().elsewhere;
                Next::UpTo((CAUTION * taken / share * self.tellers.part).ceil() as usize)
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
mod tests;
