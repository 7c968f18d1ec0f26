//! Who was told, and until when it is left alone.
//!
//! Input: clients that are told. Output: how often each may still be told.
//! Must never let a client be told twice in its cool-down for one and the same connection.

use std::{collections::BTreeMap, time::Duration};

use crate::{ids::Timestamp, table::ClientKey};

/// Clients in their cool-down.
#[derive(Clone, Debug, Default)]
pub struct Cooldowns {
    told: BTreeMap<ClientKey, Cooldown>,
    /// Nobody's ends earlier: until then there is nothing to look for.
    first: Timestamp,
}

/// One client in its cool-down, with times that mean something to another process.
#[derive(Clone, Debug, PartialEq)]
pub struct Resting {
    /// Who.
    pub client: ClientKey,
    /// For how long yet.
    pub left: Duration,
    /// How many of its connections were told.
    pub told: usize,
    /// How many may be.
    pub allowed: usize,
}

#[derive(Clone, Debug)]
struct Cooldown {
    until: Timestamp,
    told: usize,
    /// A client with several connections may be told once for each.
    allowed: usize,
}

impl Cooldowns {
    /// Notes that a client with `connections` connections is told now.
    pub fn note(&mut self, key: ClientKey, connections: usize, until: Timestamp) {
        let entry = self.told.entry(key).or_insert(Cooldown {
            until,
            told: 0,
            allowed: connections.max(1),
        });
        entry.told += 1;
        entry.until = until;
        self.first = self.first.min(until);
    }

    /// A client that was noted has been told: its cool-down counts from then.
    pub fn told(&mut self, key: &ClientKey, until: Timestamp) {
        if let Some(cooldown) = self.told.get_mut(key) {
            cooldown.until = cooldown.until.max(until);
        }
    }

    /// Forgets who may be told again.
    pub fn expire(&mut self, now: Timestamp) {
        if now < self.first {
            return;
        }
        self.told.retain(|_, cooldown| cooldown.until > now);
        let left = self.told.values().map(|cooldown| cooldown.until);
        self.first = left.min().unwrap_or(Timestamp::from_millis(u64::MAX));
    }

    /// Everybody in a cool-down.
    pub fn resting(&self, now: Timestamp) -> impl Iterator<Item = Resting> {
        self.told.iter().map(move |(client, cooldown)| Resting {
            client: client.clone(),
            left: cooldown.until.since(now),
            told: cooldown.told,
            allowed: cooldown.allowed,
        })
    }

    /// Somebody whom an earlier process told.
    pub fn resume(&mut self, resting: &Resting, now: Timestamp) {
        let until = now + resting.left;
        self.first = self.first.min(until);
        self.told.insert(
            resting.client.clone(),
            Cooldown {
                until,
                told: resting.told,
                allowed: resting.allowed,
            },
        );
    }

    /// Takes back a note: the client was not told after all.
    pub fn forget(&mut self, key: &ClientKey) {
        if let Some(cooldown) = self.told.get_mut(key) {
            cooldown.told = cooldown.told.saturating_sub(1);
            if cooldown.told == 0 {
                self.told.remove(key);
            }
        }
    }

    /// Whether nobody is in a cool-down.
    pub fn is_empty(&self) -> bool {
        self.told.is_empty()
    }

    /// How many more of a client's connections may be told now.
    pub fn left(&self, key: &ClientKey) -> usize {
        self.told
            .get(key)
            .map_or(usize::MAX, |cooldown| cooldown.allowed.saturating_sub(cooldown.told))
    }
}
