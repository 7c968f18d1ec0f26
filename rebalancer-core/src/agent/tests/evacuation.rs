//! An apiserver that is emptied before its restart: everybody who can be told, in its time, and no more.

use super::*;

impl World {
    fn evacuate(&mut self, index: usize, over: u64) {
        self.input(index, Input::Command(Command::Evacuate(Duration::from_secs(over))));
    }

    fn progress(&self, index: usize) -> Progress {
        self.agents[index].evacuation(self.now()).expect("an evacuation")
    }
}

#[test]
fn an_evacuation_tells_everybody_in_its_time_and_nobody_is_sent_there_until_the_return() {
    for balancer in [Balancer::RoundRobin, Balancer::LeastSockets] {
        let mut world = World::new(&[100, 100, 100], balancer, |policy| {
            policy.goaway_rate = crate::policy::GoawayRate::PerSecond(0.1);
        });
        world.run(60);
        world.evacuate(0, 20);
        world.run(10);
        let told = world.goaways;
        assert!((49..=53).contains(&told), "{balancer:?}: {told} in half of the time");
        assert_eq!(world.holds()[1..], ["evacuating"; 2], "{balancer:?}: the others wait");
        world.run(60);
        let active = world.active();
        assert_eq!((active[0], active.iter().sum::<usize>()), (0, 300), "{balancer:?}");
        assert!(
            world.progress(0).to_go == 0 && world.progress(0).told >= 100,
            "{balancer:?}"
        );
        assert_eq!(world.agents[0].snapshot(world.now()).state, ServerState::Evacuating);
        assert!(world.agents[0].advice(world.now()).drains);
        let others: usize = world
            .per_second
            .iter()
            .filter(|((index, _), _)| *index > 0)
            .map(|(_, told)| told)
            .sum();
        assert_eq!(others, 0, "{balancer:?}: the others are level and told nobody");
        world.run(300);
        assert_eq!(world.active()[0], 0, "{balancer:?}: it is no recipient");
        assert!(
            !world.holds()[1..].contains(&"evacuating"),
            "the others go on: {:?}",
            world.holds()
        );

        world.input(0, Input::Command(Command::Return));
        world.run(1);
        let advice = world.agents[0].advice(world.now());
        assert!(advice.returns && !advice.drains, "{advice:?}");
        for agent in &mut world.agents {
            agent.policy.goaway_rate = crate::policy::GoawayRate::Auto;
        }
        world.run(180);
        assert!(
            world.active()[0] >= 40,
            "{balancer:?}: clients come again: {:?}",
            world.active()
        );
    }
}

#[test]
fn a_balancer_that_sends_everybody_back_is_named_and_they_are_left_alone() {
    let mut world = World::new(&[50, 50, 50], Balancer::Affinity, |_| {});
    world.run(60);
    world.evacuate(0, 5);
    world.run(200);
    let told = world.goaways;
    assert!((250..=300).contains(&told), "four times fifty and a hundred: {told}");
    let stuck = world.progress(0).stuck.expect("it is said");
    assert!(stuck.contains("load balancer"), "{stuck}");
    world.run(90);
    assert_eq!(world.goaways, told);
    world.run(300);
    assert!(world.goaways > told, "it is tried again later");
}

