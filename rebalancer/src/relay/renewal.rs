//! The renewal of the front-proxy certificate: whoever is served with the last one is told to go before it ends, since
//! kube-apiserver judges it at each request.
//!
//! Input: which certificate is in use, and the registry. Output: orders to connections. Must never move many clients at
//! once while there is time, nor any while the apiserver does not take the new one.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::Duration,
};

use rustls::pki_types::CertificateDer;

use super::{expiry::earliest_of, registry::Registry};
use crate::shim::wire::Upstream;

/// A front-proxy certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontProxy {
    /// Which one it is, by its chain: a file that is written anew with the same one, or put back, says no other.
    pub issue: u64,
    /// When the first certificate of its chain ends, in seconds since 1970.
    pub until: i64,
}

impl FrontProxy {
    /// The certificate that this chain shows.
    pub fn of(chain: &[CertificateDer<'_>]) -> Self {
        // Only told apart, and the files are the operator's: nobody makes two that look alike.
        let mut hasher = DefaultHasher::new();
        chain.iter().for_each(|certificate| certificate.hash(&mut hasher));
        Self {
            issue: hasher.finish(),
            until: earliest_of(chain).unwrap_or(i64::MAX),
        }
    }
}

/// Why a new front proxy's certificate is not used yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// The apiserver does not take it.
    Refused,
    /// It does not answer.
    Unanswered,
}

impl Waiting {
    /// After the apiserver was asked once more, and took it or not or did not say; `is_good` is whether the last certificate is.
    pub fn after(before: Option<Self>, taken: Option<bool>, is_good: bool) -> Option<Self> {
        match taken {
            Some(true) => None,
            // It is no better when the last one has ended.
            Some(false) => Some(Self::Refused),
            // Nor by an answer that says nothing.
            None if before == Some(Self::Refused) => before,
            // What nobody has judged is not worth a port that works.
            None => is_good.then_some(Self::Unanswered),
        }
    }
}

/// Over how long clients are told, when the last certificate is good for twice as long.
const LONGEST: i64 = 3600;

/// Over how many seconds those are told whose certificate has ended: they are answered 401.
const ENDED: i64 = 30;

/// When so little is left, an apiserver that is overloaded is no reason to wait.
const SOON: i64 = 600;

/// When so little is left, clients are told whatever the apiserver's state: they would be answered 401.
pub const LAST: i64 = 60;

/// Whether the apiserver can be expected to answer with that issue those whose own certificate is good for so many seconds.
/// One that nobody has tried may be one that it answers 401.
pub fn may_serve(registry: &Registry, issue: u64, left: i64) -> bool {
    let is_up = match registry.upstream() {
        Upstream::Ready => true,
        Upstream::Overloaded => left <= SOON,
        _ => false,
    };
    is_up && registry.takes(issue)
}

/// Who is to be told, and by when.
#[derive(Debug, Default)]
pub struct Renewal {
    /// The issue in use.
    issue: Option<u64>,
    /// Since it is, it has been said that clients of another one are told.
    is_said: bool,
    /// By the end of each earlier certificate, in seconds since 1970.
    paces: BTreeMap<i64, Pace>,
}

/// How fast the clients of one earlier certificate are told. A wall clock that jumps is not time that has passed: what has is
/// counted in turns in which somebody could be told, and so is none of it made up for in a rush.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    /// In how many seconds all are to have been told.
    span: i64,
    /// How many of them have passed.
    spent: i64,
    /// The same of [`ENDED`].
    spent_since_end: i64,
}

impl Pace {
    /// In how many seconds the others are to have been told, when the certificate has `rest` left.
    fn left(&mut self, rest: i64) -> i64 {
        if rest <= 0 {
            return ENDED - self.spent_since_end;
        }
        // A clock that was wrong when it was looked at first has more of them now; one that says so now may be right.
        self.span = self.span.max(LONGEST.min((rest + self.spent) / 2));
        (self.span - self.spent).min(rest / 2)
    }

