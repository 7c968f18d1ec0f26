//! The same octets to kube-apiserver directly and through the relay, by the hundred: whatever Go serves carries the
//! client's identity and address, and nothing is served that Go refuses.
//!
//! The oracle is kube-apiserver's own audit log. Octets are drawn from a seed: headers that are forged, malformed, split,
//! repeated on used streams or sent as trailers, in any order, between other frames.

use std::{collections::BTreeMap, fs, net::SocketAddr};

use rebalancer_tests::{
    h2wire::{END_HEADERS, END_STREAM, PREFACE, Peer, block, frame, get, kind},
    pki::{Pair, SERVER_NAME},
    process::wait_for,
};

use crate::{PATIENCE, world::World};

/// How many connections of each kind.
const CASES: u64 = 300;

/// Draws from a seed (xorshift): the same cases in every run.
struct Draw(u64);

impl Draw {
    fn below(&mut self, count: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % count
    }
}

/// What one connection sends.
struct Script {
    /// Each header block's frames.
    blocks: Vec<Vec<u8>>,
    /// All of it.
    octets: Vec<u8>,
    /// Whether any stream is reset: what a server has served of one by then is a matter of time.
    resets: bool,
}

fn begun() -> Vec<u8> {
    [PREFACE, &frame(kind::SETTINGS, 0, 0, &[])].concat()
}

