//! Names, ids and instants as types, and the two small enums that everything speaks of.
//!
//! Input and output: none; these are values.
//! Must never grow behaviour that belongs to the module that owns a rule.

use std::{fmt, ops::Add, sync::Arc, time::Duration};

/// One apiserver, named by its node. Cheap to clone: every view holds all of them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ApiserverName(Arc<str>);

impl ApiserverName {
    /// Takes the name as the node spells it.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ApiserverName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One TCP connection accepted on the apiserver's port, named by its socket cookie.
///
/// The kernel gives a cookie once per socket and network namespace generation (`sock_gen_cookie`, net/core/sock_diag.c)
/// and never again, so kernel programs, `sock_diag`, `SO_COOKIE` and the shims agree on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// An instant on a monotonic clock, in milliseconds since an origin that the caller chose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(u64);

impl Timestamp {
    /// The instant `ms` milliseconds after the origin.
    pub const fn from_millis(ms: u64) -> Self {
        Self(ms)
    }

    /// So long before; the origin where that is before it.
    pub fn back(self, by: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(by.as_millis()).unwrap_or(u64::MAX)))
    }

    /// Milliseconds since the origin.
    pub const fn as_millis(self) -> u64 {
        self.0
    }

    /// The time from `earlier` to this instant; zero when `earlier` is later.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Timestamp {
    type Output = Self;

    fn add(self, rhs: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(rhs.as_millis()).unwrap_or(u64::MAX)),
        )
    }
}

/// What a connection speaks, as far as is known.
///
/// The kernel sees what a client *offers* in its ClientHello; a shim knows what the server *selected*.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// Not seen yet: the connection is older than the agent, or its ClientHello was lost.
    Unknown,
    /// HTTP/1.1, or anything else that cannot hear a GOAWAY.
    Http1,
    /// The ClientHello offered `h2`: a Go server selects it.
    H2Offered,
    /// A shim saw HTTP/2 selected.
    H2Selected,
}

/// Which shim sends the GOAWAY on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ShimKind {
    /// The TLS front door that relays frames.
    Relay,
    /// The uprobe on the stock apiserver's own decision.
    Steer,
    /// None: decisions are made and shown, nothing is sent.
    None,
}
