//! The guard: the first doubt there is before anything is decided.
//!
//! Input: the agent as it stands. Output: a [`Hold`], or nothing to hold it back.
//! Must never let a rebalancing begin on something unknown, and never change anything.

use std::time::Duration;

use super::Agent;
use crate::{hold::Hold, ids::Timestamp, view::ServerState};

impl Agent {
    /// The first doubt, if there is one.
    pub(super) fn guard(&self, now: Timestamp) -> Option<Hold> {
        if self.evacuation.is_some() {
            return Some(Hold::Evacuating {
                apiserver: self.policy.node.clone(),
            });
        }
        if let Some(pause) = &self.pause {
            return Some(Hold::Paused {
                reason: pause.reason.clone(),
                left: pause.until.map(|until| until.since(now)),
                by: None,
            });
        }
        if let Some(pause) = self.switch.pause() {
            return Some(Hold::Paused {
                reason: pause.reason.clone(),
                left: pause.until.map(|until| until.since(now)),
                by: self.switch.by().cloned(),
            });
        }
        if !self.table.is_trusted() {
            return Some(Hold::LostEvents {
                total: self.table.lost_events_total(),
            });
        }
        if let Some(why) = self.table.shared_port() {
            return Some(Hold::PortShared { why: why.to_owned() });
        }
        if let Some(measured) = self.unmeasured(now) {
            return Some(Hold::PeerUnknown {
                peer: self.policy.node.clone(),
                why: format!(
                    "what its own clients weigh is measured for {} s only, {} s are needed",
                    measured.as_secs(),
                    self.policy.weight.measured_after().as_secs()
                ),
            });
        }
        if let Some(why) = self.peers.doubt() {
            return Some(Hold::MembershipUnknown { why: why.to_owned() });
        }
        let connections = self.table.active() as u64;
        match self.state(now) {
            // One that is evacuated has its hold above.
            ServerState::Ready | ServerState::Evacuating => {}
            ServerState::Overloaded => {
                return Some(Hold::ApiserverOverloaded {
                    apiserver: self.policy.node.clone(),
                    connections,
                });
            }
            ServerState::Down => {
                return Some(Hold::ApiserverStarting {
                    apiserver: self.policy.node.clone(),
                    up: None,
                    connections,
                });
            }
            // Before what peers are held for: they are held for this.
            ServerState::Unknown if self.is_stalled(now) => {
                let why = self.shim_fault.clone();
                return Some(Hold::ShimUnavailable {
                    why: why.unwrap_or_else(|| "it did not answer until a moment ago".to_owned()),
                });
            }
            ServerState::Starting | ServerState::Unknown => {
                let up = self.up_since.map(|since| now.since(since));
                return Some(Hold::ApiserverStarting {
                    apiserver: self.policy.node.clone(),
                    up,
                    connections,
                });
            }
        }
        if let Some(hold) = self.peers.hold(self.policy.stale_after(), self.policy.settle, now) {
            return Some(hold);
        }
        if let Some(hold) = self.upgrade.hold(self.policy.upgrade_patience, now) {
            return Some(hold);
        }
        let why = self.shim_fault.clone()?;
        Some(Hold::ShimUnavailable { why })
    }

    /// For how long loads are measured, while that is not long enough to say anything.
    pub(super) fn unmeasured(&self, now: Timestamp) -> Option<Duration> {
        let needed = self.policy.weight.measured_after();
        let measured = self
            .table
            .sampled_since()
            .map_or(Duration::ZERO, |since| now.since(since));
        (measured < needed).then_some(measured)
    }
}
