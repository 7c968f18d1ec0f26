//! The numbers the planner is held to, each with the worlds and seeds it was seen in.

use std::time::Duration;

use rebalancer_core::policy::Policy;
use rebalancer_sim::{
    balancer::LoadBalancer,
    figures::Run,
    scenario::{default_policy, named},
    setup::{Admission, Horizon},
};

use crate::{loads, runs, say, seeds};

/// E / rho of (500, 500, 0) at 5 %.
const OF_1000: [(LoadBalancer, f64); 2] = [(LoadBalancer::Leastconn, 300.0), (LoadBalancer::RoundRobin, 900.0)];

fn at_five_percent() -> Policy {
    let mut policy = default_policy();
    policy.skew_target = 0.05;
    policy
}

/// GOAWAYs and seconds to the balance, the means and the worst of many runs.
#[derive(Debug)]
struct Cost {
    goaways: f64,
    most: u64,
    took: f64,
    longest: f64,
}

/// What it cost until all of them were level, `lag` seconds not counted.
fn cost(case: &str, runs: &[Run], lag: f64) -> Cost {
    let took = |run: &Run| run.to_balance.expect(case).as_secs_f64() - lag;
    let count = runs.len() as f64;
    Cost {
        goaways: runs.iter().map(|run| run.goaways as f64).sum::<f64>() / count,
        most: runs.iter().map(|run| run.goaways).max().unwrap_or(0),
        took: runs.iter().map(took).sum::<f64>() / count,
        longest: runs.iter().map(took).fold(0.0, f64::max),
    }
}

/// A cluster of ten nodes whose third apiserver came back: somebody is on it before anybody looks.
#[test]
fn a_small_cluster_is_levelled_though_somebody_is_on_the_empty_one() {
    let count = seeds(20);
    for (counts, surplus) in [
        ([15, 15, 0], 9.4),
        ([15, 14, 1], 8.4),
        ([14, 14, 2], 7.4),
        ([29, 27, 4], 14.8),
    ] {
        for (balancer, rho) in [(LoadBalancer::Leastconn, 1.0), (LoadBalancer::RoundRobin, 1.0 / 3.0)] {
            let case = format!("{counts:?}, {balancer}, {count} seeds");
            let cost = cost(&case, &runs(&loads(&counts, balancer, default_policy()), count), 0.0);
            let needed = surplus / rho;
            say(&format!(
                "{case}: {:.1} GOAWAYs (at most {}), {needed:.0} are needed; level after {:.0} s (at most {:.0})",
                cost.goaways, cost.most, cost.took, cost.longest
            ));
            assert!(
                cost.goaways <= 1.25 * needed && cost.longest <= 150.0,
                "{case}: {cost:?}"
            );
        }
    }
}

/// The main job behind a load balancer whose health check is slower than the agents.
#[test]
fn a_balancer_that_admits_late_costs_a_few_probes() {
    let count = seeds(10);
    for lag in [15, 45, 150] {
        for (balancer, bound) in OF_1000 {
            let mut setup = loads(&[500, 500, 0], balancer, at_five_percent());
            setup.admission.lag = Duration::from_secs(lag);
            let case = format!("(500,500,0), {balancer}, admitted after {lag} s, {count} seeds");
            let cost = cost(&case, &runs(&setup, count), lag as f64);
            let allowed = 1.1 * bound + 60.0;
            say(&format!(
                "{case}: {:.0} GOAWAYs (at most {}, {allowed:.0} are allowed), level {:.0} s after admission (at most {:.0}, 60 are \
                 allowed)",
                cost.goaways, cost.most, cost.took, cost.longest
            ));
            assert!(cost.most as f64 <= allowed, "{case}: {cost:?}");
            assert!(cost.took <= 60.0 && cost.longest <= 75.0, "{case}: {cost:?}");
        }
    }
}

/// A balancer that starts it slowly sends it few: whoever is told meanwhile comes straight back, and is not to be told.
#[test]
fn a_slow_start_costs_not_much_more() {
    let count = seeds(10);
    // Leastconn fills it up to its weight at once, and then takes nobody for a while: that is seen after some seconds.
    for ((balancer, bound), times) in OF_1000.into_iter().zip([2.5, 1.5]) {
        let mut setup = loads(&[500, 500, 0], balancer, at_five_percent());
        setup.admission = Admission {
            lag: Duration::from_secs(10),
            slow_start: Duration::from_secs(60),
        };
        let case = format!("(500,500,0), {balancer}, admitted after 10 s and started in 60 s, {count} seeds");
        let cost = cost(&case, &runs(&setup, count), 70.0);
        let allowed = times * bound + 60.0;
        say(&format!(
            "{case}: {:.0} GOAWAYs (at most {}, {allowed:.0} are allowed), level {:.0} s after it has started (at most {:.0})",
            cost.goaways, cost.most, cost.took, cost.longest
        ));
        assert!(cost.goaways <= allowed, "{case}: {cost:?}");
        assert!(cost.longest <= 60.0, "{case}: {cost:?}");
    }
}

