//! A plan in flight: told at the budget's pace, followed until it has settled.
//!
//! Job: from the victims of a decision to their outcomes.
//! Must never tell anyone after the plan has expired or a doubt came up, nor tell a connection twice.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use super::{Agent, Effect};
use crate::{
    decision::{Decision, Outcomes},
    ids::{ConnectionId, ShimKind, Timestamp},
    planner,
    policy::{Mode, Weight},
    shim::{GoawayOrder, GoawayResult},
    table::{ClientKey, Connection},
};

/// How long a shim may take to carry out one order.
fn order_expiry(shim: ShimKind) -> Duration {
    match shim {
        ShimKind::Relay | ShimKind::None => Duration::from_secs(10),
        // It tells a victim at its next request: leases and health checks make one within ten seconds, most clients.
        ShimKind::Steer => Duration::from_secs(30),
    }
}

/// A plan that is being carried out.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub generation: u64,
    pub unsent: VecDeque<ConnectionId>,
    pub last_goaway: Timestamp,
    /// Whether an operator asked for it, whatever the skew.
    pub is_ordered: bool,
    decision: u64,
    asked: BTreeSet<ConnectionId>,
    told: Vec<(ClientKey, Timestamp)>,
    keys: BTreeMap<ConnectionId, ClientKey>,
    outcomes: Outcomes,
    expires: Timestamp,
    accepted_before: u64,
}

impl Plan {
    /// Whether the shim has still to say what became of an order.
    pub fn is_awaited(&self) -> bool {
        !self.asked.is_empty()
    }

    /// Whether everyone was told, and nearly everyone landed or had the time to: the few that are left stay counted as
    /// in transit. What must be measured takes that time always.
    fn is_settled(&self, in_transit: u64, is_measured: bool, settle: Duration, now: Timestamp) -> bool {
        let sent = self.unsent.is_empty() && self.asked.is_empty();
        let nearly_all = !is_measured && in_transit * 10 <= self.told.len() as u64;
        sent && (self.told.is_empty() || nearly_all || now.since(self.last_goaway) >= settle)
    }
}

impl Agent {
    /// Makes the decision's victims the plan in flight.
    pub(super) fn start(&mut self, now: Timestamp, decision: &mut Decision) {
        self.generation += 1;
        decision.generation = self.generation;
        let mut keys = BTreeMap::new();
        for victim in &decision.victims {
            if let Some(connection) = self.table.connection(victim.connection) {
                let key = connection.client_key();
                let connections = self.table.active_of(&key);
                self.cooldowns
                    .note(key.clone(), connections, now + self.policy.client_cooldown);
                keys.insert(victim.connection, key);
            }
        }
        let costs = decision.victims.iter().map(|victim| {
            let connection = self.table.connection(victim.connection);
            connection.map_or(1.0, planner::cost_of)
        });
        let paced = Duration::from_secs_f64(costs.sum::<f64>() / self.policy.goaway_rate);
        self.plan = Some(Plan {
            generation: self.generation,
            decision: decision.id,
            unsent: decision.victims.iter().map(|victim| victim.connection).collect(),
            asked: BTreeSet::new(),
            told: Vec::new(),
            keys,
            outcomes: decision.outcomes,
            last_goaway: now,
            is_ordered: false,
            expires: now + paced * 2 + order_expiry(self.policy.shim),
            accepted_before: self.table.accepted_total(),
        });
    }

    /// Sends what the budget allows.
    pub(super) fn send(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        let Some(plan) = &mut self.plan else {
            return;
        };
        let expired = now > plan.expires;
        let table = &self.table;
        let is_active = |id: ConnectionId| table.connection(id).is_some_and(Connection::can_hear);
        let (unsent, gone): (Vec<_>, Vec<_>) = plan.unsent.drain(..).partition(|id| !expired && is_active(*id));
        plan.unsent = unsent.into();
        self.drop_victims(&gone);
        let Some(plan) = &mut self.plan else {
            return;
        };
        let mut victims: Vec<ConnectionId> = Vec::new();
        while let Some(id) = plan.unsent.front().copied() {
            let cost = self.table.connection(id).map_or(1.0, planner::cost_of);
            if !self.bucket.pay(cost, now) {
                break;
            }
            plan.unsent.pop_front();
            victims.push(id);
        }
        if victims.is_empty() {
            return;
        }
        plan.last_goaway = now;
        match self.policy.mode {
            Mode::Active if self.policy.shim != ShimKind::None => {
                plan.asked.extend(&victims);
                let generation = plan.generation;
                effects.push(Effect::SendGoaway(GoawayOrder {
                    generation,
                    expires_in: order_expiry(self.policy.shim),
                    victims,
                }));
            }
            // Decided identically, carried out by nobody.
            Mode::Active | Mode::DryRun => {
                plan.outcomes.pending -= victims.len() as u64;
                plan.outcomes.lost += victims.len() as u64;
            }
        }
    }

