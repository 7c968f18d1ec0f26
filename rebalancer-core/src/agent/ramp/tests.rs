//! Landings and plans in order, with the tries they lead to.

use super::*;

fn at(seconds: u64) -> Timestamp {
    Timestamp::from_millis(seconds * 1_000)
}

/// Of two donors of three.
const PROBE: u64 = 5;
const TELLERS: Tellers = Tellers {
    even: 1.0 / 3.0,
    part: 0.5,
    probe: 3,
    interval: Duration::from_secs(5),
};

fn seen(told: u64, elsewhere: u64) -> Seen {
    Seen {
        told,
        landed: told,
        elsewhere,
    }
}

const VAIN: Seen = Seen {
    told: 6,
    landed: 6,
    elsewhere: 0,
};

/// So many landed, and so many of them elsewhere, all of whom are evidence.
fn of(landed: u64, elsewhere: u64) -> Landed {
    Landed {
        landed,
        elsewhere,
        evidence: elsewhere,
    }
}

#[test]
fn each_plan_that_helps_makes_the_next_four_times_as_large() {
    let mut ramp = Ramp::new(at(0));
    assert_eq!(ramp.limit(3, at(0)), Ok(3));
    for (told, next) in [(3, 12), (12, 48), (48, 192), (5, 192)] {
        assert_eq!(
            ramp.settled(told, seen(told as u64, 1 + told as u64 / 3), PROBE, at(1)),
            None
        );
        assert_eq!(ramp.limit(3, at(1)), Ok(next), "after {told}");
    }
    let mut in_vain = |second, landed| {
        ramp.landed(of(landed, 0), TELLERS, at(second));
        ramp.settled(6, VAIN, PROBE, at(second))
    };
    let all = |told, landed| Some(Vain { told, landed });
    assert_eq!(in_vain(2, 6), None, "six may all come back by chance");
    assert_eq!(in_vain(6, 6), None, "and twelve");
    assert_eq!(
        in_vain(9, 3),
        all(18, 15),
        "what is no chance ends it, with all that was told meanwhile"
    );
    assert_eq!((ramp.limit(3, at(9)), ramp.tried().1), (Err(FIRST_WAIT), 18));
}

/// A donor's landings count after half a second, those on the recipient after five: a plan that settles between the two has
/// seen none elsewhere, as all that follow it.
#[test]
fn landings_that_are_heard_of_later_are_no_doubt() {
    let few = 2;
    let mut ramp = Ramp::new(at(0));
    ramp.landed(of(5, 2), TELLERS, at(1));
    ramp.settled(3, seen(5, 2), few, at(1));
    let in_vain = |seconds: std::ops::Range<u64>, ramp: &mut Ramp| {
        seconds.into_iter().any(|second| {
            ramp.landed(of(2, 0), TELLERS, at(second));
            ramp.settled(3, VAIN, few, at(second)).is_some()
        })
    };
    assert!(!in_vain(2..8, &mut ramp), "{ramp:?}");
    // They land between two plans, and count all the same.
    ramp.landed(of(8, 8), TELLERS, at(8));
    assert!(!in_vain(8..14, &mut ramp), "{ramp:?}");
    assert_eq!(ramp.limit(3, at(14)), Ok(12));
    // The load balancer has lost it again.
    assert!(in_vain(14..15, &mut ramp), "{ramp:?}");
}

#[test]
fn waits_stay_short_while_an_apiserver_may_not_be_admitted_and_double_to_hours_then() {
    let mut ramp = Ramp::new(at(0));
    let mut now = at(0);
    let mut waits = Vec::new();
    for _ in 0..31 {
        assert!(ramp.settled(3, VAIN, PROBE, now).is_some());
        let left = ramp.limit(3, now).expect_err("it waits");
        waits.push(left.as_secs());
        assert_eq!(ramp.is_futile(), left >= FUTILE_WAIT);
        assert!(!ramp.look(now + left / 2));
        now = now + left;
        assert!(ramp.look(now) && ramp.is_probe());
    }
    assert_eq!(waits[..15], [&[5, 10][..], &[12; 13]].concat(), "{waits:?}");
    assert!(
        waits[14..]
            .windows(2)
            .all(|pair| pair[1] == (pair[0] * 2).min(12 * 3_600)),
        "{waits:?}"
    );
    assert_eq!(waits.last(), Some(&(12 * 3_600)));
}

