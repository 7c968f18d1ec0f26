//! The agent's core: one state machine, told the time and what happened, answering with what to do.
//!
//! Job: keep the table and the peers' snapshots, decide once an interval and when a plan has settled, pace the plan,
//! follow its outcomes.
//! Input: [`Input`]s with `now`. Output: [`Effect`]s.
//! Must never act on something unknown: every doubt is a [`Hold`], and a doubt while a plan is in flight ends it.

mod advice;
mod command;
mod decide;
mod evacuation;
mod growth;
mod guard;
mod hear;
mod landings;
mod look;
mod memory;
mod motion;
mod overload;
mod plan;
mod ramp;
mod rebalancing;
mod report;
mod strangers;
mod stress;
mod switch;
#[cfg(test)]
mod tests;
mod upgrade;

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

pub use advice::Advice;
pub use command::{Answer, Command, Pause};
pub use evacuation::{Progress, RememberedEvacuation};
use growth::Growth;
use look::Look;
pub use memory::{Memory, RememberedPause, RememberedStrangers, RememberedTransit, RememberedTries};
use motion::Motion;
pub use motion::Totals;
use overload::Overload;
use plan::Plan;
use ramp::Ramp;
use rebalancing::Rebalancing;
use stress::Stress;
pub use switch::{Switch, SwitchPause};
use upgrade::Upgrade;

use crate::{
    budget::TokenBucket,
    decision::{Decision, Outcomes},
    hold::Hold,
    ids::{ApiserverName, ConnectionId, ShimKind, Timestamp},
    membership::Roll,
    observation::Observation,
    planner::{self, Cooldowns, Spread, Unmovable},
    policy::{Mode, Policy},
    release::Release,
    rho::Rho,
    shim::{Abilities, GoawayOrder, GoawayResult, ShimReport},
    table::ConnectionTable,
    view::{Part, PeerFault, Peers, ServerState, Snapshot},
};

/// Decisions that are kept to be read.
const HISTORY: usize = 1_000;

/// And no more of them than name so many victims: where a plan names thousands, a thousand of them are a million names.
const HISTORY_VICTIMS: usize = 100_000;

/// While clients are in transit anywhere, it is looked so often where they land.
const CLOSE_LOOK: Duration = Duration::from_millis(500);

/// An evacuation tells those who are due so often.
const AT_A_TIME: Duration = Duration::from_millis(100);

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
    /// The shim through which all clients come takes connections and answers nobody.
    ShimStalled(String),
    /// A peer answered, or did not.
    Peer(ApiserverName, Result<Snapshot, PeerFault>),
    /// What a peer of another release, or with other flags, says was said to all agents: it is paused with them all the same.
    Word(ApiserverName, Switch),
    /// Who is who by the cluster's Leases.
    Roll(Roll),
    /// The shim carried out an order.
    GoawayAnswered(Vec<(ConnectionId, GoawayResult)>),
    /// The shim did not carry out an order, or nobody knows.
    GoawayFailed(Vec<ConnectionId>, String),
    /// An operator spoke, and does not wait for an answer (see [`Agent::command`]).
    Command(Command),
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
    started: Timestamp,

    // What is there: connections, peers, the shim.
    table: ConnectionTable,
    peers: Peers,
    abilities: Abilities,
    shim_fault: Option<String>,
    stall: Stall,
    upstream_ready: Option<bool>,
    up_since: Option<Timestamp>,
    /// How often the apiserver was seen to end.
    restarts: u64,
    upstream_gone: bool,
    release: Option<Release>,
    upstream_listener: Option<u64>,
    stress: Stress,
    overload: Overload,

    // What was learned.
    motion: Motion,
    rho: Rho,
    spread: Spread,
    ramp: Ramp,
    unmovable: Unmovable,
    /// The apiservers that took connections at the last look.
    ready: Vec<ApiserverName>,
    /// Whether all were known once: what differs from then on is a change.
    was_whole: bool,
    /// Those that what was tried was tried on, by this process or the one before it.
    tried_on: Vec<ApiserverName>,
    /// The donors at the last look.
    donors: Vec<ApiserverName>,
    /// Those on whom a landing is no evidence, as of the last look.
    tellers: Vec<ApiserverName>,
    /// When each was a donor last.
    were_donors: BTreeMap<ApiserverName, Timestamp>,
    /// When somebody was told or landed last, anywhere.
    moved: Timestamp,
    growth: Growth,
    sampled: Option<Timestamp>,

    // What is being done.
    rebalancing: Rebalancing,
    upgrade: Upgrade,
    plan: Option<Plan>,
    bucket: TokenBucket,
    cooldowns: Cooldowns,
    generation: u64,
    next_decision: Timestamp,
    /// The last dry plan: it is not made again in the same rebalancing.
    rehearsed: Option<Rehearsed>,

    // What operators said.
    pause: Option<Pause>,
    /// What was said to all agents.
    switch: switch::Kept,
    evacuation: Option<evacuation::Evacuation>,
    /// When one ended last.
    returned: Option<Timestamp>,
    proposed: Option<Proposed>,
    /// The rebalancing that was approved, by when it began.
    approved: Option<Timestamp>,

    // What is told of it.
    next_id: u64,
    history: VecDeque<Decision>,
    /// How many victims they name together.
    history_victims: usize,
    goaways_total: u64,
    told_load_total: f64,
    outcomes_total: Outcomes,
    memory_changes: u64,
}

