//! What connections offer: their first octets, as the kernel hands them over.
//!
//! Input: pieces, by connection or, where the packet that ended the TCP handshake brought them, by addresses; opens and
//! closes. Output: protocols. Must never grow without bound, whatever strangers send.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::SocketAddr,
};

use crate::{
    ids::{ConnectionId, Protocol, Timestamp},
    observation::Socket,
    wire::assemblies::Assemblies,
};

/// Own address and the client's: names a connection that has no socket yet.
type Ends = (SocketAddr, SocketAddr);

/// So many whole hellos wait for their connection.
const WAITING: usize = 4_096;

/// The beginnings of all connections that are not classified.
#[derive(Clone, Debug, Default)]
pub struct Hellos {
    unfinished: Assemblies<ConnectionId>,
    /// Beginnings that came with the end of the TCP handshake.
    before: Assemblies<Ends>,
    /// Of these, what whole ones offer.
    whole: HashMap<Ends, Protocol>,
    order: VecDeque<Ends>,
    dropped: u64,
}

impl Hellos {
    /// A piece of a connection's stream: what it offers, once that is known.
    pub fn piece(&mut self, id: ConnectionId, offset: usize, piece: &[u8], now: Timestamp) -> Option<Protocol> {
        let answer = self.unfinished.add(id, offset, piece, now);
        answer.filter(|protocol| *protocol != Protocol::Unknown)
    }

    /// The first octets of a stream whose connection is not there yet.
    pub fn before_connection(
        &mut self,
        local: SocketAddr,
        remote: SocketAddr,
        offset: usize,
        piece: &[u8],
        now: Timestamp,
    ) {
        let ends = (local, remote);
        match self.before.add(ends, offset, piece, now) {
            None | Some(Protocol::Unknown) => {}
            Some(protocol) => {
                if self.whole.insert(ends, protocol).is_none() {
                    self.order.push_back(ends);
                }
                while self.order.len() > WAITING {
                    let oldest = self.order.pop_front();
                    let found = oldest.and_then(|oldest| self.whole.remove(&oldest));
                    self.dropped += u64::from(found.is_some());
                }
            }
        }
    }

    /// A connection opened: what came for it before.
    pub fn opened(&mut self, socket: &Socket, now: Timestamp) -> Option<Protocol> {
        let ends = (socket.local, socket.remote);
        if let Some(protocol) = self.whole.remove(&ends) {
            self.unfinished.forget(socket.id);
            return Some(protocol);
        }
        let begun = self.before.forget(ends)?;
        self.piece(socket.id, 0, begun.begun(), now)
    }

    /// A connection is gone.
    pub fn closed(&mut self, id: ConnectionId) {
        self.unfinished.forget(id);
    }

    /// Only these connections are there.
    pub fn keep(&mut self, live: &HashSet<ConnectionId>) {
        self.unfinished.keep(live);
    }

    /// Gives up what is too old.
    pub fn expire(&mut self, now: Timestamp) {
        self.unfinished.expire(now);
        self.before.expire(now);
    }

    /// How many were given up so far, for their age or for want of room.
    pub fn given_up(&self) -> u64 {
        self.unfinished.given_up() + self.before.given_up() + self.dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HTTP1: &[u8] = b"GET / HTTP/1.1\r\n";

    fn socket(id: u64) -> Socket {
        Socket {
            id: ConnectionId(id),
            local: "10.0.0.1:6443".parse().expect("an address"),
            remote: format!("10.1.0.1:{}", 1_000 + id % 60_000).parse().expect("an address"),
            bytes_in: 0,
            bytes_out: 0,
        }
    }

    fn at(ms: u64) -> Timestamp {
        Timestamp::from_millis(ms)
    }

    #[test]
    fn what_came_with_the_handshake_is_the_connections() {
        let mut hellos = Hellos::default();
        let (one, two) = (socket(1), socket(2));
        hellos.before_connection(one.local, one.remote, 0, HTTP1, at(0));
        assert_eq!(hellos.opened(&two, at(1)), None);
        assert_eq!(hellos.opened(&one, at(1)), Some(Protocol::Http1));
        assert_eq!(hellos.opened(&one, at(1)), None, "once");
        // The rest comes before it is known whose the beginning was, in the other ring.
        let record = [&[22, 3, 1, 0, 4, 1, 0, 0, 40][..], &[22, 3, 1, 0, 40], &[0; 40]].concat();
        let (first, rest) = record.split_at(12);
        hellos.before_connection(two.local, two.remote, 0, first, at(2));
        assert_eq!(hellos.piece(two.id, 12, rest, at(2)), None);
        assert_eq!(hellos.unfinished.len(), 1);
        hellos.opened(&two, at(2));
        assert!(hellos.unfinished.is_empty() && hellos.before.is_empty(), "it was whole");
    }

    #[test]
    fn strangers_without_a_connection_take_a_bounded_room() {
        let mut hellos = Hellos::default();
        for id in 0..3 * WAITING as u64 {
            let stranger = socket(id);
            hellos.before_connection(stranger.local, stranger.remote, 0, HTTP1, at(0));
            assert!(hellos.whole.len() <= WAITING && hellos.order.len() <= WAITING);
        }
        assert_eq!(hellos.given_up(), 2 * WAITING as u64);
    }
}
