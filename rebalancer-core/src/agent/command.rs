//! What operators ask: pause, resume, tell these, approve that.
//!
//! Job: do it or say why not, with an answer that belongs to the question. Input: a [`Command`]. Output: an [`Answer`].
//! Must never let an order pass by the exclusions unless it says so, nor drop one silently.

use std::time::Duration;

use super::{Agent, Effect, evacuation};
use crate::{
    decision::{Fate, Outcomes, Victim},
    hold::Hold,
    ids::{ConnectionId, ShimKind, Timestamp},
    planner::{self, LeftOut},
    policy::Mode,
};

/// What an operator may ask.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Decide nothing until resumed.
    Pause {
        /// What for; it is shown to whoever asks why nothing happens. May be empty.
        reason: String,
        /// When it ends by itself; `None` for not before [`Command::Resume`].
        length: Option<Duration>,
    },
    /// Decide again.
    Resume,
    /// Have all agents decide nothing until resumed. Needs each peer to have been asked once, or an agent that was away
    /// would say something older than what the others have heard.
    PauseAll {
        /// What for. May be empty.
        reason: String,
        /// When it ends by itself.
        length: Option<Duration>,
    },
    /// Have all agents decide again.
    ResumeAll,
    /// Tell these connections, whatever the skew, paused or not; the budget's rate holds.
    Goaway {
        /// Which.
        connections: Vec<ConnectionId>,
        /// Whether the exclusions of the configuration do not count this time.
        force: bool,
        /// The time they are spread over; as fast as the budget allows without.
        over: Option<Duration>,
    },
    /// Tell everybody to go who can be told, in that time, and take no part until [`Command::Return`] or the apiserver's
    /// restart. Whatever the mode but a dry run, paused or not; no budget, exclusions or cool-downs hold.
    Evacuate(Duration),
    /// Take clients again.
    Return,
    /// The rebalancing of that proposal may begin.
    Approve(u64),
}

/// What an operator is answered.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// It is done.
    Done,
    /// An order is being carried out.
    Ordered {
        /// The decision that tells what becomes of each.
        decision: u64,
        /// Those who are not told, and why.
        left_out: Vec<(ConnectionId, LeftOut)>,
    },
    /// Nobody of those can be told.
    Nobody(Vec<(ConnectionId, LeftOut)>),
    /// Another plan is in flight: ask again when it has settled.
    Busy {
        /// Its decision.
        decision: u64,
    },
    /// Nothing can be sent now.
    Held(Hold),
    /// Peers may have heard a newer word to all than this agent: ask again when each has been asked.
    TooEarly,
    /// Nothing of that number waits for approval.
    NoSuchProposal {
        /// What does.
        waiting: Option<u64>,
    },
}

/// A pause that is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pause {
    /// What for.
    pub reason: String,
    /// When it ends by itself.
    pub until: Option<Timestamp>,
}

impl Agent {
    /// Ends a pause whose time is over.
    pub(super) fn end_pause(&mut self, now: Timestamp) {
        let is_over = |pause: &Pause| pause.until.is_some_and(|until| now >= until);
        if self.pause.as_ref().is_some_and(is_over) {
            self.pause = None;
            self.memory_changes += 1;
        }
        self.memory_changes += u64::from(self.switch.expire(now));
    }

    /// Takes a command, answers it, and says what is to be done.
    pub fn command(&mut self, now: Timestamp, command: Command) -> (Answer, Vec<Effect>) {
        let mut effects = Vec::new();
        let answer = self.commanded(now, command, &mut effects);
        self.turn(now, &mut effects);
        (answer, effects)
    }

