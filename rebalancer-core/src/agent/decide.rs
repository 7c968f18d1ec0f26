//! One decision: from a look to victims or a hold, in words.
//!
//! Job: ask every question in turn, the gravest doubt first. Input: the agent's state and a look. Output: a [`Decision`].
//! Must never change anything: a preview is the same as the decision.

use std::{collections::BTreeSet, time::Duration};

use super::{
    Agent,
    growth::Growth,
    look::Look,
    rebalancing::{NOTHING, Rebalancing},
};
use crate::{
    decision::{Decision, Derivation, Outcomes, Victim},
    hold::Hold,
    ids::{ApiserverName, ShimKind, Timestamp},
    planner::{self, Balance, Request},
    policy::Mode,
    view::{Entry, ServerState, Snapshot, View},
};

/// A plan rests on one view: it is no longer than what the budget allows in that time.
const PLAN_HORIZON: Duration = Duration::from_secs(60);

/// Nor than so many connections: who follows is chosen when these have been told, by a newer view, and nobody has to look
/// through a longer list.
const LONGEST_PLAN: usize = 2_000;

/// So many refused requests within the age of a snapshot are no sign of overload.
const NORMAL_REFUSALS: u64 = 10;

/// A recipient may refuse so many times as many, connection by connection, as the donors do.
const RELATIVE_REFUSALS: f64 = 1.5;

/// A large rebalancing begins with a larger probe, or finding out would take most of its time: one in so many of its part.
const PROBE_PART: f64 = 150.0;

/// A probe is so large that with an even choice one of it lands elsewhere with this probability, or a little more.
const PROBE_CERTAINTY: f64 = 0.86;

impl Agent {
    /// What would be decided, and what the rebalancing is then.
    pub(super) fn decide(&self, now: Timestamp, look: Look) -> (Decision, Rebalancing) {
        let balance = &look.balance;
        let (rebalancing, chosen, heaviest) = match &look.doubt {
            // It says nothing about the rebalancing, which waits, nor about who is heavy.
            Some(doubt) => (self.rebalancing.clone(), Err(doubt.clone()), Vec::new()),
            None => {
                let looks = self.policy.weight.looks();
                let after = self.rebalancing.after(balance, look.signs, &self.rho, looks, now);
                let rebalancing = if self.begins_on_news(&after, &look, now) {
                    Rebalancing::Off(1)
                } else {
                    after
                };
                let chosen = self.victims(now, &look, &rebalancing);
                // Who carries the load is worth knowing whether or not anybody moves.
                let named = |connection| planner::heavy(connection, self.policy.weight, balance.ceiling);
                (rebalancing, chosen, self.table.heaviest().map(named).collect())
            }
        };
        let derivation = Derivation {
            donors: balance.donors.clone(),
            surplus: balance.surplus,
            rho: balance.rho,
            needed: balance.needed,
            in_transit: self.motion.in_transit(),
            expected_skew: balance.expected_skew,
            allowance: rebalancing.course().map(|course| course.left(&self.rho)),
            limit: self.ramp.limit(self.probe_of(balance), now).ok(),
            goaway_rate: self.bucket.rate(),
        };
        let (victims, hold) = match chosen {
            Ok(victims) => (victims, None),
            Err(hold) => (Vec::new(), Some(hold)),
        };
        let explanation = match &hold {
            Some(hold) => format!("nothing is done: {hold}"),
            None => self.explain(balance, &victims),
        };
        let decision = Decision {
            id: 0,
            generation: self.generation + u64::from(hold.is_none()),
            at: now,
            mode: self.policy.mode,
            node: self.policy.node.clone(),
            weight: self.policy.weight,
            mean: balance.mean,
            skew: balance.skew,
            threshold: balance.trigger,
            noise_floor: balance.noise_floor,
            rho: self.rho.mean(&balance.donors, balance.servers.len()),
            quota: (balance.quota + 0.5).floor() as u64,
            derivation,
            outcomes: Outcomes {
                pending: victims.len() as u64,
                ..Outcomes::default()
            },
            victims,
            heaviest,
            hold,
            explanation,
            view: look.view,
        };
        (decision, rebalancing)
    }

    /// This apiserver's load from decision to decision, that on this look included.
    pub(super) fn growth_at(&self, look: &Look, now: Timestamp) -> Growth {
        let Balance {
            mean,
            expected_skew,
            trigger,
            ..
        } = look.balance;
        let load = mean * (1.0 + expected_skew);
        if look.doubt.is_some() {
            // What the loads are is not known: an agent that has just begun has seen nobody yet.
            Growth::default()
        } else {
            self.growth.after(load, mean * (1.0 + trigger), now)
        }
    }

