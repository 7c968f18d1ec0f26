//! Where connections lie: in chunks, so that a growing table is never copied, with an index by id.
//!
//! Beside each lies its key (see [`super::order`]), together with those of its neighbours: to go through all keys takes a
//! fraction of what it takes to go through all connections.
//! Must never show two connections of one id, nor one that was removed, nor keep a key that is not its connection's.

use std::collections::BTreeMap;

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
    free: Vec<u32>,
}

/// Some connections, which are sampled together.
#[derive(Clone, Debug)]
pub(super) struct Chunk {
    connections: Vec<Option<Connection>>,
    keys: Vec<Key>,
    /// Their ids once more: those with equal keys go by them, and there may be many.
    ids: Vec<ConnectionId>,
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
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                if self.chunks.last().is_none_or(|chunk| chunk.keys.len() == CHUNK) {
                    self.chunks.push(Chunk::new());
                }
                let before = (self.chunks.len() - 1) * CHUNK;
                let last = self.chunks.last_mut().expect("a chunk was pushed if there was none");
                last.connections.push(None);
                last.keys.push(Key::NONE);
                last.ids.push(id);
                (before + last.keys.len() - 1) as u32
            }
        };
        let chunk = &mut self.chunks[slot as usize / CHUNK];
        chunk.connections[slot as usize % CHUNK] = Some(connection);
        chunk.keys[slot as usize % CHUNK] = key;
        chunk.ids[slot as usize % CHUNK] = id;
        self.index.insert(id, slot);
    }

    pub fn remove(&mut self, id: ConnectionId) -> Option<Connection> {
        let slot = self.index.remove(&id)?;
        self.free.push(slot);
        let chunk = &mut self.chunks[slot as usize / CHUNK];
        chunk.keys[slot as usize % CHUNK] = Key::NONE;
        chunk.connections[slot as usize % CHUNK].take()
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
        let mut first: Vec<(Turn, u32)> = Vec::with_capacity(2 * count);
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
            sampled_at: None,
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