#[test]
fn who_lands_elsewhere_ends_every_wait_and_a_few_do_not_make_the_past_forgotten() {
    let mut ramp = Ramp::new(at(0));
    ramp.settled(3, VAIN, PROBE, at(0));
    ramp.settled(3, VAIN, PROBE, at(1_000));
    let (wait, in_vain) = ramp.tried();
    assert_eq!((wait, in_vain), (Duration::from_secs(10), 6));
    ramp.landed(of(1, 1), TELLERS, at(1_001));
    assert_eq!((ramp.limit(3, at(1_001)), ramp.tried()), (Ok(12), (wait, in_vain)));
    ramp.landed(of(CERTAIN, CERTAIN), TELLERS, at(1_002));
    assert_eq!(ramp.tried(), (Duration::ZERO, 0));
}

/// Leastconn with a slow start: the first all land elsewhere, then only as many as the weight has grown for.
#[test]
fn an_apiserver_that_starts_slowly_gets_what_it_takes_and_little_more() {
    let mut ramp = Ramp::new(at(0));
    assert!(!ramp.landed(of(5, 5), TELLERS, at(1)));
    ramp.settled(3, seen(5, 5), PROBE, at(1));
    assert!(!ramp.landed(of(24, 24), TELLERS, at(4)));
    ramp.settled(12, seen(24, 24), PROBE, at(4));
    assert_eq!(ramp.limit(3, at(4)), Ok(48), "all of them land elsewhere");
    assert!(!ramp.landed(of(48, 10), TELLERS, at(7)), "one look says nothing");
    assert!(ramp.landed(of(48, 10), TELLERS, at(10)), "more are not to be told now");
    ramp.settled(48, seen(96, 20), PROBE, at(11));
    assert_eq!(ramp.limit(3, at(11)), Err(PAUSE));
    ramp.landed(of(6, 4), TELLERS, at(12));
    assert_eq!(ramp.limit(3, at(12)), Err(Duration::from_secs(2)), "that ends no wait");
    assert!(ramp.look(at(14)));
    let Ok(next) = ramp.limit(3, at(14)) else {
        panic!("the wait is over");
    };
    assert!(
        (9..=11).contains(&next),
        "{next}: its half of 14 taken in five seconds, and some more"
    );
    // Nearly all land elsewhere again: it has started.
    for second in [20, 21] {
        ramp.landed(of(34, 34), TELLERS, at(second));
    }
    ramp.settled(17, seen(34, 34), PROBE, at(21));
    assert_eq!(ramp.limit(3, at(21)), Ok(4 * 17));
    // Long after it was admitted, fewer are no slow start.
    assert!(!ramp.landed(of(96, 20), TELLERS, at(200)));
}

/// A balancer that seeks the emptiest is known by the first few that are told while one starts slowly; and another one not.
#[test]
fn what_kind_of_balancer_starts_one_slowly_is_seen() {
    for (kind, elsewhere, seeks) in [
        ("leastconn", 28, true),
        ("the better of two", 21, false),
        ("in turn", 8, false),
    ] {
        let mut ramp = Ramp::new(at(0));
        ramp.landed(of(5, 2), TELLERS, at(1));
        ramp.settled(12, seen(5, 2), PROBE, at(1));
        for second in [6, 8] {
            ramp.landed(of(90, 14), TELLERS, at(second));
        }
        assert!(ramp.is_slow() && !ramp.takes_all, "{kind}: {ramp:?}");
        // Who was told before that was seen says nothing.
        ramp.landed(of(60, 60), TELLERS, at(10));
        assert!(ramp.is_slow(), "{kind}");
        assert!(ramp.look(at(11)));
        for _ in 0..2 {
            ramp.landed(of(20, elsewhere / 2), TELLERS, at(13));
        }
        assert_eq!(ramp.takes_all, seeks, "{kind}: {ramp:?}");
    }
}