    /// Whether a rebalancing would begin with clients who came here a moment ago. (Where loads are measured it takes several
    /// looks in any case.)
    fn begins_on_news(&self, after: &Rebalancing, look: &Look, now: Timestamp) -> bool {
        let begins = self.rebalancing.begins(after);
        let heard = |since| self.peers.were_heard_since(since);
        let growth = self.growth_at(look, now);
        begins && self.policy.weight.is_counted() && growth.is_news(self.policy.interval, heard, now)
    }

    /// One line of what and why; the figures it follows from are the decision's fields.
    fn explain(&self, balance: &Balance, victims: &[Victim]) -> String {
        let weight = self.policy.weight;
        let load: f64 = victims.iter().map(|victim| victim.load).sum();
        let what = if self.ramp.is_probe() {
            "probing with"
        } else {
            "telling"
        };
        let of = if weight.is_counted() {
            format!(
                "{} of {:.0}",
                victims.len(),
                balance.mean * (1.0 + balance.expected_skew)
            )
        } else {
            format!("{} ({load:.1} {})", victims.len(), weight.unit())
        };
        let rest = balance.needed - load;
        let then = if rest >= 1.0 {
            format!("; {rest:.0} more to go")
        } else {
            String::new()
        };
        format!(
            "{what} {of}: {:.0} % above the mean of {:.0}, target {:.0} %{then}",
            balance.expected_skew * 100.0,
            balance.mean,
            self.policy.skew_target * 100.0,
        )
    }

    fn victims(&self, now: Timestamp, look: &Look, rebalancing: &Rebalancing) -> Result<Vec<Victim>, Hold> {
        let balance = &look.balance;
        if balance.servers.len() < 2 {
            return Err(Hold::FewerThanTwoApiservers {
                apiservers: balance.servers.len(),
            });
        }
        if let Some(plan) = &self.plan {
            return Err(Hold::PlanInFlight {
                generation: plan.generation,
                unsent: plan.unsent.len(),
                in_transit: self.motion.in_transit(),
            });
        }
        let Some(course) = rebalancing.course() else {
            return Err(self.at_rest(balance, rebalancing));
        };
        if balance.quota <= 0.0 || balance.expected_skew <= self.policy.skew_target {
            return Err(self.within(balance, self.policy.skew_target));
        }
        if let Some(hold) = self.unknown_protocols() {
            return Err(hold);
        }
        if let Some(hold) = self
            .stressed(&look.view, balance)
            .or_else(|| self.peer_plan(&look.view))
        {
            return Err(hold);
        }
        if self.policy.mode == Mode::Propose && self.approved != Some(course.began) {
            return Err(Hold::AwaitsApproval {
                proposal: self.proposal_of(course.began),
                goaways: balance.needed.ceil() as u64,
            });
        }
        if let Some(rehearsed) = self.rehearsed.filter(|rehearsed| rehearsed.course == course.began) {
            return Err(Hold::DryRun {
                decision: rehearsed.decision,
                goaways: rehearsed.goaways,
            });
        }
        let step = match self.ramp.limit(self.probe_of(balance), now) {
            Ok(step) => step,
            Err(left) => {
                let (_, told) = self.ramp.tried();
                return Err(if self.ramp.is_slow() {
                    Hold::SlowStart { left }
                } else if self.ramp.is_futile() {
                    Hold::Futile { told, left }
                } else {
                    Hold::Probing { told, left }
                });
            }
        };
        let allowance = course.allowance(balance, &self.rho);
        // What is a moment away is a matter of pace; a client with a thousand watches is paid for a while.
        let is_in_debt = self.bucket.affords_at(1.0, now).since(now) >= self.policy.interval;
        if is_in_debt || allowance < NOTHING {
            return Err(Hold::BudgetSpent {
                tokens: self.bucket.tokens(now),
                allowance,
            });
        }
        let share = (self.policy.goaway_share * self.table.active() as f64).floor();
        let horizon = self.bucket.rate() * PLAN_HORIZON.as_secs_f64();
        let limit = share.min(horizon).min((allowance + 0.5).floor()).max(1.0) as usize;
        let request = Request {
            quota: balance.quota,
            limit: limit.min(step).min(LONGEST_PLAN),
            ceiling: if self.policy.weight.is_counted() {
                f64::INFINITY
            } else {
                balance.ceiling
            },
        };
        let victims = planner::choose(&self.table, &self.policy, self.abilities, &self.cooldowns, request, now)?;
        debug_assert!(!victims.is_empty() && victims.len() <= request.limit, "{request:?}");
        Ok(victims)
    }

    /// Whether what is not known is more than what would be done about. Who does not come through a relay, as those that
    /// were there before it, cannot be told whatever they speak: the others are told for them.
    fn unknown_protocols(&self) -> Option<Hold> {
        if self.policy.shim != ShimKind::None && self.abilities.names_all {
            return None;
        }
        let (unknown, active) = (self.table.unknown(), self.table.active());
        let limit = self.policy.skew_threshold;
        (unknown as f64 > limit * active as f64).then_some(Hold::UnknownProtocols { unknown, active, limit })
    }

