//! One switch for all agents: what an operator said to one of them, and the others have heard.
//!
//! Job: keep the newest word, by whom and until when. Input: an operator's word here, or another agent's newer one.
//! Output: the pause that is on, and what the others are told. Must never let an older word win: whoever was away when the
//! switch was turned back hears of it from those who were not.

use std::{cmp::Ordering, time::Duration};

use super::Pause;
use crate::ids::{ApiserverName, Timestamp};

/// One word may end at two agents so long after each other: it was on its way to one of them.
const LAPSED: Duration = Duration::from_secs(10);

/// A word is so many ahead of the last one here at most: people say them. Without a bound one agent that says the highest
/// there is would have said the last word for ever.
const AHEAD: u64 = 1 << 20;

/// The switch as it travels: with times that are left, since two agents have two clocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Switch {
    /// Counts up with each word; 0 before the first.
    pub stamp: u64,
    /// On which node it was said; of two that were said at once the one of the later name counts.
    pub by: Option<ApiserverName>,
    /// The pause, if it is one.
    pub pause: Option<SwitchPause>,
}

/// A pause of all agents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwitchPause {
    /// What for; may be empty.
    pub reason: String,
    /// How long yet; `None` until an operator ends it.
    pub left: Option<Duration>,
}

/// The switch as an agent keeps it.
#[derive(Clone, Debug, Default)]
pub(super) struct Kept {
    stamp: u64,
    by: Option<ApiserverName>,
    pause: Option<Pause>,
    /// The pause's time was over when this process began, by a clock that may have been set meanwhile.
    lapsed_before: bool,
}

impl Kept {
    /// An operator's word on this node: `None` is to go on.
    pub fn turn(&mut self, by: ApiserverName, pause: Option<Pause>) {
        *self = Self {
            stamp: self.stamp.saturating_add(1),
            by: Some(by),
            pause,
            lapsed_before: false,
        };
    }

    /// Why no operator can have said that word, if so.
    pub fn is_beyond(&self, other: &Switch) -> Option<String> {
        (other.stamp > self.stamp.saturating_add(AHEAD)).then(|| {
            format!(
                "its word to all agents has the number {}, where this agent has heard {}: no operator said so many; remove \
                 its state file (--state), and see who has that node",
                other.stamp, self.stamp
            )
        })
    }

    /// Takes another's word if it is newer, and says whether it was.
    pub fn hear(&mut self, other: &Switch, now: Timestamp) -> bool {
        if self.is_beyond(other).is_some() {
            return false;
        }
        let order = (other.stamp, &other.by).cmp(&(self.stamp, &self.by));
        let is_on_there = other.pause.as_ref().is_some_and(|pause| pause.left > Some(LAPSED));
        // The same word, whose time is over here and not there: this agent was away and counted it by a clock that was set.
        // What ended while it ran has ended, whatever one says that was away.
        let has_lapsed_here = order == Ordering::Equal && self.lapsed_before && is_on_there;
        if order != Ordering::Greater && !has_lapsed_here {
            return false;
        }
        *self = Self::of(other, Duration::ZERO, now);
        true
    }

    /// What was kept, `down` before now.
    pub fn of(switch: &Switch, down: Duration, now: Timestamp) -> Self {
        let is_on = |pause: &&SwitchPause| pause.left.is_none_or(|left| left > down);
        Self {
            stamp: switch.stamp,
            by: switch.by.clone(),
            pause: switch.pause.as_ref().filter(is_on).map(|pause| Pause {
                reason: pause.reason.clone(),
                until: pause.left.map(|left| now + left.saturating_sub(down)),
            }),
            lapsed_before: switch.pause.as_ref().is_some_and(|pause| !is_on(&pause)),
        }
    }

    /// What the others are told.
    pub fn told(&self, now: Timestamp) -> Switch {
        Switch {
            stamp: self.stamp,
            by: self.by.clone(),
            pause: self.pause().map(|pause| SwitchPause {
                reason: pause.reason.clone(),
                left: pause.until.map(|until| until.since(now)),
            }),
        }
    }

    /// The pause that is on.
    pub fn pause(&self) -> Option<&Pause> {
        self.pause.as_ref()
    }

    /// Who said it last.
    pub fn by(&self) -> Option<&ApiserverName> {
        self.by.as_ref()
    }

    /// Ends a pause whose time is over, and says whether it did. The word stays: it is nobody's news.
    pub fn expire(&mut self, now: Timestamp) -> bool {
        let is_over = self
            .pause
            .as_ref()
            .is_some_and(|pause| pause.until.is_some_and(|until| now >= until));
        if is_over {
            self.pause = None;
        }
        is_over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_millis(seconds * 1_000)
    }

