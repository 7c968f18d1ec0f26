//! The table of connections of the local apiserver.
//!
//! Job: fold what the source and the shim say into one picture.
//! Input: [`Observation`]s and [`ShimReport`]s, with `now`. Output: connections and totals.
//! Must never guess: a connection without a protocol stays [`Protocol::Unknown`], and after lost events the table
//! says that it is not to be trusted until the kernel's complete list came.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use crate::{
    ids::{ConnectionId, Protocol, Timestamp},
    observation::{HelloLoss, Observation, Socket},
    policy::{NodeLocal, Weight},
    shim::{ConnectionState, ShimConnection, ShimReport},
};

mod connection;
mod early;
mod order;
mod reconcile;
mod sample;
mod slab;
#[cfg(test)]
mod tests;
mod totals;
mod young;

pub use connection::{ClientKey, Connection, Identity, Rates};
use early::Early;
use order::Key;
pub use order::{Turn, Wanted};
use reconcile::Doubts;
pub use reconcile::Repairs;
use sample::Samples;
use slab::Slab;
use totals::{Identities, Totals};
use young::Young;

/// All live client connections of the local apiserver.
#[derive(Clone, Debug, Default)]
pub struct ConnectionTable {
    connections: Slab,
    totals: Totals,
    identities: Identities,
    locals: BTreeSet<Arc<SocketAddr>>,
    samples: Samples,
    accepted_total: u64,
    left_total: u64,
    /// Connections of a shim that took its leave: the next one does not list them. Those that an earlier agent knew of are
    /// here before they are in the table.
    left: BTreeSet<ConnectionId>,
    requests_total: u64,
    /// What was said of connections that the source has not shown yet.
    early: Early,
    /// The node's own addresses.
    own: BTreeSet<IpAddr>,
    node_local: NodeLocal,
    /// Connections that are not old enough to count.
    young: Young,
    listener: Option<ConnectionId>,
    listener_known: bool,
    trusted: bool,
    lost_events_total: u64,
    hellos_lost: BTreeMap<HelloLoss, u64>,
    blind: Option<Arc<str>>,
    doubts: Doubts,
    repairs: Repairs,
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
    /// An empty table, for which clients on this node are what `node_local` says, and a connection counts, as load
    /// and as a landing, once it is open for `stays_after` (see [`crate::policy::Policy::stays_after`]), or for a third of
    /// that while none is seen to end between the two.
    pub fn new(node_local: NodeLocal, stays_after: Duration) -> Self {
        Self {
            node_local,
            young: Young::new(stays_after),
            ..Self::default()
        }
    }

    /// When the next connection is old enough to count, if one is waiting for that.
    pub fn next_stays(&self) -> Option<Timestamp> {
        self.young.next()
    }

    /// Counts those that are old enough now.
    pub fn age(&mut self, now: Timestamp) {
        while let Some(id) = self.young.pop(now) {
            self.change(id, |connection| connection.stays = true);
            if self.connections.get(id).is_some_and(Connection::is_active) {
                self.young.lasted();
            }
        }
    }

    /// Folds in what the source says.
    pub fn observe(&mut self, observation: Observation, now: Timestamp) -> Changes {
        let mut changes = Changes::default();
        match observation {
            Observation::Opened(socket) => {
                self.doubts.opened.remove(&socket.id);
                self.open(&socket, now, false);
            }
            Observation::Classified { id, protocol } => self.classify(id, protocol),
            Observation::Closed { id, .. } => {
                self.doubts.closed(id);
                self.early.closed(id);
                if let Some(gone) = self.remove(id)
                    && gone.is_a_client()
                    && !gone.seeded
                {
                    self.young.ended(now.since(gone.opened_at));
                }
            }
            Observation::Listed { sockets, listener } => {
                changes.listener_changed = self.reconcile(sockets, listener, now);
            }
            Observation::Lost { events } => {
                self.lost_events_total += events;
                self.trusted = false;
                changes.lost = true;
            }
            Observation::Addresses(addresses) => self.know_own(addresses),
            Observation::HellosLost { how, count } => *self.hellos_lost.entry(how).or_default() += count,
            Observation::Blind(why) => self.blind = why,
            Observation::Resync { sockets, listener } => {
                changes.listener_changed = self.resync(sockets, listener, now);
            }
        }
        changes
    }

    /// Folds in what the shim says. A connection that the source has not shown yet is not counted, for the kernel is the
    /// truth; what the shim said of it is kept until the source shows it, for the shim says it once.
    ///
    /// A full report is the whole truth of that shim: what an earlier one listed and it does not list is with a process
    /// that took its leave, and drains.
    pub fn report(&mut self, report: &ShimReport, now: Timestamp) {
        if report.full {
            self.early.forget_shim();
            self.leave(report);
        }
        for id in &report.closed {
            self.early.end(*id);
        }
        for known in &report.connections {
            self.refine(known);
            if let Some(age) = known.age {
                self.change(known.id, |connection| connection.is_known_to_be(age, now));
            }
        }
        for (id, counters) in &report.counters {
            self.change(*id, |connection| connection.counters = *counters);
        }
    }

