//! One connection, kept small: a table may hold a million of them.
//!
//! Job: what is known of one connection. Input: the table's changes. Output: answers about it.
//! Must never own text: who a client is, is shared between its connections.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use crate::{
    ids::{ConnectionId, Protocol, Timestamp},
    observation::Socket,
    policy::Weight,
    shim::{ConnectionState, Counters},
};

/// One live client connection.
#[derive(Clone, Debug, PartialEq)]
pub struct Connection {
    /// The socket's cookie.
    pub id: ConnectionId,
    /// When it was first seen.
    pub opened_at: Timestamp,
    /// Figures since it was opened.
    pub counters: Counters,
    /// Figures a second, smoothed (see [`super::ConnectionTable::sample`]).
    pub rates: Rates,
    /// What it speaks.
    pub protocol: Protocol,
    /// How far it is.
    pub state: ConnectionState,
    /// Whether `opened_at` is when the agent started to look, so that the connection is older than that.
    pub seeded: bool,
    /// Whether it was seen to be opened, or a shim said how old it is.
    pub(super) is_dated: bool,
    /// Whether a shim listed it.
    pub(super) is_with_shim: bool,
    /// Whether it can be told to go now: by its shim's word, else by what it speaks.
    pub(super) can_be_told: bool,
    /// Whether the client is on this node: it would come straight back.
    pub(super) node_local: bool,
    /// Whether it is counted apart, because it is on this node.
    pub(super) apart: bool,
    /// Whether it is open for long enough to be a client that stays.
    pub(super) stays: bool,
    /// Whether it was counted as a landing.
    landed: bool,
    /// Whether its shim was asked to tell it: it may end before that is answered.
    pub(super) is_asked: bool,
    pub(super) sampled: Sampled,
    pub(super) client: Address,
    pub(super) local: Arc<SocketAddr>,
    pub(super) identity: Option<Arc<Identity>>,
}

/// How a connection came to be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shown {
    /// As it was opened.
    Opened,
    /// By the first list: it is older than the agent.
    Seeded,
    /// By a later list: when it was opened was missed.
    Late,
}

/// A connection that a shim knows for so much longer than the source was shown late. What is on its way between the three is
/// less.
const LATE: Duration = Duration::from_secs(2);

/// Totals at the last sample.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Sampled {
    /// Whether there is a base to count from.
    pub is_set: bool,
    /// Whether that is when it was opened: its first sample is of its whole age.
    pub is_from_birth: bool,
    /// What the samples so far weigh together, from 0 to 1.
    pub share: f32,
    pub requests: u64,
    pub bytes: u64,
}

/// Who is behind a connection, as far as the shim sees it; shared by all connections of the same client.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    /// The user.
    pub user: Option<Arc<str>>,
    /// The user agent.
    pub user_agent: Option<Arc<str>>,
}

/// A socket address in 18 bytes rather than 32; IPv4 as its mapped IPv6 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    ip: [u8; 16],
    port: u16,
}

/// Figures a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// Requests a second.
    pub requests: f64,
    /// Bytes a second, both directions.
    pub bytes: f64,
}

/// Names a client across its connections.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ClientKey {
    /// The user, told by the shim. Not the user agent: one client may have many over one transport, a controller each.
    User(Arc<str>),
    /// Without a user: the address with its port, that is this one connection.
    ///
    /// The address alone would not do: behind a proxying load balancer it is the balancer's, and everyone's.
    Address(SocketAddr),
}

impl Connection {
    /// One that was just shown.
    pub(super) fn new(socket: &Socket, local: Arc<SocketAddr>, now: Timestamp, shown: Shown) -> Self {
        let seeded = shown == Shown::Seeded;
        Self {
            id: socket.id,
            client: socket.remote.into(),
            local,
            protocol: Protocol::Unknown,
            state: ConnectionState::Active,
            opened_at: now,
            seeded,
            is_dated: shown == Shown::Opened,
            node_local: false,
            apart: false,
            // Who was there before the agent has stayed.
            stays: seeded,
            landed: false,
            is_asked: false,
            is_with_shim: false,
            can_be_told: true,
            identity: None,
            counters: Counters {
                bytes_in: socket.bytes_in,
                bytes_out: socket.bytes_out,
                ..Counters::default()
            },
            rates: Rates::default(),
            sampled: Sampled {
                is_set: shown == Shown::Opened,
                is_from_birth: shown == Shown::Opened,
                share: 0.0,
                requests: 0,
                bytes: socket.bytes_in + socket.bytes_out,
            },
        }
    }

