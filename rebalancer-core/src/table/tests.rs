//! What the table must be after whatever it was told.

mod addresses;
mod ages;
mod landings;

use super::*;
use crate::shim::{Abilities, Counters};
use proptest::prelude::*;

fn socket(id: u64) -> Socket {
    Socket {
        id: ConnectionId(id),
        local: "10.0.0.1:6443".parse().expect("an address"),
        remote: format!("10.0.1.1:{}", 1024 + id).parse().expect("an address"),
        bytes_in: 0,
        bytes_out: 0,
        start: 0,
    }
}

fn at(ms: u64) -> Timestamp {
    Timestamp::from_millis(ms)
}

fn seeded(ids: &[u64]) -> ConnectionTable {
    let mut table = ConnectionTable::default();
    let sockets = ids.iter().copied().map(socket).collect();
    table.observe(
        Observation::Resync {
            sockets,
            listener: Some(ConnectionId(999)),
        },
        at(0),
    );
    table
}

fn classified(id: u64, protocol: Protocol) -> Observation {
    Observation::Classified {
        id: ConnectionId(id),
        protocol,
    }
}

fn from(id: u64, remote: &str) -> Socket {
    Socket {
        remote: format!("{remote}:{}", 1024 + id).parse().expect("an address"),
        ..socket(id)
    }
}

/// Two samples later.
fn settle(table: &mut ConnectionTable, now: &mut u64) {
    for _ in 0..2 {
        *now += 5_000;
        table.age(at(*now));
        table.sample(at(*now), Weight::Connections);
    }
}

#[test]
fn the_nodes_own_connections_are_counted_apart_unless_they_are_to_count() {
    for (node_local, active, landings) in [
        (NodeLocal::Exclude, 1, 1),
        (NodeLocal::Count, 5, 5),
        (NodeLocal::Move, 5, 5),
    ] {
        let mut table = ConnectionTable::new(node_local, Duration::ZERO);
        let listener = Some(ConnectionId(999));
        table.observe(
            Observation::Resync {
                sockets: vec![],
                listener,
            },
            at(0),
        );
        let own = ["10.0.9.9", "fd00::9"].map(|address| address.parse().expect("an address"));
        table.observe(Observation::Addresses(own.to_vec()), at(0));
        // Loopback, the address it was accepted on, another of the node's own in either family, and somebody else's.
        for (id, remote) in [
            (1, "127.0.0.1"),
            (2, "10.0.0.1"),
            (3, "10.0.9.9"),
            (4, "[fd00::9]"),
            (5, "10.1.0.1"),
        ] {
            table.observe(Observation::Opened(from(id, remote)), at(1));
            table.observe(classified(id, Protocol::H2Offered), at(1));
        }
        settle(&mut table, &mut 1);
        assert_eq!((table.active(), table.node_local()), (active, 4), "{node_local:?}");
        assert_eq!(table.accepted_total(), landings);
        assert_eq!(table.is_mostly_node_local(), node_local == NodeLocal::Exclude);
        // The node has lost its addresses: those two are clients.
        table.observe(Observation::Addresses(vec![]), at(20_000));
        assert_eq!(table.node_local(), 2);
        assert_eq!(table.active(), if active == 1 { 3 } else { 5 });
        assert_eq!(table.totals, recounted(&table));
    }
}

#[test]
fn an_offer_that_comes_before_its_connection_is_kept() {
    let mut table = seeded(&[]);
    for id in 1..=4 {
        table.observe(classified(id, Protocol::H2Offered), at(1));
    }
    table.observe(Observation::Opened(socket(1)), at(2));
    let closed = Observation::Closed {
        id: ConnectionId(2),
        bytes_in: 0,
        bytes_out: 0,
    };
    table.observe(closed, at(2));
    table.observe(Observation::Opened(socket(2)), at(2));
    table.observe(Observation::Lost { events: 1 }, at(2));
    let listener = Some(ConnectionId(999));
    let sockets = [1, 2, 3].map(socket).to_vec();
    table.observe(Observation::Resync { sockets, listener }, at(3));
    table.observe(Observation::Opened(socket(4)), at(4));
    let protocol = |id| table.connection(ConnectionId(id)).map(|connection| connection.protocol);
    assert_eq!(
        [1, 2, 3, 4].map(protocol),
        [
            Some(Protocol::H2Offered),
            Some(Protocol::Unknown),
            Some(Protocol::H2Offered),
            Some(Protocol::Unknown)
        ]
    );
}