/// In turn, or by chance, a third lands elsewhere: that is what is expected, however lucky the first were.
#[test]
fn an_even_choice_is_no_slow_start() {
    let mut ramp = Ramp::new(at(0));
    for (second, told, landed, elsewhere) in [(1, 3, 5, 4), (11, 12, 24, 5), (21, 48, 90, 22), (31, 192, 380, 110)] {
        for later in [0, 3] {
            let slow = ramp.landed(of(landed / 2, elsewhere / 2), TELLERS, at(second + later));
            assert!(!slow, "{elsewhere} of {landed}");
        }
        ramp.settled(told, seen(landed, elsewhere), PROBE, at(second));
        assert_eq!(ramp.limit(3, at(second)), Ok(4 * told), "{elsewhere} of {landed}");
    }
}

/// One donor of two is none for a moment: half as many are expected elsewhere by that, and none of what landed before.
#[test]
fn a_donor_less_for_a_moment_makes_no_slow_start() {
    let alone = Tellers {
        even: 2.0 / 3.0,
        ..TELLERS
    };
    let mut ramp = Ramp::new(at(0));
    ramp.landed(of(5, 2), TELLERS, at(1));
    ramp.settled(12, seen(5, 2), PROBE, at(1));
    for second in [5, 6, 7] {
        assert!(!ramp.landed(of(27, 9), TELLERS, at(second)), "{ramp:?}");
    }
    assert!(!ramp.landed(of(6, 4), alone, at(8)), "{ramp:?}");
}

#[test]
fn nobody_who_has_landed_yet_says_nothing() {
    let mut ramp = Ramp::new(at(0));
    let nobody = Seen {
        told: 3,
        ..Seen::default()
    };
    assert_eq!(ramp.settled(3, nobody, PROBE, at(10)), None);
    assert_eq!(ramp.limit(3, at(10)), Ok(3));
}

/// What was seen of the balancer is not found out again, unless it is long ago.
#[test]
fn a_restart_goes_on_with_as_many_as_before_and_knows_a_slow_start() {
    let mut ramp = Ramp::new(at(0));
    ramp.landed(of(5, 5), TELLERS, at(1));
    ramp.settled(12, seen(24, 24), PROBE, at(4));
    let next = Ramp::resumed(&ramp.remembered(0, at(5)), Duration::from_secs(2), at(7));
    assert_eq!(next.limit(3, at(7)), Ok(48));
    let next = Ramp::resumed(&ramp.remembered(0, at(5)), FRESH, at(170));
    assert!(next.is_probe() && !next.is_slow(), "{next:?}");
    ramp.landed(of(24, 24), TELLERS, at(5));
    ramp.landed(of(48, 10), TELLERS, at(6));
    assert!(ramp.landed(of(48, 10), TELLERS, at(8)) && ramp.is_slow(), "{ramp:?}");
    let next = Ramp::resumed(&ramp.remembered(0, at(8)), Duration::from_secs(1), at(9));
    assert!(next.is_slow() && next.takes_all, "{next:?}");
    assert_eq!(next.limit(3, at(9)), Err(Duration::from_secs(2)));
}

#[test]
fn a_restart_goes_on_with_what_is_left_of_a_wait() {
    let tries = RememberedTries {
        wait: Duration::from_secs(3_600),
        left: Duration::from_secs(9),
        in_vain: 40,
        ..RememberedTries::default()
    };
    let mut ramp = Ramp::resumed(&tries, Duration::from_secs(2), at(100));
    assert_eq!(ramp.limit(3, at(100)), Err(Duration::from_secs(7)));
    assert!(ramp.look(at(107)) && ramp.is_futile());
    ramp.settled(3, VAIN, PROBE, at(108));
    assert_eq!(
        ramp.tried(),
        (Duration::from_secs(3_600), 43),
        "short waits while it is fresh never shorten it"
    );
}

