//! The agent's core: one state machine, told the time and what happened, answering with what to do.
//!
//! Job: keep the table and the peers' snapshots, decide once an interval and when a plan has settled, pace the plan,
//! follow its outcomes.
//! Input: [`Input`]s with `now`. Output: [`Effect`]s.
//! Must never act on something unknown: every doubt is a [`Hold`], and a doubt while a plan is in flight ends it.

mod decide;
mod futility;
mod motion;
mod plan;
mod rebalancing;
mod stress;
#[cfg(test)]
mod tests;

use std::{collections::VecDeque, time::Duration};

use futility::Futility;
use motion::Motion;
use plan::Plan;
use rebalancing::Rebalancing;
use stress::Stress;

use crate::{
    budget::TokenBucket,
    decision::{Decision, Outcomes},
    hold::Hold,
    ids::{ApiserverName, ConnectionId, ShimKind, Timestamp},
    observation::Observation,
    planner::{self, Cooldowns},
    policy::{Policy, Weight},
    rho::Rho,
    shim::{GoawayOrder, GoawayResult, ShimReport},
    table::ConnectionTable,
    view::{Entry, PeerFault, Peers, ServerState, Snapshot},
};

/// Decisions that are kept to be read.
const HISTORY: usize = 1_000;

/// Loads that must be measured are known after that time: that of the smoothing.
const MEASURED: Duration = Duration::from_secs(30);