/// A plan that nobody carried out.
#[derive(Clone, Copy, Debug)]
struct Rehearsed {
    course: Timestamp,
    decision: u64,
    goaways: u64,
}

/// A rebalancing that waits for approval.
#[derive(Clone, Copy, Debug)]
struct Proposed {
    course: Timestamp,
    id: u64,
}

/// Whether the shim through which all clients come takes connections and answers nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stall {
    /// It answers, or nobody is known to wait for it.
    #[default]
    No,
    Lasts,
    /// It has answered again since then. Nothing of what was learned is forgotten for it: it is the one it was.
    Over(Timestamp),
}

impl Agent {
    /// An agent that knows nothing yet. `instance` names this process to its peers.
    pub fn new(policy: Policy, instance: u64, now: Timestamp) -> Self {
        Self {
            instance,
            started: now,
            table: ConnectionTable::new(policy.node_local, policy.stays_after()),
            peers: Peers::new(policy.node.clone(), policy.peers.iter().cloned()),
            abilities: Abilities::default(),
            shim_fault: (policy.shim != ShimKind::None).then(|| "it has not answered yet".to_owned()),
            stall: Stall::No,
            upstream_ready: None,
            up_since: None,
            restarts: 0,
            upstream_gone: false,
            release: None,
            upstream_listener: None,
            stress: Stress::default(),
            overload: Overload::default(),
            motion: Motion::default(),
            rho: Rho::default(),
            spread: Spread::default(),
            ramp: Ramp::new(now),
            unmovable: Unmovable::default(),
            ready: Vec::new(),
            was_whole: false,
            tried_on: Vec::new(),
            donors: Vec::new(),
            tellers: Vec::new(),
            were_donors: BTreeMap::new(),
            moved: now,
            growth: Growth::default(),
            sampled: None,
            rebalancing: Rebalancing::Off(0),
            upgrade: Upgrade::default(),
            plan: None,
            bucket: TokenBucket::new(policy.goaway_rate.per_second(0), now),
            cooldowns: Cooldowns::default(),
            generation: 0,
            next_decision: now + policy.interval,
            rehearsed: None,
            pause: None,
            switch: switch::Kept::default(),
            evacuation: None,
            returned: None,
            proposed: None,
            approved: None,
            next_id: 1,
            history: VecDeque::new(),
            history_victims: 0,
            goaways_total: 0,
            told_load_total: 0.0,
            outcomes_total: Outcomes::default(),
            memory_changes: 0,
            policy,
        }
    }

