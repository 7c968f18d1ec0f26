//! Worlds that are not kind: load balancers that admit late, agents that restart, peers that only watch.

use std::time::Duration;

use rebalancer_core::policy::Policy;
use rebalancer_sim::{
    balancer::LoadBalancer,
    figures::Run,
    scenario::{default_policy, named},
    setup::{Admission, Contender, Horizon, Incident, Role, Setup},
    simulate,
};

fn loads(loads: &[usize], balancer: LoadBalancer, policy: Policy) -> Setup {
    let mut setup = Setup::of_loads(loads, balancer, policy);
    setup.horizon = Horizon::Balanced {
        limit: Duration::from_secs(3_600),
        after: Duration::from_secs(60),
    };
    setup
}

fn run(setup: &Setup, seed: u64) -> Run {
    simulate(setup, Contender::Rebalancer, seed)
}

/// The main job behind a load balancer whose health check is slower than the agents: few are told in vain, and it is level
/// soon after the apiserver is admitted.
#[test]
fn a_balancer_that_admits_late_costs_a_few_probes() {
    let mut policy = default_policy();
    policy.skew_target = 0.05;
    let (mut worst, mut total, mut runs): (f64, f64, u32) = (0.0, 0.0, 0);
    for lag in [15, 45, 150] {
        for (balancer, bound) in [(LoadBalancer::Leastconn, 300.0), (LoadBalancer::RoundRobin, 900.0)] {
            let mut setup = loads(&[500, 500, 0], balancer, policy.clone());
            setup.admission = Admission {
                lag: Duration::from_secs(lag),
                slow_start: Duration::ZERO,
            };
            for seed in 0..2 {
                let run = run(&setup, seed);
                let case = format!("{balancer}, admitted after {lag} s, seed {seed}");
                let took = run.to_balance.expect(&case).as_secs_f64() - lag as f64;
                assert!(
                    run.goaways as f64 <= 1.1 * bound + 60.0,
                    "{case}: {} GOAWAYs",
                    run.goaways
                );
                worst = worst.max(took);
                total += took;
                runs += 1;
            }
        }
    }
    assert!(
        total / f64::from(runs) <= 60.0,
        "level {} s after admission on average",
        total / f64::from(runs)
    );
    assert!(worst <= 75.0, "level {worst} s after admission at worst");
    eprintln!(
        "{runs} worlds with late admission: level after {:.0} s on average, {worst:.0} s at worst",
        total / f64::from(runs)
    );
}

/// An apiserver below the mean that becomes a donor by those who land there: what a home cluster showed two days running.
#[test]
fn who_becomes_a_donor_on_the_way_is_reckoned_with() {
    for counts in [[1_054, 81, 518], [908, 672, 77]] {
        for balancer in [LoadBalancer::RoundRobin, LoadBalancer::Random] {
            let setup = loads(&counts, balancer, default_policy());
            for seed in 0..3 {
                let run = run(&setup, seed);
                assert!(
                    run.to_balance.is_some(),
                    "{counts:?} {balancer} {seed}: {}",
                    run.last_skew
                );
            }
        }
    }
}

#[test]
fn affinity_costs_no_more_than_a_few_probes_in_six_hours() {
    let mut setup = loads(&[500, 500, 0], LoadBalancer::Affinity, default_policy());
    setup.horizon = Horizon::Fixed(Duration::from_secs(6 * 3_600));
    let run = run(&setup, 1);
    assert!(run.goaways_total <= 120, "{} GOAWAYs", run.goaways_total);
    assert!(run.holds.contains_key("futile"), "{:?}", run.holds);
}

/// A peer that decides and sends nothing, or is paused, changes nothing for those that act.
#[test]
fn a_peer_that_does_not_act_changes_nothing_for_those_that_do() {
    let told = |role: Role| {
        let mut setup = loads(&[600, 300, 0], LoadBalancer::Leastconn, default_policy());
        setup.roles = vec![Role::Active, role];
        let run = run(&setup, 1);
        let by = |server: usize| run.marks.iter().filter(|mark| mark.server == server).count();
        (by(0), by(1), run.to_balance.is_some())
    };
    let (all, _, level) = told(Role::Active);
    assert!(level && all > 280, "{all}");
    for role in [Role::DryRun, Role::Paused, Role::Shimless] {
        let (acting, silent, level) = told(role);
        assert!(level, "{role:?}");
        assert_eq!(silent, 0, "{role:?}");
        assert!(
            acting.abs_diff(all) * 10 < all,
            "{role:?}: {acting} GOAWAYs, {all} when all act"
        );
    }
}

/// An agent that restarts in the middle of a rebalancing, at whatever instant, costs nearly nothing.
#[test]
fn a_restart_of_an_agent_changes_the_cost_by_less_than_a_tenth() {
    let mean = |restart: Option<u64>| {
        let runs = (0..8).map(|seed| {
            let mut world = (named("restart").expect("it is built in").build)();
            if let Some(after) = restart {
                world.incidents.push((
                    Duration::from_secs(92 + after + seed * 3),
                    Incident::RestartAgent(seed as usize % 2),
                ));
            }
            run(&world, seed).goaways_total
        });
        runs.sum::<u64>() as f64 / 8.0
    };
    let undisturbed = mean(None);
    for after in [2, 10] {
        let disturbed = mean(Some(after));
        assert!(
            (disturbed / undisturbed - 1.0).abs() < 0.1,
            "{disturbed} GOAWAYs with a restart about {after} s in, {undisturbed} without"
        );
    }
}

/// The new worlds among the scenarios end level.
#[test]
fn the_unkind_scenarios_end_level() {
    for name in [
        "late-admission",
        "slow-start",
        "agent-restarts",
        "canary",
        "flapping",
        "two-apiservers",
        "uneven",
    ] {
        let setup = (named(name).expect("it is built in").build)();
        let run = run(&setup, 1);
        assert!(run.last_skew < 0.12, "{name}: {} {:?}", run.last_skew, run.holds);
    }
}
