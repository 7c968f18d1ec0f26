//! One connection's entry: who it is, how far it is, and its figures.
//!
//! Input: what the accepting side and the pump see. Output: figures for the list, and orders for the pump.
//! Must never keep more of what a client says about itself than [`USER_AGENT`] octets.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use rebalancer_core::wire::flow::{Flow, Flows, Slot};

use super::{
    Registry,
    heads::SMALL_HEAD,
    mailbox::{Mailbox, Order},
};
use crate::{
    relay::{renewal::FrontProxy, trust::Trust},
    shim::wire::{self, GoawayResult, Id, Outcome, Protocol, State},
};

/// How many octets of a user agent are kept: enough for every rule that goes by its beginning.
pub const USER_AGENT: usize = 256;

/// For so long a connection's further refusals say nothing new.
const SAME_REFUSAL: Duration = Duration::from_secs(10);

/// How far a connection is on its way out; it goes down this list only, but for an order that expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Telling {
    /// Nobody asked.
    Not,
    /// It is to be told with its next answer (HTTP/1.1), until then if a time is given: coarse milliseconds.
    Due {
        /// The end of the order.
        until: Option<u64>,
    },
    /// An order is on its way to the pump.
    Ordered,
    /// GOAWAY or `Connection: close` is written.
    Told,
    /// The last GOAWAY is written: no new stream is taken.
    Final,
}

/// What is known of a connection besides its figures.
#[derive(Debug)]
pub(super) struct Known {
    /// Whom the load balancer named.
    client: Option<SocketAddr>,
    user: Option<Box<str>>,
    user_agent: Option<Box<str>>,
    protocol: Protocol,
    /// HTTP/1.1: it speaks something else by now.
    upgraded: bool,
    /// HTTP/1.1: an answer's head has gone out and its body lasts.
    answering: bool,
    /// With which certificate it is served, where that says who asks.
    front_proxy: Option<FrontProxy>,
    pub(super) telling: Telling,
    pub(super) generation: u64,
    /// Coarse milliseconds when it was told.
    pub(super) told_at: u64,
    /// Coarse milliseconds when it ends, whatever is open.
    pub(super) leaves_by: Option<u64>,
    /// What each flow came to; none until something was asked.
    flows: Option<Box<Flows>>,
}

/// One connection's entry.
#[derive(Debug)]
pub struct Connection {
    id: Id,
    peer: SocketAddr,
    local: SocketAddr,
    accepted: Instant,
    known: Mutex<Known>,
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
    /// The registry's coarse time of the last refusal that was counted.
    refused_at: AtomicU64,
    /// Its number among those that hold a large head which is not whole; zero is none.
    pub(super) head: AtomicU64,
    /// What its certificate's acceptance rests on.
    trust: OnceLock<Trust>,
    mailbox: Mailbox,
    registry: Arc<Registry>,
}

/// What a connection is served by that was served before the front proxy's certificate changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outdated {
    /// When that certificate ends, in seconds since 1970.
    pub until: i64,
    /// It comes to the new one only when it goes; over HTTP/1.1 the apiserver is connected to anew between two requests.
    pub may_be_told: bool,
}

impl Connection {
    pub(super) fn new(registry: &Arc<Registry>, id: Id, peer: SocketAddr, local: SocketAddr) -> Self {
        Self {
            id,
            peer,
            local,
            accepted: Instant::now(),
            known: Mutex::new(Known {
                client: None,
                user: None,
                user_agent: None,
                protocol: Protocol::Unknown,
                upgraded: false,
                answering: false,
                front_proxy: None,
                telling: Telling::Not,
                generation: 0,
                told_at: 0,
                leaves_by: None,
                flows: None,
            }),
            requests: AtomicU64::new(0),
            open_streams: AtomicU32::new(0),
            open_watches: AtomicU32::new(0),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            changed: AtomicU64::new(registry.cursor.load(Relaxed)),
            counted: AtomicU64::new(0),
            active_at: AtomicU64::new(registry.coarse_ms()),
            refused_at: AtomicU64::new(0),
            head: AtomicU64::new(0),
            trust: OnceLock::new(),
            mailbox: Mailbox::default(),
            registry: Arc::clone(registry),
        }
    }

