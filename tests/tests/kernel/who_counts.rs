//! Who is load and who is not: the node's own connections, and those that only call.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
};

use rebalancer_tests::{cgroup::Cgroup, netns::Network, process::wait_for, skip};
use serde_json::Value;

use crate::world::{Host, PATIENCE, PORT, client_hello, ebpf_or_skip};

#[test]
fn the_nodes_own_connections_are_counted_apart_unless_told_otherwise() {
    for source in ["ebpf", "sockdiag"] {
        if source == "ebpf" && !ebpf_or_skip() {
            continue;
        }
        for (flag, load) in [("exclude", 2), ("count", 5), ("move", 5)] {
            let mut host = Host::new(source);
            host.flags = vec![format!("--node-local={flag}")];
            host.node().ip("addr add 10.77.0.99/32 dev lo").expect("an address");
            host.start_agent();
            let listener = host.listen("0.0.0.0");
            let own = host.address();
            let node = host.node().clone();
            let mut open: Vec<_> = (0..2).map(|_| host.connect(own, &listener)).collect();
            // From the address it is accepted on, from another of the node's own, and by loopback.
            for (from, to) in [
                ("0.0.0.0", own),
                ("10.77.0.99", own),
                ("0.0.0.0", SocketAddr::from(([127, 0, 0, 1], PORT))),
            ] {
                let from: SocketAddr = format!("{from}:0").parse().expect("an address");
                let client: TcpStream = Host::inside(&node, move || {
                    let socket =
                        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
                    socket.bind(&from.into()).expect("an address of the node");
                    socket.connect(&to.into()).expect("the node answers itself");
                    socket.into()
                });
                open.push((client, listener.accept().expect("a connection").0));
            }
            let hello = client_hello(&["h2"]);
            for (client, accepted) in &mut open {
                client.write_all(&hello).expect("a hello");
                accepted.read_exact(&mut vec![0; hello.len()]).expect("it arrives");
            }
            wait_for(PATIENCE, || {
                let figures = (host.figure("/view/0/connections"), host.figure("/node_local"));
                (figures == (load, 3)).then_some(())
            })
            .unwrap_or_else(|| panic!("{source} {flag}: {:#}", host.ask("/v1/status").unwrap_or_default()));
            if source == "ebpf" {
                wait_for(PATIENCE, || (host.figure("/landings_total") == load).then_some(())).expect("the landings");
            }
            let warnings = host.ask("/v1/status").expect("a status")["warnings"].to_string();
            assert_eq!(warnings.contains("--node-local move"), flag == "exclude", "{warnings}");
            let list = host.expect("all of them", |list| list.len() == 5);
            let local = list.iter().filter(|one| one["node_local"] == true).count();
            assert_eq!(local, 3);
        }
    }
}

/// A load balancer at a virtual address of the node has the apiserver's port: its clients are not the apiserver's.
#[test]
fn who_listens_on_the_port_at_another_address_is_not_counted() {
    for source in ["ebpf", "sockdiag"] {
        if source == "ebpf" && !ebpf_or_skip() {
            continue;
        }
        let mut host = Host::new(source);
        host.node().ip("addr add 10.77.0.99/24 dev eth0").expect("an address");
        let own = host.address();
        host.flags = vec![format!("--apiserver-address={}", own.ip())];
        host.start_agent();
        let apiserver = host.listen(&own.ip().to_string());
        let balancer = host.listen("10.77.0.99");
        let of_others: Vec<_> = (0..3)
            .map(|_| host.connect(SocketAddr::new([10, 77, 0, 99].into(), PORT), &balancer))
            .collect();
        let of_ours: Vec<_> = (0..2).map(|_| host.connect(own, &apiserver)).collect();
        let ours: BTreeSet<String> = of_ours
            .iter()
            .map(|(client, _)| client.local_addr().expect("an address").to_string())
            .collect();
        let clients = |list: &[Value]| -> BTreeSet<String> {
            list.iter()
                .filter_map(|one| one["client"].as_str().map(str::to_owned))
                .collect()
        };
        host.expect("only the apiserver's", |list| clients(list) == ours);
        // It is reloaded; lists that were read since say the same.
        drop(balancer);
        let balancer = host.listen("10.77.0.99");
        let lists = |host: &Host| {
            host.find_metric("rebalancer_bpf_events_total{kind=\"listed\"}")
                .unwrap_or_default()
        };
        let before = lists(&host);
        wait_for(PATIENCE, || (lists(&host) >= before + 2).then_some(())).expect("two more lists");
        host.expect("only the apiserver's", |list| clients(list) == ours);
        drop((of_others, of_ours, balancer));
    }
}

