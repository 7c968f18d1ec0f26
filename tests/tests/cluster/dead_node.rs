//! A whole node dies, under clients: apiserver, relay and agent; with `REBALANCER_LONG`, since it takes a minute to be certain.

use std::env;

use rebalancer_tests::{
    balancer::{Front, Policy},
    binary,
    demo::cluster::{Cluster, Options},
    fixture::Fixture,
    node::{Finding, Shim},
    process::log_directory,
    skip,
};
use serde_json::json;

use super::operator::{done, end, is_level, until};

const CLIENTS: u64 = 60;

#[test]
fn a_node_that_dies_as_a_whole_is_gone_and_the_others_go_on_until_it_is_back() {
    if env::var_os("REBALANCER_LONG").is_none() {
        eprintln!("a node that dies under clients plays with REBALANCER_LONG=1");
        return;
    }
    let fixture = match Fixture::get(|line| eprintln!("{line}")) {
        Ok(fixture) => fixture,
        Err(error) => {
            skip(&format!("{error:#}"));
            return;
        }
    };
    let options = Options {
        nodes: 3,
        clients: CLIENTS as usize,
        policy: Policy::Roundrobin,
        front: Front::default(),
        fixture: Some(fixture),
        shim: Shim::Relay,
        peers: Finding::Kubernetes,
        rebalancer: binary(),
        agent_flags: vec!["--interval=1s".to_owned(), "--settle=3s".to_owned()],
        relay_flags: Vec::new(),
        client_flags: Vec::new(),
        directory: log_directory("rebalancer-dead-node-").expect("a directory"),
        etcd_members: 1,
        own_disk: false,
    };
    let mut cluster = Cluster::start(options, &|step| eprintln!("{step}")).expect("a cluster");
    until("the apiservers", || {
        cluster.admitted().iter().all(|admitted| *admitted).then_some(())
    });
    let mut swarm = cluster.start_clients().expect("the clients start");
    let all_are_there = |swarm: &mut rebalancer_tests::swarm::Driver| {
        until("the clients", || {
            let line = swarm.line().expect("the clients run");
            (line.clients > 0 && line.ready >= CLIENTS).then_some(())
        });
    };
    all_are_there(&mut swarm);
    until("a level load", || is_level(&cluster).then_some(()));

    cluster.kill_apiserver(2);
    cluster.nodes[2].kill_relay();
    cluster.nodes[2].kill_agent();
    for index in 0..2 {
        let node = &cluster.nodes[index];
        until("its absence", || {
            let status = node.status().ok()?;
            (status["membership"]["gone"] == json!(["node-3"]) && status["view"].as_array()?.len() == 2).then_some(())
        });
        let decisions = node.decisions(0).expect("the agent answers");
        let gone = decisions
            .iter()
            .filter(|decision| decision["hold"]["reason"] == "apiserver_gone");
        assert_eq!(gone.count(), 1, "{}: one decision", node.name);
    }
    all_are_there(&mut swarm);
    let two_at_rest = || {
        let loads: Vec<u64> = cluster.nodes[..2]
            .iter()
            .filter_map(|node| node.active().ok())
            .collect();
        let rest = cluster.nodes[..2].iter().all(|node| {
            let reason = node.status().map(|status| status["hold"]["reason"].clone());
            reason.is_ok_and(|reason| reason == "below_threshold" || reason == "noise")
        });
        (rest && loads.iter().sum::<u64>() >= CLIENTS).then_some(())
    };
    until("the others' own balance", two_at_rest);

    cluster.restart_apiserver(2).expect("the apiserver starts");
    cluster.nodes[2].start_relay().expect("the relay starts");
    cluster.nodes[2].start_agent(&[]).expect("the agent starts");
    until("a level load on three", || {
        cluster.loads().is_ok_and(|loads| loads[2] > 0).then_some(())?;
        is_level(&cluster).then_some(())
    });
    let membership = &done(&cluster.nodes[0], &["peers"])["membership"];
    assert_eq!(membership["gone"], json!([]), "{membership}");
    end(cluster);
}
