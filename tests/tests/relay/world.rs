//! One relay on loopback in a namespace of its own, before a scripted apiserver.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        mpsc::{self, Receiver},
    },
    thread,
};

use rebalancer_tests::{
    bench::machine::rss_kib,
    binary,
    h2wire::{END_HEADERS, END_STREAM, Frame, PATIENCE, PREFACE, Peer, block, fields, frame, kind, request},
    netns::Namespace,
    pki::{Pair, Pki},
    process::{Process, tail, wait_for},
    storm::{Storm, VIA_RELAY},
};
use rustls::{
    RootCertStore, ServerConfig, ServerConnection,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use socket2::SockRef;

pub const RELAY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 6443);
pub const UPSTREAM: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 6444);

/// `:status: 200` (RFC 7541, appendix A, index 8).
pub const OK: [u8; 1] = [0x88];

pub struct World {
    pub pki: Pki,
    pub relay: Process,
    logs: tempfile::TempDir,
    namespace: Namespace,
    accepted: Receiver<Accepted>,
    upstream: TcpListener,
    control: PathBuf,
}

/// A connection that the relay opened for a client.
pub struct Accepted {
    pub peer: Peer,
    /// The head of an HTTP/1.1 request, which was read to tell it from a health check.
    pub head: String,
}

impl World {
    /// Starts both, with more flags for the relay; the calling thread is in the namespace from here on.
    pub fn start(flags: &[&str]) -> Self {
        Self::start_with(flags, false)
    }

    /// The same with an apiserver that answers every request at once.
    pub fn answering(flags: &[&str]) -> Self {
        Self::start_with(flags, true)
    }

    fn start_with(flags: &[&str], answering: bool) -> Self {
        Self::start_prepared(answering, |_| flags.iter().map(|flag| (*flag).to_owned()).collect())
    }

    /// The same, with flags that name files which are made first.
    pub fn start_prepared(answering: bool, flags: impl FnOnce(&Pki) -> Vec<String>) -> Self {
        let namespace = Namespace::new().expect("a network namespace");
        namespace.enter().expect("its own namespace");
        let logs = tempfile::Builder::new()
            .prefix("rebalancer-relay-")
            .tempdir()
            .expect("a directory");
        let pki = Pki::new(&[RELAY.ip()]).expect("certificates");
        let listener = TcpListener::bind(UPSTREAM).expect("a free port in a namespace of its own");
        let upstream = listener.try_clone().expect("a descriptor");
        let accepted = serve_on(listener, &pki, answering);
        let control = logs.path().join("relay.sock");
        let flags = flags(&pki);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let relay = start_relay(&pki, &namespace, &logs, &control, "relay", RELAY, &flags);
        let mut world = Self {
            pki,
            relay,
            logs,
            namespace,
            accepted,
            upstream,
            control,
        };
        let open = wait_for(PATIENCE, || {
            world.relay.is_running().expect("the relay runs");
            TcpStream::connect(RELAY).ok().map(drop)
        });
        assert!(
            open.is_some(),
            "the relay does not listen:\n{}",
            tail(&world.relay.log())
        );
        world
    }

    /// A storm of clients on the relay's port.
    pub fn storm(&self, threads: usize) -> Storm {
        Storm::start(&self.pki, &self.namespace, &[RELAY], threads).expect("a storm")
    }

    /// Starts another relay with the same control socket beside the one that runs.
    pub fn start_another(&self, name: &str, listen: SocketAddr) -> Process {
        self.start_another_with(name, listen, &[])
    }

    /// The same, with flags.
    pub fn start_another_with(&self, name: &str, listen: SocketAddr, flags: &[&str]) -> Process {
        start_relay(
            &self.pki,
            &self.namespace,
            &self.logs,
            &self.control,
            name,
            listen,
            flags,
        )
    }

    /// Another client and its upstream connection, both past their HTTP/2 beginnings.
    pub fn open(&self, identity: Option<&Pair>) -> (Peer, Peer) {
        let mut client = Peer::connect(&self.pki, RELAY, identity, b"h2").expect("a handshake");
        client.begin_client(&[]);
        let mut server = self.accept().peer;
        server.begin_server();
        assert_eq!(client.expect(kind::SETTINGS).flags, 0);
        assert_eq!(client.expect(kind::SETTINGS).flags, 1);
        (client, server)
    }

    /// The next connection that the relay opens.
    pub fn accept(&self) -> Accepted {
        self.accepted
            .recv_timeout(PATIENCE)
            .unwrap_or_else(|_| panic!("the relay opens no connection:\n{}", tail(&self.relay.log())))
    }

