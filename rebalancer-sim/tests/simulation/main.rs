//! What the agents do together, in virtual time: the figures they are held to, the scenarios, and the safety envelope.
//!
//! `REBALANCER_SEEDS` says how often each world of a figure is run, `REBALANCER_CASES` in how many arbitrary worlds each rule
//! of the envelope is tried.

mod bounds;
mod envelope;
mod figures;
mod futile;
mod scenarios;
mod unkind;

use std::{io::Write as _, time::Duration};

use rebalancer_core::policy::Policy;
use rebalancer_sim::{
    balancer::LoadBalancer,
    figures::Run,
    setup::{Contender, Group, Horizon, Incident, Setup, Spread},
    simulate,
};

/// A line of the test's log, whether or not the test passes.
fn say(line: &str) {
    // What cannot be said is not worth a failure.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// How often a world is run: so often where nobody says otherwise.
fn seeds(otherwise: u64) -> u64 {
    let said = std::env::var("REBALANCER_SEEDS")
        .ok()
        .and_then(|seeds| seeds.parse().ok());
    said.unwrap_or(otherwise)
}

/// A world of these loads, watched until it has been balanced for a minute.
fn loads(loads: &[usize], balancer: LoadBalancer, policy: Policy) -> Setup {
    let mut setup = Setup::of_loads(loads, balancer, policy);
    setup.horizon = Horizon::Balanced {
        limit: Duration::from_secs(3_600),
        after: Duration::from_secs(60),
    };
    setup
}

/// One world, with the agents.
fn run(setup: &Setup, seed: u64) -> Run {
    simulate(setup, Contender::Rebalancer, seed)
}

/// The same once for each seed.
fn runs(setup: &Setup, seeds: u64) -> Vec<Run> {
    (0..seeds).map(|seed| run(setup, seed)).collect()
}

/// So many clients with two watches each, who ask so often a second.
fn who_watch(count: usize, requests: f64) -> Group {
    Group {
        requests: Spread::Constant(requests),
        watches: 2,
        ..Group::plain(count)
    }
}

/// 1,200 clients, of whom seven of ten only watch.
fn seven_of_ten_watch() -> Vec<Group> {
    vec![who_watch(840, 0.0), Group::plain(360)]
}

/// The third apiserver dies then, and is back half a minute later.
fn restart_at(second: u64) -> Vec<(Duration, Incident)> {
    vec![
        (Duration::from_secs(second), Incident::Crash(2)),
        (Duration::from_secs(second + 30), Incident::Start(2)),
    ]
}
