//! Connections that are too young to count: a health check or a short call is over before it is one.
//!
//! Job: say which connections are old enough to count, as load and as landings.
//! Input: connections that open and end, and `now`. Output: those that count from now on.
//! Must never keep what is gone: it holds no more than the table does, and some.
//!
//! How old is old enough is learned. Whoever is told to go is on the way until its next connection counts, and while many
//! are on their way nobody else may be told: a second of patience more makes a rebalancing a third longer. So a third of
//! the patience will do, until connections are seen to end between that and all of it, as short calls do; and all of it, until
//! they are seen to end soon after it, as what people and jobs ask does: then it takes three times as long and some. Where
//! none has been seen for [`REMEMBERED`], they are forgotten.

use std::{collections::VecDeque, time::Duration};

use crate::ids::{ConnectionId, Timestamp};

/// Where nobody ends young, this part of the patience will do.
const QUICK: u32 = 3;

/// Where calls last for longer than the patience, this much more than it is needed: an interval, with the agent's.
const LONG: (u32, u32) = (10, 3);

/// When more than so many of the last 64 ended young, all of it is needed, or more.
const SHORT_CALLS: u32 = 3;

/// So long it is remembered that calls were short: on an apiserver where nobody comes, nobody shows that they no longer are.
const REMEMBERED: Duration = Duration::from_secs(600);

/// Room for so many is kept while fewer wait.
const ROOM: usize = 16_384;

/// Those who are too young, and how old is old enough.
#[derive(Clone, Debug, Default)]
pub(super) struct Young {
    patience: Duration,
    /// The oldest first; some are gone.
    waiting: VecDeque<(Timestamp, ConnectionId)>,
    /// What became of the last 64 that were open for a third of the patience: a bit each, set for those that did not last.
    fates: u64,
    /// The same of those that were open for all of it.
    later_fates: u64,
    /// When the last one ended young.
    last_short: Timestamp,
    /// How old is old enough to the most patient of the peers.
    peers: Duration,
}

impl Young {
    /// With a patience of that length; none at all where it is zero.
    pub fn new(patience: Duration) -> Self {
        Self {
            patience,
            ..Self::default()
        }
    }

    /// Whether each counts at once.
    pub fn is_patient(&self) -> bool {
        !self.patience.is_zero()
    }

    /// That length.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// From which age on a connection counts: nowhere sooner than elsewhere, for landings here and there are compared.
    pub fn old_enough(&self) -> Duration {
        self.learned().max(self.peers)
    }

    /// The peers wait until connections are that old; nobody has to wait longer than whoever learned the most.
    pub fn peers_wait(&mut self, age: Duration) {
        self.peers = age.min(self.long());
    }

    /// The same by what became of those that ended here.
    pub fn learned(&self) -> Duration {
        if self.later_fates.count_ones() > SHORT_CALLS {
            self.long()
        } else if self.fates.count_ones() > SHORT_CALLS {
            self.patience
        } else {
            self.patience / QUICK
        }
    }

    /// One opened. `lives` says which are not gone, of `all` that are open.
    pub fn enter(&mut self, now: Timestamp, id: ConnectionId, all: usize, lives: impl Fn(ConnectionId) -> bool) {
        self.waiting.push_back((now, id));
        if self.waiting.len() > 2 * all + 1_024 {
            self.waiting.retain(|(_, id)| lives(*id));
        }
    }

    /// When the next one is old enough, if one is waiting for that.
    pub fn next(&self) -> Option<Timestamp> {
        self.waiting.front().map(|(opened, _)| *opened + self.old_enough())
    }

    /// The next one that is old enough by now.
    pub fn pop(&mut self, now: Timestamp) -> Option<ConnectionId> {
        if now.since(self.last_short) > REMEMBERED {
            self.forget();
        }
        let old_enough = self.old_enough();
        let popped = self.waiting.pop_front_if(|(opened, _)| *opened + old_enough <= now);
        // After a storm of them the room is given back.
        if self.waiting.capacity() > 4 * self.waiting.len() + ROOM {
            self.waiting.shrink_to(2 * self.waiting.len());
        }
        popped.map(|(_, id)| id)
    }

    fn long(&self) -> Duration {
        self.patience * LONG.0 / LONG.1
    }

    /// A client's connection counts now.
    pub fn lasted(&mut self) {
        self.fates <<= 1;
        self.later_fates <<= 1;
    }

