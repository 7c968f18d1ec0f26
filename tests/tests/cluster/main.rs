//! The main job, end to end: the demo itself, with its numbers held to their bounds.

mod approval;
mod bad_input;
mod dead_node;
mod evacuation;
mod health_checks;
mod membership;
mod operator;
mod outages;
mod rights;
mod switch;
mod world;

use std::{
    process::{Command, Output},
    time::Duration,
};

use rebalancer_tests::{
    balancer::{Front, Policy},
    binary,
    demo::{
        cluster::{Cluster, Options, START},
        report::Report,
        scene::{Event, Scene},
    },
    demo_binary,
    fixture::Fixture,
    node::{Finding, Shim},
    process::{Process, log_directory, wait_for},
    skip,
};
use serde_json::Value;

/// Plays the demo and gives its report; what it said on stderr is the test's own output.
fn play(flags: &[&str]) -> Value {
    let output: Output = Command::new(demo_binary())
        // A busy machine is given time: the bound is on what happens, not on when.
        .args(["--json", "--seconds=300"])
        .args(flags)
        .output()
        .expect("the demo starts");
    eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success(),
        "the demo {flags:?} ended with {}",
        output.status
    );
    serde_json::from_slice(&output.stdout).expect("one JSON object on stdout")
}

fn number(report: &Value, field: &str) -> f64 {
    report[field]
        .as_f64()
        .unwrap_or_else(|| panic!("`{field}` in {report}"))
}

fn check(report: &Value) {
    assert!(number(report, "skew_after") <= 0.10 + 1e-9, "{report}");
    assert!(number(report, "goaways") > 0.0, "{report}");
    assert!(
        number(report, "goaways") <= 1.25 * number(report, "lower_bound"),
        "{report}"
    );
    for nothing in [
        "goaways_after_balance",
        "client_errors",
        "relists",
        "watch_breaks",
        "missed_events",
    ] {
        assert_eq!(number(report, nothing), 0.0, "{nothing}: {report}");
    }
    let sum = |field: &str| -> u64 {
        let list = report[field].as_array().expect("a list");
        list.iter().filter_map(Value::as_u64).sum()
    };
    for moment in ["before", "after_restart", "after"] {
        assert!(
            sum(moment) >= report["clients"].as_u64().expect("a count"),
            "{moment}: {report}"
        );
    }
    assert_eq!(report["after_restart"][0], 0, "it comes back empty: {report}");
    assert!(number(&report["latency_ms"], "p50") > 0.0, "{report}");
}

#[test]
fn the_standin_is_levelled_behind_leastconn() {
    let report = play(&["--apiserver=standin", "--lb=leastconn"]);
    check(&report);
    assert_eq!(report["apiserver"], "standin");
}

#[test]
fn the_standin_is_levelled_behind_roundrobin_by_the_socket_list() {
    let report = play(&[
        "--apiserver=standin",
        "--lb=roundrobin",
        "--agent-flag=--source=sockdiag",
    ]);
    check(&report);
    assert_eq!(report["source"], "sockdiag");
}

#[test]
fn real_apiservers_are_levelled_behind_roundrobin() {
    if let Err(error) = Fixture::get(|line| eprintln!("{line}")) {
        skip(&format!("{error:#}"));
        return;
    }
    let report = play(&["--apiserver=real", "--lb=roundrobin", "--quiet=60"]);
    check(&report);
    assert_eq!(report["apiserver"], "real");
}

/// Before it is turned on: agents that only watch, and a simulation of this very cluster.
#[test]
fn a_dry_run_tells_nobody_and_the_simulation_from_live_says_what_it_would_cost() {
    const CLIENTS: u64 = 150;
    let directory = log_directory("rebalancer-live-").expect("a directory");
    let options = Options {
        nodes: 3,
        clients: CLIENTS as usize,
        policy: Policy::Leastconn,
        front: Front::default(),
        fixture: None,
        shim: Shim::Relay,
        peers: Finding::Static,
        rebalancer: binary(),
        agent_flags: vec!["--dry-run".to_owned(), "--settle=3s".to_owned()],
        relay_flags: Vec::new(),
        client_flags: Vec::new(),
        directory: directory.clone(),
        etcd_members: 1,
        own_disk: false,
    };
    let mut cluster = Cluster::start(options, &|step| eprintln!("{step}")).expect("a cluster");
    let mut report = Report {
        clients: CLIENTS as usize,
        ..Report::default()
    };
    let mut tell = |_: Event<'_>| {};
    let _swarm = Scene::new(&mut cluster, Policy::Leastconn, START, &mut tell)
        .crash(&mut report)
        .expect("one apiserver is back and empty");
    let node = &cluster.nodes[1];
    let planned = wait_for(START, || {
        let decisions = node.decisions(0).expect("the agent answers");
        decisions.into_iter().find(|decision| decision["hold"].is_null())
    });
    let planned = planned.expect("a plan, which nobody carries out");
    assert_eq!(planned["mode"], "dry-run");
    assert_eq!(cluster.goaways().expect("the agents answer"), 0);
    assert_eq!(cluster.loads().expect("the relays answer")[0], 0, "nobody moved");

    let output = Command::new(binary())
        .args(["simulate", "--from=live", "--lb=leastconn", "--seeds=3", "--json"])
        .arg(format!("--api=unix:{}", node.api().display()))
        .output()
        .expect("the product runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answer: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    let foreseen = &answer["policies"][0];
    assert_eq!(foreseen["name"], "rebalancer");
    let needed = report.lower_bound as f64;
    let goaways = number(foreseen, "goaways_mean");
    assert!(
        (goaways - needed).abs() <= 3.0,
        "{goaways} GOAWAYs where {needed} are needed: {answer}"
    );
    assert_eq!(number(foreseen, "goaways_after_balance"), 0.0, "{answer}");
    cluster.end();
    // Kept when the test fails.
    let _ = std::fs::remove_dir_all(&directory);
}

#[test]
fn an_interrupted_demo_leaves_nothing_behind() {
    let logs = log_directory("rebalancer-interrupted-").expect("a directory");
    let mut command = Command::new(demo_binary());
    command.args(["--apiserver=standin", "--clients=20"]);
    let mut demo = Process::start("demo", command, None, &logs).expect("the demo starts");
    let patience = Duration::from_secs(60);
    wait_for(patience, || demo.log().contains("active connections").then_some(())).expect("the scene begins");
    let children = children_of(demo.id());
    assert!(children.len() >= 9, "apiservers, relays and agents: {children:?}");
    demo.signal(libc::SIGINT);
    let ended = wait_for(patience, || demo.is_running().err()).expect("the demo ends");
    assert!(ended.to_string().contains("interrupted"), "{ended:#}");
    for child in children {
        let gone = wait_for(patience, || {
            (!std::path::Path::new(&format!("/proc/{child}/exe")).exists()).then_some(())
        });
        assert!(gone.is_some(), "process {child} outlived the demo");
    }
}

fn children_of(process: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("a running process");
    tasks
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| {
            list.split_whitespace()
                .filter_map(|id| id.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect()
}
