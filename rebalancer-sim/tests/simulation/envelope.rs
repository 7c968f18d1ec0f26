//! The safety envelope, over arbitrary clusters, load balancers, weights and incidents, kind and unkind.
//!
//! The rules are restated here from what was sent, not from what the agents say of themselves. Unkind is: a balancer that
//! admits late and starts slowly, health checks, kubelets' probes and short calls, agents that restart at any instant or stand
//! still and see the clock jump, clocks that NTP slews and that differ, relays that are replaced, peers that only try, are paused or have no shim, apiservers that
//! come and go, clients that come and go. Each rule is tried in the same few worlds each time, and in so many others by
//! `REBALANCER_CASES`.

use std::{collections::BTreeMap, time::Duration};

use proptest::{prelude::*, test_runner::RngSeed};
use rebalancer_core::policy::{GoawayRate, Weight};
use rebalancer_sim::{
    balancer::LoadBalancer,
    figures::Run,
    scenario::default_policy,
    setup::{Admission, Contender, Group, Horizon, Incident, Placement, Role, Setup, Spread, Strangers},
    simulate,
};

fn balancers() -> impl Strategy<Value = LoadBalancer> {
    prop::sample::select(vec![
        LoadBalancer::Random,
        LoadBalancer::RoundRobin,
        LoadBalancer::Leastconn,
        LoadBalancer::LeastconnSockets,
        LoadBalancer::LeastconnInstances(3),
        LoadBalancer::PowerOfTwo,
        LoadBalancer::Affinity,
        LoadBalancer::Maglev,
    ])
}

fn incidents(apiservers: usize) -> impl Strategy<Value = Vec<(Duration, Incident)>> {
    let incident = prop_oneof![
        (0..apiservers).prop_map(Incident::Crash),
        (0..apiservers).prop_map(Incident::Start),
        balancers().prop_map(Incident::Balancer),
        (0.0..0.9).prop_map(Incident::SnapshotLoss),
        (0_u64..3_000).prop_map(|ms| Incident::SnapshotDelay(Duration::from_millis(ms))),
        (0..apiservers).prop_map(|server| Incident::Partition(vec![server])),
        Just(Incident::Partition(Vec::new())),
        (0..apiservers, 1_u64..120)
            .prop_map(|(server, seconds)| Incident::Freeze(server, Duration::from_secs(seconds))),
        (1_usize..80).prop_map(|count| Incident::Arrive(Group::plain(count))),
        (1_usize..50).prop_map(Incident::ListFlood),
        (0..apiservers).prop_map(Incident::RestartAgent),
        (0..apiservers).prop_map(Incident::ReplaceRelay),
        (0..apiservers, slews()).prop_map(|(server, ppm)| Incident::Slew(server, ppm)),
    ];
    prop::collection::vec((0_u64..600, incident), 0..6).prop_map(|incidents| {
        incidents
            .into_iter()
            .map(|(at, incident)| (Duration::from_secs(at), incident))
            .collect()
    })
}

/// By how much NTP slews a clock: adjtimex, chrony, and more than either.
fn slews() -> impl Strategy<Value = i32> {
    prop_oneof![
        prop::sample::select(vec![0, 500, -500, 83_333, -83_333]),
        -100_000..100_000_i32,
    ]
}

/// How the balancer takes who came back, who else connects, what each agent does, and how its clock runs.
fn surroundings() -> impl Strategy<Value = (Admission, Strangers, Vec<Role>, Vec<i32>)> {
    let admission = prop_oneof![
        Just(Admission::default()),
        (0_u64..150, 0_u64..90).prop_map(|(lag, slow)| Admission {
            lag: Duration::from_secs(lag),
            slow_start: Duration::from_secs(slow),
        }),
    ];
    let strangers = prop_oneof![
        Just(Strangers::default()),
        (0.0_f64..4.0, 0.0_f64..1.2).prop_map(|(calls, probes)| Strangers {
            calls,
            probes,
            ..Strangers::default()
        }),
    ];
    let role = prop_oneof![
        6 => Just(Role::Active),
        1 => Just(Role::DryRun),
        1 => Just(Role::Paused),
        1 => Just(Role::Shimless),
    ];
    let roles = prop_oneof![Just(Vec::new()), prop::collection::vec(role, 5)];
    let clocks = prop_oneof![Just(Vec::new()), prop::collection::vec(slews(), 5)];
    (admission, strangers, roles, clocks)
}

