//! What an agent's process hands to the next: what a restart must not forget.
//!
//! Job: the values, with times that are left and not instants: two processes have two clocks.
//! Input and output: none; an agent gives them and begins with them, the shell writes and reads them.
//! Must never hold what a look at the cluster tells again: loads, peers, connections.

use std::{collections::BTreeMap, time::Duration};

use super::{
    Agent, RememberedEvacuation, Switch,
    motion::{Motion, Totals},
    plan::Plan,
    ramp::Ramp,
    switch::Kept,
};
use crate::{
    ids::{ApiserverName, ConnectionId, Timestamp},
    planner::Resting,
    policy::Policy,
};

/// Decision ids are written down in steps of so many, so that not every decision is a write.
const STEP: u64 = 1_000;

/// So many draining connections are remembered; of the others a restart takes those for active ones of which no shim says that
/// they drain.
const DRAINING: usize = 65_536;

/// What is remembered.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Memory {
    /// The pause that is on.
    pub pause: Option<RememberedPause>,
    /// What was said to all agents.
    pub switch: Switch,
    /// The evacuation that is on.
    pub evacuation: Option<RememberedEvacuation>,
    /// Clients in their cool-down.
    pub cooldowns: Vec<Resting>,
    /// What was tried in vain.
    pub tries: RememberedTries,
    /// The apiservers that it was tried on; empty where nobody knows.
    pub ready: Vec<ApiserverName>,
    /// The next decision's id; none that was given is higher.
    pub next_decision: u64,
    /// Clients in transit.
    pub transit: RememberedTransit,
    /// Clients that come and go anyway.
    pub strangers: RememberedStrangers,
    /// Connections that drain. Who serves now may not know it: a relay that has handed over has them, or a probe told them.
    pub draining: Vec<ConnectionId>,
}

/// A pause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RememberedPause {
    /// What for.
    pub reason: String,
    /// How long yet; `None` until an operator ends it.
    pub left: Option<Duration>,
}

/// What plans found out of the load balancer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RememberedTries {
    /// The last wait.
    pub wait: Duration,
    /// What is left of it.
    pub left: Duration,
    /// Clients told in vain.
    pub in_vain: u64,
    /// As many as the next plan might have had; 0 where it would have been a probe.
    pub limit: usize,
    /// How long ago the set of apiservers last changed; `None` where nobody knows.
    pub changed: Option<Duration>,
    /// How long ago somebody first landed elsewhere.
    pub admitted: Option<Duration>,
    /// Whether all who landed did so elsewhere, once since then.
    pub takes_all: bool,
    /// Whether an apiserver seemed to start slowly.
    pub is_slow: bool,
}

/// Clients that were told, all apiservers together, until all of them have landed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RememberedTransit {
    /// How many were told.
    pub told: u64,
    /// How many of them landed.
    pub landed: u64,
    /// What those who were told weighed, in the unit of the weight.
    pub told_load: f64,
    /// The totals of each apiserver that were seen last: what has landed since is landings still.
    pub seen: Vec<(ApiserverName, Totals)>,
}

/// How many clients came and went, whom nobody had told, a second and by apiserver, in the last windows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RememberedStrangers {
    /// Those who left.
    pub departures: Vec<BTreeMap<ApiserverName, f64>>,
    /// Those who came while nobody was told.
    pub landings: Vec<BTreeMap<ApiserverName, f64>>,
}

impl Agent {
    /// An agent that goes on where another process ended, `down` before now.
    pub fn with_memory(policy: Policy, instance: u64, now: Timestamp, memory: &Memory, down: Duration) -> Self {
        let mut agent = Self::new(policy, instance, now);
        let still = |left: Duration| left.saturating_sub(down);
        if let Some(RememberedPause { reason, left }) = &memory.pause
            && left.is_none_or(|left| left > down)
        {
            agent.pause = Some(super::Pause {
                reason: reason.clone(),
                until: left.map(|left| now + still(left)),
            });
        }
        agent.switch = Kept::of(&memory.switch, down, now);
        if let Some(evacuation) = &memory.evacuation {
            agent.resume_evacuation(evacuation, down, now);
        }
        let longest = agent.policy.client_cooldown;
        for resting in memory.cooldowns.iter().filter(|resting| resting.left > down) {
            let left = still(resting.left).min(longest);
            agent.cooldowns.resume(
                &Resting {
                    left,
                    ..resting.clone()
                },
                now,
            );
        }
        agent.ramp = Ramp::resumed(&memory.tries, down, now);
        agent.tried_on.clone_from(&memory.ready);
        agent.table.drained_before(&memory.draining);
        agent.next_id = memory.next_decision.max(1);
        let transit = &memory.transit;
        // Who was told so long ago has landed or is gone.
        if transit.told > transit.landed && down < agent.policy.client_cooldown {
            agent.motion = Motion::resumed(transit, down, now);
        }
        agent.motion.resume_strangers(&memory.strangers);
        agent
    }

    /// What the next process is to know.
    pub fn memory(&self, now: Timestamp) -> Memory {
        Memory {
            pause: self.pause.as_ref().map(|pause| RememberedPause {
                reason: pause.reason.clone(),
                left: pause.until.map(|until| until.since(now)),
            }),
            switch: self.switch.told(now),
            evacuation: self.remembered_evacuation(now),
            cooldowns: self.cooldowns.resting(now),
            tries: self.ramp.remembered(self.plan.as_ref().map_or(0, Plan::probed), now),
            ready: self.tried_on.clone(),
            draining: self.table.drains().rev().take(DRAINING).collect(),
            next_decision: self.next_id.next_multiple_of(STEP) + 1,
            transit: self.motion.remembered(),
            strangers: self.motion.remembered_strangers(),
        }
    }

    /// Another number each time the memory has changed in a way that is worth a write; not because time passed.
    pub fn memory_version(&self) -> u64 {
        // Both only grow: two changes never come to the number of none.
        self.memory_changes + self.next_id.next_multiple_of(STEP)
    }
}
