//! Writing decisions down: the decision log, the process's log, and whoever listens.
//!
//! Input: the core's decisions. Must never let a full disk or a slow reader stop the agent.

use std::path::Path;

use rebalancer_core::decision::Decision;

use super::{decision_log::DecisionLog, handle::Clock, wire};

/// Where decisions are written.
pub struct Recorder {
    log: Option<DecisionLog>,
    last_hold: Option<&'static str>,
}

impl Recorder {
    /// Opens the decision log for appending, if one is wanted.
    ///
    /// # Errors
    ///
    /// Names the flag, the file and what the system says.
    pub fn open(path: Option<&Path>) -> anyhow::Result<Self> {
        Ok(Self {
            log: path.map(DecisionLog::open).transpose()?,
            last_hold: None,
        })
    }

    /// Opens the decision log's file again: somebody has moved it.
    pub fn reopen(&self) {
        if let Some(log) = &self.log {
            log.reopen();
        }
    }

    /// Lines of the decision log that were written, and that were dropped.
    pub fn counts(&self) -> (u64, u64) {
        self.log.as_ref().map_or((0, 0), DecisionLog::counts)
    }

    /// A decision was made.
    pub fn record(&mut self, decision: &Decision, clock: &Clock) {
        match &decision.hold {
            None => {
                self.last_hold = None;
                tracing::info!(
                    id = decision.id,
                    generation = decision.generation,
                    mode = wire::mode_name(decision.mode),
                    victims = decision.victims.len(),
                    "{}",
                    decision.explanation
                );
            }
            // The same reason again is in the decision log, not here.
            Some(hold) if self.last_hold == Some(hold.reason()) => {
                tracing::debug!(id = decision.id, reason = hold.reason(), "{hold}");
            }
            Some(hold) => {
                self.last_hold = Some(hold.reason());
                tracing::info!(id = decision.id, reason = hold.reason(), "hold: {hold}");
            }
        }
        self.append(decision, clock);
    }

    /// The outcomes of an earlier decision are known: it is written again, with the same id.
    pub fn settled(&mut self, decision: &Decision, clock: &Clock) {
        tracing::info!(
            id = decision.id,
            generation = decision.generation,
            moved = decision.outcomes.moved,
            returned = decision.outcomes.returned,
            lost = decision.outcomes.lost,
            "the plan has settled"
        );
        self.append(decision, clock);
    }

    fn append(&mut self, decision: &Decision, clock: &Clock) {
        if let Some(log) = &mut self.log {
            log.append(wire::decision(decision, clock).to_string());
        }
    }
}
