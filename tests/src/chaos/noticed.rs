//! What clients noticed, and what of it is ours.

use serde::Serialize;

use crate::swarm::Line;

/// What clients noticed in a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Noticed {
    pub requests: u64,
    /// Small requests that took more than a second.
    pub stalls: u64,
    pub errors: u64,
    pub relists: u64,
    pub watch_breaks: u64,
    pub events: u64,
    pub missed: u64,
    pub doubled: u64,
    /// Connections opened.
    pub dials: u64,
}

impl Noticed {
    /// Of a swarm's line.
    pub fn of(line: &Line) -> Self {
        Self {
            requests: line.requests,
            stalls: line.stalls,
            errors: line.errors,
            relists: line.relists,
            watch_breaks: line.watch_breaks,
            events: line.events,
            missed: line.missed,
            doubled: line.doubled,
            dials: line.dials,
        }
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        self.with(other, |one, other| one + other)
    }

    /// What came since then.
    #[must_use]
    pub fn minus(self, before: Self) -> Self {
        self.with(before, u64::saturating_sub)
    }

    fn with(self, other: Self, both: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            requests: both(self.requests, other.requests),
            stalls: both(self.stalls, other.stalls),
            errors: both(self.errors, other.errors),
            relists: both(self.relists, other.relists),
            watch_breaks: both(self.watch_breaks, other.watch_breaks),
            events: both(self.events, other.events),
            missed: both(self.missed, other.missed),
            doubled: both(self.doubled, other.doubled),
            dials: both(self.dials, other.dials),
        }
    }

    /// What of it the same fault without us did not make, in so many plays; `cut` is how many clients it parts from what served
    /// them. An event that is missed or doubled is one too many whatever the fault; a watch is broken once for each client that is
    /// parted; requests that fail, and lists that follow, go by the moment.
    #[must_use]
    pub fn beyond(self, control: Self, cut: u64, plays: u32) -> Self {
        let happens = |ours: u64, without: u64, allowed: u64| {
            if without == 0 || ours > allowed {
                ours.saturating_sub(without)
            } else {
                0
            }
        };
        let by_chance = |ours: u64, without: u64| happens(ours, without, most_by_chance(ours, without, plays));
        Self {
            errors: by_chance(self.errors, control.errors),
            relists: by_chance(self.relists, control.relists),
            watch_breaks: happens(self.watch_breaks, control.watch_breaks, control.watch_breaks.max(cut)),
            missed: self.missed.saturating_sub(control.missed),
            doubled: self.doubled.saturating_sub(control.doubled),
            ..Self::default()
        }
    }

    /// What may not happen at all.
    pub fn any(self) -> u64 {
        self.errors + self.relists + self.watch_breaks + self.missed + self.doubled
    }
}

/// Counts of rare events scatter by their square root. A first play that has more than one such scatter above the other side's
/// count is no finding, but is played again; after that it is two.
fn most_by_chance(ours: u64, control: u64, plays: u32) -> u64 {
    let scatter = ((ours + control) as f64).sqrt();
    let times = if plays > 1 { 2.0 } else { 1.0 };
    control + (times * scatter) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_fault_breaks_without_us_is_not_ours() {
        let errors = |errors| Noticed {
            errors,
            ..Noticed::default()
        };
        let beyond = |ours, control, plays| errors(ours).beyond(errors(control), 0, plays).errors;
        assert_eq!(beyond(0, 0, 1), 0);
        assert_eq!(
            beyond(1, 0, 3),
            1,
            "nothing may happen where nothing happens without us"
        );
        assert_eq!([beyond(110, 100, 1), beyond(120, 100, 1)], [0, 20]);
        assert_eq!([beyond(120, 100, 3), beyond(140, 100, 3)], [0, 40]);
        assert_eq!(beyond(30, 11, 3), 19, "three times as many are no chance");
    }

    #[test]
    fn events_are_exact_and_a_watch_breaks_once_for_each_client() {
        let noticed = |watch_breaks, missed| Noticed {
            watch_breaks,
            missed,
            ..Noticed::default()
        };
        let beyond = |ours: Noticed, control: Noticed| {
            let beyond = ours.beyond(control, 50, 3);
            [beyond.watch_breaks, beyond.missed]
        };
        assert_eq!(beyond(noticed(50, 0), noticed(48, 0)), [0, 0]);
        assert_eq!(
            beyond(noticed(53, 0), noticed(48, 0)),
            [5, 0],
            "three have broken twice"
        );
        assert_eq!(
            beyond(noticed(3, 0), noticed(0, 0)),
            [3, 0],
            "the others' did not break"
        );
        assert_eq!(beyond(noticed(0, 1), noticed(0, 0)), [0, 1]);
    }
}