/// A process begins with its own clock: what was before that is not at its beginning.
#[test]
fn a_restart_makes_nothing_younger() {
    let tries = RememberedTries {
        wait: Duration::from_secs(43_200),
        left: Duration::from_secs(14_400),
        changed: Some(Duration::from_secs(150)),
        admitted: Some(Duration::from_secs(150)),
        ..RememberedTries::default()
    };
    let mut ramp = Ramp::resumed(&tries, Duration::ZERO, at(0));
    assert!(ramp.is_fresh(at(9)) && !ramp.is_fresh(at(10)));
    let again = ramp.remembered(0, at(5));
    assert_eq!(again.admitted, Some(Duration::from_secs(155)));
    assert_eq!(again.changed, Some(Duration::from_secs(155)));
    assert!(ramp.others_tell(at(60)), "it has waited eight hours of twelve");
}

/// Nor is an apiserver that was admitted long ago taken for one that starts slowly by the next process.
#[test]
fn what_was_admitted_long_ago_does_not_start_slowly_after_a_restart() {
    let mut ramp = Ramp::new(at(0));
    ramp.landed(of(9, 3), TELLERS, at(1));
    let tries = ramp.remembered(0, at(1_000));
    let mut next = Ramp::resumed(&tries, Duration::from_secs(2), at(0));
    next.landed(of(9, 3), TELLERS, at(5));
    assert!(!next.is_fresh(at(5)), "{next:?}");
    let away = Ramp::resumed(&tries, Duration::from_secs(200), at(0));
    assert_eq!(away.slow_until, None, "nobody knows what was admitted meanwhile");
    next.renew(at(6));
    next.landed(of(9, 3), TELLERS, at(7));
    assert!(next.is_fresh(at(8)), "the apiservers are others: {next:?}");
}

/// However often: the waits grow from process to process, also where none lives to see what became of its probe.
#[test]
fn one_that_restarts_again_and_again_waits_longer_each_time() {
    for is_seen in [true, false] {
        let mut tries = RememberedTries::default();
        let mut waits = Vec::new();
        for _ in 0..30 {
            let mut ramp = Ramp::resumed(&tries, Duration::from_secs(2), at(0));
            if let Some(ends) = ramp.ends() {
                // The next one goes on where this one ends.
                let life = ends.min(at(100));
                tries = ramp.remembered(0, life);
                if !ramp.look(life) {
                    continue;
                }
            }
            tries = if is_seen {
                ramp.settled(3, VAIN, PROBE, at(100));
                ramp.remembered(0, at(100))
            } else {
                ramp.remembered(3, at(100))
            };
            waits.push(tries.wait.as_secs());
        }
        assert!(waits.last() > Some(&100), "{waits:?}");
        assert!(waits.is_sorted(), "{waits:?}");
    }
}

/// What one wait of hours ended in is no measure of the next: the load is level.
#[test]
fn what_was_in_vain_is_forgotten_when_moving_has_made_the_load_level() {
    let mut ramp = Ramp::new(at(0));
    for second in 0..12 {
        ramp.settled(3, VAIN, PROBE, at(1_000 * second));
    }
    let futile = ramp.tried();
    assert!(ramp.is_futile());
    assert!(!ramp.levelled(at(20_000)), "nobody was seen to land elsewhere");
    ramp.landed(of(9, 2), TELLERS, at(20_001));
    assert!(!ramp.levelled(at(20_002)), "two may be anybody");
    ramp.landed(of(9, 2), TELLERS, at(20_003));
    assert_eq!(ramp.tried(), futile);
    assert!(ramp.levelled(at(20_004)));
    assert_eq!(ramp.tried(), (Duration::ZERO, 0));
}

#[test]
fn who_waits_for_long_joins_the_try_of_others() {
    for (wait, since, joins) in [
        (60, 50, false),
        (240, 10, false),
        (240, 119, false),
        (240, 120, true),
        (10_240, 40, false),
        (10_240, 5_120, true),
    ] {
        let mut ramp = Ramp::new(at(0));
        ramp.wait = Duration::from_secs(wait);
        ramp.next = Next::After(at(1_000 + wait));
        ramp.others_tell(at(1_000 + since));
        assert_eq!(ramp.next == Next::Probe, joins, "{since} s of {wait}");
    }
    let mut ramp = Ramp::new(at(0));
    ramp.others_tell(at(5));
    assert_eq!(ramp.next, Next::Probe);
    ramp.next = Next::UpTo(7);
    ramp.others_tell(at(5));
    assert_eq!(ramp.next, Next::UpTo(7));
}