    /// What became of others says nothing of those who come.
    pub fn forget(&mut self) {
        (self.fates, self.later_fates) = (0, 0);
    }

    /// A client's connection ended now, at that age.
    pub fn ended(&mut self, now: Timestamp, age: Duration) {
        if age < self.patience && age >= self.patience / QUICK {
            self.fates = self.fates << 1 | 1;
            self.last_short = now;
        } else if age < self.long() && age >= self.patience {
            self.later_fates = self.later_fates << 1 | 1;
            self.last_short = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Timestamp {
        Timestamp::from_millis(ms)
    }

    #[test]
    fn patience_is_had_where_short_calls_are_and_as_long_as_they_are_many() {
        let mut young = Young::new(Duration::from_millis(1_500));
        let quick = Duration::from_millis(500);
        // Health checks are over long before; who stayed long is no short call.
        for age in [5, 50, 499, 5_000, 60_000] {
            for _ in 0..64 {
                young.ended(at(0), Duration::from_millis(age));
            }
            assert_eq!(young.old_enough(), quick, "{age} ms");
        }
        for _ in 0..=SHORT_CALLS {
            young.ended(at(0), Duration::from_millis(700));
        }
        assert_eq!(young.old_enough(), Duration::from_millis(1_500));
        for _ in 0..64 {
            young.lasted();
        }
        assert_eq!(young.old_enough(), quick, "they are few among many who stay");
        // Calls that last for some seconds, whatever the shorter ones do.
        for _ in 0..=SHORT_CALLS {
            young.ended(at(0), Duration::from_millis(2_900));
            young.ended(at(0), Duration::from_millis(700));
        }
        assert_eq!(young.old_enough(), Duration::from_secs(5));
        for _ in 0..64 {
            young.lasted();
        }
        assert_eq!(young.old_enough(), quick);
    }

    #[test]
    fn what_a_crash_ended_is_forgotten() {
        let mut young = Young::new(Duration::from_millis(1_500));
        for _ in 0..64 {
            young.ended(at(0), Duration::from_millis(2_900));
        }
        assert_eq!(young.old_enough(), Duration::from_secs(5));
        young.forget();
        assert_eq!(young.old_enough(), Duration::from_millis(500));
    }

    #[test]
    fn short_calls_of_long_ago_are_forgotten_where_nobody_comes() {
        let mut young = Young::new(Duration::from_millis(1_500));
        for _ in 0..64 {
            young.ended(at(1_000), Duration::from_millis(2_900));
        }
        assert_eq!(young.pop(at(600_000)), None);
        assert_eq!(young.learned(), Duration::from_secs(5));
        assert_eq!(young.pop(at(601_001)), None);
        assert_eq!(young.learned(), Duration::from_millis(500));
    }

    #[test]
    fn it_is_as_patient_as_the_most_patient_of_the_peers() {
        let mut young = Young::new(Duration::from_millis(1_500));
        let learned = young.learned();
        for (peers, expected) in [(0, 500), (1_500, 1_500), (5_000, 5_000), (3_600_000, 5_000), (0, 500)] {
            young.peers_wait(Duration::from_millis(peers));
            assert_eq!(young.old_enough(), Duration::from_millis(expected), "{peers} ms");
            assert_eq!(young.learned(), learned, "what peers say is not told on");
        }
        // With no patience each counts at once, whatever they say.
        let mut none = Young::new(Duration::ZERO);
        none.peers_wait(Duration::from_secs(5));
        assert_eq!(none.old_enough(), Duration::ZERO);
    }

    #[test]
    fn who_waits_is_old_enough_in_turn() {
        let mut young = Young::new(Duration::from_millis(1_500));
        for id in 1..=3 {
            young.enter(at(100 * id), ConnectionId(id), 3, |_| true);
        }
        assert_eq!(young.next(), Some(at(600)));
        assert_eq!(young.pop(at(599)), None);
        assert_eq!(young.pop(at(700)), Some(ConnectionId(1)));
        assert_eq!(young.pop(at(700)), Some(ConnectionId(2)));
        assert_eq!((young.pop(at(700)), young.next()), (None, Some(at(800))));
    }

    #[test]
    fn it_holds_no_more_than_there_are_and_some() {
        let mut young = Young::new(Duration::from_millis(1_500));
        for id in 0..10_000 {
            young.enter(at(id), ConnectionId(id), 10, |id| id.0 > 9_990);
        }
        assert!(young.waiting.len() <= 2 * 10 + 1_025, "{}", young.waiting.len());
    }
}
