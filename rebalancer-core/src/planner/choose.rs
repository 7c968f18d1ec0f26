//! Who is told: the victims that make up a quota.
//!
//! Input: the table, the policy, cool-downs, how much load and how many connections. Output: victims, each with a reason.
//! Must never choose somebody who cannot or must not be moved; must never depend on the order of the table in memory.

use std::collections::{BTreeMap, BinaryHeap, HashMap};

use super::cooldown::Cooldowns;
use crate::{
    decision::{Fate, Heavy, Victim},
    hold::Hold,
    ids::{ConnectionId, Protocol, Timestamp},
    policy::{NodeLocal, Policy, Weight},
    shim::{Abilities, ConnectionState},
    table::{ClientKey, Connection, ConnectionTable, Wanted},
};

/// How much is to be told.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Request {
    /// Load, in the unit of the weight.
    pub quota: f64,
    /// Connections at most.
    pub limit: usize,
    /// Whoever is heavier stays: wherever it goes, that apiserver is above the target. Infinite when all weigh the same.
    pub ceiling: f64,
}

/// The order in which connections are preferred: the lowest first.
type Rank = (u64, ConnectionId);

/// Why a connection is no candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Refusal {
    /// It has moved, or its shim cannot tell it now.
    Deaf,
    Unknown,
    Young,
    Excluded,
    Cooling,
}

/// Chooses the victims that make up a quota.
///
/// With equal weights: those with the fewest open watches first, then the oldest, and where a probe tells them, those
/// that are silent last; with other weights: the heaviest first that still fits. Ties are broken by id.
///
/// # Errors
///
/// The hold that says why nobody can be moved.
pub fn choose(
    table: &ConnectionTable,
    policy: &Policy,
    abilities: Abilities,
    cooldowns: &Cooldowns,
    request: Request,
    now: Timestamp,
) -> Result<Vec<Victim>, Hold> {
    let mut choice = Choice {
        policy,
        cooldowns,
        request,
        now,
        room: request.quota,
        victims: Vec::new(),
        told: HashMap::new(),
        turned_down: BTreeMap::new(),
    };
    if policy.weight.is_counted() {
        choice.by_order(table, abilities);
    } else {
        choice.by_load(table);
    }
    if !choice.victims.is_empty() {
        return Ok(choice.victims);
    }
    Err(if policy.weight.is_counted() {
        choice.nobody(table)
    } else {
        nobody(table, policy, cooldowns, request, now)
    })
}

/// Victims as they are chosen, one after the other.
struct Choice<'a> {
    policy: &'a Policy,
    cooldowns: &'a Cooldowns,
    request: Request,
    now: Timestamp,
    /// What is left of the quota.
    room: f64,
    victims: Vec<Victim>,
    /// How many connections of each client are among them, where some are in their cool-down.
    told: HashMap<ClientKey, usize>,
    /// How many were looked at and may not be told, by why.
    turned_down: BTreeMap<Refusal, usize>,
}

