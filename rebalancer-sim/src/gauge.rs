//! What is measured in a run: the skew, the balance, LIST work, requests, points of the picture.
//!
//! Input: the state of the world. Output: figures of the run.
//! Must never change where a client is.

use rebalancer_core::planner::noise;

use crate::{
    figures::Sample,
    node::{Life, Node, STRANGER},
    queue::Event,
    world::{START, World, millis},
};

/// LISTs that one apiserver works on at once, and the wait in seconds from which it refuses more.
const LIST_SEATS: f64 = 10.0;
const LIST_PATIENCE: f64 = 5.0;

impl World<'_> {
    /// Work that an apiserver takes on; returns the seconds of work that wait there now.
    pub(crate) fn work(&mut self, server: usize, seconds: f64) -> f64 {
        let (waiting, at) = self.nodes[server].lists;
        let done = (self.now - at.max(START)) as f64 / 1000.0 * LIST_SEATS;
        let waiting = (waiting - done).max(0.0) + seconds;
        self.nodes[server].lists = (waiting, self.now);
        self.run.worst_list_queue = self.run.worst_list_queue.max(waiting);
        waiting
    }

    /// A client lists everything, or is refused and tries again.
    pub(crate) fn list(&mut self, client: usize) {
        let seconds = self.groups[self.clients[client].group].list_seconds;
        let Some(home) = self.clients[client].home else {
            self.clients[client].relist = true;
            return;
        };
        let server = self.connections[home].server;
        if self.work(server, 0.0) > LIST_SEATS * LIST_PATIENCE {
            self.nodes[server].refused += 1;
            self.news(server);
            let wait = self.random.uniform(1.0, 2.0);
            self.at(self.now + millis(wait), Event::Relist(client));
        } else {
            self.work(server, seconds);
        }
    }

    /// Clients that list, those with the longest lists first.
    pub(crate) fn listers(&self) -> Vec<usize> {
        let seconds = |client: usize| self.groups[self.clients[client].group].list_seconds;
        let mut listers: Vec<usize> = (0..self.clients.len())
            .filter(|client| seconds(*client) > 0.0)
            .collect();
        listers.sort_by(|a, b| seconds(*b).total_cmp(&seconds(*a)));
        listers
    }

    /// Follows the skew of the fullest apiserver.
    pub(crate) fn measure(&mut self) {
        self.skew_area += self.skew * (self.now - self.skew_at) as f64;
        self.skew_at = self.now;
        let up = |server: &usize| self.nodes[*server].up && self.nodes[*server].member;
        let servers: Vec<usize> = (0..self.nodes.len()).filter(up).collect();
        let total: f64 = servers.iter().map(|server| self.loads[*server]).sum();
        let mean = total / servers.len().max(1) as f64;
        let fullest = servers
            .iter()
            .copied()
            .max_by(|a, b| self.loads[*a].total_cmp(&self.loads[*b]));
        self.skew = match fullest {
            Some(server) if mean > 0.0 => self.loads[server] / mean - 1.0,
            _ => 0.0,
        };
        // What chance makes is no swing.
        let floor = noise::floor(
            servers.len(),
            1.0 / servers.len().max(1) as f64,
            self.clients.len() as f64,
        );
        let band = floor.above.max(self.setup.policy.skew_threshold);
        for server in servers {
            let skew = if mean > 0.0 {
                self.loads[server] / mean - 1.0
            } else {
                0.0
            };
            if skew.abs() > band {
                let before = self.sides[server].replace(skew > 0.0);
                self.run.swings += u64::from(before.is_some_and(|above| above != (skew > 0.0)));
            }
        }
    }

    /// Balanced is: the fullest is within the target, with clients on their way counted where they were told to go; nobody
    /// is still looking for an apiserver; and no agent means to go on.
    pub(crate) fn check_balance(&mut self) {
        if self.balanced_at.is_some() || self.uncounted > 0 || self.skew > self.reachable() {
            return;
        }
        if self.nodes.iter().any(|node| node.member && !node.up) || !self.agents_are_done() {
            return;
        }
        self.balanced_at = Some(self.now);
        self.run.goaways = self.run.goaways_total - self.goaways_before;
    }

    /// The skew that counts as reached: the target and one client where each weighs the same, for nobody is told by halves and
    /// the last to land may push one over.
    fn reachable(&self) -> f64 {
        let up = self.nodes.iter().filter(|node| node.up && node.member).count().max(1);
        let mean = self.loads.iter().sum::<f64>() / up as f64;
        let one = if self.setup.policy.weight.is_counted() {
            1.0 / mean.max(1.0)
        } else {
            0.0
        };
        // The skew is a quotient: what is at the target exactly is not above it.
        self.setup.policy.skew_target + one + 1e-9
    }

    pub(crate) fn sample(&mut self) {
        let Some(every) = self.setup.sample else {
            return;
        };
        let draining = |node: &Node| node.open.len() - node.active;
        self.run.series.push(Sample {
            at: (self.now - START) as f64 / 1000.0,
            loads: self.loads.clone(),
            draining: self.nodes.iter().map(draining).collect(),
        });
        self.at(self.now + every.as_millis() as u64, Event::Sample);
    }

    /// Counts requests up to now on every connection of an apiserver.
    pub(crate) fn count_requests(&mut self, server: usize) {
        for position in 0..self.nodes[server].open.len() {
            let index = self.nodes[server].open[position];
            let connection = &mut self.connections[index];
            if connection.life == Life::Active && connection.client != STRANGER {
                let seconds = (self.now - connection.counted_at) as f64 / 1000.0;
                let mean = self.clients[connection.client].requests * seconds;
                connection.requests += self.random.poisson(mean) as f64;
                connection.counted_at = self.now;
            }
        }
    }
}
