//! The table of connections of the local apiserver.
//!
//! Job: fold what the source and the shim say into one picture.
//! Input: [`Observation`]s and [`ShimReport`]s, with `now`. Output: connections and totals.
//! Must never guess: a connection without a protocol stays [`Protocol::Unknown`], and after lost events the table
//! says that it is not to be trusted until the kernel's complete list came.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::Arc,
};

use crate::{
    observation::{Observation, Socket},
    policy::Weight,
    shim::{ConnectionState, Counters, ShimConnection, ShimReport},
    words::{ConnectionId, Protocol, Timestamp},
};

mod connection;
mod slab;

use connection::Sampled;
pub use connection::{ClientKey, Connection, Identity, Rates};
use slab::Slab;

/// How fast smoothed rates follow: the time in which an old rate loses 63 % of its weight.
pub const SMOOTHING_SECONDS: f64 = 30.0;

/// So many of the heaviest connections are noted.
const HEAVIEST: usize = 5;

/// All live client connections of the local apiserver.
#[derive(Clone, Debug, Default)]
pub struct ConnectionTable {
    connections: Slab,
    totals: Totals,
    identities: Identities,
    locals: BTreeSet<Arc<SocketAddr>>,
    heaviest: Vec<ConnectionId>,
    sampled_at: Option<Timestamp>,
    sampled_since: Option<Timestamp>,
    accepted_total: u64,
    /// What a shim said of connections that the source has not shown yet.
    early: HashMap<ConnectionId, ShimConnection>,
    listener: Option<ConnectionId>,
    listener_known: bool,
    trusted: bool,
    lost_events_total: u64,
}

/// Sums over all connections, kept while they change: a snapshot is asked for far more often than a connection changes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Totals {
    active: usize,
    draining: usize,
    draining_streams: u64,
    requests: f64,
    bytes: f64,
    streams: u64,
}

impl Totals {
    fn count(&mut self, connection: &Connection) {
        self.active += usize::from(connection.is_active());
        if connection.state == ConnectionState::Draining {
            self.draining += 1;
            self.draining_streams += u64::from(connection.counters.open_streams);
        }
        if connection.is_active() {
            self.requests += connection.rates.requests;
            self.bytes += connection.rates.bytes;
            self.streams += u64::from(connection.counters.open_streams);
        }
    }

    fn uncount(&mut self, connection: &Connection) {
        self.active -= usize::from(connection.is_active());
        if connection.state == ConnectionState::Draining {
            self.draining -= 1;
            self.draining_streams -= u64::from(connection.counters.open_streams);
        }
        if connection.is_active() {
            // Sums of rounded numbers drift a little below 0; every sample starts them anew.
            self.requests = (self.requests - connection.rates.requests).max(0.0);
            self.bytes = (self.bytes - connection.rates.bytes).max(0.0);
            self.streams -= u64::from(connection.counters.open_streams);
        }
    }
}

/// Who is known, each once, with the number of its active connections.
#[derive(Clone, Debug, Default)]
struct Identities {
    known: BTreeMap<Arc<Identity>, Uses>,
    user_agents: BTreeSet<Arc<str>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Uses {
    connections: u32,
    active: u32,
}

impl Identities {
    fn intern(&mut self, user: Option<&str>, user_agent: Option<&str>) -> Arc<Identity> {
        let user_agent = user_agent.map(|name| match self.user_agents.get(name) {
            Some(known) => Arc::clone(known),
            None => {
                let new: Arc<str> = name.into();
                self.user_agents.insert(Arc::clone(&new));
                new
            }
        });
        let wanted = Identity {
            user: user.map(Into::into),
            user_agent,
        };
        match self.known.get_key_value(&wanted) {
            Some((known, _)) => Arc::clone(known),
            None => Arc::new(wanted),
        }
    }

    fn enter(&mut self, identity: Option<&Arc<Identity>>, active: bool) {
        if let Some(identity) = identity {
            let uses = self.known.entry(Arc::clone(identity)).or_default();
            uses.connections += 1;
            uses.active += u32::from(active);
        }
    }

