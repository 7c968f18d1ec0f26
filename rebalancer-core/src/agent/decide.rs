//! One decision: from the view to victims or a hold, in words.
//!
//! Job: ask every question in turn, the gravest doubt first. Input: the agent's state and a view. Output: a [`Decision`].
//! Must never change anything: a preview is the same as the decision.

use std::time::Duration;

use super::{Agent, Effect, futility::PROBE, rebalancing::Rebalancing};
use crate::{
    decision::{Decision, Outcomes, Victim},
    hold::Hold,
    ids::{ApiserverName, ConnectionId, Timestamp},
    planner::{self, Balance, Request},
    policy::Weight,
    view::{Entry, ServerState, View},
};

/// A plan rests on one view: it is no longer than what the budget allows in that time.
const PLAN_HORIZON: Duration = Duration::from_secs(60);

/// Looks in a row that confirm a skew of measured loads.
const MEASURED_LOOKS: u32 = 3;

/// So many refused requests within the age of a snapshot are no sign of overload.
const NORMAL_REFUSALS: u64 = 10;

impl Agent {
    /// What would be decided, and what the rebalancing is then.
    pub(super) fn decide(&self, now: Timestamp, view: View) -> (Decision, Rebalancing) {
        let balance = self.balance(&view);
        let (rebalancing, chosen, heaviest) = match self.guard(now) {
            // It says nothing about the rebalancing, which waits, nor about who is heavy.
            Some(doubt) => (self.rebalancing.clone(), Err(doubt), Vec::new()),
            None => {
                let (landing, looks) = (self.motion.landing(), self.looks_needed());
                let rebalancing = self.rebalancing.after(&balance, &view, landing, &self.rho, looks);
                let chosen = self.victims(now, &view, &balance, &rebalancing);
                // Who carries the load is worth knowing whether or not anybody moves.
                let named = |connection| planner::heavy(connection, self.policy.weight, balance.ceiling);
                (rebalancing, chosen, self.table.heaviest().map(named).collect())
            }
        };
        let (victims, hold) = match chosen {
            Ok(victims) => (victims, None),
            Err(hold) => (Vec::new(), Some(hold)),
        };
        let explanation = match &hold {
            Some(hold) => format!("nothing is done: {hold}"),
            None => self.explain(&balance, &victims),
        };
        let decision = Decision {
            id: 0,
            generation: self.generation + u64::from(hold.is_none()),
            at: now,
            mode: self.policy.mode,
            node: self.policy.node.clone(),
            weight: self.policy.weight,
            view,
            mean: balance.mean,
            skew: balance.skew,
            threshold: balance.trigger,
            noise_floor: balance.noise_floor,
            rho: self.rho.mean(&balance.donors, balance.apiservers),
            quota: (balance.quota + 0.5).floor() as u64,
            outcomes: Outcomes {
                pending: victims.len() as u64,
                ..Outcomes::default()
            },
            victims,
            heaviest,
            hold,
            explanation,
        };
        (decision, rebalancing)
    }

    /// Why these, why so many, and what is expected.
    fn explain(&self, balance: &Balance, victims: &[Victim]) -> String {
        let load: f64 = victims.iter().map(|victim| victim.load).sum();
        let unit = match self.policy.weight {
            Weight::Connections => "connections",
            Weight::Requests => "requests a second",
            Weight::Bytes => "bytes a second",
            Weight::Streams => "open streams",
        };
        let expected = balance.skew - load * balance.rho / balance.mean;
        let why = match self.policy.weight {
            Weight::Connections => "those with the fewest open watches, then the oldest",
            Weight::Requests | Weight::Bytes | Weight::Streams => "the heaviest that fit",
        };
        let rest = balance.needed - load;
        let then = if rest >= 1.0 {
            format!("; the other {rest:.0} when it is known where these land")
        } else {
            String::new()
        };
        format!(
            "{:.0} {unit} are {:.1} % above the mean of {:.1}; {} above the target of {:.1} %, together by {:.1}; since {:.0} % of those who move are taken to go elsewhere, {:.1} are to be told here: {} connections now ({why}), at {} a second, and the skew is expected to fall to {:+.1} %{then}",
            balance.mean * (1.0 + balance.skew),
            balance.skew * 100.0,
            balance.mean,
            match balance.donors.len() {
                1 => "it alone is".to_owned(),
                donors => format!("{donors} apiservers are"),
            },
            self.policy.skew_target * 100.0,
            balance.surplus,
            balance.rho * 100.0,
            balance.needed,
            victims.len(),
            self.policy.goaway_rate,
            expected * 100.0,
        )
    }

