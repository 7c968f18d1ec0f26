//! A kernel that is too old for the programs, and one that is not: each is told from the other by trying, and what works on
//! any works.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::Command,
    thread,
    time::Duration,
};

use rebalancer::kernel::OLDEST;
use rebalancer_tests::{
    binary,
    h2client::Client,
    netns::Network,
    pki::Pki,
    process::{Process, tail, wait_for},
    standin,
};

use crate::world::{Host, PATIENCE, PORT, features, protocols};

/// The running kernel's major and minor number.
fn release() -> (u32, u32) {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel has a release");
    let mut numbers = text
        .split(['.', '-'])
        .map(|part| part.trim().parse().expect("a number"));
    (numbers.next().expect("a major"), numbers.next().expect("a minor"))
}

#[test]
fn a_kernel_that_is_too_old_is_refused_by_name_and_its_socket_list_works() {
    let features = features();
    let sockdiag = &features["source-sockdiag"];
    assert_eq!(sockdiag["ok"], true, "{sockdiag}");
    let ebpf = &features["source-ebpf"];
    let why = ebpf["why"].as_str().unwrap_or_default();
    if release() < OLDEST {
        assert_eq!(ebpf["ok"], false, "{ebpf}");
        assert!(
            why.contains("by itself lacks") && why.contains("or later has it"),
            "{why}"
        );
        eprintln!("{why}");
    } else {
        assert!(!why.contains("by itself lacks"), "a reason that is none: {why}");
    }
}

#[test]
fn on_a_kernel_that_is_too_old_as_on_any_the_relay_works_and_its_clients_are_counted() {
    let upstream = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT + 1);
    let addresses: [IpAddr; 2] = [Network::node_address(0), upstream.ip()];
    let pki = Pki::new(&addresses).expect("certificates");
    let mut host = Host::new("auto");
    let options = standin::Options {
        listen: upstream,
        certificate: pki.file("apiserver.crt"),
        key: pki.file("apiserver.key"),
        client_cas: vec![pki.file("ca.crt"), pki.file("front-proxy-ca.crt")],
        origin_ms: 0,
        period: Duration::from_secs(60),
        goaway_chance: 0.0,
    };
    let node = host.node().clone();
    thread::spawn(move || {
        node.enter().expect("its own namespace");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(standin::run(options))
    });
    let control = host.directory.join("relay.sock");
    let mut command = Command::new(binary());
    command
        .arg("relay")
        .arg(format!("--listen={}", host.address()))
        .arg(format!("--upstream={upstream}"))
        .arg(format!("--control=unix:{}", control.display()))
        .args(pki.relay_flags());
    let relay = Process::start("relay", command, Some(host.node().fd()), &host.directory).expect("a relay");
    host.flags = vec![format!("--shim=relay:unix:{}", control.display())];
    host.start_agent();
    let hub = host.network.hub.clone();
    let mut clients: Vec<Client> = (0..3)
        .map(|_| {
            wait_for(PATIENCE, || Client::try_connect(&pki, &hub, host.address()).ok())
                .unwrap_or_else(|| panic!("the relay never answers:\n{}", tail(&relay.log())))
        })
        .collect();
    for client in &mut clients {
        client.get("/readyz");
    }
    host.expect_the_truth("all clients are counted");
    host.expect("and known for what they speak", |list| protocols(list) == ["h2"; 3]);
    let log = host.agent.as_ref().expect("it runs").log();
    let falls_back = log.contains("counting by the socket list (sockdiag)") && log.contains("by itself lacks");
    assert_eq!(falls_back, release() < OLDEST, "{log}");
}
