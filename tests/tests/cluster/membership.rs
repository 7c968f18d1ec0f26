//! Membership by Leases on three real apiservers: who is there, who is gone, and whose word is refused.
//!
//! One cluster, several scenes after one another; those that wait for a minute or more (`outages.rs`) play with
//! `REBALANCER_LONG`. What time alone decides is in the tables of the core's `membership`.

use std::env;

use rebalancer_tests::{fixture::Fixture, kube::kubeconfig, process::wait_for, skip};
use serde_json::{Value, json};

use super::{
    bad_input,
    operator::ask,
    outages, rights,
    world::{LEASES, PATIENCE, World, apiserver_address},
};

pub fn scene(what: &str) {
    eprintln!("scene: {what}");
}

#[test]
fn leases_say_who_is_there_who_is_gone_and_whose_word_is_refused() {
    let fixture = match Fixture::get(|line| eprintln!("{line}")) {
        Ok(fixture) => fixture,
        Err(error) => {
            skip(&format!("{error:#}"));
            return;
        }
    };
    let mut world = World::new(fixture);
    scene("three find each other with no flag for any of them");
    world.is_well();

    scene("each has written one Event of its start on its Node");
    let started = || {
        let (_, list) = world
            .admin(0)
            .ask("GET", "/apis/events.k8s.io/v1/namespaces/default/events", None)
            .ok()?;
        let of_start = |event: &&Value| event["reason"] == "RebalancerStarted";
        let events = list["items"].as_array()?.iter().filter(of_start);
        let mut nodes: Vec<_> = events
            .filter(|event| event["regarding"]["kind"] == "Node" && event["reportingController"] == "rebalancer")
            .filter_map(|event| event["regarding"]["name"].as_str().map(str::to_owned))
            .collect();
        nodes.sort();
        (nodes == ["node-1", "node-2", "node-3"]).then_some(())
    };
    wait_for(PATIENCE, started).expect("three Events");

    scene("a forged Lease of no apiserver is named and holds up nobody");
    let mut forged = world.lease("node-2");
    forged["metadata"] = json!({
        "name": "rebalancer-evil",
        "labels": forged["metadata"]["labels"],
        "annotations": forged["metadata"]["annotations"],
    });
    world.admin(0).make(LEASES, &forged).expect("a Lease");
    for agent in &world.agents {
        agent.until("a refusal", |status| {
            let refused = status["membership"]["refused"].as_array()?;
            let names = |why: &Value| why.as_str().is_some_and(|why| why.contains("rebalancer-evil"));
            refused.iter().any(names).then_some(())
        });
    }
    world.is_well();
    let refused = wait_for(PATIENCE, || {
        let metric = world.agents[0].metric(
            &world.network.nodes[0],
            "rebalancer_membership_troubles{kind=\"refused\"}",
        );
        metric.filter(|count| *count == 1.0)
    });
    assert_eq!(refused, Some(1.0));
    let (status, _) = world
        .admin(0)
        .ask("DELETE", &format!("{LEASES}/rebalancer-evil"), None)
        .expect("an answer");
    assert_eq!(status, 200);

    scene("a key written over a living agent's is refused by all, and by the one that was robbed");
    let before = world.lease("node-2");
    let mut hijacked = before.clone();
    hijacked["metadata"]["annotations"]["rebalancer/key-sha256"] = json!("ab".repeat(32));
    hijacked["metadata"]["annotations"]["rebalancer/address"] = json!("10.77.0.1:9443");
    hijacked["spec"]["holderIdentity"] = json!("somebody-else");
    let (status, answer) = wait_for(PATIENCE, || {
        hijacked["metadata"]["resourceVersion"] = world.lease("node-2")["metadata"]["resourceVersion"].clone();
        let path = format!("{LEASES}/rebalancer-node-2");
        let answer = world.admin(0).ask("PUT", &path, Some(&hijacked)).ok()?;
        (answer.0 != 409).then_some(answer)
    })
    .expect("an answer");
    assert_eq!(status, 200, "{answer}");
    world.agents[1].holds(
        "membership_unknown",
        &["two agents have the name node-2", "10.77.0.1:9443"],
    );
    world.agents[0].holds("peer_unknown", &["node-2", "abababab", "still answers"]);
    let (status, _) = world
        .admin(0)
        .ask("DELETE", &format!("{LEASES}/rebalancer-node-2"), None)
        .expect("an answer");
    assert_eq!(status, 200);
    world.is_well();
    assert_eq!(
        world.lease("node-2")["metadata"]["annotations"]["rebalancer/key-sha256"],
        before["metadata"]["annotations"]["rebalancer/key-sha256"],
        "it made its Lease anew"
    );

    scene("a second agent of one name holds, and the first goes on");
    let credentials = kubeconfig(&world.pki, "node-3-again", apiserver_address(0)).expect("credentials");
    let second = world.start_another("node-3", &credentials, &[]);
    second.holds("membership_unknown", &["two agents have the name node-3"]);
    world.is_well();
    drop(second);

    rights::are_the_smallest(&world);
    bad_input::is_said_in_a_sentence_each(&world);
    one_switch_for_all(&mut world);
    rights::are_taken_away(&world);
    if env::var_os("REBALANCER_LONG").is_none() {
        eprintln!(
            "the scenes of a dead node, of partitions, of stale Leases and of a lost API play with REBALANCER_LONG=1"
        );
    } else {
        outages::come_and_go(&mut world);
    }
    let directory = world.directory.clone();
    drop(world);
    // Kept when the test fails.
    let _ = std::fs::remove_dir_all(directory);
}

/// Said on one, held by all, over restarts of all; and ended on another one.
fn one_switch_for_all(world: &mut World) {
    scene("one word pauses all agents, over a restart of each, and another ends it");
    // An agent of the scenes before is a peer until its Lease has been away for a while.
    world.is_alone();
    world.is_well();
    let answer = |agent: usize, arguments: &[&str], world: &World| {
        let arguments = [arguments, &["--output=json"]].concat();
        let (code, said, error) = ask(&world.agents[agent].socket, &arguments);
        assert_eq!(code, Some(0), "{arguments:?}: {error}");
        serde_json::from_str::<Value>(&said).expect("JSON")
    };
    let said = answer(0, &["pause", "--cluster", "--reason=upgrade of etcd"], world);
    assert_eq!(
        (&said["not_heard_by"], &said["kept"]),
        (&json!([]), &json!(true)),
        "{said}"
    );
    let are_paused = |world: &World| {
        for agent in &world.agents {
            agent.holds("paused", &["all agents", "node-1", "upgrade of etcd"]);
        }
    };
    are_paused(world);
    // All at once, so that nobody is left to tell them; and their keys are others now.
    for index in 0..3 {
        world.agents[index].process.kill();
    }
    for index in 0..3 {
        world.agents[index] = world.start_agent(index);
    }
    are_paused(world);
    let (_, shown, _) = ask(&world.agents[1].socket, &["status", "--cluster"]);
    assert!(
        shown.contains("all agents are paused, on node-1: upgrade of etcd"),
        "{shown}"
    );
    // Each is asked by its new key before it may be told something newer.
    wait_for(PATIENCE, || {
        let (code, ..) = ask(&world.agents[2].socket, &["resume", "--cluster"]);
        (code == Some(0)).then_some(())
    })
    .expect("the end of the pause");
    world.is_well();
    for agent in &world.agents {
        agent.until("the end of the pause", |status| {
            (status["paused"] == false).then_some(())
        });
    }
}
