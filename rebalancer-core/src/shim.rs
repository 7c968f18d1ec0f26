//! What a shim tells of its connections, and what it is ordered to do.
//!
//! Input and output: none; these are values. Wire forms belong to the shell.

use std::{net::SocketAddr, time::Duration};

use crate::{
    ids::{ConnectionId, Protocol},
    release::Release,
};

/// How far a connection is in its life, as the shim knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConnectionState {
    /// New streams are welcome.
    Active,
    /// GOAWAY is sent, old streams are still open.
    Draining,
}

/// Figures of one connection since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Streams opened.
    pub requests: u64,
    /// Streams open now.
    pub open_streams: u32,
    /// Of these, watches.
    pub open_watches: u32,
    /// Bytes from the client.
    pub bytes_in: u64,
    /// Bytes to the client.
    pub bytes_out: u64,
}

/// What a shim can do: the core asks this, never which shim it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// Whether a victim hears its GOAWAY at its next request and not at once: those that ask nothing come last.
    pub tells_at_request: bool,
    /// How long an order may take to be carried out.
    pub order_expiry: Duration,
    /// Whether it sees streams end, and so who is idle.
    pub sees_ends: bool,
    /// Whether it names all whom it can tell: of others nothing need be known.
    pub names_all: bool,
}

impl Default for Abilities {
    /// Those of a shim that holds the connection itself, such as the relay.
    fn default() -> Self {
        Self {
            tells_at_request: false,
            order_expiry: Duration::from_secs(10),
            sees_ends: true,
            names_all: true,
        }
    }
}

impl Abilities {
    /// Those of a probe on the apiserver's own decision: a victim is told at its next request, and most make one within
    /// half a minute.
    pub const AT_REQUEST: Self = Self {
        tells_at_request: true,
        order_expiry: Duration::from_secs(30),
        sees_ends: false,
        names_all: false,
    };
}

/// One connection, as the shim knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShimConnection {
    /// The socket's cookie.
    pub id: ConnectionId,
    /// The client's address.
    pub client: SocketAddr,
    /// The address it was accepted on.
    pub local: SocketAddr,
    /// What was selected.
    pub protocol: Protocol,
    /// Whether it can be told to go: over HTTP/2 by GOAWAY, over HTTP/1.1 by `Connection: close` in its next answer,
    /// where the shim can write that and the connection was not upgraded.
    pub can_be_told: bool,
    /// How far it is.
    pub state: ConnectionState,
    /// How old it is, where the shim knows: a connection may be older than the agent.
    pub age: Option<Duration>,
    /// The user, where the shim sees it.
    pub user: Option<String>,
    /// The user agent of a request; the first that is heard counts.
    pub user_agent: Option<String>,
    /// Its figures.
    pub counters: Counters,
}

/// What a shim says when asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShimReport {
    /// Names the shim's process: another value means it restarted.
    pub instance: String,
    /// The highest generation it has carried out: a restarted agent goes on above it.
    pub generation: u64,
    /// What it can do.
    pub abilities: Abilities,
    /// Whether `connections` is the whole list.
    pub full: bool,
    /// Connections that changed.
    pub connections: Vec<ShimConnection>,
    /// Connections that ended.
    pub closed: Vec<ConnectionId>,
    /// Newer figures of connections that did not otherwise change.
    pub counters: Vec<(ConnectionId, Counters)>,
    /// Whether the server behind it answers; `None` when the shim does not know.
    pub upstream_ready: Option<bool>,
    /// Which release the server behind it is; `None` when the shim does not know it now.
    pub release: Option<Release>,
    /// Names the listening socket of the server behind it, where that is on this host: another one is another process.
    pub upstream_listener: Option<u64>,
    /// Whether nobody listens where it should: it is being restarted, or is down.
    pub upstream_gone: bool,
    /// Whether the server behind it answers later than a check waits, or says that it has too much to do: it is up, and its
    /// clients are its own.
    pub upstream_overloaded: bool,
    /// Requests that the server behind it refused for overload since the shim started (429 or 503, and when to come
    /// again); `None` when it does not see answers.
    pub refused_total: Option<u64>,
}

/// Send GOAWAY to just these connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GoawayOrder {
    /// Of the plan it belongs to; a shim refuses lower ones than it has seen.
    pub generation: u64,
    /// Not to be carried out later than this.
    pub expires_in: Duration,
    /// Who.
    pub victims: Vec<ConnectionId>,
}

/// What became of one order for one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum GoawayResult {
    /// GOAWAY is sent.
    Sent,
    /// It will be sent with the answer to the connection's next request; another result follows then, or when it expires.
    Pending,
    /// The order expired before the connection made a request.
    Expired,
    /// It had one before.
    AlreadyDraining,
    /// The shim does not know this connection: it is gone.
    Unknown,
    /// It cannot be told: it speaks HTTP/1.1, and the shim cannot write into its answers or it was upgraded.
    NotH2,
}
