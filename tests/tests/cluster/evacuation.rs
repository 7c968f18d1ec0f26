//! Maintenance behind a real haproxy: an apiserver is evacuated, has nobody, and is taken again, and no client notices.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    thread,
};

use rebalancer_tests::{
    balancer::{Front, Policy},
    binary,
    demo::cluster::{Cluster, Options},
    node::{Finding, Shim},
    process::log_directory,
    swarm::Driver,
};

use super::operator::{ask, done, end, until};

/// So many that one apiserver without any is more than chance makes, whatever the agents have learned of the balancer.
const CLIENTS: u64 = 150;
const LB_PORT: u16 = 9480;

fn evacuable() -> Cluster {
    let asks = format!("inter 500ms weight 100 agent-check agent-inter 500ms agent-port {LB_PORT}");
    let flags = |flags: &[&str]| flags.iter().map(|flag| (*flag).to_owned()).collect();
    let options = Options {
        nodes: 3,
        clients: CLIENTS as usize,
        policy: Policy::Roundrobin,
        front: Front::Haproxy(asks),
        fixture: None,
        shim: Shim::Relay,
        peers: Finding::Static,
        rebalancer: binary(),
        // An evacuation is waited for, and a restart after it a third of that.
        agent_flags: flags(&[
            "--interval=1s",
            "--settle=2s",
            "--upgrade-patience=15s",
            &format!("--lb-agent=0.0.0.0:{LB_PORT}"),
        ]),
        relay_flags: flags(&["--watch-handover=1s"]),
        client_flags: Vec::new(),
        directory: log_directory("rebalancer-evacuation-").expect("a directory"),
        etcd_members: 1,
        own_disk: false,
    };
    Cluster::start(options, &|step| eprintln!("{step}")).expect("a cluster")
}

/// What a load balancer hears that says so much, or nothing.
fn heard(cluster: &Cluster, index: usize, said: &'static str) -> String {
    let namespace = cluster.namespace(index).clone();
    let address = SocketAddr::new(cluster.nodes[index].address, LB_PORT);
    let asked = thread::spawn(move || -> std::io::Result<String> {
        namespace.enter().expect("root may enter a namespace of its own");
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(said.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    });
    asked.join().expect("no panic").expect("an answer")
}

fn state_of(cluster: &Cluster, seen_from: usize, name: &str) -> Option<String> {
    let status = cluster.nodes[seen_from].status().ok()?;
    let view = status["view"].as_array()?;
    let entry = view.iter().find(|entry| entry["apiserver"] == name)?;
    entry["state"].as_str().map(str::to_owned)
}

fn no_client_noticed(swarm: &mut Driver) {
    let line = swarm.line().expect("the clients run");
    assert_eq!(
        (line.errors, line.relists, line.watch_breaks, line.missed),
        (0, 0, 0, 0),
        "{line:?}"
    );
}

#[test]
fn an_evacuated_apiserver_has_nobody_until_it_is_returned_or_restarted() {
    let mut cluster = evacuable();
    until("the apiservers", || {
        cluster.admitted().iter().all(|admitted| *admitted).then_some(())
    });
    let mut swarm = cluster.start_clients().expect("the clients start");
    until("the clients", || {
        let line = swarm.line().expect("the clients run");
        (line.clients > 0 && line.ready >= CLIENTS).then_some(())
    });
    swarm.reset().expect("the clients run");
    until("a share of clients", || {
        heard(&cluster, 0, "").contains("up ").then_some(())
    });
    assert!(heard(&cluster, 0, "GET /lb HTTP/1.1\r\nHost: a\r\n\r\n").starts_with("HTTP/1.1 200 "));

    let answer = done(&cluster.nodes[0], &["evacuate", "--over=3s", "--wait"]);
    assert_eq!(answer["evacuation"]["state"], "evacuated", "{answer}");
    assert_eq!(answer["kept"], true, "{answer}");
    assert_eq!(cluster.loads().expect("the relays answer")[0], 0);
    until("no socket at the load balancer", || {
        (cluster.sockets()[0] == 0).then_some(())
    });
    assert!(!cluster.admitted()[0], "haproxy drains it");
    assert_eq!(heard(&cluster, 0, ""), "drain\n");
    assert!(heard(&cluster, 0, "GET /lb HTTP/1.1\r\nHost: a\r\n\r\n").starts_with("HTTP/1.1 503 "));
    until("the peers' view", || {
        (state_of(&cluster, 1, "node-1")? == "evacuating").then_some(())
    });
    let waits = |decision: &serde_json::Value| {
        let said = decision["hold"]["message"].as_str().unwrap_or_default();
        decision["hold"]["reason"] == "upgrade_in_progress" && said.contains("node-1 is evacuated")
    };
    until("the others' patience", || {
        let decisions = cluster.nodes[1].decisions(0).ok()?;
        decisions.iter().any(waits).then_some(())
    });
    no_client_noticed(&mut swarm);

    // The others are level between themselves and send nobody there; a restart of the agent changes nothing.
    cluster.nodes[0].kill_agent();
    cluster.nodes[0].start_agent(&[]).expect("the agent starts");
    until("the evacuation that goes on", || {
        let status = cluster.nodes[0].status().ok()?;
        (status["evacuation"]["state"] == "evacuated" && status["hold"]["reason"] == "evacuating").then_some(())
    });
    until("the others at rest", || {
        let reason = cluster.nodes[1].status().ok()?["hold"]["reason"].clone();
        (reason == "below_threshold" || reason == "noise").then_some(())
    });
    let (_, shown, _) = ask(&cluster.nodes[0].api(), &["status"]);
    assert!(shown.contains("evacuated: "), "{shown}");

    // Returned, it gets its part again.
    done(&cluster.nodes[0], &["return"]);
    assert!(heard(&cluster, 0, "").starts_with("ready up "));
    let level = |cluster: &Cluster| {
        let loads = cluster.loads().ok()?;
        (loads.iter().all(|load| (30..=70).contains(load)) && loads.iter().sum::<u64>() >= CLIENTS).then_some(())
    };
    until("clients on all three", || level(&cluster));

    // Evacuated and restarted, it is back by itself, and nobody has noticed.
    let (code, _, error) = ask(&cluster.nodes[0].api(), &["evacuate", "--over=2s", "--wait"]);
    assert_eq!(code, Some(0), "{error}");
    until("no socket at the load balancer", || {
        (cluster.sockets()[0] == 0).then_some(())
    });
    cluster.kill_apiserver(0);
    until("its death", || {
        (state_of(&cluster, 0, "node-1")? == "down").then_some(())
    });
    assert!(cluster.nodes[0].status().expect("a status")["evacuation"].is_object());
    cluster.restart_apiserver(0).expect("the apiserver starts");
    until("its return", || {
        let status = cluster.nodes[0].status().ok()?;
        (status["evacuation"].is_null() && cluster.admitted()[0]).then_some(())
    });
    until("clients on all three", || level(&cluster));
    no_client_noticed(&mut swarm);
    end(cluster);
}