    fn leave(&mut self, identity: Option<&Arc<Identity>>, active: bool) {
        let Some(identity) = identity else {
            return;
        };
        let Some(uses) = self.known.get_mut(identity) else {
            return;
        };
        uses.connections -= 1;
        uses.active -= u32::from(active);
        if uses.connections == 0 {
            self.known.remove(identity);
            if self.user_agents.len() > 2 * self.known.len() + 64 {
                self.user_agents.retain(|name| Arc::strong_count(name) > 1);
            }
        }
    }
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
                self.remove(id);
            }
            Observation::Counters(counters) => {
                for (id, bytes_in, bytes_out) in counters {
                    self.change(id, |connection| {
                        connection.counters.bytes_in = connection.counters.bytes_in.max(bytes_in);
                        connection.counters.bytes_out = connection.counters.bytes_out.max(bytes_out);
                    });
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
            self.change(*id, |connection| connection.counters = *counters);
        }
    }

    /// Marks a connection that heard its GOAWAY.
    pub fn mark_draining(&mut self, id: ConnectionId) {
        self.change(id, |connection| connection.state = ConnectionState::Draining);
    }

    /// Takes a sample of every connection's figures, from which the smoothed rates follow.
    ///
    /// An exponential mean with a time constant of 30 s, divided by the weight that its samples have together: so a young
    /// connection's rate is the plain mean since it was opened, and what a moved client weighs is known at once.
    /// Of a connection that is older than the agent the first sample sets the base only.
    /// The heaviest are noted on the way (see [`Self::heaviest`]).
    pub fn sample(&mut self, now: Timestamp, weight: Weight) {
        if self.sampled_at.is_some_and(|at| at >= now) {
            return;
        }
        let interval = self.sampled_at.map_or(0.0, |at| now.since(at).as_secs_f64());
        self.sampled_at = Some(now);
        if self.trusted {
            self.sampled_since.get_or_insert(now);
        }
        let keep_interval = (-interval / SMOOTHING_SECONDS).exp();
        let mut totals = Totals::default();
        let mut heaviest: Vec<(u64, Reverse<ConnectionId>)> = Vec::with_capacity(HEAVIEST + 1);
        for connection in self.connections.scan_mut() {
            let requests = connection.counters.requests;
            let bytes = connection.counters.bytes_in + connection.counters.bytes_out;
            let before = connection.sampled;
            let age = now.since(connection.opened_at).as_secs_f64();
            let (seconds, keep) = if age < interval || before.share == 0.0 && !connection.seeded {
                (age, (-age / SMOOTHING_SECONDS).exp())
            } else {
                (interval, keep_interval)
            };
            let mut share = before.share;
            if before.is_set && seconds > 0.0 {
                let old = f64::from(share) * keep;
                let new = 1.0 - keep;
                let smooth = |rate: f64, total: u64, before: u64| {
                    if rate == 0.0 && total == before {
                        return 0.0;
                    }
                    (old * rate + new * total.saturating_sub(before) as f64 / seconds) / (old + new)
                };
                connection.rates = Rates {
                    requests: smooth(connection.rates.requests, requests, before.requests),
                    bytes: smooth(connection.rates.bytes, bytes, before.bytes),
                };
                share = (old + new) as f32;
            }
            connection.sampled = Sampled {
                is_set: true,
                share,
                requests,
                bytes,
            };
            totals.count(connection);
            let load = match weight {
                Weight::Connections => connection.rates.requests,
                weight => connection.load(weight),
            };
            // The bits of positive numbers are in their order.
            let rank = (load.to_bits(), Reverse(connection.id));
            if connection.is_active() && (heaviest.len() < HEAVIEST || heaviest.last().is_some_and(|last| rank > *last))
            {
                let place = heaviest.partition_point(|other| *other > rank);
                heaviest.insert(place, rank);
                heaviest.truncate(HEAVIEST);
            }
        }
        self.totals = totals;
        self.heaviest = heaviest.into_iter().map(|(_, Reverse(id))| id).collect();
    }