    pub(super) fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its socket's cookie.
    pub fn id(&self) -> Id {
        self.id
    }

    /// The client's address, as the socket has it or the load balancer named it.
    pub fn client(&self) -> SocketAddr {
        self.known().client.unwrap_or(self.peer)
    }

    /// The address it came to.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// The address at the other end of the socket.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// The load balancer named the client.
    pub fn set_client(&self, client: SocketAddr) {
        let client = SocketAddr::new(client.ip().to_canonical(), client.port());
        self.known().client = Some(client);
        self.touch();
    }

    /// TLS is done: what was selected, and who the certificate names.
    pub fn established(&self, protocol: Protocol, user: Option<&str>) {
        let mut known = self.known();
        debug_assert_eq!(known.protocol, Protocol::Unknown, "once a connection");
        known.user = user.map(Into::into);
        known.protocol = protocol;
        drop(known);
        self.touch();
        self.active();
    }

    /// Its certificate is believed, and why.
    pub fn set_trust(&self, trust: Trust) {
        // Set once, at the handshake.
        let _ = self.trust.set(trust);
    }

    /// The apiserver is shown that certificate for it.
    pub fn set_front_proxy(&self, certificate: FrontProxy) {
        self.known().front_proxy = Some(certificate);
    }

    /// With which certificate it is served, where that says who asks.
    pub fn front_proxy(&self) -> Option<FrontProxy> {
        self.known().front_proxy
    }

    /// By which certificate it is served, if that is of another issue and the apiserver will be asked something with it.
    pub(super) fn outdated(&self, issue: u64) -> Option<Outdated> {
        let known = self.known();
        let certificate = known.front_proxy.filter(|own| own.issue != issue)?;
        let is_h2 = known.protocol == Protocol::H2;
        // Who has been told asks nothing more on it, and after an upgrade nobody does. HTTP/1.1 is told with an answer, which comes
        // after another question.
        let asks = match known.telling {
            Telling::Told | Telling::Final => false,
            Telling::Due { until: None } | Telling::Ordered => !is_h2,
            _ => true,
        };
        let asks = asks && !known.upgraded;
        asks.then_some(Outdated {
            until: certificate.until,
            may_be_told: is_h2,
        })
    }

    /// When its own certificate ends, in seconds since 1970, if it is a user's that is believed.
    pub fn certificate_ends(&self) -> Option<i64> {
        self.trust.get().filter(|trust| trust.is_users()).map(Trust::leaf_ends)
    }

    /// Orders it to go, by nobody's decision that could be outdated.
    pub fn lets_go(&self) {
        self.order_goaway(0, None);
    }

    /// Whether what it is called rests on nothing, or on a certificate that is still good, now.
    pub fn is_believed(&self) -> bool {
        self.trust.get().is_none_or(Trust::holds)
    }

    /// Judges its certificate again; whether it is over.
    pub fn review(&self) -> bool {
        self.trust.get().is_some_and(|trust| !trust.review())
    }

    /// Another user agent was seen; the first [`USER_AGENT`] octets of it are kept.
    pub fn set_user_agent(&self, user_agent: &str) {
        let kept = &user_agent[..user_agent.floor_char_boundary(USER_AGENT)];
        let mut known = self.known();
        if known.user_agent.as_deref() != Some(kept) {
            known.user_agent = Some(kept.into());
            drop(known);
            self.touch();
        }
    }

    /// Newer figures of its streams.
    pub fn set_streams(&self, requests: u64, open: u32, watches: u32) {
        self.requests.store(requests, Relaxed);
        self.open_streams.store(open, Relaxed);
        self.open_watches.store(watches, Relaxed);
    }

    /// A request of HTTP/1.1 begins.
    pub fn begin_request(&self, watch: bool) {
        self.set_streams(self.requests.load(Relaxed) + 1, 1, u32::from(watch));
        self.with_flows(|flows| flows.opened(watch));
        self.add_bytes(0, 0);
    }