    fn spend(&mut self, rest: i64, turn: Duration) {
        let spent = if rest <= 0 {
            &mut self.spent_since_end
        } else {
            &mut self.spent
        };
        *spent += turn.as_secs() as i64;
    }
}

impl Renewal {
    /// One look at the connections, each `turn`; says when the first certificate in use ends.
    pub fn turn(&mut self, registry: &Registry, current: FrontProxy, now: i64, turn: Duration) -> i64 {
        if self.issue != Some(current.issue) {
            (self.issue, self.is_said) = (Some(current.issue), false);
        }
        let all = registry.outdated(current.issue);
        let Some((first, _)) = all.first() else {
            self.paces.clear();
            return current.until;
        };
        let first = first.until.min(current.until);
        let outdated: Vec<_> = all
            .iter()
            .filter(|(outdated, _)| outdated.may_be_told)
            .map(|(outdated, connection)| (outdated.until, connection))
            .collect();
        let mut paces = BTreeMap::new();
        for group in outdated.chunk_by(|(one, _), (other, _)| one == other) {
            let (until, rest) = (group[0].0, group[0].0 - now);
            let mut pace = self.paces.get(&until).copied().unwrap_or_default();
            let left = pace.left(rest);
            if may_serve(registry, current.issue, rest) || (1..=LAST).contains(&rest) {
                let many = share(group.len(), left, turn);
                group.iter().take(many).for_each(|(_, connection)| connection.lets_go());
                pace.spend(rest, turn);
            }
            if !self.is_said {
                tracing::info!(
                    clients = group.len(),
                    certificate_ends_in_s = rest,
                    seconds = left,
                    "the front-proxy certificate has changed: clients that are served with an earlier one are told to go"
                );
            }
            paces.insert(until, pace);
        }
        self.is_said |= !paces.is_empty();
        self.paces = paces;
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
    use crate::{
        relay::registry::Connection,
        shim::wire::{Protocol, State},
    };

    const TURN: Duration = Duration::from_secs(5);

    /// How far the clock is beside the right one, so many seconds after the beginning.
    type Jump = Box<dyn Fn(i64) -> i64>;

    fn registry(clients: u64, issue: u64, until: i64) -> Arc<Registry> {
        let registry = Registry::new("i".to_owned());
        for id in 0..clients {
            client(&registry, id, Protocol::H2, FrontProxy { issue, until });
        }
        registry
    }

    /// One more, that is served with that certificate.
    fn client(registry: &Arc<Registry>, id: u64, protocol: Protocol, used: FrontProxy) -> Arc<Connection> {
        let address = SocketAddr::from(([192, 0, 2, 7], 1));
        let connection = registry.open(id, address, address);
        connection.established(protocol, Some("alice"));
        connection.set_front_proxy(used);
        connection
    }

    /// A certificate that does not end.
    fn endless(issue: u64) -> FrontProxy {
        FrontProxy { issue, until: i64::MAX }
    }

    /// A turn beside an apiserver that is ready, and has been seen to take the certificate in use or has not.
    fn look(renewal: &mut Renewal, registry: &Registry, current: FrontProxy, is_taken: bool, now: i64) -> i64 {
        registry.set_upstream(Upstream::Ready);
        registry.set_taken(current.issue, is_taken);
        renewal.turn(registry, current, now, TURN)
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
            let current = endless(1);
            let (mut most, mut before) = (0, 0);
            for now in (0..=span).step_by(5) {
                let end = look(&mut renewal, &registry, current, true, now);
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

    /// An apiserver that restarts, or a node without a port left, says nothing about a certificate that was refused a moment ago.
    #[test]
    fn a_certificate_is_used_when_it_is_taken_and_a_refused_one_by_no_silence() {
        use Waiting::{Refused, Unanswered};
        for is_good in [true, false] {
            for before in [None, Some(Unanswered), Some(Refused)] {
                assert_eq!(Waiting::after(before, Some(true), is_good), None);
                assert_eq!(Waiting::after(before, Some(false), is_good), Some(Refused));
            }
            assert_eq!(Waiting::after(Some(Refused), None, is_good), Some(Refused));
        }
        for before in [None, Some(Unanswered)] {
            assert_eq!(Waiting::after(before, None, true), Some(Unanswered));
            assert_eq!(Waiting::after(before, None, false), None, "nothing is lost by it");
        }
    }

    #[test]
    fn a_wall_clock_that_jumps_hurries_nobody() {
        const DAY: i64 = 86_400;
        let began = 100 * DAY;
        // A day ahead for ten minutes, and then a day behind; or for one look, the first or a later one, to shortly before the
        // certificate ends, or past its end.
        let days = |passed: i64| [0, DAY, -DAY, 3600][(passed / 600).min(3) as usize];
        let mut jumps: Vec<(i64, Jump)> = vec![(400 * DAY, Box::new(days))];
        for at in [0, 5, 600] {
            for to in [35_900, 36_100] {
                let moment = move |passed: i64| if passed == at { to - passed } else { 0 };
                jumps.push((began + 36_000, Box::new(moment)));
            }
        }
        for (case, (until, beside)) in jumps.iter().enumerate() {
            let registry = registry(1000, 0, *until);
            let current = endless(1);
            let mut renewal = Renewal::default();
            let (mut before, mut last) = (0, 0);
            for passed in (0..=LONGEST + 60).step_by(5) {
                let now = began + passed + beside(passed);
                // It may take the apiserver a while to be seen to take it.
                look(&mut renewal, &registry, current, passed >= 5, now);
                let many = told(&registry) - before;
                // By a clock that says so, the certificate ends in 100 s, or has ended: who is to be told in 50 or 30 s?
                let most = match until - now {
                    ..=0 => 1000 / 6 + 1,
                    1..1000 => 100,
                    _ => 4,
                };
                assert!(many <= most, "case {case}: {many} at once after {passed} s");
                if many > 0 {
                    last = passed;
                }
                before += many;
            }
            assert_eq!(before, 1000, "case {case}");
            assert!(last > LONGEST / 2, "case {case}: all were told after {last} s");
        }
    }

    #[test]
    fn an_overloaded_apiserver_is_waited_for_while_there_is_time_and_ended_ones_are_told_at_a_pace() {
        let current = endless(1);
        let older = registry(300, 0, 2000);
        older.set_upstream(Upstream::Overloaded);
        older.set_taken(1, true);
        let mut renewal = Renewal::default();
        for now in (0..2000 - SOON).step_by(5) {
            renewal.turn(&older, current, now, TURN);
        }
        assert_eq!(told(&older), 0, "they work");
        let mut before = 0;
        for now in (2000 - SOON..2000).step_by(5) {
            renewal.turn(&older, current, now, TURN);
            let many = told(&older) - before;
            assert!(many <= 6, "{many} at once with {} s left", 2000 - now);
            before += many;
        }
        assert_eq!(before, 300);

        let ended = registry(600, 0, 100);
        let mut renewal = Renewal::default();
        look(&mut renewal, &ended, current, false, 200);
        assert_eq!(told(&ended), 0, "the new one is not taken yet");
        let mut before = 0;
        for now in (205..=205 + ENDED).step_by(5) {
            look(&mut renewal, &ended, current, true, now);
            let many = told(&ended) - before;
            assert!(many <= 101, "{many} at once");
            before += many;
        }
        assert_eq!(before, 600);
    }

    #[test]
    fn each_earlier_certificate_has_a_pace_of_its_own() {
        let registry = registry(1000, 1, 400_000);
        for id in 1000..1004 {
            client(&registry, id, Protocol::H2, FrontProxy { issue: 0, until: 120 });
        }
        let current = endless(2);
        let mut renewal = Renewal::default();
        assert_eq!(look(&mut renewal, &registry, current, true, 0), 120);
        for now in (5..=60).step_by(5) {
            look(&mut renewal, &registry, current, true, now);
        }
        assert_eq!(look(&mut renewal, &registry, current, true, 65), 400_000);
        // Four who had a minute, and as many of the others as a minute of an hour is.
        let all = told(&registry);
        assert!((4 + 10..=4 + 2 * 1000 / 60).contains(&all), "{all} in a minute");
    }

    #[test]
    fn each_renewal_is_said_also_when_a_certificate_comes_back() {
        let mut renewal = Renewal::default();
        let registry = registry(3, 1, 9000);
        let used = FrontProxy { issue: 1, until: 9000 };
        for (current, is_said) in [(used, false), (endless(2), true), (used, false), (endless(2), true)] {
            look(&mut renewal, &registry, current, false, 0);
            assert_eq!(renewal.is_said, is_said, "{current:?}");
        }
    }

    /// Clients of HTTP/1.1 are not told at all: the apiserver is connected to anew for them. And one of HTTP/2 was not told in
    /// time.
    #[test]
    fn those_whose_certificate_has_ended_hurry_nobody_else() {
        let registry = registry(100, 1, 10_000);
        let ended = FrontProxy { issue: 0, until: 50 };
        let lasting: Vec<_> = (100..120)
            .map(|id| client(&registry, id, Protocol::Http1, ended))
            .collect();
        client(&registry, 120, Protocol::H2, ended);
        let current = endless(2);
        let mut renewal = Renewal::default();
        for now in [100, 105, 110] {
            look(&mut renewal, &registry, current, false, now);
        }
        assert_eq!(told(&registry), 0, "the new one is not taken yet");
        look(&mut renewal, &registry, current, true, 115);
        assert!((1..=3).contains(&told(&registry)), "{} at once", told(&registry));
        // Whoever takes the old authority out by that would have these answered 401.
        assert_eq!(look(&mut renewal, &registry, current, true, 120), 50);
        lasting[0].set_upgraded();
        lasting[1..]
            .iter()
            .for_each(|connection| connection.set_front_proxy(current));
        assert_eq!(look(&mut renewal, &registry, current, true, 125), 10_000);
    }

    #[test]
    fn nobody_is_told_for_a_certificate_that_is_in_use_or_not_taken() {
        let mut renewal = Renewal::default();
        let current = FrontProxy { issue: 1, until: 9000 };
        let same = registry(9, 1, 9000);
        assert_eq!(look(&mut renewal, &same, current, true, 0), 9000);
        assert_eq!(told(&same), 0);
        let older = registry(9, 0, 1000);
        for now in (0..940).step_by(5) {
            assert_eq!(look(&mut renewal, &older, current, false, now), 1000);
        }
        assert_eq!(told(&older), 0, "they work, and would find a port that is closed");
        for now in (940..1000).step_by(5) {
            look(&mut renewal, &older, current, false, now);
        }
        assert_eq!(told(&older), 9, "soon nothing works");
        // While the apiserver does not take it the time is not used up: nobody is told in a rush when it does.
        let older = registry(100, 0, 10_000);
        let mut renewal = Renewal::default();
        for now in (0..=4000).step_by(5) {
            look(&mut renewal, &older, current, false, now);
        }
        look(&mut renewal, &older, current, true, 4005);
        assert!(told(&older) <= 2, "{} at once", told(&older));
        // A second renewal while the first lasts.
        let mut renewal = Renewal::default();
        let two = registry(100, 0, 10_000);
        for (issue, now) in [(1, 0), (2, 5), (2, 10)] {
            look(&mut renewal, &two, endless(issue), true, now);
        }
        assert_eq!(told(&two), 3, "one in each turn");
        // One that the apiserver does not take stops it.
        let next = endless(3);
        look(&mut renewal, &two, next, false, 15);
        assert_eq!(told(&two), 3);
        look(&mut renewal, &two, next, true, 20);
        assert_eq!(told(&two), 4, "and it goes on where it was");
    }
}
