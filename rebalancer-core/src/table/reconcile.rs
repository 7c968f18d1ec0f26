//! The kernel's list against the table: events may be missed without a word, the list is the truth.
//!
//! Job: take a complete list for what it is, and repair what events did not tell.
//! Must never take an open or a close that happens while the list is read for one that was missed: what a list differs
//! in is a doubt, and only what the next list confirms, with every event in between folded in, is a repair.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::{ConnectionTable, connection::Shown};
use crate::{
    ids::{ConnectionId, Timestamp},
    observation::Socket,
};

/// How often the kernel's list put the table right, by what events had missed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repairs {
    /// Connections that were open and not in the table.
    pub opened: u64,
    /// Connections in the table that were gone.
    pub closed: u64,
    /// Another listening socket than the table knew.
    pub listener: u64,
}

/// What the last list differed in, as far as no event has explained it since.
#[derive(Clone, Debug, Default)]
pub(super) struct Doubts {
    /// In the list and not in the table.
    pub opened: BTreeSet<ConnectionId>,
    /// In the table and not in the list.
    closed: BTreeSet<ConnectionId>,
    /// The list's listening socket, where the table knows another.
    listener: Option<Option<ConnectionId>>,
}

impl Doubts {
    /// An event told that it is gone.
    pub fn closed(&mut self, id: ConnectionId) {
        self.opened.remove(&id);
        self.closed.remove(&id);
    }

    fn is_empty(&self) -> bool {
        self.opened.is_empty() && self.closed.is_empty() && self.listener.is_none()
    }
}

impl ConnectionTable {
    /// How often the kernel's list put the table right since the agent started.
    pub fn repairs(&self) -> Repairs {
        self.repairs
    }

    /// Whether the last list differed from the table in something that no event has explained since: another list, soon,
    /// tells.
    pub fn is_in_doubt(&self) -> bool {
        !self.doubts.is_empty()
    }

    /// Takes a list that was read while events went on: whether the listening socket is another one.
    pub(super) fn reconcile(
        &mut self,
        mut sockets: Vec<Socket>,
        listener: Option<ConnectionId>,
        now: Timestamp,
    ) -> bool {
        if !self.listener_known {
            // Nothing is to be repaired before the first complete list.
            return false;
        }
        let before = std::mem::take(&mut self.doubts);
        sockets.sort_unstable_by_key(|socket| socket.id);
        let mut opened: BTreeMap<ConnectionId, Socket> = BTreeMap::new();
        let mut closed: Vec<ConnectionId> = Vec::new();
        let mut known: Vec<(u32, u64, u64)> = Vec::with_capacity(sockets.len());
        // Both are in order: each is gone through once.
        let mut listed = sockets.into_iter().peekable();
        for (id, slot) in self.connections.slots() {
            while let Some(unknown) = listed.next_if(|socket| socket.id < id) {
                opened.insert(unknown.id, unknown);
            }
            match listed.next_if(|socket| socket.id == id) {
                Some(socket) => known.push((slot, socket.bytes_in, socket.bytes_out)),
                None => closed.push(id),
            }
        }
        opened.extend(listed.map(|socket| (socket.id, socket)));
        for (slot, bytes_in, bytes_out) in known {
            // No sum is of bytes: the next sample takes them.
            if let Some(connection) = self.connections.slot_mut(slot) {
                connection.counters.bytes_in = connection.counters.bytes_in.max(bytes_in);
                connection.counters.bytes_out = connection.counters.bytes_out.max(bytes_out);
            }
        }
        for id in closed {
            if before.closed.contains(&id) {
                self.remove(id);
                self.repairs.closed += 1;
            } else {
                self.doubts.closed.insert(id);
            }
        }
        for (id, socket) in opened {
            if before.opened.contains(&id) {
                self.open(&socket, now, Shown::Late);
                self.repairs.opened += 1;
            } else {
                self.doubts.opened.insert(id);
            }
        }
        if listener == self.listener {
            return false;
        }
        if before.listener != Some(listener) {
            self.doubts.listener = Some(listener);
            return false;
        }
        self.listener = listener;
        self.repairs.listener += 1;
        true
    }

    /// Takes a complete list for the truth, at once: whether the listening socket is another one.
    pub(super) fn resync(&mut self, sockets: Vec<Socket>, listener: Option<ConnectionId>, now: Timestamp) -> bool {
        let shown = if self.listener_known {
            Shown::Late
        } else {
            Shown::Seeded
        };
        // What differs after lost events is what they would have told.
        let is_repair = self.listener_known && !self.trusted;
        let listed: HashSet<ConnectionId> = sockets.iter().map(|socket| socket.id).collect();
        let gone: Vec<ConnectionId> = self
            .connections
            .iter()
            .map(|connection| connection.id)
            .filter(|id| !listed.contains(id))
            .collect();
        let before = self.connections.len() - gone.len();
        if is_repair {
            self.repairs.closed += gone.len() as u64;
        }
        for id in gone {
            self.remove(id);
        }
        self.early.keep(&listed);
        for socket in sockets {
            self.open(&socket, now, shown);
        }
        // What an earlier agent knew to drain and is not there has closed since.
        let connections = &self.connections;
        self.drains.retain(|id| connections.contains(*id));
        if is_repair {
            self.repairs.opened += (self.connections.len() - before) as u64;
        }
        let changed = self.listener_known && self.listener != listener;
        self.listener = listener;
        self.listener_known = true;
        self.trusted = true;
        self.doubts = Doubts::default();
        changed
    }
}