    /// The client, or a proxying load balancer in front of it.
    pub fn client(&self) -> SocketAddr {
        self.client.into()
    }

    /// The address it was accepted on.
    pub fn local(&self) -> SocketAddr {
        *self.local
    }

    /// The user, where the shim sees it.
    pub fn user(&self) -> Option<&str> {
        self.identity.as_ref()?.user.as_deref()
    }

    /// The user agent, where the shim sees it.
    pub fn user_agent(&self) -> Option<&str> {
        self.identity.as_ref()?.user_agent.as_deref()
    }

    /// Whether a shim listed it.
    pub fn is_with_shim(&self) -> bool {
        self.is_with_shim
    }

    /// Whether the client is on this node.
    pub fn is_node_local(&self) -> bool {
        self.node_local
    }

    /// Whether it could hear that it is to go: not draining, which has heard it, nor one whose shim cannot tell it, such as
    /// HTTP/1.1 in the middle of an answer. Without a shim nobody can tell HTTP/1.1.
    pub fn can_hear(&self) -> bool {
        self.state == ConnectionState::Active && self.can_be_told
    }

    /// A shim says how old it is: it may be older than the agent, and than the agent's clock, or than the list that showed it
    /// after its opening was missed. Then its figures are of all that time.
    pub(super) fn is_known_to_be(&mut self, age: Duration, now: Timestamp) {
        let opened_at = now.back(age);
        self.is_dated = true;
        if self.seeded {
            self.opened_at = self.opened_at.min(opened_at);
        } else if opened_at + LATE < self.opened_at {
            self.opened_at = opened_at;
            self.rates = Rates::default();
            self.sampled = Sampled {
                is_set: true,
                is_from_birth: true,
                ..Sampled::default()
            };
        }
    }

    /// Whether it is older than the agent's clock can say.
    pub fn is_older_than_the_clock(&self) -> bool {
        self.seeded && self.opened_at == Timestamp::default()
    }

    /// Whether it is a client that stays: it can hear a GOAWAY, and was there before the agent or is open for a while
    /// (see [`super::ConnectionTable::new`]). A health check is not.
    pub fn is_settled(&self) -> bool {
        self.can_hear() && self.stays
    }

    /// Whether it could become load: it can hear a GOAWAY and is not counted apart, however young.
    pub(super) fn is_a_client(&self) -> bool {
        self.can_hear() && !self.apart
    }

    /// Whether it counts as load: a client that stays, and is not counted apart because it is on this node.
    pub fn is_active(&self) -> bool {
        self.is_settled() && !self.apart
    }

    /// Whether it is a landing from now on, once: it counts as load, is known for what it speaks and came after the agent.
    pub(super) fn lands(&mut self) -> bool {
        let is_known = self.protocol != Protocol::Unknown;
        let lands = !self.landed && !self.seeded && is_known && self.is_active();
        self.landed |= lands;
        lands
    }

    /// Whether its end is that of a client whom nobody told, nor was asked to tell: it has counted as load, whether or not it could have heard a GOAWAY
    /// at its end.
    pub(super) fn departs(&self) -> bool {
        let was_there = self.seeded && self.stays && !self.apart && self.protocol != Protocol::Unknown;
        self.state == ConnectionState::Active && !self.is_asked && (self.landed || was_there)
    }

    /// What it weighs.
    pub fn load(&self, weight: Weight) -> f64 {
        weight.of(self)
    }

    /// Who the client is, as far as is known.
    pub fn client_key(&self) -> ClientKey {
        match self.identity.as_ref().and_then(|identity| identity.user.as_ref()) {
            Some(user) => ClientKey::User(Arc::clone(user)),
            None => ClientKey::Address(self.client()),
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        let ip = match address.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        Self {
            ip: ip.octets(),
            port: address.port(),
        }
    }
}

impl From<Address> for SocketAddr {
    fn from(address: Address) -> Self {
        let ip = Ipv6Addr::from(address.ip);
        // Sources and shims hand over mapped addresses as IPv4, so that nothing else is mapped.
        let ip = ip
            .to_ipv4_mapped()
            .map_or(IpAddr::V6(ip), |ip: Ipv4Addr| IpAddr::V4(ip));
        Self::new(ip, address.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_back() {
        for text in ["192.0.2.7:6443", "[2001:db8::7]:1", "[::1]:65535"] {
            let address: SocketAddr = text.parse().expect("an address");
            assert_eq!(SocketAddr::from(Address::from(address)), address);
        }
    }

    #[test]
    fn a_connection_is_small() {
        let size = size_of::<Connection>();
        assert!(size <= 144, "{size} bytes");
    }
}
