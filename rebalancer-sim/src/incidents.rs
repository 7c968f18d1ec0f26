//! What happens to a simulated cluster.
//!
//! Input: an incident. Output: broken connections, new clients, agents that start anew.
//! Must never touch an agent's decisions: an incident reaches it as it would in a real cluster.

use std::time::Duration;

use crate::{node::Life, setup::Incident, world::World};

impl World<'_> {
    pub(crate) fn incident(&mut self, incident: &Incident) {
        match incident {
            Incident::Crash(server) => self.crash(*server),
            Incident::Start(server) => {
                self.nodes[*server].up = true;
                self.nodes[*server].listener += 1;
                self.nodes[*server].up_at = self.now;
                self.nodes[*server].resync(&self.connections);
                self.news(*server);
                self.measure();
            }
            Incident::Members(members) => {
                for server in 0..self.nodes.len() {
                    let member = members.contains(&server);
                    let was = std::mem::replace(&mut self.nodes[server].member, member);
                    if was && !member {
                        self.crash(server);
                    }
                    if !was && member {
                        self.nodes[server].up = true;
                        self.nodes[server].up_at = self.now;
                    }
                }
                if self.contender == crate::setup::Contender::Rebalancer {
                    // With other flags, and what they know.
                    for server in 0..self.nodes.len() {
                        self.restart_agent(server);
                    }
                }
                self.measure();
            }
            Incident::Arrive(group) => {
                let first = self.admit(group.clone());
                for client in first..first + group.count {
                    let wait = self.random.uniform(0.0, 1.0);
                    self.connect_in(client, wait);
                }
            }
            Incident::ListFlood(count) => {
                for client in self.listers().into_iter().take(*count) {
                    self.break_client(client);
                }
            }
            Incident::Balancer(kind) => self.balancer.become_kind(*kind),
            Incident::SnapshotLoss(share) => self.loss = *share,
            Incident::SnapshotDelay(delay) => self.delays = vec![vec![delay.as_millis() as u64]],
            Incident::RegionDelays(delays) => {
                let in_millis = |row: &Vec<Duration>| row.iter().map(|delay| delay.as_millis() as u64).collect();
                self.delays = delays.iter().map(in_millis).collect();
            }
            Incident::Partition(side) => self.partition.clone_from(side),
            Incident::Install(server) => self.nodes[*server].release += 1,
            Incident::RestartAgent(server) => self.restart_agent(*server),
            Incident::ReplaceRelay(server) => self.replace_relay(*server),
            Incident::Slew(server, ppm) => {
                self.nodes[*server].clock.slew(*ppm, self.now);
                // What it wakes for is at another instant now.
                self.nodes[*server].wake.1 = u64::MAX;
                let now = self.clock(*server);
                self.schedule(*server, now);
            }
            Incident::Freeze(server, length) => {
                let length = length.as_millis() as u64;
                self.nodes[*server].frozen_until = self.now + length;
                if let Some(due) = &mut self.nodes[*server].plan_due {
                    *due += length;
                }
            }
        }
    }

    /// The old relay tells everybody to go and keeps what drains; the new one has what comes from now on.
    fn replace_relay(&mut self, server: usize) {
        let from = self.connections.len();
        for index in self.nodes[server].open.clone() {
            if self.connections[index].life == Life::Active {
                self.take_leave(index);
            }
        }
        self.nodes[server].new_relay(from);
        self.news(server);
        self.measure();
    }

    /// All connections of an apiserver break at once.
    fn crash(&mut self, server: usize) {
        self.nodes[server].up = false;
        for index in self.nodes[server].open.clone() {
            self.break_connection(index);
        }
        self.nodes[server].resync(&self.connections);
        self.news(server);
        self.measure();
    }
}
