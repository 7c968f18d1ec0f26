//! The built-in scenarios, one rule each: what the agents must have done, and must not have.

use rebalancer_sim::{
    figures::Run,
    scenario::named,
    setup::{Contender, Horizon, Incident, Setup},
    simulate,
};

fn setup(name: &str) -> Setup {
    (named(name).expect("it is built in").build)()
}

fn run(name: &str, seed: u64) -> Run {
    simulate(&setup(name), Contender::Rebalancer, seed)
}

fn at(setup: &Setup, incident: impl Fn(&Incident) -> bool) -> f64 {
    let found = setup.incidents.iter().find(|(_, one)| incident(one));
    found.expect("the scenario has it").0.as_secs_f64()
}

#[test]
fn after_a_restart_the_load_is_level_and_stays() {
    for name in ["restart", "leastconn-draining", "scale-out"] {
        let run = run(name, 1);
        assert!(run.to_balance.is_some(), "{name}: {run:?}");
        assert_eq!(run.goaways_after, 0, "{name}");
        assert_eq!(run.swings, 0, "{name}: no apiserver goes from one side to the other");
    }
}

/// Draining sockets still count for the balancer: the lottery overshoots, a plan does not.
#[test]
fn a_leastconn_that_counts_draining_sockets_does_not_mislead_a_plan() {
    let run = run("leastconn-draining", 1);
    assert!(
        (282..=300).contains(&run.goaways),
        "{} GOAWAYs, 282 are needed",
        run.goaways
    );
}

#[test]
fn who_is_too_heavy_is_not_moved() {
    let run = run("heavy-controller", 1);
    assert_eq!(run.goaways_total, 0, "{:?}", run.explanations);
}

#[test]
fn an_overloaded_recipient_gets_nobody() {
    let run = run("list-flood", 1);
    assert!(run.holds.contains_key("recipients_stressed"), "{:?}", run.holds);
    assert!(run.to_balance.is_some(), "and later it is level: {run:?}");
}

#[test]
fn futile_is_forgotten_when_the_balancer_is_another() {
    let run = run("lb-change", 1);
    assert!(run.holds.contains_key("futile"), "{:?}", run.holds);
    assert!(run.last_skew < 0.10, "it is level at the end: {}", run.last_skew);
    let setup = setup("lb-change");
    let change = at(&setup, |incident| matches!(incident, Incident::Balancer(_)));
    let in_vain = run.marks.iter().filter(|mark| mark.at < change).count();
    assert!(in_vain < 450, "{in_vain} GOAWAYs in vain");
}

#[test]
fn a_partition_stops_both_sides() {
    let setup = setup("partition");
    let cut = at(
        &setup,
        |incident| matches!(incident, Incident::Partition(side) if !side.is_empty()),
    );
    let healed = at(
        &setup,
        |incident| matches!(incident, Incident::Partition(side) if side.is_empty()),
    );
    let run = simulate(&setup, Contender::Rebalancer, 1);
    // 15 s is how old a snapshot may be.
    let between = run.marks.iter().filter(|mark| mark.at > cut + 15.5 && mark.at < healed);
    assert_eq!(between.count(), 0, "nobody acts on what it does not know");
    assert!(run.holds.contains_key("snapshot_stale"), "{:?}", run.holds);
    assert!(run.to_balance.is_some(), "and goes on when it is healed");
}

#[test]
fn lost_and_late_snapshots_cost_no_more() {
    for name in ["lost-snapshots", "late-snapshots", "clock-trouble"] {
        let run = run(name, 1);
        let needed = if name == "clock-trouble" { 846.0 } else { 282.0 };
        assert!(
            (run.goaways_total as f64) < needed * 1.25,
            "{name}: {} GOAWAYs, {needed} are needed",
            run.goaways_total
        );
        assert!(run.last_skew < 0.10, "{name}: {}", run.last_skew);
    }
}

#[test]
fn steady_is_steady() {
    assert_eq!(run("steady", 1).goaways_total, 0);
}

/// A dry run sends nothing, and its first plan is the one that would have been carried out, to the word.
#[test]
fn a_dry_run_decides_the_same() {
    let active = setup("restart");
    let mut dry = active.clone();
    dry.policy.mode = rebalancer_core::policy::Mode::DryRun;
    let (active, dry) = (
        simulate(&active, Contender::Rebalancer, 2),
        simulate(&dry, Contender::Rebalancer, 2),
    );
    assert_eq!(dry.goaways_total, 0);
    assert_eq!(active.explanations.first(), dry.explanations.first());
}

/// A day of 1,000 kubelets with a rolling upgrade, cut to its first three hours: what it needs, and not a lottery's worth.
#[test]
fn a_rolling_upgrade_costs_what_it_needs() {
    let mut setup = setup("rolling-upgrade");
    setup.horizon = Horizon::Fixed(std::time::Duration::from_secs(3 * 3_600));
    let ours = simulate(&setup, Contender::Rebalancer, 1);
    let lottery = simulate(&setup, Contender::GoawayChance(0.01), 1);
    assert!(ours.last_skew < 0.05, "{}", ours.last_skew);
    assert!(
        ours.goaways_total * 10 < lottery.goaways_total,
        "{} against {}",
        ours.goaways_total,
        lottery.goaways_total
    );
    // One rebalancing after the last: with one of three empty, a third of those who were told land there by chance.
    assert!(ours.goaways_total <= 1_000, "{}", ours.goaways_total);
    let mut each = setup.clone();
    each.policy.upgrade_patience = std::time::Duration::ZERO;
    let each = simulate(&each, Contender::Rebalancer, 1);
    assert!(
        each.goaways_total > 2 * ours.goaways_total,
        "{} without patience, {} with",
        each.goaways_total,
        ours.goaways_total
    );
}