    /// Peers are found by Leases: until a roll comes, nothing is known. Before the first input.
    pub fn call_first(&mut self, roll: Roll) {
        self.peers.await_roll(roll);
    }

    /// Takes one input and says what to do.
    pub fn handle(&mut self, now: Timestamp, input: Input) -> Vec<Effect> {
        let mut effects = Vec::new();
        match input {
            Input::Tick => {}
            Input::Observations(observations) => self.observe(now, observations, &mut effects),
            Input::Shim(report) => self.shim_answered(now, &report),
            Input::ShimFailed(why) => {
                self.shim_fault = Some(why);
                self.stall = Stall::No;
            }
            Input::ShimStalled(why) => {
                self.shim_fault = Some(why);
                self.stall = Stall::Lasts;
            }
            Input::Peer(name, answer) => {
                let beyond = |snapshot: &Snapshot| self.switch.is_beyond(&snapshot.switch);
                let answer = match answer.as_ref().ok().and_then(beyond) {
                    Some(why) => Err(PeerFault::Disagrees(why)),
                    None => answer,
                };
                if let Ok(snapshot) = &answer
                    && snapshot.apiserver == name
                {
                    self.hear_word(&name, &snapshot.switch, now);
                }
                let before = self.peers.state(&name);
                self.peers.hear(&name, answer, now);
                let is_back = before.is_some_and(|state| state != ServerState::Ready)
                    && self.peers.state(&name) == Some(ServerState::Ready);
                // One that takes clients from now on is not left waiting for the next interval.
                if is_back && self.policy.weight.is_counted() {
                    self.next_decision = self.next_decision.min(now);
                }
            }
            Input::Word(name, switch) => self.hear_word(&name, &switch, now),
            Input::Roll(roll) => self.call(now, roll, &mut effects),
            Input::GoawayAnswered(results) => self.goaway_answered(now, &results),
            Input::GoawayFailed(victims, why) => {
                self.shim_fault = Some(why);
                let unknown = victims.into_iter().map(|id| (id, GoawayResult::Unknown));
                self.goaway_answered(now, &unknown.collect::<Vec<_>>());
            }
            Input::Command(command) => {
                // Who wants the answer asks with `command`.
                let _ = self.commanded(now, command, &mut effects);
            }
        }
        self.turn(now, &mut effects);
        effects
    }

    /// When to call again with [`Input::Tick`] at the latest.
    pub fn next_wakeup(&self, now: Timestamp) -> Timestamp {
        let soon = now + Duration::from_millis(1);
        let mut at = self.next_decision;
        if let Some(stays) = self.table.next_stays() {
            at = at.min(stays.max(now + AGEING));
        }
        if let Some(until) = self.ramp.ends().filter(|_| self.rebalancing.course().is_some()) {
            at = at.min(until.max(soon));
        }
        if let Some(plan) = &self.plan {
            let next = match plan.unsent.front() {
                Some(id) => {
                    let cost = self.table.connection(*id).map_or(1.0, planner::cost_of);
                    // Many a second are told a few at a time: each wake-up is a look at everything.
                    let few = (self.bucket.rate() / 10.0).min(plan.unsent.len() as f64);
                    match plan.spread {
                        // An operator gave the time: no budget.
                        Some(_) if plan.is_evacuation => plan.due_at().max(now + AT_A_TIME),
                        Some(_) => self.bucket.affords_at(cost, now).max(plan.due_at()),
                        None => self.bucket.affords_at(cost.max(few), now),
                    }
                }
                // The shim's answer is an input of its own.
                None if plan.is_awaited() => plan.given_up,
                None => plan.last_goaway + self.policy.settle,
            };
            at = at.min(next.max(soon));
        }
        if let Some(wave) = self.next_wave() {
            at = at.min(wave.max(now + AT_A_TIME));
        }
        if self.is_close() {
            at = at.min(self.sampled.map_or(soon, |sampled| (sampled + CLOSE_LOOK).max(soon)));
        }
        at
    }