#[test]
fn two_services_on_the_port_are_a_hold_until_it_is_said_which_is_the_apiserver() {
    if !ebpf_or_skip() {
        return;
    }
    let Some(cgroup) = Cgroup::new("balancer").expect("a cgroup") else {
        skip("no cgroup2 is mounted");
        return;
    };
    let mut host = Host::new("ebpf");
    host.node().ip("addr add 10.77.0.99/24 dev eth0").expect("an address");
    host.start_agent();
    let own = host.address().ip().to_string();
    let apiserver = host.listen(&own);
    let balancer = cgroup.within(|| host.listen("10.77.0.99")).expect("this process moves");
    let reason = |host: &mut Host| host.ask("/v1/status").map(|status| status["hold"].clone());
    wait_for(PATIENCE, || {
        let hold = reason(&mut host)?;
        let said = hold["text"]
            .as_str()
            .or(hold["why"].as_str())
            .unwrap_or_default()
            .to_owned();
        (hold["reason"] == "port_shared").then_some(said)
    })
    .unwrap_or_else(|| panic!("never a hold: {:#}", host.ask("/v1/status").unwrap_or_default()));
    drop(balancer);
    wait_for(PATIENCE, || {
        (reason(&mut host)?["reason"] != "port_shared").then_some(())
    })
    .expect("it ends with the other service");
    drop(apiserver);
}

#[test]
fn another_network_namespaces_connections_on_the_same_port_are_nobodys() {
    for source in ["ebpf", "sockdiag"] {
        if source == "ebpf" && !ebpf_or_skip() {
            continue;
        }
        let mut host = Host::new(source);
        host.start_agent();
        let (elsewhere, hello) = (host.network.hub.clone(), client_hello(&["h2"]));
        let others = Host::inside(&elsewhere, || {
            let listener = std::net::TcpListener::bind(("0.0.0.0", PORT)).expect("the port is free there");
            let mut client = TcpStream::connect((Network::HUB, PORT)).expect("it answers");
            client.write_all(&client_hello(&["h2"])).expect("a hello");
            let (mut accepted, _) = listener.accept().expect("a connection");
            accepted.read_exact(&mut [0; 200]).expect("it arrives");
            (listener, client, accepted)
        });
        wait_for(PATIENCE, || {
            let status = host.ask("/v1/status")?;
            (status["view"][0]["state"] == "down").then_some(())
        })
        .expect("nobody listens here");
        // Whoever comes here after that is the only one.
        let listener = host.listen("0.0.0.0");
        let (mut client, mut accepted) = host.connect(host.address(), &listener);
        client.write_all(&hello).expect("a hello");
        accepted.read_exact(&mut vec![0; hello.len()]).expect("it arrives");
        let list = host.expect("its own", |list| list.len() == 1);
        let address = client.local_addr().expect("an address").to_string();
        assert_eq!(list[0]["client"], address.as_str());
        drop(others);
        drop((client, accepted));
        host.expect("none", <[_]>::is_empty);
        if source == "ebpf" {
            for (kind, count) in [("opened", 1), ("closed", 1)] {
                let name = format!("rebalancer_bpf_events_total{{kind=\"{kind}\"}}");
                assert_eq!(host.find_metric(&name).unwrap_or(0), count, "{kind}");
            }
        }
    }
}
