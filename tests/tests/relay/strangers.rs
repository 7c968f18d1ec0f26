//! What strangers cost: the relay's memory under each abuse that docs/relay.md names, with Go's own server behind, while a
//! client that means well is served.
//!
//! Each of them that is about holding has so many connections that a relay without bounds would hold more than is allowed,
//! and each must have come about: what was sent, ended and counted is asserted.
//! How long others wait is `cargo xtask bench relay`'s.

use std::{
    env,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use rebalancer_tests::{
    abuse::{ABUSES, Abuse, Attack, Done, Fate},
    bench::machine::Highest,
    fixture,
    h2wire::{END_STREAM, PATIENCE, Peer, frame, kind, request},
    netns::Namespace,
    pki::Pki,
    process::{Process, wait_for},
    skip,
};

use crate::world::{RELAY, UPSTREAM, relay_between, resident_kib};

/// How much more memory than idle any of them may cost.
const BOUND_KIB: u64 = 64 * 1024;

/// How much more than that those who hold would have a relay without bounds hold: a quarter.
const BEYOND: u64 = 5;

/// How long it may take until all of them have done what they do.
const COMING: Duration = Duration::from_secs(60);

const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 6447);

/// The relay before Go's server, and a client that means well.
struct Scene {
    pki: Pki,
    namespace: Namespace,
    relay: Process,
    _backend: Process,
    _logs: tempfile::TempDir,
}

impl Scene {
    fn start(backend: &std::path::Path) -> Self {
        let namespace = Namespace::new().expect("a network namespace");
        namespace.enter().expect("its own namespace");
        let logs = tempfile::tempdir().expect("a directory");
        let pki = Pki::new(&[RELAY.ip()]).expect("certificates");
        let serving = pki.pair("apiserver");
        let mut command = Command::new(backend);
        command
            .arg(format!("-listen={UPSTREAM}"))
            .arg("-figures=127.0.0.1:6446");
        command
            .arg("-cert")
            .arg(serving.certificate)
            .arg("-key")
            .arg(serving.key);
        let backend = Process::start("backend", command, Some(namespace.fd()), logs.path()).expect("it starts");
        let control = logs.path().join("relay.sock");
        let addresses = [RELAY, UPSTREAM];
        let metrics = format!("--metrics={METRICS}");
        let relay = relay_between(&pki, &namespace, logs.path(), &control, "relay", addresses, &[&metrics]);
        let open = wait_for(PATIENCE, || TcpStream::connect(RELAY).ok().map(drop));
        assert!(open.is_some(), "{}", relay.log());
        Self {
            pki,
            namespace,
            relay,
            _backend: backend,
            _logs: logs,
        }
    }

    /// How many connections the relay has rejected by that cause.
    fn rejected(&self, cause: &str) -> u64 {
        let mut socket = TcpStream::connect(METRICS).expect("its metrics");
        socket.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("a request");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).expect("an answer");
        let begin = format!("rebalancer_relay_rejections_total{{cause=\"{cause}\"}} ");
        let line = answer.lines().find_map(|line| line.strip_prefix(&begin));
        line.and_then(|line| line.parse().ok()).expect("a count")
    }

    /// Whether all of it has come about.
    fn is_there(&self, abuse: &Abuse, connections: u64, done: Done, rejected: u64) -> bool {
        let sent = match abuse.holds {
            // Who comes again and again sends nothing.
            0 => done.connections >= connections && (done.acts > 0 || done.connections > 2 * connections),
            _ => done.acts >= connections,
        };
        let fate = match abuse.fate {
            Fate::Served => true,
            Fate::Ended => done.ended > 0,
            Fate::Rejected(cause) => done.ended > 0 && self.rejected(cause) > rejected,
        };
        sent && fate
    }
}

/// A client with one request at a time.
struct Bystander {
    peer: Peer,
    stream: u32,
}

impl Bystander {
    fn connect(pki: &Pki) -> Self {
        let alice = pki.client("alice", "alice", &[]).expect("a certificate");
        let mut peer = Peer::connect(pki, RELAY, Some(&alice), b"h2").expect("a handshake");
        peer.begin_client(&[]);
        peer.send(&frame(kind::WINDOW_UPDATE, 0, 0, &0x7fff_0000_u32.to_be_bytes()));
        Self { peer, stream: 1 }
    }

    fn asks(&mut self) {
        self.peer
            .send(&request(self.stream, "/api/v1/namespaces/default/pods/web-0"));
        loop {
            let got = self.peer.receive();
            if got.stream == self.stream && got.flags & END_STREAM != 0 {
                break;
            }
        }
        self.stream += 2;
    }
}

#[test]
fn no_abuse_costs_more_memory_than_the_bound_and_others_are_served() {
    let backend = match fixture::backend() {
        Ok(backend) => backend,
        Err(error) => return skip(&format!("{error:#}")),
    };
    let (least, length) = if env::var_os("REBALANCER_LONG").is_some() {
        (100, Duration::from_secs(4))
    } else {
        (20, Duration::from_millis(250))
    };
    let scene = Scene::start(&backend);
    let mut client = Bystander::connect(&scene.pki);
    client.asks();
    let idle = resident_kib(&scene.relay);
    println!("idle: {} MiB; each for {length:?} at least", idle / 1024);
    for abuse in &ABUSES {
        let enough = (BOUND_KIB * 1024 * BEYOND / 4).checked_div(abuse.holds).unwrap_or(0) + 1;
        let connections = least.max(enough);
        assert!(abuse.holds == 0 || connections * abuse.holds > BOUND_KIB * 1024);
        let rejected = match abuse.fate {
            Fate::Rejected(cause) => scene.rejected(cause),
            Fate::Served | Fate::Ended => 0,
        };
        let highest = Highest::of(scene.relay.id());
        let began = Instant::now();
        let attack = Attack::start(abuse, &scene.pki, RELAY, connections as usize, None, None).expect("threads");
        let mut served = 0;
        while served == 0 || began.elapsed() < length || !scene.is_there(abuse, connections, attack.done(), rejected) {
            client.asks();
            served += 1;
            let done = attack.done();
            assert!(
                began.elapsed() < COMING,
                "{}: it does not come about: {done:?} of {connections}",
                abuse.name
            );
            thread::sleep(Duration::from_millis(2));
        }
        let done = attack.stop();
        let grown = highest.kib().saturating_sub(idle);
        println!(
            "{} ({connections} connections): {done:?} in {:.1} s; memory {:+.1} MiB; {served} requests of another",
            abuse.name,
            began.elapsed().as_secs_f64(),
            grown as f64 / 1024.0,
        );
        assert!(grown <= BOUND_KIB, "{}: {grown} KiB more than idle", abuse.name);
    }
    client.asks();
    drop(scene.namespace);
}
