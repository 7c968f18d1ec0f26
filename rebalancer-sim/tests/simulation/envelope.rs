//! The safety envelope, over arbitrary clusters, load balancers, weights and incidents.
//!
//! The rules are restated here from what was sent, not from what the agents say of themselves.

use std::{collections::BTreeMap, time::Duration};

use proptest::prelude::*;
use rebalancer_core::policy::{GoawayRate, Weight};
use rebalancer_sim::{
    balancer::LoadBalancer,
    figures::Run,
    scenario::default_policy,
    setup::{Contender, Group, Horizon, Incident, Placement, Setup, Spread},
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
    ];
    prop::collection::vec((0_u64..600, incident), 0..6).prop_map(|incidents| {
        incidents
            .into_iter()
            .map(|(at, incident)| (Duration::from_secs(at), incident))
            .collect()
    })
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
            (Just((loads, balancer, weight, rate, churn, watches)), incidents)
        })
        .prop_map(|((loads, balancer, weight, rate, churn, watches), incidents)| {
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
                ..Setup::of_loads(&loads, balancer, policy)
            }
        })
}

/// In any window no more than the rate allows, and one full bucket.
fn within_budget(run: &Run, setup: &Setup) -> Result<(), TestCaseError> {
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
                let allowed = rate.max(1.0) + rate * (to - from) + 1.0;
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
    let mut told: BTreeMap<(usize, usize), f64> = BTreeMap::new();
    for mark in &run.marks {
        if let Some(before) = told.insert((mark.server, mark.client), mark.at) {
            prop_assert!(
                mark.at - before >= setup.policy.client_cooldown.as_secs_f64() - 1e-6,
                "client {} was told at {before} s and at {} s",
                mark.client,
                mark.at
            );
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_budget_and_the_cool_down_hold(setup in setups(), seed in any::<u64>()) {
        let run = simulate(&setup, Contender::Rebalancer, seed);
        within_budget(&run, &setup)?;
        cooled_down(&run, &setup)?;
    }

    /// With snapshots as they should be and nothing but clients that come and go, no GOAWAY leaves an apiserver further
    /// below the mean than what its peers did since they were last heard, and no apiserver swings from one side to the other.
    #[test]
    fn nobody_is_taken_below_the_mean(setup in setups(), seed in any::<u64>()) {
        let setup = Setup { incidents: Vec::new(), churn_per_hour: 0.0, ..setup };
        let run = simulate(&setup, Contender::Rebalancer, seed);
        // In two seconds the others tell so many, whose load is the mean of all.
        let others = setup.policy.goaway_rate.per_second(0).max(1.0) * 2.0 * setup.apiservers as f64;
        if setup.policy.weight == Weight::Connections {
            for mark in &run.marks {
                prop_assert!(mark.above_mean >= -others / setup.apiservers as f64 - 1.0, "{mark:?}");
            }
        }
        // One heavy client may take an apiserver from one side to the other and has to go back.
        let allowed = if setup.policy.weight == Weight::Connections { 1 } else { setup.apiservers as u64 };
        prop_assert!(run.swings <= allowed, "{} swings, {allowed} are allowed", run.swings);
    }

    /// Agents that cannot hear anybody do nothing, whatever they see of themselves, once what they heard is too old.
    #[test]
    fn nothing_is_done_on_missing_data(setup in setups(), seed in any::<u64>()) {
        let deaf = vec![(Duration::from_secs(3), Incident::SnapshotLoss(1.0))];
        let setup = Setup { incidents: deaf, ..setup };
        let run = simulate(&setup, Contender::Rebalancer, seed);
        let late = run.marks.iter().find(|mark| mark.at > 3.0 + setup.policy.stale_after().as_secs_f64() + 1.0);
        prop_assert!(late.is_none(), "{late:?}");
    }
}