#[test]
fn requests_add_up_over_connections_that_close() {
    let mut table = seeded(&[1]);
    for id in [2, 3] {
        table.observe(Observation::Opened(socket(id)), at(1));
    }
    let mut told = |counts: &[(u64, u64)], closed: u64| {
        let counters = counts.iter().map(|(id, requests)| {
            let counters = Counters {
                requests: *requests,
                ..Counters::default()
            };
            (ConnectionId(*id), counters)
        });
        let report = ShimReport {
            counters: counters.collect(),
            ..ShimReport::default()
        };
        table.report(&report, at(1));
        let closed = Observation::Closed {
            id: ConnectionId(closed),
            bytes_in: 0,
            bytes_out: 0,
        };
        table.observe(closed, at(2));
        table.requests_total()
    };
    // The first was there before: what it had asked is not counted.
    assert_eq!(told(&[(1, 5_000), (2, 900), (3, 1)], 2), 901);
    assert_eq!(told(&[(1, 5_010), (3, 51)], 3), 961);
    // Figures never go back, whatever a shim says.
    assert_eq!(told(&[(1, 4_000)], 9), 961);
}

#[test]
fn what_a_shim_says_before_the_source_is_kept_until_the_connection_ends() {
    let said = |ids: &[u64], closed: &[u64]| ShimReport {
        connections: ids
            .iter()
            .map(|id| ShimConnection {
                id: ConnectionId(*id),
                client: socket(*id).remote,
                local: socket(*id).local,
                protocol: Protocol::H2Selected,
                can_be_told: true,
                age: None,
                state: ConnectionState::Active,
                user: Some("a".to_owned()),
                user_agent: None,
                counters: Counters::default(),
            })
            .collect(),
        closed: closed.iter().map(|id| ConnectionId(*id)).collect(),
        ..ShimReport::default()
    };
    let mut table = seeded(&[]);
    table.report(&said(&[1, 2], &[]), at(1));
    assert_eq!(table.iter().count(), 0, "the kernel has not shown them");
    table.report(&said(&[], &[2]), at(2));
    table.observe(Observation::Opened(socket(1)), at(1));
    table.observe(Observation::Opened(socket(2)), at(1));
    let protocol = |id| table.connection(ConnectionId(id)).map(|connection| connection.protocol);
    assert_eq!(protocol(1), Some(Protocol::H2Selected));
    assert_eq!(protocol(2), Some(Protocol::Unknown));
}

/// What a shim can tell is a client like others, whatever it speaks; and only for as long as it can.
#[test]
fn http1_counts_where_and_while_its_shim_can_tell_it() {
    let mut table = seeded(&[]);
    let mut now = 1;
    for id in [1, 2] {
        table.observe(Observation::Opened(socket(id)), at(1));
        table.observe(classified(id, Protocol::Http1), at(1));
    }
    settle(&mut table, &mut now);
    assert_eq!((table.active(), table.accepted_total()), (0, 0), "nobody can tell them");
    let said = |can_be_told: bool| ShimReport {
        connections: vec![ShimConnection {
            id: ConnectionId(1),
            client: socket(1).remote,
            local: socket(1).local,
            protocol: Protocol::Http1,
            can_be_told,
            age: None,
            state: ConnectionState::Active,
            user: None,
            user_agent: None,
            counters: Counters::default(),
        }],
        ..ShimReport::default()
    };
    for (can_be_told, active) in [(true, 1), (false, 0), (true, 1)] {
        table.report(&said(can_be_told), at(now));
        assert_eq!((table.active(), table.accepted_total()), (active, 1), "{can_be_told}");
        // The source says it again, and knows less.
        table.observe(classified(1, Protocol::Http1), at(now));
        assert_eq!(table.active(), active);
        let policy = crate::policy::Policy::new(crate::ids::ApiserverName::new("n"), BTreeSet::new());
        let told = crate::planner::left_out(table.connection(ConnectionId(1)), &policy, false);
        assert_eq!(told.is_ok(), can_be_told);
    }
}

