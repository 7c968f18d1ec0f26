//! Both sides of one relayed connection say anything, in any pieces, while it is told to go and to hand watches over.
//!
//! Rules: what the server is sent can be decoded by a server; whatever a server could take for a request carries the
//! relay's identity and no other, and comes once on its stream; how octets are cut changes nothing; the books and the
//! output stay bounded.
#![no_main]

use std::net::IpAddr;

use libfuzzer_sys::fuzz_target;
use rebalancer_core::wire::{
    h2::{
        error::ConnectionError,
        frame::{FrameHeader, HEADER_LEN, PREFACE, flag, kind},
        hpack::{Decoder, FieldList},
        relay::{HIGH_WATER, Output, Relay, Settings},
    },
    rewrite::Policy,
};

const PING: [u8; 8] = *b"rebalnce";
const MAX_HEADER_BYTES: usize = 4096;
const USER: &[u8] = b"alice";

/// One thing that happens.
enum Act {
    Client(Vec<u8>),
    Server(Vec<u8>),
    GoAway,
    HandOver(u32),
    Withdraw,
}

/// Reads acts: raw octets, whole frames, and the two orders.
fn acts(mut data: &[u8]) -> Vec<Act> {
    let mut acts = Vec::new();
    while let [tag, length, rest @ ..] = data {
        let (body, after) = rest.split_at(usize::from(*length).min(rest.len()));
        data = after;
        acts.push(match tag % 16 {
            0 => Act::Client(body.to_vec()),
            1 => Act::Server(body.to_vec()),
            2..=4 | 8..=11 => Act::Client(framed(body)),
            5 | 12..=14 => Act::Server(framed(body)),
            6 => Act::GoAway,
            7 => Act::HandOver(u32::from(*length)),
            _ => Act::Withdraw,
        });
    }
    acts
}

/// A frame with a plausible header: kind, flags, stream, then its payload. PINGs may be answers to the relay's own.
fn framed(body: &[u8]) -> Vec<u8> {
    let [kind_octet, flags, stream, payload @ ..] = body else {
        return Vec::new();
    };
    let is_answer = kind_octet % 12 == kind::PING && flags & flag::ACK != 0;
    let payload = if is_answer { &PING[..] } else { payload };
    let mut octets = Vec::new();
    FrameHeader {
        length: payload.len() as u32,
        kind: kind_octet % 12,
        flags: *flags,
        stream: u32::from(*stream % 16),
    }
    .write(&mut octets);
    octets.extend_from_slice(payload);
    octets
}

fn started(watch_handover: bool) -> (Relay, Output) {
    let policy = Policy::new(Default::default(), IpAddr::from([192, 0, 2, 7]))
        .with_identity([("x-remote-user".into(), String::from_utf8_lossy(USER).into_owned())]);
    let mut relay = Relay::new(Settings {
        policy,
        max_header_bytes: MAX_HEADER_BYTES,
        ping: PING,
        watch_handover,
    });
    let mut out = Output::default();
    let settings = [0, 0, 0, kind::SETTINGS, 0, 0, 0, 0, 0];
    relay
        .client_bytes(&[&PREFACE[..], &settings].concat(), &mut out)
        .expect("a preface");
    relay.server_bytes(&settings, &mut out).expect("SETTINGS");
    (relay, out)
}

/// Gives all octets, as there is room for what they stand for; whoever waits for them takes them all.
fn give(relay: &mut Relay, mut octets: &[u8], out: &mut Output, sent: &mut Output) -> Result<(), ConnectionError> {
    loop {
        let taken = relay.client_bytes(octets, out);
        // The room that is checked before a block, the block, and what else came with it.
        assert!(out.to_server.len() <= HIGH_WATER + MAX_HEADER_BYTES * 2 + octets.len() + 4096);
        sent.to_client.append(&mut out.to_client);
        sent.to_server.append(&mut out.to_server);
        octets = &octets[taken?..];
        if octets.is_empty() {
            return Ok(());
        }
    }
}

/// What one run came to.
#[derive(Debug, PartialEq)]
struct Played {
    to_client: Vec<u8>,
    to_server: Vec<u8>,
    fault: bool,
    figures: [u64; 2],
    user_agent: Option<String>,
}

/// Plays the acts with octets cut into pieces.
fn play(acts: &[Act], watch_handover: bool, cut: usize) -> Played {
    let (mut relay, mut out) = started(watch_handover);
    let mut sent = Output::default();
    let mut fault = false;
    for act in acts {
        let result = match act {
            Act::Client(octets) => octets
                .chunks(cut)
                .try_for_each(|part| give(&mut relay, part, &mut out, &mut sent)),
            Act::Server(octets) => octets
                .chunks(cut)
                .try_for_each(|part| relay.server_bytes(part, &mut out)),
            Act::GoAway => {
                relay.go_away(&mut out);
                Ok(())
            }
            Act::HandOver(total) => {
                relay.hand_over(*total, &mut out);
                Ok(())
            }
            Act::Withdraw => {
                relay.withdraw();
                Ok(())
            }
        };
        assert!(relay.open_streams() <= 4096);
        assert!(relay.open_watches() <= relay.open_streams());
        if let Err(error) = result {
            relay.fail(error, &mut out);
            fault = true;
            break;
        }
    }
    sent.to_client.append(&mut out.to_client);
    sent.to_server.append(&mut out.to_server);
    Played {
        to_client: sent.to_client,
        to_server: sent.to_server,
        fault,
        figures: [relay.requests(), relay.take_refused()],
        user_agent: relay.take_user_agent(),
    }
}

