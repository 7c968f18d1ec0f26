//! Who is chosen, against choosing from a sorted list of all.

use super::*;
use crate::{
    ids::ApiserverName,
    observation::{Observation, Socket},
    shim::{Counters, ShimConnection, ShimReport},
};
use proptest::prelude::*;
use std::{collections::BTreeSet, time::Duration};

fn at(seconds: u64) -> Timestamp {
    Timestamp::from_millis(seconds * 1000)
}

fn socket(id: u64) -> Socket {
    Socket {
        id: ConnectionId(id),
        local: "10.0.0.1:6443".parse().expect("an address"),
        remote: format!("10.1.0.1:{}", 1000 + id).parse().expect("an address"),
        bytes_in: 0,
        bytes_out: 0,
        start: 0,
    }
}

fn shown(id: u64, protocol: Protocol, counters: Counters) -> ShimConnection {
    ShimConnection {
        id: ConnectionId(id),
        client: socket(id).remote,
        local: socket(id).local,
        protocol,
        can_be_told: true,
        state: ConnectionState::Active,
        age: None,
        user: None,
        user_agent: None,
        counters,
    }
}

fn policy() -> Policy {
    Policy::new(ApiserverName::new("n"), BTreeSet::new())
}

fn of(count: usize) -> Request {
    Request {
        quota: count as f64,
        limit: count,
        ceiling: f64::INFINITY,
    }
}

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
    table.observe(
        Observation::Resync {
            sockets: [1, 2].map(socket).to_vec(),
            listener: Some(ConnectionId(9)),
        },
        at(0),
    );
    for second in [0, 10, 20, 600] {
        let connections = [(1, 1), (2, second)].map(|(id, requests)| {
            let counters = Counters {
                requests,
                ..Counters::default()
            };
            shown(id, protocol, counters)
        });
        let report = ShimReport {
            connections: connections.to_vec(),
            ..ShimReport::default()
        };
        table.report(&report, at(second));
        table.sample(at(second), Weight::Connections);
    }
    let chosen = choose(&table, &policy(), abilities, &Cooldowns::default(), of(1), at(700));
    chosen.expect("one of them")[0].connection.0
}

/// One connection: open watches, when it was opened, who it is, what it speaks, whether it can be told, requests.
type Drawn = (u32, u64, u8, Protocol, bool, u64);

fn drawn() -> impl Strategy<Value = Drawn> {
    let watches = prop::sample::select(vec![0, 0, 0, 1, 2, (1 << 20) - 2, (1 << 20) - 1, 1 << 20, u32::MAX]);
    let protocol = prop::sample::select(vec![
        Protocol::H2Selected,
        Protocol::H2Selected,
        Protocol::Http1,
        Protocol::Unknown,
    ]);
    let opened = prop::sample::select(vec![1, 2, 2, 3, 50, 95]);
    let requests = prop::sample::select(vec![0, 1, 1_000]);
    (watches, opened, 0_u8..9, protocol, prop::bool::weighted(0.8), requests)
}

/// The connections of a table, opened in that order.
fn table_of(drawn: &[Drawn]) -> ConnectionTable {
    let mut table = ConnectionTable::default();
    table.observe(
        Observation::Resync {
            sockets: Vec::new(),
            listener: Some(ConnectionId(9)),
        },
        at(0),
    );
    // Its place in the table says nothing of its id.
    let id = |index: usize| (index as u64 * 7_919) % 50_021;
    for second in 1..=100 {
        for (index, (watches, opened, who, protocol, can_be_told, requests)) in drawn.iter().enumerate() {
            if *opened != second {
                continue;
            }
            table.observe(Observation::Opened(socket(id(index))), at(second));
            let counters = Counters {
                requests: *requests,
                open_watches: *watches,
                ..Counters::default()
            };
            let connection = ShimConnection {
                user: (*who > 0).then(|| format!("user-{who}")),
                can_be_told: *can_be_told,
                ..shown(id(index), *protocol, counters)
            };
            let report = ShimReport {
                connections: vec![connection],
                ..ShimReport::default()
            };
            table.report(&report, at(second));
        }
        table.sample(at(second), Weight::Connections);
    }
    table
}