    fn state(&self, now: Timestamp) -> ServerState {
        if !self.table.is_trusted() || self.table.shared_port().is_some() || self.unmeasured(now).is_some() {
            return ServerState::Unknown;
        }
        let is_overloaded = self.overload.lasts(now);
        if !self.table.is_listening() || self.upstream_ready == Some(false) && !is_overloaded {
            return ServerState::Down;
        }
        if self.evacuation.is_some() {
            return ServerState::Evacuating;
        }
        if is_overloaded {
            return ServerState::Overloaded;
        }
        if self.is_stalled(now) {
            return ServerState::Unknown;
        }
        match self.up_since {
            Some(since) if now.since(since) < self.policy.interval => ServerState::Starting,
            _ => ServerState::Ready,
        }
    }

    /// Whether nobody is served here although the port is open. The load balancer learns later than this agent that it is over.
    fn is_stalled(&self, now: Timestamp) -> bool {
        match self.stall {
            Stall::No => false,
            Stall::Lasts => true,
            Stall::Over(at) => now.since(at) < self.policy.interval,
        }
    }

    /// What this agent does about skew.
    fn part(&self, now: Timestamp) -> Part {
        if self.policy.shim == ShimKind::None || self.guard(now).is_some() {
            return Part::Watches;
        }
        match self.policy.mode {
            Mode::Active => Part::Acts,
            Mode::DryRun => Part::DryRun,
            Mode::Propose => {
                let course = self.rebalancing.course().map(|course| course.began);
                if course.is_some() && course == self.approved {
                    Part::Acts
                } else {
                    Part::Watches
                }
            }
        }
    }

    /// Whether decisions are only written down.
    fn rehearses(&self) -> bool {
        self.policy.mode == Mode::DryRun || self.policy.shim == ShimKind::None
    }

    /// Whether clients are on their way anywhere: where they land is to be seen soon.
    fn is_close(&self) -> bool {
        self.motion.in_transit() > 0
            || self.plan.is_some()
            || self.peers.iter().any(|(_, peer)| {
                let moving = |snapshot: &Snapshot| snapshot.plan_in_flight || snapshot.in_transit > 0;
                peer.snapshot.as_ref().is_some_and(|(_, snapshot)| moving(snapshot))
            })
    }

    /// One turn: look, follow the plan, decide when it is time, send what the budget allows.
    fn turn(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        self.cooldowns.expire(now);
        self.table.age(now);
        self.end_pause(now);
        let decides = now >= self.next_decision;
        let is_close = self.is_close();
        if decides || is_close && self.sampled.is_none_or(|at| now.since(at) >= CLOSE_LOOK) {
            self.sampled = Some(now);
            self.table.sample(now, self.policy.weight);
        }
        let waited = self.ramp.look(now) && self.rebalancing.course().is_some();
        if decides || is_close || waited {
            if decides && !self.policy.weight.is_counted() {
                let ceiling = planner::full_ceiling(&self.peers.view(self.snapshot(now), now), &self.policy);
                self.unmovable.look(&self.table, self.policy.weight, ceiling);
            }
            self.bucket
                .set_rate(self.policy.goaway_rate.per_second(self.table.active()), now);
            let mut look = self.look(now);
            // What a settled plan left over is not put off to the next interval.
            let is_settled = self.follow(now, &look, effects);
            if is_settled {
                look = self.look(now);
            }
            if decides || is_settled || waited || self.goes_on(now, &look) {
                self.decided(now, look, effects);
            }
        }
        self.evacuate_on(now, effects);
        self.send(now, effects);
    }

