//! The agent's core: one state machine, told the time and what happened, answering with what to do.
//!
//! Job: keep the table and the peers' snapshots, decide once an interval, pace the plan, follow its outcomes.
//! Input: [`Input`]s with `now`. Output: [`Effect`]s.
//! Must never act on something unknown: every doubt is a [`Hold`], and a doubt while a plan is in flight ends it.

mod motion;
mod plan;
mod rebalancing;
#[cfg(test)]
mod tests;

use std::{collections::VecDeque, time::Duration};

use motion::Motion;
use plan::Plan;
use rebalancing::Rebalancing;

use crate::{
    budget::TokenBucket,
    decision::{Decision, Hold, Outcomes, Victim},
    observation::Observation,
    planner::{self, Balance, Cooldowns},
    policy::Policy,
    rho::Rho,
    shim::{GoawayOrder, GoawayResult, ShimReport},
    table::ConnectionTable,
    view::{PeerFault, Peers, ServerState, Snapshot, View},
    words::{ApiserverName, ConnectionId, ShimKind, Timestamp},
};

/// Decisions that are kept to be read.
const HISTORY: usize = 1_000;

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// Time passed.
    Tick,
    /// The source spoke.
    Observations(Vec<Observation>),
    /// The shim answered.
    Shim(ShimReport),
    /// The shim did not answer.
    ShimFailed(String),
    /// A peer answered, or did not.
    Peer(ApiserverName, Result<Snapshot, PeerFault>),
    /// The shim carried out an order.
    GoawayAnswered(Vec<(ConnectionId, GoawayResult)>),
    /// The shim did not carry out an order, or nobody knows.
    GoawayFailed(Vec<ConnectionId>, String),
    /// An operator spoke.
    Command(Command),
}

/// What an operator may ask.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Decide nothing until resumed.
    Pause,
    /// Decide again.
    Resume,
    /// Tell these connections, whatever the skew; the budget's rate holds.
    Goaway(Vec<ConnectionId>),
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Have the shim carry this out, and answer with [`Input::GoawayAnswered`] or [`Input::GoawayFailed`].
    SendGoaway(GoawayOrder),
    /// Write down a decision.
    Record(Decision),
    /// Write down a decision again: its outcomes are known now.
    Settled(Decision),
    /// Ask the source for its complete list.
    Resync,
}

/// The state machine. See the module's documentation.
#[derive(Debug)]
pub struct Agent {
    policy: Policy,
    instance: u64,
    table: ConnectionTable,
    peers: Peers,
    bucket: TokenBucket,
    cooldowns: Cooldowns,
    rho: Rho,
    generation: u64,
    next_id: u64,
    paused: bool,
    rebalancing: Rebalancing,
    shim_fault: Option<String>,
    shim_instance: String,
    upstream_ready: Option<bool>,
    up_since: Option<Timestamp>,
    started: Timestamp,
    goaways_total: u64,
    plan: Option<Plan>,
    motion: Motion,
    history: VecDeque<Decision>,
    next_decision: Timestamp,
    outcomes_total: Outcomes,
}

impl Agent {
    /// An agent that knows nothing yet. `instance` names this process to its peers.
    pub fn new(policy: Policy, instance: u64, now: Timestamp) -> Self {
        Self {
            instance,
            table: ConnectionTable::default(),
            peers: Peers::new(policy.peers.iter().cloned()),
            bucket: TokenBucket::new(policy.goaway_rate, now),
            cooldowns: Cooldowns::default(),
            rho: Rho::default(),
            generation: 0,
            next_id: 1,
            paused: false,
            rebalancing: Rebalancing::Off,
            shim_fault: (policy.shim != ShimKind::None).then(|| "it has not answered yet".to_owned()),
            shim_instance: String::new(),
            upstream_ready: None,
            up_since: None,
            started: now,
            goaways_total: 0,
            plan: None,
            motion: Motion::default(),
            history: VecDeque::new(),
            next_decision: now + policy.interval,
            outcomes_total: Outcomes::default(),
            policy,
        }
    }

    /// Takes one input and says what to do.
    pub fn handle(&mut self, now: Timestamp, input: Input) -> Vec<Effect> {
        let mut effects = Vec::new();
        match input {
            Input::Tick => {}
            Input::Observations(observations) => self.observe(now, observations, &mut effects),
            Input::Shim(report) => self.shim_answered(now, &report),
            Input::ShimFailed(why) => self.shim_fault = Some(why),
            Input::Peer(name, answer) => self.peers.hear(&name, answer, now),
            Input::GoawayAnswered(results) => self.goaway_answered(now, &results),
            Input::GoawayFailed(victims, why) => {
                self.shim_fault = Some(why);
                self.goaway_answered(
                    now,
                    &victims
                        .into_iter()
                        .map(|id| (id, GoawayResult::Unknown))
                        .collect::<Vec<_>>(),
                );
            }
            Input::Command(Command::Pause) => self.paused = true,
            Input::Command(Command::Resume) => self.paused = false,
            Input::Command(Command::Goaway(ids)) => self.asked_by_operator(now, &ids, &mut effects),
        }
        self.turn(now, &mut effects);
        effects
    }

