//! Overload: requests that the local apiserver refused, as its shim counts them.
//!
//! Input: the shim's totals. Output: how many a short while ago.
//! Must never take a shim that does not see them, or a restarted one, for a calm or a stressed apiserver: it says nothing.

use std::{collections::VecDeque, time::Duration};

use crate::ids::Timestamp;

/// Refusals of the last minute or so.
#[derive(Clone, Debug, Default)]
pub(super) struct Stress {
    instance: String,
    last: Option<u64>,
    recent: VecDeque<(Timestamp, u64)>,
}

/// No longer ago than this is remembered.
const MEMORY: Duration = Duration::from_secs(60);

impl Stress {
    /// Takes in the shim's total.
    pub fn hear(&mut self, instance: &str, total: Option<u64>, now: Timestamp) {
        if self.instance != instance {
            instance.clone_into(&mut self.instance);
            self.last = None;
        }
        let Some(total) = total else {
            return;
        };
        let new = self.last.map_or(0, |last| total.saturating_sub(last));
        self.last = Some(total);
        if new > 0 {
            self.recent.push_back((now, new));
        }
        while self.recent.front().is_some_and(|(at, _)| now.since(*at) > MEMORY) {
            self.recent.pop_front();
        }
    }

    /// How many were refused within `window`.
    pub fn refused(&self, window: Duration, now: Timestamp) -> u64 {
        let recent = self.recent.iter().filter(|(at, _)| now.since(*at) <= window);
        recent.map(|(_, refused)| refused).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_counted_for_a_while_and_a_restart_is_none() {
        let at = |seconds: u64| Timestamp::from_millis(seconds * 1_000);
        let window = Duration::from_secs(15);
        let mut stress = Stress::default();
        stress.hear("a", Some(1_000), at(0));
        assert_eq!(stress.refused(window, at(0)), 0, "the first total is a base");
        stress.hear("a", Some(1_030), at(5));
        assert_eq!(stress.refused(window, at(10)), 30);
        stress.hear("a", None, at(11));
        stress.hear("b", Some(500), at(12));
        assert_eq!(stress.refused(window, at(12)), 30, "another process counts anew");
        assert_eq!(stress.refused(window, at(21)), 0);
    }
}
