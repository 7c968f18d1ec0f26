//! One word to all agents, between real processes: it is heard, it outlives agents, and the newest wins whoever was away.

use std::{fs, path::Path};

use rebalancer_tests::{balancer::Policy, demo::cluster::Cluster, node::Node};
use serde_json::Value;

use super::operator::{ask, cluster, done, end, until};

/// Waits until every agent holds, or none does, as one that was paused with all others.
fn all_are(cluster: &Cluster, paused: bool, what: &str) {
    for node in &cluster.nodes {
        until(&format!("{}: {what}", node.name), || {
            let status = node.status().ok()?;
            (status["paused"] == paused && (status["hold"]["reason"] == "paused") == paused).then_some(())
        });
    }
}

fn said_by(node: &Node) -> Value {
    node.status().expect("a status")["hold"]["by"].clone()
}

/// Has an agent that is away believe that its state file was written so much later, or earlier, than it was.
fn set_clock(node: &Node, hours: i64) {
    let path = node.api().with_extension("state");
    let mut state = read(&path);
    let at = state["at_unix_ms"].as_u64().expect("a time");
    state["at_unix_ms"] = at.saturating_add_signed(hours * 3_600_000).into();
    fs::write(&path, state.to_string()).expect("a file");
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).expect("a state file")).expect("JSON")
}

#[test]
fn one_word_pauses_all_agents_and_the_newest_wins_whoever_was_away() {
    let mut cluster = cluster(3, Policy::Roundrobin, &["--interval=1s"]);
    for node in &cluster.nodes {
        until("its peers", || {
            let status = node.status().ok()?;
            (status["view"].as_array()?.len() == 3).then_some(())
        });
    }

    // Said on one, held by all, who say where it was said.
    let answer = done(&cluster.nodes[0], &["pause", "--cluster", "--reason=upgrade of etcd"]);
    assert_eq!(answer["not_heard_by"], Value::Array(vec![]), "{answer}");
    assert_eq!(answer["kept"], true, "{answer}");
    all_are(&cluster, true, "the pause");
    for node in &cluster.nodes {
        assert_eq!(said_by(node), "node-1");
    }
    let (_, shown, _) = ask(&cluster.nodes[2].api(), &["status", "--cluster"]);
    assert!(
        shown.contains("all agents are paused, on node-1: upgrade of etcd"),
        "{shown}"
    );
    let (_, shown, _) = ask(&cluster.nodes[2].api(), &["resume"]);
    assert!(shown.contains("rebalancer resume --cluster"), "{shown}");

    // An agent that is restarted is paused still, also when no other one lives to tell it.
    for index in 0..3 {
        cluster.nodes[index].kill_agent();
    }
    for index in 0..3 {
        cluster.nodes[index].start_agent(&[]).expect("the agent starts");
    }
    all_are(&cluster, true, "the pause after a restart");

    // One is away when the others are resumed: it hears of that, whatever its clock says of when its own word was.
    for (hours, resumes) in [(48, 2), (-48, 0)] {
        cluster.nodes[1].kill_agent();
        let answer = done(&cluster.nodes[resumes], &["resume", "--cluster"]);
        assert_eq!(answer["not_heard_by"], serde_json::json!(["node-2"]), "{answer}");
        set_clock(&cluster.nodes[1], hours);
        cluster.nodes[1].start_agent(&[]).expect("the agent starts");
        all_are(&cluster, false, "the end of the pause");

        // And as one that was away it may speak at once: its word is the newest then.
        cluster.nodes[1].kill_agent();
        done(&cluster.nodes[0], &["pause", "--cluster"]);
        done(&cluster.nodes[0], &["resume", "--cluster"]);
        cluster.nodes[1].start_agent(&[]).expect("the agent starts");
        until("its API", || cluster.nodes[1].status().ok());
        let answer = done(&cluster.nodes[1], &["pause", "--cluster", "--for=2h"]);
        assert_eq!(answer["not_heard_by"], Value::Array(vec![]), "{answer}");
        all_are(&cluster, true, "the pause by the one that was away");
        assert_eq!(said_by(&cluster.nodes[2]), "node-2");
    }
    done(&cluster.nodes[2], &["resume", "--cluster"]);
    all_are(&cluster, false, "the last word");
    end(cluster);
}