    /// When to call again with [`Input::Tick`] at the latest.
    pub fn next_wakeup(&self, now: Timestamp) -> Timestamp {
        let mut at = self.next_decision;
        if let Some(plan) = &self.plan {
            let next = if !plan.unsent.is_empty() {
                self.bucket.next_token(now)
            } else if plan.is_awaited() {
                // The shim's answer is an input of its own.
                at
            } else {
                plan.last_goaway + self.policy.settle
            };
            at = at.min(next.max(now + Duration::from_millis(1)));
        }
        at
    }

    /// This apiserver's snapshot, as the peers get it.
    pub fn snapshot(&self, now: Timestamp) -> Snapshot {
        let names = self.policy.peers.iter().chain([&self.policy.node]).cloned().collect();
        Snapshot {
            apiserver: self.policy.node.clone(),
            state: self.state(now),
            connections: self.table.active() as u64,
            load: self.table.load(self.policy.weight),
            draining: self.table.draining() as u64,
            goaways_total: self.goaways_total,
            accepted_total: self.table.accepted_total(),
            plan_in_flight: self.plan.is_some(),
            rebalancing: self.rebalancing.course().is_some(),
            instance: self.instance,
            names,
        }
    }

    /// What would be decided now, without doing it.
    pub fn preview(&self, now: Timestamp) -> Decision {
        let view = self.peers.view(self.snapshot(now), now);
        self.decide(now, view).0
    }

    /// The connections of this apiserver.
    pub fn table(&self) -> &ConnectionTable {
        &self.table
    }

    /// What is known of the peers.
    pub fn peers(&self) -> &Peers {
        &self.peers
    }

    /// The policy it follows.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Decisions, oldest first, at most the newest thousand.
    pub fn history(&self) -> impl DoubleEndedIterator<Item = &Decision> {
        self.history.iter()
    }

    /// Whether an operator paused it.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Whether no plan is in flight or settling.
    pub fn is_idle(&self) -> bool {
        self.plan.is_none()
    }

    /// Tokens in the budget.
    pub fn budget_tokens(&self, now: Timestamp) -> f64 {
        self.bucket.tokens(now)
    }

    /// GOAWAYs sent since the start.
    pub fn goaways_total(&self) -> u64 {
        self.goaways_total
    }

    /// What became of all victims since the start.
    pub fn outcomes_total(&self) -> Outcomes {
        self.outcomes_total
    }

    fn state(&self, now: Timestamp) -> ServerState {
        if !self.table.is_trusted() {
            return ServerState::Unknown;
        }
        if !self.table.is_listening() || self.upstream_ready == Some(false) {
            return ServerState::Down;
        }
        match self.up_since {
            Some(since) if now.since(since) < self.policy.interval => ServerState::Starting,
            _ => ServerState::Ready,
        }
    }

    fn observe(&mut self, now: Timestamp, observations: Vec<Observation>, effects: &mut Vec<Effect>) {
        for observation in observations {
            let changes = self.table.observe(observation, now);
            if changes.listener_changed {
                self.up_since = Some(now);
            }
            if changes.lost && !effects.contains(&Effect::Resync) {
                effects.push(Effect::Resync);
            }
        }
    }

    fn shim_answered(&mut self, now: Timestamp, report: &ShimReport) {
        self.shim_fault = None;
        if self.shim_instance != report.instance {
            self.shim_instance.clone_from(&report.instance);
        }
        if self.upstream_ready == Some(false) && report.upstream_ready == Some(true) {
            // The port was open a while before the server behind it was ready: clients come from now on.
            self.up_since = Some(now);
        }
        self.upstream_ready = report.upstream_ready;
        // A restarted agent goes on above what the shim has seen, or it would be refused.
        self.generation = self.generation.max(report.generation);
        self.table.report(report);
    }

    /// One turn: follow the plan, decide when it is time, send what the budget allows.
    fn turn(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        self.cooldowns.expire(now);
        let due = now >= self.next_decision;
        if due || self.plan.is_some() {
            self.follow(now, effects);
        }
        if due {
            self.next_decision = now + self.policy.interval;
            self.table.sample(now);
            let view = self.peers.view(self.snapshot(now), now);
            let (mut decision, rebalancing) = self.decide(now, view);
            self.rebalancing = rebalancing;
            decision.id = self.next_id;
            self.next_id += 1;
            if decision.hold.is_none() {
                self.start(now, &mut decision);
            }
            self.remember(decision.clone());
            effects.push(Effect::Record(decision));
        }
        self.send(now, effects);
    }

