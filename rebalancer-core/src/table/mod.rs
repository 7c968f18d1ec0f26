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

use connection::Shown;
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
    departed_total: u64,
    left_total: u64,
    /// Connections that drain, some of which no shim shows as such: a relay that took its leave has them, or a probe of an
    /// earlier agent told them. Those that an earlier agent knew of are here before they are in the table.
    drains: BTreeSet<ConnectionId>,
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
    /// Why it is not known whose connections these are.
    shared_port: Option<Arc<str>>,
    doubts: Doubts,
    repairs: Repairs,
    /// Whether the shim names all whom it can tell.
    names_all: bool,
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
    /// that while none is seen to end between the two, or for three times that and some where they are seen to end later.
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

    /// From which age on a connection counts now: no sooner than [`crate::policy::Policy::stays_after`] for what rests on it.
    pub fn old_enough(&self) -> Duration {
        self.young.old_enough().max(self.young.patience())
    }

    /// The same as learned from who ended here, for the peers: short calls come to all, and who goes by them alone hears of
    /// landings later than the others do.
    pub fn counts_after(&self) -> Duration {
        self.young.learned()
    }

    /// Peers say that connections should not count before that age.
    pub fn peers_count_after(&mut self, age: Duration) {
        self.young.peers_wait(age);
    }

    /// The apiserver was gone and is back. All its clients' connections ended, however young they were, and were no short calls:
    /// what was learned of those is learned anew.
    pub fn apiserver_is_back(&mut self) {
        self.young.forget();
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
                self.open(&socket, now, Shown::Opened);
            }
            Observation::Classified { id, protocol } => self.classify(id, protocol),
            Observation::Closed { id, .. } => {
                self.doubts.closed(id);
                self.early.closed(id);
                // Who said nothing could never have been a landing: a stranger's silence is no short call.
                if let Some(gone) = self.remove(id)
                    && gone.is_a_client()
                    && gone.protocol != Protocol::Unknown
                    && !gone.seeded
                {
                    self.young.ended(now, now.since(gone.opened_at));
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
            Observation::SharedPort(why) => self.shared_port = why,
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
        self.names_all = report.abilities.names_all;
        if report.full {
            self.early.forget_shim();
            self.leave(report);
        }
        for id in &report.closed {
            self.early.end(*id);
        }
        for known in &report.connections {
            if self.connections.contains(known.id) {
                self.refine(known, Duration::ZERO, now);
            } else {
                self.early.say(known, now);
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
            self.mark_draining(id);
        }
    }

    /// These drained when an earlier agent ended; who serves now may not know it. Before the first observation.
    pub fn drained_before(&mut self, drains: &[ConnectionId]) {
        self.drains = drains.iter().copied().collect();
    }

    /// What drains, the oldest first.
    pub fn drains(&self) -> impl DoubleEndedIterator<Item = ConnectionId> {
        self.drains.iter().copied()
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

    /// How many of those that may be told were opened later than that.
    pub fn opened_after(&self, until: Timestamp) -> usize {
        self.connections.opened_after(until)
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

    /// Clients that left since the agent started, each counted as load once and told by nobody: with the landings, what comes
    /// and goes for reasons of its own.
    pub fn departed_total(&self) -> u64 {
        self.departed_total
    }

    /// Whether a shim is asked to tell this one: it may end before that is answered.
    pub fn set_asked(&mut self, id: ConnectionId, is_asked: bool) {
        if let Some((connection, _)) = self.connections.get_mut(id) {
            connection.is_asked = is_asked;
        }
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

    /// Why it is not known whose connections these are, if it is not.
    pub fn shared_port(&self) -> Option<&str> {
        self.shared_port.as_deref()
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

    fn open(&mut self, socket: &Socket, now: Timestamp, shown: Shown) {
        if !self.connections.contains(socket.id) {
            let local = match self.locals.get(&socket.local) {
                Some(known) => Arc::clone(known),
                None => {
                    let new = Arc::new(socket.local);
                    self.locals.insert(Arc::clone(&new));
                    new
                }
            };
            let mut connection = Connection::new(socket, local, now, shown);
            place(&mut connection, &self.own, self.node_local);
            if self.drains.contains(&socket.id) {
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
        if let Some((said, known)) = known {
            self.refine(&known, now.since(said), now);
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
        self.drains.remove(&id);
        // The last of its address but for the set's own: where all of a network is routed here, clients choose addresses.
        if Arc::strong_count(&connection.local) == 2 {
            self.locals.remove(&connection.local);
        }
        self.totals.uncount(&connection);
        self.departed_total += u64::from(connection.departs());
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
        let drained = connection.state == ConnectionState::Draining;
        let requests = connection.counters.requests;
        change(connection);
        place(connection, &self.own, self.node_local);
        self.accepted_total += u64::from(connection.lands());
        *key = Key::of(connection, self.node_local);
        self.totals.count(connection);
        if connection.state == ConnectionState::Draining && !drained {
            self.drains.insert(id);
        }
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

    /// Takes what a shim said, so long ago, of a connection that the source has shown.
    fn refine(&mut self, known: &ShimConnection, ago: Duration, now: Timestamp) {
        let Some(connection) = self.connections.get(known.id) else {
            return;
        };
        let user = known.user.as_deref().or(connection.user());
        // A client may have many over one connection: whoever is left alone by the first is not told with the next.
        let user_agent = connection.user_agent().or(known.user_agent.as_deref());
        let names_all = self.names_all;
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
            let is_first = !std::mem::replace(&mut connection.is_with_shim, true);
            // In the middle of a handshake one that does not see all knows no more than the source. One that does knows a stranger,
            // who is no load, however long it stays and whatever it offered.
            if names_all || known.protocol != Protocol::Unknown {
                connection.can_be_told = known.can_be_told;
            }
            connection.state = connection.state.max(known.state);
            connection.counters = known.counters;
            if is_first && !connection.is_dated {
                // What it did before anybody saw it is no rate.
                connection.sampled.requests = known.counters.requests;
                connection.sampled.bytes = known.counters.bytes_in + known.counters.bytes_out;
            }
            // With a load balancer that passes addresses on, the shim knows the true one.
            connection.client = known.client.into();
            if let Some(age) = known.age {
                connection.is_known_to_be(age.saturating_add(ago), now);
            }
        });
    }
}

/// Where a connection's client is.
fn place(connection: &mut Connection, own: &BTreeSet<IpAddr>, node_local: NodeLocal) {
    let client = connection.client().ip();
    connection.node_local = client.is_loopback() || client == connection.local.ip() || own.contains(&client);
    connection.apart = connection.node_local && node_local == NodeLocal::Exclude;
}
