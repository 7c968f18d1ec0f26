//! The front-proxy certificate is renewed while clients are connected, and the last one ends: nobody is answered 401.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    time::{Duration, SystemTime},
};

use rebalancer_core::wire::h2::hpack::Decoder;
use rebalancer_tests::{
    h2wire::{END_STREAM, Peer, frame, kind, request},
    pki::Pki,
    process::{tail, wait_for},
};

use crate::{PATIENCE, World, world::start_relay_with};

/// How long the first certificate is good for.
const BRIEF: Duration = Duration::from_secs(40);

/// A client of HTTP/2 that stays on its connection until it is told to go.
struct Client<'w> {
    world: &'w World,
    relay: SocketAddr,
    peer: Peer,
    answers: Decoder,
    stream: u32,
    connections: u32,
}

impl<'w> Client<'w> {
    fn new(world: &'w World, relay: SocketAddr) -> Self {
        Self {
            world,
            relay,
            peer: connect(world, relay, b"h2"),
            answers: Decoder::default(),
            stream: 1,
            connections: 1,
        }
    }

    fn asks(&mut self) -> String {
        self.peer.send(&request(self.stream, "/livez"));
        let mut status = String::new();
        let mut told = false;
        loop {
            let got = self.peer.receive();
            told |= got.kind == kind::GOAWAY;
            match got.kind {
                kind::SETTINGS if got.flags == 0 => self.peer.send(&frame(kind::SETTINGS, 1, 0, &[])),
                kind::PING if got.flags == 0 => self.peer.send(&frame(kind::PING, 1, 0, &got.payload)),
                kind::HEADERS => {
                    let list = self.answers.decode(&got.payload, 1 << 16).expect("an answer");
                    status = String::from_utf8_lossy(list.get(b":status").expect("a status")).into_owned();
                }
                _ => {}
            }
            if got.stream == self.stream && got.flags & END_STREAM != 0 {
                break;
            }
        }
        self.stream += 2;
        if told {
            self.peer = connect(self.world, self.relay, b"h2");
            (self.answers, self.stream) = (Decoder::default(), 1);
            self.connections += 1;
        }
        status
    }
}

/// How far the certificate's renewal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Renewal {
    Due,
    Refused,
    Taken,
}

fn connect(world: &World, relay: SocketAddr, protocol: &[u8]) -> Peer {
    let admin = world.pki.pair("admin");
    let mut peer = Peer::connect(&world.pki, relay, Some(&admin), protocol).expect("a handshake");
    if protocol == b"h2" {
        peer.begin_client(&[]);
    }
    peer
}

#[test]
fn whoever_is_served_with_a_certificate_that_was_renewed_goes_before_it_ends() {
    let Some(world) = World::get() else { return };
    let relay = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 6448);
    let own = Pki::new(&[relay.ip()]).expect("certificates");
    for name in ["ca.crt", "apiserver.crt", "apiserver.key", "front-proxy-ca.crt"] {
        fs::copy(world.pki.file(name), own.file(name)).expect("a file");
    }
    let install = |stem: &str| {
        for ending in ["crt", "key"] {
            let to = own.file(&format!("front-proxy-client.{ending}"));
            fs::copy(world.pki.file(&format!("{stem}.{ending}")), to).expect("a file");
        }
    };
    let end = SystemTime::now() + BRIEF;
    world.pki.front_proxy_until("brief-proxy", end).expect("a certificate");
    install("brief-proxy");
    let control = world.logs.join("renewal.sock");
    let process = start_relay_with("relay-renewed", relay, &control, &own, &world.logs, &[]).expect("a relay");
    wait_for(PATIENCE, || TcpStream::connect(relay).ok().map(drop)).expect("it listens");
    let mut client = Client::new(world, relay);
    let mut http1 = connect(world, relay, b"http/1.1");
    // It is in the middle of an answer until the first one has ended.
    let mut watch = connect(world, relay, b"http/1.1");
    watch.send(
        b"GET /api/v1/namespaces/default/configmaps?watch=1&timeoutSeconds=42 HTTP/1.1\r\nHost: kubernetes\r\n\r\n",
    );
    let mut renewal = Renewal::Due;
    // Some seconds beyond the end of the first one.
    while SystemTime::now() < end + Duration::from_secs(3) {
        let h2 = client.asks();
        http1.send(b"GET /livez HTTP/1.1\r\nHost: kubernetes\r\n\r\n");
        let head = http1.read_head();
        http1.read(2);
        let told = head.to_ascii_lowercase().contains("connection: close");
        assert!(!told, "it need not go:\n{}", tail(&process.log()));
        let both = [h2.as_str(), head.split(' ').nth(1).expect("a status")];
        assert_eq!(both, ["200"; 2], "{}", tail(&process.log()));
        if renewal == Renewal::Due {
            // Before the apiserver believes who signed it: that closes no port, and nobody is told to go for it.
            world.pki.stranger("strange-proxy", |_| {}).expect("a certificate");
            install("strange-proxy");
            renewal = Renewal::Refused;
        } else if renewal == Renewal::Refused && process.log().contains("does not take the new --proxy-client-cert") {
            world
                .pki
                .front_proxy_until("long-proxy", end + Duration::from_secs(86_400))
                .expect("a certificate");
            install("long-proxy");
            renewal = Renewal::Taken;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(renewal, Renewal::Taken, "{}", tail(&process.log()));
    assert!(watch.read_head().contains(" 200 "), "a watch");
    let (mut seen, last) = (Vec::new(), b"0\r\n\r\n");
    while !seen.ends_with(last) {
        seen.extend(watch.read(1));
    }
    assert!(SystemTime::now() > end, "it ended before the certificate did");
    watch.send(b"GET /livez HTTP/1.1\r\nHost: kubernetes\r\n\r\n");
    let head = watch.read_head();
    assert!(head.contains(" 200 "), "the request after a watch: {head}");
    assert_eq!(client.connections, 2, "told once:\n{}", tail(&process.log()));
}
