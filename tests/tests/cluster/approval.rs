//! What ends or holds up a rebalancing from outside: an operator who has not approved it, a shim that falls silent; and the
//! decision log meanwhile.

use std::{fs, os::unix::fs::PermissionsExt as _};

use rebalancer_tests::{
    balancer::Policy,
    demo::{cluster::Cluster, report::Report},
    node::Node,
    swarm::Driver,
};
use serde_json::Value;

use crate::operator::{ask, cluster, crashed, done, end, is_level, refused, told, until};

fn hold(node: &Node) -> Option<String> {
    node.status().ok()?["hold"]["reason"].as_str().map(str::to_owned)
}

fn lines(path: &std::path::Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .map(|line| serde_json::from_str(line).expect("no line is torn"))
        .collect()
}

/// A cluster whose first apiserver is back and empty.
struct Unlevel {
    cluster: Cluster,
    swarm: Driver,
    report: Report,
    /// GOAWAYs of each relay until then.
    told: Vec<u64>,
}

/// One whose agents have one more flag.
fn unlevel(flag: &str) -> Unlevel {
    const CLIENTS: usize = 60;
    let flags = ["--settle=2s", "--interval=1s", flag];
    let mut cluster = cluster(CLIENTS, Policy::Leastconn, &flags);
    let (swarm, report) = crashed(&mut cluster, CLIENTS, Policy::Leastconn);
    let told = told(&cluster);
    Unlevel {
        cluster,
        swarm,
        report,
        told,
    }
}

/// It becomes level at the cost of one rebalancing, and no client notices.
fn levels(unlevel: Unlevel) {
    let Unlevel {
        cluster,
        mut swarm,
        report,
        told: before,
    } = unlevel;
    until("a level load", || is_level(&cluster).then_some(()));
    let sent: u64 = told(&cluster).iter().zip(&before).map(|(now, then)| now - then).sum();
    assert!(
        sent as f64 <= 1.25 * report.lower_bound as f64 + 4.0,
        "{sent} GOAWAYs where {} are needed",
        report.lower_bound
    );
    let line = swarm.line().expect("the clients run");
    assert_eq!((line.errors, line.relists, line.watch_breaks), (0, 0, 0), "{line:?}");
    end(cluster);
}

#[test]
fn a_rebalancing_begins_when_an_operator_has_approved_it() {
    let unlevel = unlevel("--mode=propose");
    let donors = [1, 2].map(|index| &unlevel.cluster.nodes[index]);
    for node in donors {
        until("a proposal", || (hold(node)? == "awaits_approval").then_some(()));
    }
    assert_eq!(
        told(&unlevel.cluster),
        unlevel.told,
        "nobody is told before it is approved"
    );

    // What it would do is said, as is what there is to approve.
    let (_, explained, _) = ask(&donors[0].api(), &["plan", "--explain"]);
    for word in ["approve", "would be told here", "needed"] {
        assert!(explained.contains(word), "`{word}` in {explained}");
    }
    refused(donors[0], &["approve", "999999"], "999999");

    // The log is its owner's alone, and begun anew where it was moved away.
    let log = donors[0].directory().join("decisions.jsonl");
    let mode = fs::metadata(&log).expect("a log").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let moved = log.with_extension("1");
    fs::rename(&log, &moved).expect("it is moved");
    donors[0].signal_agent(libc::SIGHUP);
    until("a new log", || (!lines(&log).is_empty()).then_some(()));
    let ids: Vec<u64> = [lines(&moved), lines(&log)]
        .concat()
        .iter()
        .filter_map(|line| line["id"].as_u64())
        .collect();
    assert!(
        ids.windows(2).all(|pair| pair[1] == pair[0] || pair[1] == pair[0] + 1),
        "no decision is lost between two logs: {ids:?}"
    );

    for node in donors {
        let proposal = node.status().expect("a status")["proposal"].as_u64().expect("a number");
        done(node, &["approve", &proposal.to_string()]);
    }
    levels(unlevel);
}

#[test]
fn a_shim_that_falls_silent_in_the_middle_ends_the_plan_and_not_the_rebalancing() {
    // Slow enough to be in the middle of it.
    let unlevel = unlevel("--goaway-rate=1");
    let node = &unlevel.cluster.nodes[1];
    until("a plan that is under way", || {
        let pending = |decision: &Value| decision["outcomes"]["pending"].as_u64() > Some(0);
        let planned = node.decisions(0).ok()?.iter().any(pending);
        (planned && node.told().ok()?.by_order > unlevel.told[1]).then_some(())
    });
    let (socket, away) = (node.directory().join("relay.sock"), node.directory().join("relay.away"));
    fs::rename(&socket, &away).expect("the control socket is moved");
    until("a hold", || (hold(node)? == "shim_unavailable").then_some(()));
    let last = node
        .decisions(0)
        .expect("the agent answers")
        .last()
        .expect("a decision")["id"]
        .clone();
    let last = last.as_u64().expect("an id");
    until("more decisions", || {
        (node.decisions(last).ok()?.len() >= 3).then_some(())
    });
    let meanwhile = node.decisions(last).expect("the agent answers");
    assert!(
        meanwhile
            .iter()
            .all(|decision| decision["hold"]["reason"] == "shim_unavailable"),
        "{meanwhile:?}"
    );
    fs::rename(&away, &socket).expect("it is moved back");
    levels(unlevel);
}