impl Choice<'_> {
    /// Where each connection counts as one. Only the first of a large table are looked at, in rounds: they may turn out not
    /// to be told.
    fn by_order(&mut self, table: &ConnectionTable, abilities: Abilities) {
        let mut wanted = Wanted {
            count: self.request.limit.max(64),
            opened_until: self.opened_until(),
            at_request: abilities.tells_at_request,
            beyond: None,
        };
        loop {
            let found = table.first(&wanted);
            for connection in &found {
                if self.is_full() {
                    return;
                }
                self.take(connection);
            }
            let last = found.last().filter(|_| found.len() == wanted.count);
            wanted.beyond = last.and_then(|last| table.turn(last, wanted.at_request));
            if wanted.beyond.is_none() || self.is_full() {
                return;
            }
            // Where many may not be told, few rounds find that out.
            wanted.count = wanted.count.saturating_mul(4);
        }
    }

    /// Where they weigh what they do: the heaviest that fit, in rounds of the best.
    fn by_load(&mut self, table: &ConnectionTable) {
        let round = self.request.limit.saturating_mul(2).max(64);
        let mut after: Option<Rank> = None;
        loop {
            let best = self.heaviest(table, after, round);
            let is_last = best.len() < round;
            for (rank, connection) in best {
                after = Some(rank);
                if self.is_full() {
                    return;
                }
                self.take(connection);
            }
            if is_last {
                return;
            }
        }
    }

    /// The first `count` candidates that rank after `after` and whose load fits, in order.
    fn heaviest<'t>(
        &self,
        table: &'t ConnectionTable,
        after: Option<Rank>,
        count: usize,
    ) -> Vec<(Rank, &'t Connection)> {
        let mut worst_first: BinaryHeap<Candidate<'t>> = BinaryHeap::with_capacity(count + 1);
        for connection in table.scan() {
            let load = connection.load(self.policy.weight);
            if load <= 0.0 || !self.fits(load) {
                continue;
            }
            let rank = rank(connection, load);
            if after.is_some_and(|after| rank <= after)
                || (worst_first.len() == count && worst_first.peek().is_some_and(|worst| rank >= worst.rank))
                || refusal(connection, self.policy, self.cooldowns, self.now).is_some()
            {
                continue;
            }
            worst_first.push(Candidate { rank, connection });
            if worst_first.len() > count {
                worst_first.pop();
            }
        }
        let sorted = worst_first.into_sorted_vec();
        sorted
            .into_iter()
            .map(|candidate| (candidate.rank, candidate.connection))
            .collect()
    }

    fn fits(&self, load: f64) -> bool {
        load <= self.room.min(self.request.ceiling)
    }

    fn is_full(&self) -> bool {
        let is_spent = self.policy.weight.is_counted() && !self.fits(1.0);
        self.victims.len() >= self.request.limit || is_spent
    }

    /// Makes it a victim, if it fits and may be told.
    fn take(&mut self, connection: &Connection) {
        let load = connection.load(self.policy.weight);
        if !self.fits(load) {
            return;
        }
        if let Some(refusal) = refusal(connection, self.policy, self.cooldowns, self.now) {
            *self.turned_down.entry(refusal).or_default() += 1;
            return;
        }
        if !self.cooldowns.is_empty() {
            let key = connection.client_key();
            let left = self.cooldowns.left(&key, self.now);
            let told = self.told.entry(key).or_default();
            if *told >= left {
                return;
            }
            *told += 1;
        }
        self.room -= load;
        self.victims
            .push(victim(connection, load, self.policy.weight, self.now));
    }

    /// Who was opened later is too young.
    fn opened_until(&self) -> Timestamp {
        self.now.back(self.policy.min_connection_age)
    }

    /// Why nobody is a victim where each connection counts as one: all who may be told by what they are and are old enough have
    /// been looked at, and the table knows how many the others are.
    fn nobody(&self, table: &ConnectionTable) -> Hold {
        let count = |refusal| self.turned_down.get(&refusal).copied().unwrap_or_default();
        let on_this_node = if self.policy.node_local == NodeLocal::Move {
            0
        } else {
            table.node_local()
        };
        Hold::CoolingDown {
            cooling: count(Refusal::Cooling),
            young: count(Refusal::Young) + table.opened_after(self.opened_until()),
            excluded: count(Refusal::Excluded) + on_this_node,
            unknown: table.unknown(),
        }
    }
}

/// With measured weights the heaviest go first. The bits of positive numbers are in their order.
fn rank(connection: &Connection, load: f64) -> Rank {
    (!load.to_bits(), connection.id)
}

/// Why a connection may not be told, if it may not; cheap questions first.
fn refusal(connection: &Connection, policy: &Policy, cooldowns: &Cooldowns, now: Timestamp) -> Option<Refusal> {
    if !connection.can_hear() {
        return Some(Refusal::Deaf);
    }
    if connection.protocol == Protocol::Unknown {
        return Some(Refusal::Unknown);
    }
    if now.since(connection.opened_at) < policy.min_connection_age && !connection.is_older_than_the_clock() {
        return Some(Refusal::Young);
    }
    let excluded = connection.is_node_local() && policy.node_local != NodeLocal::Move
        || policy
            .exclusions
            .matches(connection.client().ip(), connection.user(), connection.user_agent());
    if excluded {
        return Some(Refusal::Excluded);
    }
    (!cooldowns.is_empty() && cooldowns.left(&connection.client_key(), now) == 0).then_some(Refusal::Cooling)
}

