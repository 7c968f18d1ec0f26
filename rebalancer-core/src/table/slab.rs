//! Where connections lie: in chunks, so that a growing table is never copied, with an index by id.
//!
//! A free place in the first chunk that has one is taken first, so that after a storm of connections the last chunks empty
//! and go.
//! Beside each lies its key (see [`super::order`]), together with those of its neighbours: to go through all keys takes a
//! fraction of what it takes to go through all connections.
//! Must never show two connections of one id, nor one that was removed, nor keep a key that is not its connection's.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    connection::Connection,
    order::{Key, Turn, Wanted},
};
use crate::ids::{ConnectionId, Timestamp};

/// Connections in a chunk: a power of two.
pub(super) const CHUNK: usize = 4_096;

/// Connections by id.
#[derive(Clone, Debug, Default)]
pub(super) struct Slab {
    index: BTreeMap<ConnectionId, u32>,
    chunks: Vec<Chunk>,
    /// Chunks in which there is a place.
    roomy: BTreeSet<usize>,
}

/// Some connections, which are sampled together.
#[derive(Clone, Debug)]
pub(super) struct Chunk {
    connections: Vec<Option<Connection>>,
    keys: Vec<Key>,
    /// Their ids once more: those with equal keys go by them, and there may be many.
    ids: Vec<ConnectionId>,
    /// Places that were left.
    free: Vec<u16>,
    /// When their figures were sampled last.
    pub sampled_at: Option<Timestamp>,
}

impl Slab {
    pub fn contains(&self, id: ConnectionId) -> bool {
        self.index.contains_key(&id)
    }

    pub fn get(&self, id: ConnectionId) -> Option<&Connection> {
        self.at(*self.index.get(&id)?)
    }

    /// A connection to be changed, and its key, which whoever changes it has to renew.
    pub fn get_mut(&mut self, id: ConnectionId) -> Option<(&mut Connection, &mut Key)> {
        let slot = *self.index.get(&id)? as usize;
        let chunk = &mut self.chunks[slot / CHUNK];
        Some((chunk.connections[slot % CHUNK].as_mut()?, &mut chunk.keys[slot % CHUNK]))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Adds a connection whose id is not there yet.
    pub fn insert(&mut self, connection: Connection, key: Key) {
        let id = connection.id;
        let at = match self.roomy.first() {
            Some(at) => *at,
            None => {
                self.chunks.push(Chunk::new());
                self.roomy.insert(self.chunks.len() - 1);
                self.chunks.len() - 1
            }
        };
        let chunk = &mut self.chunks[at];
        let within = chunk.place(connection, key);
        if chunk.is_full() {
            self.roomy.remove(&at);
        }
        self.index.insert(id, (at * CHUNK + within) as u32);
    }

    pub fn remove(&mut self, id: ConnectionId) -> Option<Connection> {
        let slot = self.index.remove(&id)? as usize;
        let chunk = &mut self.chunks[slot / CHUNK];
        chunk.keys[slot % CHUNK] = Key::NONE;
        chunk.free.push((slot % CHUNK) as u16);
        let removed = chunk.connections[slot % CHUNK].take();
        self.roomy.insert(slot / CHUNK);
        // One that is empty is kept, or the next connection would bring it back.
        while let [.., last_but_one, last] = self.chunks.as_slice()
            && last_but_one.is_empty()
            && last.is_empty()
        {
            self.chunks.pop();
            self.roomy.remove(&self.chunks.len());
        }
        removed
    }

    /// By id.
    pub fn iter(&self) -> impl Iterator<Item = &Connection> {
        self.index.values().filter_map(|slot| self.at(*slot))
    }

    /// All ids in order, each with its slot for [`Self::slot_mut`].
    pub fn slots(&self) -> impl Iterator<Item = (ConnectionId, u32)> {
        self.index.iter().map(|(id, slot)| (*id, *slot))
    }

    /// What lies in a slot; only for what no key tells.
    pub fn slot_mut(&mut self, slot: u32) -> Option<&mut Connection> {
        self.chunks[slot as usize / CHUNK].connections[slot as usize % CHUNK].as_mut()
    }

    /// In any order, the fastest way through all.
    pub fn scan(&self) -> impl Iterator<Item = &Connection> {
        self.chunks.iter().flat_map(|chunk| &chunk.connections).flatten()
    }

    /// How many chunks there are.
    pub fn chunks(&self) -> usize {
        self.chunks.len()
    }

    /// One of them, to be sampled.
    pub fn chunk_mut(&mut self, at: usize) -> &mut Chunk {
        &mut self.chunks[at]
    }

    /// The first of those that are wanted, in order: fewer than are wanted are all there are.
    pub fn first(&self, wanted: &Wanted) -> Vec<&Connection> {
        let count = wanted.count.max(1);
        let mut first: Vec<(Turn, u32)> = Vec::with_capacity(self.len().min(2 * count));
        let mut last = None;
        for (at, chunk) in self.chunks.iter().enumerate() {
            for (within, key) in chunk.keys.iter().enumerate() {
                if last.is_some_and(|(last, _)| key.is_beyond(last)) {
                    continue;
                }
                let Some(place) = wanted.place_of(*key) else { continue };
                let turn = (place, chunk.ids[within]);
                if last.is_some_and(|last| turn > last) || wanted.beyond.is_some_and(|beyond| turn <= beyond) {
                    continue;
                }
                first.push((turn, (at * CHUNK + within) as u32));
                if first.len() == 2 * count {
                    let (_, (turn, _), _) = first.select_nth_unstable(count - 1);
                    last = Some(*turn);
                    first.truncate(count);
                }
            }
        }
        first.sort_unstable();
        first.truncate(count);
        first.into_iter().filter_map(|(_, slot)| self.at(slot)).collect()
    }

    /// Those that were opened at that time or later, in any order.
    pub fn opened_since(&self, since: Timestamp) -> impl Iterator<Item = &Connection> {
        let may_be = move |key: &Key| key.opened_at().is_none_or(|at| at >= since);
        let found = self
            .chunks
            .iter()
            .flat_map(Chunk::scan)
            .filter(move |(key, _)| may_be(key));
        let found = found.filter_map(|(_, connection)| connection.as_ref());
        found.filter(move |connection| connection.opened_at >= since)
    }

    /// How many are opened later than that, of those that may be told: by their keys.
    pub fn opened_after(&self, until: Timestamp) -> usize {
        let is_late = |key: &&Key| key.may_be_told() && key.opened_at().is_some_and(|at| at > until);
        let keys = self.chunks.iter().flat_map(|chunk| &chunk.keys);
        keys.filter(is_late).count()
    }

    /// Whether each key is its connection's.
    #[cfg(test)]
    pub fn keys_are_true(&self, node_local: crate::policy::NodeLocal) -> bool {
        let is_true = |(key, connection): (&Key, &Option<Connection>)| {
            let of = |connection: &Connection| Key::of(connection, node_local);
            *key == connection.as_ref().map_or(Key::NONE, of)
        };
        self.chunks.iter().flat_map(Chunk::scan).all(is_true)
    }

    fn at(&self, slot: u32) -> Option<&Connection> {
        self.chunks[slot as usize / CHUNK].connections[slot as usize % CHUNK].as_ref()
    }
}

impl Chunk {
    fn new() -> Self {
        Self {
            connections: Vec::with_capacity(CHUNK),
            keys: Vec::with_capacity(CHUNK),
            ids: Vec::with_capacity(CHUNK),
            free: Vec::new(),
            sampled_at: None,
        }
    }

