//! Every way a connection can end, one by one: the table is the kernel's list, and each end is an event.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    process::Command,
    thread,
    time::Duration,
};

use rebalancer_tests::skip;
use socket2::SockRef;

use crate::world::{Host, InNamespace as _, PORT, dial, ebpf_or_skip, established, is_mptcp, mptcp_socket, option};

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    ByClient,
    ByServer,
    ResetByClient,
    ResetByServer,
    WithUnreadData,
}

impl End {
    pub const ALL: [Self; 5] = [
        Self::ByClient,
        Self::ByServer,
        Self::ResetByClient,
        Self::ResetByServer,
        Self::WithUnreadData,
    ];

    pub fn carry_out(self, mut client: TcpStream, accepted: TcpStream) {
        let reset = |stream: &TcpStream| {
            SockRef::from(stream)
                .set_linger(Some(Duration::ZERO))
                .expect("an option");
        };
        match self {
            Self::ByClient => drop(client),
            Self::ByServer => drop(accepted),
            Self::ResetByClient => {
                reset(&client);
                drop(client);
            }
            Self::ResetByServer => {
                reset(&accepted);
                drop(accepted);
            }
            Self::WithUnreadData => {
                client.write_all(b"unread").expect("a write");
                accepted.peek(&mut [0; 6]).expect("it arrives");
                drop(accepted);
                // The server's RST is there.
                let _ = client.read(&mut [0]);
            }
        }
    }
}

/// Connects so many times at once.
pub fn crowd(host: &Host, to: SocketAddr, listener: &TcpListener, count: usize) -> Vec<(TcpStream, TcpStream)> {
    let listener = listener.try_clone().expect("a clone");
    let server = thread::spawn(move || {
        (0..count)
            .map(|_| listener.accept().expect("a connection").0)
            .collect::<Vec<_>>()
    });
    let clients = Host::inside(&host.network.hub, move || {
        (0..count).map(|_| dial(to)).collect::<Vec<_>>()
    });
    // Who is who: in what order they are accepted is the kernel's.
    let mut accepted = server.join().expect("the server");
    let port = |address: SocketAddr| address.port();
    accepted.sort_by_key(|stream| port(stream.peer_addr().expect("an address")));
    let mut clients = clients;
    clients.sort_by_key(|stream| port(stream.local_addr().expect("an address")));
    clients.into_iter().zip(accepted).collect()
}

/// A node that listens on both families, and its addresses.
pub fn dual(host: &Host) -> (TcpListener, [SocketAddr; 2]) {
    host.node()
        .ip("addr add fd00::11/64 dev eth0 nodad")
        .expect("an address");
    host.network
        .hub
        .ip("addr add fd00::1/64 dev br0 nodad")
        .expect("an address");
    let v6: Ipv6Addr = "fd00::11".parse().expect("an address");
    let addresses = [host.address(), SocketAddr::new(IpAddr::V6(v6), PORT)];
    (host.listen("[::]"), addresses)
}

#[test]
fn however_connections_end_the_table_is_the_kernels_list() {
    for source in ["ebpf", "sockdiag"] {
        if source == "ebpf" && !ebpf_or_skip() {
            continue;
        }
        let mut host = Host::new(source);
        host.start_agent();
        let (listener, addresses) = dual(&host);
        let mut kept = Vec::new();
        for (round, to) in [0, 1, 2, 3].into_iter().zip(addresses.into_iter().cycle()) {
            let opened = crowd(&host, to, &listener, 60);
            for (index, (client, accepted)) in opened.into_iter().enumerate() {
                match End::ALL.get((index + round) % (End::ALL.len() + 1)) {
                    Some(end) => end.carry_out(client, accepted),
                    None => kept.push((client, accepted)),
                }
            }
            let list = host.expect_the_truth("after a round");
            assert_eq!(list.len(), kept.len());
        }
        if source == "ebpf" {
            assert_eq!(host.figure("/lost_events_total"), 0);
            assert_eq!(host.figure("/table_repairs/closed"), 0, "each end is an event");
            assert_eq!(host.figure("/table_repairs/opened"), 0);
        }
    }
}

