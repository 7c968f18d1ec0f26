//! The table of connections of the local apiserver.
//!
//! Job: fold what the source and the shim say into one picture.
//! Input: [`Observation`]s and [`ShimReport`]s, with `now`. Output: connections and totals.
//! Must never guess: a connection without a protocol stays [`Protocol::Unknown`], and after lost events the table
//! says that it is not to be trusted until the kernel's complete list came.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
};

use crate::{
    observation::{Observation, Socket},
    shim::{ConnectionState, Counters, ShimConnection, ShimReport},
    words::{ConnectionId, Protocol, Timestamp},
};

/// One live client connection.
#[derive(Clone, Debug, PartialEq)]
pub struct Connection {
    /// The client, or a proxying load balancer in front of it.
    pub client: SocketAddr,
    /// The address it was accepted on.
    pub local: SocketAddr,
    /// What it speaks.
    pub protocol: Protocol,
    /// How far it is.
    pub state: ConnectionState,
    /// When it was first seen.
    pub opened_at: Timestamp,
    /// Whether `opened_at` is when the agent started to look, so that the connection is older than that.
    pub seeded: bool,
    /// The user, where the shim sees it.
    pub user: Option<String>,
    /// The user agent, where the shim sees it.
    pub user_agent: Option<String>,
    /// Figures since it was opened.
    pub counters: Counters,
    /// Figures a second, smoothed (see [`ConnectionTable::sample`]).
    pub rates: Rates,
    sampled: Option<(Timestamp, Counters)>,
}

impl Connection {
    /// Whether the client is on this node: it would come straight back.
    pub fn is_node_local(&self) -> bool {
        self.client.ip() == self.local.ip()
    }

    /// Whether it counts as load: not HTTP/1.1, which cannot be moved, and not draining, which has moved.
    pub fn is_active(&self) -> bool {
        self.state == ConnectionState::Active && self.protocol != Protocol::Http1
    }

    /// Who the client is, as far as is known.
    pub fn client_key(&self) -> ClientKey {
        match &self.user {
            Some(user) => ClientKey::User(user.clone(), self.user_agent.clone().unwrap_or_default()),
            None => ClientKey::Address(self.client),
        }
    }
}

/// Names a client across its connections.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ClientKey {
    /// User and user agent, told by the shim.
    User(String, String),
    /// Without a user: the address with its port, that is this one connection.
    ///
    /// The address alone would not do: behind a proxying load balancer it is the balancer's, and everyone's.
    Address(SocketAddr),
}

/// Figures a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// Requests a second.
    pub requests: f64,
    /// Bytes a second, both directions.
    pub bytes: f64,
}

/// How fast smoothed rates follow: the time in which an old rate loses 63 % of its weight.
const SMOOTHING_SECONDS: f64 = 30.0;

/// All live client connections of the local apiserver.
#[derive(Clone, Debug, Default)]
pub struct ConnectionTable {
    connections: BTreeMap<ConnectionId, Connection>,
    accepted_total: u64,
    /// What a shim said of connections that the source has not shown yet.
    early: HashMap<ConnectionId, ShimConnection>,
    listener: Option<ConnectionId>,
    listener_known: bool,
    trusted: bool,
    lost_events_total: u64,
}

/// What changed in a way the agent must know at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The listening socket is another one: another server process, or none, or one again.
    pub listener_changed: bool,
    /// Events were lost: ask for a resync.
    pub lost: bool,
}

impl ConnectionTable {
    /// Folds in what the source says.
    pub fn observe(&mut self, observation: Observation, now: Timestamp) -> Changes {
        let mut changes = Changes::default();
        match observation {
            Observation::Opened(socket) => self.open(&socket, now, false),
            Observation::Classified { id, protocol } => self.classify(id, protocol),
            Observation::Closed { id, .. } => {
                self.connections.remove(&id);
            }
            Observation::Counters(counters) => {
                for (id, bytes_in, bytes_out) in counters {
                    if let Some(connection) = self.connections.get_mut(&id) {
                        connection.counters.bytes_in = connection.counters.bytes_in.max(bytes_in);
                        connection.counters.bytes_out = connection.counters.bytes_out.max(bytes_out);
                    }
                }
            }
            Observation::Lost { events } => {
                self.lost_events_total += events;
                self.trusted = false;
                changes.lost = true;
            }
            Observation::Resync { sockets, listener } => {
                changes.listener_changed = self.resync(sockets, listener, now);
            }
        }
        changes
    }

    /// Folds in what the shim says. A connection that the source has not shown yet is not counted, for the kernel is the
    /// truth; what the shim said of it is kept until the source shows it, for the shim says it once.
    pub fn report(&mut self, report: &ShimReport) {
        if report.full {
            self.early.clear();
        }
        for id in &report.closed {
            self.early.remove(id);
        }
        for known in &report.connections {
            self.refine(known);
        }
        for (id, counters) in &report.counters {
            if let Some(connection) = self.connections.get_mut(id) {
                connection.counters = *counters;
            }
        }
    }