    /// The apiserver accepts nobody any more, and keeps those it has: so an orderly end of it begins, and so it is for an
    /// instant when it is killed.
    pub fn stop_listening(&self) {
        SockRef::from(&self.upstream)
            .shutdown(Shutdown::Read)
            .expect("it listens");
    }

    /// A client that works, to see that it still does later.
    pub fn bystander(&self) -> Bystander {
        let (client, server) = self.open(None);
        let mut bystander = Bystander {
            client,
            server,
            stream: 1,
        };
        bystander.is_served();
        bystander
    }

    /// Resident memory of the relay's process, in KiB (proc_pid_status(5), VmRSS).
    pub fn resident_kib(&self) -> u64 {
        resident_kib(&self.relay)
    }

    /// The relay's connections.
    pub fn connections(&self) -> Vec<serde_json::Value> {
        match self.control("GET /v1/connections", "")["connections"].take() {
            serde_json::Value::Array(list) => list,
            other => panic!("connections are {other}"),
        }
    }

    /// The id of the connection from that address.
    pub fn id_of(&self, client: SocketAddr) -> String {
        let found = wait_for(PATIENCE, || {
            let all = self.connections();
            let ours = all.iter().find(|entry| entry["client"] == client.to_string())?;
            (ours["protocol"] != "unknown").then(|| ours["id"].as_str().expect("an id").to_owned())
        });
        found.unwrap_or_else(|| panic!("the relay does not list {client}"))
    }

    /// The entry of the connection from that address.
    pub fn entry(&self, client: SocketAddr) -> serde_json::Value {
        let id = self.id_of(client);
        let all = self.connections();
        let found = all.into_iter().find(|entry| entry["id"] == id.as_str());
        found.unwrap_or_else(|| panic!("the relay does not list {client} any more"))
    }

    /// Where both are.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Where its files and sockets are.
    pub fn directory(&self) -> &std::path::Path {
        self.logs.path()
    }

    /// The control socket's path.
    pub fn control_path(&self) -> &std::path::Path {
        &self.control
    }