    pub(super) fn commanded(&mut self, now: Timestamp, command: Command, effects: &mut Vec<Effect>) -> Answer {
        match command {
            Command::Pause { reason, length } => {
                self.pause = Some(Pause {
                    reason,
                    until: length.map(|length| now + length),
                });
                self.memory_changes += 1;
                Answer::Done
            }
            Command::Resume => {
                self.pause = None;
                self.memory_changes += 1;
                Answer::Done
            }
            Command::PauseAll { .. } | Command::ResumeAll if !self.peers.were_asked() => Answer::TooEarly,
            Command::PauseAll { reason, length } => {
                let until = length.map(|length| now + length);
                self.switch
                    .turn(self.policy.node.clone(), Some(Pause { reason, until }));
                self.memory_changes += 1;
                Answer::Done
            }
            Command::ResumeAll => {
                self.switch.turn(self.policy.node.clone(), None);
                self.memory_changes += 1;
                Answer::Done
            }
            Command::Evacuate(over) => match evacuation::refusal(self, now).filter(|_| !self.is_evacuating()) {
                Some(hold) => Answer::Held(hold),
                None => {
                    self.evacuate(now, over);
                    Answer::Done
                }
            },
            Command::Return => {
                self.end_evacuation(now);
                Answer::Done
            }
            Command::Goaway {
                connections,
                force,
                over,
            } => self.order(now, &connections, force, over, effects),
            Command::Approve(proposal) => match self.proposed {
                Some(proposed) if proposed.id == proposal && self.policy.mode == Mode::Propose => {
                    self.approved = Some(proposed.course);
                    self.next_decision = now;
                    Answer::Done
                }
                proposed => Answer::NoSuchProposal {
                    waiting: proposed.map(|proposed| proposed.id),
                },
            },
        }
    }

    /// What stands against an order: only that it cannot be carried out, or that nobody knows who is there.
    pub(super) fn order_doubt(&self) -> Option<Hold> {
        if self.policy.shim == ShimKind::None {
            let why = "there is none (--shim none)".to_owned();
            return Some(Hold::ShimUnavailable { why });
        }
        if let Some(why) = self.shim_fault.clone() {
            return Some(Hold::ShimUnavailable { why });
        }
        if let Some(why) = self.table.shared_port() {
            return Some(Hold::PortShared { why: why.to_owned() });
        }
        (!self.table.is_trusted()).then(|| Hold::LostEvents {
            total: self.table.lost_events_total(),
        })
    }

    fn order(
        &mut self,
        now: Timestamp,
        ids: &[ConnectionId],
        force: bool,
        over: Option<Duration>,
        effects: &mut Vec<Effect>,
    ) -> Answer {
        if let Some(plan) = &self.plan {
            return Answer::Busy {
                decision: plan.decision,
            };
        }
        if let Some(hold) = self.order_doubt() {
            return Answer::Held(hold);
        }
        let mut victims: Vec<Victim> = Vec::new();
        let mut left_out = Vec::new();
        let mut wanted = ids.to_vec();
        wanted.sort_unstable();
        wanted.dedup();
        for id in wanted {
            let connection = self.table.connection(id);
            match planner::left_out(connection, &self.policy, force) {
                Ok(connection) => victims.push(Victim {
                    connection: id,
                    client: connection.client(),
                    user: connection.user().map(str::to_owned),
                    user_agent: connection.user_agent().map(str::to_owned),
                    load: connection.load(self.policy.weight),
                    age: now.since(connection.opened_at),
                    why: "an operator asked for it".to_owned(),
                    fate: Fate::Pending,
                }),
                Err(why) => left_out.push((id, why)),
            }
        }
        if victims.is_empty() {
            return Answer::Nobody(left_out);
        }
        let mut explanation = format!("telling {}: an operator asked for it", victims.len());
        if !left_out.is_empty() {
            explanation += &format!("; {} left out", left_out.len());
        }
        let decision = self.carry_out(now, victims, explanation, over, effects);
        Answer::Ordered { decision, left_out }
    }

    /// Begins the plan of an order, spread over that time if one is given; the id of its decision.
    pub(super) fn carry_out(
        &mut self,
        now: Timestamp,
        victims: Vec<Victim>,
        explanation: String,
        over: Option<Duration>,
        effects: &mut Vec<Effect>,
    ) -> u64 {
        let (mut decision, _) = self.decide(now, self.still(now));
        decision.id = self.next_id();
        decision.hold = None;
        decision.explanation = explanation;
        decision.outcomes = Outcomes {
            pending: victims.len() as u64,
            ..Outcomes::default()
        };
        decision.victims = victims;
        self.start(now, &mut decision);
        if let Some(plan) = &mut self.plan {
            plan.is_ordered = true;
            if let Some(over) = over {
                plan.spread_over(over, self.abilities.order_expiry, now);
            }
        }
        let id = decision.id;
        self.remember(decision.clone());
        effects.push(Effect::Record(decision));
        id
    }

    /// The number by which an operator approves a course: that of the decision that first proposed it.
    pub(super) fn proposal_of(&self, course: Timestamp) -> u64 {
        match self.proposed {
            Some(proposed) if proposed.course == course => proposed.id,
            _ => self.next_id,
        }
    }
}
