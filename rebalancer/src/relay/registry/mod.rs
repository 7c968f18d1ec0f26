//! Every connection of the relay, its figures, and the orders it was given.
//!
//! Job: the one place where the accepting side, the pumps and the control socket meet.
//! Must never make a pump wait: figures are atomics, and an order is a note in a mailbox and a wake-up.

mod entry;
mod flows;
mod heads;
mod listing;
mod mailbox;
mod orders;

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use crate::shim::wire::{Id, Outcome, OutcomeEntry, Upstream};
pub use entry::Connection;
use heads::Heads;
pub use mailbox::Order;

/// How many ended connections and outcomes are remembered: an agent that polls less often than this asks for all.
const REMEMBERED: usize = 65_536;

/// Octets and requests of connections that have ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Requests.
    pub requests: u64,
    /// Octets from clients.
    pub bytes_in: u64,
    /// Octets to clients.
    pub bytes_out: u64,
}

/// All connections of this process.
#[derive(Debug)]
pub struct Registry {
    instance: String,
    began: Instant,
    cursor: AtomicU64,
    coarse_ms: AtomicU64,
    /// Refusals for overload, each connection's once in a while.
    refused: AtomicU64,
    heads: Mutex<Heads>,
    /// How many connections were slowed and not told of yet, and the last one's client.
    slowed: Mutex<(u64, Option<SocketAddr>)>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    open: HashMap<u64, Arc<Connection>>,
    closed: VecDeque<(u64, Id)>,
    /// Cursors below this one are too old: what ended since is forgotten.
    forgotten: u64,
    generation: u64,
    outcomes: VecDeque<OutcomeEntry>,
    next_outcome: u64,
    upstream: Upstream,
    upstream_version: Option<String>,
    upstream_listener: Option<Id>,
    /// The issue of the front proxy's certificate that it believed last.
    taken: Option<u64>,
    ended: Totals,
    /// What connections that have ended came to, by flow.
    ended_flows: flows::Ended,
    /// Connections that were told, and those of them that ended.
    drained: (u64, u64),
}

impl Registry {
    /// Without connections; `instance` names this process.
    pub fn new(instance: String) -> Arc<Self> {
        Arc::new(Self {
            instance,
            began: Instant::now(),
            cursor: AtomicU64::new(1),
            coarse_ms: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            heads: Mutex::default(),
            slowed: Mutex::default(),
            inner: Mutex::new(Inner {
                open: HashMap::new(),
                closed: VecDeque::new(),
                forgotten: 0,
                generation: 0,
                outcomes: VecDeque::new(),
                next_outcome: 0,
                upstream: Upstream::Unknown,
                upstream_version: None,
                upstream_listener: None,
                taken: None,
                ended: Totals::default(),
                ended_flows: flows::Ended::default(),
                drained: (0, 0),
            }),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// How many connections are open.
    pub fn len(&self) -> usize {
        self.inner().open.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A connection is accepted; its entry goes when the returned one is [closed](Connection::close).
    pub fn open(self: &Arc<Self>, cookie: u64, client: SocketAddr, local: SocketAddr) -> Arc<Connection> {
        let connection = Arc::new(Connection::new(self, Id(cookie), client, local));
        self.inner().open.insert(cookie, Arc::clone(&connection));
        connection
    }

    /// What the health check saw.
    pub fn set_upstream(&self, upstream: Upstream) {
        self.inner().upstream = upstream;
    }

    /// Whether the apiserver believed the front proxy's certificate of that issue.
    pub fn set_taken(&self, issue: u64, is_taken: bool) {
        let taken = &mut self.inner().taken;
        if is_taken {
            *taken = Some(issue);
        } else if *taken == Some(issue) {
            *taken = None;
        }
    }

    /// Whether that is the one that it believed last, and it has not refused it since.
    pub fn takes(&self, issue: u64) -> bool {
        self.inner().taken == Some(issue)
    }

    /// What the health check saw last.
    pub fn upstream(&self) -> Upstream {
        self.inner().upstream
    }

    /// What the apiserver called its version, and which socket it listens on, where that is known.
    pub fn set_upstream_process(&self, version: Option<String>, listener: Option<u64>) {
        let mut inner = self.inner();
        inner.upstream_version = version.or(inner.upstream_version.take());
        inner.upstream_listener = listener.map(Id).or(inner.upstream_listener);
    }

    /// Requests and octets of all connections since the relay began.
    pub fn totals(&self) -> Totals {
        let inner = self.inner();
        let mut totals = inner.ended;
        for connection in inner.open.values() {
            totals.add(connection);
        }
        totals
    }

    /// Connections that were told to go, and those of them that have ended.
    pub fn drained(&self) -> (u64, u64) {
        self.inner().drained
    }

    /// Refusals for overload since the relay began.
    pub fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    fn slowed(&self, client: SocketAddr) {
        let mut slowed = self.slowed.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *slowed = (slowed.0 + 1, Some(client));
    }

    /// How many connections were slowed since this was asked last, and the client of one.
    pub fn take_slowed(&self) -> (u64, Option<SocketAddr>) {
        let mut slowed = self.slowed.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        std::mem::take(&mut *slowed)
    }

    /// Milliseconds since the relay began, as the last sweep saw them.
    fn coarse_ms(&self) -> u64 {
        self.coarse_ms.load(Relaxed)
    }

    /// Milliseconds since the relay began.
    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn closed(&self, connection: &Connection, reason: &str) {
        if connection.was_told() {
            self.outcome(connection, Outcome::Closed, Some(reason));
        }
        let mut inner = self.inner();
        let cursor = self.cursor.load(Relaxed);
        if inner.open.remove(&connection.id().0).is_some() {
            inner.ended.add(connection);
            inner.ended_flows.add(connection);
        }
        if inner.closed.len() == REMEMBERED
            && let Some((at, _)) = inner.closed.pop_front()
        {
            inner.forgotten = at + 1;
        }
        inner.closed.push_back((cursor, connection.id()));
    }

    fn outcome(&self, connection: &Connection, outcome: Outcome, reason: Option<&str>) {
        let mut inner = self.inner();
        match outcome {
            Outcome::Draining => inner.drained.0 += 1,
            Outcome::Closed => inner.drained.1 += 1,
            Outcome::Expired => {}
        }
        let seq = inner.next_outcome;
        inner.next_outcome += 1;
        if inner.outcomes.len() == REMEMBERED {
            inner.outcomes.pop_front();
        }
        inner.outcomes.push_back(OutcomeEntry {
            seq,
            id: connection.id(),
            generation: connection.generation(),
            outcome,
            reason: reason.map(str::to_owned),
        });
    }
}

impl Totals {
    fn add(&mut self, connection: &Connection) {
        let counters = connection.counters();
        self.requests += counters.requests;
        self.bytes_in += counters.bytes_in;
        self.bytes_out += counters.bytes_out;
    }
}

#[cfg(test)]
mod tests;
