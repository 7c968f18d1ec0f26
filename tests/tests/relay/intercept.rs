//! `--intercept`: the apiserver keeps its port and its flags, the relay gets its connections, and whatever becomes of
//! the relay, they go on.
//!
//! Two hosts: clients on one; apiserver, relay and agent on the other.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::{fd::AsFd as _, unix::net::UnixListener},
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use rebalancer::{
    local::descriptor,
    relay::takeover::{SOCKET, path_beside},
};
use rebalancer_tests::{
    binary,
    h2wire::PATIENCE,
    netns::Network,
    pki::Pki,
    process::{Process, tail, wait_for},
    storm::Storm,
};

use crate::world::{relay_between, serve};

const PORT: u16 = 6443;
const THREADS: usize = 4;
/// What only the node itself can reach, and the kernel can steer clients of both families to.
const RELAY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 6445);
const NODE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 11));

struct Scene {
    pki: Pki,
    network: Network,
    relay: Process,
    agent: Process,
    logs: tempfile::TempDir,
}

impl Scene {
    fn start() -> Self {
        Self::with_relay_on(RELAY)
    }

    fn with_relay_on(listen: SocketAddr) -> Self {
        let network = Network::new(1).expect("two hosts");
        network.hub.ip("addr add fd77::1/64 dev br0 nodad").expect("an address");
        network.nodes[0]
            .ip("addr add fd77::b/64 dev eth0 nodad")
            .expect("an address");
        let logs = tempfile::Builder::new()
            .prefix("rebalancer-intercept-")
            .tempdir()
            .expect("a directory");
        let pki = Pki::new(&[Network::node_address(0), NODE_V6]).expect("certificates");
        network.nodes[0].enter().expect("its own namespace");
        let accepted = serve(&pki, SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), PORT), true);
        // What asks for more than an answer is nobody here.
        drop(accepted);
        let apiserver = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), PORT);
        let control = logs.path().join("relay.sock");
        let between = [listen, apiserver];
        let relay = relay_between(&pki, &network.nodes[0], logs.path(), &control, "relay", between, &[]);
        let agent = start_agent(&network, logs.path(), "agent");
        Self {
            pki,
            network,
            relay,
            agent,
            logs,
        }
    }

    /// Clients of the other host, over IPv4 and IPv6.
    fn storm(&self) -> Storm {
        let servers = [Network::node_address(0), NODE_V6].map(|address| SocketAddr::new(address, PORT));
        Storm::start(&self.pki, &self.network.hub, &servers, THREADS).expect("a storm")
    }

    /// Waits until so many more connections went a way.
    fn more(&self, storm: &Storm, by_relay: bool) {
        const MORE: u64 = 60;
        let way = || {
            if by_relay {
                storm.relayed()
            } else {
                storm.served() - storm.relayed()
            }
        };
        let target = way() + MORE;
        let reached = wait_for(PATIENCE, || (way() >= target).then_some(()));
        assert!(
            reached.is_some(),
            "no connections by the {}, {} failed:\n{}\n{}",
            if by_relay { "relay" } else { "apiserver's own port" },
            storm.failed(),
            tail(&self.agent.log()),
            tail(&self.relay.log())
        );
    }
}

fn start_relay(pki: &Pki, network: &Network, logs: &Path, name: &str) -> Process {
    let apiserver = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), PORT);
    let control = logs.join("relay.sock");
    relay_between(pki, &network.nodes[0], logs, &control, name, [RELAY, apiserver], &[])
}

fn start_agent(network: &Network, logs: &Path, name: &str) -> Process {
    let mut agent = Command::new(binary());
    agent
        .args(["agent", "--node-name=node", "--source=sockdiag", "--intercept"])
        .arg(format!("--apiserver-port={PORT}"))
        .arg(format!("--shim=relay:unix:{}", logs.join("relay.sock").display()))
        .arg(format!("--api=unix:{}", logs.join("agent.sock").display()));
    Process::start(name, agent, Some(network.nodes[0].fd()), logs).expect("the agent starts")
}

