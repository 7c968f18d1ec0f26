//! How fast watches are handed over: a connection's spread over a time, and all of them under a rate.
//!
//! Input: the connections that have said their last GOAWAY, with their open watches, and now.
//! Output: for each how many of its watches may be ended so far.
//! Must never let a watch end that is younger than [`LEAD`].

use std::{collections::BTreeMap, time::Duration};

use crate::ids::ConnectionId;

/// From the last GOAWAY to the first watch that is ended. client-go takes a watch that ends within a second and
/// without an event for a failure, and lists again (k8s.io/client-go/tools/cache/reflector.go, "very short watch"); a
/// watch that is open at the last GOAWAY is older than that after two.
pub const LEAD: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug)]
struct Told {
    since: Duration,
    watches: u32,
    allowed: u32,
}

/// The pace of one relay.
#[derive(Debug)]
pub struct Pace {
    over: Duration,
    per_second: f64,
    tokens: f64,
    last: Duration,
    told: BTreeMap<ConnectionId, Told>,
}

impl Pace {
    /// A connection's watches spread over `over`, and at most `per_second` of all connections.
    pub fn new(over: Duration, per_second: u32) -> Self {
        Self {
            over,
            per_second: per_second.into(),
            tokens: 0.0,
            last: Duration::ZERO,
            told: BTreeMap::new(),
        }
    }

    /// One turn at `now`, with every connection that is to hand over: which may end how many by now. Those that are not
    /// named any more are forgotten.
    pub fn turn(
        &mut self,
        now: Duration,
        open: impl IntoIterator<Item = (ConnectionId, u32)>,
    ) -> Vec<(ConnectionId, u32)> {
        let mut told: BTreeMap<_, _> = open
            .into_iter()
            .map(|(id, watches)| {
                let known = self.told.get(&id).copied();
                let new = Told {
                    since: now,
                    watches,
                    allowed: 0,
                };
                (id, known.unwrap_or(new))
            })
            .collect();
        let passed = now.saturating_sub(self.last).as_secs_f64();
        self.last = now;
        // What was not spent within a second is gone: a pause is not followed by a burst.
        self.tokens = (self.tokens + passed * self.per_second).min(self.per_second);
        let mut order: Vec<_> = told.iter_mut().collect();
        order.sort_by_key(|(id, told)| (told.since, **id));
        let mut allowed = Vec::new();
        for (id, told) in order {
            let Some(late) = now.saturating_sub(told.since).checked_sub(LEAD) else {
                continue;
            };
            let share = if self.over.is_zero() {
                1.0
            } else {
                (late.as_secs_f64() / self.over.as_secs_f64()).min(1.0)
            };
            // The first at once: most connections have one or two, and the last one is due when the time is over.
            let due = (f64::from(told.watches) * share).floor() as u32 + 1;
            let wanted = due.min(told.watches).saturating_sub(told.allowed);
            let granted = wanted.min(self.tokens as u32);
            if granted > 0 {
                self.tokens -= f64::from(granted);
                told.allowed += granted;
                allowed.push((*id, told.allowed));
            }
        }
        self.told = told;
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TURN: Duration = Duration::from_millis(100);

    /// Lets turns pass for some seconds: what each connection may end at the end, and the most in any one second.
    fn pass(pace: &mut Pace, seconds: u64, open: &[(u64, u32)]) -> (Vec<u32>, u32) {
        let mut totals = vec![0; open.len()];
        let mut each_turn = Vec::new();
        for turn in 1..=seconds * 10 {
            let before: u32 = totals.iter().sum();
            let named = open.iter().map(|(id, watches)| (ConnectionId(*id), *watches));
            for (id, total) in pace.turn(TURN * turn as u32, named) {
                totals[open.iter().position(|(known, _)| *known == id.0).expect("a known one")] = total;
            }
            each_turn.push(totals.iter().sum::<u32>() - before);
        }
        let most = each_turn
            .windows(10)
            .map(|second| second.iter().sum())
            .max()
            .unwrap_or(0);
        (totals, most)
    }

    #[test]
    fn a_connections_watches_are_spread_over_the_time() {
        let at = |seconds| pass(&mut Pace::new(Duration::from_secs(5), 100), seconds, &[(7, 10)]).0;
        assert_eq!(at(1), [0], "too young to be ended");
        assert_eq!(at(2), [0]);
        assert_eq!(at(3), [2]);
        assert_eq!(at(5), [6]);
        assert_eq!(at(8), [10]);
        assert_eq!(at(30), [10]);
    }

    #[test]
    fn all_together_keep_the_rate_and_everybody_is_served_in_the_end() {
        let open: Vec<_> = (0..50).map(|id| (id, 4)).collect();
        let (totals, most) = pass(&mut Pace::new(Duration::ZERO, 20), 20, &open);
        assert_eq!(totals, [4; 50]);
        // A second's worth that was saved, and a second's worth that comes.
        assert!(most <= 40, "{most} within a second");
        let (totals, _) = pass(&mut Pace::new(Duration::ZERO, 20), 5, &open);
        assert!(totals.iter().sum::<u32>() <= 20 * 4, "{totals:?}");
    }

    #[test]
    fn a_connection_that_comes_later_waits_its_own_time() {
        let mut pace = Pace::new(Duration::ZERO, 100);
        let at = Duration::from_secs;
        let (first, second) = ((ConnectionId(1), 1), (ConnectionId(2), 1));
        assert_eq!(pace.turn(at(10), [first]), []);
        assert_eq!(pace.turn(at(12), [first, second]), [(ConnectionId(1), 1)]);
        assert_eq!(pace.turn(at(13), [second]), []);
        assert_eq!(pace.turn(at(14), [second]), [(ConnectionId(2), 1)]);
        assert_eq!(pace.turn(at(15), [second]), [], "told once");
    }
}
