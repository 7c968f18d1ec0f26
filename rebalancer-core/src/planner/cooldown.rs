//! Who was told, and until when it is left alone.
//!
//! Input: clients that are told. Output: how often each may still be told.
//! Must never let a client be told twice in its cool-down for one and the same connection.

use std::{collections::HashMap, time::Duration};

use crate::{ids::Timestamp, table::ClientKey};

/// So long those are kept whose cool-down is over: to look for them is to look at all, and in a large cluster somebody's ends
/// at every instant.
const SWEEP: Duration = Duration::from_secs(5);

/// Clients in their cool-down.
#[derive(Clone, Debug, Default)]
pub struct Cooldowns {
    told: HashMap<ClientKey, Cooldown>,
    /// Until then it is not looked for those whose cool-down is over.
    next: Timestamp,
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
    /// Notes that a client is told now; `connections` says how many it has.
    pub fn note(&mut self, key: ClientKey, connections: impl Fn() -> usize, now: Timestamp, until: Timestamp) {
        let begun = || Cooldown {
            until,
            told: 0,
            allowed: connections().max(1),
        };
        let entry = self.told.entry(key).or_insert_with(begun);
        if entry.until <= now {
            *entry = begun();
        }
        entry.told += 1;
    }

    /// A client that was noted has been told: its cool-down counts from then, also where that of the note is over.
    pub fn told(&mut self, key: ClientKey, until: Timestamp) {
        let noted = Cooldown {
            until,
            told: 1,
            allowed: 1,
        };
        let cooldown = self.told.entry(key).or_insert(noted);
        cooldown.until = cooldown.until.max(until);
    }

    /// Forgets who may be told again.
    pub fn expire(&mut self, now: Timestamp) {
        if now < self.next {
            return;
        }
        self.told.retain(|_, cooldown| cooldown.until > now);
        self.next = now + SWEEP;
    }

    /// Everybody in a cool-down, by name.
    pub fn resting(&self, now: Timestamp) -> Vec<Resting> {
        let rests = self.told.iter().filter(|(_, cooldown)| cooldown.until > now);
        let mut resting: Vec<Resting> = rests
            .map(|(client, cooldown)| Resting {
                client: client.clone(),
                left: cooldown.until.since(now),
                told: cooldown.told,
                allowed: cooldown.allowed,
            })
            .collect();
        resting.sort_unstable_by(|one, other| one.client.cmp(&other.client));
        resting
    }

    /// Somebody whom an earlier process told.
    pub fn resume(&mut self, resting: &Resting, now: Timestamp) {
        let until = now + resting.left;
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
    pub fn left(&self, key: &ClientKey, now: Timestamp) -> usize {
        let rests = self.told.get(key).filter(|cooldown| cooldown.until > now);
        rests.map_or(usize::MAX, |cooldown| cooldown.allowed.saturating_sub(cooldown.told))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cool_down_is_over_at_its_end_and_not_when_it_is_looked_for() {
        let at = |seconds: u64| Timestamp::from_millis(1_000 * seconds);
        let client = ClientKey::User("a".into());
        let mut cooldowns = Cooldowns::default();
        cooldowns.expire(at(0));
        cooldowns.note(client.clone(), || 2, at(0), at(3));
        assert_eq!(cooldowns.left(&client, at(2)), 1);
        cooldowns.note(client.clone(), || 2, at(1), at(3));
        assert_eq!(cooldowns.left(&client, at(2)), 0);
        // Not yet looked for, and over.
        cooldowns.expire(at(4));
        assert_eq!(
            (cooldowns.left(&client, at(4)), cooldowns.is_empty()),
            (usize::MAX, false)
        );
        assert!(cooldowns.resting(at(4)).is_empty());
        // It begins anew, with as many connections as there are by then.
        cooldowns.note(client.clone(), || 1, at(4), at(8));
        assert_eq!(cooldowns.left(&client, at(4)), 0);
        cooldowns.expire(at(8));
        assert!(cooldowns.is_empty());
    }

    #[test]
    fn a_note_that_is_taken_back_changes_nothing() {
        let at = |seconds: u64| Timestamp::from_millis(1_000 * seconds);
        let client = ClientKey::User("a".into());
        let mut cooldowns = Cooldowns::default();
        cooldowns.note(client.clone(), || 2, at(0), at(600));
        cooldowns.told(client.clone(), at(600));
        let before = cooldowns.resting(at(590))[0].left;
        cooldowns.note(client.clone(), || 2, at(590), at(1_190));
        cooldowns.forget(&client);
        assert_eq!(cooldowns.resting(at(590))[0].left, before);
    }

    /// A plan may be longer than the cool-down.
    #[test]
    fn who_is_told_long_after_the_note_rests_as_well() {
        let at = |seconds: u64| Timestamp::from_millis(1_000 * seconds);
        let client = ClientKey::User("a".into());
        let mut cooldowns = Cooldowns::default();
        cooldowns.note(client.clone(), || 1, at(0), at(600));
        cooldowns.expire(at(700));
        cooldowns.told(client.clone(), at(1_800));
        assert_eq!(cooldowns.left(&client, at(1_799)), 0);
        assert_eq!(cooldowns.left(&client, at(1_800)), usize::MAX);
    }
}