#[test]
fn a_peer_that_is_dead_and_sockets_that_are_destroyed_are_seen() {
    for source in ["ebpf", "sockdiag"] {
        if source == "ebpf" && !ebpf_or_skip() {
            continue;
        }
        let mut host = Host::new(source);
        host.start_agent();
        let (listener, [v4, v6]) = dual(&host);
        let opened: Vec<_> = [v4, v6, v4, v6].map(|to| host.connect(to, &listener)).into();
        assert_eq!(host.expect_the_truth("all are open").len(), 4);

        // By keep-alive and by the user timeout, with the link down.
        // What MPTCP has for a socket takes no user timeout.
        let (by_keepalive, by_timeout) = opened.split_at(if is_mptcp() { 4 } else { 2 });
        for (_, accepted) in by_keepalive {
            let keepalive = socket2::TcpKeepalive::new()
                .with_time(Duration::from_secs(1))
                .with_interval(Duration::from_secs(1))
                .with_retries(2);
            SockRef::from(accepted)
                .set_tcp_keepalive(&keepalive)
                .expect("an option");
        }
        for (_, accepted) in by_timeout {
            SockRef::from(accepted)
                .set_tcp_user_timeout(Some(Duration::from_secs(1)))
                .expect("an option");
        }
        host.network.hub.ip("link set n0 down").expect("a link");
        for (_, accepted) in by_timeout {
            let mut accepted = accepted;
            accepted.write_all(b"into the void").expect("a write");
        }
        host.expect("the dead are gone", <[_]>::is_empty);
        host.network.hub.ip("link set n0 up").expect("a link");
        drop(opened);

        // By an administrator, or Cilium.
        let opened = [v4, v6].map(|to| host.connect(to, &listener));
        assert_eq!(host.expect_the_truth("all are open").len(), 2);
        let clients: Vec<SocketAddr> = opened
            .iter()
            .map(|(client, _)| client.local_addr().expect("an address"))
            .collect();
        if let Err(why) = destroy(&host, &clients) {
            skip(&format!("sockets cannot be destroyed here: {why}"));
            continue;
        }
        host.expect("the destroyed are gone", <[_]>::is_empty);
        drop(opened);
    }
}