/// Agents and relays that are replaced, and agents that stand still: what an upgrade of this very program is.
fn replacements(apiservers: usize) -> impl Strategy<Value = Vec<(Duration, Incident)>> {
    let incident = prop_oneof![
        (0..apiservers).prop_map(Incident::RestartAgent),
        (0..apiservers).prop_map(Incident::ReplaceRelay),
        (0..apiservers, 1_u64..30).prop_map(|(server, seconds)| Incident::Freeze(server, Duration::from_secs(seconds))),
        (0..apiservers, slews()).prop_map(|(server, ppm)| Incident::Slew(server, ppm)),
    ];
    prop::collection::vec((0_u64..120, incident), 0..4).prop_map(|incidents| {
        let at = |(at, incident)| (Duration::from_secs(at), incident);
        incidents.into_iter().map(at).collect()
    })
}

/// Worlds that a rule is tried in.
fn cases() -> ProptestConfig {
    let cases = std::env::var("REBALANCER_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok());
    // The same worlds each time, or others when so many are asked for.
    let rng_seed = if cases.is_some() {
        RngSeed::Random
    } else {
        RngSeed::Fixed(1)
    };
    let cases = cases.unwrap_or(40);
    crate::say(&format!(
        "the envelope: a rule in {cases} arbitrary worlds, a seed each"
    ));
    ProptestConfig {
        cases,
        rng_seed,
        ..ProptestConfig::default()
    }
}

fn setups() -> impl Strategy<Value = Setup> {
    let weights = prop::sample::select(vec![
        Weight::Connections,
        Weight::Connections,
        Weight::Requests,
        Weight::Streams,
    ]);
    let loads =
        prop::collection::vec(0_usize..160, 2..5).prop_filter("somebody", |loads| loads.iter().sum::<usize>() > 0);
    (loads, balancers(), weights, 0.5_f64..20.0, 0.0_f64..2.0, 0_u32..12)
        .prop_flat_map(|(loads, balancer, weight, rate, churn, watches)| {
            let incidents = incidents(loads.len());
            (
                Just((loads, balancer, weight, rate, churn, watches)),
                incidents,
                surroundings(),
            )
        })
        .prop_map(|((loads, balancer, weight, rate, churn, watches), incidents, around)| {
            let (admission, strangers, roles, clocks) = around;
            let mut policy = default_policy();
            policy.weight = weight;
            policy.goaway_rate = GoawayRate::PerSecond(rate);
            let requests = if weight == Weight::Requests {
                Spread::Lognormal {
                    median: 1.0,
                    sigma: 1.5,
                }
            } else {
                Spread::Constant(1.0)
            };
            let group = Group {
                requests,
                watches: watches.max(1),
                ..Group::plain(loads.iter().sum())
            };
            Setup {
                groups: vec![group],
                placement: Placement::Counts(loads.clone()),
                incidents,
                horizon: Horizon::Fixed(Duration::from_secs(900)),
                churn_per_hour: churn,
                identities: true,
                admission,
                strangers,
                roles,
                clocks,
                ..Setup::of_loads(&loads, balancer, policy)
            }
        })
}

/// In any window no more than the rate allows, and one full bucket; a second is the node's own.
fn within_budget(run: &Run, setup: &Setup) -> Result<(), TestCaseError> {
    let (_, fastest) = setup.paces();
    let rate = setup.policy.goaway_rate.per_second(0);
    for server in 0..setup.apiservers {
        let times: Vec<f64> = run
            .marks
            .iter()
            .filter(|mark| mark.server == server)
            .map(|mark| mark.at)
            .collect();
        for (first, from) in times.iter().enumerate() {
            for (last, to) in times.iter().enumerate().skip(first) {
                let allowed = rate.max(1.0) + rate * fastest * (to - from) + 1.0;
                prop_assert!(
                    (last - first + 1) as f64 <= allowed + 1e-6,
                    "{} GOAWAYs from {from} s to {to} s on {server}, {allowed} are allowed",
                    last - first + 1
                );
            }
        }
    }
    Ok(())
}

/// No apiserver tells a client twice within the cool-down.
fn cooled_down(run: &Run, setup: &Setup) -> Result<(), TestCaseError> {
    let (_, fastest) = setup.paces();
    let mut told: BTreeMap<(usize, usize), f64> = BTreeMap::new();
    for mark in &run.marks {
        if let Some(before) = told.insert((mark.server, mark.client), mark.at) {
            prop_assert!(
                mark.at - before >= setup.policy.client_cooldown.as_secs_f64() / fastest - 0.002,
                "client {} was told at {before} s and at {} s",
                mark.client,
                mark.at
            );
        }
    }
    Ok(())
}

/// Who acts tells; the others, and those whose agents do not know enough, do not.
fn only_those_who_act(run: &Run, setup: &Setup) -> Result<(), TestCaseError> {
    for mark in &run.marks {
        let role = setup.roles.get(mark.server).copied().unwrap_or(Role::Active);
        prop_assert_eq!(role, Role::Active, "{:?}", mark);
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn whatever_happens_the_budget_and_the_cool_down_hold_and_every_plan_ends(setup in setups(), seed in any::<u64>()) {
        let run = simulate(&setup, Contender::Rebalancer, seed);
        within_budget(&run, &setup)?;
        cooled_down(&run, &setup)?;
        only_those_who_act(&run, &setup)?;
        prop_assert_eq!(run.overdue_plans, 0);
    }

    /// With snapshots as they should be, no GOAWAY leaves an apiserver further below the mean than what its peers did since
    /// they were last heard, and no apiserver swings from one side to the other: clients come and go, agents and relays are
    /// replaced, strangers call, the balancer admits late.
    #[test]
    fn nobody_is_taken_below_the_mean(
        (setup, replaced) in setups().prop_flat_map(|setup| {
            let replaced = replacements(setup.apiservers);
            (Just(setup), replaced)
        }),
        seed in any::<u64>(),
    ) {
        let clients: usize = setup.groups.iter().map(|group| group.count).sum();
        let setup = Setup { incidents: replaced, ..setup };
        let run = simulate(&setup, Contender::Rebalancer, seed);
        // In two seconds the others tell so many, whose load is the mean of all; and as many connect anew, or break, or call.
        let (_, fastest) = setup.paces();
        let others = setup.policy.goaway_rate.per_second(0).max(1.0) * fastest * 2.0 * setup.apiservers as f64;
        let churned = 2.0 * (setup.churn_per_hour * clients as f64 / 3_600.0 + setup.strangers.calls);
        if setup.policy.weight == Weight::Connections {
            // All clients of a relay that is replaced look for another apiserver at once, and are seen when they have landed.
            let settle = setup.policy.settle.as_secs_f64();
            let replaced: Vec<f64> = setup
                .incidents
                .iter()
                .filter(|(_, one)| matches!(one, Incident::ReplaceRelay(_)))
                .map(|(at, _)| at.as_secs_f64())
                .collect();
            let is_calm = |at: f64| !replaced.iter().any(|then| (0.0..settle).contains(&(at - then)));
            for mark in run.marks.iter().filter(|mark| is_calm(mark.at)) {
                let lowest = -(others + churned) / setup.apiservers as f64 - 1.0;
                prop_assert!(mark.above_mean >= lowest, "{mark:?}, {lowest} is allowed");
            }
        }
        // One heavy client may take an apiserver from one side to the other and has to go back; so may a relay that is
        // replaced: all its clients go where the balancer likes.
        let moved = setup.incidents.iter().filter(|(_, one)| matches!(one, Incident::ReplaceRelay(_))).count();
        let allowed = if setup.policy.weight == Weight::Connections { 1 } else { setup.apiservers as u64 };
        let allowed = allowed + (moved * setup.apiservers) as u64;
        // Where the balancer counts the sockets of those who drain, whoever restarts in those minutes goes to the others,
        // whatever agents do: each apiserver may get that many too many, and has to give them back.
        let drawn = setup.balancer == LoadBalancer::LeastconnSockets && churned > 0.0;
        let allowed = allowed + if drawn { setup.apiservers as u64 } else { 0 };
        prop_assert!(run.swings <= allowed, "{} swings, {allowed} are allowed", run.swings);
    }

    /// Agents that cannot hear anybody do nothing, whatever they see of themselves, once what they heard is too old.
    #[test]
    fn nothing_is_done_on_missing_data(setup in setups(), seed in any::<u64>()) {
        let deaf = vec![(Duration::from_secs(3), Incident::SnapshotLoss(1.0))];
        let setup = Setup { incidents: deaf, ..setup };
        let run = simulate(&setup, Contender::Rebalancer, seed);
        let (slowest, _) = setup.paces();
        let stale = setup.policy.stale_after().as_secs_f64() / slowest;
        let late = run.marks.iter().find(|mark| mark.at > 3.0 + stale + 1.0);
        prop_assert!(late.is_none(), "{late:?}");
    }

    /// A hold that is not the operator's, nor a peer's fault, nor says that nothing is to be done, ends by itself.
    #[test]
    fn a_hold_ends_by_itself(setup in setups(), seed in any::<u64>()) {
        let mut setup = setup;
        let stay = |one: &Incident| matches!(one, Incident::Start(_) | Incident::RestartAgent(_) | Incident::ReplaceRelay(_) | Incident::Slew(..));
        setup.incidents.retain(|(_, one)| stay(one));
        setup.policy.client_cooldown = Duration::from_secs(60);
        let run = simulate(&setup, Contender::Rebalancer, seed);
        for (reason, longest) in &run.longest_holds {
            let bound = match *reason {
                // What operators or peers have to end, what needs nobody to do anything, and what tries again by itself after
                // a wait that its sentence names.
                "paused" | "below_threshold" | "noise" | "peer_unknown" | "snapshot_stale" | "fewer_than_two_apiservers"
                | "dry_run" | "unmovable" | "futile" => continue,
                // A client may keep its old connection for as long as its watches last.
                "clients_in_transit" => 620.0,
                // As long as there is nobody else to tell.
                "cooling_down" => 2.0 * setup.policy.client_cooldown.as_secs_f64() + 60.0,
                // A plan of a minute at the budget's pace, and what its clients take to land.
                "plan_in_flight" => 300.0,
                // It rests twice for a minute; and while the others' plans go on, who has none left holds by that.
                "budget_spent" => 130.0 + run.longest_holds.get("plan_in_flight").copied().unwrap_or(0.0),
                // Each apiserver may begin anew as the one before is waited for.
                "upgrade_in_progress" => {
                    setup.policy.upgrade_patience.as_secs_f64() / 3.0 * setup.apiservers as f64
                }
                // With measured weights one moves at a time: each of the others may have its turn first.
                "peer_plan_in_flight" => 300.0 * (setup.apiservers - 1) as f64,
                _ => 130.0,
            };
            // Its waits are by the node's own clock.
            let bound = bound / setup.paces().0;
            prop_assert!(*longest <= bound, "`{reason}` for {longest} s, {bound} s are allowed");
        }
    }
}