    /// The heaviest active connections as of the last sample, the heaviest first; where all weigh the same, those with the
    /// most requests a second.
    pub fn heaviest(&self) -> impl Iterator<Item = &Connection> {
        let known = self.heaviest.iter().filter_map(|id| self.connections.get(*id));
        known.filter(|connection| connection.is_active())
    }

    /// When the first sample was taken.
    pub fn sampled_since(&self) -> Option<Timestamp> {
        self.sampled_since
    }

    /// All connections, by id.
    pub fn iter(&self) -> impl Iterator<Item = (ConnectionId, &Connection)> {
        self.connections.iter().map(|connection| (connection.id, connection))
    }

    /// All connections in any order: the fastest way through a large table.
    pub fn scan(&self) -> impl Iterator<Item = &Connection> {
        self.connections.scan()
    }

    /// One connection.
    pub fn connection(&self, id: ConnectionId) -> Option<&Connection> {
        self.connections.get(id)
    }

    /// How many active connections a client has.
    pub fn active_of(&self, key: &ClientKey) -> usize {
        match key {
            ClientKey::User(identity) => self
                .identities
                .known
                .get(identity)
                .map_or(0, |uses| uses.active as usize),
            ClientKey::Address(_) => 1,
        }
    }

    /// How many connections count as load.
    pub fn active(&self) -> usize {
        self.totals.active
    }

    /// How many are draining.
    pub fn draining(&self) -> usize {
        self.totals.draining
    }

    /// How many streams are open on draining connections.
    pub fn draining_streams(&self) -> u64 {
        self.totals.draining_streams
    }

    /// The load of all active connections.
    pub fn load(&self, weight: Weight) -> f64 {
        match weight {
            Weight::Connections => self.totals.active as f64,
            Weight::Requests => self.totals.requests,
            Weight::Bytes => self.totals.bytes,
            Weight::Streams => self.totals.streams as f64,
        }
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
        if !self.connections.contains(socket.id) {
            let local = match self.locals.get(&socket.local) {
                Some(known) => Arc::clone(known),
                None => {
                    let new = Arc::new(socket.local);
                    self.locals.insert(Arc::clone(&new));
                    new
                }
            };
            self.insert(Connection {
                id: socket.id,
                client: socket.remote.into(),
                local,
                protocol: Protocol::Unknown,
                state: ConnectionState::Active,
                opened_at: now,
                seeded,
                identity: None,
                counters,
                rates: Rates::default(),
                sampled: Sampled {
                    is_set: !seeded,
                    share: 0.0,
                    requests: 0,
                    bytes: socket.bytes_in + socket.bytes_out,
                },
            });
        }
        if let Some(known) = self.early.remove(&socket.id) {
            self.refine(&known);
        }
    }

    fn insert(&mut self, connection: Connection) {
        self.totals.count(&connection);
        self.identities
            .enter(connection.identity.as_ref(), connection.is_active());
        self.connections.insert(connection);
    }

    fn remove(&mut self, id: ConnectionId) -> Option<Connection> {
        let connection = self.connections.remove(id)?;
        self.totals.uncount(&connection);
        self.identities
            .leave(connection.identity.as_ref(), connection.is_active());
        Some(connection)
    }

    /// The only way to change a connection: the totals follow.
    fn change(&mut self, id: ConnectionId, change: impl FnOnce(&mut Connection)) {
        let Some(connection) = self.connections.get_mut(id) else {
            return;
        };
        self.totals.uncount(connection);
        let before = (connection.identity.clone(), connection.is_active());
        change(connection);
        self.totals.count(connection);
        if before != (connection.identity.clone(), connection.is_active()) {
            self.identities
                .enter(connection.identity.as_ref(), connection.is_active());
            self.identities.leave(before.0.as_ref(), before.1);
        }
    }

    fn classify(&mut self, id: ConnectionId, protocol: Protocol) {
        let speaks_h2 = |protocol| matches!(protocol, Protocol::H2Offered | Protocol::H2Selected);
        let mut accepted = 0;
        self.change(id, |connection| {
            // The server's choice is worth more than the client's offer.
            if protocol <= connection.protocol && connection.protocol != Protocol::Http1 {
                return;
            }
            accepted = u64::from(!connection.seeded && speaks_h2(protocol) && !speaks_h2(connection.protocol));
            connection.protocol = protocol;
        });
        self.accepted_total += accepted;
    }

