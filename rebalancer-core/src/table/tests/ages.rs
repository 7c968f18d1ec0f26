//! How old a connection is, whoever says so first, and what its figures are then.

use super::*;

/// What a shim says of a connection: how old it is, and what it asked.
fn aged(id: u64, age: Duration, requests: u64) -> ShimReport {
    ShimReport {
        connections: vec![ShimConnection {
            id: ConnectionId(id),
            client: socket(id).remote,
            local: socket(id).local,
            protocol: Protocol::H2Selected,
            can_be_told: true,
            age: Some(age),
            state: ConnectionState::Active,
            user: None,
            user_agent: None,
            counters: Counters {
                requests,
                ..Counters::default()
            },
        }],
        ..ShimReport::default()
    }
}

fn list(ids: &[u64]) -> Observation {
    Observation::Resync {
        sockets: ids.iter().copied().map(socket).collect(),
        listener: Some(ConnectionId(999)),
    }
}

const HOUR: Duration = Duration::from_secs(3_600);

fn opened_at(table: &ConnectionTable, id: u64) -> u64 {
    let connection = table.connection(ConnectionId(id)).expect("it is there");
    connection.opened_at.as_millis()
}

/// Which of the two an agent hears first when it starts is chance.
#[test]
fn a_shims_word_of_an_age_counts_whether_it_comes_before_the_source_or_after() {
    let now = 2 * 3_600_000;
    for shim_is_first in [false, true] {
        let mut table = ConnectionTable::default();
        if shim_is_first {
            table.report(&aged(1, HOUR, 0), at(now));
            table.observe(list(&[1]), at(now + 500));
        } else {
            table.observe(list(&[1]), at(now));
            table.report(&aged(1, HOUR + Duration::from_millis(500), 0), at(now + 500));
        }
        assert_eq!(opened_at(&table, 1), now - 3_600_000, "first: {shim_is_first}");
    }
}

/// A source that failed shows afterwards who came meanwhile: how old they are is not known, or known by the shim alone; and
/// what they asked until then is no rate.
#[test]
fn who_is_shown_late_weighs_what_it_asks_and_not_what_it_asked_before() {
    for (knows_age, speaks_first) in [(true, true), (true, false), (false, true), (false, false)] {
        let case = format!("{knows_age} {speaks_first}");
        let start = 10_000_000;
        let mut table = ConnectionTable::default();
        table.observe(list(&[]), at(start));
        table.observe(Observation::Lost { events: 1 }, at(start + 1));
        // It asked a hundred times a second for ten minutes, which nobody saw.
        let said = |seconds: u64| {
            let mut report = aged(1, Duration::from_secs(seconds), 100 * seconds);
            if !knows_age {
                report.connections[0].age = None;
            }
            report
        };
        let shown = start + 600_000;
        let report = |table: &mut ConnectionTable, ms: u64| {
            table.report(&said((ms - start) / 1_000), at(ms));
        };
        if speaks_first {
            report(&mut table, shown - 1_000);
        }
        table.observe(list(&[1]), at(shown));
        for ms in (shown..shown + 60_000).step_by(500) {
            table.age(at(ms));
            table.sample(at(ms), Weight::Requests);
            if ms % 1_000 == 0 && (speaks_first || ms > shown + 1_500) {
                report(&mut table, ms);
            }
            let rate = table.connection(ConnectionId(1)).expect("it is there").rates.requests;
            // A look may be of half a second in which the shim said nothing, and of the next one twice as much.
            assert!(
                rate <= 210.0,
                "{case}: {rate} requests a second after {} ms",
                ms - shown
            );
        }
        let rate = table.connection(ConnectionId(1)).expect("it is there").rates.requests;
        assert!((90.0..=110.0).contains(&rate), "{case}: {rate} in the end");
        assert!(of_all(&table).abs() < 1e-6, "{case}");
        let age = shown + 59_500 - opened_at(&table, 1);
        assert_eq!(age > 600_000, knows_age, "{case}: {age} ms old");
        assert_eq!(table.accepted_total(), 1, "{case}: it came after the agent");
    }
}

/// What the source sees as it happens is dated by the source: the word of a shim is some milliseconds older or younger.
#[test]
fn who_was_seen_to_open_keeps_its_time() {
    let mut table = seeded(&[]);
    table.observe(Observation::Opened(socket(1)), at(10_000));
    table.report(&aged(1, Duration::from_millis(1_200), 5), at(10_900));
    assert_eq!(opened_at(&table, 1), 10_000);
}

/// One client, many user agents over one connection: whoever is left alone by one of them stays so.
#[test]
fn the_first_user_agent_counts() {
    let mut table = seeded(&[1]);
    for name in ["kube-controller-manager/a", "kube-controller-manager/b", "other/c"] {
        let mut report = aged(1, HOUR, 1);
        report.connections[0].user_agent = Some(name.to_owned());
        table.report(&report, at(1_000));
        let connection = table.connection(ConnectionId(1)).expect("it is there");
        assert_eq!(connection.user_agent(), Some("kube-controller-manager/a"));
    }
}