    /// Marks a connection that heard its GOAWAY.
    pub fn mark_draining(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.state = ConnectionState::Draining;
        }
    }

    /// Takes a sample of every connection's figures, from which the smoothed rates follow.
    ///
    /// An exponential mean with a time constant of 30 s; the first sample sets the base only.
    pub fn sample(&mut self, now: Timestamp) {
        for connection in self.connections.values_mut() {
            let Counters {
                requests,
                bytes_in,
                bytes_out,
                ..
            } = connection.counters;
            if let Some((at, before)) = connection.sampled {
                let seconds = now.since(at).as_secs_f64();
                if seconds <= 0.0 {
                    continue;
                }
                let keep = (-seconds / SMOOTHING_SECONDS).exp();
                let per_second = |new: u64, old: u64| new.saturating_sub(old) as f64 / seconds;
                let bytes = per_second(bytes_in + bytes_out, before.bytes_in + before.bytes_out);
                connection.rates.requests =
                    keep * connection.rates.requests + (1.0 - keep) * per_second(requests, before.requests);
                connection.rates.bytes = keep * connection.rates.bytes + (1.0 - keep) * bytes;
            }
            connection.sampled = Some((now, connection.counters));
        }
    }

    /// All connections, by id.
    pub fn iter(&self) -> impl Iterator<Item = (ConnectionId, &Connection)> {
        self.connections.iter().map(|(id, connection)| (*id, connection))
    }

    /// One connection.
    pub fn connection(&self, id: ConnectionId) -> Option<&Connection> {
        self.connections.get(&id)
    }

    /// How many connections count as load.
    pub fn active(&self) -> usize {
        self.connections
            .values()
            .filter(|connection| connection.is_active())
            .count()
    }

    /// How many are draining.
    pub fn draining(&self) -> usize {
        self.connections
            .values()
            .filter(|connection| connection.state == ConnectionState::Draining)
            .count()
    }

    /// HTTP/2 connections accepted since the agent started.
    pub fn accepted_total(&self) -> u64 {
        self.accepted_total
    }

    /// Kernel events that were lost since the agent started.
    pub fn lost_events_total(&self) -> u64 {
        self.lost_events_total
    }

    /// Whether the table is the kernel's truth: seeded, and no events lost since.
    pub fn is_trusted(&self) -> bool {
        self.trusted
    }

    /// Whether someone listens on the port.
    pub fn is_listening(&self) -> bool {
        self.listener.is_some()
    }

    fn open(&mut self, socket: &Socket, now: Timestamp, seeded: bool) {
        if socket.remote.ip().is_loopback() {
            return;
        }
        let counters = Counters {
            bytes_in: socket.bytes_in,
            bytes_out: socket.bytes_out,
            ..Counters::default()
        };
        self.connections.entry(socket.id).or_insert_with(|| Connection {
            client: socket.remote,
            local: socket.local,
            protocol: Protocol::Unknown,
            state: ConnectionState::Active,
            opened_at: now,
            seeded,
            user: None,
            user_agent: None,
            counters,
            rates: Rates::default(),
            sampled: None,
        });
        if let Some(known) = self.early.remove(&socket.id) {
            self.refine(&known);
        }
    }

    fn classify(&mut self, id: ConnectionId, protocol: Protocol) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        // The server's choice is worth more than the client's offer.
        if protocol <= connection.protocol && connection.protocol != Protocol::Http1 {
            return;
        }
        let speaks_h2 = |protocol| matches!(protocol, Protocol::H2Offered | Protocol::H2Selected);
        if !connection.seeded && speaks_h2(protocol) && !speaks_h2(connection.protocol) {
            self.accepted_total += 1;
        }
        connection.protocol = protocol;
    }

    fn refine(&mut self, known: &ShimConnection) {
        if !self.connections.contains_key(&known.id) {
            self.early.insert(known.id, known.clone());
            return;
        }
        self.classify_by_shim(known);
        if let Some(connection) = self.connections.get_mut(&known.id) {
            if known.user.is_some() {
                connection.user.clone_from(&known.user);
            }
            if known.user_agent.is_some() {
                connection.user_agent.clone_from(&known.user_agent);
            }
            connection.state = connection.state.max(known.state);
            connection.counters = known.counters;
            // With a load balancer that passes addresses on, the shim knows the true one.
            connection.client = known.client;
        }
    }

    fn classify_by_shim(&mut self, known: &ShimConnection) {
        match known.protocol {
            Protocol::Http1 => {
                if let Some(connection) = self.connections.get_mut(&known.id) {
                    connection.protocol = Protocol::Http1;
                }
            }
            protocol => self.classify(known.id, protocol),
        }
    }

    fn resync(&mut self, sockets: Vec<Socket>, listener: Option<ConnectionId>, now: Timestamp) -> bool {
        let seeded = !self.listener_known;
        let mut before = std::mem::take(&mut self.connections);
        for socket in sockets {
            if let Some(known) = before.remove(&socket.id) {
                self.connections.insert(socket.id, known);
            } else {
                self.open(&socket, now, seeded);
            }
        }
        let changed = self.listener_known && self.listener != listener;
        self.listener = listener;
        self.listener_known = true;
        self.trusted = true;
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn socket(id: u64) -> Socket {
        Socket {
            id: ConnectionId(id),
            local: "10.0.0.1:6443".parse().expect("an address"),
            remote: format!("10.0.1.1:{}", 1024 + id).parse().expect("an address"),
            bytes_in: 0,
            bytes_out: 0,
        }
    }

    fn at(ms: u64) -> Timestamp {
        Timestamp::from_millis(ms)
    }

    fn seeded(ids: &[u64]) -> ConnectionTable {
        let mut table = ConnectionTable::default();
        let sockets = ids.iter().copied().map(socket).collect();
        table.observe(
            Observation::Resync {
                sockets,
                listener: Some(ConnectionId(999)),
            },
            at(0),
        );
        table
    }

    #[test]
    fn loopback_is_not_counted() {
        let mut table = seeded(&[]);
        let local = Socket {
            remote: "127.0.0.1:5".parse().expect("an address"),
            ..socket(1)
        };
        table.observe(Observation::Opened(local), at(1));
        assert_eq!(table.active(), 0);
    }

    #[test]
    fn accepted_counts_http2_once_and_no_seeds() {
        let mut table = seeded(&[1]);
        let classified = |id, protocol| Observation::Classified {
            id: ConnectionId(id),
            protocol,
        };
        table.observe(classified(1, Protocol::H2Offered), at(1));
        table.observe(Observation::Opened(socket(2)), at(1));
        table.observe(classified(2, Protocol::H2Offered), at(2));
        table.observe(classified(2, Protocol::H2Selected), at(3));
        table.observe(Observation::Opened(socket(3)), at(3));
        table.observe(classified(3, Protocol::Http1), at(3));
        assert_eq!(table.accepted_total(), 1);
        assert_eq!(table.active(), 2);
    }

    #[test]
    fn what_a_shim_says_before_the_source_is_kept_until_the_connection_ends() {
        let said = |ids: &[u64], closed: &[u64]| ShimReport {
            connections: ids
                .iter()
                .map(|id| ShimConnection {
                    id: ConnectionId(*id),
                    client: socket(*id).remote,
                    local: socket(*id).local,
                    protocol: Protocol::H2Selected,
                    state: ConnectionState::Active,
                    user: Some("a".to_owned()),
                    user_agent: None,
                    counters: Counters::default(),
                })
                .collect(),
            closed: closed.iter().map(|id| ConnectionId(*id)).collect(),
            ..ShimReport::default()
        };
        let mut table = seeded(&[]);
        table.report(&said(&[1, 2], &[]));
        assert_eq!(table.active(), 0, "the kernel has not shown them");
        table.report(&said(&[], &[2]));
        table.observe(Observation::Opened(socket(1)), at(1));
        table.observe(Observation::Opened(socket(2)), at(1));
        let protocol = |id| table.connection(ConnectionId(id)).map(|connection| connection.protocol);
        assert_eq!(protocol(1), Some(Protocol::H2Selected));
        assert_eq!(protocol(2), Some(Protocol::Unknown));
        assert_eq!(table.accepted_total(), 1);
    }

    #[test]
    fn an_offer_does_not_overrule_a_selection() {
        let mut table = seeded(&[1]);
        for protocol in [Protocol::H2Selected, Protocol::H2Offered, Protocol::Unknown] {
            table.observe(
                Observation::Classified {
                    id: ConnectionId(1),
                    protocol,
                },
                at(1),
            );
        }
        assert_eq!(
            table.connection(ConnectionId(1)).map(|c| c.protocol),
            Some(Protocol::H2Selected)
        );
    }

    #[test]
    fn another_listener_is_a_change_but_the_first_is_not() {
        let mut table = seeded(&[]);
        let resync = |listener| Observation::Resync {
            sockets: vec![],
            listener,
        };
        assert!(!table.observe(resync(Some(ConnectionId(999))), at(1)).listener_changed);
        assert!(table.observe(resync(None), at(2)).listener_changed);
        assert!(table.observe(resync(Some(ConnectionId(1000))), at(3)).listener_changed);
    }

    proptest! {
        /// Whatever was lost or came twice: after the kernel's complete list the table equals it.
        #[test]
        fn a_resync_is_the_truth(
            events in prop::collection::vec((0u8..3, 0u64..20), 0..80),
            truth in prop::collection::btree_set(0u64..20, 0..20),
        ) {
            let mut table = seeded(&[]);
            for (kind, id) in events {
                let observation = match kind {
                    0 => Observation::Opened(socket(id)),
                    1 => Observation::Closed { id: ConnectionId(id), bytes_in: 0, bytes_out: 0 },
                    _ => Observation::Lost { events: 1 },
                };
                table.observe(observation, at(1));
            }
            let sockets = truth.iter().copied().map(socket).collect();
            table.observe(Observation::Resync { sockets, listener: Some(ConnectionId(999)) }, at(2));
            prop_assert!(table.is_trusted());
            prop_assert!(table.iter().map(|(id, _)| id.0).eq(truth.iter().copied()));
        }
    }
}