/// A scanner, a probe of TCP alone, a slow loris: the shim that holds all connections has not heard of a client on them.
#[test]
fn strangers_are_no_load_where_the_shim_names_all_its_clients() {
    for (offers, names_all, expected) in [(false, true, 0), (true, true, 0), (false, false, 1), (true, false, 1)] {
        for is_seeded in [false, true] {
            let mut table = seeded(if is_seeded { &[1] } else { &[] });
            let mut now = 1;
            if !is_seeded {
                table.observe(Observation::Opened(socket(1)), at(1));
            }
            let report = |table: &mut ConnectionTable, protocol: Protocol, now| {
                let known = ShimConnection {
                    id: ConnectionId(1),
                    client: socket(1).remote,
                    local: socket(1).local,
                    protocol,
                    can_be_told: protocol != Protocol::Unknown,
                    age: None,
                    state: ConnectionState::Active,
                    user: None,
                    user_agent: None,
                    counters: Counters::default(),
                };
                let abilities = Abilities {
                    names_all,
                    ..Abilities::default()
                };
                let connections = vec![known];
                table.report(
                    &ShimReport {
                        abilities,
                        connections,
                        ..ShimReport::default()
                    },
                    at(now),
                );
            };
            report(&mut table, Protocol::Unknown, now);
            if offers {
                table.observe(classified(1, Protocol::H2Offered), at(1));
            }
            settle(&mut table, &mut now);
            let case = (offers, names_all, is_seeded);
            assert_eq!(table.active(), expected, "{case:?}");
            report(&mut table, Protocol::H2Selected, now);
            assert_eq!(table.active(), 1, "{case:?}: its handshake is done");
        }
    }
}

#[test]
fn an_offer_does_not_overrule_a_selection() {
    let mut table = seeded(&[1]);
    for protocol in [Protocol::H2Selected, Protocol::H2Offered, Protocol::Unknown] {
        table.observe(
            Observation::Classified {
                id: ConnectionId(1),
                protocol,
            },
            at(1),
        );
    }
    assert_eq!(
        table.connection(ConnectionId(1)).map(|c| c.protocol),
        Some(Protocol::H2Selected)
    );
}

#[test]
fn another_listener_is_a_change_but_the_first_is_not() {
    let mut table = seeded(&[]);
    let resync = |listener| Observation::Resync {
        sockets: vec![],
        listener,
    };
    assert!(!table.observe(resync(Some(ConnectionId(999))), at(1)).listener_changed);
    assert!(table.observe(resync(None), at(2)).listener_changed);
    assert!(table.observe(resync(Some(ConnectionId(1000))), at(3)).listener_changed);
}

/// The sums, from scratch.
fn recounted(table: &ConnectionTable) -> Totals {
    let mut totals = Totals::default();
    table.scan().for_each(|connection| totals.count(connection));
    totals
}