    /// Connections that a shim showed and the next one does not hold are draining.
    fn leave(&mut self, report: &ShimReport) {
        let held: BTreeSet<ConnectionId> = report.connections.iter().map(|known| known.id).collect();
        let shown = self.connections.scan().filter(|connection| connection.is_with_shim);
        let left: Vec<ConnectionId> = shown
            .map(|connection| connection.id)
            .filter(|id| !held.contains(id))
            .collect();
        for id in left {
            self.left_total += u64::from(self.connections.get(id).is_some_and(Connection::is_active));
            self.left.insert(id);
            self.mark_draining(id);
        }
    }

    /// These drain with a shim that took its leave before this agent came. Before the first observation.
    pub fn left_before(&mut self, left: &[ConnectionId]) {
        self.left = left.iter().copied().collect();
    }

    /// What drains with a shim that took its leave.
    pub fn left(&self) -> impl Iterator<Item = ConnectionId> {
        self.left.iter().copied()
    }

    /// Marks a connection that heard its GOAWAY.
    pub fn mark_draining(&mut self, id: ConnectionId) {
        self.change(id, |connection| connection.state = ConnectionState::Draining);
    }

    /// All connections, by id.
    pub fn iter(&self) -> impl Iterator<Item = (ConnectionId, &Connection)> {
        self.connections.iter().map(|connection| (connection.id, connection))
    }

    /// All connections in any order: the fastest way through a large table.
    pub fn scan(&self) -> impl Iterator<Item = &Connection> {
        self.connections.scan()
    }

    /// The first of those that may be told where each connection counts as one, in order: those with the fewest open watches,
    /// then the oldest, then by id, and the silent last where they are told at their next request. Fewer than are wanted are
    /// all there are.
    pub fn first(&self, wanted: &Wanted) -> Vec<&Connection> {
        self.connections.first(wanted)
    }

    /// When a connection's turn is in that order, unless it may not be told.
    pub fn turn(&self, connection: &Connection, at_request: bool) -> Option<Turn> {
        let place = Key::of(connection, self.node_local).place(at_request)?;
        Some((place, connection.id))
    }

    /// Connections that were opened at that time or later, in any order.
    pub fn opened_since(&self, since: Timestamp) -> impl Iterator<Item = &Connection> {
        self.connections.opened_since(since)
    }

    /// One connection.
    pub fn connection(&self, id: ConnectionId) -> Option<&Connection> {
        self.connections.get(id)
    }

    /// How many active connections a client has.
    pub fn active_of(&self, key: &ClientKey) -> usize {
        match key {
            ClientKey::User(user) => self.identities.active_of(user),
            ClientKey::Address(_) => 1,
        }
    }

    /// How many connections count as load: those that can be told to go, are open for a moment (see [`Self::new`]) or there
    /// before the agent, and not on this node unless those are to be counted.
    pub fn active(&self) -> usize {
        self.totals.active
    }

    /// How many of those are not known to speak HTTP/2.
    pub fn unknown(&self) -> usize {
        self.totals.unknown
    }

    /// How many clients that stay are on this node, whether or not they count as load.
    pub fn node_local(&self) -> usize {
        self.totals.node_local
    }

    /// Whether most clients are on this node, while those are counted apart: then this is where a load balancer is, or
    /// what is taken for the node's own is not.
    pub fn is_mostly_node_local(&self) -> bool {
        self.node_local == NodeLocal::Exclude && self.totals.node_local > self.totals.active.max(1)
    }

    /// How many are draining.
    pub fn draining(&self) -> usize {
        self.totals.draining
    }

    /// How many streams are open on draining connections.
    pub fn draining_streams(&self) -> u64 {
        self.totals.draining_streams
    }

    /// The load of all connections that count as such (see [`Self::active`]).
    pub fn load(&self, weight: Weight) -> f64 {
        match weight {
            Weight::Connections => self.totals.active as f64,
            Weight::Requests => self.totals.requests,
            Weight::Bytes => self.totals.bytes,
            Weight::Streams => self.totals.streams as f64,
        }
    }

    /// Landings since the agent started: connections that came after it, are known for what they speak, and count as load
    /// (see [`Self::active`]). Health checks, short calls and the node's own are none.
    pub fn accepted_total(&self) -> u64 {
        self.accepted_total
    }

    /// Clients that a shim told to go when it took its leave, since the agent started: nobody planned it, and they are on
    /// their way all the same.
    pub fn left_total(&self) -> u64 {
        self.left_total
    }

    /// Requests that the shim saw since the agent started, those of connections that have closed since included.
    pub fn requests_total(&self) -> u64 {
        self.requests_total
    }

    /// Kernel events that were lost since the agent started.
    pub fn lost_events_total(&self) -> u64 {
        self.lost_events_total
    }