    /// Whether a rebalancing between two plans has something to do before the next interval: those who came back left room
    /// for a plan, or the last ones landed and it is over. Not when the last decision was a hold for another reason, which
    /// the next look would only repeat.
    fn goes_on(&self, now: Timestamp, look: &Look) -> bool {
        if self.plan.is_some() || self.rebalancing.course().is_none() || look.doubt.is_some() {
            return false;
        }
        let last = self.history.back().and_then(|decision| decision.hold.as_ref());
        let waits = last.is_none_or(|hold| {
            matches!(
                hold,
                Hold::BelowThreshold { .. } | Hold::ClientsInTransit { .. } | Hold::PlanInFlight { .. }
            )
        });
        let is_over = !look.signs.is_unfinished && !look.signs.is_landing;
        let is_above = look.balance.expected_skew > self.policy.skew_target;
        let enough = if look.signs.is_landing { plan::AGAIN } else { 1.0 };
        let has_room = is_above && look.balance.quota >= enough && self.ramp.limit(1, now).is_ok();
        // A dry run would go through all clients.
        let acts = !self.rehearses() && self.policy.weight.is_counted();
        waits && acts && (is_over || has_room)
    }

    /// Decides on a look, and begins what was decided.
    fn decided(&mut self, now: Timestamp, look: Look, effects: &mut Vec<Effect>) {
        self.next_decision = now + self.policy.interval;
        let growth = self.growth_at(&look, now);
        let (mut decision, rebalancing) = self.decide(now, look);
        if self.rebalancing.levelled(&rebalancing) && self.ramp.levelled(now) {
            self.memory_changes += 1;
        }
        self.rebalancing = rebalancing;
        self.growth = growth;
        decision.id = self.next_id();
        match &decision.hold {
            None => self.start(now, &mut decision),
            Some(Hold::AwaitsApproval { proposal, .. }) => {
                let course = self.rebalancing.course().map(|course| course.began);
                self.proposed = course.map(|course| Proposed { course, id: *proposal });
            }
            // A preview tells it; a log of every interval need not.
            Some(hold) if hold.is_level() => decision.heaviest.clear(),
            Some(_) => {}
        }
        debug_assert_eq!(decision.hold.is_none(), !decision.victims.is_empty());
        self.remember(decision.clone());
        effects.push(Effect::Record(decision));
    }

    /// Takes another roll; that somebody is gone is a decision, and the next one is without them.
    fn call(&mut self, now: Timestamp, roll: Roll, effects: &mut Vec<Effect>) {
        let changes = self.peers.call(roll);
        for apiserver in changes.gone {
            let (mut decision, _) = self.decide(now, self.still(now));
            decision.id = self.next_id();
            decision.generation = self.generation;
            decision.victims.clear();
            decision.outcomes = Outcomes::default();
            let hold = Hold::ApiserverGone { apiserver };
            decision.explanation = format!("nothing is done: {hold}");
            decision.hold = Some(hold);
            self.remember(decision.clone());
            effects.push(Effect::Record(decision));
        }
    }

    /// Follows the plan in flight, and closes it when it has settled: whether what it left over is to be decided at once.
    fn follow(&mut self, now: Timestamp, look: &Look, effects: &mut Vec<Effect>) -> bool {
        let Some(plan) = &self.plan else {
            return false;
        };
        let is_ordered = plan.is_ordered;
        let doubt = if is_ordered {
            self.order_doubt()
        } else {
            let stressed = || self.stressed(&look.view, &look.balance);
            look.doubt.clone().or_else(stressed)
        };
        if doubt.is_some() {
            // It came up while a plan was on its way: who has not been told is not told.
            self.drop_unsent();
        } else if !is_ordered {
            self.trim(look.balance.room);
        }
        self.settle(now, look, effects)
    }

    fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }

    fn remember(&mut self, decision: Decision) {
        self.history_victims += decision.victims.len();
        self.history.push_back(decision);
        // The newest is kept whatever it names: its outcomes are still to be written into it.
        while self.history.len() > HISTORY || self.history_victims > HISTORY_VICTIMS && self.history.len() > 1 {
            let oldest = self.history.pop_front();
            self.history_victims -= oldest.map_or(0, |oldest| oldest.victims.len());
        }
    }
}