proptest! {
    /// Totals and identities are kept while connections change: they are what counting from scratch gives.
    #[test]
    fn totals_are_what_counting_gives(events in prop::collection::vec((0u8..6, 0u64..12, 0u64..4), 0..120)) {
        let mut table = seeded(&[1, 2, 3]);
        for (step, (kind, id, detail)) in events.into_iter().enumerate() {
            let now = at(1_000 * (step as u64 + 1));
            let id = ConnectionId(id);
            match kind {
                0 => drop(table.observe(Observation::Opened(socket(id.0)), now)),
                1 => drop(table.observe(Observation::Closed { id, bytes_in: 0, bytes_out: 0 }, now)),
                2 => table.mark_draining(id),
                3 if detail == 0 => table.sample(now, Weight::Connections),
                3 => table.sample(now, Weight::Requests),
                _ => table.report(&ShimReport {
                    connections: vec![ShimConnection {
                        id,
                        client: socket(id.0).remote,
                        local: socket(id.0).local,
                        protocol: if detail == 3 { Protocol::Http1 } else { Protocol::H2Selected },
                        can_be_told: detail != 3,
                        age: None,
                        state: ConnectionState::Active,
                        user: (detail > 0).then(|| format!("user-{detail}")),
                        user_agent: Some("agent".to_owned()),
                        counters: Counters { requests: step as u64 * detail, open_streams: detail as u32, ..Counters::default() },
                    }],
                    ..ShimReport::default()
                }, now),
            }
        }
        let (kept, counted) = (table.totals, recounted(&table));
        prop_assert_eq!((kept.active, kept.draining, kept.streams), (counted.active, counted.draining, counted.streams));
        prop_assert!((kept.requests - counted.requests).abs() < 1e-6);
        for connection in table.scan() {
            let key = connection.client_key();
            if let ClientKey::User(_) = key {
                let same = table.scan().filter(|other| other.is_active() && other.client_key() == key).count();
                prop_assert_eq!(table.active_of(&key), same);
            }
        }
        let named: BTreeSet<_> = table.scan().filter_map(|connection| connection.identity.clone()).collect();
        prop_assert_eq!(table.identities.known.len(), named.len());
        prop_assert!(table.connections.keys_are_true(table.node_local));
    }

    /// Events are missed without a word, others come while the list is read: two lists later the table is the kernel's,
    /// each difference was repaired once, and nothing that an event tells was.
    #[test]
    fn lists_repair_what_events_missed_and_nothing_else(
        before in prop::collection::vec((any::<bool>(), 0u64..24, any::<bool>()), 0..80),
        during in prop::collection::vec((any::<bool>(), 0u64..24, any::<bool>()), 0..24),
        other_listener in any::<bool>(),
    ) {
        let mut table = seeded(&[]);
        let mut truth = BTreeSet::new();
        let mut next = 100;
        // Open, or close one of those that are open; told or not. Ids are never used again.
        let mut happen = |truth: &mut BTreeSet<u64>, (opens, pick, told): (bool, u64, bool)| {
            let observation = if opens {
                next += 1;
                truth.insert(next);
                Observation::Opened(socket(next))
            } else {
                let id = truth.iter().copied().cycle().nth(pick as usize % truth.len().max(1))?;
                truth.remove(&id);
                Observation::Closed { id: ConnectionId(id), bytes_in: 0, bytes_out: 0 }
            };
            told.then_some(observation)
        };
        for event in before {
            if let Some(told) = happen(&mut truth, event) {
                table.observe(told, at(1));
            }
        }
        let known: BTreeSet<u64> = table.iter().map(|(id, _)| id.0).collect();
        let missed: BTreeSet<u64> = truth.difference(&known).copied().collect();
        let missed_closes = known.difference(&truth).count();
        let listener = Some(ConnectionId(if other_listener { 1000 } else { 999 }));
        // While it is read some come and go: it shows each of these or not, and every event of theirs is told after it.
        let mut list = truth.clone();
        let mut told_later = Vec::new();
        for (opens, pick, shown) in during {
            if let Some(told) = happen(&mut truth, (opens, pick, true)) {
                if let (Observation::Opened(socket), true) = (&told, shown) {
                    list.insert(socket.id.0);
                } else if let (Observation::Closed { id, .. }, true) = (&told, shown) {
                    list.remove(&id.0);
                }
                told_later.push(told);
            }
        }
        let listed = |ids: &BTreeSet<u64>| Observation::Listed { sockets: ids.iter().copied().map(socket).collect(), listener };
        let changes = table.observe(listed(&list), at(2));
        prop_assert!(!changes.listener_changed);
        prop_assert_eq!(table.repairs(), Repairs::default(), "one list is a doubt");
        for told in told_later {
            table.observe(told, at(2));
        }
        let changes = table.observe(listed(&truth), at(3));
        prop_assert_eq!(changes.listener_changed, other_listener);
        prop_assert!(table.iter().map(|(id, _)| id.0).eq(truth.iter().copied()));
        // Who is gone by then is no repair.
        prop_assert_eq!(table.repairs().opened as usize, missed.intersection(&truth).count());
        prop_assert_eq!(table.repairs().closed as usize, missed_closes);
        prop_assert_eq!(table.repairs().listener, u64::from(other_listener));
        prop_assert_eq!(table.totals, recounted(&table));
        let repaired = table.repairs();
        table.observe(listed(&truth), at(4));
        prop_assert!(!table.is_in_doubt());
        prop_assert_eq!(table.repairs(), repaired);
    }

    /// Whatever was lost or came twice: after the kernel's complete list the table equals it.
    #[test]
    fn a_resync_is_the_truth(
        events in prop::collection::vec((0u8..3, 0u64..20), 0..80),
        truth in prop::collection::btree_set(0u64..20, 0..20),
    ) {
        let mut table = seeded(&[]);
        for (kind, id) in events {
            let observation = match kind {
                0 => Observation::Opened(socket(id)),
                1 => Observation::Closed { id: ConnectionId(id), bytes_in: 0, bytes_out: 0 },
                _ => Observation::Lost { events: 1 },
            };
            table.observe(observation, at(1));
        }
        let sockets = truth.iter().copied().map(socket).collect();
        table.observe(Observation::Resync { sockets, listener: Some(ConnectionId(999)) }, at(2));
        prop_assert!(table.is_trusted());
        prop_assert_eq!(table.totals, recounted(&table));
        prop_assert!(table.iter().map(|(id, _)| id.0).eq(truth.iter().copied()));
    }
}

