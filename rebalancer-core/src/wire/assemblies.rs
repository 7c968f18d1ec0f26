//! The ClientHellos that are not whole yet, of all connections.
//!
//! Input: pieces by connection, ends of connections, and `now`. Output: protocols.
//! Must never hold more than [`OCTETS`] octets, whatever strangers send: the oldest are given up, and counted.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    hash::Hash,
    time::Duration,
};

use crate::{
    ids::{Protocol, Timestamp},
    wire::hello::Assembly,
};

/// Octets of all of them together, what it takes to keep each included.
pub const OCTETS: usize = 8 << 20;

/// What keeping one takes, beside its octets.
const EACH: usize = 160;

/// A hello that is not whole after that time is given up: whole ones take a round trip.
pub(super) const OLDEST: Duration = Duration::from_secs(10);

/// Unfinished hellos, by what names their connections.
#[derive(Clone, Debug)]
pub struct Assemblies<K> {
    known: HashMap<K, (Timestamp, Assembly)>,
    /// In the order in which they began; some are gone.
    order: VecDeque<(Timestamp, K)>,
    octets: usize,
    given_up: u64,
}

impl<K> Default for Assemblies<K> {
    fn default() -> Self {
        Self {
            known: HashMap::new(),
            order: VecDeque::new(),
            octets: 0,
            given_up: 0,
        }
    }
}

impl<K: Copy + Eq + Hash> Assemblies<K> {
    /// Takes a piece; `Some` once the answer is known, and the connection is forgotten then.
    pub fn add(&mut self, key: K, offset: usize, piece: &[u8], now: Timestamp) -> Option<Protocol> {
        let (_, assembly) = self.known.entry(key).or_insert_with(|| {
            self.order.push_back((now, key));
            self.octets += EACH;
            (now, Assembly::default())
        });
        let before = assembly.held();
        let answer = assembly.add(offset, piece);
        self.octets = self.octets - before + assembly.held();
        // Pieces without a beginning are what came after a hello that was whole.
        self.given_up += u64::from(assembly.is_given_up() && !assembly.begun().is_empty());
        if answer.is_some() {
            self.forget(key);
        }
        self.bound();
        answer
    }

    /// The connection is gone, or its protocol is known otherwise.
    pub fn forget(&mut self, key: K) -> Option<Assembly> {
        let (_, assembly) = self.known.remove(&key)?;
        self.octets -= EACH + assembly.held();
        if self.order.len() > 2 * self.known.len() + 1_024 {
            let known = &self.known;
            self.order
                .retain(|(at, key)| known.get(key).is_some_and(|(began, _)| began == at));
        }
        Some(assembly)
    }

    /// Only these connections are there.
    pub fn keep(&mut self, live: &HashSet<K>) {
        let gone: Vec<K> = self.known.keys().filter(|key| !live.contains(key)).copied().collect();
        for key in gone {
            self.forget(key);
        }
    }

    /// Gives up what is too old.
    pub fn expire(&mut self, now: Timestamp) {
        while let Some((began, _)) = self.order.front()
            && now.since(*began) >= OLDEST
        {
            self.give_up_oldest();
        }
    }

    /// How many were given up, for their age, for want of room, or because one alone would have taken too much.
    pub fn given_up(&self) -> u64 {
        self.given_up
    }

    /// How many are unfinished.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether none is unfinished.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    fn bound(&mut self) {
        while self.octets > OCTETS && !self.order.is_empty() {
            self.give_up_oldest();
        }
        debug_assert!(self.octets <= OCTETS, "{} octets are held", self.octets);
    }

    fn give_up_oldest(&mut self) {
        let Some((at, key)) = self.order.pop_front() else {
            return;
        };
        // An older entry of a key that began again says nothing about the newer.
        if self.known.get(&key).is_some_and(|(began, _)| *began == at) {
            // Pieces without a beginning are what came after a hello that was whole.
            let lost = self.forget(key).is_some_and(|assembly| !assembly.begun().is_empty());
            self.given_up += u64::from(lost);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(ms: u64) -> Timestamp {
        Timestamp::from_millis(ms)
    }

    fn held<K>(assemblies: &Assemblies<K>) -> usize {
        let each = assemblies.known.values().map(|(_, assembly)| EACH + assembly.held());
        each.sum()
    }

    #[test]
    fn strangers_fill_it_to_its_bound_and_the_oldest_go_first() {
        let mut assemblies = Assemblies::default();
        // A record of the greatest length, all of it but the last octet, from each of them; and pieces far ahead.
        let mut hello = vec![0; 16_000];
        hello[..9].copy_from_slice(&[22, 3, 1, 0x3f, 0xff, 1, 0, 0x3f, 0xfb]);
        for key in 0..16_384_u64 {
            assert_eq!(assemblies.add(key, 0, &hello, at(key)), None);
            assert_eq!(assemblies.add(key, 16_200, &[7; 100], at(key)), None);
            assert_eq!(assemblies.octets, held(&assemblies));
            assert!(assemblies.octets <= OCTETS);
        }
        assert!(assemblies.len() > 300 && assemblies.known.contains_key(&16_383) && !assemblies.known.contains_key(&0));
        assert_eq!(assemblies.given_up() as usize, 16_384 - assemblies.len());
        assemblies.keep(&HashSet::from([16_383, 16_382]));
        assert_eq!(assemblies.len(), 2);
        assemblies.expire(at(16_382) + OLDEST);
        assert_eq!(assemblies.len(), 1);
        assemblies.forget(16_383);
        assert_eq!((assemblies.octets, assemblies.order.len() < 2_000), (0, true));
    }

    #[test]
    fn one_that_takes_too_much_is_counted() {
        let mut assemblies = Assemblies::default();
        let hello = [22, 3, 1, 0x3f, 0xff, 1, 0, 0x3f, 0xfb];
        // More pieces ahead than are kept, and a piece beyond what a hello may be.
        assert_eq!(assemblies.add(1, 0, &hello, at(0)), None);
        for ahead in 0..16 {
            assert_eq!(assemblies.add(1, 100 + 2 * ahead, &[7], at(0)), None);
        }
        assert_eq!(assemblies.add(1, 200, &[7], at(0)), Some(Protocol::Unknown));
        assert_eq!(assemblies.add(2, 0, &hello, at(0)), None);
        assert_eq!(assemblies.add(2, 16_380, &[7; 100], at(0)), Some(Protocol::Unknown));
        assert_eq!((assemblies.given_up(), assemblies.len()), (2, 0));
        // What follows a hello that was whole is none.
        assert_eq!(assemblies.add(3, 16_380, &[7; 100], at(0)), Some(Protocol::Unknown));
        assert_eq!(assemblies.given_up(), 2);
    }

    proptest! {
        #[test]
        fn the_octets_are_what_is_held(pieces in prop::collection::vec((0_u8..6, 0_usize..6_000, 0_usize..3_000, any::<bool>()), 0..60)) {
            let mut assemblies = Assemblies::default();
            for (time, (key, offset, length, ends)) in pieces.into_iter().enumerate() {
                let mut piece = vec![0; length];
                if offset == 0 && length > 5 {
                    piece[..5].copy_from_slice(&[22, 3, 1, 0x20, 0]);
                }
                let answer = assemblies.add(key, offset, &piece, at(time as u64 * 500));
                prop_assert!(answer.is_none() || !assemblies.known.contains_key(&key));
                if ends {
                    assemblies.forget(key);
                }
                assemblies.expire(at(time as u64 * 500));
                prop_assert_eq!(assemblies.octets, held(&assemblies));
            }
        }
    }
}