    /// ClientHellos that were lost that way since the agent started.
    pub fn hellos_lost(&self, how: HelloLoss) -> u64 {
        let early = if how == HelloLoss::Early {
            self.early.forgotten()
        } else {
            0
        };
        self.hellos_lost.get(&how).copied().unwrap_or(0) + early
    }

    /// Why the source reads no ClientHello, if it does not.
    pub fn blind(&self) -> Option<&str> {
        self.blind.as_deref()
    }

    /// Whether the table is the kernel's truth: seeded, and no events lost since.
    pub fn is_trusted(&self) -> bool {
        self.trusted
    }

    /// Whether someone listens on the port.
    pub fn is_listening(&self) -> bool {
        self.listener.is_some()
    }

    /// The listening socket.
    pub fn listener(&self) -> Option<ConnectionId> {
        self.listener
    }

    fn open(&mut self, socket: &Socket, now: Timestamp, seeded: bool) {
        if !self.connections.contains(socket.id) {
            let local = match self.locals.get(&socket.local) {
                Some(known) => Arc::clone(known),
                None => {
                    let new = Arc::new(socket.local);
                    self.locals.insert(Arc::clone(&new));
                    new
                }
            };
            let mut connection = Connection::new(socket, local, now, seeded);
            place(&mut connection, &self.own, self.node_local);
            if self.left.contains(&socket.id) {
                connection.state = ConnectionState::Draining;
            }
            connection.stays |= !self.young.is_patient();
            if !connection.stays {
                let connections = &self.connections;
                self.young
                    .enter(now, socket.id, connections.len(), |id| connections.contains(id));
            }
            self.insert(connection);
        }
        let (offer, known) = self.early.take(socket.id);
        if let Some(protocol) = offer {
            self.classify(socket.id, protocol);
        }
        if let Some(known) = known {
            self.refine(&known);
        }
    }

    /// These are the node's addresses now.
    fn know_own(&mut self, addresses: Vec<IpAddr>) {
        let own: BTreeSet<IpAddr> = addresses.into_iter().collect();
        if own == self.own {
            return;
        }
        self.own = own;
        let ids: Vec<ConnectionId> = self.connections.slots().map(|(id, _)| id).collect();
        for id in ids {
            self.change(id, |_| ());
        }
    }

    fn insert(&mut self, connection: Connection) {
        self.totals.count(&connection);
        self.identities
            .enter(connection.identity.as_ref(), connection.is_active());
        let key = Key::of(&connection, self.node_local);
        self.connections.insert(connection, key);
    }

    fn remove(&mut self, id: ConnectionId) -> Option<Connection> {
        let connection = self.connections.remove(id)?;
        self.left.remove(&id);
        self.totals.uncount(&connection);
        self.identities
            .leave(connection.identity.as_ref(), connection.is_active());
        Some(connection)
    }

    /// The only way to change a connection: the totals follow.
    fn change(&mut self, id: ConnectionId, change: impl FnOnce(&mut Connection)) {
        let Some((connection, key)) = self.connections.get_mut(id) else {
            return;
        };
        self.totals.uncount(connection);
        let before = (connection.identity.clone(), connection.is_active());
        let requests = connection.counters.requests;
        change(connection);
        place(connection, &self.own, self.node_local);
        self.accepted_total += u64::from(connection.lands());
        *key = Key::of(connection, self.node_local);
        self.totals.count(connection);
        // What a connection that was there before the agent had asked until then is the base.
        if !connection.seeded || requests > 0 {
            self.requests_total += connection.counters.requests.saturating_sub(requests);
        }
        if before != (connection.identity.clone(), connection.is_active()) {
            self.identities
                .enter(connection.identity.as_ref(), connection.is_active());
            self.identities.leave(before.0.as_ref(), before.1);
        }
    }

    fn classify(&mut self, id: ConnectionId, protocol: Protocol) {
        if !self.connections.contains(id) {
            self.early.offer(id, protocol);
            return;
        }
        self.change(id, |connection| {
            // The server's choice is worth more than the client's offer.
            connection.protocol = connection.protocol.max(protocol);
            if !connection.is_with_shim {
                connection.can_be_told = connection.protocol != Protocol::Http1;
            }
        });
    }

    fn refine(&mut self, known: &ShimConnection) {
        let Some(connection) = self.connections.get(known.id) else {
            self.early.say(known);
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
            connection.is_with_shim = true;
            // In the middle of a handshake it knows no more than the source.
            if known.protocol != Protocol::Unknown {
                connection.can_be_told = known.can_be_told;
            }
            connection.state = connection.state.max(known.state);
            connection.counters = known.counters;
            // With a load balancer that passes addresses on, the shim knows the true one.
            connection.client = known.client.into();
        });
    }
}

/// Where a connection's client is.
fn place(connection: &mut Connection, own: &BTreeSet<IpAddr>, node_local: NodeLocal) {
    let client = connection.client().ip();
    connection.node_local = client.is_loopback() || client == connection.local.ip() || own.contains(&client);
    connection.apart = connection.node_local && node_local == NodeLocal::Exclude;
}
