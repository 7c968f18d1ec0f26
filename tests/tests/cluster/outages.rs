//! Nodes, networks and the API that fail, for a minute and longer each: the scenes that `REBALANCER_LONG` plays.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use rebalancer_tests::{netns::Network, node::ask};
use serde_json::{Value, json};

use super::{
    membership::scene,
    world::{LEASES, World},
};

/// By then a node whose Leases stand still and whose agent is silent is gone: it takes a minute.
const AFTER_PATIENCE: Duration = Duration::from_secs(75);

/// One after the other; the last leaves no API.
pub fn come_and_go(world: &mut World) {
    scene("what the agents ask of the apiservers, by the audit logs");
    const WINDOW: Duration = Duration::from_secs(120);
    let (began, before) = (Instant::now(), world.requests());
    world.lets_pass(WINDOW);
    let asked = world.requests().difference(&before).count();
    let rate = asked as f64 / began.elapsed().as_secs_f64() / 3.0;
    eprintln!("{asked} requests of three agents in {WINDOW:?}: {rate:.3} a second and agent");
    assert!(rate <= 0.2, "{rate}");
    assert!(asked >= 3 * 9, "they renew: {asked}");

    scene("a partition between two agents only: they hold, the third goes on, and nobody is gone");
    let cut = format!("route add blackhole {}/32", Network::node_address(1));
    world.network.nodes[0].ip(&cut).expect("a route");
    world.agents[0].holds("snapshot_stale", &["node-2"]);
    world.agents[1].holds("snapshot_stale", &["node-1"]);
    world.lets_pass(AFTER_PATIENCE);
    for agent in &world.agents {
        let status = agent.status().expect("an answer");
        assert_eq!(status["membership"]["gone"], json!([]), "{status}");
    }
    let third = world.agents[2].status().expect("an answer");
    assert_ne!(third["hold"]["reason"], "snapshot_stale", "{third}");
    world.network.nodes[0].ip(&cut.replace("add", "del")).expect("a route");
    world.is_well();

    scene("a partition between an agent and the API only: it goes on by what it knew, and nobody takes it for gone");
    // Whoever asks for the apiservers' port is not answered; the agents' own port is another. Local addresses come after it.
    let node = &world.network.nodes[0];
    let cut = [
        "rule add pref 9 ipproto tcp dport 6443 blackhole",
        "rule add pref 10 lookup local",
        "rule del pref 0",
    ];
    for rule in cut {
        node.ip(rule).expect("a rule");
    }
    world.agents[0].until("blindness", |status| {
        status["membership"]["blind"].as_str().map(str::to_owned)
    });
    world.lets_pass(AFTER_PATIENCE);
    for agent in &world.agents {
        let status = agent.status().expect("an answer");
        assert_eq!(status["membership"]["gone"], json!([]), "{status}");
        assert_eq!(status["view"].as_array().map(Vec::len), Some(3), "{status}");
        let reason = status["hold"]["reason"].as_str().unwrap_or("none");
        assert!(
            !["membership_unknown", "peer_unknown", "snapshot_stale"].contains(&reason),
            "{status}"
        );
    }
    for rule in ["rule add pref 0 lookup local", "rule del pref 10", "rule del pref 9"] {
        world.network.nodes[0].ip(rule).expect("a rule");
    }
    world.is_well();

    stale_leases_and_other_clocks(world);

    scene("a node dies: apiserver and agent; the others say so and go on");
    world.apiservers[2] = None;
    world.agents[2].process.kill();
    for agent in &world.agents[..2] {
        agent.until("node-3 is gone", |status| {
            (status["membership"]["gone"] == json!(["node-3"]) && status["view"].as_array()?.len() == 2).then_some(())
        });
        let decided = ask(&agent.socket, "/v1/decisions?limit=1000").expect("decisions");
        // Those of the scene before are of other names.
        let is_it = |decision: &&Value| decision["hold"]["apiserver"] == "node-3";
        let gone: Vec<_> = decided["decisions"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(is_it)
            .collect();
        let gone: Vec<_> = gone
            .iter()
            .filter(|one| one["hold"]["reason"] == "apiserver_gone")
            .collect();
        assert_eq!(gone.len(), 1, "one decision");
        agent.until("the others go on", |status| {
            let reason = status["hold"]["reason"].as_str().unwrap_or("none");
            ["below_threshold", "noise", "shim_unavailable", "none"]
                .contains(&reason)
                .then_some(())
        });
    }
    scene("it comes back by itself");
    world.apiservers[2] = Some(world.start_apiserver(2));
    world.agents[2] = world.start_agent(2);
    world.is_well();

    scene("the API is lost altogether: the last membership holds while all answer, then a hold says what to repair");
    world.etcd.kill();
    for agent in &world.agents {
        let blind = agent.until("blindness", |status| {
            status["membership"]["blind"].as_str().map(str::to_owned)
        });
        eprintln!("blind: {blind}");
    }
    world.lets_pass(AFTER_PATIENCE);
    for agent in &world.agents {
        let status = agent.status().expect("an answer");
        assert_eq!(status["membership"]["gone"], json!([]), "{status}");
        assert_eq!(status["view"].as_array().map(Vec::len), Some(3), "{status}");
        assert_ne!(status["hold"]["reason"], "membership_unknown", "{status}");
    }
    world.agents[2].process.kill();
    for agent in &world.agents[..2] {
        agent.holds("membership_unknown", &["as it was", "node-3"]);
    }
}

/// Leases that nobody renews, and one that is renewed by a clock an hour behind.
fn stale_leases_and_other_clocks(world: &World) {
    scene(
        "a Lease that is stale is gone in a minute, whatever time is in it; one that is renewed is there, whatever its clock",
    );
    let admin = world.admin(0);
    let lease = |name: &str, host: &str, hours: i64| {
        let renewed = Command::new("date")
            .args(["-u", "-d", &format!("{hours} hours"), "+%Y-%m-%dT%H:%M:%S.000000Z"])
            .output()
            .expect("coreutils");
        let renewed = String::from_utf8(renewed.stdout).expect("a time");
        let renewed = renewed.trim();
        json!({
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {
                "name": name,
                "labels": {"apiserver.kubernetes.io/identity": "kube-apiserver", "kubernetes.io/hostname": host},
            },
            "spec": {"holderIdentity": name, "leaseDurationSeconds": 3600, "renewTime": renewed},
        })
    };
    // It was written an hour from now, and holds for an hour more: by its own words.
    admin
        .make(LEASES, &lease("apiserver-stale", "node-stale", 1))
        .expect("a Lease");
    admin
        .make(LEASES, &lease("apiserver-behind", "node-behind", -1))
        .expect("a Lease");
    let begins = |agent: &super::world::Agent, name: &'static str, gone: bool| {
        agent.until(&format!("{name} gone: {gone}"), |status| {
            let is_gone = status["membership"]["gone"].as_array()?.iter().any(|one| one == name);
            let is_held = status["hold"]["message"].as_str().unwrap_or_default().contains("node-");
            (is_gone == gone && (gone || is_held)).then_some(())
        });
    };
    for agent in &world.agents {
        begins(agent, "node-behind", false);
    }
    let (began, mut renewals) = (Instant::now(), 0);
    let path = format!("{LEASES}/apiserver-behind");
    let is_gone = |name: &str| {
        world.agents.iter().all(|agent| {
            let gone = agent.status().map(|status| status["membership"]["gone"].clone());
            gone.is_some_and(|gone| gone.as_array().is_some_and(|gone| gone.iter().any(|one| one == name)))
        })
    };
    // Renewed by its own clock, until the other one is gone at all.
    while !is_gone("node-stale") || began.elapsed() < AFTER_PATIENCE {
        assert!(
            began.elapsed() < super::world::PATIENCE,
            "the stale Lease counts for ever"
        );
        let (_, mut now) = admin.ask("GET", &path, None).expect("an answer");
        now["spec"]["renewTime"] = lease("", "", -1)["spec"]["renewTime"].clone();
        let (status, answer) = admin.ask("PUT", &path, Some(&now)).expect("an answer");
        assert_eq!(status, 200, "{answer}");
        renewals += 1;
        std::thread::park_timeout(Duration::from_secs(5));
        assert!(!is_gone("node-behind"), "it is renewed");
    }
    eprintln!("{renewals} renewals by a clock an hour behind");
    for agent in &world.agents {
        agent.holds("peer_unknown", &["node-behind"]);
    }
    for agent in &world.agents {
        begins(agent, "node-behind", true);
    }
    for name in ["apiserver-stale", "apiserver-behind"] {
        let (status, answer): (u16, Value) = admin
            .ask("DELETE", &format!("{LEASES}/{name}"), None)
            .expect("an answer");
        assert!(matches!(status, 200 | 404), "{answer}");
    }
    world.is_well();
}
