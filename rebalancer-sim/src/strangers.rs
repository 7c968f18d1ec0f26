//! Connections that are no clients: health checks, short calls through the load balancer, kubelets' probes.
//!
//! Input: how many a second, and how long they last. Output: connections that open and end, whom nobody told. Must never count
//! as load while they are young.

use crate::{
    node::{Connection, Life, STRANGER},
    queue::Event,
    world::{World, millis},
};

impl World<'_> {
    /// Plans the next one of that kind.
    pub(crate) fn plan_call(&mut self, server: Option<usize>, rate: f64) {
        if rate > 0.0 {
            let together = self.setup.strangers.at_once;
            let wait = match server {
                None if together > 1 => f64::from(together) / rate,
                _ => self.random.wait(rate),
            };
            self.at(self.now + millis(wait), Event::Call(server));
        }
    }

    /// A connection that is no client's, and soon gone.
    pub(crate) fn call(&mut self, server: Option<usize>) {
        let strangers = self.setup.strangers;
        let (rate, together, (shortest, longest)) = match server {
            Some(_) => (strangers.probes, 1, (0.005, 0.05)),
            None => (strangers.calls, strangers.at_once, strangers.lasts),
        };
        self.plan_call(server, rate);
        for _ in 0..together {
            let life = self.random.uniform(shortest, longest);
            self.stranger(server, life);
        }
    }

    fn stranger(&mut self, server: Option<usize>, life: f64) {
        let backends = self.backends();
        let chosen = match server {
            Some(server) => backends[server].up.then_some(server),
            None => self
                .balancer
                // Each comes from another address.
                .pick(
                    STRANGER,
                    Some(self.connections.len()),
                    self.connections.len() as u64,
                    &backends,
                ),
        };
        let Some(at) = chosen else { return };
        let index = self.connections.len();
        self.open(Connection {
            client: STRANGER,
            node_local: server.is_some(),
            server: at,
            opened_at: self.now,
            life: Life::Active,
            watches: 0,
            requests: 0.0,
            counted_at: self.now,
            position: self.nodes[at].open.len(),
        });
        self.at(self.now + millis(life), Event::Close(index));
        self.news(at);
    }
}