/// The agent's metrics; the calling thread is on its host.
fn metrics() -> String {
    let mut stream = std::net::TcpStream::connect("127.0.0.1:9470").expect("the metrics' port");
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

/// sk_lookup programs attached in the calling thread's network namespace, as the kernel counts them.
fn attached() -> usize {
    // A link of this kind shows in the fdinfo of whoever holds it, with its namespace's inode.
    let own = std::fs::read_link("/proc/thread-self/ns/net").expect("a namespace");
    let inode = own
        .to_string_lossy()
        .trim_matches(|c: char| !c.is_ascii_digit())
        .to_owned();
    let mut count = 0;
    for process in std::fs::read_dir("/proc").expect("processes").flatten() {
        let Ok(descriptors) = std::fs::read_dir(process.path().join("fdinfo")) else {
            continue;
        };
        for descriptor in descriptors.flatten() {
            let text = std::fs::read_to_string(descriptor.path()).unwrap_or_default();
            let ours = |line: &str| {
                line.strip_prefix("netns_ino:")
                    .is_some_and(|found| found.trim() == inode)
            };
            count += usize::from(text.contains("link_type:\tnetns") && text.lines().any(ours));
        }
    }
    count
}

#[test]
fn a_socket_that_no_client_of_ipv4_can_be_given_is_refused_and_named() {
    let scene = Scene::with_relay_on(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), RELAY.port()));
    let said = wait_for(PATIENCE, || {
        scene.agent.log().contains("clients of IPv6 alone").then_some(())
    });
    assert!(said.is_some(), "{}", tail(&scene.agent.log()));
    let storm = scene.storm();
    scene.more(&storm, false);
    assert_eq!(storm.relayed(), 0);
    assert!(metrics().contains("rebalancer_intercepting 0"), "{}", metrics());
}

/// What takes connections and serves none of them, and lends its socket as a relay does; counts those that came.
fn lend_what_serves_nobody(control: &Path) -> Arc<AtomicU64> {
    let taken = Arc::new(AtomicU64::new(0));
    let socket = TcpListener::bind(RELAY).expect("a port of the node's");
    let lent = UnixListener::bind(path_beside(control)).expect("a socket");
    let accepting = socket.try_clone().expect("the same socket");
    let counts = Arc::clone(&taken);
    thread::spawn(move || {
        for stream in accepting.incoming() {
            // Of the node itself it is the agent's question.
            if stream.is_ok_and(|stream| stream.peer_addr().is_ok_and(|from| !from.ip().is_loopback())) {
                counts.fetch_add(1, Relaxed);
            }
        }
    });
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            lent.set_nonblocking(true).expect("a socket");
            let lent = tokio::net::UnixListener::from_std(lent).expect("a socket");
            while let Ok((asker, _)) = lent.accept().await {
                if descriptor::receive(&asker).await.is_ok() {
                    let _ = descriptor::send(&asker, SOCKET, Some(socket.as_fd())).await;
                }
            }
        });
    });
    taken
}

#[test]
fn what_has_not_served_anybody_yet_is_given_nobody() {
    let network = Network::new(1).expect("two hosts");
    let logs = tempfile::Builder::new()
        .prefix("rebalancer-intercept-")
        .tempdir()
        .expect("a directory");
    let pki = Pki::new(&[Network::node_address(0)]).expect("certificates");
    network.nodes[0].enter().expect("its own namespace");
    drop(serve(&pki, SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), PORT), true));
    let taken = lend_what_serves_nobody(&logs.path().join("relay.sock"));
    let agent = start_agent(&network, logs.path(), "agent");
    let server = [SocketAddr::new(Network::node_address(0), PORT)];
    let storm = Storm::start(&pki, &network.hub, &server, THREADS).expect("a storm");
    let said = wait_for(PATIENCE, || {
        agent.log().contains("the relay serves nobody").then_some(())
    });
    assert!(said.is_some(), "{}", tail(&agent.log()));
    let outcome = storm.end();
    assert_eq!((outcome.failed, &outcome.errors[..]), (0, &[][..]));
    assert_eq!(
        taken.load(Relaxed),
        0,
        "the clients of other hosts went to the apiserver"
    );
    assert!(metrics().contains("rebalancer_intercepting 0"), "{}", metrics());
}