    /// Its request goes on as a stream of octets.
    pub fn begin_stream(&self) {
        self.set_streams(self.requests.load(Relaxed), 1, 0);
        self.with_flows(|flows| flows.opened(false));
    }

    /// The head of its answer has gone out, and its body lasts.
    pub fn set_answering(&self) {
        self.known().answering = true;
        self.touch();
    }

    /// It is over.
    pub fn end_request(&self) {
        self.set_streams(self.requests.load(Relaxed), 0, 0);
        self.with_flows(Flows::all_ended);
        self.add_bytes(0, 0);
        let mut known = self.known();
        if std::mem::take(&mut known.answering) {
            drop(known);
            self.touch();
        }
    }

    /// It speaks something else from now on.
    pub fn set_upgraded(&self) {
        self.known().upgraded = true;
        self.touch();
    }

    /// Newer figures of its flows.
    pub fn set_flows(&self, flows: &Flows) {
        self.with_flows(|own| own.copy_from(flows));
    }

    /// An answer of HTTP/1.1 begins: of which flow, and whether it refuses.
    pub fn begin_answer(&self, flow: Option<Flow>, refused: bool) -> Slot {
        // Of HTTP/1.1 one request is open at a time.
        let before = Slot::waiting(self.open_watches() > 0);
        self.with_flows(|flows| flows.answered(before, flow, refused, true))
    }

    /// Looks at what each flow came to, or adds to it.
    pub fn with_flows<T>(&self, look: impl FnOnce(&mut Flows) -> T) -> T {
        look(self.known().flows.get_or_insert_default())
    }

    /// The same, without changing anything; `None` where nothing was asked.
    pub(super) fn look_at_flows<T>(&self, look: impl FnOnce(&Flows) -> T) -> Option<T> {
        self.known().flows.as_deref().map(look)
    }

    /// The user its certificate names, and its user agent.
    pub(super) fn names(&self) -> (Option<Box<str>>, Option<Box<str>>) {
        let known = self.known();
        (known.user.clone(), known.user_agent.clone())
    }

    /// Streams open now.
    pub fn open_streams(&self) -> u32 {
        self.open_streams.load(Relaxed)
    }

    /// Of these, watches.
    pub fn open_watches(&self) -> u32 {
        self.open_watches.load(Relaxed)
    }

    /// The apiserver refused a request for overload. One client that goes on asking is none: it may be the only one that
    /// the apiserver throttles, and counts once in [`SAME_REFUSAL`].
    pub fn refused(&self) {
        // Zero is never.
        let now = self.registry.coarse_ms() + 1;
        let before = self.refused_at.load(Relaxed);
        if before == 0 || u128::from(now - before) >= SAME_REFUSAL.as_millis() {
            self.refused_at.store(now, Relaxed);
            self.registry.refused.fetch_add(1, Relaxed);
        }
    }

    /// It floods, and is read more slowly from now on. To be said once.
    pub fn slowed(&self) {
        self.registry.slowed(self.client());
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
        let mut known = self.known();
        if known.telling < Telling::Told {
            known.telling = Telling::Told;
            known.told_at = self.registry.coarse_ms();
            drop(known);
            self.touch();
            self.registry.outcome(self, Outcome::Draining, None);
        }
    }

    /// The last GOAWAY is written.
    pub fn set_final(&self) {
        self.set_draining();
        self.known().telling = Telling::Final;
    }

    /// Whether the answer whose head is about to be written says `Connection: close`; if so, it has been told.
    pub fn tell_with_answer(&self) -> bool {
        let now = self.registry.now_ms();
        match self.known().telling {
            Telling::Due { until } if until.is_none_or(|until| now < until) => {}
            _ => return false,
        }
        self.set_draining();
        true
    }

    /// So many octets of a head or of a handshake's message have come while it is not whole; zero when it is. To be said
    /// whenever it changes.
    pub fn hold(&self, octets: usize) {
        if octets > SMALL_HEAD || self.head.load(Relaxed) != 0 {
            self.registry.hold(self, octets);
        }
    }

    /// It is over; the entry goes.
    pub fn close(&self, reason: &str) {
        self.hold(0);
        self.registry.closed(self, reason);
    }