    fn victims(
        &self,
        now: Timestamp,
        view: &View,
        balance: &Balance,
        rebalancing: &Rebalancing,
    ) -> Result<Vec<Victim>, Hold> {
        if balance.apiservers < 2 {
            return Err(Hold::FewerThanTwoApiservers {
                apiservers: balance.apiservers,
            });
        }
        if let Some(plan) = &self.plan {
            return Err(Hold::PlanInFlight {
                generation: plan.generation,
                unsent: plan.unsent.len(),
                in_transit: self.motion.in_transit(),
            });
        }
        let skew = balance.skew;
        let Some(course) = rebalancing.course() else {
            return Err(if let Rebalancing::Off(looks @ 1..) = rebalancing {
                Hold::Unconfirmed {
                    skew: balance.largest_skew,
                    looks: *looks,
                    needed: self.looks_needed(),
                }
            } else if skew > self.policy.skew_threshold {
                Hold::Noise {
                    skew,
                    noise_floor: balance.noise_floor,
                }
            } else {
                Hold::BelowThreshold {
                    skew,
                    threshold: balance.trigger,
                }
            });
        };
        let reached = Hold::BelowThreshold {
            skew,
            threshold: self.policy.skew_target,
        };
        if balance.quota <= 0.0 || skew <= self.policy.skew_target {
            return Err(reached);
        }
        if let Some(hold) = self.unknown_protocols() {
            return Err(hold);
        }
        if self.futility.holds() {
            return Err(Hold::Futile {
                rho: self.rho.upper(&balance.donors),
                landings: self.rho.landings(&balance.donors),
            });
        }
        if let Some(hold) = self.stressed(view, balance).or_else(|| self.peer_plan(view)) {
            return Err(hold);
        }
        // This apiserver's part of what the rebalancing may still cost: as its quota is of all donors' together.
        let part = balance.needed * balance.rho / balance.surplus;
        let allowance = course.left(&self.rho) * part;
        if self.bucket.tokens(now) < 1.0 || allowance < 0.5 {
            return Err(Hold::BudgetSpent {
                tokens: self.bucket.tokens(now),
                allowance,
            });
        }
        let share = (self.policy.goaway_share * self.table.active() as f64).floor();
        let horizon = self.policy.goaway_rate * PLAN_HORIZON.as_secs_f64();
        let limit = share.min(horizon).min((allowance + 0.5).floor()).max(1.0) as usize;
        let limit = if self.futility.is_probe() {
            limit.min(PROBE)
        } else {
            limit
        };
        let request = Request {
            quota: balance.quota,
            limit,
            ceiling: if self.policy.weight == Weight::Connections {
                f64::INFINITY
            } else {
                balance.ceiling
            },
        };
        planner::choose(&self.table, &self.policy, &self.cooldowns, request, now)
    }

    /// Whether what is not known is more than what would be done about.
    fn unknown_protocols(&self) -> Option<Hold> {
        let (unknown, active) = (self.table.unknown(), self.table.active());
        let limit = self.policy.skew_threshold;
        (unknown as f64 > limit * active as f64).then_some(Hold::UnknownProtocols { unknown, active, limit })
    }

    /// How many looks in a row must pass the trigger: rates that are measured take a while to be right.
    fn looks_needed(&self) -> u32 {
        match self.policy.weight {
            Weight::Connections => 1,
            Weight::Requests | Weight::Bytes | Weight::Streams => MEASURED_LOOKS,
        }
    }

    /// Whether somebody who would take clients is overloaded.
    pub(super) fn stressed(&self, view: &View, balance: &Balance) -> Option<Hold> {
        view.entries.iter().find_map(|(name, entry)| {
            let refused = entry.snapshot.refused;
            let takes = entry.snapshot.state == ServerState::Ready && !balance.donors.contains(name);
            (takes && refused > NORMAL_REFUSALS).then(|| Hold::RecipientsStressed {
                apiserver: name.clone(),
                refused,
                limit: NORMAL_REFUSALS,
            })
        })
    }

    /// With weights that must be measured first, one apiserver at a time: until what its clients weigh is known where they
    /// landed, the others would take it for gone.
    fn peer_plan(&self, view: &View) -> Option<Hold> {
        if self.policy.weight == Weight::Connections {
            return None;
        }
        let busy = |(name, entry): (&ApiserverName, &Entry)| {
            (*name != self.policy.node && entry.snapshot.plan_in_flight).then(|| name.clone())
        };
        let apiserver = view.entries.iter().find_map(busy)?;
        Some(Hold::PeerPlanInFlight { apiserver })
    }

    pub(super) fn balance(&self, view: &View) -> Balance {
        planner::balance(view, &self.policy, &self.rho, self.motion.transit(self.policy.weight))
    }

    pub(super) fn asked_by_operator(&mut self, now: Timestamp, ids: &[ConnectionId], effects: &mut Vec<Effect>) {
        if self.plan.is_some() {
            return;
        }
        let view = self.peers.view(self.snapshot(now), now);
        let (mut decision, _) = self.decide(now, view);
        decision.id = self.next_id;
        self.next_id += 1;
        decision.victims = ids
            .iter()
            .filter_map(|id| {
                let connection = self.table.connection(*id).filter(|connection| connection.can_hear())?;
                Some(Victim {
                    connection: *id,
                    client: connection.client(),
                    user: connection.user().map(str::to_owned),
                    user_agent: connection.user_agent().map(str::to_owned),
                    load: connection.load(self.policy.weight),
                    age: now.since(connection.opened_at),
                    why: "an operator asked for it".to_owned(),
                })
            })
            .collect();
        decision.explanation = format!("an operator asked to tell {} connections", decision.victims.len());
        decision.outcomes = Outcomes {
            pending: decision.victims.len() as u64,
            ..Outcomes::default()
        };
        if !decision.victims.is_empty() {
            decision.hold = None;
            self.start(now, &mut decision);
            if let Some(plan) = &mut self.plan {
                plan.is_ordered = true;
            }
        }
        self.remember(decision.clone());
        effects.push(Effect::Record(decision));
    }
}
