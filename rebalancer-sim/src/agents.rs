//! The agents of a simulated cluster: the core itself, told the virtual time.
//!
//! Input: what the world shows them and what their peers say. Output: GOAWAYs, carried out at once as by a relay.
//! Must never change what the core decides.
//!
//! Agents hear each other twice a second while a plan or a client is under way and once an interval otherwise: nothing
//! changes between.

use std::{collections::BTreeSet, time::Duration};

use rebalancer_core::{
    agent::{Agent, Command, Effect, Input, Memory},
    decision::{Decision, Victim},
    ids::{ApiserverName, ConnectionId, ShimKind, Timestamp},
    planner,
    policy::{Mode, Policy, Weight},
    shim::{Abilities, GoawayResult},
    view::{PeerFault, Snapshot},
};

use crate::{
    node::{Life, index_of},
    queue::Event,
    setup::Role,
    world::{START, World, millis},
};

/// How long a batch of observations is gathered.
const BATCH: u64 = 200;

/// How often peers are asked while anything is under way.
const POLL: u64 = 500;

/// Explanations that are kept.
const EXPLANATIONS: usize = 8;

impl World<'_> {
    /// What an apiserver's agent takes for the time.
    pub(crate) fn clock(&self, server: usize) -> Timestamp {
        self.nodes[server].clock.at(self.now)
    }

    /// An agent ends and is started again at once, with what it wrote down.
    pub(crate) fn restart_agent(&mut self, server: usize) {
        let now = self.clock(server);
        let memory = self.nodes[server].agent.as_ref().map(|agent| agent.memory(now));
        self.start_agent_with(server, &memory.unwrap_or_default());
    }

    /// Starts an agent that knows nothing and hears the complete list.
    pub(crate) fn start_agent(&mut self, server: usize) {
        self.start_agent_with(server, &Memory::default());
    }

    fn start_agent_with(&mut self, server: usize, memory: &Memory) {
        self.plan_ended(server);
        self.nodes[server].hold = None;
        if !self.nodes[server].member {
            self.nodes[server].agent = None;
            return;
        }
        let peers: BTreeSet<ApiserverName> = self
            .nodes
            .iter()
            .enumerate()
            .filter(|(index, node)| *index != server && node.member)
            .map(|(_, node)| node.name.clone())
            .collect();
        let role = self.setup.roles.get(server).copied().unwrap_or(Role::Active);
        let policy = Policy {
            node: self.nodes[server].name.clone(),
            peers,
            shim: if role == Role::Shimless {
                ShimKind::None
            } else {
                ShimKind::Relay
            },
            mode: if role == Role::DryRun {
                Mode::DryRun
            } else {
                self.setup.policy.mode
            },
            ..self.setup.policy.clone()
        };
        self.instances += 1;
        // Agents are not in step; one that goes on where another ended begins now.
        let phase = if *memory == Memory::default() {
            self.random.below(self.setup.policy.interval.as_millis() as usize) as u64
        } else {
            0
        };
        if self.now > START {
            self.nodes[server].clock.restart(phase, self.now);
        }
        let now = self.clock(server);
        let start = now.back(Duration::from_millis(phase));
        let mut agent = Agent::with_memory(policy, self.instances, start, memory, Duration::ZERO);
        if role == Role::Paused {
            let pause = Command::Pause {
                reason: "a test".to_owned(),
                length: None,
            };
            agent.handle(start, Input::Command(pause));
        }
        self.nodes[server].agent = Some(agent);
        self.nodes[server].resync(&self.connections);
        self.flush(server);
        self.schedule(server, now);
        let wait = self.random.below(POLL as usize) as u64;
        self.poll_in(server, wait);
    }

    /// Plans to hand over what an agent has not heard yet.
    pub(crate) fn news(&mut self, server: usize) {
        if self.nodes[server].agent.is_some() && self.nodes[server].flush_at.is_none() && self.nodes[server].has_news()
        {
            self.nodes[server].flush_at = Some(self.now + BATCH);
            self.at(self.now + BATCH, Event::Flush(server));
        }
    }

    pub(crate) fn flush(&mut self, server: usize) {
        self.nodes[server].flush_at = None;
        if self.now < self.nodes[server].frozen_until {
            return;
        }
        let identities = self.setup.identities.then_some(self.identities.as_slice());
        for input in self.nodes[server].news(&self.connections, identities, self.now) {
            self.tell(server, input);
        }
    }

    pub(crate) fn wake(&mut self, server: usize, wish: u64) {
        if self.nodes[server].wake.0 != wish || self.nodes[server].agent.is_none() {
            return;
        }
        let frozen = self.nodes[server].frozen_until;
        if self.now < frozen {
            self.at(frozen, Event::Wake(server, wish));
            return;
        }
        self.nodes[server].wake.1 = u64::MAX;
        self.flush(server);
        if self.setup.policy.weight != Weight::Connections && self.now >= self.nodes[server].count_at {
            self.nodes[server].count_at = self.now + self.setup.policy.interval.as_millis() as u64;
            self.count_requests(server);
            let counters = self.nodes[server].counters(&self.connections);
            self.tell(server, counters);
        }
        self.tell(server, Input::Tick);
    }

    fn poll_in(&mut self, server: usize, wait: u64) {
        self.nodes[server].poll += 1;
        let wish = self.nodes[server].poll;
        let wait = self.nodes[server].clock.takes(wait);
        self.at(self.now + wait, Event::Poll(server, wish));
    }

    pub(crate) fn poll(&mut self, server: usize, wish: u64) {
        if self.nodes[server].poll != wish || self.nodes[server].agent.is_none() {
            return;
        }
        let mut busy = false;
        for peer in 0..self.nodes.len() {
            let Some(agent) = &self.nodes[peer].agent else {
                continue;
            };
            busy |= !agent.is_idle();
            if peer == server || !self.nodes[peer].member {
                continue;
            }
            let name = self.nodes[peer].name.clone();
            let apart = self.partition.contains(&server) != self.partition.contains(&peer);
            let silent = self.now < self.nodes[peer].frozen_until;
            let answer = if apart || silent || (self.loss > 0.0 && self.random.chance(self.loss)) {
                Err(PeerFault::Unreachable("no answer".to_owned()))
            } else {
                let snapshot = agent.snapshot(self.clock(peer));
                busy |= snapshot.in_transit > 0 || snapshot.rebalancing;
                Ok(snapshot)
            };
            let delay = self.delay(server, peer);
            if delay > 0 {
                self.at(self.now + delay, Event::Answer(server, name, Box::new(answer)));
            } else {
                self.answered(server, name, answer);
            }
        }
        let wait = if busy || self.loss > 0.0 {
            POLL
        } else {
            self.setup.policy.interval.as_millis() as u64
        };
        self.poll_in(server, wait);
    }

    /// How long a snapshot takes from one to the other, in milliseconds.
    fn delay(&self, to: usize, from: usize) -> u64 {
        match self.delays.len() {
            0 => 0,
            regions => self.delays[from % regions][to % regions],
        }
    }

    pub(crate) fn answered(&mut self, server: usize, from: ApiserverName, answer: Result<Snapshot, PeerFault>) {
        if self.now >= self.nodes[server].frozen_until && self.nodes[server].agent.is_some() {
            self.tell(server, Input::Peer(from, answer));
        }
    }

    /// Whether no agent has a plan in flight or takes part in a rebalancing, and every agent knows it of the others: one
    /// that does not may still join.
    pub(crate) fn agents_are_done(&self) -> bool {
        let is_done = |(agent, now): (&Agent, Timestamp)| {
            let own = agent.snapshot(now);
            // Most are not done by themselves: a view is made for the others only.
            if own.plan_in_flight || own.rebalancing {
                return false;
            }
            let view = agent.peers().view(own, now);
            let limit = agent.policy().stale_after();
            let mut entries = view.entries.values();
            entries.all(|entry| !entry.snapshot.rebalancing || entry.age > limit)
        };
        let mut agents = self
            .nodes
            .iter()
            .filter_map(|node| Some((node.agent.as_ref()?, node.clock.at(self.now))));
        agents.all(is_done)
    }

    fn tell(&mut self, server: usize, input: Input) {
        let now = self.clock(server);
        let Some(agent) = &mut self.nodes[server].agent else {
            return;
        };
        for effect in agent.handle(now, input) {
            match effect {
                Effect::SendGoaway(order) => {
                    let results = order.victims.iter().map(|id| (*id, self.carry_out(*id))).collect();
                    self.tell(server, Input::GoawayAnswered(results));
                }
                Effect::Record(decision) => {
                    self.run.decisions += 1;
                    if let Some(hold) = &decision.hold {
                        *self.run.holds.entry(hold.reason()).or_default() += 1;
                        self.held(server, hold.reason());
                        continue;
                    }
                    self.run.plans += 1;
                    self.nodes[server].hold = None;
                    self.nodes[server].plan_due = Some(self.now + self.longest_plan(server, &decision));
                    if self.run.explanations.len() < EXPLANATIONS {
                        self.run
                            .explanations
                            .push(format!("{}: {}", decision.node, decision.explanation));
                    }
                    for peer in 0..self.nodes.len() {
                        let wait = self.random.below(POLL as usize) as u64;
                        self.poll_in(peer, wait);
                    }
                }
                Effect::Settled(_) => self.plan_ended(server),
                // The simulation tells every event.
                Effect::Confirm => {}
                Effect::Resync => {
                    self.nodes[server].resync(&self.connections);
                    self.news(server);
                }
            }
        }
        self.schedule(server, now);
    }

    /// How long a plan may take: twice what its pace makes of it, twice an order's life, then the settle time and a look.
    fn longest_plan(&self, server: usize, decision: &Decision) -> u64 {
        let Some(agent) = &self.nodes[server].agent else {
            return 0;
        };
        let cost = |victim: &Victim| {
            agent
                .table()
                .connection(victim.connection)
                .map_or(1.0, planner::cost_of)
        };
        let paced = decision.victims.iter().map(cost).sum::<f64>() / agent.goaway_rate();
        let policy = agent.policy();
        let waits = Abilities::default().order_expiry * 2 + policy.settle + policy.interval * 2;
        // By its own clock.
        self.nodes[server]
            .clock
            .takes(millis(2.0 * paced) + waits.as_millis() as u64)
    }

    /// A plan has ended, or its agent has.
    pub(crate) fn plan_ended(&mut self, server: usize) {
        let due = self.nodes[server].plan_due.take();
        self.run.overdue_plans += u64::from(due.is_some_and(|due| self.now > due));
    }

    fn held(&mut self, server: usize, reason: &'static str) {
        let since = match self.nodes[server].hold {
            Some((before, since)) if before == reason => since,
            _ => self.now,
        };
        self.nodes[server].hold = Some((reason, since));
        let seconds = (self.now - since) as f64 / 1000.0;
        let longest = self.run.longest_holds.entry(reason).or_default();
        *longest = longest.max(seconds);
    }

    fn carry_out(&mut self, id: ConnectionId) -> GoawayResult {
        match self.connections[index_of(id)].life {
            Life::Active => {
                self.goaway(index_of(id));
                GoawayResult::Sent
            }
            Life::Draining => GoawayResult::AlreadyDraining,
            Life::Closed => GoawayResult::Unknown,
        }
    }

    pub(crate) fn schedule(&mut self, server: usize, now: Timestamp) {
        let Some(agent) = &self.nodes[server].agent else {
            return;
        };
        let at = self.nodes[server].clock.when(agent.next_wakeup(now)).max(self.now);
        let (wish, planned) = self.nodes[server].wake;
        if at < planned {
            self.nodes[server].wake = (wish + 1, at);
            self.at(at, Event::Wake(server, wish + 1));
        }
    }
}