    /// Waits for an order. Dropped before it is ready, it has taken none.
    pub async fn ordered(&self) -> Order {
        self.mailbox.take().await
    }

    /// Waits until it is to close; other orders wait for the pump.
    pub async fn closing(&self) {
        self.mailbox.closing().await;
    }

    /// Leaves an order for the pump.
    pub fn order(&self, order: Order) {
        self.mailbox.put(order);
    }

    /// Orders GOAWAY, of the plan of that generation and for so long.
    pub(super) fn order_goaway(&self, generation: u64, expires_in: Option<Duration>) -> GoawayResult {
        let mut known = self.known();
        let result = match (known.protocol, known.telling) {
            (Protocol::Unknown, _) => GoawayResult::Unknown,
            (Protocol::Http1, _) if known.upgraded => GoawayResult::NotH2,
            (Protocol::Http1, Telling::Not | Telling::Due { .. }) => {
                let of_now = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
                let until = expires_in.map(|span| self.registry.now_ms().saturating_add(of_now(span)));
                known.telling = Telling::Due { until };
                GoawayResult::Pending
            }
            (Protocol::H2, Telling::Not) => {
                known.telling = Telling::Ordered;
                GoawayResult::Sent
            }
            (Protocol::H2 | Protocol::Http1, _) => GoawayResult::AlreadyDraining,
        };
        if matches!(result, GoawayResult::Pending | GoawayResult::Sent) {
            known.generation = generation;
        }
        drop(known);
        if result == GoawayResult::Sent {
            self.touch();
            self.order(Order::GoAway);
        }
        result
    }

    /// An order that nothing came of expires: it may be told another time. Says whether one did.
    pub(super) fn expire(&self, now: u64) -> bool {
        let mut known = self.known();
        let expired = matches!(known.telling, Telling::Due { until: Some(until) } if now >= until);
        if expired {
            known.telling = Telling::Not;
        }
        expired
    }

    /// What it speaks.
    pub fn protocol(&self) -> Protocol {
        self.known().protocol
    }

    pub(super) fn generation(&self) -> u64 {
        self.known().generation
    }

    /// Whether it was told, or is about to be.
    pub fn was_told(&self) -> bool {
        self.known().telling >= Telling::Ordered
    }

    pub(super) fn touch(&self) {
        self.changed.store(self.registry.cursor.load(Relaxed), Relaxed);
    }

    fn active(&self) {
        self.active_at.store(self.registry.coarse_ms(), Relaxed);
    }

    pub(super) fn active_at(&self) -> u64 {
        self.active_at.load(Relaxed)
    }

    pub(super) fn has_changed_since(&self, cursor: u64) -> bool {
        self.changed.load(Relaxed) >= cursor
    }

    pub(super) fn has_counted_since(&self, cursor: u64) -> bool {
        self.counted.load(Relaxed) >= cursor
    }

    /// Its figures.
    pub fn counters(&self) -> wire::Counters {
        wire::Counters {
            requests: self.requests.load(Relaxed),
            open_streams: self.open_streams(),
            open_watches: self.open_watches(),
            bytes_in: self.bytes_in.load(Relaxed),
            bytes_out: self.bytes_out.load(Relaxed),
        }
    }

    /// As the list shows it.
    pub fn shown(&self) -> wire::Connection {
        let known = self.known();
        wire::Connection {
            id: self.id,
            client: known.client.unwrap_or(self.peer),
            local: self.local,
            protocol: known.protocol,
            can_be_told: Some(match known.protocol {
                Protocol::Unknown => false,
                Protocol::H2 => true,
                Protocol::Http1 => !known.upgraded && !known.answering,
            }),
            state: if known.telling >= Telling::Ordered {
                State::Draining
            } else {
                State::Active
            },
            age_ms: u64::try_from(self.accepted.elapsed().as_millis()).unwrap_or(u64::MAX),
            user: known.user.as_deref().map(str::to_owned),
            user_agent: known.user_agent.as_deref().map(str::to_owned),
            counters: self.counters(),
        }
    }
}
