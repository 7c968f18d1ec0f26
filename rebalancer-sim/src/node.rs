//! One apiserver of a simulated cluster with its agent beside it, and what is on its way from one to the other.
//!
//! Input: connections that open, change and close. Output: the agent's inputs, as a source and a relay would give them.
//! Must never decide anything: the agent is the core's own.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use crate::clock::Clock;
use rebalancer_core::{
    agent::{Agent, Input},
    ids::{ApiserverName, ConnectionId, Protocol},
    observation::{Observation, Socket},
    release::Release,
    shim::{ConnectionState, Counters, ShimConnection, ShimReport},
};

/// One client connection.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Whose; [`STRANGER`] for one that is no client.
    pub client: usize,
    /// Whether it comes from the apiserver's own node.
    pub node_local: bool,
    /// At which apiserver.
    pub server: usize,
    /// Milliseconds.
    pub opened_at: u64,
    /// How far it is; closed ones stay in the list.
    pub life: Life,
    /// Watches open on it.
    pub watches: u32,
    /// Requests so far.
    pub requests: f64,
    /// When they were counted.
    pub counted_at: u64,
    /// Its index in its apiserver's list.
    pub position: usize,
}

/// A connection that is no client's.
pub const STRANGER: usize = usize::MAX;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// New requests come on it.
    Active,
    /// It heard a GOAWAY and holds watches.
    Draining,
    /// It is gone.
    Closed,
}

/// Who a client is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Its user.
    pub user: String,
    /// Its user agent.
    pub user_agent: String,
}

/// One apiserver and its agent.
#[derive(Debug)]
pub struct Node {
    /// Its name.
    pub name: ApiserverName,
    /// Whether it takes connections.
    pub up: bool,
    /// Whether it belongs to the cluster now.
    pub member: bool,
    /// Connections that are open, draining ones included.
    pub open: Vec<usize>,
    /// Those that are not draining.
    pub active: usize,
    /// What the clients on those weigh together.
    pub active_load: f64,
    /// Its agent, when the rebalancer runs.
    pub agent: Option<Agent>,
    /// Since when it is up, in milliseconds; 0 for since before the start.
    pub up_at: u64,
    /// Names the listening socket.
    pub listener: u64,
    /// Counts its releases.
    pub release: u32,
    /// What its agent takes for the time.
    pub clock: Clock,
    /// Until when the agent stands still.
    pub frozen_until: u64,
    /// The newest wake-up that counts, and for when it is.
    pub wake: (u64, u64),
    /// When a batch of observations is handed over.
    pub flush_at: Option<u64>,
    /// When requests are counted next.
    pub count_at: u64,
    /// The newest poll of the peers that counts.
    pub poll: u64,
    /// Until when the plan in flight must have ended, if there is one.
    pub plan_due: Option<u64>,
    /// The hold that was decided last, and since when no other.
    pub hold: Option<(&'static str, u64)>,
    /// Seconds of LIST work that wait, and as of when.
    pub lists: (f64, u64),
    /// Lists refused since the start.
    pub refused: u64,
    refused_told: u64,
    seen: Vec<Observation>,
    changed: Vec<usize>,
    closed: Vec<ConnectionId>,
    /// Whether the shim was heard since the agent started.
    greeted: bool,
    /// How many relays there were before this one, and the first connection that is this one's.
    relay: (u32, usize),
}

/// The cookie of a connection.
pub fn id_of(connection: usize) -> ConnectionId {
    ConnectionId(connection as u64 + 1)
}

/// The connection of a cookie.
pub fn index_of(id: ConnectionId) -> usize {
    id.0 as usize - 1
}

impl Node {
    /// An apiserver without connections.
    pub fn new(index: usize, clock: Clock) -> Self {
        Self {
            clock,
            name: ApiserverName::new(format!("cp-{}", index + 1)),
            up: true,
            member: true,
            open: Vec::new(),
            active: 0,
            active_load: 0.0,
            agent: None,
            up_at: 0,
            listener: 1,
            release: 1,
            frozen_until: 0,
            wake: (0, u64::MAX),
            flush_at: None,
            count_at: 0,
            poll: 0,
            plan_due: None,
            hold: None,
            lists: (0.0, 0),
            refused: 0,
            refused_told: 0,
            seen: Vec::new(),
            changed: Vec::new(),
            closed: Vec::new(),
            greeted: false,
            relay: (0, 0),
        }
    }

    /// Whether the agent has something to hear.
    pub fn has_news(&self) -> bool {
        !self.seen.is_empty()
            || !self.changed.is_empty()
            || !self.closed.is_empty()
            || !self.greeted
            || self.refused != self.refused_told
    }

    /// A connection was accepted.
    pub fn opened(&mut self, index: usize, connection: &Connection) {
        if self.agent.is_some() {
            self.seen.push(Observation::Opened(socket(index, connection)));
            self.seen.push(Observation::Classified {
                id: id_of(index),
                protocol: Protocol::H2Offered,
            });
            self.changed.push(index);
        }
    }

    /// A connection's figures changed.
    pub fn touched(&mut self, index: usize) {
        if self.agent.is_some() && self.changed.last() != Some(&index) {
            self.changed.push(index);
        }
    }

    /// A connection is gone.
    pub fn ended(&mut self, index: usize) {
        if self.agent.is_some() {
            self.seen.push(Observation::Closed {
                id: id_of(index),
                bytes_in: 0,
                bytes_out: 0,
            });
            self.closed.push(id_of(index));
        }
    }

