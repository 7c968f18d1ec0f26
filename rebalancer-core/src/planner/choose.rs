//! Who is told: the victims that make up a quota.
//!
//! Input: the table, the policy, cool-downs, how much load and how many connections. Output: victims, each with a reason.
//! Must never choose somebody who cannot or must not be moved; must never depend on the order of the table in memory.

use std::collections::{BTreeMap, BinaryHeap};

use super::cooldown::Cooldowns;
use crate::{
    decision::{Fate, Heavy, Victim},
    hold::Hold,
    ids::{ConnectionId, Protocol, Timestamp},
    policy::{NodeLocal, Policy, Weight},
    shim::{Abilities, ConnectionState},
    table::{ClientKey, Connection, ConnectionTable},
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
type Rank = (u64, u64, ConnectionId);

/// Why a connection is no candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    let mut room = request.quota;
    let mut victims: Vec<Victim> = Vec::new();
    let mut spent: BTreeMap<ClientKey, usize> = BTreeMap::new();
    // Only the best of a large table are put into order, in rounds: a client may turn out not to fit any more.
    let round = request.limit.saturating_mul(2).max(64);
    let mut after: Option<Rank> = None;
    'rounds: loop {
        let fits = |load: f64| load > 0.0 && load <= room.min(request.ceiling);
        let best = best(table, policy, abilities, cooldowns, (fits, after, round), now);
        let is_last = best.len() < round;
        for (rank, connection) in best {
            after = Some(rank);
            if victims.len() == request.limit {
                break 'rounds;
            }
            let load = connection.load(policy.weight);
            if load > room {
                continue;
            }
            let key = connection.client_key();
            let told = spent.entry(key.clone()).or_default();
            if *told >= cooldowns.left(&key) {
                continue;
            }
            *told += 1;
            room -= load;
            victims.push(victim(connection, load, policy.weight, now));
        }
        if is_last {
            break;
        }
    }
    if victims.is_empty() {
        return Err(nobody(table, policy, cooldowns, request, now));
    }
    Ok(victims)
}

/// The first `count` candidates that rank after `after` and whose load fits, in order.
fn best<'a>(
    table: &'a ConnectionTable,
    policy: &Policy,
    abilities: Abilities,
    cooldowns: &Cooldowns,
    (fits, after, count): (impl Fn(f64) -> bool, Option<Rank>, usize),
    now: Timestamp,
) -> Vec<(Rank, &'a Connection)> {
    let mut worst_first: BinaryHeap<Candidate<'a>> = BinaryHeap::with_capacity(count + 1);
    for connection in table.scan() {
        let load = connection.load(policy.weight);
        if !fits(load) {
            continue;
        }
        let rank = rank(connection, load, policy, abilities);
        if after.is_some_and(|after| rank <= after)
            || (worst_first.len() == count && worst_first.peek().is_some_and(|worst| rank >= worst.rank))
            || refusal(connection, policy, cooldowns, now).is_some()
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

/// Requests a second below which a connection is silent: it asks less than once in half a minute.
const SILENT: f64 = 1.0 / 30.0;

fn rank(connection: &Connection, load: f64, policy: &Policy, abilities: Abilities) -> Rank {
    // A probe tells a victim at its next request, a relay tells HTTP/1.1 with the answer to it, and the order does not
    // wait long for one.
    let at_request = abilities.tells_at_request || connection.protocol == Protocol::Http1;
    let is_deaf = at_request && connection.load(Weight::Requests) < SILENT;
    match policy.weight {
        Weight::Connections => (
            u64::from(is_deaf) << 32 | u64::from(connection.counters.open_watches),
            connection.opened_at.as_millis(),
            connection.id,
        ),
        // The bits of positive numbers are in their order.
        Weight::Requests | Weight::Bytes | Weight::Streams => (!load.to_bits(), 0, connection.id),
    }
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
    (!cooldowns.is_empty() && cooldowns.left(&connection.client_key()) == 0).then_some(Refusal::Cooling)
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

/// Why nobody is a victim: the whole table once more, now that it does not matter how long it takes.
fn nobody(table: &ConnectionTable, policy: &Policy, cooldowns: &Cooldowns, request: Request, now: Timestamp) -> Hold {
    let mut candidates = 0;
    let mut refusals: BTreeMap<u8, usize> = BTreeMap::new();
    for connection in table.scan() {
        match refusal(connection, policy, cooldowns, now) {
            Some(refusal) => *refusals.entry(refusal as u8).or_default() += 1,
            None => candidates += 1,
        }
    }
    let count = |refusal: Refusal| refusals.get(&(refusal as u8)).copied().unwrap_or_default();
    if candidates > 0
        && policy.weight != Weight::Connections
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
mod tests {
    use super::*;
    use crate::{
        ids::ApiserverName,
        observation::{Observation, Socket},
        shim::{Counters, ShimConnection, ShimReport},
    };

    #[test]
    fn where_they_are_told_at_their_next_request_those_that_ask_go_first() {
        for (protocol, abilities, first) in [
            (Protocol::H2Selected, Abilities::default(), 1),
            (Protocol::H2Selected, Abilities::AT_REQUEST, 2),
            (Protocol::Http1, Abilities::default(), 2),
        ] {
            assert_eq!(first_of_two(protocol, abilities), first, "{protocol:?}, {abilities:?}");
        }
    }

    /// Who is told first: the older one, which asks nothing after its first request, or the other.
    fn first_of_two(protocol: Protocol, abilities: Abilities) -> u64 {
        let mut table = ConnectionTable::default();
        let socket = |id: u64| Socket {
            id: ConnectionId(id),
            local: "10.0.0.1:6443".parse().expect("an address"),
            remote: format!("10.1.0.1:{}", 1000 + id).parse().expect("an address"),
            bytes_in: 0,
            bytes_out: 0,
        };
        let sockets: Vec<_> = [1, 2].map(socket).to_vec();
        let at = |seconds: u64| Timestamp::from_millis(seconds * 1000);
        table.observe(
            Observation::Resync {
                sockets: sockets.clone(),
                listener: Some(ConnectionId(9)),
            },
            at(0),
        );
        for second in [0, 10, 20, 600] {
            let connections = sockets.iter().map(|socket| ShimConnection {
                id: socket.id,
                client: socket.remote,
                local: socket.local,
                protocol,
                can_be_told: true,
                state: ConnectionState::Active,
                age: None,
                user: None,
                user_agent: None,
                counters: Counters {
                    requests: if socket.id == ConnectionId(1) { 1 } else { second },
                    ..Counters::default()
                },
            });
            let report = ShimReport {
                connections: connections.collect(),
                ..ShimReport::default()
            };
            table.report(&report, at(second));
            table.sample(at(second), Weight::Connections);
        }
        let policy = Policy::new(ApiserverName::new("n"), std::collections::BTreeSet::new());
        let best = best(
            &table,
            &policy,
            abilities,
            &Cooldowns::default(),
            (|_| true, None, 1),
            at(700),
        );
        best.first().expect("one of them").1.id.0
    }
}
