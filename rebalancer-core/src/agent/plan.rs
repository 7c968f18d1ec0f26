//! A plan in flight: told at the budget's pace, followed until it has settled.
//!
//! Job: from the victims of a decision to their outcomes.
//! Must never tell anyone after the plan has expired or a doubt came up, nor tell a connection twice.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    time::Duration,
};

use super::{
    Agent, Effect, Rehearsed,
    look::Look,
    motion::Moves,
    ramp::{Ramp, Seen},
};
use crate::{
    decision::{Decision, Fate, Outcomes},
    ids::{ApiserverName, ConnectionId, Timestamp},
    planner,
    shim::{GoawayOrder, GoawayResult},
    table::ClientKey,
};

/// No plan follows another at once for fewer.
pub(super) const AGAIN: f64 = 2.0;

/// What is known when it is asked whether a plan has settled.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// Clients that are about to land.
    landing: u64,
    /// What may be told now.
    quota: f64,
    /// Connections that a plan may have, if it may have any.
    limit: Option<usize>,
    /// Whether each connection weighs the same.
    is_counted: bool,
}

/// A plan that is being carried out.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub generation: u64,
    pub unsent: VecDeque<ConnectionId>,
    pub last_goaway: Timestamp,
    /// Whether an operator asked for it, whatever the skew.
    pub is_ordered: bool,
    /// Whether everybody is to go: in the time an operator gave, whatever the budget.
    pub is_evacuation: bool,
    /// When an order began that is spread over a time, over which, and how many it names.
    pub spread: Option<(Timestamp, Duration, usize)>,
    /// Its decision.
    pub decision: u64,
    /// From then on nobody waits for the shim any more: what it has not answered is lost.
    pub given_up: Timestamp,
    /// Whether it only finds out where clients land.
    is_probe: bool,
    asked: BTreeSet<ConnectionId>,
    told: Vec<(ConnectionId, ClientKey, Timestamp)>,
    keys: BTreeMap<ConnectionId, ClientKey>,
    fates: BTreeMap<ConnectionId, Fate>,
    outcomes: Outcomes,
    expires: Timestamp,
    seen: Seen,
    /// Of those who were told anywhere, so many landed here.
    landed_here: u64,
}

impl Plan {
    /// How many were told to find out where clients land, when nobody has been seen to land elsewhere.
    pub fn probed(&self) -> usize {
        let finds_out = self.is_probe && !self.is_ordered && !self.is_evacuation;
        if finds_out && self.seen.elsewhere == 0 {
            self.told.len()
        } else {
            0
        }
    }

    /// Spreads what is unsent over a time; it is not given up before.
    pub fn spread_over(&mut self, over: Duration, order_expiry: Duration, now: Timestamp) {
        self.spread = Some((now, over, self.unsent.len()));
        self.expires = self.expires.max(now + over + order_expiry);
        self.given_up = self.expires + order_expiry;
    }

    /// When the next one may be told, the budget aside.
    pub fn due_at(&self) -> Timestamp {
        match self.spread {
            Some((began, over, of)) if of > 0 => {
                let done = of.saturating_sub(self.unsent.len());
                began + over.mul_f64(done as f64 / of as f64)
            }
            _ => Timestamp::default(),
        }
    }

    /// Whether the shim has still to say what became of an order.
    pub fn is_awaited(&self) -> bool {
        !self.asked.is_empty()
    }

    /// What happened while it goes on, and how much of it is evidence that whoever is told lands elsewhere.
    pub fn saw(&mut self, moves: &Moves, evidence: u64, own: &ApiserverName) {
        self.seen.told += moves.told;
        self.seen.landed += moves.landed;
        self.seen.elsewhere += evidence;
        let others: Vec<_> = moves
            .landings
            .iter()
            .map(|(name, _)| name)
            .filter(|name| *name != own)
            .cloned()
            .collect();
        self.landed_here += moves.elsewhere(&others) as u64;
    }

    /// Whether everyone was told, and enough of them landed to know where they go, or had the time to: those that are left
    /// stay counted as in transit. A probe waits for the first who landed elsewhere, or for nearly all. One that was not held
    /// small (`limit` is what it might have had) has nothing to find out: it waits for nobody once there is as much to tell
    /// again as a fourth of it, since those in transit are reckoned with. What must be measured waits always.
    fn is_settled(&self, known: Known, settle: Duration, now: Timestamp) -> bool {
        let sent = self.unsent.is_empty() && self.asked.is_empty();
        let told = self.seen.told.max(self.told.len() as u64);
        let is_known = if self.is_probe {
            self.seen.elsewhere > 0 || known.landing * 10 <= told
        } else {
            let own = self.told.len() as u64;
            let is_held_small = known.limit.is_none_or(|limit| own >= limit as u64);
            let goes_on = !is_held_small && known.quota >= AGAIN.max(own as f64 / 4.0);
            // The others may tell for as long as they like: so many landings of anybody say enough.
            let is_seen = self.seen.elsewhere > 0 && self.seen.landed * 2 >= own;
            goes_on || is_seen || known.landing * 2 <= told
        };
        let is_known = known.is_counted && is_known;
        sent && (self.told.is_empty() || is_known || now.since(self.last_goaway) >= settle)
    }
}

