//! One look a turn: what all apiservers show now, and what follows from it, made once and passed along.
//!
//! Job: the view, who moved since the last look, what is learned from that, the balance, and the first doubt.
//! Input: the agent's state and `now`. Output: a [`Look`].
//! Must never decide: everything a turn decides on is in here, and nothing is computed twice.

use super::{
    Agent,
    decide::even_of,
    motion::Moves,
    ramp::Tellers,
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
        let apiservers = self.peers.names().len();
        let expected = self.motion.in_transit();
        let figures = self.motion.figures();
        let moves = self
            .motion
            .look(&view, apiservers, self.policy.settle + self.table.old_enough(), now);
        self.memory_changes += u64::from(figures != self.motion.figures());
        self.compare_ready(&view, now);
        self.compare_releases(&view, now);
        self.rebalancing.told(moves.told);
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
        let tellers = self.lately_donors(&donors_now, now);
        if expected + moves.told > 0 {
            self.rho.learn(&moves.landings, &donors, (expected + moves.told) as f64);
            self.rebalancing.landed(&moves);
            // Without donors every landing is elsewhere: that says nothing.
            if !tellers.is_empty() {
                let balance = planner::balance(&view, &self.policy, &self.rho, &self.spread, transit);
                let known = Tellers {
                    even: even_of(tellers.len(), balance.servers.len()),
                    part: balance.surplus_part,
                    probe: self.probe_of(&balance),
                    interval: self.policy.interval,
                };
                if self.ramp.landed(moves.landed, moves.elsewhere(&tellers), known, now) {
                    self.drop_unsent();
                }
            }
        }
        if let Some(plan) = &mut self.plan {
            plan.saw(&moves, &tellers, &self.policy.node);
        }
        let look = self.seen(view, moves, transit, now);
        let ready: Vec<(ApiserverName, u64)> = {
            let servers = look.balance.servers.iter().map(|server| &server.name);
            let landed = |name: &&ApiserverName| look.moves.landings.iter().find(|(other, _)| other == *name);
            servers.filter_map(|name| landed(&name)).cloned().collect()
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
    fn compare_ready(&mut self, view: &View, now: Timestamp) {
        let is_ready = |(name, entry): &(&ApiserverName, &Entry)| match entry.snapshot.state {
            ServerState::Ready => true,
            ServerState::Unknown | ServerState::Overloaded => self.ready.contains(name),
            ServerState::Starting | ServerState::Down | ServerState::Evacuating => false,
        };
        let ready: Vec<ApiserverName> = view
            .entries
            .iter()
            .filter(is_ready)
            .map(|(name, _)| name.clone())
            .collect();
        if ready == self.ready {
            return;
        }
        // The first set is no change: what another process tried still stands.
        if !self.ready.is_empty() {
            self.ramp.renew(now);
            self.memory_changes += 1;
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

    /// Who is a donor, or was one within the settle time: those whom it told come back until then, while without them it may be
    /// none. Where that is everybody who is ready, those who are donors now.
    fn lately_donors(&mut self, donors: &[ApiserverName], now: Timestamp) -> Vec<ApiserverName> {
        for name in donors {
            self.were_donors.insert(name.clone(), now);
        }
        let settle = self.policy.settle;
        self.were_donors.retain(|_, at| now.since(*at) < settle);
        if self.were_donors.len() < self.ready.len() {
            self.were_donors.keys().cloned().collect()
        } else {
            donors.to_vec()
        }
    }
}