/// A minute or so, whatever the size.
#[test]
fn large_clusters_are_level_as_soon_as_small_ones() {
    let count = seeds(1).min(5);
    for clients in [20_000, 100_000] {
        for balancer in [LoadBalancer::Leastconn, LoadBalancer::RoundRobin] {
            let mut setup = loads(&[clients / 2, clients / 2, 0], balancer, default_policy());
            setup.horizon = Horizon::Balanced {
                limit: Duration::from_secs(600),
                after: Duration::from_secs(1),
            };
            let case = format!("{clients} clients, {balancer}, {count} seeds");
            let cost = cost(&case, &runs(&setup, count), 0.0);
            say(&format!(
                "{case}: {:.0} GOAWAYs, level after {:.0} s (at most {:.0})",
                cost.goaways, cost.took, cost.longest
            ));
            assert!(cost.longest <= 150.0, "{case}: {cost:?}");
        }
    }
}

/// An apiserver below the mean that becomes a donor by those who land there: what a home cluster showed two days running.
#[test]
fn who_becomes_a_donor_on_the_way_is_reckoned_with() {
    let count = seeds(20);
    for counts in [[1_054, 81, 518], [908, 672, 77]] {
        for balancer in [LoadBalancer::RoundRobin, LoadBalancer::Random] {
            let setup = loads(&counts, balancer, default_policy());
            let runs = runs(&setup, count);
            let level = runs.iter().filter(|run| run.to_balance.is_some()).count();
            let goaways: u64 = runs.iter().map(|run| run.goaways_total).sum();
            say(&format!(
                "{counts:?}, {balancer}: {level} of {count} seeds balanced (95 % are asked for), {} GOAWAYs",
                goaways / count
            ));
            assert!(
                level as f64 >= 0.95 * count as f64,
                "{counts:?} {balancer}: {level} of {count}"
            );
        }
    }
}

#[test]
fn affinity_costs_no_more_than_a_few_probes_in_six_hours() {
    let count = seeds(3);
    let mut setup = loads(&[500, 500, 0], LoadBalancer::Affinity, default_policy());
    setup.horizon = Horizon::Fixed(Duration::from_secs(6 * 3_600));
    let few = runs(&setup, count);
    let most = few.iter().map(|run| run.goaways_total).max().unwrap_or(0);
    say(&format!(
        "(500,500,0), affinity, six hours, {count} seeds: at most {most} GOAWAYs (120 are allowed)"
    ));
    for run in few {
        assert!(run.goaways_total <= 120, "{} GOAWAYs", run.goaways_total);
        assert!(run.holds.contains_key("futile"), "{:?}", run.holds);
    }
    // The first probe of many is one in 150 of the surplus; those that follow it in vain are as small as of few.
    let mut many = loads(&[10_000, 10_000, 0], LoadBalancer::Affinity, default_policy());
    many.horizon = Horizon::Fixed(Duration::from_secs(6 * 3_600));
    let told = runs(&many, 1)[0].goaways_total;
    let first = 20_000 / 3 / 150;
    say(&format!(
        "(10000,10000,0), affinity, six hours: {told} GOAWAYs, {} are allowed",
        120 + first
    ));
    assert!(told <= 120 + first, "{told}");
}

/// With many donors each agent is within the target now and then, and goes on when the others push it above it again.
#[test]
fn many_donors_reach_the_target() {
    let count = seeds(8);
    for loads_of in [[100, 100, 100, 100, 0], [200, 200, 200, 200, 0]] {
        let setup = loads(&loads_of, LoadBalancer::RoundRobin, default_policy());
        let all = runs(&setup, count);
        let longest = all.iter().filter_map(|run| run.to_balance).max();
        say(&format!(
            "{loads_of:?}, round robin, {count} seeds: level after {longest:?} at most"
        ));
        for run in all {
            assert!(run.to_balance.is_some(), "{loads_of:?}: {:?}", run.holds);
        }
    }
}

#[test]
fn two_apiservers_do_not_swing_in_a_day_of_churn() {
    let count = seeds(2);
    let setup = (named("two-apiservers").expect("it is built in").build)();
    let runs = runs(&setup, count);
    let swings: u64 = runs.iter().map(|run| run.swings).sum();
    let goaways: u64 = runs.iter().map(|run| run.goaways_total).sum();
    say(&format!(
        "two apiservers, round robin, 24 h of churn, {count} seeds: {swings} swings, {} GOAWAYs a day",
        goaways / count
    ));
    assert_eq!(swings, 0);
}

/// Clients that come and go do not make a rebalancing dearer than what it needs and a quarter, and what finding out costs.
#[test]
fn churn_makes_no_rebalancing_dearer() {
    let count = seeds(4);
    let mut worlds = 0;
    for (balancer, bound) in OF_1000 {
        for churn in [0.5, 2.0] {
            for lag in [0, 45] {
                let mut setup = loads(&[500, 500, 0], balancer, at_five_percent());
                setup.admission.lag = Duration::from_secs(lag);
                setup.churn_per_hour = churn;
                let allowed = 1.25 * bound + 60.0;
                for run in runs(&setup, count) {
                    let case = format!("{balancer}, {churn} of the clients an hour, admitted after {lag} s");
                    assert!(
                        run.goaways as f64 <= allowed,
                        "{case}: {} GOAWAYs, {allowed}",
                        run.goaways
                    );
                }
                worlds += 1;
            }
        }
    }
    say(&format!(
        "{worlds} worlds with churn, {count} seeds each: no more than 1.25 E/rho + 60"
    ));
}
