//! What is kept while connections change: sums, and who is known.
//!
//! Must never differ from what counting from scratch gives; sums of measured figures are started anew by every sample.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::connection::{Connection, Identity};
use crate::{ids::Protocol, shim::ConnectionState};

/// Sums over all connections, kept while they change: a snapshot is asked for far more often than a connection changes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Totals {
    pub active: usize,
    pub unknown: usize,
    pub node_local: usize,
    pub draining: usize,
    pub draining_streams: u64,
    pub requests: f64,
    pub bytes: f64,
    pub streams: u64,
}

impl Totals {
    pub fn count(&mut self, connection: &Connection) {
        self.active += usize::from(connection.is_active());
        self.unknown += usize::from(is_unknown(connection));
        self.node_local += usize::from(is_local_client(connection));
        if connection.state == ConnectionState::Draining {
            self.draining += 1;
            self.draining_streams += u64::from(connection.counters.open_streams);
        }
        if connection.is_active() {
            self.requests += connection.rates.requests;
            self.bytes += connection.rates.bytes;
            self.streams += u64::from(connection.counters.open_streams);
        }
    }

    pub fn uncount(&mut self, connection: &Connection) {
        self.active -= usize::from(connection.is_active());
        self.unknown -= usize::from(is_unknown(connection));
        self.node_local -= usize::from(is_local_client(connection));
        if connection.state == ConnectionState::Draining {
            self.draining -= 1;
            self.draining_streams -= u64::from(connection.counters.open_streams);
        }
        if connection.is_active() {
            // Sums of rounded numbers drift a little below 0; every sample starts them anew.
            self.requests = (self.requests - connection.rates.requests).max(0.0);
            self.bytes = (self.bytes - connection.rates.bytes).max(0.0);
            self.streams -= u64::from(connection.counters.open_streams);
        }
    }
}

fn is_unknown(connection: &Connection) -> bool {
    connection.is_active() && connection.protocol == Protocol::Unknown
}

fn is_local_client(connection: &Connection) -> bool {
    connection.is_settled() && connection.is_node_local()
}

/// Who is known, each once, with the number of its active connections.
#[derive(Clone, Debug, Default)]
pub(super) struct Identities {
    pub known: BTreeMap<Arc<Identity>, Uses>,
    user_agents: BTreeSet<Arc<str>>,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Uses {
    pub connections: u32,
    pub active: u32,
}

impl Identities {
    pub fn intern(&mut self, user: Option<&str>, user_agent: Option<&str>) -> Arc<Identity> {
        let user_agent = user_agent.map(|name| match self.user_agents.get(name) {
            Some(known) => Arc::clone(known),
            None => {
                let new: Arc<str> = name.into();
                self.user_agents.insert(Arc::clone(&new));
                new
            }
        });
        let wanted = Identity {
            user: user.map(Into::into),
            user_agent,
        };
        match self.known.get_key_value(&wanted) {
            Some((known, _)) => Arc::clone(known),
            None => Arc::new(wanted),
        }
    }

    /// How many active connections a user has, whatever its user agents.
    pub fn active_of(&self, user: &Arc<str>) -> usize {
        let first = Identity {
            user: Some(Arc::clone(user)),
            user_agent: None,
        };
        let theirs = self
            .known
            .range(first..)
            .take_while(|(identity, _)| identity.user.as_ref() == Some(user));
        theirs.map(|(_, uses)| uses.active as usize).sum()
    }

    pub fn enter(&mut self, identity: Option<&Arc<Identity>>, active: bool) {
        if let Some(identity) = identity {
            let uses = self.known.entry(Arc::clone(identity)).or_default();
            uses.connections += 1;
            uses.active += u32::from(active);
        }
    }

    pub fn leave(&mut self, identity: Option<&Arc<Identity>>, active: bool) {
        let Some(identity) = identity else {
            return;
        };
        let Some(uses) = self.known.get_mut(identity) else {
            return;
        };
        uses.connections -= 1;
        uses.active -= u32::from(active);
        if uses.connections == 0 {
            self.known.remove(identity);
            if self.user_agents.len() > 2 * self.known.len() + 64 {
                self.user_agents.retain(|name| Arc::strong_count(name) > 1);
            }
        }
    }
}