    fn name(name: &str) -> ApiserverName {
        ApiserverName::new(name)
    }

    fn pause(reason: &str, until: Option<u64>) -> Option<Pause> {
        Some(Pause {
            reason: reason.to_owned(),
            until: until.map(at),
        })
    }

    #[test]
    fn the_newest_word_wins_whoever_was_away() {
        let (mut a, mut b, mut away) = (Kept::default(), Kept::default(), Kept::default());
        a.turn(name("a"), pause("upgrade", None));
        assert!(away.hear(&a.told(at(0)), at(0)) && b.hear(&a.told(at(0)), at(0)));
        assert_eq!(
            (b.by(), b.pause().map(|pause| pause.reason.as_str())),
            (Some(&name("a")), Some("upgrade"))
        );
        b.turn(name("b"), None);
        assert!(a.hear(&b.told(at(1)), at(1)));
        assert!(a.pause().is_none());
        assert!(!a.hear(&away.told(at(2)), at(2)), "it comes back with the old word");
        assert!(away.hear(&a.told(at(2)), at(2)) && away.pause().is_none());
        assert!(!a.hear(&Switch::default(), at(3)), "a new agent without any");
    }

    #[test]
    fn nobody_says_the_last_word_for_ever() {
        let mut kept = Kept::default();
        let word = |stamp| Switch {
            stamp,
            by: Some(name("z")),
            pause: None,
        };
        for stamp in [u64::MAX, 1 << 52, AHEAD + 1] {
            let why = kept.is_beyond(&word(stamp)).expect("nobody said so many");
            assert!(
                why.contains(&stamp.to_string()) && !kept.hear(&word(stamp), at(0)),
                "{why}"
            );
        }
        assert!(kept.hear(&word(AHEAD), at(0)));
        kept.turn(name("a"), pause("x", None));
        let mut other = Kept::default();
        other.hear(&word(AHEAD), at(0));
        assert!(other.hear(&kept.told(at(0)), at(0)), "an operator is still heard");
    }

    #[test]
    fn two_words_at_once_come_to_one() {
        let (mut a, mut b) = (Kept::default(), Kept::default());
        a.turn(name("a"), pause("x", None));
        b.turn(name("b"), None);
        let (of_a, of_b) = (a.told(at(0)), b.told(at(0)));
        assert!(a.hear(&of_b, at(0)) && !b.hear(&of_a, at(0)));
        assert_eq!(a.told(at(0)), b.told(at(0)));
    }

    #[test]
    fn a_clock_that_was_set_while_an_agent_was_away_ends_no_pause() {
        let mut a = Kept::default();
        a.turn(name("a"), pause("x", Some(7_200)));
        let mut b = Kept::of(&a.told(at(0)), Duration::from_secs(86_400), at(0));
        assert!(b.pause().is_none(), "by its own clock a day has passed");
        assert!(b.hear(&a.told(at(60)), at(60)) && b.pause().is_some());
        assert!(!b.hear(&a.told(at(61)), at(61)), "it is told once");
        a.turn(name("a"), None);
        assert!(b.hear(&a.told(at(62)), at(62)) && b.pause().is_none());
    }

    #[test]
    fn a_pause_that_ended_here_does_not_come_back_with_one_that_was_away() {
        let mut a = Kept::default();
        a.turn(name("a"), pause("x", Some(7_200)));
        let kept_away = a.told(at(0));
        assert!(a.expire(at(7_200)));
        // Its clock was set back, so that no time has passed.
        let away = Kept::of(&kept_away, Duration::ZERO, at(0));
        assert!(away.pause().is_some());
        assert!(!a.hear(&away.told(at(1)), at(10_800)) && a.pause().is_none());
    }

    #[test]
    fn it_ends_at_its_time_on_every_clock_and_over_a_restart() {
        let mut a = Kept::default();
        a.turn(name("a"), pause("x", Some(100)));
        let mut b = Kept::default();
        assert!(b.hear(&a.told(at(40)), at(5_000)), "another clock");
        assert!(!b.expire(at(5_059)) && b.expire(at(5_060)));
        assert!(!b.hear(&a.told(at(100)), at(5_060)), "it does not begin again");
        let kept = a.told(at(40));
        assert!(Kept::of(&kept, Duration::from_secs(59), at(0)).pause().is_some());
        assert!(Kept::of(&kept, Duration::from_secs(60), at(0)).pause().is_none());
    }
}
