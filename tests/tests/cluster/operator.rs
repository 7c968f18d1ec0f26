//! The operator's hand, in a running cluster: orders while it holds, pauses that outlive the agent, and what is said of each.

use std::{
    path::Path,
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
    node::{Finding, Node, Shim},
    process::{log_directory, wait_for},
    swarm::Driver,
};
use serde_json::Value;

/// A cluster of stand-ins with a relay and an agent each.
pub fn cluster(clients: usize, policy: Policy, agent_flags: &[&str]) -> Cluster {
    let options = Options {
        nodes: 3,
        clients,
        policy,
        front: Front::default(),
        fixture: None,
        shim: Shim::Relay,
        peers: Finding::Static,
        rebalancer: binary(),
        agent_flags: agent_flags.iter().map(|flag| (*flag).to_owned()).collect(),
        relay_flags: Vec::new(),
        client_flags: Vec::new(),
        directory: log_directory("rebalancer-operator-").expect("a directory"),
        etcd_members: 1,
        own_disk: false,
    };
    Cluster::start(options, &|step| eprintln!("{step}")).expect("a cluster")
}

/// Waits for a state, as long as a busy machine may take.
pub fn until<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    wait_for(START, look).unwrap_or_else(|| panic!("{what} did not come"))
}

/// Ends the cluster; its directory is kept when the test fails before.
pub fn end(mut cluster: Cluster) {
    cluster.end();
    // Nothing depends on it being gone.
    let _ = std::fs::remove_dir_all(cluster.directory());
}

/// Waits until every client has its watch and no agent has a doubt.
fn clients(cluster: &Cluster, count: u64) -> Driver {
    until("the apiservers", || {
        cluster.admitted().iter().all(|admitted| *admitted).then_some(())
    });
    let mut swarm = cluster.start_clients().expect("the clients start");
    until("the clients", || {
        let line = swarm.line().expect("the clients run");
        (line.clients > 0 && line.ready >= count).then_some(())
    });
    for node in &cluster.nodes {
        until("a level load", || {
            let hold = node.status().ok()?["hold"]["reason"].clone();
            (hold == "below_threshold" || hold == "noise").then_some(())
        });
    }
    swarm.reset().expect("the clients run");
    swarm
}

/// The command line, asked at a node's agent: exit code, stdout, stderr.
pub fn ask(api: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = Command::new(binary())
        .args(arguments)
        .arg(format!("--api=unix:{}", api.display()))
        .output()
        .expect("the product runs");
    let text = |octets: Vec<u8>| String::from_utf8_lossy(&octets).into_owned();
    (status.code(), text(stdout), text(stderr))
}

pub fn done(node: &Node, arguments: &[&str]) -> Value {
    let (code, said, error) = ask(&node.api(), &[arguments, &["--output=json"]].concat());
    assert_eq!(code, Some(0), "{arguments:?}: {error}");
    serde_json::from_str(&said).expect("JSON")
}

pub fn refused(node: &Node, arguments: &[&str], part: &str) {
    let (code, _, error) = ask(&node.api(), arguments);
    assert_eq!(code, Some(1), "{arguments:?}: {error}");
    assert!(error.contains(part), "{arguments:?}: {error}");
}

/// Who uses a connection of that node, at the moment.
fn a_user(node: &Node, but: &[&str]) -> String {
    let answer = done(node, &["connections", "--state=active", "--protocol=h2"]);
    let mut users = answer["connections"].as_array().expect("a list").iter();
    let user = users.find_map(|one| one["user"].as_str().filter(|user| !but.contains(user)));
    user.expect("a client").to_owned()
}

fn fates(answer: &Value) -> Vec<String> {
    let victims = answer["decision"]["victims"].as_array().expect("victims");
    victims
        .iter()
        .map(|victim| victim["fate"].as_str().expect("a fate").to_owned())
        .collect()
}

