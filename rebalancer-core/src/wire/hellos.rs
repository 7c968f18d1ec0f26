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
    wire::{
        assemblies::{Assemblies, OLDEST},
        hello::may_begin,
    },
};

/// Own address, the client's, and the TCP sequence number of the client's first octet: names a connection that has no socket
/// yet, and no earlier one of the same addresses, whose end may have been missed.
pub type Ends = (SocketAddr, SocketAddr, u32);

/// So many whole hellos wait for their connection.
const WAITING: usize = 4_096;

/// The beginnings of all connections that are not classified.
#[derive(Clone, Debug, Default)]
pub struct Hellos {
    unfinished: Assemblies<ConnectionId>,
    /// Beginnings that came with the end of the TCP handshake.
    before: Assemblies<Ends>,
    /// Of these, what whole ones offer, and since when.
    whole: HashMap<Ends, (Timestamp, Protocol)>,
    /// In the order in which they came; some are gone.
    order: VecDeque<(Timestamp, Ends)>,
    dropped: u64,
}

impl Hellos {
    /// A piece of a connection's stream: what it offers, once that is known.
    pub fn piece(&mut self, id: ConnectionId, offset: usize, piece: &[u8], now: Timestamp) -> Option<Protocol> {
        let answer = self.unfinished.add(id, offset, piece, now);
        answer.filter(|protocol| *protocol != Protocol::Unknown)
    }

    /// A part of a stream whose connection is not there yet.
    pub fn before_connection(&mut self, ends: Ends, offset: usize, piece: &[u8], now: Timestamp) {
        if offset == 0 && !may_begin(piece) {
            return;
        }
        match self.before.add(ends, offset, piece, now) {
            None | Some(Protocol::Unknown) => {}
            Some(protocol) => {
                self.whole.insert(ends, (now, protocol));
                self.order.push_back((now, ends));
                while self.order.len() > WAITING {
                    self.dropped += u64::from(self.forget_oldest());
                }
            }
        }
    }

    /// A connection opened: what came for it before.
    pub fn opened(&mut self, socket: &Socket, now: Timestamp) -> Option<Protocol> {
        let ends = (socket.local, socket.remote, socket.start);
        if let Some((_, protocol)) = self.whole.remove(&ends) {
            self.unfinished.forget(socket.id);
            return Some(protocol);
        }
        let begun = self.before.forget(ends)?;
        begun
            .pieces()
            .find_map(|(offset, piece)| self.piece(socket.id, offset, piece, now))
    }

    /// These connections are there: what came before for those of them whose opening nobody told.
    pub fn listed(&mut self, sockets: &[Socket], now: Timestamp) -> Vec<(ConnectionId, Protocol)> {
        if self.whole.is_empty() && self.before.is_empty() {
            return Vec::new();
        }
        let mut found = Vec::new();
        for socket in sockets {
            found.extend(self.opened(socket, now).map(|protocol| (socket.id, protocol)));
        }
        found
    }

    /// No more comes of a connection's beginning: whether its hello is lost by that.
    pub fn cut_off(&mut self, id: ConnectionId) -> bool {
        // Pieces without a beginning are what came after a hello that was whole.
        let begun = self.unfinished.forget(id);
        begun.is_some_and(|begun| !begun.begun().is_empty())
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
        // A connection that never came, whose address another one may have by and by: nothing is lost.
        while let Some((came, _)) = self.order.front()
            && now.since(*came) >= OLDEST
        {
            self.forget_oldest();
        }
    }