/// Why a connection that an operator named is not told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftOut {
    /// There is none of that name, or it has ended.
    Gone,
    /// It has heard a GOAWAY already.
    Draining,
    /// It cannot be told now: HTTP/1.1 without a shim that closes it, upgraded, or in the middle of a long answer.
    Deaf,
    /// It is not known whether it speaks HTTP/2.
    UnknownProtocol,
    /// The configuration excludes it.
    Excluded,
    /// Its client is on this node: it would come straight back.
    NodeLocal,
}

/// Whether an operator's order may tell a connection; `force` lets it pass the exclusions.
///
/// # Errors
///
/// Why it is not told.
pub fn left_out<'a>(
    connection: Option<&'a Connection>,
    policy: &Policy,
    force: bool,
) -> Result<&'a Connection, LeftOut> {
    let connection = connection.ok_or(LeftOut::Gone)?;
    if connection.state == ConnectionState::Draining {
        return Err(LeftOut::Draining);
    }
    if !connection.can_hear() {
        return Err(LeftOut::Deaf);
    }
    if connection.protocol == Protocol::Unknown && !force {
        return Err(LeftOut::UnknownProtocol);
    }
    let (client, user, agent) = (connection.client().ip(), connection.user(), connection.user_agent());
    if !force && policy.exclusions.matches(client, user, agent) {
        return Err(LeftOut::Excluded);
    }
    if !force && connection.is_node_local() && policy.node_local != NodeLocal::Move {
        return Err(LeftOut::NodeLocal);
    }
    Ok(connection)
}

/// Why nobody is a victim where loads are measured: the whole table once more, which each look goes through there.
fn nobody(table: &ConnectionTable, policy: &Policy, cooldowns: &Cooldowns, request: Request, now: Timestamp) -> Hold {
    let mut candidates = 0;
    let mut refusals: BTreeMap<Refusal, usize> = BTreeMap::new();
    for connection in table.scan() {
        match refusal(connection, policy, cooldowns, now) {
            Some(refusal) => *refusals.entry(refusal).or_default() += 1,
            None => candidates += 1,
        }
    }
    let count = |refusal| refusals.get(&refusal).copied().unwrap_or_default();
    if candidates > 0
        && let Some(heaviest) = table.heaviest().next()
    {
        let heavy = heavy(heaviest, policy.weight, request.ceiling);
        return Hold::Unmovable {
            client: heavy.name(),
            load: heavy.load,
            room: request.quota,
        };
    }
    Hold::CoolingDown {
        cooling: count(Refusal::Cooling),
        young: count(Refusal::Young),
        excluded: count(Refusal::Excluded),
        unknown: count(Refusal::Unknown),
    }
}

fn victim(connection: &Connection, load: f64, weight: Weight, now: Timestamp) -> Victim {
    Victim {
        connection: connection.id,
        client: connection.client(),
        user: connection.user().map(str::to_owned),
        user_agent: connection.user_agent().map(str::to_owned),
        load,
        age: now.since(connection.opened_at),
        why: match weight {
            Weight::Connections => format!("{} open watches, cheap to move", connection.counters.open_watches),
            Weight::Requests | Weight::Bytes | Weight::Streams => "the heaviest that still fits".to_owned(),
        },
        fate: Fate::Pending,
    }
}

/// A connection that is named for its weight.
pub fn heavy(connection: &Connection, weight: Weight, ceiling: f64) -> Heavy {
    let load = connection.load(weight);
    Heavy {
        connection: connection.id,
        client: connection.client(),
        user: connection.user().map(str::to_owned),
        user_agent: connection.user_agent().map(str::to_owned),
        load,
        requests_per_second: connection.rates.requests,
        bytes_per_second: connection.rates.bytes,
        open_watches: connection.counters.open_watches,
        unmovable: weight != Weight::Connections && load > ceiling,
    }
}

/// A connection by its rank.
#[derive(Clone, Copy, Debug)]
struct Candidate<'a> {
    rank: Rank,
    connection: &'a Connection,
}

impl Ord for Candidate<'_> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.rank.cmp(&other.rank)
    }
}

impl PartialOrd for Candidate<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.rank == other.rank
    }
}

impl Eq for Candidate<'_> {}

#[cfg(test)]
mod tests;