#[test]
fn an_evacuation_outlives_the_agent_and_ends_with_the_apiserver() {
    let listener = |id: u64| {
        let sockets = vec![];
        let listener = Some(ConnectionId(id));
        Input::Observations(vec![Observation::Resync { sockets, listener }])
    };
    let shim = |ready: Option<bool>, gone: bool| {
        Input::Shim(ShimReport {
            upstream_ready: ready,
            upstream_gone: gone,
            ..ShimReport::default()
        })
    };
    let upstream = |listener: u64| {
        Input::Shim(ShimReport {
            upstream_ready: Some(true),
            upstream_listener: Some(listener),
            ..ShimReport::default()
        })
    };
    let (at, over) = (Timestamp::from_millis, Duration::from_secs(60));
    let evacuated = |kind: ShimKind| {
        let other = ApiserverName::new("m");
        let mut policy = Policy::new(ApiserverName::new("n"), BTreeSet::from([other.clone()]));
        policy.shim = kind;
        let policy = policy.checked().expect("a policy");
        let mut agent = Agent::new(policy.clone(), 1, at(0));
        agent.handle(at(0), listener(9));
        agent.handle(at(1), shim(Some(true), false));
        let (answer, _) = agent.command(at(1), Command::Evacuate(over));
        let last = Hold::FewerThanTwoApiservers { apiservers: 1 };
        assert_eq!(answer, Answer::Held(last), "nobody is known to take the clients");
        let peer = Snapshot {
            apiserver: other.clone(),
            state: ServerState::Ready,
            ..agent.snapshot(at(1))
        };
        agent.handle(at(1), Input::Peer(other, Ok(peer)));
        let (answer, _) = agent.command(at(2), Command::Evacuate(over));
        assert_eq!(answer, Answer::Done);
        (policy, agent)
    };
    for (kind, steps, ends) in [
        // A relay's socket says nothing of the apiserver behind it, nor does one that is not ready.
        (
            ShimKind::Relay,
            vec![listener(10), shim(Some(false), false), shim(Some(true), false)],
            false,
        ),
        (
            ShimKind::Relay,
            vec![
                shim(Some(false), true),
                shim(Some(false), false),
                shim(Some(true), false),
            ],
            true,
        ),
        (ShimKind::Relay, vec![shim(Some(false), true)], false),
        // Restarted with the relay, which saw nothing of it: another socket listens; or the relay alone.
        (
            ShimKind::Relay,
            vec![upstream(5), Input::ShimFailed("no relay".to_owned()), upstream(6)],
            true,
        ),
        (
            ShimKind::Relay,
            vec![upstream(5), Input::ShimFailed("no relay".to_owned()), upstream(5)],
            false,
        ),
        (ShimKind::Steer, vec![listener(9)], false),
        (ShimKind::Steer, vec![listener(10)], true),
    ] {
        for restarts in [false, true] {
            let (policy, mut agent) = evacuated(kind);
            for (index, step) in steps.iter().enumerate() {
                if restarts {
                    let memory = agent.memory(at(1_000));
                    agent = Agent::with_memory(policy.clone(), 2, at(0), &memory, Duration::from_secs(5));
                    if kind == ShimKind::Relay {
                        agent.handle(at(0), listener(9));
                    }
                }
                assert!(agent.is_evacuating(), "{kind:?}, before step {index}");
                agent.handle(at(2_000 + index as u64), step.clone());
            }
            assert_eq!(agent.is_evacuating(), !ends, "{kind:?} {steps:?}, restarts {restarts}");
            assert_eq!(agent.returned().is_some(), ends);
        }
    }
    let (policy, agent) = evacuated(ShimKind::Relay);
    let mut memory = agent.memory(at(10_000));
    let resumed = Agent::with_memory(policy.clone(), 2, at(0), &memory, Duration::from_secs(5));
    let lasts = resumed.evacuation(at(0)).expect("it goes on").lasts;
    let advice = resumed.advice(at(0));
    assert!(
        advice.drains && !advice.returns,
        "the others are not known yet: {advice:?}"
    );
    let progress = resumed.evacuation(at(0)).expect("it goes on");
    assert!(
        progress.to_go == 0 && !progress.is_done() && progress.stuck.is_some(),
        "nobody is known to be off: {progress:?}"
    );
    let mut resumed = resumed;
    let other = ApiserverName::new("m");
    let down = Snapshot {
        apiserver: other.clone(),
        state: ServerState::Down,
        ..resumed.snapshot(at(1))
    };
    resumed.handle(at(1), Input::Peer(other, Ok(down)));
    let advice = resumed.advice(at(1));
    assert!(!advice.drains && advice.returns, "there is no other one: {advice:?}");
    assert_eq!(lasts, Duration::from_millis(14_998));
    let fresh = Agent::new(policy.clone(), 3, at(0));
    assert!(
        fresh.advice(at(1)).returns && !fresh.advice(at(300_000)).returns,
        "one whose state was lost may have said that nobody is to be sent"
    );
    if let Some(evacuation) = &mut memory.evacuation {
        evacuation.is_over = true;
    }
    let rebooted = Agent::with_memory(policy, 2, at(0), &memory, Duration::from_secs(5));
    assert!(!rebooted.is_evacuating() && rebooted.returned().is_some());
}

#[test]
fn who_cannot_be_told_is_named_and_nobody_is_in_a_rehearsal() {
    let mut world = World::new(&[3, 3], Balancer::RoundRobin, |_| {});
    let http1 = |id: u64, can_be_told: bool| ShimConnection {
        id: ConnectionId(id),
        client: "10.1.0.1:1024".parse().expect("an address"),
        local: "10.0.0.1:6443".parse().expect("an address"),
        protocol: Protocol::Http1,
        can_be_told,
        age: None,
        state: ConnectionState::Active,
        user: None,
        user_agent: None,
        counters: Counters::default(),
    };
    let ids: Vec<u64> = world.sockets[0].keys().copied().collect();
    let report = ShimReport {
        connections: vec![http1(ids[0], false), http1(ids[1], true)],
        upstream_ready: Some(true),
        ..ShimReport::default()
    };
    world.input(0, Input::Shim(report));
    let before = world.active().iter().sum::<usize>();
    assert_eq!(before, 6);
    // Peers hear of each other.
    world.run(5);
    world.evacuate(0, 0);
    let progress = world.progress(0);
    assert_eq!(progress.stay, [(ConnectionId(ids[0]), planner::LeftOut::Deaf)]);
    world.run(30);
    let told: Vec<bool> = ids.iter().map(|id| world.sockets[0][id]).collect();
    assert_eq!(
        told,
        [false, true, true],
        "the one whose next answer can tell it is told"
    );

    for (mode, shim) in [(Mode::DryRun, ShimKind::Relay), (Mode::Active, ShimKind::None)] {
        let mut policy = Policy::new(ApiserverName::new("n"), BTreeSet::new());
        (policy.mode, policy.shim) = (mode, shim);
        let mut agent = Agent::new(policy.checked().expect("a policy"), 1, Timestamp::default());
        let (answer, _) = agent.command(Timestamp::default(), Command::Evacuate(Duration::ZERO));
        assert!(
            matches!(answer, Answer::Held(Hold::ShimUnavailable { .. })),
            "{answer:?}"
        );
        assert!(!agent.is_evacuating());
    }
}
