//! Every connection of the relay, its figures, and the orders it was given.
//!
//! Job: the one place where the accepting side, the pumps and the control socket meet.
//! Must never make a pump wait: figures are atomics, and an order is a flag and a wake-up.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use super::trust::Trust;
use crate::shim::wire::{self, GoawayResult, Id, Outcome, OutcomeEntry, Protocol, State, Upstream};

/// How many ended connections and outcomes are remembered: an agent that polls less often than this asks for all.
const REMEMBERED: usize = 65_536;

/// How long a client may take to answer the PING between the two GOAWAYs.
const ANSWER: Duration = Duration::from_secs(10);

/// How long a new HTTP/1.1 connection is given for its first request when the process ends.
const FIRST_REQUEST: Duration = Duration::from_secs(10);

/// For so long a connection's further refusals say nothing new.
const SAME_REFUSAL: Duration = Duration::from_secs(10);

const GO_AWAY: u8 = 1;
const CLOSE: u8 = 2;
const HAND_OVER: u8 = 4;
const CONCLUDE: u8 = 8;

/// One connection's entry.
#[derive(Debug)]
pub struct Connection {
    id: Id,
    peer: SocketAddr,
    /// Whom the load balancer named.
    client: OnceLock<SocketAddr>,
    local: SocketAddr,
    accepted: Instant,
    protocol: AtomicU8,
    draining: AtomicU8,
    generation: AtomicU64,
    user: OnceLock<String>,
    user_agent: Mutex<Option<String>>,
    requests: AtomicU64,
    open_streams: AtomicU32,
    open_watches: AtomicU32,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    /// The registry's cursor when something other than a figure changed.
    changed: AtomicU64,
    /// The registry's cursor when a figure changed.
    counted: AtomicU64,
    /// The registry's coarse time of the last byte.
    active_at: AtomicU64,
    /// The registry's coarse time of the GOAWAY.
    told_at: AtomicU64,
    /// The registry's coarse time of the last refusal that was counted.
    refused_at: AtomicU64,
    /// The last GOAWAY is written: no new stream is taken.
    final_said: AtomicBool,
    /// How many watches may be ended so far.
    handover: AtomicU32,
    /// What its certificate's acceptance rests on.
    trust: OnceLock<Trust>,
    signal: AtomicU8,
    wake: Notify,
    registry: Arc<Registry>,
}

/// What a pump is told from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Say GOAWAY.
    GoAway,
    /// End so many watches, those that were ended before included.
    HandOver(u32),
    /// Say the last GOAWAY although the client has not answered the first.
    Conclude,
    /// Close now.
    Close,
}

/// All connections of this process.
#[derive(Debug)]
pub struct Registry {
    instance: String,
    began: Instant,
    cursor: AtomicU64,
    coarse_ms: AtomicU64,
    upstream: AtomicU8,
    /// Refusals for overload, each connection's once in [`SAME_REFUSAL`].
    refused: AtomicU64,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    open: HashMap<u64, Arc<Connection>>,
    closed: VecDeque<(u64, Id)>,
    /// Cursors below this one are too old: what ended since is forgotten.
    forgotten: u64,
    generation: u64,
    outcomes: VecDeque<OutcomeEntry>,
    next_outcome: u64,
}

/// An order of a plan that has been overtaken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("generation {asked} is lower than {seen}, which was carried out before")]
pub struct Overtaken {
    asked: u64,
    seen: u64,
}

