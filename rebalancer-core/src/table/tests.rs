//! What the table must be after whatever it was told.

use super::*;
use proptest::prelude::*;

fn socket(id: u64) -> Socket {
    Socket {
        id: ConnectionId(id),
        local: "10.0.0.1:6443".parse().expect("an address"),
        remote: format!("10.0.1.1:{}", 1024 + id).parse().expect("an address"),
        bytes_in: 0,
        bytes_out: 0,
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

#[test]
fn loopback_is_not_counted() {
    let mut table = seeded(&[]);
    let local = Socket {
        remote: "127.0.0.1:5".parse().expect("an address"),
        ..socket(1)
    };
    table.observe(Observation::Opened(local), at(1));
    assert_eq!(table.active(), 0);
}

#[test]
fn accepted_counts_http2_once_and_no_seeds() {
    let mut table = seeded(&[1]);
    let classified = |id, protocol| Observation::Classified {
        id: ConnectionId(id),
        protocol,
    };
    table.observe(classified(1, Protocol::H2Offered), at(1));
    table.observe(Observation::Opened(socket(2)), at(1));
    table.observe(classified(2, Protocol::H2Offered), at(2));
    table.observe(classified(2, Protocol::H2Selected), at(3));
    table.observe(Observation::Opened(socket(3)), at(3));
    table.observe(classified(3, Protocol::Http1), at(3));
    assert_eq!(table.accepted_total(), 1);
    assert_eq!(table.active(), 2);
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
    assert_eq!(table.active(), 0, "the kernel has not shown them");
    table.report(&said(&[], &[2]), at(2));
    table.observe(Observation::Opened(socket(1)), at(1));
    table.observe(Observation::Opened(socket(2)), at(1));
    let protocol = |id| table.connection(ConnectionId(id)).map(|connection| connection.protocol);
    assert_eq!(protocol(1), Some(Protocol::H2Selected));
    assert_eq!(protocol(2), Some(Protocol::Unknown));
    assert_eq!(table.accepted_total(), 1);
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