    /// Whether the oldest of those that were whole was still waiting.
    fn forget_oldest(&mut self) -> bool {
        let Some((came, ends)) = self.order.pop_front() else {
            return false;
        };
        let waits = self.whole.get(&ends).is_some_and(|(since, _)| *since == came);
        if waits {
            self.whole.remove(&ends);
        }
        waits
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
            start: id as u32,
        }
    }

    fn ends(socket: &Socket) -> Ends {
        (socket.local, socket.remote, socket.start)
    }

    fn at(ms: u64) -> Timestamp {
        Timestamp::from_millis(ms)
    }

    #[test]
    fn what_came_with_the_handshake_is_the_connections() {
        let mut hellos = Hellos::default();
        let (one, two) = (socket(1), socket(2));
        hellos.before_connection(ends(&one), 0, HTTP1, at(0));
        assert_eq!(hellos.opened(&two, at(1)), None);
        assert_eq!(hellos.opened(&one, at(1)), Some(Protocol::Http1));
        assert_eq!(hellos.opened(&one, at(1)), None, "once");
        // The rest comes before it is known whose the beginning was, in the other ring.
        let record = [&[22, 3, 1, 0, 4, 1, 0, 0, 40][..], &[22, 3, 1, 0, 40], &[0; 40]].concat();
        let (first, rest) = record.split_at(12);
        hellos.before_connection(ends(&two), 0, first, at(2));
        assert_eq!(hellos.piece(two.id, 12, rest, at(2)), None);
        assert_eq!(hellos.unfinished.len(), 1);
        hellos.opened(&two, at(2));
        assert!(hellos.unfinished.is_empty() && hellos.before.is_empty(), "it was whole");
    }

    /// A hello that is not of use beyond its length: it offers nothing that is known.
    fn record() -> Vec<u8> {
        [
            &[22, 3, 1, 0, 44, 1, 0, 0, 40, 3, 3][..],
            &[7; 32],
            &[0, 0, 2, 0x13, 1, 0],
        ]
        .concat()
    }

    #[test]
    fn a_later_part_that_comes_first_is_none_of_another_protocol() {
        let mut hellos = Hellos::default();
        let one = socket(1);
        let record = record();
        let (first, second) = record.split_at(20);
        // As the kernel places it, and as it cannot where it does not say where the stream begins.
        hellos.before_connection(ends(&one), 20, second, at(0));
        hellos.before_connection(ends(&one), 0, second, at(0));
        assert_eq!(hellos.opened(&one, at(1)), None);
        let said = hellos.piece(one.id, 0, first, at(1));
        assert_eq!(said, Some(Protocol::Http1), "both parts together");
    }

    #[test]
    fn a_list_shows_whose_the_beginnings_are_when_no_event_does() {
        let mut hellos = Hellos::default();
        let (one, two) = (socket(1), socket(2));
        assert_eq!(hellos.listed(&[one.clone(), two.clone()], at(0)), []);
        hellos.before_connection(ends(&two), 0, HTTP1, at(0));
        assert_eq!(
            hellos.listed(&[one.clone(), two.clone()], at(1)),
            [(two.id, Protocol::Http1)]
        );
        assert_eq!(hellos.listed(&[one, two], at(2)), []);
    }

    /// Events were lost: nobody has told that the first one ended.
    #[test]
    fn what_came_for_an_earlier_connection_is_not_the_next_ones_who_has_the_address() {
        let mut hellos = Hellos::default();
        let earlier = socket(1);
        let next = Socket {
            id: ConnectionId(2),
            start: earlier.start + 1,
            ..earlier.clone()
        };
        hellos.before_connection(ends(&earlier), 0, HTTP1, at(0));
        let record = record();
        hellos.before_connection(ends(&earlier), 0, &record[..20], at(0));
        assert_eq!(hellos.opened(&next, at(1)), None);
        assert_eq!(hellos.listed(std::slice::from_ref(&next), at(1)), []);
        assert_eq!(hellos.unfinished.len(), 0, "nor is its beginning");
        assert_eq!(hellos.opened(&earlier, at(2)), Some(Protocol::Http1));
    }

    #[test]
    fn what_nobody_came_for_is_not_the_next_ones_who_has_the_address() {
        let mut hellos = Hellos::default();
        let one = socket(1);
        hellos.before_connection(ends(&one), 0, HTTP1, at(0));
        hellos.expire(at(0) + OLDEST);
        assert_eq!(hellos.opened(&one, at(10_001)), None);
        assert_eq!((hellos.given_up(), hellos.order.len()), (0, 0));
        // One that comes again is as old as it is then.
        hellos.before_connection(ends(&one), 0, HTTP1, at(20_000));
        hellos.before_connection(ends(&one), 0, HTTP1, at(25_000));
        hellos.expire(at(20_000) + OLDEST);
        assert_eq!(hellos.opened(&one, at(30_001)), Some(Protocol::Http1));
    }

    #[test]
    fn only_a_hello_that_is_not_whole_is_cut_off() {
        let mut hellos = Hellos::default();
        let (one, two) = (socket(1), socket(2));
        assert_eq!(hellos.piece(one.id, 0, &record()[..30], at(0)), None);
        assert!(hellos.cut_off(one.id));
        assert!(!hellos.cut_off(one.id), "once");
        // It was whole with the end of the handshake, and more came after it.
        hellos.before_connection(ends(&two), 0, HTTP1, at(0));
        assert_eq!(hellos.opened(&two, at(0)), Some(Protocol::Http1));
        assert_eq!(hellos.piece(two.id, 400, HTTP1, at(0)), None);
        assert!(!hellos.cut_off(two.id));
        assert_eq!(hellos.given_up(), 0);
    }

    #[test]
    fn strangers_without_a_connection_take_a_bounded_room() {
        let mut hellos = Hellos::default();
        for id in 0..3 * WAITING as u64 {
            let stranger = socket(id);
            hellos.before_connection(ends(&stranger), 0, HTTP1, at(0));
            assert!(hellos.whole.len() <= WAITING && hellos.order.len() <= WAITING);
        }
        assert_eq!(hellos.given_up(), 2 * WAITING as u64);
    }
}
