//! What operators order: told at the budget's pace or over a time, followed until it is known what became of it.

use super::*;

/// The list of two connections.
fn two_connections() -> Input {
    Input::Observations(vec![Observation::Resync {
        sockets: vec![socket(1), socket(2)],
        listener: Some(ConnectionId(9)),
    }])
}

/// One agent without peers, whose operator had the first of two connections told, by a shim that answered `Pending`.
fn with_a_pending_victim(at: Timestamp) -> Agent {
    let mut policy = Policy::new(ApiserverName::new("n"), BTreeSet::new());
    policy.shim = ShimKind::Steer;
    let mut agent = Agent::new(policy.checked().expect("a policy"), 1, Timestamp::default());
    agent.handle(Timestamp::default(), two_connections());
    let report = ShimReport {
        abilities: crate::shim::Abilities::AT_REQUEST,
        ..ShimReport::default()
    };
    agent.handle(at, Input::Shim(report));
    let effects = agent.handle(
        at,
        Input::Command(Command::Goaway {
            connections: vec![ConnectionId(1)],
            force: true,
            over: None,
        }),
    );
    let ordered = effects.iter().find_map(|effect| match effect {
        Effect::SendGoaway(order) => Some(order.victims.clone()),
        _ => None,
    });
    assert_eq!(ordered, Some(vec![ConnectionId(1)]));
    agent.handle(
        at,
        Input::GoawayAnswered(vec![(ConnectionId(1), GoawayResult::Pending)]),
    );
    agent
}

#[test]
fn an_order_that_is_spread_over_a_time_is_told_evenly() {
    let mut world = World::new(&[100, 100], Balancer::RoundRobin, |_| {});
    world.run(60);
    let connections: Vec<_> = world.sockets[0].keys().take(20).map(|id| ConnectionId(*id)).collect();
    let before = world.goaways;
    let order = Command::Goaway {
        connections,
        force: false,
        over: Some(Duration::from_secs(100)),
    };
    world.input(0, Input::Command(order));
    for tenth in 1..=10 {
        world.run(10);
        let told = world.goaways - before;
        assert!(
            (2 * tenth..=2 * tenth + 1).contains(&told),
            "{told} after {tenth} tenths"
        );
    }
}

#[test]
fn a_pending_victim_is_followed_until_it_is_told_or_given_up() {
    let at = Timestamp::from_millis(60_000);
    let later = at + Duration::from_secs(20);
    for (result, goaways, lost, rests) in [
        (GoawayResult::Sent, 1, 0, true),
        (GoawayResult::Expired, 0, 1, true),
        (GoawayResult::Unknown, 0, 1, false),
    ] {
        let mut agent = with_a_pending_victim(at);
        let outcomes = |agent: &Agent| agent.history().next_back().expect("a decision").outcomes;
        assert_eq!((agent.goaways_total(), outcomes(&agent).pending), (0, 1));
        assert_eq!(agent.table().draining(), 0, "it weighs until it is told");
        let wakeup = agent.next_wakeup(at).since(at);
        assert!(
            wakeup >= Duration::from_millis(100),
            "nothing is to do but wait: {wakeup:?}"
        );
        assert!(!agent.is_idle());

        agent.handle(later, Input::GoawayAnswered(vec![(ConnectionId(1), result)]));
        assert_eq!(agent.goaways_total(), goaways, "{result:?}");
        assert_eq!(agent.table().draining() as u64, goaways, "{result:?}");
        agent.handle(later + Duration::from_secs(60), Input::Tick);
        assert!(agent.is_idle(), "{result:?}");
        assert_eq!(agent.outcomes_total().lost, lost, "{result:?}");
        let resting = agent.cooldowns.resting(later).len();
        assert_eq!(
            resting > 0,
            rests,
            "{result:?}: who was asked in vain is not asked again at once"
        );
    }
}