    /// Why there is no rebalancing.
    fn at_rest(&self, balance: &Balance, rebalancing: &Rebalancing) -> Hold {
        let skew = balance.expected_skew;
        match rebalancing {
            Rebalancing::Off(looks @ 1..) => Hold::Unconfirmed {
                skew: balance.largest_skew,
                looks: *looks,
                needed: self.policy.weight.looks().max(looks + 1),
            },
            Rebalancing::Spent(_) if skew > self.policy.skew_target => Hold::BudgetSpent {
                tokens: self.bucket.rate(),
                allowance: 0.0,
            },
            _ if skew > self.policy.skew_threshold => Hold::Noise {
                skew,
                noise_floor: balance.noise_floor,
            },
            _ => self.within(balance, balance.trigger),
        }
    }

    /// It is level; or it will be, when those who are on their way have landed.
    fn within(&self, balance: &Balance, threshold: f64) -> Hold {
        if balance.skew > threshold && self.motion.in_transit() > 0 {
            return Hold::ClientsInTransit {
                clients: self.motion.in_transit(),
            };
        }
        Hold::BelowThreshold {
            skew: balance.skew,
            threshold,
        }
    }

    /// How many connections of this apiserver a plan has that only finds out where they land: its part of what it takes for
    /// one of them to land elsewhere, if the balancer chose evenly.
    pub(super) fn probe_of(&self, balance: &Balance) -> usize {
        let least = share_out(self.probe_of_all(balance), balance, &self.policy.node) as f64;
        // After one in vain the others are no larger than they must be: moving may not help at all.
        let (_, in_vain) = self.ramp.tried();
        let part = if balance.per_connection > 0.0 && in_vain == 0 {
            balance.surplus * balance.surplus_part / balance.per_connection / PROBE_PART
        } else {
            0.0
        };
        least.max(part.floor()).max(1.0) as usize
    }

    /// How many all donors together tell to find out. Where strangers land elsewhere all the time it takes more to be seen.
    pub(super) fn probe_of_all(&self, balance: &Balance) -> u64 {
        let names = balance.servers.iter().map(|server| &server.name);
        let tellers = self.tellers_of(balance);
        let even = even_of(tellers.len(), balance.servers.len());
        probe_of(even, self.motion.strangers_hide(names, &tellers))
    }

    /// Those on whom a landing is no evidence, as far as they take clients: donors, and who was one while somebody whom it told
    /// is on his way.
    pub(super) fn tellers_of(&self, balance: &Balance) -> Vec<ApiserverName> {
        let donors: BTreeSet<&ApiserverName> = balance.donors.iter().chain(&self.tellers).collect();
        let servers = balance.servers.iter().map(|server| &server.name);
        let tellers: Vec<ApiserverName> = servers.filter(|name| donors.contains(name)).cloned().collect();
        if tellers.len() < balance.servers.len() {
            tellers
        } else {
            balance.donors.clone()
        }
    }

    /// Whether somebody who would take clients is overloaded, and more so than those who would give them.
    pub(super) fn stressed(&self, view: &View, balance: &Balance) -> Option<Hold> {
        let donors: BTreeSet<&ApiserverName> = balance.donors.iter().collect();
        let is_donor = |snapshot: &Snapshot| donors.contains(&snapshot.apiserver);
        let ready = || {
            let snapshots = view.entries.values().map(|entry| &entry.snapshot);
            snapshots.filter(|snapshot| snapshot.state == ServerState::Ready)
        };
        let refused: u64 = ready().filter(|one| is_donor(one)).map(|one| one.refused).sum();
        let connections: u64 = ready().filter(|one| is_donor(one)).map(|one| one.connections).sum();
        let usual = refused as f64 / connections.max(1) as f64;
        ready().filter(|one| !is_donor(one)).find_map(|one| {
            let share = (RELATIVE_REFUSALS * usual * one.connections as f64) as u64;
            let limit = NORMAL_REFUSALS.max(share);
            (one.refused > limit).then(|| Hold::RecipientsStressed {
                apiserver: one.apiserver.clone(),
                refused: one.refused,
                limit,
            })
        })
    }

    /// With weights that must be measured first, one apiserver at a time: until what its clients weigh is known where they
    /// landed, the others would take it for gone.
    fn peer_plan(&self, view: &View) -> Option<Hold> {
        if self.policy.weight.is_counted() {
            return None;
        }
        let busy = |(name, entry): (&ApiserverName, &Entry)| {
            (*name != self.policy.node && entry.snapshot.plan_in_flight).then(|| name.clone())
        };
        let apiserver = view.entries.iter().find_map(busy)?;
        Some(Hold::PeerPlanInFlight { apiserver })
    }
}

