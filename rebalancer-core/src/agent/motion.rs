//! Who is in transit: clients that were told to go and have not landed anywhere yet.
//!
//! Job: follow every apiserver's totals from one look to the next, and set GOAWAYs off against landings; whom a relay told
//! to go when it handed over is on the way as well, though no plan told him.
//! Input: views. Output: what happened since the last look, and how many clients are in transit.
//! Must never take a restarted agent's totals for movements, nor clients that come for reasons of their own for those who
//! were told: it learns how many come and go anyway.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use super::{
    memory::{RememberedStrangers, RememberedTransit},
    strangers::{Counts, Seen, Strangers},
};
use crate::{
    ids::{ApiserverName, Timestamp},
    planner::Transit,
    policy::Weight,
    view::{Entry, ServerState, Snapshot, View},
};

/// Totals of one apiserver at an instant; another instance of its agent starts anew.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Totals {
    /// Of which instance.
    pub instance: u64,
    /// GOAWAYs.
    pub goaways: u64,
    /// Clients that its shim told when it took its leave.
    pub left: u64,
    /// Landings.
    pub accepted: u64,
    /// What those who were told weighed, in the unit of the weight.
    pub told_load: f64,
    /// What a connection weighs.
    pub each: f64,
    /// Active connections.
    pub connections: u64,
    /// Clients that left untold.
    pub departed: u64,
}

impl Totals {
    fn of(snapshot: &Snapshot) -> Self {
        Self {
            instance: snapshot.instance,
            goaways: snapshot.goaways_total,
            left: snapshot.left_total,
            accepted: snapshot.accepted_total,
            told_load: snapshot.told_load_total,
            each: each_of(snapshot.load, snapshot.connections),
            connections: snapshot.connections,
            departed: snapshot.departed_total,
        }
    }

    /// How many have landed since, where `in_transit` are on their way. Another instance takes those that are there when it
    /// begins for older than they may be: who it has more than the last one had landed between the two, or came for reasons
    /// of his own, for it may have been away for long.
    fn landings_until(self, new: Self, in_transit: u64) -> u64 {
        if self.instance == new.instance {
            new.accepted.saturating_sub(self.accepted)
        } else {
            new.connections.saturating_sub(self.connections).min(in_transit)
        }
    }
}

/// What happened since the last look.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Moves {
    /// Connections that landed, by apiserver.
    pub landings: Vec<(ApiserverName, u64)>,
    /// GOAWAYs sent by all.
    pub told: u64,
    /// Landings of those who were told; the others came for reasons of their own.
    pub landed: u64,
    /// Since the look before.
    pub passed: Duration,
}

impl Moves {
    /// Landings on all apiservers.
    pub fn all(&self) -> u64 {
        self.landings.iter().map(|(_, count)| count).sum()
    }

    /// How many of those who were told landed on none of these. Who of them was told is not known: as many as of all.
    pub fn elsewhere(&self, donors: &[ApiserverName]) -> f64 {
        (Self::elsewhere_of(&self.landings, donors) * self.landed) as f64 / self.all().max(1) as f64
    }

    /// How many of these landed on none of those.
    pub fn elsewhere_of(landings: &Counts, donors: &[ApiserverName]) -> u64 {
        let donors: BTreeSet<&ApiserverName> = donors.iter().collect();
        let others = landings.iter().filter(|(name, _)| !donors.contains(name));
        others.map(|(_, count)| count).sum()
    }
}

/// Clients in transit, all apiservers together.
#[derive(Clone, Debug, Default)]
pub(super) struct Motion {
    last: BTreeMap<ApiserverName, Totals>,
    looked: Option<Timestamp>,
    /// Before that nobody looked for so long: the clock began with this process.
    away: Duration,
    has_begun: bool,
    told: u64,
    landed: u64,
    /// Since when more have landed than were told.
    ahead: Option<Timestamp>,
    draining: u64,
    draining_streams: u64,
    /// What those who were told weighed.
    told_load: f64,
    /// GOAWAYs of the last settle time.
    recent: VecDeque<(Timestamp, u64)>,
    strangers: Strangers,
}