/// An agent without peers, behind which a relay has two connections, the first with a thousand watches.
fn with_a_heavy_client(rate: f64) -> Agent {
    let mut policy = Policy::new(ApiserverName::new("n"), BTreeSet::new());
    policy.shim = ShimKind::Relay;
    policy.goaway_rate = crate::policy::GoawayRate::PerSecond(rate);
    let mut agent = Agent::new(policy.checked().expect("a policy"), 1, Timestamp::default());
    agent.handle(Timestamp::default(), two_connections());
    let shown = |(id, open_watches): (u64, u32)| ShimConnection {
        counters: Counters {
            open_watches,
            ..Counters::default()
        },
        ..shown(&socket(id))
    };
    let report = ShimReport {
        connections: [(1, 1_000), (2, 0)].map(shown).to_vec(),
        upstream_ready: Some(true),
        ..ShimReport::default()
    };
    agent.handle(Timestamp::default(), Input::Shim(report));
    agent
}

/// Has one told by order, and lets time pass until that is over: when it was told, and by then.
fn ordered(agent: &mut Agent, id: u64, mut now: Timestamp) -> (Option<Timestamp>, Timestamp) {
    let mut told = None;
    let order = Command::Goaway {
        connections: vec![ConnectionId(id)],
        force: false,
        over: None,
    };
    let mut effects = agent.handle(now, Input::Command(order));
    assert!(!agent.is_idle(), "it is taken");
    while !agent.is_idle() {
        for effect in std::mem::take(&mut effects) {
            if let Effect::SendGoaway(order) = effect {
                told = Some(now);
                let sent = order.victims.iter().map(|id| (*id, GoawayResult::Sent)).collect();
                effects.extend(agent.handle(now, Input::GoawayAnswered(sent)));
            }
        }
        now = agent.next_wakeup(now);
        effects.extend(agent.handle(now, Input::Tick));
    }
    (told, now)
}

/// The budget may be deep in debt when an operator's order comes: it is told when that is paid, and not given up before.
#[test]
fn an_order_waits_until_a_heavy_client_is_paid_for() {
    for rate in [0.1, 1.0, 10.0] {
        let mut agent = with_a_heavy_client(rate);
        let at = Timestamp::from_millis(60_000);
        let (told, now) = ordered(&mut agent, 1, at);
        assert_eq!(told, Some(at), "a full bucket pays for it");
        let (told, _) = ordered(&mut agent, 2, now);
        let waited = told.expect("it is told").since(at).as_secs_f64();
        let least = 100.0 / rate;
        assert!(
            (least..=least + 2.0 / rate + 11.0).contains(&waited),
            "{waited} s at {rate} a second"
        );
        assert_eq!(agent.outcomes_total().lost, 0);
    }
}

/// What a probe told drains, and a probe that another process attaches does not know it: the agent does.
#[test]
fn what_was_told_drains_over_a_restart_whatever_the_shim_knows() {
    let at = Timestamp::from_millis(60_000);
    let mut agent = with_a_pending_victim(at);
    agent.handle(at, Input::GoawayAnswered(vec![(ConnectionId(1), GoawayResult::Sent)]));
    assert_eq!((agent.table().active(), agent.table().draining()), (1, 1));
    let memory = agent.memory(at);
    assert_eq!(memory.tries.in_vain, 0, "an operator's order finds nothing out");
    let sockets = [1, 2].map(|id| Socket {
        id: ConnectionId(id),
        local: "10.0.0.1:6443".parse().expect("an address"),
        remote: format!("10.1.0.1:{}", 1000 + id).parse().expect("an address"),
        bytes_in: 0,
        bytes_out: 0,
        start: 0,
    });
    let policy = agent.policy().clone();
    let mut next = Agent::with_memory(policy, 2, Timestamp::default(), &memory, Duration::from_secs(1));
    let listener = Some(ConnectionId(9));
    let list = Observation::Resync {
        sockets: sockets.to_vec(),
        listener,
    };
    next.handle(Timestamp::default(), Input::Observations(vec![list]));
    let report = ShimReport {
        abilities: Abilities::AT_REQUEST,
        ..ShimReport::default()
    };
    next.handle(Timestamp::default(), Input::Shim(report));
    assert_eq!((next.table().active(), next.table().draining()), (1, 1));
    assert_eq!(next.memory(Timestamp::default()).draining, [ConnectionId(1)]);
}

