//! The renewal of the front-proxy certificate: whoever is served with the last one is told to go before it ends, since
//! kube-apiserver judges it at each request.
//!
//! Input: which certificate is in use, and the registry. Output: orders to connections. Must never move many clients at
//! once while there is time, nor any while the apiserver does not take the new one.

use std::{collections::BTreeMap, time::Duration};

use super::registry::Registry;

/// A front-proxy certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontProxy {
    /// Which one it is since the relay began, from 0 on.
    pub issue: u64,
    /// When the first certificate of its chain ends, in seconds since 1970.
    pub until: i64,
}

/// Over how long clients are told, when the last certificate is good for twice as long.
const LONGEST: i64 = 3600;

/// When so little is left, clients are told whatever the apiserver's state: they would be answered 401.
pub const LAST: i64 = 60;

/// Who is to be told, and by when.
#[derive(Debug, Default)]
pub struct Renewal {
    /// The issue in use.
    issue: Option<u64>,
    /// For each end of an earlier certificate, in seconds since 1970, in how many seconds the last client of it is to have
    /// been told. They are counted down, for a wall clock that jumps is not time that has passed.
    left: BTreeMap<i64, i64>,
}

impl Renewal {
    /// One look at the connections, each `turn`; says when the first certificate in use ends.
    pub fn turn(&mut self, registry: &Registry, current: FrontProxy, is_ready: bool, now: i64, turn: Duration) -> i64 {
        let all = registry.outdated(current.issue);
        let Some((first, _)) = all.first() else {
            return current.until;
        };
        let first = first.until.min(current.until);
        let outdated: Vec<_> = all
            .iter()
            .filter(|(outdated, _)| outdated.may_be_told)
            .map(|(outdated, connection)| (outdated.until, connection))
            .collect();
        // Those whose certificate has ended are answered 401 already, and say nothing of how long the others have.
        let (over, lasting) = outdated.split_at(outdated.partition_point(|(until, _)| *until <= now));
        let fresh = |until: i64| LONGEST.min((until - now) / 2);
        let is_new = !lasting.is_empty() && self.issue != Some(current.issue);
        if is_new {
            self.issue = Some(current.issue);
            self.left.clear();
            tracing::info!(
                clients = outdated.len(),
                seconds = lasting.last().map(|(until, _)| fresh(*until)),
                "the front-proxy certificate has changed: clients that are served with the last one are told to go"
            );
        }
        // The apiserver is asked with the new one until the next turn.
        let may_tell = is_ready && !is_new;
        if may_tell {
            over.iter().for_each(|(_, connection)| connection.lets_go());
        }
        for group in lasting.chunk_by(|(one, _), (other, _)| one == other) {
            let until = group[0].0;
            let may_tell = may_tell || until - now <= LAST;
            let left = match self.left.get(&until) {
                Some(left) if may_tell => left - turn.as_secs() as i64,
                // The time in which nobody could be told is not made up for in one turn.
                _ => fresh(until),
            };
            self.left.insert(until, left);
            if may_tell {
                // The certificate may end sooner than it seemed, by a clock that is right now.
                let many = share(group.len(), left.min(fresh(until)), turn);
                group.iter().take(many).for_each(|(_, connection)| connection.lets_go());
            }
        }
        first
    }
}