impl Agent {
    /// Makes the decision's victims the plan in flight.
    pub(super) fn start(&mut self, now: Timestamp, decision: &mut Decision) {
        self.generation += 1;
        decision.generation = self.generation;
        let mut keys = BTreeMap::new();
        let mut costs = 0.0;
        let until = now + self.policy.client_cooldown;
        for victim in &decision.victims {
            let Some(connection) = self.table.connection(victim.connection) else {
                costs += 1.0;
                continue;
            };
            costs += planner::cost_of(connection);
            let key = connection.client_key();
            self.cooldowns
                .note(key.clone(), || self.table.active_of(&key), now, until);
            keys.insert(victim.connection, key);
        }
        let paced = Duration::from_secs_f64(costs / self.bucket.rate());
        // An operator's order may come while somebody with many watches is still paid for.
        let solvent = self.bucket.affords_at(1.0, now);
        let expires = solvent + paced * 2 + self.abilities.order_expiry;
        if self.rehearses()
            && let Some(course) = self.rebalancing.course()
        {
            let goaways = decision.derivation.needed.ceil() as u64;
            self.rehearsed = Some(Rehearsed {
                course: course.began,
                decision: decision.id,
                goaways,
            });
        }
        self.memory_changes += 1;
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
            is_evacuation: false,
            spread: None,
            is_probe: self.ramp.is_probe(),
            fates: BTreeMap::new(),
            expires,
            given_up: expires + self.abilities.order_expiry,
            seen: Seen::default(),
            landed_here: 0,
        });
    }

    /// Sends what the budget allows.
    pub(super) fn send(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        self.give_up(now);
        let rehearses = self.rehearses();
        let Some(plan) = &mut self.plan else {
            return;
        };
        if now > plan.expires {
            self.drop_unsent();
            return;
        }
        // Only who is next is looked up: a plan may be long, and there is a turn for each word of a peer.
        let (mut victims, mut gone) = (Vec::new(), Vec::new());
        while let Some(id) = plan.unsent.front().copied() {
            if let Some(connection) = self.table.connection(id).filter(|connection| connection.can_hear()) {
                let cost = planner::cost_of(connection);
                if now < plan.due_at() || !(plan.is_evacuation || self.bucket.pay(cost, now)) {
                    break;
                }
                victims.push(id);
            } else {
                gone.push(id);
            }
            plan.unsent.pop_front();
        }
        self.drop_victims(&gone);
        let Some(plan) = &mut self.plan else {
            return;
        };
        if victims.is_empty() {
            return;
        }
        plan.last_goaway = now;
        if rehearses {
            // Decided identically, carried out by nobody.
            self.drop_victims(&victims);
            return;
        }
        plan.asked.extend(&victims);
        victims.iter().for_each(|id| self.table.set_asked(*id, true));
        effects.push(Effect::SendGoaway(GoawayOrder {
            generation: plan.generation,
            expires_in: self.abilities.order_expiry,
            victims,
        }));
    }

    /// Gives up what the shim has not answered long after every order has expired: nobody waits for an answer for ever.
    fn give_up(&mut self, now: Timestamp) {
        let Some(plan) = self.plan.as_mut().filter(|plan| now >= plan.given_up) else {
            return;
        };
        let silent: Vec<ConnectionId> = std::mem::take(&mut plan.asked).into_iter().collect();
        silent.iter().for_each(|id| self.table.set_asked(*id, false));
        self.drop_victims(&silent);
    }

    /// Takes in what the shim made of an order.
    pub(super) fn goaway_answered(&mut self, now: Timestamp, results: &[(ConnectionId, GoawayResult)]) {
        for (id, result) in results {
            if *result == GoawayResult::Pending {
                // It stays asked: the shim answers again when it was told, or will not be any more.
                continue;
            }
            let told = *result == GoawayResult::Sent;
            self.table.set_asked(*id, false);
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
            if let (true, true, Some(evacuation)) = (told, plan.is_evacuation, &mut self.evacuation) {
                evacuation.tells_one();
            }
            plan.outcomes.pending -= 1;
            let Some(key) = plan.keys.remove(id) else {
                continue;
            };
            if told {
                plan.outcomes.draining += 1;
                self.cooldowns.told(key.clone(), now + self.policy.client_cooldown);
                plan.told.push((*id, key, now));
            } else {
                plan.outcomes.lost += 1;
                if matches!(result, GoawayResult::Unknown | GoawayResult::AlreadyDraining) {
                    plan.fates.insert(*id, Fate::Gone);
                    self.cooldowns.forget(&key);
                } else {
                    // It is there and did not hear: to ask it again at once, before others, would be in vain as well.
                    plan.fates.insert(*id, Fate::NotTold);
                    self.cooldowns.told(key, now + self.policy.client_cooldown);
                }
            }
            debug_assert!(
                plan.asked.len() <= plan.outcomes.pending as usize,
                "who is asked is pending"
            );
        }
    }

    /// Gives up those who have not been told and for whom there is no room any more: clients leave for other reasons too.
    pub(super) fn trim(&mut self, mut room: f64) {
        let Some(plan) = &mut self.plan else {
            return;
        };
        let (table, weight) = (&self.table, self.policy.weight);
        // Who is asked still weighs here, and is about to go.
        let load = |id: &ConnectionId| table.connection(*id).map_or(0.0, |connection| connection.load(weight));
        room -= plan.asked.iter().map(load).sum::<f64>();
        if weight.is_counted() && plan.unsent.len() as f64 <= room + 1e-6 {
            // Nobody weighs more than 1: there is room for all, whoever has left meanwhile.
            return;
        }
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
    pub(super) fn settle(&mut self, now: Timestamp, look: &Look, effects: &mut Vec<Effect>) -> bool {
        let is_counted = self.policy.weight.is_counted();
        let known = Known {
            landing: self.motion.landing(),
            quota: look.balance.quota,
            limit: self.ramp.limit(self.probe_of(&look.balance), now).ok(),
            is_counted,
        };
        let settled = |plan: &mut Plan| plan.is_settled(known, self.policy.settle, now);
        let Some(mut plan) = self.plan.take_if(settled) else {
            return false;
        };
        self.follow_up(&mut plan);
        let Outcomes {
            moved, returned, lost, ..
        } = plan.outcomes;
        self.outcomes_total.moved += moved;
        self.outcomes_total.returned += returned;
        self.outcomes_total.lost += lost;
        let probe = self.probe_of_all(&look.balance);
        let settled = |ramp: &mut Ramp| ramp.settled(plan.told.len(), plan.seen, probe, now);
        if !plan.is_ordered
            && let Some(in_vain) = settled(&mut self.ramp)
        {
            self.rebalancing.in_vain(in_vain);
            self.memory_changes += 1;
        }
        let decided = self
            .history
            .iter_mut()
            .rev()
            .find(|decision| decision.id == plan.decision);
        if let Some(decision) = decided {
            decision.outcomes = plan.outcomes;
            decision.explanation += &afterwards(plan.outcomes, look.balance.skew);
            for victim in &mut decision.victims {
                victim.fate = plan.fates.get(&victim.connection).copied().unwrap_or(victim.fate);
            }
            effects.push(Effect::Settled(decision.clone()));
        }
        !plan.told.is_empty() && is_counted
    }

    /// What became of those who were told. Who came back is known by name, where a shim tells users; the others by number:
    /// of those who landed, this plan's part. Who has not been seen anywhere yet did not move, and counts as draining.
    fn follow_up(&self, plan: &mut Plan) {
        // When each of them opened its newest connection since the first was told.
        let keys = plan.told.iter().map(|(_, key, _)| (key.clone(), None));
        let mut opened: HashMap<ClientKey, Option<Timestamp>> = keys.collect();
        if let Some(began) = plan.told.iter().map(|(.., at)| *at).min() {
            for connection in self.table.opened_since(began) {
                if let Some(newest) = opened.get_mut(&connection.client_key()) {
                    *newest = (*newest).max(Some(connection.opened_at));
                }
            }
        }
        let part = |landed: u64| {
            let all = plan.seen.told.max(plan.told.len() as u64).max(1);
            (landed * plan.told.len() as u64 + all / 2) / all
        };
        let (mut here, elsewhere) = (part(plan.landed_here), part(plan.seen.landed - plan.landed_here));
        for (id, key, at) in &plan.told {
            let is_back = match key {
                ClientKey::User(_) => opened[key].is_some_and(|opened| opened >= *at),
                ClientKey::Address(_) => {
                    let is_back = here > 0;
                    here = here.saturating_sub(1);
                    is_back
                }
            };
            plan.outcomes.returned += u64::from(is_back);
            plan.fates
                .insert(*id, if is_back { Fate::Returned } else { Fate::Told });
        }
        let told = plan.told.len() as u64;
        plan.outcomes.moved = elsewhere.min(told - plan.outcomes.returned);
        plan.outcomes.draining = told - plan.outcomes.returned - plan.outcomes.moved;
        debug_assert_eq!(plan.outcomes.pending, 0, "everybody was told or given up");
    }

    fn drop_victims(&mut self, dropped: &[ConnectionId]) {
        let Some(plan) = &mut self.plan else {
            return;
        };
        for id in dropped {
            if let Some(key) = plan.keys.remove(id) {
                self.cooldowns.forget(&key);
            }
            plan.fates.insert(*id, Fate::NotTold);
            plan.outcomes.pending -= 1;
            plan.outcomes.lost += 1;
        }
    }
}

/// What became of a plan, in words.
fn afterwards(outcomes: Outcomes, skew: f64) -> String {
    let Outcomes {
        draining,
        moved,
        returned,
        lost,
        ..
    } = outcomes;
    let mut words = format!("; then {moved} went elsewhere, {returned} came back");
    for (count, what) in [(draining, "not seen again yet"), (lost, "not told")] {
        if count > 0 {
            words += &format!(", {count} {what}");
        }
    }
    words + &format!("; skew {:+.1} %", skew * 100.0)
}

#[cfg(test)]
mod tests;