/// Reads what the server was sent as a server does.
fn check_requests(to_server: &[u8]) -> u64 {
    let mut rest = to_server.strip_prefix(&PREFACE[..]).expect("the preface comes first");
    let mut decoder = Decoder::default();
    let mut highest = 0;
    let mut requests = 0;
    let mut block: Option<(u32, u8, Vec<u8>)> = None;
    while let Some((head, after)) = rest.split_first_chunk::<HEADER_LEN>() {
        let header = FrameHeader::parse(head);
        let Some((payload, after)) = after.split_at_checked(header.length as usize) else {
            return requests;
        };
        rest = after;
        match header.kind {
            kind::HEADERS => {
                assert!(block.is_none(), "HEADERS inside a block");
                let skip = if header.has(flag::PRIORITY) { 5 } else { 0 };
                block = Some((header.stream, header.flags, payload[skip..].to_vec()));
            }
            kind::CONTINUATION => {
                let (stream, _, octets) = block.as_mut().expect("CONTINUATION follows HEADERS");
                assert_eq!(*stream, header.stream);
                octets.extend_from_slice(payload);
            }
            _ => {
                assert!(block.is_none(), "another frame inside a block");
                continue;
            }
        }
        if !header.has(flag::END_HEADERS) {
            continue;
        }
        let (stream, header_flags, octets) = block.take().expect("a block has begun");
        let list = decoder.decode(&octets, 1 << 20).expect("the server can decode it");
        let named = |name: &'static [u8]| list.iter().filter(move |field| field.0.eq_ignore_ascii_case(name));
        let users: Vec<&[u8]> = named(b"x-remote-user").map(|(_, value)| value).collect();
        let names = || list.iter().map(|(name, _)| name);
        assert!(
            names().all(|name| !name.is_empty() && !name.iter().any(u8::is_ascii_uppercase)),
            "no server resets it and forgets it for its names"
        );
        assert!(
            list.iter()
                .all(|(_, value)| !value.iter().any(|octet| octet.is_ascii_control() && *octet != b'\t'))
        );
        if names().any(|name| name.starts_with(b":")) {
            assert!(stream > highest, "a request comes on a new stream");
            highest = stream;
            requests += 1;
            assert_eq!(users, [USER], "a request is the relay's client's");
            assert_eq!(named(b"x-forwarded-for").count(), 1);
            for pseudo in [&b":method"[..], b":scheme", b":path"] {
                let count = named_exactly(&list, pseudo);
                assert!(
                    count == 1 || count == 0 && named_exactly(&list, b":authority") == 1,
                    "{list:?}"
                );
            }
        } else {
            assert!(stream <= highest, "trailers follow a request");
            assert_eq!(
                header_flags & flag::END_STREAM,
                flag::END_STREAM,
                "trailers end their stream"
            );
            assert!(users.is_empty(), "trailers name nobody");
            assert_eq!(named(b"x-forwarded-for").count(), 0);
        }
        let others = list
            .iter()
            .filter(|(name, _)| name.to_ascii_lowercase().starts_with(b"x-remote-"));
        assert_eq!(others.count(), users.len(), "no other identity passes");
    }
    requests
}

fn named_exactly(list: &FieldList, name: &[u8]) -> usize {
    list.iter().filter(|field| field.0 == name).count()
}

fuzz_target!(|data: &[u8]| {
    let [settings, cut, data @ ..] = data else { return };
    let acts = acts(data);
    let watch_handover = settings & 1 != 0;
    let whole = play(&acts, watch_handover, usize::MAX);
    let parts = play(&acts, watch_handover, usize::from(*cut).max(1));
    assert_eq!(whole, parts, "how octets are cut changes nothing");
    assert_eq!(
        check_requests(&whole.to_server),
        whole.figures[0],
        "the books are what was sent"
    );
    let came: usize = acts
        .iter()
        .map(|act| match act {
            Act::Client(octets) | Act::Server(octets) => octets.len(),
            Act::GoAway | Act::HandOver(_) | Act::Withdraw => 64,
        })
        .sum();
    // Eight octets for one, what a connection may run up, what the relay adds to a request, and its answers to frames.
    let most = came * 10 + 65_536 + whole.figures[0] as usize * 128;
    assert!(whole.to_client.len() + whole.to_server.len() <= most + 1024);
});