impl Motion {
    /// Those whom an earlier process left in transit, `down` before now.
    pub fn resumed(transit: &RememberedTransit, down: Duration, now: Timestamp) -> Self {
        Self {
            last: transit.seen.iter().cloned().collect(),
            has_begun: true,
            told: transit.told,
            landed: transit.landed.min(transit.told),
            told_load: transit.told_load,
            looked: Some(now),
            away: down,
            ..Self::default()
        }
    }

    /// What another process needs to go on.
    pub fn remembered(&self) -> RememberedTransit {
        RememberedTransit {
            told: self.told,
            landed: self.landed.min(self.told),
            told_load: self.told_load,
            seen: self.last.iter().map(|(name, totals)| (name.clone(), *totals)).collect(),
        }
    }

    /// Goes on with what an earlier process knew of those who come and go anyway.
    pub fn resume_strangers(&mut self, remembered: &RememberedStrangers) {
        self.strangers = Strangers::resumed(remembered);
    }

    /// The same for another process.
    pub fn remembered_strangers(&self) -> RememberedStrangers {
        self.strangers.remembered()
    }

    /// Who was told, who landed, what they weighed: what is worth a write when it changes.
    pub fn figures(&self) -> (u64, u64, f64) {
        (self.told, self.landed.min(self.told), self.told_load)
    }

    /// Looks at a view; `apiservers` is how many there are when it is complete.
    ///
    /// Landings count from the first GOAWAY on, until all who were told have landed. Whoever was told and has not landed
    /// still holds the old connection, or was told within the settle time: a client without streams closes its connection
    /// at once and opens the next with its next request.
    pub fn look(&mut self, view: &View, apiservers: usize, settle: Duration, now: Timestamp) -> Moves {
        self.draining = view.entries.values().map(|entry| entry.snapshot.draining).sum();
        self.draining_streams = view.entries.values().map(|entry| entry.snapshot.draining_streams).sum();
        if !self.has_begun && view.entries.len() == apiservers {
            self.begin(view);
        }
        if view.entries.len() == apiservers {
            self.last.retain(|name, _| view.entries.contains_key(name));
        }
        let mut moves = Moves::default();
        let mut others = 0;
        let mut departures = Vec::new();
        let mean = mean_load(view);
        let mut in_transit = self.in_transit();
        // What an agent knows that has not seen its connections yet is no total.
        let known = |(_, entry): &(&ApiserverName, &Entry)| entry.snapshot.state != ServerState::Unknown;
        for (name, entry) in view.entries.iter().filter(known) {
            let new = Totals::of(&entry.snapshot);
            let old = self.last.insert(name.clone(), new).unwrap_or(new);
            let landings = old.landings_until(new, in_transit);
            if old.instance != new.instance {
                in_transit -= landings;
            }
            let old = if old.instance == new.instance { old } else { new };
            departures.push((name.clone(), new.departed.saturating_sub(old.departed)));
            let left = new.left.saturating_sub(old.left);
            // What they weighed before: now they drain, and weigh nothing there any more.
            let each = if old.each > 0.0 { old.each } else { mean };
            self.told_load += (new.told_load - old.told_load).max(0.0) + left as f64 * each;
            others += left;
            moves.told += new.goaways.saturating_sub(old.goaways);
            moves.landings.push((name.clone(), landings));
        }
        self.told += moves.told + others;
        if moves.told + others > 0 {
            self.recent.push_back((now, moves.told + others));
        }
        while self.recent.front().is_some_and(|(at, _)| now.since(*at) >= settle) {
            self.recent.pop_front();
        }
        let is_busy = view.entries.values().any(|entry| entry.snapshot.plan_in_flight);
        let passed = self.looked.map_or(Duration::ZERO, |looked| now.since(looked)) + std::mem::take(&mut self.away);
        self.looked = Some(now);
        moves.passed = passed;
        let is_quiet = self.told == 0 && !is_busy;
        moves.landed = self.strangers.left_of(Seen {
            landings: &moves.landings,
            departures: &departures,
            passed,
            is_quiet,
            is_whole: view.entries.len() == apiservers && view.entries.values().all(is_heard),
        });
        if !is_quiet {
            self.landed += moves.landed;
            self.settle_ahead(now);
        }
        if self.in_transit() == 0 && !is_busy {
            (self.told, self.landed, self.told_load) = (0, 0, 0.0);
        }
        moves
    }