/// How many of those that are left are told in this turn, when all are to be told in that many seconds.
fn share(left: usize, seconds: i64, turn: Duration) -> usize {
    let turns = usize::try_from(seconds).unwrap_or(0) / (turn.as_secs() as usize).max(1);
    left.div_ceil(turns.max(1))
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, sync::Arc};

    use super::*;
    use crate::shim::wire::{Protocol, State};

    const TURN: Duration = Duration::from_secs(5);

    fn registry(clients: u64, issue: u64, until: i64) -> Arc<Registry> {
        let registry = Registry::new("i".to_owned());
        let address = SocketAddr::from(([192, 0, 2, 7], 1));
        for id in 0..clients {
            let connection = registry.open(id, address, address);
            connection.established(Protocol::H2, Some("alice"));
            connection.set_front_proxy(FrontProxy { issue, until });
        }
        registry
    }

    fn told(registry: &Registry) -> usize {
        let all = registry.list(None, false).connections;
        all.iter().filter(|one| one.state == State::Draining).count()
    }

    #[test]
    fn all_are_told_at_an_even_pace_before_the_last_certificate_ends() {
        for (left, span) in [(7200, 3600), (100_000, 3600), (600, 300), (60, 30)] {
            let registry = registry(1000, 0, left);
            let mut renewal = Renewal::default();
            let current = FrontProxy {
                issue: 1,
                until: i64::MAX,
            };
            let (mut most, mut before) = (0, 0);
            for now in (0..=span).step_by(5) {
                let end = renewal.turn(&registry, current, true, now, TURN);
                let now_told = told(&registry);
                assert_eq!(end == i64::MAX, before == 1000, "until nobody uses it");
                most = most.max(now_told - before);
                before = now_told;
            }
            assert_eq!(before, 1000, "of {left} s");
            let even = 1000_usize.div_ceil(span as usize / 5);
            assert!(most <= 2 * even, "{most} at once where {even} do");
        }
    }

    #[test]
    fn a_wall_clock_that_jumps_hurries_nobody() {
        const DAY: i64 = 86_400;
        let began = 100 * DAY;
        // A day ahead for ten minutes, and then a day behind; and once, for a moment, to shortly before the certificate ends.
        let days = |passed: i64| [0, DAY, -DAY, 3600][(passed / 600).min(3) as usize];
        let moment = |passed: i64| if passed == 600 { 35_900 - passed } else { 0 };
        let jumps: [(i64, &dyn Fn(i64) -> i64); 2] = [(400 * DAY, &days), (began + 36_000, &moment)];
        for (until, beside) in jumps {
            let registry = registry(1000, 0, until);
            let current = FrontProxy {
                issue: 1,
                until: i64::MAX,
            };
            let mut renewal = Renewal::default();
            let (mut before, mut last) = (0, 0);
            for passed in (0..=LONGEST).step_by(5) {
                let now = began + passed + beside(passed);
                renewal.turn(&registry, current, true, now, TURN);
                let many = told(&registry) - before;
                // Whoever looks at a clock by which the certificate ends in 100 s has to hurry, for as long as it says so.
                let most = if until - now < 1000 { 100 } else { 4 };
                assert!(many <= most, "{many} at once after {passed} s");
                if many > 0 {
                    last = passed;
                }
                before += many;
            }
            assert_eq!(before, 1000);
            assert!(last > LONGEST / 2, "all were told after {last} s");
        }
    }

    #[test]
    fn each_earlier_certificate_has_a_pace_of_its_own() {
        let registry = registry(1000, 1, 400_000);
        let address = SocketAddr::from(([192, 0, 2, 7], 3));
        for id in 1000..1004 {
            let connection = registry.open(id, address, address);
            connection.established(Protocol::H2, Some("alice"));
            connection.set_front_proxy(FrontProxy { issue: 0, until: 120 });
        }
        let current = FrontProxy {
            issue: 2,
            until: i64::MAX,
        };
        let mut renewal = Renewal::default();
        assert_eq!(renewal.turn(&registry, current, true, 0, TURN), 120);
        for now in (5..=60).step_by(5) {
            renewal.turn(&registry, current, true, now, TURN);
        }
        assert_eq!(renewal.turn(&registry, current, true, 65, TURN), 400_000);
        // Four who had a minute, and as many of the others as a minute of an hour is.
        let all = told(&registry);
        assert!((4 + 10..=4 + 2 * 1000 / 60).contains(&all), "{all} in a minute");
    }

    /// Clients of HTTP/1.1 are not told at all: the apiserver is connected to anew for them. And one of HTTP/2 was not told in
    /// time.
    #[test]
    fn those_whose_certificate_has_ended_hurry_nobody_else() {
        let registry = registry(100, 1, 10_000);
        let address = SocketAddr::from(([192, 0, 2, 7], 2));
        let lasting: Vec<_> = (100..120)
            .map(|id| {
                let connection = registry.open(id, address, address);
                connection.established(Protocol::Http1, Some("alice"));
                connection.set_front_proxy(FrontProxy { issue: 0, until: 50 });
                connection
            })
            .collect();
        let late = registry.open(120, address, address);
        late.established(Protocol::H2, Some("alice"));
        late.set_front_proxy(FrontProxy { issue: 0, until: 50 });
        let current = FrontProxy {
            issue: 2,
            until: i64::MAX,
        };
        let mut renewal = Renewal::default();
        for now in [100, 105, 110] {
            renewal.turn(&registry, current, false, now, TURN);
        }
        assert_eq!(told(&registry), 0, "the new one is not taken yet");
        renewal.turn(&registry, current, true, 115, TURN);
        assert!((1..=3).contains(&told(&registry)), "{} at once", told(&registry));
        // Whoever takes the old authority out by that would have these answered 401.
        assert_eq!(renewal.turn(&registry, current, true, 120, TURN), 50);
        lasting[0].set_upgraded();
        lasting[1..]
            .iter()
            .for_each(|connection| connection.set_front_proxy(current));
        assert_eq!(renewal.turn(&registry, current, true, 125, TURN), 10_000);
    }

    #[test]
    fn nobody_is_told_for_a_certificate_that_is_in_use_or_not_taken() {
        let mut renewal = Renewal::default();
        let current = FrontProxy { issue: 1, until: 9000 };
        let same = registry(9, 1, 9000);
        assert_eq!(renewal.turn(&same, current, true, 0, TURN), 9000);
        assert_eq!(told(&same), 0);
        let older = registry(9, 0, 1000);
        for now in (0..940).step_by(5) {
            assert_eq!(renewal.turn(&older, current, false, now, TURN), 1000);
        }
        assert_eq!(told(&older), 0, "they work, and would find a port that is closed");
        for now in (940..970).step_by(5) {
            renewal.turn(&older, current, false, now, TURN);
        }
        assert_eq!(told(&older), 9, "soon nothing works");
        // While the apiserver does not take it the time is not used up: nobody is told in a rush when it does.
        let older = registry(100, 0, 10_000);
        let mut renewal = Renewal::default();
        for now in (0..=4000).step_by(5) {
            renewal.turn(&older, current, false, now, TURN);
        }
        renewal.turn(&older, current, true, 4005, TURN);
        assert!(told(&older) <= 2, "{} at once", told(&older));
        // A second renewal while the first lasts.
        let mut renewal = Renewal::default();
        let two = registry(100, 0, 10_000);
        for (issue, now) in [(1, 0), (2, 5), (2, 10)] {
            renewal.turn(&two, FrontProxy { issue, until: i64::MAX }, true, now, TURN);
        }
        assert!((1..5).contains(&told(&two)));
    }
}