#[test]
fn connections_of_other_hosts_go_to_the_relay_and_the_nodes_own_do_not() {
    let mut scene = Scene::start();
    for address in [Network::node_address(0), NODE_V6] {
        let server = [SocketAddr::new(address, PORT)];
        // Who comes before the agent steers reaches the apiserver itself, and so says nothing.
        let storm = Storm::start(&scene.pki, &scene.network.hub, &server, THREADS).expect("a storm");
        scene.more(&storm, true);
        let outcome = storm.end();
        assert_eq!((outcome.failed, &outcome.errors[..]), (0, &[][..]), "{address}");
    }

    // From the node itself, to loopback and to its own addresses.
    let own = [
        "127.0.0.1".parse().expect("an address"),
        Network::node_address(0),
        NODE_V6,
    ];
    let own = own.map(|address| SocketAddr::new(address, PORT));
    let storm = Storm::start(&scene.pki, &scene.network.nodes[0], &own, 3).expect("a storm");
    scene.more(&storm, false);
    assert_eq!(storm.relayed(), 0);
    storm.end();

    assert_eq!(attached(), 1);
    assert!(metrics().contains("rebalancer_intercepting 1"), "{}", metrics());
    let storm = scene.storm();
    scene.more(&storm, true);
    assert!(scene.agent.terminate(PATIENCE).expect("it ends").success());
    scene.more(&storm, false);
    assert_eq!(attached(), 0, "nothing is left behind");
    // An agent that comes back goes on.
    scene.agent = start_agent(&scene.network, scene.logs.path(), "agent-again");
    scene.more(&storm, true);
    // And one that is killed leaves nothing either.
    scene.agent.kill();
    scene.more(&storm, false);
    assert_eq!(attached(), 0, "nothing is left behind");
    let outcome = storm.end();
    assert_eq!((outcome.failed, &outcome.errors[..]), (0, &[][..]));
}

#[test]
fn a_relay_that_is_killed_costs_only_what_was_on_it() {
    let mut scene = Scene::start();
    let storm = scene.storm();
    scene.more(&storm, true);
    let mut killed = 0;
    for name in ["second", "third"] {
        let before = storm.failed();
        scene.relay.kill();
        scene.more(&storm, false);
        let cost = storm.failed() - before;
        // Each thread's connection, and its next one, which may wait in the queue before the listening socket is closed.
        assert!(
            cost <= 2 * THREADS as u64,
            "{cost} connections failed, and no more than {THREADS} were on the relay and as many in its queue"
        );
        killed += cost;
        scene.relay = start_relay(&scene.pki, &scene.network, scene.logs.path(), name);
        scene.more(&storm, true);
    }
    let outcome = storm.end();
    assert_eq!(outcome.failed, killed, "nothing failed at another time: {outcome:?}");
}

#[test]
fn a_relay_that_is_stopped_loses_none_and_others_go_to_the_apiserver() {
    let scene = Scene::start();
    let storm = scene.storm();
    scene.more(&storm, true);
    scene.relay.signal(libc::SIGSTOP);
    // Those on it wait, and who comes before it is seen to stand still; new clients are served.
    let seen = wait_for(PATIENCE, || {
        metrics().contains("rebalancer_intercepting 0").then_some(())
    });
    assert!(seen.is_some(), "{}", tail(&scene.agent.log()));
    let newcomers = scene.storm();
    scene.more(&newcomers, false);
    scene.relay.signal(libc::SIGCONT);
    scene.more(&storm, true);
    for outcome in [newcomers.end(), storm.end()] {
        assert_eq!((outcome.failed, &outcome.errors[..]), (0, &[][..]));
    }
}

#[test]
fn restarts_and_upgrades_of_the_relay_lose_none() {
    let mut scene = Scene::start();
    let storm = scene.storm();
    scene.more(&storm, true);
    // An upgrade: the new one takes over.
    let newer = start_relay(&scene.pki, &scene.network, scene.logs.path(), "newer");
    let mut older = std::mem::replace(&mut scene.relay, newer);
    wait_for(PATIENCE, || older.is_running().err()).expect("the old one ends");
    scene.more(&storm, true);
    // A restart: for a moment there is none.
    assert!(scene.relay.terminate(PATIENCE).expect("it ends").success());
    scene.more(&storm, false);
    scene.relay = start_relay(&scene.pki, &scene.network, scene.logs.path(), "again");
    scene.more(&storm, true);
    let outcome = storm.end();
    assert_eq!((outcome.failed, &outcome.errors[..]), (0, &[][..]));
}