    /// Orders GOAWAY for a client.
    pub fn go_away(&self, client: SocketAddr) -> String {
        let id = self.id_of(client);
        let body = format!(r#"{{"generation": 1, "expires_in_ms": 10000, "victims": ["{id}"]}}"#);
        let answer = self.control("POST /v1/goaway", &body);
        answer["results"][0]["result"].as_str().expect("a result").to_owned()
    }

    /// Asks the control socket, if somebody answers there.
    pub fn try_control(&self, request: &str) -> Option<String> {
        let mut socket = UnixStream::connect(&self.control).ok()?;
        write!(socket, "{request} HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).ok()?;
        answer.starts_with("HTTP/1.1 200 ").then_some(answer)
    }

    /// Asks the control socket.
    pub fn control(&self, request: &str, body: &str) -> serde_json::Value {
        let mut socket = UnixStream::connect(&self.control).expect("the control socket");
        write!(
            socket,
            "{request} HTTP/1.1\r\nHost: relay\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .expect("a request");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).expect("an answer");
        let (_, json) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
        serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {answer}"))
    }
}

fn start_relay(
    pki: &Pki,
    namespace: &Namespace,
    logs: &tempfile::TempDir,
    control: &std::path::Path,
    name: &str,
    listen: SocketAddr,
    flags: &[&str],
) -> Process {
    relay_between(pki, namespace, logs.path(), control, name, [listen, UPSTREAM], flags)
}

/// Starts a relay that listens on the first address, before an apiserver on the second.
pub fn relay_between(
    pki: &Pki,
    namespace: &Namespace,
    logs: &std::path::Path,
    control: &std::path::Path,
    name: &str,
    [listen, upstream]: [SocketAddr; 2],
    flags: &[&str],
) -> Process {
    let mut relay = Command::new(binary());
    relay
        .arg("relay")
        .arg(format!("--listen={listen}"))
        .args(
            flags
                .iter()
                .all(|flag| !flag.starts_with("--upstream="))
                .then(|| format!("--upstream={upstream}")),
        )
        .args(pki.relay_flags())
        .arg(format!("--control=unix:{}", control.display()))
        .args(flags)
        .env("REBALANCER_LOG", "debug");
    Process::start(name, relay, Some(namespace.fd()), logs).expect("the relay starts")
}

/// Resident memory of a process, in KiB.
pub fn resident_kib(process: &Process) -> u64 {
    rss_kib(process.id()).expect("the process runs")
}

/// A client whose neighbours misbehave.
pub struct Bystander {
    client: Peer,
    server: Peer,
    stream: u32,
}

impl Bystander {
    /// One request goes through and is answered.
    pub fn is_served(&mut self) {
        self.client.send(&request(self.stream, "/bystander"));
        assert_eq!(self.server.expect(kind::HEADERS).stream, self.stream);
        self.server
            .send(&frame(kind::HEADERS, END_STREAM | END_HEADERS, self.stream, &OK));
        let expected = Frame {
            kind: kind::HEADERS,
            flags: END_STREAM | END_HEADERS,
            stream: self.stream,
            payload: OK.to_vec(),
        };
        assert_eq!(self.client.receive(), expected);
        self.stream += 2;
    }
}

/// Accepts for ever on a thread: health checks are answered, everything else is handed over.
pub fn serve(pki: &Pki, listen: SocketAddr, answering: bool) -> Receiver<Accepted> {
    let listener = TcpListener::bind(listen).expect("a free port in a namespace of its own");
    serve_on(listener, pki, answering)
}

fn serve_on(listener: TcpListener, pki: &Pki, answering: bool) -> Receiver<Accepted> {
    let config = Arc::new(server_config(pki).expect("the apiserver's certificates"));
    let (hand_over, accepted) = mpsc::channel();
    thread::spawn(move || {
        for socket in listener.incoming() {
            let (hand_over, config) = (hand_over.clone(), Arc::clone(&config));
            // It listens no more.
            let Ok(socket) = socket else { return };
            thread::spawn(move || {
                let tls = ServerConnection::new(config).expect("a session");
                // The health check connects first without TLS.
                let Ok(mut peer) = Peer::accept(tls, socket) else {
                    return;
                };
                let mut head = String::new();
                if peer.protocol == b"http/1.1" {
                    head = peer.read_head();
                    if head.starts_with("GET /readyz ") {
                        return peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
                    }
                }
                if answering && peer.protocol == b"h2" {
                    return answer_all(peer);
                }
                // The test may have ended.
                let _ = hand_over.send(Accepted { peer, head });
            });
        }
    });
    accepted
}

/// An apiserver that has begun to listen: it answers so many connections with that status, whatever they ask, and is ready after
/// that, with this ConfigMap of what it believes.
pub fn serve_rules(pki: &Pki, listen: SocketAddr, status: &'static str, until: usize, map: &'static str) {
    let listener = TcpListener::bind(listen).expect("a free port in a namespace of its own");
    let config = Arc::new(server_config(pki).expect("the apiserver's certificates"));
    thread::spawn(move || {
        let mut looks = 0;
        for socket in listener.incoming() {
            let tls = ServerConnection::new(Arc::clone(&config)).expect("a session");
            let Ok(mut peer) = Peer::accept(tls, socket.expect("a connection")) else {
                continue;
            };
            looks += 1;
            let knows = looks > until;
            thread::spawn(move || {
                loop {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        let Ok(octet) = peer.try_read(1) else { return };
                        head.extend(octet);
                    }
                    let (status, body) = match (knows, head.starts_with(b"GET /readyz ")) {
                        (false, _) => (status, "not yet"),
                        (true, true) => ("200 OK", "ok"),
                        (true, false) => ("200 OK", map),
                    };
                    let length = body.len();
                    let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{body}");
                    if peer.try_send(answer.as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

/// Answers every request with 200, and says whether it came by the relay, until the connection ends.
fn answer_all(mut peer: Peer) {
    if peer.try_read(PREFACE.len()).is_err() {
        return;
    }
    let begun = [frame(kind::SETTINGS, 0, 0, &[]), frame(kind::SETTINGS, 1, 0, &[])].concat();
    let mut sent = peer.try_send(&begun);
    while let (Ok(()), Ok(Some(got))) = (&sent, peer.try_next()) {
        sent = match got.kind {
            kind::HEADERS => {
                let relayed = fields(&got.payload).iter().any(|(name, _)| name == "x-forwarded-for");
                let answer = block(&[(":status", "200"), ("via", if relayed { VIA_RELAY } else { "nobody" })]);
                peer.try_send(&frame(kind::HEADERS, END_STREAM | END_HEADERS, got.stream, &answer))
            }
            kind::PING if got.flags == 0 => peer.try_send(&frame(kind::PING, 1, 0, &got.payload)),
            _ => Ok(()),
        };
    }
}

fn server_config(pki: &Pki) -> anyhow::Result<ServerConfig> {
    let mut roots = RootCertStore::empty();
    for name in ["ca.crt", "front-proxy-ca.crt"] {
        for certificate in CertificateDer::pem_file_iter(pki.file(name))? {
            roots.add(certificate?)?;
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            CertificateDer::pem_file_iter(pki.file("apiserver.crt"))?.collect::<Result<Vec<_>, _>>()?,
            PrivateKeyDer::from_pem_file(pki.file("apiserver.key"))?,
        )?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}
