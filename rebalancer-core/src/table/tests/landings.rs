//! Who counts as one who came, and as one who left.

use super::*;

#[test]
fn who_only_calls_is_neither_load_nor_a_landing() {
    let mut table = ConnectionTable::new(NodeLocal::Exclude, Duration::from_secs(2));
    let listener = Some(ConnectionId(999));
    table.observe(
        Observation::Resync {
            sockets: vec![],
            listener,
        },
        at(0),
    );
    let mut now = 0;
    let mut counted = 0;
    for id in 1..=40 {
        table.observe(Observation::Opened(socket(id)), at(now));
        table.observe(classified(id, Protocol::H2Offered), at(now));
        // Some live through a sample, the others end before.
        if id % 4 == 0 {
            now += 1_900;
            table.age(at(now));
            table.sample(at(now), Weight::Connections);
        }
        let active = table.active() as u64;
        counted += active;
        let closed = Observation::Closed {
            id: ConnectionId(id),
            bytes_in: 0,
            bytes_out: 0,
        };
        table.observe(closed, at(now));
        assert_eq!(table.accepted_total(), counted, "{id}: load and landing at once");
    }
    assert_eq!(
        counted, 4,
        "the first short calls count, until it is seen that there are such"
    );
    settle(&mut table, &mut now);
    assert_eq!((table.active(), table.accepted_total()), (0, counted));
    assert_eq!(
        table.departed_total(),
        counted,
        "who is too young comes to nobody's account, and leaves nobody's"
    );
    table.observe(Observation::Opened(socket(50)), at(now));
    table.observe(classified(50, Protocol::H2Offered), at(now));
    assert_eq!(table.next_stays(), Some(at(now + 2_000)));
    table.age(at(now + 1_999));
    assert_eq!((table.active(), table.accepted_total()), (0, counted));
    table.age(at(now + 2_000));
    assert_eq!((table.active(), table.accepted_total()), (1, counted + 1));
    assert_eq!(table.next_stays(), None);
}

#[test]
fn a_departure_is_of_a_client_that_counted_and_whom_nobody_told() {
    let closed = |id| Observation::Closed {
        id: ConnectionId(id),
        bytes_in: 0,
        bytes_out: 0,
    };
    let mut table = seeded(&[1, 2]);
    let mut now = 1;
    for id in [1, 2] {
        table.observe(classified(id, Protocol::H2Offered), at(1));
    }
    for id in 3..=7 {
        table.observe(Observation::Opened(socket(id)), at(1));
        let protocol = if id == 6 { Protocol::Http1 } else { Protocol::H2Offered };
        table.observe(classified(id, protocol), at(1));
    }
    // A call that counts, as the first do, comes and goes.
    table.observe(closed(3), at(1));
    settle(&mut table, &mut now);
    assert_eq!((table.accepted_total(), table.departed_total()), (4, 1));
    // Its shim answers later that it was told.
    table.set_asked(ConnectionId(7), true);
    for id in [2, 4] {
        table.mark_draining(ConnectionId(id));
    }
    for id in [2, 4, 6, 7] {
        table.observe(closed(id), at(now));
    }
    assert_eq!(table.departed_total(), 1, "told, or nobody who could be");
    for id in [1, 5] {
        table.observe(closed(id), at(now));
    }
    assert_eq!((table.departed_total(), table.active()), (3, 0));
}

#[test]
fn landings_are_http2_counted_once_and_no_seeds() {
    let mut table = seeded(&[1]);
    let mut now = 1;
    table.observe(classified(1, Protocol::H2Offered), at(1));
    table.observe(Observation::Opened(socket(2)), at(1));
    table.observe(classified(2, Protocol::H2Offered), at(2));
    table.observe(classified(2, Protocol::H2Selected), at(3));
    table.observe(Observation::Opened(socket(3)), at(3));
    table.observe(classified(3, Protocol::Http1), at(3));
    table.observe(Observation::Opened(socket(4)), at(3));
    settle(&mut table, &mut now);
    assert_eq!(table.accepted_total(), 1);
    assert_eq!((table.active(), table.unknown()), (3, 1));
    // It is known late, and counted then.
    table.observe(classified(4, Protocol::H2Selected), at(now));
    settle(&mut table, &mut now);
    assert_eq!((table.accepted_total(), table.unknown()), (2, 0));
}