/// `ss -K` in the node's namespace: ends the connections of those clients. Not by their ports alone: a client of the other
/// family may have the same one.
pub fn destroy(host: &Host, clients: &[SocketAddr]) -> Result<(), String> {
    let mut filter = vec!["(".to_owned()];
    for client in clients {
        if filter.len() > 1 {
            filter.push("or".to_owned());
        }
        filter.extend(["dst", "="].map(str::to_owned));
        filter.push(client.to_string());
    }
    filter.push(")".to_owned());
    let output = Command::new("ss")
        .args([
            "-K",
            "-t",
            "state",
            "established",
            "sport",
            "=",
            &PORT.to_string(),
            "and",
        ])
        .args(filter)
        .in_namespace(host)
        .output()
        .map_err(|error| format!("ss (iproute2): {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() && said.trim().is_empty() {
        Ok(())
    } else {
        Err(format!("{} {}", output.status, said.trim()))
    }
}

#[test]
fn a_client_with_several_subflows_is_one_connection() {
    /// include/linux/socket.h
    const SOL_MPTCP: i32 = 284;
    /// include/uapi/linux/mptcp.h
    const MPTCP_INFO: i32 = 1;
    for source in ["ebpf", "sockdiag"] {
        if source == "ebpf" && !ebpf_or_skip() {
            continue;
        }
        let mut host = Host::new(source);
        host.start_agent();
        host.network
            .hub
            .ip("addr add 10.77.0.2/24 dev br0")
            .expect("an address");
        let endpoint = host
            .network
            .hub
            .ip("mptcp limits set subflow 2 add_addr_accepted 2")
            .and_then(|()| host.node().ip("mptcp limits set subflow 2 add_addr_accepted 2"))
            .and_then(|()| host.network.hub.ip("mptcp endpoint add 10.77.0.2 dev br0 subflow"));
        if let Err(why) = endpoint {
            skip(&format!("no MPTCP here: {why:#}"));
            return;
        }
        let address = host.address();
        let listener: TcpListener = Host::inside(host.node(), move || {
            let listener = mptcp_socket(address);
            listener.bind(&address.into()).expect("the port is free");
            listener.listen(16).expect("it listens");
            listener.into()
        });
        let open = || {
            let client: TcpStream = Host::inside(&host.network.hub, move || {
                let client = mptcp_socket(address);
                client.connect(&address.into()).expect("the node answers");
                client.into()
            });
            let (mut accepted, _) = listener.accept().expect("a connection");
            let mut client = client;
            // Further subflows come once data went both ways.
            for _ in 0..3 {
                client.write_all(b"?").expect("a write");
                accepted.read_exact(&mut [0]).expect("a read");
                accepted.write_all(b"!").expect("a write");
                client.read_exact(&mut [0]).expect("a read");
            }
            (client, accepted)
        };
        let opened: Vec<_> = (0..3).map(|_| open()).collect();
        for (_, accepted) in &opened {
            let subflows = rebalancer_tests::process::wait_for(crate::world::PATIENCE, || {
                // `struct mptcp_info`: its first octet counts the subflows beside the first (include/uapi/linux/mptcp.h).
                let info: [u8; 8] = option(accepted, SOL_MPTCP, MPTCP_INFO)?;
                (info[0] >= 1).then_some(())
            });
            assert!(subflows.is_some(), "no second subflow came");
        }
        let list = host.expect("three clients", |list| list.len() == 3);
        assert!(
            list.iter().all(|one| one["client"]
                .as_str()
                .is_some_and(|client| client.starts_with("10.77.0.1:"))),
            "{list:#?}"
        );
        // A list that is read beside does not bring the others either.
        let listed = |host: &Host| {
            host.find_metric("rebalancer_bpf_events_total{kind=\"listed\"}")
                .unwrap_or(0)
        };
        let lists = listed(&host);
        rebalancer_tests::process::wait_for(crate::world::PATIENCE, || (listed(&host) > lists + 1).then_some(()))
            .expect("two more lists");
        assert_eq!(host.expect("three clients", |list| list.len() == 3).len(), 3);
        assert_eq!(host.figure("/table_repairs/opened"), 0);
        // The first subflow of each goes, as when a path is lost: the clients stay, by the subflows that are left.
        host.network
            .hub
            .ip("mptcp endpoint del id 0 10.77.0.1")
            .expect("the first subflows end");
        let node = host.node().clone();
        let left = rebalancer_tests::process::wait_for(crate::world::PATIENCE, || {
            let left = Host::inside(&node, established);
            left.iter()
                .all(|client| client.starts_with("10.77.0.2:"))
                .then_some(left)
        });
        assert_eq!(left.expect("the first subflows are gone").len(), 3);
        let lists = listed(&host);
        rebalancer_tests::process::wait_for(crate::world::PATIENCE, || (listed(&host) > lists + 1).then_some(()))
            .expect("two more lists");
        let list = host.expect("three clients", |list| list.len() == 3);
        assert!(
            list.iter().all(|one| one["client"]
                .as_str()
                .is_some_and(|client| client.starts_with("10.77.0.1:"))),
            "each is known as it came: {list:#?}"
        );
        for kind in ["opened", "closed"] {
            assert_eq!(host.figure(&format!("/table_repairs/{kind}")), 0);
        }
        for (mut client, mut accepted) in opened {
            client.write_all(b"?").expect("it is alive");
            accepted.read_exact(&mut [0]).expect("it is alive");
        }
        host.expect("none", <[_]>::is_empty);
    }
}