    /// Takes in what the shim made of an order.
    pub(super) fn goaway_answered(&mut self, now: Timestamp, results: &[(ConnectionId, GoawayResult)]) {
        for (id, result) in results {
            if *result == GoawayResult::Pending {
                // It stays asked: the shim answers again when it was told, or will not be any more.
                continue;
            }
            let told = *result == GoawayResult::Sent;
            if told {
                self.goaways_total += 1;
                let connection = self.table.connection(*id);
                self.told_load_total += connection.map_or(0.0, |connection| connection.load(self.policy.weight));
            }
            if told || *result == GoawayResult::AlreadyDraining {
                self.table.mark_draining(*id);
            }
            let Some(plan) = &mut self.plan else {
                continue;
            };
            if !plan.asked.remove(id) {
                continue;
            }
            plan.last_goaway = now;
            plan.outcomes.pending -= 1;
            let Some(key) = plan.keys.remove(id) else {
                continue;
            };
            if told {
                plan.outcomes.draining += 1;
                self.cooldowns.told(&key, now + self.policy.client_cooldown);
                plan.told.push((key, now));
            } else {
                plan.outcomes.lost += 1;
                self.cooldowns.forget(&key);
            }
        }
    }

    /// Gives up those who have not been told and for whom there is no room any more: clients leave for other reasons too.
    pub(super) fn trim(&mut self, mut room: f64) {
        let Some(plan) = &mut self.plan else {
            return;
        };
        let (table, weight) = (&self.table, self.policy.weight);
        let fits = |id: &ConnectionId| {
            let load = table.connection(*id).map_or(0.0, |connection| connection.load(weight));
            room -= load;
            room > -1e-6
        };
        let (unsent, dropped): (Vec<_>, Vec<_>) = plan.unsent.drain(..).partition(fits);
        plan.unsent = unsent.into();
        self.drop_victims(&dropped);
    }

    /// Gives up those who have not been told.
    pub(super) fn drop_unsent(&mut self) {
        let dropped: Vec<ConnectionId> = match &mut self.plan {
            Some(plan) => plan.unsent.drain(..).collect(),
            None => return,
        };
        self.drop_victims(&dropped);
    }

    /// Closes the plan when it has settled: whether there is to be a decision on what it left over at once. Not when it
    /// told nobody, as in a dry run, which would go through all clients; nor with weights that are measured, whose looks
    /// are an interval apart, and where the others are to have their turn.
    pub(super) fn settle(&mut self, now: Timestamp, effects: &mut Vec<Effect>) -> bool {
        let in_transit = self.motion.in_transit();
        let is_measured = self.policy.weight != Weight::Connections;
        let settled = |plan: &mut Plan| plan.is_settled(in_transit, is_measured, self.policy.settle, now);
        let Some(mut plan) = self.plan.take_if(settled) else {
            return false;
        };
        // Where users are known they tell who came back; where not, the accepted counter does.
        let mut accepted = self.table.accepted_total().saturating_sub(plan.accepted_before);
        let began = plan.told.iter().map(|(_, at)| *at).min().unwrap_or(now);
        let mut opened: BTreeMap<ClientKey, Timestamp> = BTreeMap::new();
        for connection in self.table.scan().filter(|connection| connection.opened_at >= began) {
            let newest = opened.entry(connection.client_key()).or_default();
            *newest = connection.opened_at.max(*newest);
        }
        for (key, at) in &plan.told {
            let back = match key {
                ClientKey::User(_) => opened.get(key).is_some_and(|opened| opened >= at),
                ClientKey::Address(_) => {
                    let back = accepted > 0;
                    accepted = accepted.saturating_sub(1);
                    back
                }
            };
            plan.outcomes.draining -= 1;
            if back {
                plan.outcomes.returned += 1;
            } else {
                plan.outcomes.moved += 1;
            }
        }
        self.outcomes_total.moved += plan.outcomes.moved;
        self.outcomes_total.returned += plan.outcomes.returned;
        self.outcomes_total.lost += plan.outcomes.lost;
        let decided = self
            .history
            .iter_mut()
            .rev()
            .find(|decision| decision.id == plan.decision);
        if let Some(decision) = decided {
            decision.outcomes = plan.outcomes;
            decision.explanation += &afterwards(plan.outcomes, self.policy.settle);
            effects.push(Effect::Settled(decision.clone()));
        }
        !plan.told.is_empty() && !is_measured
    }

    fn drop_victims(&mut self, dropped: &[ConnectionId]) {
        let Some(plan) = &mut self.plan else {
            return;
        };
        for id in dropped {
            if let Some(key) = plan.keys.remove(id) {
                self.cooldowns.forget(&key);
            }
            plan.outcomes.pending -= 1;
            plan.outcomes.lost += 1;
        }
    }
}

/// What became of a plan, in words.
fn afterwards(outcomes: Outcomes, settle: Duration) -> String {
    let Outcomes {
        moved, returned, lost, ..
    } = outcomes;
    let mut words = format!("; afterwards: {moved} went elsewhere, {returned} came back");
    if lost > 0 {
        words += &format!(", {lost} were not told: they were gone, or a doubt came up");
    }
    if returned > moved {
        words += &format!(
            " (within {:.0} s; a load balancer that sends clients back makes moving cost more)",
            settle.as_secs_f64()
        );
    }
    words
}