    /// How many of those who landed on none of the `donors` are evidence that whoever is told lands there.
    pub fn evidence(&mut self, moves: &Moves, donors: &[ApiserverName]) -> u64 {
        let evidence = self.strangers.evidence(&moves.landings, donors, moves.passed);
        evidence.min(moves.landed)
    }

    /// How many who were told must land elsewhere to be seen among those who land there anyway.
    pub fn strangers_hide<'a>(
        &self,
        apiservers: impl Iterator<Item = &'a ApiserverName>,
        donors: &[ApiserverName],
    ) -> f64 {
        self.strangers.hide(apiservers, donors)
    }

    /// A landing may be seen before its GOAWAY is: the snapshots of two apiservers are of two instants. Whose GOAWAY is not seen
    /// by and by was not told, and pays for nobody who is told later.
    fn settle_ahead(&mut self, now: Timestamp) {
        if self.landed <= self.told {
            self.ahead = None;
        } else if now.since(*self.ahead.get_or_insert(now)) >= AHEAD {
            self.landed = self.told;
            self.ahead = None;
        }
    }

    /// The first complete view: the peers that were there before know who is in transit; when none was, everybody who
    /// drains may be.
    fn begin(&mut self, view: &View) {
        self.has_begun = true;
        let snapshots = || view.entries.values().map(|entry| &entry.snapshot);
        let were_there = snapshots().any(|snapshot| snapshot.goaways_total + snapshot.accepted_total > 0);
        let known = snapshots().map(|snapshot| snapshot.in_transit).max().unwrap_or(0);
        self.told = if were_there {
            known.min(self.draining)
        } else {
            self.draining
        };
        self.told_load = self.told as f64 * mean_load(view);
    }

    /// Clients that were told and have not landed.
    pub fn in_transit(&self) -> u64 {
        self.told.saturating_sub(self.landed).min(self.draining + self.recent())
    }

    /// Those of them that are about to land: they were told within the settle time. The others may keep their old
    /// connection for minutes, while nobody waits for them.
    pub fn landing(&self) -> u64 {
        self.in_transit().min(self.recent())
    }

    fn recent(&self) -> u64 {
        self.recent.iter().map(|(_, told)| told).sum()
    }

    /// Those clients with what they weigh. Streams are known exactly: they are on draining connections until they end and
    /// are opened anew. Requests and bytes are taken for what those who were told weighed on average.
    pub fn transit(&self, weight: Weight) -> Transit {
        let clients = self.in_transit() as f64;
        let load = match weight {
            Weight::Connections => clients,
            Weight::Requests | Weight::Bytes => clients * self.told_load / self.told.max(1) as f64,
            Weight::Streams => self.draining_streams as f64,
        };
        Transit { clients, load }
    }
}

fn each_of(load: f64, connections: u64) -> f64 {
    load / connections.max(1) as f64
}

/// What a connection weighs, over all apiservers.
fn mean_load(view: &View) -> f64 {
    let snapshots = || view.entries.values().map(|entry| &entry.snapshot);
    each_of(
        snapshots().map(|snapshot| snapshot.load).sum(),
        snapshots().map(|snapshot| snapshot.connections).sum(),
    )
}

/// A landing is seen so long before its GOAWAY at most.
const AHEAD: Duration = Duration::from_secs(2);

/// What an older snapshot shows is not of the moment of a look.
const HEARD: Duration = Duration::from_secs(5);