/// So often at most the agent looks whether connections are old enough to count.
const AGEING: Duration = Duration::from_millis(250);

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
    /// Ask the source for one more list soon: the last one differs from the table.
    Confirm,
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
    upstream_ready: Option<bool>,
    up_since: Option<Timestamp>,
    started: Timestamp,
    goaways_total: u64,
    told_load_total: f64,
    /// Load of those who are heavier than the target, as of the last decision.
    unmovable: f64,
    stress: Stress,
    futility: Futility,
    /// The apiservers that took connections at the last decision.
    ready: Vec<ApiserverName>,
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
            table: ConnectionTable::new(policy.node_local, policy.stays_after()),
            peers: Peers::new(policy.peers.iter().cloned()),
            bucket: TokenBucket::new(policy.goaway_rate, now),
            cooldowns: Cooldowns::default(),
            rho: Rho::default(),
            generation: 0,
            next_id: 1,
            paused: false,
            rebalancing: Rebalancing::Off(0),
            shim_fault: (policy.shim != ShimKind::None).then(|| "it has not answered yet".to_owned()),
            upstream_ready: None,
            up_since: None,
            started: now,
            goaways_total: 0,
            told_load_total: 0.0,
            unmovable: 0.0,
            stress: Stress::default(),
            futility: Futility::default(),
            ready: Vec::new(),
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
        if let Some(stays) = self.table.next_stays() {
            at = at.min(stays.max(now + AGEING));
        }
        if let Some(plan) = &self.plan {
            let next = match plan.unsent.front() {
                Some(id) => {
                    let cost = self.table.connection(*id).map_or(1.0, planner::cost_of);
                    self.bucket.affords_at(cost, now)
                }
                // The shim's answer is an input of its own.
                None if plan.is_awaited() => at,
                None => plan.last_goaway + self.policy.settle,
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
            unmovable: self.unmovable,
            draining: self.table.draining() as u64,
            draining_streams: self.table.draining_streams(),
            goaways_total: self.goaways_total,
            told_load_total: self.told_load_total,
            refused: self.stress.refused(self.policy.stale_after(), now),
            node_local: self.table.node_local() as u64,
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

    /// Why the shim cannot be used, when it cannot; there is no fault without a shim.
    pub fn shim_fault(&self) -> Option<&str> {
        self.shim_fault.as_deref()
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
        if !self.table.is_trusted() || self.unmeasured(now).is_some() {
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

    /// For how long loads are measured, while that is not long enough to say anything.
    fn unmeasured(&self, now: Timestamp) -> Option<Duration> {
        if matches!(self.policy.weight, Weight::Connections | Weight::Streams) {
            return None;
        }
        let measured = self
            .table
            .sampled_since()
            .map_or(Duration::ZERO, |since| now.since(since));
        (measured < MEASURED).then_some(measured)
    }

    fn observe(&mut self, now: Timestamp, observations: Vec<Observation>, effects: &mut Vec<Effect>) {
        let mut listed = false;
        for observation in observations {
            listed |= matches!(observation, Observation::Listed { .. });
            let changes = self.table.observe(observation, now);
            if changes.listener_changed {
                self.up_since = Some(now);
            }
            if changes.lost && !effects.contains(&Effect::Resync) {
                effects.push(Effect::Resync);
            }
        }
        if listed && self.table.is_in_doubt() {
            effects.push(Effect::Confirm);
        }
    }

    fn shim_answered(&mut self, now: Timestamp, report: &ShimReport) {
        self.shim_fault = None;
        if self.upstream_ready == Some(false) && report.upstream_ready == Some(true) {
            // The port was open a while before the server behind it was ready: clients come from now on.
            self.up_since = Some(now);
        }
        self.upstream_ready = report.upstream_ready;
        self.stress.hear(&report.instance, report.refused_total, now);
        // A restarted agent goes on above what the shim has seen, or it would be refused.
        self.generation = self.generation.max(report.generation);
        self.table.report(report);
    }

    /// One turn: follow the plan, decide when it is time, send what the budget allows.
    fn turn(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        self.cooldowns.expire(now);
        self.table.age(now);
        let mut due = now >= self.next_decision;
        if due || self.plan.is_some() {
            // What a settled plan left over is not put off to the next interval.
            due |= self.follow(now, effects);
        }
        if due {
            self.next_decision = now + self.policy.interval;
            self.table.sample(now, self.policy.weight);
            let full_ceiling =
                planner::full_ceiling(&self.peers.view(self.snapshot(now), now), self.policy.skew_target);
            self.look_at_rho(now);
            self.unmovable = planner::unmovable(&self.table, self.policy.weight, full_ceiling);
            let view = self.peers.view(self.snapshot(now), now);
            let (mut decision, rebalancing) = self.decide(now, view);
            self.rebalancing = rebalancing;
            decision.id = self.next_id;
            self.next_id += 1;
            match &decision.hold {
                None => self.start(now, &mut decision),
                // A preview tells it; a log of every interval need not.
                Some(hold) if hold.is_level() => decision.heaviest.clear(),
                Some(_) => {}
            }
            self.remember(decision.clone());
            effects.push(Effect::Record(decision));
        }
        self.send(now, effects);
    }

    /// Forgets where clients landed when the apiservers are others now, and follows whether moving helps.
    fn look_at_rho(&mut self, now: Timestamp) {
        let view = self.peers.view(self.snapshot(now), now);
        let is_ready = |(_, entry): &(&ApiserverName, &Entry)| entry.snapshot.state == ServerState::Ready;
        let ready: Vec<ApiserverName> = view
            .entries
            .iter()
            .filter(is_ready)
            .map(|(name, _)| name.clone())
            .collect();
        if ready != self.ready {
            self.ready = ready;
            self.rho = Rho::default();
            self.futility = Futility::default();
        }
        // Without donors every landing is elsewhere: that says nothing.
        let donors = self.balance(&view).donors;
        if !donors.is_empty() {
            self.futility.look(&mut self.rho, &donors, now);
        }
    }

    /// Learns where clients landed, counts those on their way, and closes a plan that has settled: whether what it left
    /// over is to be decided at once.
    fn follow(&mut self, now: Timestamp, effects: &mut Vec<Effect>) -> bool {
        let view = self.peers.view(self.snapshot(now), now);
        let underway = view.entries.values().any(|entry| entry.snapshot.plan_in_flight) || self.motion.in_transit() > 0;
        let expected = self.motion.in_transit();
        let moves = self
            .motion
            .look(&view, self.policy.settle + self.policy.stays_after(), now);
        let expected = expected + moves.iter().map(|moved| moved.goaways).sum::<u64>();
        if underway {
            let landings: Vec<_> = moves
                .iter()
                .map(|moved| (moved.apiserver.clone(), moved.landings))
                .collect();
            let donors = self.balance(&view).donors;
            self.rho.learn(&landings, &donors, expected as f64);
        }
        self.rebalancing.told(moves.iter().map(|moved| moved.goaways).sum());
        let balance = self.balance(&view);
        let is_ordered = self.plan.as_ref().is_some_and(|plan| plan.is_ordered);
        let doubt = match self.guard(now) {
            // There is nowhere else to go to, but an operator asked for it: what is left to doubt is the shim.
            Some(Hold::FewerThanTwoApiservers { .. }) if is_ordered => {
                self.shim_fault.clone().map(|why| Hold::ShimUnavailable { why })
            }
            doubt => doubt.or_else(|| self.stressed(&view, &balance)),
        };
        if doubt.is_some() {
            // It came up while a plan was on its way: who has not been told is not told.
            self.drop_unsent();
        } else if self.plan.is_some() && !is_ordered {
            self.trim(balance.room);
        }
        self.settle(now, effects)
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
        if let Some(measured) = self.unmeasured(now) {
            return Some(Hold::PeerUnknown {
                peer: self.policy.node.clone(),
                why: format!(
                    "what its own clients weigh is measured for {} s only, {} s are needed",
                    measured.as_secs(),
                    MEASURED.as_secs()
                ),
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
        if let Some(hold) = self.peers.hold(self.policy.stale_after(), self.policy.settle, now) {
            return Some(hold);
        }
        let why = self.shim_fault.clone()?;
        Some(Hold::ShimUnavailable { why })
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
