//! Where connections lie: in chunks, so that a growing table is never copied, with an index by id.
//!
//! Must never show two connections of one id, nor one that was removed.

use std::collections::BTreeMap;

use super::connection::Connection;
use crate::ids::ConnectionId;

/// Connections in a chunk: a power of two.
const CHUNK: usize = 4_096;

/// Connections by id.
#[derive(Clone, Debug, Default)]
pub(super) struct Slab {
    index: BTreeMap<ConnectionId, u32>,
    chunks: Vec<Vec<Option<Connection>>>,
    free: Vec<u32>,
}

impl Slab {
    pub fn contains(&self, id: ConnectionId) -> bool {
        self.index.contains_key(&id)
    }

    pub fn get(&self, id: ConnectionId) -> Option<&Connection> {
        self.at(*self.index.get(&id)?)
    }

    pub fn get_mut(&mut self, id: ConnectionId) -> Option<&mut Connection> {
        let slot = *self.index.get(&id)? as usize;
        self.chunks[slot / CHUNK][slot % CHUNK].as_mut()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Adds a connection whose id is not there yet.
    pub fn insert(&mut self, connection: Connection) {
        let id = connection.id;
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                if self.chunks.last().is_none_or(|chunk| chunk.len() == CHUNK) {
                    self.chunks.push(Vec::with_capacity(CHUNK));
                }
                let before = (self.chunks.len() - 1) * CHUNK;
                let last = self.chunks.last_mut().expect("a chunk was pushed if there was none");
                last.push(None);
                (before + last.len() - 1) as u32
            }
        };
        self.chunks[slot as usize / CHUNK][slot as usize % CHUNK] = Some(connection);
        self.index.insert(id, slot);
    }

    pub fn remove(&mut self, id: ConnectionId) -> Option<Connection> {
        let slot = self.index.remove(&id)?;
        self.free.push(slot);
        self.chunks[slot as usize / CHUNK][slot as usize % CHUNK].take()
    }

    /// By id.
    pub fn iter(&self) -> impl Iterator<Item = &Connection> {
        self.index.values().filter_map(|slot| self.at(*slot))
    }

    /// All ids in order, each with its slot for [`Self::slot_mut`].
    pub fn slots(&self) -> impl Iterator<Item = (ConnectionId, u32)> {
        self.index.iter().map(|(id, slot)| (*id, *slot))
    }

    /// What lies in a slot.
    pub fn slot_mut(&mut self, slot: u32) -> Option<&mut Connection> {
        self.chunks[slot as usize / CHUNK][slot as usize % CHUNK].as_mut()
    }

    /// In any order, the fastest way through all.
    pub fn scan(&self) -> impl Iterator<Item = &Connection> {
        self.chunks.iter().flatten().flatten()
    }

    /// In any order.
    pub fn scan_mut(&mut self) -> impl Iterator<Item = &mut Connection> {
        self.chunks.iter_mut().flatten().flatten()
    }

    fn at(&self, slot: u32) -> Option<&Connection> {
        self.chunks[slot as usize / CHUNK][slot as usize % CHUNK].as_ref()
    }
}