    /// Learns where clients landed, counts those on their way, and closes a plan that has settled.
    fn follow(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        let view = self.peers.view(self.snapshot(now), now);
        let underway = view.entries.values().any(|entry| entry.snapshot.plan_in_flight) || self.motion.in_transit() > 0;
        let moves = self.motion.look(&view, self.policy.settle, now);
        if underway {
            self.rho
                .learn(moves.iter().map(|moved| (&moved.apiserver, moved.landings)));
        }
        self.rebalancing.told(moves.iter().map(|moved| moved.goaways).sum());
        if self.guard(now).is_some() {
            // A doubt came up while a plan was on its way: who has not been told is not told.
            self.drop_unsent();
        }
        self.settle(now, effects);
    }

    /// The first doubt, if there is one.
    fn guard(&self, now: Timestamp) -> Option<Hold> {
        if self.paused {
            return Some(Hold::Paused);
        }
        if !self.table.is_trusted() {
            return Some(Hold::LostEvents {
                total: self.table.lost_events_total(),
            });
        }
        match self.state(now) {
            ServerState::Ready => {}
            ServerState::Down => {
                return Some(Hold::ApiserverStarting {
                    apiserver: self.policy.node.clone(),
                    up: None,
                });
            }
            ServerState::Starting | ServerState::Unknown => {
                let up = self.up_since.map(|since| now.since(since));
                return Some(Hold::ApiserverStarting {
                    apiserver: self.policy.node.clone(),
                    up,
                });
            }
        }
        if let Some(hold) = self.peers.hold(self.policy.stale_after(), now) {
            return Some(hold);
        }
        let why = self.shim_fault.clone()?;
        Some(Hold::ShimUnavailable { why })
    }

    fn balance(&self, view: &View) -> Balance {
        planner::balance(
            view,
            &self.policy.node,
            self.policy.skew_target,
            self.policy.skew_threshold,
            &self.rho,
            self.motion.in_transit() as f64,
        )
    }

    /// What would be decided, and what the rebalancing is then.
    fn decide(&self, now: Timestamp, view: View) -> (Decision, Rebalancing) {
        let balance = self.balance(&view);
        let doubt = self.guard(now);
        // A doubt says nothing about the rebalancing: it waits.
        let rebalancing = match doubt {
            Some(_) => self.rebalancing.clone(),
            None => self.rebalancing.after(&balance, &view, &self.rho),
        };
        let chosen = match doubt {
            Some(doubt) => Err(doubt),
            None => self.victims(now, &balance, &rebalancing),
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
            hold,
            explanation,
        };
        (decision, rebalancing)
    }

    fn explain(&self, balance: &Balance, victims: &[Victim]) -> String {
        format!(
            "{:.0} load is {:.1} % above the mean of {:.1}; all donors together are {:.1} above the target, {:.1} of it to be told here; {} connections are told now, at {} a second, and the skew is expected to fall to {:+.1} %",
            balance.mean * (1.0 + balance.skew),
            balance.skew * 100.0,
            balance.mean,
            balance.surplus,
            balance.quota,
            victims.len(),
            self.policy.goaway_rate,
            (balance.skew - victims.iter().map(|victim| victim.load).sum::<f64>() * balance.rho / balance.mean) * 100.0,
        )
    }

    fn victims(&self, now: Timestamp, balance: &Balance, rebalancing: &Rebalancing) -> Result<Vec<Victim>, Hold> {
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
            return Err(if skew > self.policy.skew_threshold {
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
        if self.rho.is_futile(&balance.donors) {
            return Err(Hold::Futile {
                rho: self.rho.upper(&balance.donors),
                landings: self.rho.landings(),
            });
        }
        // This apiserver's part of what the rebalancing may still cost: as its quota is of all donors' together.
        let part = balance.quota * balance.rho / balance.surplus;
        let allowance = course.left(&self.rho) * part;
        if self.bucket.tokens(now) < 1.0 || allowance < 0.5 {
            return Err(Hold::BudgetSpent {
                tokens: self.bucket.tokens(now),
                allowance,
            });
        }
        let share = (self.policy.goaway_share * self.table.active() as f64).floor();
        let limit = share.min((allowance + 0.5).floor()).max(1.0) as usize;
        let victims = planner::choose(&self.table, &self.policy, &self.cooldowns, balance.quota, limit, now)?;
        if victims.is_empty() {
            return Err(reached);
        }
        Ok(victims)
    }

    fn asked_by_operator(&mut self, now: Timestamp, ids: &[ConnectionId], effects: &mut Vec<Effect>) {
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
                let connection = self.table.connection(*id).filter(|connection| connection.is_active())?;
                Some(Victim {
                    connection: *id,
                    client: connection.client(),
                    user: connection.user().map(str::to_owned),
                    user_agent: connection.user_agent().map(str::to_owned),
                    load: planner::load_of(connection, self.policy.weight),
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
        }
        self.remember(decision.clone());
        effects.push(Effect::Record(decision));
    }

    fn remember(&mut self, decision: Decision) {
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(decision);
    }

    /// When the agent started.
    pub fn started(&self) -> Timestamp {
        self.started
    }
}