/// Who is asked and has not heard yet still weighs here: there is no room for them twice.
#[test]
fn who_is_asked_takes_room() {
    let mut policy = Policy::new(ApiserverName::new("n0"), BTreeSet::from([ApiserverName::new("n1")]));
    policy.shim = ShimKind::Steer;
    policy.goaway_rate = crate::policy::GoawayRate::PerSecond(10.0);
    policy.goaway_share = 1.0;
    let mut agent = Agent::new(policy.checked().expect("a policy"), 1, Timestamp::default());
    let list = Observation::Resync {
        sockets: (1..=90).map(socket).collect(),
        listener: Some(ConnectionId(999)),
    };
    agent.handle(Timestamp::default(), Input::Observations(vec![list]));
    let report = ShimReport {
        abilities: crate::shim::Abilities::AT_REQUEST,
        connections: (1..=90).map(|id| shown(&socket(id))).collect(),
        upstream_ready: Some(true),
        ..ShimReport::default()
    };
    agent.handle(Timestamp::default(), Input::Shim(report.clone()));
    let all = ramp::Seen {
        told: 100,
        landed: 100,
        elsewhere: 100,
    };
    agent.ramp.settled(100, all, 5, Timestamp::default());
    let mut asked = BTreeSet::new();
    let mut left = false;
    let mut told = 0;
    for ms in (0..40_000).step_by(250) {
        let now = Timestamp::from_millis(60_000 + ms);
        let peer = Snapshot {
            apiserver: ApiserverName::new("n1"),
            connections: 0,
            load: 0.0,
            state: ServerState::Ready,
            plan_in_flight: false,
            rebalancing: false,
            ..agent.snapshot(now)
        };
        let mut effects = agent.handle(now, Input::Peer(ApiserverName::new("n1"), Ok(peer)));
        effects.extend(agent.handle(now, Input::Tick));
        for effect in effects {
            if let Effect::SendGoaway(order) = effect {
                asked.extend(order.victims.iter().copied());
                agent.handle(
                    now,
                    Input::GoawayAnswered(order.victims.iter().map(|id| (*id, GoawayResult::Pending)).collect()),
                );
            }
        }
        if !left && asked.len() >= 10 {
            left = true;
            // Others leave: for reasons of their own, none of the plan.
            let of_plan: BTreeSet<_> = agent
                .plan
                .as_ref()
                .expect("a plan")
                .unsent
                .iter()
                .copied()
                .chain(asked.iter().copied())
                .collect();
            let gone: Vec<_> = (1..=90)
                .map(ConnectionId)
                .filter(|id| !of_plan.contains(id))
                .take(20)
                .collect();
            assert_eq!(gone.len(), 20);
            let closed = gone.iter().map(|id| Observation::Closed {
                id: *id,
                bytes_in: 0,
                bytes_out: 0,
            });
            agent.handle(now, Input::Observations(closed.collect()));
        }
        told = told.max(asked.len());
    }
    assert!(left);
    // 70 are left, so the mean is 35, and no more than 35 may be told.
    assert!(
        told <= 35,
        "{told} are asked: {} would be left where the mean is 35",
        70 - told
    );
}

/// Who is told late in a long order has its cool-down as well.
#[test]
fn who_is_told_late_rests() {
    let mut policy = Policy::new(ApiserverName::new("n"), BTreeSet::new());
    policy.shim = ShimKind::Relay;
    let mut agent = Agent::new(policy.checked().expect("a policy"), 1, Timestamp::default());
    agent.handle(Timestamp::default(), two_connections());
    agent.handle(Timestamp::default(), Input::Shim(ShimReport::default()));
    let order = Command::Goaway {
        connections: vec![ConnectionId(1), ConnectionId(2)],
        force: true,
        over: Some(Duration::from_secs(3_600)),
    };
    let mut effects = agent.handle(Timestamp::from_millis(60_000), Input::Command(order));
    let mut told = Vec::new();
    for second in 60..2_000 {
        let now = Timestamp::from_millis(1_000 * second);
        for effect in std::mem::take(&mut effects) {
            if let Effect::SendGoaway(order) = effect {
                told.push((second, order.victims.clone()));
                agent.handle(
                    now,
                    Input::GoawayAnswered(order.victims.iter().map(|id| (*id, GoawayResult::Sent)).collect()),
                );
            }
        }
        effects = agent.handle(now, Input::Tick);
    }
    assert_eq!(told.len(), 2, "{told:?}");
    let now = Timestamp::from_millis(2_000_000);
    assert_eq!(
        agent.cooldowns.resting(now).len(),
        1,
        "{told:?}: told {} s ago, the cool-down is 600 s",
        2_000 - told[1].0
    );
}
