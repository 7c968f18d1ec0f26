//! Counting in the kernel: an agent on one host, clients on another, and what its API says of them.

mod ends;
mod hellos;
mod packets;
mod storm;
mod too_old;
mod where_it_runs;
mod who_counts;
mod world;

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream},
};

use rebalancer_tests::{node::ask_text, process::wait_for};
use serde_json::Value;
use world::{Host, PATIENCE, PORT, client_hello, ebpf_or_skip, features, protocols};

#[test]
fn the_program_that_steers_new_connections_is_taken() {
    if !ebpf_or_skip() {
        return;
    }
    let intercept = &features()["intercept"];
    assert_eq!(intercept["ok"], true, "{intercept}");
}

#[test]
fn offers_are_seen_on_every_kind_of_address_and_in_pieces() {
    if !ebpf_or_skip() {
        return;
    }
    let mut host = Host::new("ebpf");
    host.start_agent();
    let v6: Ipv6Addr = "fd00::11".parse().expect("an address");
    host.node()
        .ip("addr add fd00::11/64 dev eth0 nodad")
        .expect("an address");
    host.network
        .hub
        .ip("addr add fd00::1/64 dev br0 nodad")
        .expect("an address");
    // Dual stack, as Go listens: IPv4 clients are v4-mapped.
    let listener = host.listen("[::]");
    let v4 = host.address();
    let v6 = SocketAddr::new(IpAddr::V6(v6), PORT);

    let mut streams = Vec::new();
    for (to, hello) in [
        (v4, client_hello(&["h2", "http/1.1"])),
        (v6, client_hello(&["h2"])),
        (v4, client_hello(&["http/1.1"])),
        (v4, client_hello(&[])),
        (v4, b"GET / HTTP/1.1\r\n\r\n".to_vec()),
    ] {
        let (mut client, mut accepted) = host.connect(to, &listener);
        client.write_all(&hello).expect("a hello");
        accepted.read_exact(&mut vec![0; hello.len()]).expect("it arrives");
        streams.push((client, accepted));
    }
    // In pieces of 100 octets, each in a packet of its own because the one before has been read.
    let (mut client, mut accepted) = host.connect(v4, &listener);
    client.set_nodelay(true).expect("an option");
    for piece in client_hello(&["h2"]).chunks(100) {
        client.write_all(piece).expect("a piece");
        accepted.read_exact(&mut vec![0; piece.len()]).expect("it arrives");
    }
    streams.push((client, accepted));
    // A hello that never ends, and one that never comes.
    let (mut client, accepted) = host.connect(v4, &listener);
    client.write_all(&client_hello(&["h2"])[..50]).expect("a piece");
    streams.push((client, accepted));
    streams.push(host.connect(v4, &listener));

    let expected = [
        "http/1.1", "http/1.1", "http/1.1", "offered", "offered", "offered", "unknown", "unknown",
    ];
    let list = host.expect("every offer", |list| protocols(list) == expected);
    let clients: Vec<String> = streams
        .iter()
        .map(|(client, _)| {
            let address = client.local_addr().expect("an address");
            SocketAddr::new(address.ip().to_canonical(), address.port()).to_string()
        })
        .collect();
    for connection in &list {
        let client = connection["client"].as_str().expect("an address").to_owned();
        assert!(clients.contains(&client), "{client} is none of {clients:?}");
        assert_eq!(connection["seeded"], false);
    }
    drop(streams);
    host.expect("all closed", <[Value]>::is_empty);
}

