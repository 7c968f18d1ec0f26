//! What the control socket says: connections that changed since a cursor, and outcomes.
//!
//! Must never leave out what changed while a list was made: the next one has it.

use std::sync::atomic::Ordering::Relaxed;

use super::Registry;
use crate::shim::wire;

impl Registry {
    /// The list for the control socket: what changed since a cursor of this instance, or everything.
    pub fn list(&self, since: Option<(&str, u64)>, counters: bool) -> wire::Connections {
        // Entries that change while the list is made carry this cursor or a later one: the next list has them.
        let cursor = self.cursor.fetch_add(1, Relaxed);
        let inner = self.inner();
        let since = since
            .filter(|(instance, since)| *instance == self.instance && *since >= inner.forgotten && *since <= cursor)
            .map(|(_, since)| since);
        let from = since.unwrap_or(0);
        let mut list = wire::Connections {
            shim: "relay".into(),
            instance: self.instance.clone(),
            cursor,
            full: since.is_none(),
            generation: inner.generation,
            upstream: inner.upstream,
            upstream_listener: inner.upstream_listener,
            upstream_version: inner.upstream_version.clone(),
            refused_total: Some(self.refused()),
            connections: Vec::new(),
            closed: Vec::new(),
            counters: Vec::new(),
        };
        for connection in inner.open.values() {
            if since.is_none() || connection.has_changed_since(from) {
                list.connections.push(connection.shown());
            } else if counters && connection.has_counted_since(from) {
                list.counters.push(wire::Counted {
                    id: connection.id(),
                    counters: connection.counters(),
                });
            }
        }
        if since.is_some() {
            let ended = inner.closed.iter().rev().take_while(|(at, _)| *at >= from);
            list.closed = ended.map(|(_, id)| *id).collect();
        }
        list
    }

    /// Outcomes from a sequence number on.
    pub fn outcomes(&self, since: u64) -> wire::Outcomes {
        let inner = self.inner();
        wire::Outcomes {
            instance: self.instance.clone(),
            next: inner.next_outcome,
            outcomes: inner
                .outcomes
                .iter()
                .filter(|entry| entry.seq >= since)
                .cloned()
                .collect(),
        }
    }
}