/// The script of a case; every request's path begins with `prefix`.
fn script(case: u64, prefix: &str) -> Script {
    let mut draw = Draw(case.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut out = begun();
    let mut blocks = Vec::new();
    let mut resets = false;
    let mut highest = 1;
    for number in 0..2 + draw.below(6) {
        // Mostly a new stream, else one that was used or passed over.
        let stream = if draw.below(3) > 0 {
            highest += 2 * (1 + draw.below(2) as u32);
            highest
        } else {
            1 + 2 * draw.below(highest as usize / 2 + 1) as u32
        };
        let path = format!("{prefix}/{number}");
        let mut list = match draw.below(5) {
            // Trailers, or a request without its pseudo-headers.
            0 => Vec::new(),
            _ => get(&path),
        };
        for _ in 0..draw.below(4) {
            let (name, value) = [
                ("x-remote-user", "root"),
                ("x-remote-group", "system:masters"),
                ("x-forwarded-for", "10.9.9.9"),
                ("accept", "application/json"),
                ("authorization", "Bearer nobody-knows-this"),
                ("X-Remote-User", "root"),
                ("Bad-Name", "x"),
                ("x-control", "a\u{1}b"),
                ("x-line", "a\r\nx-remote-user: root"),
                ("", "x"),
                ("te", "trailers"),
                ("connection", "x-remote-user"),
                (":path", "/twice"),
                (":status", "200"),
                (":unknown", "x"),
                ("content-length", "3"),
                ("trailer", "x-remote-user"),
                ("host", SERVER_NAME),
            ][draw.below(18)];
            list.extend(block(&[(name, value)]));
        }
        if draw.below(4) == 0 {
            // Into the client's table, and named twice from there: index 62 is the newest (RFC 7541, section 2.3.3).
            list.extend([0x40, 13]);
            list.extend(b"x-remote-user");
            list.extend([4]);
            list.extend(b"root");
            list.extend([0xbe, 0xbe]);
        }
        let ends = if draw.below(3) > 0 { END_STREAM } else { 0 };
        let begin = out.len();
        if draw.below(4) == 0 && list.len() > 2 {
            let (front, back) = list.split_at(1 + draw.below(list.len() - 1));
            out.extend(frame(kind::HEADERS, ends, stream, front));
            out.extend(frame(kind::CONTINUATION, END_HEADERS, stream, back));
        } else {
            out.extend(frame(kind::HEADERS, ends | END_HEADERS, stream, &list));
        }
        blocks.push(out[begin..].to_vec());
        match draw.below(8) {
            0 => out.extend(frame(kind::DATA, END_STREAM, stream, b"abc")),
            1 => out.extend(frame(kind::WINDOW_UPDATE, 0, stream, &[0, 0, 0, 9])),
            2 => {
                resets = true;
                out.extend(frame(kind::RST_STREAM, 0, stream, &[0, 0, 0, 8]));
            }
            3 => out.extend(frame(kind::PRIORITY, 0, stream, &[0, 0, 0, 0, 15])),
            _ => {}
        }
    }
    Script {
        blocks,
        octets: out,
        resets,
    }
}

/// Sends it all, and hears the server out: to its answer to a PING, or to the end.
fn play(world: &World, server: SocketAddr, who: &Pair, octets: &[u8]) {
    let mut peer = Peer::connect(&world.pki, server, Some(who), b"h2").expect("a handshake");
    // A server may close before all is written.
    let _ = peer.try_send(octets);
    let _ = peer.try_send(&frame(kind::PING, 0, 0, b"question"));
    while let Some(got) = peer.try_next().expect("an answer or the end, in time") {
        let ends = got.kind == kind::GOAWAY && got.word(4) != 0;
        if ends || got.kind == kind::PING && got.payload == b"question" {
            break;
        }
    }
}

/// What the audit log says of requests under a path: user and addresses of each.
fn served(world: &World, under: &str) -> BTreeMap<String, Vec<serde_json::Value>> {
    let log = fs::read_to_string(&world.audit).expect("an audit log");
    let mut found: BTreeMap<String, Vec<serde_json::Value>> = BTreeMap::new();
    for line in log.lines() {
        // The last one may be half written.
        let Ok(event) = serde_json::from_str::<serde_json::Value>(line) else {
            continue;
        };
        let uri = event["requestURI"].as_str().unwrap_or_default().to_owned();
        if let Some(rest) = uri.strip_prefix(under) {
            found.entry(rest.to_owned()).or_default().push(event);
        }
    }
    found
}

#[test]
fn whatever_go_serves_carries_the_identity_and_nothing_it_refuses_is_served() {
    let Some(world) = World::get() else { return };
    let alice = world.pki.client("oracle", "oracle", &["dev"]).expect("a certificate");
    let mut with_resets = Vec::new();
    for case in 0..CASES {
        let direct = script(case, &format!("/oracle-d/{case}"));
        let relayed = script(case, &format!("/oracle-r/{case}"));
        assert_eq!(direct.octets.len(), relayed.octets.len());
        play(world, world.apiserver, &alice, &direct.octets);
        play(world, world.relay, &alice, &relayed.octets);
        if direct.resets {
            with_resets.push(case);
        }
    }
    log_is_complete(world, &alice, "/oracle-last/0");
    let direct = served(world, "/oracle-d/");
    let relayed = served(world, "/oracle-r/");
    assert!(
        relayed.len() > CASES as usize / 2,
        "only {} were served at all",
        relayed.len()
    );
    for (path, events) in &relayed {
        assert_eq!(events.len(), 1, "{path} was served twice");
        for event in events {
            let token = event["user"]["username"] == "system:unauthenticated";
            assert!(
                token || event["user"]["username"] == "oracle" || event["responseStatus"]["code"] == 401,
                "{path} is served as somebody else: {event}"
            );
            let addresses = event["sourceIPs"].as_array().expect("addresses");
            assert!(addresses.iter().any(|address| address == "127.0.0.1"), "{event}");
            assert_ne!(event["user"]["username"], "root", "{event}");
        }
    }
    // What is served through the relay alone: directly the connection had ended by then, since Go resets a malformed
    // request without keeping its stream in mind, and takes the client's next frame on it for one on an idle stream. The
    // request by itself must be one that Go serves.
    let case_of = |path: &str| -> u64 {
        let case = path.split('/').next().and_then(|case| case.parse().ok());
        case.expect("a case")
    };
    let alone: Vec<&String> = relayed
        .keys()
        .filter(|path| !direct.contains_key(*path) && !with_resets.contains(&case_of(path)))
        .collect();
    for path in &alone {
        let (case, number) = path.split_once('/').expect("a case and a number");
        let script = script(case.parse().expect("a case"), &format!("/oracle-s/{case}"));
        let number: usize = number.parse().expect("a number");
        play(
            world,
            world.apiserver,
            &alice,
            &[begun(), script.blocks[number].clone()].concat(),
        );
    }
    log_is_complete(world, &alice, "/oracle-last/1");
    let by_itself = served(world, "/oracle-s/");
    for path in &alone {
        assert!(by_itself.contains_key(*path), "{path} is served, and Go refuses it");
    }
    let lost: Vec<_> = direct
        .keys()
        .filter(|path| !relayed.contains_key(*path) && !with_resets.contains(&case_of(path)))
        .collect();
    println!(
        "{} requests of {CASES} connections were served directly, {} through the relay; directly refused with their \
         connection: {}; refused by the relay alone: {lost:?}",
        direct.len(),
        relayed.len(),
        alone.len()
    );
}

/// An honest request comes last, both ways: when it is in the log, the others are or never will be.
fn log_is_complete(world: &World, who: &Pair, path: &str) {
    let request = frame(kind::HEADERS, END_STREAM | END_HEADERS, 1, &get(path));
    for server in [world.apiserver, world.relay] {
        play(world, server, who, &[begun(), request.clone()].concat());
    }
    wait_for(PATIENCE, || {
        let seen = served(world, path);
        (seen.values().map(Vec::len).sum::<usize>() == 2).then_some(())
    })
    .expect("the last request is in the audit log");
}
