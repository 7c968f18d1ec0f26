//! What an agent says of itself: to its peers, to operators, to metrics.
//!
//! Must never change anything.

use super::{Agent, Pause, Proposed, Switch};
use crate::{
    decision::{Decision, Outcomes},
    ids::{ShimKind, Timestamp},
    policy::Policy,
    shim::Abilities,
    table::ConnectionTable,
    view::{Part, Peers, Snapshot},
};

impl Agent {
    /// This apiserver's snapshot, as the peers get it.
    pub fn snapshot(&self, now: Timestamp) -> Snapshot {
        let names = self.peers.names().into_iter().collect();
        let part = self.part(now);
        let acts = part == Part::Acts;
        let is_ordered = self.plan.as_ref().is_some_and(|plan| plan.is_ordered);
        Snapshot {
            apiserver: self.policy.node.clone(),
            state: self.state(now),
            connections: self.table.active() as u64,
            load: self.table.load(self.policy.weight),
            unmovable: self.unmovable.load(),
            draining: self.table.draining() as u64,
            draining_streams: self.table.draining_streams(),
            goaways_total: self.goaways_total,
            told_load_total: self.told_load_total,
            left_total: self.table.left_total(),
            refused: self.stress.refused(self.policy.stale_after(), now),
            node_local: self.table.node_local() as u64,
            accepted_total: self.table.accepted_total(),
            departed_total: self.table.departed_total(),
            counts_after: self.table.counts_after(),
            in_transit: self.motion.in_transit(),
            capacity: self.policy.capacity,
            part,
            // Nobody waits for what is not done.
            plan_in_flight: self.plan.is_some() && (acts || is_ordered),
            rebalancing: self.rebalancing.course().is_some() && acts,
            instance: self.instance,
            names,
            release: self.release.clone(),
            restarts: self.restarts,
            switch: self.switch.told(now),
        }
    }

    /// What would be decided now, without doing it.
    pub fn preview(&self, now: Timestamp) -> Decision {
        self.decide(now, self.still(now)).0
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
        self.pause.is_some() || self.switch.pause().is_some()
    }

    /// What was said to all agents, as the others are told.
    pub fn switch(&self, now: Timestamp) -> Switch {
        self.switch.told(now)
    }

    /// The pause that is on.
    pub fn pause(&self) -> Option<&Pause> {
        self.pause.as_ref()
    }

    /// What waits for an operator's approval.
    pub fn proposal(&self) -> Option<u64> {
        let course = self.rebalancing.course()?.began;
        let waits = |proposed: &Proposed| proposed.course == course && self.approved != Some(course);
        self.proposed.filter(waits).map(|proposed| proposed.id)
    }

    /// GOAWAYs a second that the budget allows now.
    pub fn goaway_rate(&self) -> f64 {
        self.bucket.rate()
    }

    /// Why the shim cannot be used, when it cannot; there is no fault without a shim.
    pub fn shim_fault(&self) -> Option<&str> {
        self.shim_fault.as_deref()
    }

    /// What its shim can do; there is none without a shim.
    pub fn abilities(&self) -> Option<Abilities> {
        (self.policy.shim != ShimKind::None).then_some(self.abilities)
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

    /// When the agent started.
    pub fn started(&self) -> Timestamp {
        self.started
    }
}
