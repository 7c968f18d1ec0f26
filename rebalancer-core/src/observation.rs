//! What the edges tell the core about connections: the kernel's view and the shim's view.
//!
//! Job: the closed list of things a source or a shim may say.
//! Output: values the connection table applies.
//! Must never carry more than was seen: what is unknown stays `None` or [`Protocol::Unknown`].

use std::net::SocketAddr;

use crate::ids::{ConnectionId, Protocol};

/// One live TCP connection on a watched port, as the kernel tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// The socket's cookie.
    pub id: ConnectionId,
    /// The address it was accepted on (v4-mapped addresses are given as IPv4).
    pub local: SocketAddr,
    /// The address of the peer, which behind a proxying load balancer is the balancer's.
    pub remote: SocketAddr,
    /// Bytes received from the client so far.
    pub bytes_in: u64,
    /// Bytes the client has acknowledged so far.
    pub bytes_out: u64,
}

/// What a source (`ebpf` or `sockdiag`) says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observation {
    /// A connection was accepted.
    Opened(Socket),
    /// What its ClientHello offers is known now.
    Classified {
        /// Which connection.
        id: ConnectionId,
        /// What it offers.
        protocol: Protocol,
    },
    /// A connection is gone.
    Closed {
        /// Which connection.
        id: ConnectionId,
        /// Bytes received in its life.
        bytes_in: u64,
        /// Bytes acknowledged in its life.
        bytes_out: u64,
    },
    /// The byte counters of live connections, for `--weight bytes`.
    Counters(Vec<(ConnectionId, u64, u64)>),
    /// Events were lost: until the next [`Observation::Resync`] the table is not to be trusted.
    Lost {
        /// How many.
        events: u64,
    },
    /// The kernel's complete list of live connections, and whether anyone listens on the port.
    Resync {
        /// Every live connection on the watched port.
        sockets: Vec<Socket>,
        /// The cookie of the listening socket: another one means another server process.
        listener: Option<ConnectionId>,
    },
}
