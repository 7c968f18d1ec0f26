//! What a load balancer is told of this apiserver: whether to send anybody, and how many.
//!
//! Job: shares of new connections that fill the emptiest first. Input: the agent's state and `now`. Output: [`Advice`].
//! Must never take an apiserver out for what is not known: in doubt everybody gets an equal share.

use std::time::Duration;

use super::Agent;
use crate::{
    ids::Timestamp,
    planner::{self, Server},
    view::ServerState,
};

/// For so long after an evacuation, and after the agent's start, a load balancer that was told to send nobody is told that
/// this is over. Not for ever: the word would end what an administrator said to the load balancer itself.
const RETURNING: Duration = Duration::from_secs(300);

/// Everybody gets so much of its part beside what it needs, and a connection at the least: new clients of the moment between
/// two looks. Without that one the first client of a cluster would keep all others from its apiserver, while they come.
const BESIDE: f64 = 0.01;

/// What a load balancer is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advice {
    /// Nobody is to be sent here: it is evacuated.
    pub drains: bool,
    /// An evacuation may have ended a short while ago, or no other apiserver takes anybody.
    pub returns: bool,
    /// Nobody listens here, or what is behind the shim does not answer.
    pub is_down: bool,
    /// The share of new connections, of what the load balancer is configured to send: 1 to 100.
    pub percent: u8,
}

impl Default for Advice {
    fn default() -> Self {
        Self {
            drains: false,
            returns: false,
            is_down: false,
            percent: FULL,
        }
    }
}

const FULL: u8 = 100;

impl Agent {
    /// What a load balancer is told now.
    pub fn advice(&self, now: Timestamp) -> Advice {
        let state = self.state(now);
        // Better an apiserver that is to have nobody than none at all: but only where the others are known to take nobody.
        // An agent that has not heard of them yet says what was said before it began.
        let drains = self.evacuation.is_some() && self.refuge(now) != Some(false);
        // A process that began a while ago does not know all that one before it said: a file may be lost, with the machine or
        // without.
        let since = self.returned.map_or(self.started, |at| at.max(self.started));
        let returned = now.since(since) < RETURNING;
        Advice {
            drains,
            returns: !drains && (returned || self.evacuation.is_some()),
            // One that is overloaded takes new clients again when it answers in time. Those it has stay.
            is_down: match state {
                ServerState::Down => true,
                ServerState::Overloaded => self.upstream_ready == Some(false),
                _ => false,
            },
            percent: if state == ServerState::Ready {
                self.share(now)
            } else {
                FULL
            },
        }
    }

    fn share(&self, now: Timestamp) -> u8 {
        let is_in_doubt = self.is_paused()
            || self
                .peers
                .hold(self.policy.stale_after(), Duration::ZERO, now)
                .is_some();
        if is_in_doubt {
            return FULL;
        }
        let view = self.peers.view(self.snapshot(now), now);
        let transit = self.motion.transit(self.policy.weight);
        let balance = planner::balance(&view, &self.policy, &self.rho, &self.spread, transit);
        let own = balance
            .servers
            .iter()
            .position(|server| server.name == self.policy.node);
        own.map_or(FULL, |own| {
            percent(&balance.servers, own, self.policy.skew_target, balance.per_connection)
        })
    }
}

/// The part of one of them: what it may have and has not, beside what has most of that.
fn percent(servers: &[Server], own: usize, skew_target: f64, per_connection: f64) -> u8 {
    let total: f64 = servers.iter().map(|server| server.load).sum();
    if servers.len() < 2 || total <= 0.0 {
        return FULL;
    }
    let needs = |server: &Server| {
        let fair = server.fair * total;
        ((1.0 + skew_target) * fair - server.load).max(0.0) + (BESIDE * fair).max(per_connection)
    };
    let most = servers.iter().map(needs).fold(0.0, f64::max);
    let share = (100.0 * needs(&servers[own]) / most).round();
    debug_assert!((0.0..=100.0).contains(&share), "{share} of {servers:?}");
    // 0 would take it out of the load balancer.
    share.clamp(1.0, 100.0) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::ApiserverName;

    fn percents(loads: &[(f64, f64)]) -> Vec<u8> {
        let capacity: f64 = loads.iter().map(|(_, capacity)| capacity).sum();
        let servers: Vec<Server> = loads
            .iter()
            .enumerate()
            .map(|(index, (load, size))| Server {
                name: ApiserverName::new(format!("n{index}")),
                load: *load,
                expected: *load,
                connections: *load as u64,
                fair: size / capacity,
                target: 0.0,
                acts: true,
            })
            .collect();
        (0..servers.len())
            .map(|own| percent(&servers, own, 0.03, 1.0))
            .collect()
    }

    #[test]
    fn who_is_emptiest_gets_the_new_ones() {
        for (loads, expected) in [
            (&[(0.0, 1.0), (0.0, 1.0)][..], &[100, 100][..]),
            (&[(100.0, 1.0), (100.0, 1.0), (100.0, 1.0)], &[100, 100, 100]),
            // By hand: 103 - 150 is nothing, and 1 beside it; 103 - 0, and 1.
            (&[(150.0, 1.0), (150.0, 1.0), (0.0, 1.0)], &[1, 1, 100]),
            (&[(150.0, 1.0), (100.0, 1.0), (50.0, 1.0)], &[2, 7, 100]),
            // The first client keeps nobody away.
            (&[(1.0, 1.0), (0.0, 1.0), (0.0, 1.0)], &[74, 100, 100]),
            // Level by their size: as many new ones as they are large.
            (&[(200.0, 2.0), (100.0, 1.0)], &[100, 50]),
        ] {
            assert_eq!(percents(loads), expected, "{loads:?}");
        }
    }
}