    fn refine(&mut self, known: &ShimConnection) {
        let Some(connection) = self.connections.get(known.id) else {
            self.early.insert(known.id, known.clone());
            return;
        };
        let user = known.user.as_deref().or(connection.user());
        let user_agent = known.user_agent.as_deref().or(connection.user_agent());
        let identity = if (user, user_agent) == (connection.user(), connection.user_agent()) {
            connection.identity.clone()
        } else {
            Some(self.identities.intern(user, user_agent))
        };
        match known.protocol {
            Protocol::Http1 => self.change(known.id, |connection| connection.protocol = Protocol::Http1),
            protocol => self.classify(known.id, protocol),
        }
        self.change(known.id, |connection| {
            connection.identity = identity;
            connection.state = connection.state.max(known.state);
            connection.counters = known.counters;
            // With a load balancer that passes addresses on, the shim knows the true one.
            connection.client = known.client.into();
        });
    }

    fn resync(&mut self, sockets: Vec<Socket>, listener: Option<ConnectionId>, now: Timestamp) -> bool {
        let seeded = !self.listener_known;
        let listed: BTreeSet<ConnectionId> = sockets.iter().map(|socket| socket.id).collect();
        let gone: Vec<ConnectionId> = self
            .connections
            .iter()
            .map(|connection| connection.id)
            .filter(|id| !listed.contains(id))
            .collect();
        for id in gone {
            self.remove(id);
        }
        for socket in sockets {
            self.open(&socket, now, seeded);
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

    /// The sums, from scratch.
    fn recounted(table: &ConnectionTable) -> Totals {
        let mut totals = Totals::default();
        table.scan().for_each(|connection| totals.count(connection));
        totals
    }

    proptest! {
        /// Totals and identities are kept while connections change: they are what counting from scratch gives.
        #[test]
        fn totals_are_what_counting_gives(events in prop::collection::vec((0u8..6, 0u64..12, 0u64..4), 0..120)) {
            let mut table = seeded(&[1, 2, 3]);
            for (step, (kind, id, detail)) in events.into_iter().enumerate() {
                let now = at(1_000 * (step as u64 + 1));
                let id = ConnectionId(id);
                match kind {
                    0 => drop(table.observe(Observation::Opened(socket(id.0)), now)),
                    1 => drop(table.observe(Observation::Closed { id, bytes_in: 0, bytes_out: 0 }, now)),
                    2 => table.mark_draining(id),
                    3 => table.sample(now, Weight::Requests),
                    _ => table.report(&ShimReport {
                        connections: vec![ShimConnection {
                            id,
                            client: socket(id.0).remote,
                            local: socket(id.0).local,
                            protocol: if detail == 3 { Protocol::Http1 } else { Protocol::H2Selected },
                            state: ConnectionState::Active,
                            user: (detail > 0).then(|| format!("user-{detail}")),
                            user_agent: Some("agent".to_owned()),
                            counters: Counters { requests: step as u64 * detail, open_streams: detail as u32, ..Counters::default() },
                        }],
                        ..ShimReport::default()
                    }),
                }
            }
            let (kept, counted) = (table.totals, recounted(&table));
            prop_assert_eq!((kept.active, kept.draining, kept.streams), (counted.active, counted.draining, counted.streams));
            prop_assert!((kept.requests - counted.requests).abs() < 1e-6);
            for connection in table.scan() {
                let key = connection.client_key();
                if let ClientKey::User(_) = key {
                    let same = table.scan().filter(|other| other.is_active() && other.client_key() == key).count();
                    prop_assert_eq!(table.active_of(&key), same);
                }
            }
            let named: BTreeSet<_> = table.scan().filter_map(|connection| connection.identity.clone()).collect();
            prop_assert_eq!(table.identities.known.len(), named.len());
        }

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
            prop_assert_eq!(table.totals, recounted(&table));
            prop_assert!(table.iter().map(|(id, _)| id.0).eq(truth.iter().copied()));
        }
    }
}
