//! One look a turn: what all apiservers show now, and what follows from it, made once and passed along.
//!
//! Job: the view, who moved since the last look, what is learned from that, the balance, and the first doubt.
//! Input: the agent's state and `now`. Output: a [`Look`].
//! Must never decide: everything a turn decides on is in here, and nothing is computed twice.

use std::collections::BTreeMap;

use super::{
    Agent,
    decide::even_of,
    motion::Moves,
    ramp::{Landed, Tellers},
    rebalancing::{Rebalancing, Signs},
};
use crate::{
    hold::Hold,
    ids::{ApiserverName, Timestamp},
    planner::{self, Balance, Transit},
    view::{Entry, ServerState, View},
};

/// What one turn rests on.
#[derive(Clone, Debug)]
pub(super) struct Look {
    /// The snapshots side by side.
    pub view: View,
    /// What happened since the look before.
    pub moves: Moves,
    /// Where the loads stand.
    pub balance: Balance,
    /// Why nothing may be done, if so.
    pub doubt: Option<Hold>,
    /// What it says about a rebalancing.
    pub signs: Signs,
}

impl Agent {
    /// Looks, and learns from what happened since the last look.
    pub(super) fn look(&mut self, now: Timestamp) -> Look {
        let view = self.peers.view(self.snapshot(now), now);
        // What an apiserver's end broke off is no short call.
        let ready = view
            .entries
            .values()
            .filter(|entry| entry.snapshot.state == ServerState::Ready);
        let patience = ready.map(|entry| entry.snapshot.counts_after).max();
        self.table.peers_count_after(patience.unwrap_or_default());
        let apiservers = if self.peers.awaits_roll() {
            usize::MAX
        } else {
            self.peers.names().len()
        };
        let expected = self.motion.in_transit();
        let figures = self.motion.figures();
        let moves = self
            .motion
            .look(&view, apiservers, self.policy.settle + self.table.old_enough(), now);
        self.memory_changes += u64::from(figures != self.motion.figures());
        self.compare_ready(&view, view.entries.len() == apiservers, now);
        self.compare_releases(&view, now);
        self.rebalancing.told(moves.told);
        if moves.told > 0 && self.ramp.others_tell(now) {
            // Together with them, and not an interval later.
            self.next_decision = now;
        }
        if moves.told + moves.landed > 0 {
            self.moved = now;
        }
        let transit = self.motion.transit(self.policy.weight);
        // Who was a donor when they landed, which is at the look before: the snapshot that shows what landed on an apiserver
        // shows it with that, and behind a target that it has just passed it would count as another.
        let donors_now = planner::donors(&view, &self.policy, transit);
        let mut donors = std::mem::replace(&mut self.donors, donors_now.clone());
        if donors.is_empty() {
            donors.clone_from(&donors_now);
        }
        let below = if self.policy.weight.is_counted() {
            planner::below(&view, &self.policy, transit)
        } else {
            // What is measured goes up and down by itself.
            Vec::new()
        };
        let tellers = self.lately_donors(&donors_now, &below, expected + moves.told > 0, now);
        self.tellers.clone_from(&tellers);
        // Nor is one that sends all its clients away a place where they go: whoever comes back to it was sent there by nobody's
        // wish.
        let evacuating = |entry: &(&ApiserverName, &Entry)| entry.1.snapshot.state == ServerState::Evacuating;
        let left: Vec<ApiserverName> = view
            .entries
            .iter()
            .filter(evacuating)
            .map(|(name, _)| name.clone())
            .collect();
        donors.extend(left.iter().cloned());
        let no_places = [tellers.as_slice(), &left].concat();
        let is_any_told = expected + moves.told > 0 || self.plan.is_some();
        // Without donors every landing is elsewhere: that says nothing.
        let evidence = if is_any_told && !tellers.is_empty() {
            self.motion.evidence(&moves, &no_places)
        } else {
            0
        };
        if expected + moves.told > 0 {
            self.rho.learn(&moves.landings, &donors, (expected + moves.told) as f64);
            self.rebalancing.landed(&moves);
            if !tellers.is_empty() {
                let balance = planner::balance(&view, &self.policy, &self.rho, &self.spread, transit);
                let known = Tellers {
                    even: even_of(self.tellers_of(&balance).len(), balance.servers.len()),
                    part: balance.surplus_part,
                    probe: self.probe_of(&balance),
                    interval: self.policy.interval,
                };
                let seen = Landed {
                    landed: moves.landed,
                    elsewhere: moves.elsewhere(&no_places) as u64,
                    evidence,
                };
                if self.ramp.landed(seen, known, now) {
                    self.drop_unsent();
                }
            }
        }
        if let Some(plan) = &mut self.plan {
            plan.saw(&moves, evidence, &self.policy.node);
        }
        let look = self.seen(view, moves, transit, now);
        let ready: Vec<(ApiserverName, u64)> = {
            let landings = look.moves.landings.iter().map(|(name, count)| (name, *count));
            let landed: BTreeMap<&ApiserverName, u64> = landings.collect();
            let servers = look.balance.servers.iter().map(|server| &server.name);
            servers
                .filter_map(|name| Some((name.clone(), *landed.get(name)?)))
                .collect()
        };
        if ready.len() == look.balance.servers.len() {
            let total: f64 = look.balance.servers.iter().map(|server| server.load).sum();
            let above: Vec<bool> = look
                .balance
                .servers
                .iter()
                .map(|server| server.load >= server.fair * total)
                .collect();
            self.spread.learn(&ready, &above);
        }
        look
    }