#[test]
fn an_operators_orders_are_carried_out_while_the_cluster_holds() {
    const CLIENTS: u64 = 45;
    let mut cluster = cluster(
        CLIENTS as usize,
        Policy::Roundrobin,
        &[
            "--settle=1s",
            "--interval=1s",
            "--exclude-user=client-0",
            "--exclude-user=client-1",
            "--exclude-user=client-2",
        ],
    );
    let mut swarm = clients(&cluster, CLIENTS);
    let excluded = ["client-0", "client-1", "client-2"];

    // Paused, for a while and for a reason.
    let node = &cluster.nodes[0];
    done(node, &["pause", "--for=2h", "--reason=upgrade of node-2"]);
    until("the hold", || {
        (node.status().ok()?["hold"]["reason"] == "paused").then_some(())
    });
    let (_, shown, _) = ask(&node.api(), &["status"]);
    assert!(shown.contains("PAUSED for 1h59m yet (upgrade of node-2)"), "{shown}");
    let answer = done(node, &["goaway", "--count=3"]);
    assert!(answer["decision"]["hold"].is_null(), "{answer}");
    assert_eq!(fates(&answer).len(), 3, "{answer}");
    assert!(
        fates(&answer)
            .iter()
            .all(|fate| fate != "pending" && fate != "not_told"),
        "{answer}"
    );
    until("an idle agent", || {
        (node.status().ok()?["goaways_total"] == 3).then_some(())
    });
    assert_eq!(
        node.status().expect("a status")["paused"],
        true,
        "an order ends no pause"
    );

    // The exclusions are the operator's own: they hold, and are said, unless they are overruled.
    let of_excluded = |node: &Node| {
        let answer = done(node, &["connections", "--limit=1000"]);
        let list = answer["connections"].as_array().expect("a list").clone();
        let of = |one: &Value| {
            one["user"]
                .as_str()
                .filter(|user| excluded.contains(user))
                .map(str::to_owned)
        };
        list.iter().find_map(of)
    };
    let (index, user) = (0..3)
        .find_map(|index| Some((index, of_excluded(&cluster.nodes[index])?)))
        .expect("they are connected");
    let there = &cluster.nodes[index];
    let order = |more: &'static [&'static str]| [&["goaway", "--user", user.as_str()][..], more].concat();
    until("no other plan", || {
        let (_, _, error) = ask(&there.api(), &order(&[]));
        error.contains("excluded").then_some(())
    });
    let answer = done(there, &order(&["--force"]));
    assert_eq!(fates(&answer).len(), 1, "{answer}");

    // Nobody is meant; what is meant cannot be understood.
    refused(there, &["goaway", "--user=nobody"], "no active connection");
    refused(there, &["goaway", "--cidr=10.0.0.0/99"], "10.0.0.0/99");

    // A peer is down: everything holds, but not an order.
    cluster.nodes[1].kill_agent();
    let node = &cluster.nodes[2];
    until("a hold for the peer", || {
        let reason = node.status().ok()?["hold"]["reason"].clone();
        (reason == "snapshot_stale" || reason == "peer_unknown").then_some(())
    });
    let (_, shown, _) = ask(&node.api(), &["peers"]);
    let line = shown.lines().find(|line| line.starts_with("node-2")).expect("the peer");
    assert!(line.contains("unreachable"), "{shown}");
    let user = a_user(node, &excluded);
    let answer = done(node, &["goaway", "--user", &user]);
    assert!(!fates(&answer).is_empty(), "{answer}");
    cluster.nodes[1].start_agent(&[]).expect("the agent starts");

    let line = swarm.line().expect("the clients run");
    assert_eq!((line.errors, line.relists, line.watch_breaks), (0, 0, 0), "{line:?}");
    end(cluster);
}

/// Kills an apiserver of a cluster, and gives the cluster with it back and empty.
pub fn crashed(cluster: &mut Cluster, clients: usize, policy: Policy) -> (Driver, Report) {
    let mut report = Report {
        clients,
        ..Report::default()
    };
    let mut tell = |_: Event<'_>| {};
    let swarm = Scene::new(cluster, policy, START, &mut tell).crash(&mut report);
    (swarm.expect("one apiserver is back and empty"), report)
}

pub fn is_level(cluster: &Cluster) -> bool {
    let at_rest = |node: &Node| {
        let hold = node.status().map(|status| status["hold"]["reason"].clone());
        hold.is_ok_and(|reason| reason == "below_threshold" || reason == "noise")
    };
    let loads = cluster.loads().expect("the relays answer");
    Report::skew(&loads) <= 0.10 && cluster.nodes.iter().all(at_rest)
}

/// GOAWAYs that a node's relay has sent since it started: an agent's own count begins anew with its process.
pub fn told(cluster: &Cluster) -> Vec<u64> {
    let of = |node: &Node| node.told().expect("the relay answers").by_order;
    cluster.nodes.iter().map(of).collect()
}