    /// The kernel's complete list, as a source gives it when it starts and after an apiserver's death.
    pub fn resync(&mut self, connections: &[Connection]) {
        if self.agent.is_none() {
            return;
        }
        self.seen.clear();
        self.changed.clone_from(&self.open);
        self.greeted = false;
        let sockets = self.open.iter().map(|index| socket(*index, &connections[*index]));
        self.seen.push(Observation::Resync {
            sockets: sockets.collect(),
            listener: self.up.then_some(ConnectionId(u64::MAX - self.listener)),
        });
        let classified = self.open.iter().map(|index| Observation::Classified {
            id: id_of(*index),
            protocol: Protocol::H2Offered,
        });
        self.seen.extend(classified);
    }

    /// Another relay took over: connections before `from` are the old one's.
    pub fn new_relay(&mut self, from: usize) {
        self.relay = (self.relay.0 + 1, from);
        self.changed = self.open.iter().copied().filter(|index| *index >= from).collect();
        self.greeted = false;
    }

    fn release(&self) -> Option<Release> {
        Release::new(&format!("v1.{}.0", self.release)).filter(|_| self.up)
    }

    fn relay(&self) -> String {
        format!("relay-{}", self.relay.0)
    }

    /// What the agent has not heard yet, in the order in which it hears it.
    pub fn news(&mut self, connections: &[Connection], identities: Option<&[Identity]>, now: u64) -> Vec<Input> {
        let mut news = Vec::new();
        if !self.seen.is_empty() {
            news.push(Input::Observations(std::mem::take(&mut self.seen)));
        }
        let closed = std::mem::take(&mut self.closed);
        let changed = std::mem::take(&mut self.changed);
        if self.greeted && identities.is_none() && self.refused == self.refused_told {
            return news;
        }
        // How old they are and who drains is said in any case: an agent that starts anew learns it from nobody else.
        let is_first = !self.greeted;
        let is_told = |connection: &Connection| match connection.life {
            Life::Closed => false,
            Life::Draining => true,
            Life::Active => is_first || identities.is_some(),
        };
        let told = changed
            .iter()
            .filter(|index| **index >= self.relay.1 && is_told(&connections[**index]))
            .map(|index| {
                let connection = &connections[*index];
                // A relay is on the same node, and goes by the same clock.
                let age = self.clock.at(now).since(self.clock.at(connection.opened_at));
                shown(*index, connection, identities, age)
            });
        news.push(Input::Shim(ShimReport {
            instance: self.relay(),
            full: !self.greeted,
            connections: told.collect(),
            closed,
            upstream_ready: Some(self.up),
            upstream_gone: !self.up,
            release: self.release(),
            refused_total: Some(self.refused),
            ..ShimReport::default()
        }));
        self.refused_told = self.refused;
        self.greeted = true;
        news
    }

    /// Newer figures of every connection, as a relay gives them.
    pub fn counters(&self, connections: &[Connection]) -> Input {
        let counted = self
            .open
            .iter()
            .map(|index| (id_of(*index), counters(&connections[*index])));
        Input::Shim(ShimReport {
            instance: self.relay(),
            counters: counted.collect(),
            upstream_ready: Some(self.up),
            upstream_gone: !self.up,
            release: self.release(),
            ..ShimReport::default()
        })
    }
}

fn address(client: usize, port: usize) -> SocketAddr {
    let [_, b, c, d] = (client as u32).to_be_bytes();
    SocketAddr::new(
        IpAddr::V4(Ipv4Addr::new(10, 64 | (b & 0x3f), c, d)),
        (1_024 + port % 60_000) as u16,
    )
}

fn local(server: usize) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, server as u8)), 6443)
}

fn socket(index: usize, connection: &Connection) -> Socket {
    Socket {
        id: id_of(index),
        local: local(connection.server),
        remote: remote(index, connection),
        bytes_in: 0,
        bytes_out: 0,
        start: 0,
    }
}

fn counters(connection: &Connection) -> Counters {
    Counters {
        requests: connection.requests as u64,
        open_streams: connection.watches,
        open_watches: connection.watches,
        // 2 KiB a request, most of it the answer.
        bytes_in: connection.requests as u64 * 256,
        bytes_out: connection.requests as u64 * 1_792,
    }
}

fn remote(index: usize, connection: &Connection) -> SocketAddr {
    if connection.node_local {
        return SocketAddr::new(local(connection.server).ip(), (1_024 + index % 60_000) as u16);
    }
    // A stranger's address is nobody else's.
    address(connection.client.min(0x3f_ffff), index)
}

fn shown(index: usize, connection: &Connection, identities: Option<&[Identity]>, age: Duration) -> ShimConnection {
    let identity = identities.and_then(|identities| identities.get(connection.client));
    ShimConnection {
        id: id_of(index),
        client: remote(index, connection),
        local: local(connection.server),
        protocol: Protocol::H2Selected,
        can_be_told: true,
        state: match connection.life {
            Life::Active => ConnectionState::Active,
            Life::Draining | Life::Closed => ConnectionState::Draining,
        },
        age: Some(age),
        user: identity.map(|identity| identity.user.clone()),
        user_agent: identity.map(|identity| identity.user_agent.clone()),
        counters: counters(connection),
    }
}