fn closed(id: u64) -> Observation {
    Observation::Closed {
        id: ConnectionId(id),
        bytes_in: 0,
        bytes_out: 0,
    }
}

/// All that a relay has.
fn whole(ids: &[u64]) -> ShimReport {
    let shown = |id: &u64| ShimConnection {
        id: ConnectionId(*id),
        client: socket(*id).remote,
        local: socket(*id).local,
        protocol: Protocol::H2Selected,
        can_be_told: true,
        age: None,
        state: ConnectionState::Active,
        user: None,
        user_agent: None,
        counters: Counters::default(),
    };
    ShimReport {
        full: true,
        connections: ids.iter().map(shown).collect(),
        ..ShimReport::default()
    }
}

/// A relay that handed over keeps what drains, the new one does not list it, and an agent that starts anew hears of it from
/// nobody but the one before.
#[test]
fn what_drained_before_the_agent_drains() {
    let mut before = seeded(&[1, 2, 3]);
    before.report(&whole(&[1, 2, 3]), at(1));
    before.report(&whole(&[]), at(2));
    assert_eq!((before.active(), before.draining(), before.left_total()), (0, 3, 3));
    before.observe(closed(3), at(3));
    let left: Vec<ConnectionId> = before.drains().collect();
    assert_eq!(left, [ConnectionId(1), ConnectionId(2)]);

    let mut table = ConnectionTable::default();
    table.drained_before(&left);
    table.observe(
        Observation::Resync {
            sockets: vec![socket(2), socket(4)],
            listener: Some(ConnectionId(999)),
        },
        at(0),
    );
    table.report(&whole(&[4]), at(0));
    assert_eq!((table.active(), table.draining()), (1, 1));
    assert_eq!(table.left_total(), 0, "who left before is not on the way a second time");
    assert_eq!(table.drains().count(), 1, "the other one has closed since");
    table.observe(closed(2), at(1));
    assert_eq!((table.drains().count(), table.draining()), (0, 0));
}

/// A look goes through a part of a large table; after a few all were seen, and the heaviest are those of all.
#[test]
fn a_large_table_is_sampled_in_parts() {
    const ALL: u64 = 150_000;
    let mut table = ConnectionTable::default();
    let numbered = |id: u64| Socket {
        id: ConnectionId(id),
        ..socket(id % 60_000)
    };
    let sockets = (1..=ALL).map(numbered).collect();
    let listener = Some(ConnectionId(999_999));
    table.observe(Observation::Resync { sockets, listener }, at(0));
    let asks = |table: &mut ConnectionTable, requests: u64| {
        let counters = [7, 70_000, ALL].map(|id| {
            let counters = Counters {
                requests: requests * id,
                ..Counters::default()
            };
            (ConnectionId(id), counters)
        });
        let counters = counters.to_vec();
        table.report(
            &ShimReport {
                counters,
                ..ShimReport::default()
            },
            at(0),
        );
    };
    let seen = |table: &ConnectionTable| {
        table
            .scan()
            .filter(|connection| connection.rates.requests > 0.0)
            .count()
    };
    for look in 0..6 {
        table.sample(at(5_000 * look), Weight::Connections);
        if look == 2 {
            assert_eq!(seen(&table), 0, "the first sample of each sets the base");
            asks(&mut table, 1);
        }
        if look == 3 {
            assert_eq!(seen(&table), 1, "a look is a part");
        }
    }
    assert_eq!(seen(&table), 3, "three looks are all");
    let heaviest: Vec<_> = table.heaviest().map(|connection| connection.id.0).collect();
    assert_eq!(heaviest[..3], [ALL, 70_000, 7]);
    let of = |id: u64| table.connection(ConnectionId(id)).expect("it is there").rates.requests;
    // Each was sampled a whole round after its base.
    assert!((of(ALL) - ALL as f64 / 15.0).abs() < 1.0, "{}", of(ALL));
    assert!((of(7) - 7.0 / 15.0).abs() < 1e-3, "{}", of(7));
    // Where loads are measured, every look is of all.
    asks(&mut table, 2);
    table.sample(at(60_000), Weight::Requests);
    assert!(of_all(&table).abs() < 1e-6, "the sum is what counting gives");
}

/// By how much the kept sum of requests differs from the true one.
fn of_all(table: &ConnectionTable) -> f64 {
    table.load(Weight::Requests) - table.scan().map(|connection| connection.rates.requests).sum::<f64>()
}