    /// What a look would show, without learning anything.
    pub(super) fn still(&self, now: Timestamp) -> Look {
        let view = self.peers.view(self.snapshot(now), now);
        self.seen(view, Moves::default(), self.motion.transit(self.policy.weight), now)
    }

    fn seen(&self, view: View, moves: Moves, transit: Transit, now: Timestamp) -> Look {
        let balance = planner::balance(&view, &self.policy, &self.rho, &self.spread, transit);
        let stands_still = now.since(self.moved) >= self.policy.settle + self.policy.interval;
        let signs = Signs::of(&balance, &view, self.motion.landing(), stands_still);
        Look {
            doubt: self.guard(now),
            view,
            moves,
            balance,
            signs,
        }
    }

    /// Whether an upgrade is under way. What was begun before it is not gone on with after it: the loads are others.
    fn compare_releases(&mut self, view: &View, now: Timestamp) {
        let patience = self.policy.upgrade_patience;
        self.upgrade.look(view, patience, now);
        if self.upgrade.hold(patience, now).is_some() {
            self.rebalancing = Rebalancing::Off(0);
        }
    }

    /// When the apiservers are others than before, what was learned of the load balancer is forgotten. One that is not known
    /// for a moment is still the one it was.
    fn compare_ready(&mut self, view: &View, are_all_there: bool, now: Timestamp) {
        let is_ready = |(name, entry): &(&ApiserverName, &Entry)| match entry.snapshot.state {
            ServerState::Ready => true,
            // One that is heard of for the first time may be overloaded since before.
            ServerState::Overloaded => !self.was_whole || self.ready.contains(name),
            ServerState::Unknown => self.ready.contains(name),
            ServerState::Starting | ServerState::Down | ServerState::Evacuating => false,
        };
        let ready: Vec<ApiserverName> = view
            .entries
            .iter()
            .filter(is_ready)
            .map(|(name, _)| name.clone())
            .collect();
        // The first set is no change, but from what another process knew: what that tried still stands. It is not whole before all
        // were heard of, and what this one's own requests come to is known after half a minute.
        let is_known = |entry: &Entry| entry.snapshot.state != ServerState::Unknown;
        let was_whole = self.was_whole;
        self.was_whole |= are_all_there && view.entries.values().all(is_known);
        if self.was_whole && ready != self.tried_on {
            if was_whole || !self.tried_on.is_empty() {
                self.ramp.renew(now);
            }
            self.tried_on.clone_from(&ready);
            self.memory_changes += 1;
        }
        if ready == self.ready {
            return;
        }
        let own = &self.policy.node;
        if ready.contains(own) && !self.ready.contains(own) {
            self.table.apiserver_is_back();
        }
        self.ready = ready;
        self.rho = crate::rho::Rho::default();
        self.donors.clear();
        self.were_donors.clear();
    }

    /// Who is a donor, or was one within the settle time or while somebody who was told is on his way: those whom it told come
    /// back until then, while without them it may be none. Not one that has fallen below its part since, where others' clients
    /// may well go. Where that is everybody who is ready, those who are donors now.
    fn lately_donors(
        &mut self,
        donors: &[ApiserverName],
        below: &[ApiserverName],
        is_any_told: bool,
        now: Timestamp,
    ) -> Vec<ApiserverName> {
        for name in donors {
            self.were_donors.insert(name.clone(), now);
        }
        let settle = self.policy.settle;
        // Those who land in this look were on their way until now.
        let is_awaited = is_any_told || self.motion.in_transit() > 0;
        self.were_donors
            .retain(|name, at| !below.contains(name) && (is_awaited || now.since(*at) < settle));
        if self.were_donors.len() < self.ready.len() {
            self.were_donors.keys().cloned().collect()
        } else {
            donors.to_vec()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        agent::{Input, Policy, tests::socket},
        ids::{ConnectionId, ShimKind},
        membership::Roll,
        observation::Observation,
        shim::ShimReport,
        view::Part,
    };

    fn name(index: usize) -> ApiserverName {
        ApiserverName::new(format!("n{index}"))
    }

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_millis(1_000 * seconds)
    }