/// How many all donors together tell to find out where they land, so many more than `hidden` of whom would be seen elsewhere.
fn probe_of(even: f64, hidden: f64) -> u64 {
    ((1.0 - PROBE_CERTAINTY).ln() / (1.0 - even).ln() + hidden / even).ceil() as u64
}

/// Which part of those who are told an even choice sends to apiservers that are none of so many donors.
pub(super) fn even_of(donors: usize, apiservers: usize) -> f64 {
    1.0 - (donors as f64 / apiservers.max(1) as f64).clamp(0.01, 0.99)
}

/// One donor's part of so many, by its part of the surplus. The parts of all add up: each is the difference of two rounded
/// sums, and all agents have the apiservers in the same order.
fn share_out(all: u64, balance: &Balance, own: &ApiserverName) -> u64 {
    let (mut before, mut at) = (0.0, 0.0);
    for server in balance.servers.iter().filter(|server| server.acts) {
        before = at;
        at += (server.expected - server.target).max(0.0);
        if server.name == *own {
            break;
        }
    }
    let round = |sum: f64| (all as f64 * sum / balance.surplus.max(f64::MIN_POSITIVE) + 0.5).floor() as u64;
    round(at).saturating_sub(round(before))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{planner::Transit, policy::Policy, rho::Rho};

    const NOW: Timestamp = Timestamp::from_millis(1_000);

    fn name(index: usize) -> ApiserverName {
        ApiserverName::new(format!("n{index}"))
    }

    fn agent(index: usize) -> Agent {
        let mut policy = Policy::new(name(index), BTreeSet::new());
        policy.shim = ShimKind::Relay;
        Agent::new(policy, 1, NOW)
    }

    /// Apiservers with so many connections, each of which refused so many requests.
    fn view(servers: &[(u64, u64)]) -> View {
        let entry = |(index, (connections, refused)): (usize, &(u64, u64))| {
            let snapshot = Snapshot {
                state: ServerState::Ready,
                part: crate::view::Part::Acts,
                connections: *connections,
                load: *connections as f64,
                refused: *refused,
                ..agent(index).snapshot(NOW)
            };
            let age = Duration::ZERO;
            (name(index), Entry { snapshot, age })
        };
        View {
            entries: servers.iter().enumerate().map(entry).collect(),
        }
    }

    fn balance(view: &View, own: usize) -> Balance {
        let policy = Policy::new(name(own), BTreeSet::new());
        planner::balance(
            view,
            &policy,
            &Rho::default(),
            &planner::Spread::default(),
            Transit::default(),
        )
    }

    /// What overloads donors is often just what is to be mended: a recipient is compared with them, connection by connection.
    #[test]
    fn a_recipient_is_stressed_by_what_it_refuses_more_than_the_donors() {
        for (servers, stressed) in [
            (&[(500, 0), (500, 0), (100, 10)][..], None),
            (&[(500, 0), (500, 0), (100, 11)], Some((2, 11, 10))),
            (&[(500, 500), (500, 500), (100, 11)], None),
            (&[(500, 500), (500, 500), (100, 150)], None),
            (&[(500, 500), (500, 500), (100, 151)], Some((2, 151, 150))),
            // One that is overloaded and has too many is to lose them.
            (&[(900, 5_000), (100, 0), (100, 0)], None),
            // A cluster where all refuse all the time.
            (&[(500, 5_000), (500, 5_000), (400, 4_000)], None),
        ] {
            let view = view(servers);
            let hold = agent(0).stressed(&view, &balance(&view, 0));
            let found = hold.map(|hold| match hold {
                Hold::RecipientsStressed {
                    apiserver,
                    refused,
                    limit,
                } => (apiserver, refused, limit),
                other => panic!("{other:?}"),
            });
            let expected = stressed.map(|(index, refused, limit)| (name(index), refused, limit));
            assert_eq!(found, expected, "{servers:?}");
        }
    }

    #[test]
    fn the_parts_of_a_probe_add_up_whoever_reckons() {
        for loads in [[500, 500, 0], [1_054, 81, 518], [908, 672, 77], [40, 31, 1], [7, 5, 0]] {
            let view = view(&loads.map(|load| (load, 0)));
            let whole = balance(&view, 0);
            let all = super::probe_of(even_of(whole.donors.len(), whole.servers.len()), 0.0);
            let parts: Vec<u64> = (0..3)
                .map(|own| {
                    let balance = balance(&view, own);
                    if balance.donors.contains(&name(own)) {
                        share_out(all, &balance, &name(own))
                    } else {
                        0
                    }
                })
                .collect();
            assert_eq!(parts.iter().sum::<u64>(), all, "{loads:?}: {parts:?}");
        }
    }
}
