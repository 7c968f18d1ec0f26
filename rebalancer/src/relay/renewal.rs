//! The renewal of the front-proxy certificate: whoever is served with the last one is told to go before it ends, since
//! kube-apiserver judges it at each request.
//!
//! Input: which certificate is in use, and the registry. Output: orders to connections. Must never move many clients at
//! once while there is time, nor any while the apiserver does not take the new one.

use std::time::Duration;

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
const LAST: i64 = 60;

/// Who is to be told, and by when.
#[derive(Debug, Default)]
pub struct Renewal {
    /// The issue in use, and when the last client of an earlier one is to have been told, in seconds since 1970.
    by: Option<(u64, i64)>,
}

impl Renewal {
    /// One look at the connections, each `turn`; says when the first certificate in use ends.
    pub fn turn(&mut self, registry: &Registry, current: FrontProxy, is_ready: bool, now: i64, turn: Duration) -> i64 {
        let outdated = registry.outdated(current.issue);
        let Some((first, _)) = outdated.first() else {
            return current.until;
        };
        let first = *first;
        let by = match self.by {
            Some((issue, by)) if issue == current.issue => by,
            _ => {
                let by = now + LONGEST.min((first - now) / 2);
                tracing::info!(
                    clients = outdated.len(),
                    seconds = (by - now).max(0),
                    "the front-proxy certificate has changed: clients that are served with the last one are told to go"
                );
                self.by = Some((current.issue, by));
                // The apiserver is asked with the new one until the next turn.
                if first - now > LAST {
                    return first.min(current.until);
                }
                by
            }
        };
        if is_ready || first - now <= LAST {
            for (_, connection) in outdated.iter().take(share(outdated.len(), by - now, turn)) {
                connection.lets_go();
            }
        }
        first.min(current.until)
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
        renewal.turn(&older, current, false, 940, TURN);
        assert_eq!(told(&older), 9, "soon nothing works");
        // A second renewal while the first lasts.
        let mut renewal = Renewal::default();
        let two = registry(100, 0, 10_000);
        for (issue, now) in [(1, 0), (2, 5), (2, 10)] {
            renewal.turn(&two, FrontProxy { issue, until: i64::MAX }, true, now, TURN);
        }
        assert!((1..5).contains(&told(&two)));
    }
}
