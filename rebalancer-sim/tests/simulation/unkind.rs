//! Worlds that are not kind: load balancers that admit late, agents that restart, peers that only watch.

use std::time::Duration;

use rebalancer_sim::{
    balancer::LoadBalancer,
    figures::Run,
    scenario::{default_policy, named},
    setup::{Contender, Incident, Role, Setup},
    simulate,
};

use crate::{loads, say, seeds};

fn run(setup: &Setup, seed: u64) -> Run {
    simulate(setup, Contender::Rebalancer, seed)
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
    let count = seeds(12);
    for balancer in [LoadBalancer::RoundRobin, LoadBalancer::Leastconn] {
        let mean = |restarts: usize| {
            let runs = (0..count).map(|seed| {
                let mut world = (named("restart").expect("it is built in").build)();
                world.balancer = balancer;
                // The apiserver is back after 90 s; most of the rebalancing is done half a minute later.
                let instants = [seed * 5_000 / count, 5_000 + seed * 9_000 / count];
                for (turn, after) in instants.into_iter().take(restarts).enumerate() {
                    world.incidents.push((
                        Duration::from_millis(94_000 + after),
                        Incident::RestartAgent((seed as usize + turn) % 3),
                    ));
                }
                run(&world, seed).goaways_total
            });
            runs.sum::<u64>() as f64 / count as f64
        };
        let undisturbed = mean(0);
        for restarts in [1, 2] {
            let disturbed = mean(restarts);
            say(&format!(
                "{balancer}, {restarts} agents restarted at {count} instants: {disturbed:.1} GOAWAYs, {undisturbed:.1} without"
            ));
            assert!(
                (disturbed / undisturbed - 1.0).abs() < 0.1,
                "{balancer}: {disturbed} GOAWAYs with {restarts} restarts, {undisturbed} without"
            );
        }
    }
}

/// The new worlds among the scenarios end level.
#[test]
fn the_unkind_scenarios_end_level() {
    for name in [
        "late-admission",
        "slow-start",
        "slow-start-leastconn",
        "health-checks",
        "relay-replaced",
        "agent-restarts",
        "canary",
        "flapping",
        "two-apiservers",
        "uneven",
        "uneven-donors",
    ] {
        let setup = (named(name).expect("it is built in").build)();
        let run = run(&setup, 1);
        assert!(run.last_skew < 0.12, "{name}: {} {:?}", run.last_skew, run.holds);
    }
}
