//! When a plan has settled, and when an order is due.

use super::*;

const SETTLE: Duration = Duration::from_secs(10);

/// A plan that told so many, the last at 100 s.
fn told(count: u64, is_probe: bool, seen: Seen) -> Plan {
    let at = Timestamp::from_millis(100_000);
    let client = |id: u64| (ConnectionId(id), ClientKey::User(format!("u{id}").into()), at);
    Plan {
        generation: 1,
        unsent: VecDeque::new(),
        last_goaway: at,
        is_ordered: false,
        is_evacuation: false,
        spread: None,
        decision: 1,
        given_up: at + SETTLE * 10,
        is_probe,
        asked: BTreeSet::new(),
        told: (0..count).map(client).collect(),
        keys: BTreeMap::new(),
        fates: BTreeMap::new(),
        outcomes: Outcomes::default(),
        expires: at + SETTLE * 10,
        seen,
        landed_here: 0,
    }
}

#[test]
fn a_plan_settles_when_it_is_known_where_its_clients_go() {
    let seen = |told, landed, elsewhere| Seen {
        told,
        landed,
        elsewhere,
    };
    let known = |landing, quota, limit| Known {
        landing,
        quota,
        limit,
        is_counted: true,
    };
    let measured = Known {
        is_counted: false,
        ..known(0, 50.0, Some(100))
    };
    for (case, plan, known, expected) in [
        (
            "nobody was told",
            told(0, false, Seen::default()),
            known(9, 0.0, None),
            true,
        ),
        (
            "a probe, nobody landed",
            told(5, true, seen(5, 0, 0)),
            known(5, 0.0, Some(5)),
            false,
        ),
        (
            "a probe, one elsewhere",
            told(5, true, seen(5, 2, 1)),
            known(3, 0.0, Some(5)),
            true,
        ),
        (
            "a probe, all but few back",
            told(50, true, seen(50, 45, 0)),
            known(5, 0.0, Some(50)),
            true,
        ),
        (
            "a probe, half of them back",
            told(50, true, seen(50, 25, 0)),
            known(25, 0.0, Some(50)),
            false,
        ),
        (
            "as much again to tell",
            told(40, false, seen(40, 0, 0)),
            known(40, 10.0, Some(160)),
            true,
        ),
        (
            "less again to tell",
            told(40, false, seen(40, 0, 0)),
            known(40, 9.0, Some(160)),
            false,
        ),
        (
            "held small, and none landed",
            told(40, false, seen(40, 0, 0)),
            known(40, 99.0, Some(40)),
            false,
        ),
        (
            "held small by a wait",
            told(40, false, seen(40, 0, 0)),
            known(40, 99.0, None),
            false,
        ),
        (
            "held small, seen elsewhere",
            told(40, false, seen(40, 20, 1)),
            known(30, 99.0, Some(40)),
            true,
        ),
        (
            "half of them landed",
            told(40, false, seen(40, 20, 0)),
            known(20, 0.0, Some(40)),
            true,
        ),
        (
            "what must be measured",
            told(40, false, seen(40, 40, 40)),
            measured,
            false,
        ),
    ] {
        let soon = plan.last_goaway + Duration::from_millis(9_999);
        assert_eq!(plan.is_settled(known, SETTLE, soon), expected, "{case}");
        assert!(
            plan.is_settled(known, SETTLE, plan.last_goaway + SETTLE),
            "{case}: nobody waits for ever"
        );
        let mut awaited = told(1, false, seen(1, 1, 1));
        awaited.asked.insert(ConnectionId(7));
        assert!(
            !awaited.is_settled(known, SETTLE, soon + SETTLE),
            "{case}: the shim has still to say"
        );
        awaited.asked.clear();
        awaited.unsent.push_back(ConnectionId(7));
        assert!(
            !awaited.is_settled(known, SETTLE, soon + SETTLE),
            "{case}: one is still to be told"
        );
    }
}

#[test]
fn an_order_over_a_time_is_due_bit_by_bit_and_not_given_up_before() {
    let mut plan = told(0, false, Seen::default());
    plan.unsent.extend((0..10).map(ConnectionId));
    let began = Timestamp::from_millis(100_000);
    plan.spread_over(Duration::from_secs(3_600), SETTLE, began);
    assert_eq!(plan.due_at(), began);
    plan.unsent.pop_front();
    assert_eq!(plan.due_at(), began + Duration::from_secs(360));
    assert!(plan.expires >= began + Duration::from_secs(3_600) && plan.given_up > plan.expires);
}