    fn is_full(&self) -> bool {
        self.free.is_empty() && self.keys.len() == CHUNK
    }

    fn is_empty(&self) -> bool {
        self.free.len() == self.keys.len()
    }

    /// Puts a connection in a free place, and says in which.
    fn place(&mut self, connection: Connection, key: Key) -> usize {
        let id = connection.id;
        match self.free.pop() {
            Some(within) => {
                let within = usize::from(within);
                self.connections[within] = Some(connection);
                self.keys[within] = key;
                self.ids[within] = id;
                within
            }
            None => {
                debug_assert!(self.keys.len() < CHUNK, "a full chunk has no place");
                self.connections.push(Some(connection));
                self.keys.push(key);
                self.ids.push(id);
                self.keys.len() - 1
            }
        }
    }

    /// All places, each with its key.
    fn scan(&self) -> impl Iterator<Item = (&Key, &Option<Connection>)> {
        self.keys.iter().zip(&self.connections)
    }

    /// All of them to be changed, each with its key.
    pub fn scan_mut(&mut self) -> impl Iterator<Item = (&mut Connection, &mut Key)> {
        let both = self.connections.iter_mut().zip(&mut self.keys);
        both.filter_map(|(connection, key)| Some((connection.as_mut()?, key)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{super::connection::Shown, *};
    use crate::{observation::Socket, policy::NodeLocal};

    fn insert(slab: &mut Slab, id: u64) {
        let local = "10.0.0.1:6443".parse().expect("an address");
        let socket = Socket {
            id: ConnectionId(id),
            local,
            remote: format!("10.1.0.1:{}", 1_000 + id % 60_000).parse().expect("an address"),
            bytes_in: 0,
            bytes_out: 0,
            start: 0,
        };
        let connection = Connection::new(&socket, Arc::new(local), Timestamp::from_millis(id), Shown::Opened);
        let key = Key::of(&connection, NodeLocal::Exclude);
        slab.insert(connection, key);
    }

    /// What a storm of connections needed is given back, and who was there before and after it is found all the same.
    #[test]
    fn after_a_storm_the_room_is_given_back() {
        let mut slab = Slab::default();
        let storm = 10 * CHUNK as u64;
        // Every thousandth is one that stays.
        for id in 0..storm {
            insert(&mut slab, id);
        }
        assert_eq!(slab.chunks(), 10);
        for id in (0..storm).filter(|id| id % 1_000 != 0) {
            assert_eq!(slab.remove(ConnectionId(id)).map(|gone| gone.id.0), Some(id));
        }
        assert_eq!(slab.chunks(), 10, "each has one that stays");
        // They come and go, as clients do: those that come lie in the first.
        for id in (0..storm).filter(|id| id % 1_000 == 0) {
            insert(&mut slab, storm + id);
            slab.remove(ConnectionId(id));
        }
        assert!(slab.chunks() <= 2, "{} chunks for {}", slab.chunks(), slab.len());
        assert!(slab.keys_are_true(NodeLocal::Exclude));
        let ids: Vec<u64> = slab.iter().map(|connection| connection.id.0).collect();
        let expected: Vec<u64> = (0..storm).filter(|id| id % 1_000 == 0).map(|id| storm + id).collect();
        assert_eq!(ids, expected);
        assert!(slab.scan().count() == expected.len() && slab.len() == expected.len());
        // At the edge of a chunk nothing is made and thrown away again and again.
        for id in 0..2 * CHUNK as u64 {
            insert(&mut slab, id);
        }
        let chunks = slab.chunks();
        for _ in 0..10 {
            slab.remove(ConnectionId(2 * CHUNK as u64 - 1));
            insert(&mut slab, 2 * CHUNK as u64 - 1);
            assert_eq!(slab.chunks(), chunks);
        }
    }
}
