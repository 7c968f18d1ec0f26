//! Counting in the kernel: an agent on one host, clients on another, and what its API says of them.

mod too_old;

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use rebalancer_tests::{
    binary,
    netns::{Namespace, Network},
    node::{ask, ask_text},
    process::{Process, log_directory, wait_for},
    skip,
};
use rustls::{ClientConfig, ClientConnection, RootCertStore, pki_types::ServerName};
use serde_json::Value;

const PORT: u16 = 6443;
/// An emulated machine is slow.
const PATIENCE: Duration = Duration::from_secs(90);

/// A node with an agent, and a server that only accepts.
struct Host {
    network: Network,
    directory: PathBuf,
    agent: Option<Process>,
    source: &'static str,
    kernel_log: &'static str,
}

impl Host {
    fn new(source: &'static str) -> Self {
        let network = Network::new(1).expect("namespaces need root");
        Self {
            network,
            directory: log_directory("rebalancer-kernel-").expect("a directory"),
            agent: None,
            source,
            kernel_log: "off",
        }
    }

    fn node(&self) -> &Namespace {
        &self.network.nodes[0]
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::new(Network::node_address(0), PORT)
    }

    fn start_agent(&mut self) {
        let mut command = Command::new(binary());
        command
            .args(["agent", "--node-name=node-1", "--interval=200ms"])
            .arg(format!("--source={}", self.source))
            .arg(format!("--kernel-log={}", self.kernel_log))
            .arg(format!("--apiserver-port={PORT}"))
            .arg(format!("--api=unix:{}", self.directory.join("agent.sock").display()));
        let agent = Process::start("agent", command, Some(self.node().fd()), &self.directory).expect("an agent");
        self.agent = Some(agent);
        self.expect("the agent answers", |_| true);
    }

    fn ask(&mut self, path: &str) -> Option<Value> {
        if let Some(Err(error)) = self.agent.as_mut().map(Process::is_running) {
            panic!("{error:#}");
        }
        ask(&self.directory.join("agent.sock"), path).ok()
    }

    /// Waits until the connections are as expected, and gives them.
    fn expect(&mut self, what: &str, wanted: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let mut last = None;
        let found = wait_for(PATIENCE, || {
            let answer = self.ask("/v1/connections?limit=100000")?;
            let list = answer["connections"].as_array()?.clone();
            let done = wanted(&list);
            last = Some(list);
            done.then(|| last.clone()).flatten()
        });
        found.unwrap_or_else(|| panic!("{what}: never seen with {}; the last was {last:#?}", self.source))
    }

    /// Runs something on a thread inside a namespace.
    fn inside<T: Send + 'static>(namespace: &Namespace, job: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = namespace.clone();
        thread::spawn(move || {
            namespace.enter().expect("its own namespace");
            job()
        })
        .join()
        .expect("the thread ends well")
    }

    /// Listens on the node, on that address.
    fn listen(&self, address: &str) -> TcpListener {
        let address: SocketAddr = format!("{address}:{PORT}").parse().expect("an address");
        Self::inside(self.node(), move || {
            TcpListener::bind(address).expect("the port is free")
        })
    }

    /// Connects from the hub.
    fn connect(&self, to: SocketAddr, listener: &TcpListener) -> (TcpStream, TcpStream) {
        let client = Self::inside(&self.network.hub, move || {
            TcpStream::connect(to).expect("the node answers")
        });
        let (accepted, _) = listener.accept().expect("a connection");
        (client, accepted)
    }
}

/// A ClientHello as rustls sends it, with a post-quantum key share: more than one segment long.
fn client_hello(alpn: &[&str]) -> Vec<u8> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let name = ServerName::try_from("kubernetes").expect("a name");
    let mut client = ClientConnection::new(Arc::new(config), name).expect("a client");
    let mut hello = Vec::new();
    client.write_tls(&mut hello).expect("a hello");
    hello
}

fn protocols(list: &[Value]) -> Vec<&str> {
    let mut found: Vec<_> = list
        .iter()
        .filter_map(|connection| connection["protocol"].as_str())
        .collect();
    found.sort_unstable();
    found
}

/// What the binary finds by trying.
fn features() -> Value {
    let output = Command::new(binary())
        .args(["system-info", "--output=json"])
        .output()
        .expect("the binary runs");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn the_program_that_steers_new_connections_is_taken() {
    if !ebpf_or_skip() {
        return;
    }
    let intercept = &features()["intercept"];
    assert_eq!(intercept["ok"], true, "{intercept}");
}

/// Whether the kernel takes the programs; when not, the reason is a counted skip.
fn ebpf_or_skip() -> bool {
    let features = features();
    let ebpf = &features["source-ebpf"];
    if ebpf["ok"] != true {
        skip(&format!("the kernel programs do not load here: {}", ebpf["why"]));
    }
    ebpf["ok"] == true
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
fn connections_from_before_are_seeded_and_loopback_is_left_out() {
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
        let list = host.expect("the seeds", |list| list.len() == 5);
        assert!(list.iter().all(|connection| connection["seeded"] == true), "{list:#?}");
        let after = host.connect(address, &listener);
        let list = host.expect("one more", |list| list.len() == 6);
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
        assert_eq!(unique.len(), 6);
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

#[test]
fn a_storm_of_connections_is_counted_to_the_last_one() {
    if !ebpf_or_skip() {
        return;
    }
    let mut host = Host::new("ebpf");
    host.start_agent();
    let listener = host.listen("0.0.0.0");
    let address = host.address();
    // More events than the ring holds, in case the agent is slow: then the list must set it right.
    const ROUNDS: usize = 40;
    const AT_ONCE: usize = 250;
    for _ in 0..ROUNDS {
        let listener = listener.try_clone().expect("a clone");
        let server = thread::spawn(move || {
            (0..AT_ONCE)
                .map(|_| listener.accept().expect("a connection").0)
                .collect::<Vec<_>>()
        });
        let clients = Host::inside(&host.network.hub, move || {
            (0..AT_ONCE)
                .map(|_| TcpStream::connect(address).expect("the node answers"))
                .collect::<Vec<_>>()
        });
        drop((clients, server.join().expect("the server")));
    }
    let kept: Vec<_> = (0..7).map(|_| host.connect(address, &listener)).collect();
    host.expect("the seven that are open", |list| list.len() == kept.len());
}
