//! Watches that are handed over while they still tell what exists: whoever resumes hears of everything.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    time::{Duration, Instant},
};

use rebalancer_tests::{
    h2wire::{END_HEADERS, END_STREAM, Peer, block, frame, kind},
    pki::SERVER_NAME,
    process::wait_for,
};
use serde_json::json;

use crate::{
    PATIENCE, World,
    world::{control, start_relay_with},
};

const OBJECTS: usize = 150;

/// What a slow reader takes at a time.
const MOUTHFUL: u32 = 2048;

/// Longer than a hand-over takes to begin (pacing), after the last GOAWAY.
const HANDED_OVER: Duration = Duration::from_secs(4);

fn name(index: usize) -> String {
    format!("handed-{index:03}")
}

/// A watch of the objects over a connection of its own.
struct Reader {
    peer: Peer,
    seen: BTreeSet<usize>,
    /// The octets behind the last whole name.
    text: Vec<u8>,
    ended: bool,
}

impl Reader {
    fn start(world: &World, relay: SocketAddr, query: &str, accept: &str) -> Self {
        let admin = world.pki.pair("admin");
        let mut peer = Peer::connect(&world.pki, relay, Some(&admin), b"h2").expect("a handshake");
        // SETTINGS_INITIAL_WINDOW_SIZE.
        let settings = [&[0, 4][..], &MOUTHFUL.to_be_bytes()].concat();
        peer.begin_client(&settings);
        let path = format!("/api/v1/namespaces/handover/configmaps?watch=true{query}");
        let fields = [
            (":method", "GET"),
            (":scheme", "https"),
            (":authority", SERVER_NAME),
            (":path", &path),
            ("accept", accept),
        ];
        peer.send(&frame(kind::HEADERS, END_STREAM | END_HEADERS, 1, &block(&fields)));
        Self {
            peer,
            seen: BTreeSet::new(),
            text: Vec::new(),
            ended: false,
        }
    }

    /// Reads for that long, or until it has ended.
    fn read(&mut self, time: Duration) {
        let until = Instant::now() + time;
        self.peer.impatient(Duration::from_millis(100));
        while !self.ended && Instant::now() < until {
            let Ok(Some(got)) = self.peer.try_next() else { continue };
            match got.kind {
                kind::SETTINGS if got.flags == 0 => self.peer.send(&frame(kind::SETTINGS, 1, 0, &[])),
                kind::PING if got.flags == 0 => self.peer.send(&frame(kind::PING, 1, 0, &got.payload)),
                kind::DATA => {
                    self.text.extend_from_slice(&got.payload);
                    self.ended = got.flags & END_STREAM != 0;
                }
                kind::RST_STREAM => panic!("the watch is reset"),
                _ => {}
            }
        }
        // A name may come in two pieces: the next look begins before it.
        let text = String::from_utf8_lossy(&self.text).into_owned();
        self.seen
            .extend((0..OBJECTS).filter(|index| text.contains(&name(*index))));
        let kept = self.text.len().saturating_sub(name(0).len());
        self.text.drain(..kept);
    }

    /// Is let have a little more.
    fn goes_on(&mut self) {
        let more = MOUTHFUL.to_be_bytes();
        self.peer.send(
            &[
                frame(kind::WINDOW_UPDATE, 0, 0, &more),
                frame(kind::WINDOW_UPDATE, 0, 1, &more),
            ]
            .concat(),
        );
    }
}

fn go_away(socket: &Path, client: SocketAddr) {
    let id = wait_for(PATIENCE, || {
        let all = control(socket, "GET /v1/connections", "");
        let all = all["connections"].as_array().expect("a list").clone();
        let own = all.into_iter().find(|one| one["client"] == client.to_string())?;
        Some(own["id"].as_str().expect("an id").to_owned())
    });
    let id = id.expect("the relay lists its client");
    let order = format!(r#"{{"generation": 1, "expires_in_ms": 10000, "victims": ["{id}"]}}"#);
    let answer = control(socket, "POST /v1/goaway", &order);
    assert_eq!(answer["results"][0]["result"], "sent", "{answer}");
}

#[test]
fn a_watch_that_tells_what_exists_is_left_alone_until_that_is_over() {
    let Some(world) = World::get() else { return };
    let admin = world.admin();
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "handover"}});
    admin.make("/api/v1/namespaces", &namespace).expect("a namespace");
    // The first by name is the last by version, and each says what ends the initial events.
    for index in (0..OBJECTS).rev() {
        let object = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name(index)},
            "data": {"forged": "{\"type\":\"BOOKMARK\",\"k8s.io/initial-events-end\":\"true\"}"},
        });
        let path = "/api/v1/namespaces/handover/configmaps";
        admin.make(path, &object).expect("an object");
    }
    let relay = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 6447);
    let socket = world.logs.join("watches.sock");
    let flags = ["--watch-handover=0s"];
    let _relay =
        start_relay_with("relay-of-watches", relay, &socket, &world.pki, &world.logs, &flags).expect("a relay");
    wait_for(PATIENCE, || std::net::TcpStream::connect(relay).ok().map(drop)).expect("it listens");

    let marked = "&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let protobuf = "application/vnd.kubernetes.protobuf;stream=watch";
    for (round, (query, accept, hands_over)) in [
        ("", "application/json", false),
        ("&resourceVersion=0", protobuf, false),
        (marked, "application/json", true),
        (marked, protobuf, true),
    ]
    .into_iter()
    .enumerate()
    {
        let mut reader = Reader::start(world, relay, query, accept);
        reader.read(Duration::from_secs(1));
        assert!(
            !reader.seen.is_empty() && reader.seen.len() < OBJECTS,
            "it stands in the middle"
        );
        go_away(&socket, reader.peer.local());
        reader.read(HANDED_OVER);
        let slow = Instant::now();
        while reader.seen.len() < OBJECTS {
            assert!(
                !reader.ended && slow.elapsed() < PATIENCE,
                "{query} {accept}: {} of {OBJECTS}, ended: {}",
                reader.seen.len(),
                reader.ended
            );
            reader.goes_on();
            reader.read(Duration::from_millis(50));
        }
        for _ in 0..4 {
            reader.goes_on();
        }
        reader.read(HANDED_OVER);
        // Behind the marker client-go would call its watch very short, and ask for everything again.
        assert!(!reader.ended, "{query} {accept}: no event since");
        let later = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": format!("later-{round}")}});
        admin
            .make("/api/v1/namespaces/handover/configmaps", &later)
            .expect("an object");
        reader.read(HANDED_OVER);
        assert_eq!(reader.ended, hands_over, "{query} {accept}");
    }
}
