//! What the edges tell the core about connections: the kernel's view and the shim's view.
//!
//! Job: the closed list of things a source or a shim may say.
//! Output: values the connection table applies.
//! Must never carry more than was seen: what is unknown stays `None` or [`Protocol::Unknown`].

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

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
    /// TCP sequence number of the client's first octet; 0 where the source does not tell.
    pub start: u32,
}

/// How a ClientHello was lost: its connection stays unknown until a shim names its protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HelloLoss {
    /// The ring buffer was full.
    Ring,
    /// The kernel had no room beside the socket.
    Storage,
    /// It came in more pieces or octets than one connection may take of the ring.
    Pieces,
    /// Unfinished ones took all the room there is, or were never finished.
    Unfinished,
    /// Its connection was not shown, and others came after it.
    Early,
    /// What came through the ring was no record.
    Malformed,
}

impl HelloLoss {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Ring,
        Self::Storage,
        Self::Pieces,
        Self::Unfinished,
        Self::Early,
        Self::Malformed,
    ];

    /// As one word, for metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::Storage => "storage",
            Self::Pieces => "pieces",
            Self::Unfinished => "unfinished",
            Self::Early => "early",
            Self::Malformed => "malformed",
        }
    }
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
    /// The kernel's list of live connections, read while events went on: it brings the byte counters, and what it shows
    /// twice and no event told is a repair (see [`crate::table::Repairs`]).
    ///
    /// A source tells every event from before it read the list first, and those from while it did right after.
    Listed {
        /// Every live connection on the watched port, as far as it did not come or go meanwhile.
        sockets: Vec<Socket>,
        /// The cookie of the listening socket.
        listener: Option<ConnectionId>,
    },
    /// The addresses of the node itself, whose clients would come straight back.
    Addresses(Vec<IpAddr>),
    /// Events were lost: until the next [`Observation::Resync`] the table is not to be trusted.
    Lost {
        /// How many.
        events: u64,
    },
    /// ClientHellos were lost.
    HellosLost {
        /// How.
        how: HelloLoss,
        /// How many, or how many pieces of them.
        count: u64,
    },
    /// Why no ClientHello is read, or `None`: protocols are known from a shim then, or not at all.
    Blind(Option<Arc<str>>),
    /// Why it is not known whose connections on the port are the apiserver's, or `None`: they are.
    SharedPort(Option<Arc<str>>),
    /// The kernel's complete list of live connections, and whether anyone listens on the port.
    Resync {
        /// Every live connection on the watched port.
        sockets: Vec<Socket>,
        /// The cookie of the listening socket: another one means another server process.
        listener: Option<ConnectionId>,
    },
}