fn is_heard(entry: &Entry) -> bool {
    entry.snapshot.state != ServerState::Unknown && entry.age < HEARD
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::Part;

    const SETTLE: Duration = Duration::from_secs(10);

    /// One apiserver: name, instance, GOAWAYs, accepted, draining, in transit as its agent takes it.
    type Row = (&'static str, u64, u64, u64, u64, u64);

    fn view(rows: &[Row]) -> View {
        let entries = rows
            .iter()
            .map(|(name, instance, goaways, accepted, draining, in_transit)| {
                let snapshot = Snapshot {
                    apiserver: ApiserverName::new(*name),
                    state: ServerState::Ready,
                    connections: 100,
                    load: 100.0,
                    unmovable: 0.0,
                    draining: *draining,
                    draining_streams: 0,
                    goaways_total: *goaways,
                    told_load_total: *goaways as f64,
                    left_total: 0,
                    refused: 0,
                    node_local: 0,
                    accepted_total: *accepted,
                    departed_total: 0,
                    counts_after: Duration::ZERO,
                    in_transit: *in_transit,
                    capacity: 1.0,
                    part: Part::Acts,
                    plan_in_flight: false,
                    rebalancing: false,
                    instance: *instance,
                    names: vec![],
                    release: None,
                    restarts: 0,
                    switch: crate::agent::Switch::default(),
                };
                (
                    snapshot.apiserver.clone(),
                    Entry {
                        snapshot,
                        age: Duration::ZERO,
                    },
                )
            });
        View {
            entries: entries.collect(),
        }
    }

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_millis(seconds * 1_000)
    }

    #[test]
    fn who_was_told_is_in_transit_until_somebody_landed() {
        let mut motion = Motion::default();
        motion.look(&view(&[("a", 1, 0, 0, 0, 0), ("b", 1, 0, 0, 0, 0)]), 2, SETTLE, at(0));
        let moves = motion.look(&view(&[("a", 1, 10, 0, 10, 0), ("b", 1, 0, 0, 0, 0)]), 2, SETTLE, at(1));
        assert_eq!((moves.told, motion.in_transit(), motion.landing()), (10, 10, 10));
        let moves = motion.look(&view(&[("a", 1, 10, 2, 8, 0), ("b", 1, 0, 4, 0, 0)]), 2, SETTLE, at(2));
        assert_eq!((moves.landed, moves.elsewhere(&[ApiserverName::new("a")])), (6, 4.0));
        assert_eq!(motion.in_transit(), 4);
        motion.look(&view(&[("a", 1, 10, 2, 3, 0), ("b", 1, 0, 4, 0, 0)]), 2, SETTLE, at(20));
        assert_eq!(
            (motion.in_transit(), motion.landing()),
            (3, 0),
            "who closed long ago is not coming"
        );
        let restarted = view(&[("a", 2, 0, 0, 3, 0), ("b", 1, 0, 9, 0, 0)]);
        assert_eq!(
            motion.look(&restarted, 2, SETTLE, at(21)).told,
            0,
            "another instance begins anew"
        );
    }

    #[test]
    fn those_who_come_and_go_anyway_pay_for_nobody() {
        for (departing, expected) in [(2, 0..=1), (0, 18..=20)] {
            let mut motion = Motion::default();
            let (mut accepted, mut landed) = (0, 0);
            for second in 0..90 {
                accepted += 2;
                let told = if second < 80 { 0 } else { 30 };
                let mut view = view(&[("a", 1, told, accepted, told, 0)]);
                let a = view.entries.get_mut(&ApiserverName::new("a")).expect("it is there");
                a.snapshot.departed_total = departing * (second + 1);
                landed += motion.look(&view, 1, SETTLE, at(second)).landed;
            }
            assert!(
                expected.contains(&landed),
                "{landed} landed of 30 who drain, while {departing} a second leave"
            );
            assert_eq!(motion.in_transit(), 30 - landed);
        }
    }

    /// Plan follows plan, so that nobody is ever seen to be level; clients come for reasons of their own meanwhile.
    #[test]
    fn who_comes_while_nobody_is_on_the_way_pays_for_nobody_who_is_told_later() {
        let busy = |goaways, accepted, draining| {
            let mut view = view(&[("a", 1, goaways, accepted, draining, 0)]);
            let a = view.entries.get_mut(&ApiserverName::new("a")).expect("it is there");
            a.snapshot.plan_in_flight = true;
            view
        };
        let mut motion = Motion::default();
        motion.look(&busy(0, 0, 0), 1, SETTLE, at(0));
        motion.look(&busy(2, 0, 2), 1, SETTLE, at(1));
        motion.look(&busy(2, 12, 0), 1, SETTLE, at(2));
        assert_eq!(motion.in_transit(), 0);
        // One landing is seen before its GOAWAY.
        motion.look(&busy(5, 13, 2), 1, SETTLE, at(3));
        assert_eq!(motion.in_transit(), 0);
        motion.look(&busy(5, 13, 2), 1, SETTLE, at(5));
        motion.look(&busy(9, 13, 4), 1, SETTLE, at(6));
        assert_eq!(motion.in_transit(), 4);
    }

    /// A relay that hands over tells everybody: they are on their way, and no plan's cost.
    #[test]
    fn whom_a_relay_told_when_it_handed_over_is_in_transit() {
        let mut motion = Motion::default();
        let mut before = view(&[("a", 1, 0, 0, 0, 0), ("b", 1, 0, 0, 0, 0)]);
        let a = before.entries.get_mut(&ApiserverName::new("a")).expect("it is there");
        a.snapshot.load = 250.0;
        motion.look(&before, 2, SETTLE, at(0));
        let a = before.entries.get_mut(&ApiserverName::new("a")).expect("it is there");
        (a.snapshot.left_total, a.snapshot.draining) = (100, 100);
        (a.snapshot.connections, a.snapshot.load) = (0, 0.0);
        let moves = motion.look(&before, 2, SETTLE, at(1));
        assert_eq!((moves.told, motion.in_transit()), (0, 100));
        let transit = motion.transit(Weight::Requests);
        assert_eq!(transit.load, 250.0, "what they weighed before they were told");
        let later = view(&[("a", 1, 0, 20, 40, 0), ("b", 1, 0, 40, 0, 0)]);
        motion.look(&later, 2, SETTLE, at(30));
        assert_eq!(motion.in_transit(), 40);
    }

    /// Nobody waits for those who land between the last word of one agent and the first of the next.
    #[test]
    fn who_lands_while_an_agent_restarts_has_landed() {
        let connected = |rows: &[Row], connections: u64| {
            let mut view = view(rows);
            let b = view.entries.get_mut(&ApiserverName::new("b")).expect("it is there");
            b.snapshot.connections = connections;
            view
        };
        let before = [("a", 1, 0, 0, 0, 0), ("b", 1, 0, 0, 0, 0)];
        let told = [("a", 1, 30, 10, 30, 0), ("b", 1, 0, 5, 0, 0)];
        // Its counts begin anew; five more landed before, two of which are too young to count yet.
        let restarted = [("a", 1, 30, 10, 30, 0), ("b", 2, 0, 0, 0, 0)];
        let mut motion = Motion::default();
        motion.look(&connected(&before, 100), 2, SETTLE, at(0));
        motion.look(&connected(&told, 105), 2, SETTLE, at(1));
        assert_eq!(motion.in_transit(), 15);
        motion.look(&connected(&restarted, 110), 2, SETTLE, at(2));
        assert_eq!(motion.in_transit(), 10);

        // The same as the agent that was started again sees it, of itself and of the other.
        let mut motion = Motion::default();
        motion.look(&connected(&before, 100), 2, SETTLE, at(0));
        motion.look(&connected(&told, 105), 2, SETTLE, at(1));
        let mut next = Motion::resumed(&motion.remembered(), Duration::from_secs(2), at(3));
        let later = [("a", 1, 30, 12, 30, 0), ("b", 2, 0, 1, 0, 0)];
        next.look(&connected(&later, 111), 2, SETTLE, at(3));
        assert_eq!(next.in_transit(), 15 - 2 - 6);
        // Who leaves meanwhile was not told by anybody.
        let mut next = Motion::resumed(&motion.remembered(), Duration::from_secs(2), at(3));
        next.look(&connected(&restarted, 3), 2, SETTLE, at(3));
        assert_eq!(next.in_transit(), 15);
    }

    #[test]
    fn a_restarted_agent_asks_those_who_were_there() {
        for (rows, expected) in [
            (&[("a", 1, 0, 0, 40, 0), ("b", 1, 50, 70, 20, 12)][..], 12),
            (&[("a", 1, 0, 0, 40, 0), ("b", 1, 0, 0, 20, 0)], 60),
        ] {
            let mut motion = Motion::default();
            motion.look(&view(rows), 3, SETTLE, at(0));
            assert_eq!(motion.in_transit(), 0, "the view is not complete");
            motion.look(&view(rows), 2, SETTLE, at(1));
            assert_eq!(motion.in_transit(), expected, "{rows:?}");
        }
    }
}