#[test]
fn connections_from_before_are_seeded_and_loopback_is_counted_apart() {
    for source in ["ebpf", "sockdiag"] {
        if source == "ebpf" && !ebpf_or_skip() {
            continue;
        }
        let mut host = Host::new(source);
        let listener = host.listen("0.0.0.0");
        let address = host.address();
        let before: Vec<_> = (0..5).map(|_| host.connect(address, &listener)).collect();
        let (local, _own) = {
            let node = host.node().clone();
            let client = Host::inside(&node, || {
                TcpStream::connect(("127.0.0.1", PORT)).expect("the node answers itself")
            });
            (client, listener.accept().expect("a connection"))
        };
        host.start_agent();
        let list = host.expect("the seeds", |list| list.len() == 6);
        assert!(list.iter().all(|connection| connection["seeded"] == true), "{list:#?}");
        let own = list.iter().filter(|connection| connection["node_local"] == true);
        assert_eq!(own.count(), 1, "{list:#?}");
        wait_for(PATIENCE, || {
            let figures = (host.figure("/view/0/connections"), host.figure("/node_local"));
            (figures == (5, 1)).then_some(())
        })
        .expect("the figures of the same connections");
        let after = host.connect(address, &listener);
        let list = host.expect("one more", |list| list.len() == 7);
        assert_eq!(
            list.iter().filter(|connection| connection["seeded"] == false).count(),
            1
        );
        let cookie = |list: &[Value]| {
            list.iter()
                .map(|connection| connection["connection"].clone())
                .collect::<Vec<_>>()
        };
        let mut unique = cookie(&list);
        unique.dedup();
        assert_eq!(unique.len(), 7);
        drop((before, after, local));
        host.expect("all closed", <[Value]>::is_empty);
    }
}

#[test]
fn a_port_that_closes_and_opens_is_noticed() {
    for source in ["ebpf", "sockdiag"] {
        if source == "ebpf" && !ebpf_or_skip() {
            continue;
        }
        let mut host = Host::new(source);
        host.start_agent();
        let own_state = |host: &mut Host| host.ask("/v1/status").map(|status| status["view"][0]["state"].clone());
        let becomes = |host: &mut Host, state: &str| {
            wait_for(PATIENCE, || own_state(host).filter(|seen| seen == state))
                .unwrap_or_else(|| panic!("{source}: never {state}"));
        };
        becomes(&mut host, "down");
        let listener = host.listen("0.0.0.0");
        becomes(&mut host, "ready");
        drop(listener);
        becomes(&mut host, "down");
        let _again = host.listen("[::]");
        becomes(&mut host, "ready");
    }
}

#[test]
fn connections_that_come_and_go_do_not_cost_a_complete_list() {
    if !ebpf_or_skip() {
        return;
    }
    let mut host = Host::new("ebpf");
    let listener = host.listen("0.0.0.0");
    let address = host.address();
    host.start_agent();
    let lists = |host: &Host| -> u64 {
        let metrics = ask_text(&host.directory.join("agent.sock"), "/metrics").expect("metrics");
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix("rebalancer_bpf_events_total{kind=\"resync\"} "));
        line.expect("the first list").parse().expect("a number")
    };
    let before = lists(&host);
    for count in 1..=20 {
        let open = host.connect(address, &listener);
        host.expect("the new one", |list| list.len() == 1);
        drop(open);
        host.expect("none again", <[Value]>::is_empty);
        assert_eq!(lists(&host), before, "after {count} connections");
    }
}

#[test]
fn the_programs_log_what_they_see_only_when_asked() {
    if !ebpf_or_skip() {
        return;
    }
    for (level, says) in [("debug", true), ("off", false)] {
        let mut host = Host::new("ebpf");
        host.kernel_log = level;
        host.start_agent();
        let listener = host.listen("0.0.0.0");
        let (mut client, _accepted) = host.connect(host.address(), &listener);
        client.write_all(&client_hello(&["h2"])).expect("a hello");
        host.expect("the offer", |list| protocols(list) == ["offered"]);
        let said = |host: &Host| {
            let log = host.agent.as_ref().expect("it runs").log();
            log.contains("octets of a hello") && log.contains("state 3 to 1")
        };
        if says {
            wait_for(PATIENCE, || said(&host).then_some(())).expect("both programs speak");
        } else {
            assert!(!said(&host));
        }
    }
}