impl Registry {
    /// Without connections; `instance` names this process.
    pub fn new(instance: String) -> Arc<Self> {
        Arc::new(Self {
            instance,
            began: Instant::now(),
            cursor: AtomicU64::new(1),
            coarse_ms: AtomicU64::new(0),
            upstream: AtomicU8::new(Upstream::Unknown as u8),
            refused: AtomicU64::new(0),
            inner: Mutex::default(),
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
        let connection = Arc::new(Connection {
            id: Id(cookie),
            peer: client,
            client: OnceLock::new(),
            local,
            accepted: Instant::now(),
            protocol: AtomicU8::new(Protocol::Unknown as u8),
            draining: AtomicU8::new(0),
            generation: AtomicU64::new(0),
            user: OnceLock::new(),
            user_agent: Mutex::default(),
            requests: AtomicU64::new(0),
            open_streams: AtomicU32::new(0),
            open_watches: AtomicU32::new(0),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            changed: AtomicU64::new(self.cursor.load(Relaxed)),
            counted: AtomicU64::new(0),
            active_at: AtomicU64::new(self.coarse_ms.load(Relaxed)),
            told_at: AtomicU64::new(0),
            refused_at: AtomicU64::new(0),
            final_said: AtomicBool::new(false),
            handover: AtomicU32::new(0),
            trust: OnceLock::new(),
            signal: AtomicU8::new(0),
            wake: Notify::new(),
            registry: Arc::clone(self),
        });
        self.inner().open.insert(cookie, Arc::clone(&connection));
        connection
    }

    /// What the health check saw.
    pub fn set_upstream(&self, upstream: Upstream) {
        self.upstream.store(upstream as u8, Relaxed);
    }

    /// What the health check saw last.
    pub fn upstream(&self) -> Upstream {
        [
            Upstream::Unknown,
            Upstream::Ready,
            Upstream::Starting,
            Upstream::Unreachable,
        ]
        .into_iter()
        .find(|state| *state as u8 == self.upstream.load(Relaxed))
        .unwrap_or(Upstream::Unknown)
    }

    /// The list for the control socket: what changed since a cursor of this instance, or everything.
    pub fn list(&self, since: Option<(&str, u64)>, counters: bool) -> wire::Connections {
        // Entries that change while the list is made carry this cursor or a later one: the next list has them.
        let cursor = self.cursor.fetch_add(1, Relaxed);
        let inner = self.inner();
        let since = since
            .filter(|(instance, since)| *instance == self.instance && *since >= inner.forgotten && *since <= cursor)
            .map(|(_, since)| since);
        let from = since.unwrap_or(0);
        let mut list = wire::Connections {
            shim: "relay".into(),
            instance: self.instance.clone(),
            cursor,
            full: since.is_none(),
            generation: inner.generation,
            upstream: self.upstream(),
            refused_total: Some(self.refused.load(Relaxed)),
            connections: Vec::new(),
            closed: Vec::new(),
            counters: Vec::new(),
        };
        for connection in inner.open.values() {
            if since.is_none() || connection.changed.load(Relaxed) >= from {
                list.connections.push(connection.shown());
            } else if counters && connection.counted.load(Relaxed) >= from {
                list.counters.push(wire::Counted {
                    id: connection.id,
                    counters: connection.counters(),
                });
            }
        }
        if since.is_some() {
            let ended = inner.closed.iter().rev().take_while(|(at, _)| *at >= from);
            list.closed = ended.map(|(_, id)| *id).collect();
        }
        list
    }

    /// Gives the order of a plan to its victims.
    ///
    /// # Errors
    ///
    /// [`Overtaken`] when a later plan's order came before.
    pub fn go_away(&self, generation: u64, victims: &[Id]) -> Result<Vec<wire::Answered>, Overtaken> {
        let mut inner = self.inner();
        if generation < inner.generation {
            return Err(Overtaken {
                asked: generation,
                seen: inner.generation,
            });
        }
        inner.generation = generation;
        let answer = |id: &Id| {
            let result = match inner.open.get(&id.0) {
                None => GoawayResult::Unknown,
                Some(connection) => connection.order_goaway(generation),
            };
            wire::Answered { id: *id, result }
        };
        Ok(victims.iter().map(answer).collect())
    }

    /// Tells up to `count` connections to go, because this process is going; idle HTTP/1.1 ones are closed.
    pub fn go_away_some(&self, count: usize) {
        let mut told = 0;
        for connection in self.inner().open.values() {
            if told == count {
                break;
            }
            if connection.order_goaway(0) == GoawayResult::Sent {
                told += 1;
            } else if connection.protocol() == Protocol::Http1
                && connection.open_streams.load(Relaxed) == 0
                // One whose first request is still on its way would see it fail.
                && (connection.requests() > 0 || connection.accepted.elapsed() > FIRST_REQUEST)
            {
                connection.order(CLOSE);
            }
        }
    }

    /// The connections that take no new streams, with their open watches.
    pub fn handing_over(&self) -> Vec<(u64, u32)> {
        let inner = self.inner();
        let told = inner
            .open
            .values()
            .filter(|connection| connection.final_said.load(Relaxed));
        told.map(|connection| (connection.id.0, connection.open_watches.load(Relaxed)))
            .collect()
    }

    /// Lets a connection end so many watches, those that were ended before included.
    pub fn hand_over(&self, id: u64, total: u32) {
        if let Some(connection) = self.inner().open.get(&id) {
            connection.handover.store(total, Relaxed);
            connection.order(HAND_OVER);
        }
    }

    /// Moves the coarse clock on, and closes what has been idle or draining for too long.
    pub fn sweep(&self, idle: Duration, drain: Duration) {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.coarse_ms.store(now, Relaxed);
        let older = |at: u64, limit: Duration| u128::from(now.saturating_sub(at)) > limit.as_millis();
        for connection in self.inner().open.values() {
            let draining = connection.is_draining() && older(connection.told_at.load(Relaxed), drain);
            let unanswered = connection.is_draining() && !connection.final_said.load(Relaxed);
            if unanswered && older(connection.told_at.load(Relaxed), ANSWER) {
                connection.order(CONCLUDE);
            }
            let silent = connection.open_streams.load(Relaxed) == 0
                && connection.protocol() != Protocol::Unknown
                && older(connection.active_at.load(Relaxed), idle);
            if draining || silent {
                connection.order(CLOSE);
            }
        }
    }

    /// Judges every connection's certificate again, because those who vouch have changed; how many are over.
    pub fn review(&self) -> usize {
        let open: Vec<Arc<Connection>> = self.inner().open.values().cloned().collect();
        let over = open
            .iter()
            .filter(|connection| connection.trust.get().is_some_and(|trust| !trust.review()));
        let over: Vec<_> = over.collect();
        for connection in &over {
            connection.tell_distrusted();
        }
        over.len()
    }

    /// Tells clients to go whose certificate is over. Their requests are refused since then; they come back, and are asked
    /// again.
    pub fn tell_distrusted(&self) {
        let open: Vec<Arc<Connection>> = self.inner().open.values().cloned().collect();
        for connection in open.iter().filter(|connection| !connection.is_believed()) {
            connection.tell_distrusted();
        }
    }

    /// Outcomes from a sequence number on.
    pub fn outcomes(&self, since: u64) -> wire::Outcomes {
        let inner = self.inner();
        wire::Outcomes {
            instance: self.instance.clone(),
            next: inner.next_outcome,
            outcomes: inner
                .outcomes
                .iter()
                .filter(|entry| entry.seq >= since)
                .cloned()
                .collect(),
        }
    }

    fn outcome(&self, connection: &Connection, outcome: Outcome, reason: Option<&str>) {
        let mut inner = self.inner();
        let seq = inner.next_outcome;
        inner.next_outcome += 1;
        if inner.outcomes.len() == REMEMBERED {
            inner.outcomes.pop_front();
        }
        inner.outcomes.push_back(OutcomeEntry {
            seq,
            id: connection.id,
            generation: connection.generation.load(Relaxed),
            outcome,
            reason: reason.map(str::to_owned),
        });
    }
}

/// `draining`: nobody said GOAWAY; an order is on its way; GOAWAY is written.
const ACTIVE: u8 = 0;
const ORDERED: u8 = 1;
const TOLD: u8 = 2;

impl Connection {
    /// The client's address, as the socket has it or the load balancer named it.
    pub fn client(&self) -> SocketAddr {
        self.client.get().copied().unwrap_or(self.peer)
    }

    /// The address it came to.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// The load balancer named the client.
    pub fn set_client(&self, client: SocketAddr) {
        // Set once, before anything else is known.
        let _ = self.client.set(client);
        self.touch();
    }

    /// TLS is done: what was selected, and who the certificate names.
    pub fn established(&self, protocol: Protocol, user: Option<&str>) {
        if let Some(user) = user {
            // Set once, here.
            let _ = self.user.set(user.to_owned());
        }
        self.protocol.store(protocol as u8, Relaxed);
        self.touch();
        self.active();
    }

    /// Its certificate is believed, and why.
    pub fn set_trust(&self, trust: Trust) {
        // Set once, at the handshake.
        let _ = self.trust.set(trust);
    }

    /// Whether what it is called rests on nothing, or on a certificate that is still good, now.
    pub fn is_believed(&self) -> bool {
        self.trust.get().is_none_or(Trust::holds)
    }

    /// Another user agent was seen.
    pub fn set_user_agent(&self, user_agent: String) {
        *self.user_agent.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(user_agent);
        self.touch();
    }

    /// Newer figures of its streams.
    pub fn set_streams(&self, requests: u64, open: u32, watches: u32) {
        self.requests.store(requests, Relaxed);
        self.open_streams.store(open, Relaxed);
        self.open_watches.store(watches, Relaxed);
    }

    /// Streams or requests so far.
    pub fn requests(&self) -> u64 {
        self.requests.load(Relaxed)
    }

    /// The apiserver refused a request for overload. One client that goes on asking is none: it may be the only one that
    /// the apiserver throttles, and counts once in [`SAME_REFUSAL`].
    pub fn refused(&self) {
        // Zero is never.
        let now = self.registry.coarse_ms.load(Relaxed) + 1;
        let before = self.refused_at.load(Relaxed);
        if before == 0 || u128::from(now - before) >= SAME_REFUSAL.as_millis() {
            self.refused_at.store(now, Relaxed);
            self.registry.refused.fetch_add(1, Relaxed);
        }
    }

    /// Octets went through.
    pub fn add_bytes(&self, from_client: usize, to_client: usize) {
        self.bytes_in.fetch_add(from_client as u64, Relaxed);
        self.bytes_out.fetch_add(to_client as u64, Relaxed);
        self.counted.store(self.registry.cursor.load(Relaxed), Relaxed);
        self.active();
    }

    /// GOAWAY is written, by order or by the server itself.
    pub fn set_draining(&self) {
        if self.draining.swap(TOLD, Relaxed) != TOLD {
            self.told_at.store(self.registry.coarse_ms.load(Relaxed), Relaxed);
            self.touch();
            self.registry.outcome(self, Outcome::Draining, None);
        }
    }

    /// The last GOAWAY is written.
    pub fn set_final(&self) {
        self.final_said.store(true, Relaxed);
    }

    /// It is over; the entry goes.
    pub fn close(&self, reason: &str) {
        if self.is_told() {
            self.registry.outcome(self, Outcome::Closed, Some(reason));
        }
        let mut inner = self.registry.inner();
        let cursor = self.registry.cursor.load(Relaxed);
        inner.open.remove(&self.id.0);
        if inner.closed.len() == REMEMBERED
            && let Some((at, _)) = inner.closed.pop_front()
        {
            inner.forgotten = at + 1;
        }
        inner.closed.push_back((cursor, self.id));
    }

    /// Waits for an order.
    pub async fn ordered(&self) -> Order {
        loop {
            let woken = self.wake.notified();
            let signal = self.signal.load(Relaxed);
            if signal & CLOSE != 0 {
                return Order::Close;
            }
            if signal & GO_AWAY != 0 {
                self.signal.fetch_and(!GO_AWAY, Relaxed);
                return Order::GoAway;
            }
            if signal & CONCLUDE != 0 {
                self.signal.fetch_and(!CONCLUDE, Relaxed);
                return Order::Conclude;
            }
            if signal & HAND_OVER != 0 {
                self.signal.fetch_and(!HAND_OVER, Relaxed);
                return Order::HandOver(self.handover.load(Relaxed));
            }
            woken.await;
        }
    }

    fn order(&self, signal: u8) {
        self.signal.fetch_or(signal, Relaxed);
        self.wake.notify_one();
    }

    fn tell_distrusted(&self) {
        if self.order_goaway(0) == GoawayResult::NotH2 && self.open_streams.load(Relaxed) == 0 {
            self.order(CLOSE);
        }
    }

    fn order_goaway(&self, generation: u64) -> GoawayResult {
        match self.protocol() {
            Protocol::Unknown => GoawayResult::Unknown,
            Protocol::Http1 => GoawayResult::NotH2,
            Protocol::H2 if self.is_told() => GoawayResult::AlreadyDraining,
            Protocol::H2 => {
                self.draining.store(ORDERED, Relaxed);
                self.generation.store(generation, Relaxed);
                self.touch();
                self.order(GO_AWAY);
                GoawayResult::Sent
            }
        }
    }

    fn protocol(&self) -> Protocol {
        [Protocol::Unknown, Protocol::H2, Protocol::Http1]
            .into_iter()
            .find(|protocol| *protocol as u8 == self.protocol.load(Relaxed))
            .unwrap_or(Protocol::Unknown)
    }

    fn is_told(&self) -> bool {
        self.draining.load(Relaxed) != ACTIVE
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Relaxed) == TOLD
    }

    fn touch(&self) {
        self.changed.store(self.registry.cursor.load(Relaxed), Relaxed);
    }

    fn active(&self) {
        self.active_at.store(self.registry.coarse_ms.load(Relaxed), Relaxed);
    }

    fn counters(&self) -> wire::Counters {
        wire::Counters {
            requests: self.requests.load(Relaxed),
            open_streams: self.open_streams.load(Relaxed),
            open_watches: self.open_watches.load(Relaxed),
            bytes_in: self.bytes_in.load(Relaxed),
            bytes_out: self.bytes_out.load(Relaxed),
        }
    }

    fn shown(&self) -> wire::Connection {
        wire::Connection {
            id: self.id,
            client: self.client(),
            local: self.local,
            protocol: self.protocol(),
            can_be_told: Some(self.protocol() == Protocol::H2),
            state: if self.is_told() { State::Draining } else { State::Active },
            age_ms: u64::try_from(self.accepted.elapsed().as_millis()).unwrap_or(u64::MAX),
            user: self.user.get().cloned(),
            user_agent: self
                .user_agent
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner())
                .clone(),
            counters: self.counters(),
        }
    }
}