    /// So many clients are connected to an apiserver that is ready.
    fn seed(agent: &mut Agent, clients: u64) {
        let list = Observation::Resync {
            sockets: (1..=clients).map(socket).collect(),
            listener: Some(ConnectionId(9_999)),
        };
        agent.handle(at(0), Input::Observations(vec![list]));
        let report = ShimReport {
            upstream_ready: Some(true),
            ..ShimReport::default()
        };
        agent.handle(at(0), Input::Shim(report));
    }

    /// Two donors and one that takes are ready, a fourth is down: an even choice sends a third elsewhere, not half. So 28 % are
    /// no slow start, while of a half they would be.
    #[test]
    fn who_is_down_is_no_place_to_which_an_even_choice_sends_anybody() {
        let mut policy = Policy::new(name(0), (1..4).map(name).collect());
        policy.shim = ShimKind::Relay;
        let mut agent = Agent::new(policy, 1, at(0));
        seed(&mut agent, 3_000);

        // What the peers say: the load of each, GOAWAYs, and landings.
        let mut hear = |second: u64, peers: &[(usize, u64, u64, u64)]| {
            for (peer, load, goaways, landings) in peers {
                let snapshot = crate::view::Snapshot {
                    apiserver: name(*peer),
                    state: if *peer == 3 {
                        ServerState::Down
                    } else {
                        ServerState::Ready
                    },
                    part: Part::Acts,
                    plan_in_flight: *peer == 1,
                    connections: *load,
                    load: *load as f64,
                    draining: *goaways,
                    goaways_total: *goaways,
                    accepted_total: *landings,
                    ..agent.snapshot(at(second))
                };
                agent.handle(at(second), Input::Peer(name(*peer), Ok(snapshot)));
            }
            agent.handle(at(second), Input::Tick);
            agent.ramp.is_slow()
        };
        hear(10, &[(3, 0, 0, 0), (2, 100, 0, 0), (1, 3_000, 0, 0)]);
        hear(11, &[(2, 100, 0, 0), (1, 3_000, 500, 0)]);
        hear(12, &[(2, 100, 0, 2), (1, 3_000, 500, 4)]);
        hear(20, &[(1, 3_000, 500, 111), (2, 100, 0, 45)]);
        let is_slow = hear(22, &[(2, 100, 0, 87), (1, 3_000, 500, 219)]);
        assert_eq!(agent.ready, [name(0), name(1), name(2)]);
        assert_eq!(agent.donors, [name(0), name(1)]);
        assert!(!is_slow, "{:?}", agent.ramp);
    }

    /// A node pool that went was its: what others tell may land there, and is no sign that moving is in vain.
    #[test]
    fn one_that_told_and_has_fallen_below_its_part_is_a_place_again() {
        let mut agent = Agent::new(Policy::new(name(0), std::collections::BTreeSet::new()), 1, at(0));
        agent.ready = (0..3).map(name).collect();
        let both = [name(0), name(1)];
        assert_eq!(agent.lately_donors(&both, &[], true, at(10)), both);
        assert_eq!(agent.lately_donors(&both[..1], &[], true, at(60)), both, "they drain");
        assert_eq!(agent.lately_donors(&both[..1], &both[1..], true, at(61)), both[..1]);
        assert_eq!(agent.lately_donors(&both[..1], &[], true, at(62)), both[..1]);
    }

    /// Before the first list of Leases it knows itself alone: that is no set of apiservers, from which those who are heard of
    /// later would differ.
    #[test]
    fn what_was_tried_outlives_a_start_in_which_nobody_is_known_yet() {
        let hours = Duration::from_secs(12 * 3_600);
        let mut policy = Policy::new(name(0), std::collections::BTreeSet::new());
        policy.shim = ShimKind::Relay;
        let mut memory = Agent::new(policy.clone(), 1, at(0)).memory(at(0));
        memory.tries.wait = hours;
        memory.tries.left = hours / 2;
        let mut agent = Agent::with_memory(policy, 2, at(0), &memory, Duration::ZERO);
        agent.call_first(Roll::unread("it is not read yet"));
        seed(&mut agent, 300);
        for second in 1..=8 {
            agent.handle(at(second), Input::Tick);
        }
        assert!(!agent.was_whole, "{:?}", agent.ready);
        let member = crate::membership::Member {
            endpoint: None,
            fault: None,
        };
        let roll = Roll {
            members: (1..3).map(|index| (name(index), member.clone())).collect(),
            doubt: None,
            ..Roll::unread("")
        };
        agent.handle(at(9), Input::Roll(roll));
        for peer in 1..3 {
            let snapshot = crate::view::Snapshot {
                apiserver: name(peer),
                part: Part::Acts,
                ..agent.snapshot(at(9))
            };
            agent.handle(at(10), Input::Peer(name(peer), Ok(snapshot)));
        }
        for second in 10..=20 {
            agent.handle(at(second), Input::Tick);
        }
        assert!(agent.was_whole);
        assert_eq!(agent.ready, [name(0), name(1), name(2)]);
        assert_eq!(agent.ramp.tried().0, hours);
    }
}
