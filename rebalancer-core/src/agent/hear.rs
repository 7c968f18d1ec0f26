//! What the agent is told: by its source, by its shim, and by peers in the name of an operator.
//!
//! Input: observations, a shim's report, a word to all. Output: the table and what is known of the apiserver.
//! Must never take a slow apiserver for another one, nor its own socket for the apiserver's.

use super::{Agent, Effect, Stall, Switch};
use crate::{
    ids::{ApiserverName, ShimKind, Timestamp},
    observation::Observation,
    shim::ShimReport,
};

impl Agent {
    /// Takes in what the source saw.
    pub(super) fn observe(&mut self, now: Timestamp, observations: Vec<Observation>, effects: &mut Vec<Effect>) {
        let mut listed = false;
        for observation in observations {
            listed |= matches!(observation, Observation::Listed { .. });
            let changes = self.table.observe(observation, now);
            if changes.listener_changed {
                self.up_since = Some(now);
                // A relay's own socket says nothing of the apiserver behind it.
                self.restarts += u64::from(self.policy.shim != ShimKind::Relay);
            }
            if changes.lost && !effects.contains(&Effect::Resync) {
                effects.push(Effect::Resync);
            }
        }
        // Also with the first list of this process: another may have begun what ended meanwhile.
        self.listener_is(now);
        if listed && self.table.is_in_doubt() {
            effects.push(Effect::Confirm);
        }
    }

    /// Takes in what the shim says of itself and of the apiserver.
    pub(super) fn shim_answered(&mut self, now: Timestamp, report: &ShimReport) {
        if self.stall == Stall::Lasts {
            self.stall = Stall::Over(now);
        }
        self.shim_fault = None;
        self.abilities = report.abilities;
        // One that is slow, or not ready for a while, is still the one it was.
        let listeners = self.upstream_listener.zip(report.upstream_listener);
        let is_another = listeners.is_some_and(|(before, now)| before != now);
        let is_new = is_another || !self.overload.lasts(now);
        if self.upstream_ready == Some(false) && report.upstream_ready == Some(true) && is_new {
            // The port was open a while before the server behind it was ready: clients come from now on.
            self.up_since = Some(now);
        }
        self.restarts += u64::from(is_another || report.upstream_gone && !self.upstream_gone);
        self.overload
            .hear(report.upstream_overloaded, is_another || report.upstream_gone, now);
        self.upstream_gone = report.upstream_gone;
        if report.release.is_some() {
            self.release.clone_from(&report.release);
        }
        self.upstream_ready = report.upstream_ready;
        self.upstream_is(report, now);
        self.upstream_listener = report.upstream_listener.or(self.upstream_listener);
        self.stress.hear(&report.instance, report.refused_total, now);
        // A restarted agent goes on above what the shim has seen, or it would be refused.
        self.generation = self.generation.max(report.generation);
        let left = self.table.left_total();
        self.table.report(report, now);
        self.memory_changes += u64::from(left != self.table.left_total());
    }

    /// What a peer says was said to all: whoever is at odds with it otherwise is paused with it all the same.
    pub(super) fn hear_word(&mut self, name: &ApiserverName, switch: &Switch, now: Timestamp) {
        if self.peers.may_speak(name) && self.switch.hear(switch, now) {
            self.memory_changes += 1;
        }
    }
}