proptest! {
    #[test]
    fn the_first_are_those_of_a_sorted_list_of_all(
        drawn in prop::collection::vec(drawn(), 1..600),
        limit in 1_usize..300,
        at_request in any::<bool>(),
        resting in prop::collection::vec(1_u8..9, 0..3),
        excluded in prop::option::of(1_u8..9),
    ) {
        let table = table_of(&drawn);
        let mut policy = policy();
        policy.min_connection_age = Duration::from_secs(30);
        policy.exclusions.users.extend(excluded.map(|who| format!("user-{who}")));
        let abilities = if at_request { Abilities::AT_REQUEST } else { Abilities::default() };
        let mut cooldowns = Cooldowns::default();
        for who in resting {
            let key = ClientKey::User(format!("user-{who}").into());
            cooldowns.note(key.clone(), || table.active_of(&key).min(5), at(90), at(900));
        }
        let mut all: Vec<&Connection> = table.scan().collect();
        all.retain(|connection| refusal(connection, &policy, &cooldowns, at(100)).is_none());
        // What the key cannot tell apart goes by id.
        let open = |connection: &Connection| connection.counters.open_watches.min((1 << 20) - 1);
        all.sort_by_key(|connection| {
            let is_http1 = connection.protocol == Protocol::Http1;
            let is_silent = connection.load(Weight::Requests) < 1.0 / 30.0;
            let is_many = open(connection) == (1 << 20) - 1;
            let opened = if is_many { 0 } else { connection.opened_at.as_millis() };
            ((at_request || is_http1) && is_silent, open(connection), opened, connection.id)
        });
        let mut told: BTreeMap<ClientKey, usize> = BTreeMap::new();
        let mut expected = Vec::new();
        for connection in all {
            let key = connection.client_key();
            let told = told.entry(key.clone()).or_default();
            if expected.len() < limit && *told < cooldowns.left(&key, at(100)) {
                *told += 1;
                expected.push(connection.id);
            }
        }
        let chosen = choose(&table, &policy, abilities, &cooldowns, of(limit), at(100));
        let chosen: Vec<_> = chosen.unwrap_or_default().into_iter().map(|victim| victim.connection).collect();
        prop_assert_eq!(chosen, expected);
    }

    /// Where nobody may be told, the hold's numbers are those of the whole table, though only those were looked at who may be
    /// told by what they are.
    #[test]
    fn nobody_is_told_for_reasons_that_are_counted(
        drawn in prop::collection::vec(drawn(), 1..200),
        at_request in any::<bool>(),
    ) {
        let table = table_of(&drawn);
        let mut policy = policy();
        policy.min_connection_age = Duration::from_secs(60);
        // Of each client some rest, are left alone, or are known by no name and too young.
        policy.exclusions.users.extend((5..9).map(|who| format!("user-{who}")));
        let mut cooldowns = Cooldowns::default();
        for who in 1..5 {
            let key = ClientKey::User(format!("user-{who}").into());
            let of = table.active_of(&key).max(1);
            (0..of).for_each(|_| cooldowns.note(key.clone(), || of, at(90), at(900)));
        }
        for connection in table.scan().filter(|connection| connection.user().is_none()) {
            cooldowns.note(connection.client_key(), || 1, at(90), at(900));
        }
        let abilities = if at_request { Abilities::AT_REQUEST } else { Abilities::default() };
        let hold = choose(&table, &policy, abilities, &cooldowns, of(50), at(100)).expect_err("nobody is left");
        prop_assert_eq!(hold, nobody(&table, &policy, &cooldowns, of(50), at(100)));
    }
}