#[test]
fn agents_that_are_killed_in_the_middle_of_a_rebalancing_end_it_at_the_same_cost() {
    // A tenth of what is needed is some clients.
    const CLIENTS: usize = 180;
    // Slow enough to be killed on the way.
    let mut cluster = cluster(
        CLIENTS,
        Policy::Leastconn,
        &["--settle=2s", "--interval=1s", "--goaway-rate=2"],
    );
    let (mut swarm, report) = crashed(&mut cluster, CLIENTS, Policy::Leastconn);
    let before = told(&cluster);
    for index in [1, 2] {
        until("a plan that is under way", || {
            let node = &cluster.nodes[index];
            let decisions = node.decisions(0).expect("the agent answers");
            let planned =
                |decision: &&Value| decision["hold"].is_null() && decision["outcomes"]["pending"].as_u64() > Some(0);
            let told = node.told().expect("the relay answers").by_order > before[index];
            (told && decisions.iter().rev().any(|decision| planned(&decision))).then_some(())
        });
        cluster.nodes[index].kill_agent();
        cluster.nodes[index].start_agent(&[]).expect("the agent starts");
    }
    until("a level load", || is_level(&cluster).then_some(()));
    let sent: u64 = told(&cluster)
        .iter()
        .zip(&before)
        .map(|(now, before)| now - before)
        .sum();
    let needed = report.lower_bound as f64;
    eprintln!("{sent} GOAWAYs, {needed} are needed; both agents were killed on the way");
    assert!(
        (sent as f64 - needed).abs() <= 0.1 * needed,
        "{sent} GOAWAYs where {needed} are needed: two restarts change it by more than a tenth"
    );
    let line = swarm.line().expect("the clients run");
    assert_eq!((line.errors, line.relists, line.watch_breaks), (0, 0, 0), "{line:?}");
    end(cluster);
}

#[test]
fn a_canary_does_its_own_part_and_those_that_are_dry_change_nothing() {
    const CLIENTS: usize = 180;
    let mut cluster = cluster(CLIENTS, Policy::Leastconn, &["--settle=2s", "--interval=1s"]);
    for index in [0, 2] {
        until("an agent", || cluster.nodes[index].status().ok());
        cluster.nodes[index].kill_agent();
        cluster.nodes[index]
            .start_agent(&["--dry-run"])
            .expect("the agent starts");
    }
    let (mut swarm, report) = crashed(&mut cluster, CLIENTS, Policy::Leastconn);
    let before = told(&cluster);
    let mean = CLIENTS as f64 / 3.0;
    until("the canary's part", || {
        let loads = cluster.loads().expect("the relays answer");
        let hold = cluster.nodes[1].status().ok()?["hold"]["reason"].clone();
        let rests = hold == "below_threshold" || hold == "noise";
        (loads[1] as f64 <= mean * 1.1 && rests).then_some(())
    });
    let sent: Vec<u64> = told(&cluster)
        .iter()
        .zip(&before)
        .map(|(now, before)| now - before)
        .collect();
    assert_eq!((sent[0], sent[2]), (0, 0), "a dry run tells nobody: {sent:?}");
    // Both donors have the same, so half of what all need is this one's.
    let part = report.lower_bound as f64 / 2.0;
    eprintln!("{sent:?} GOAWAYs, {part} are the canary's part");
    assert!(
        (sent[1] as f64 - part).abs() <= 0.1 * part,
        "{sent:?}: the canary's part of what all need is {part}"
    );
    let loads = cluster.loads().expect("the relays answer");
    assert!(
        loads[1] as f64 >= mean,
        "the canary does not take the others' part: {loads:?}"
    );
    let line = swarm.line().expect("the clients run");
    assert_eq!((line.errors, line.relists, line.watch_breaks), (0, 0, 0), "{line:?}");
    end(cluster);
}

#[test]
fn decisions_are_followed_as_they_are_made() {
    let cluster = cluster(6, Policy::Roundrobin, &["--interval=1s"]);
    let node = &cluster.nodes[0];
    until("the agent", || node.status().ok());
    let mut command = Command::new(binary());
    command
        .args(["decisions", "--follow", "--limit=1", "--output=json"])
        .arg(format!("--api=unix:{}", node.api().display()));
    let (mut follower, _stdin, stdout) =
        rebalancer_tests::process::Process::piped("follower", command, None, cluster.directory()).expect("it starts");
    let lines = std::io::BufRead::lines(std::io::BufReader::new(stdout));
    let ids: Vec<u64> = lines
        .take(4)
        .map(|line| {
            let decision: Value = serde_json::from_str(&line.expect("a line")).expect("one decision a line");
            decision["id"].as_u64().expect("an id")
        })
        .collect();
    assert!(
        ids.is_sorted() && ids.windows(2).all(|pair| pair[1] - pair[0] <= 1),
        "{ids:?}"
    );
    follower.terminate(Duration::from_secs(10));
    end(cluster);
}
