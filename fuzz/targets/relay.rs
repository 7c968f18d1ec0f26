//! Both sides of one relayed connection say anything, in any pieces, while it is told to go and to hand watches over.
//!
//! Rules: what the server is sent can be decoded by a server; every request carries the relay's identity and no other;
//! how octets are cut changes nothing; the books and the output stay bounded.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rebalancer_core::h2::{
    frame::{FrameHeader, HEADER_LEN, PREFACE, flag, kind},
    hpack::{self, Decoder},
    relay::{Output, Relay, Settings},
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
}

/// Reads acts: raw octets, whole frames, and the two orders.
fn acts(mut data: &[u8]) -> Vec<Act> {
    let mut acts = Vec::new();
    while let [tag, length, rest @ ..] = data {
        let (body, after) = rest.split_at(usize::from(*length).min(rest.len()));
        data = after;
        acts.push(match tag % 8 {
            0 => Act::Client(body.to_vec()),
            1 => Act::Server(body.to_vec()),
            2..=4 => Act::Client(framed(body)),
            5 => Act::Server(framed(body)),
            6 => Act::GoAway,
            _ => Act::HandOver(u32::from(*length)),
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
    let mut identity = Vec::new();
    hpack::write_literal(b"x-remote-user", USER, &mut identity);
    let mut relay = Relay::new(Settings {
        identity,
        unless_authorized: Vec::new(),
        forwarded_for: "192.0.2.7".into(),
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

/// Plays the acts with octets cut into pieces; what came out, whether it ended in a fault, and what was counted.
fn play(acts: &[Act], watch_handover: bool, cut: usize) -> (Vec<u8>, Vec<u8>, bool, [u64; 2]) {
    let (mut relay, mut out) = started(watch_handover);
    let mut fault = false;
    for act in acts {
        let result = match act {
            Act::Client(octets) => octets
                .chunks(cut)
                .try_for_each(|part| relay.client_bytes(part, &mut out)),
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
        };
        assert!(relay.open_streams() <= 4096);
        assert!(relay.open_watches() <= relay.open_streams());
        if let Err(error) = result {
            relay.fail(error, &mut out);
            fault = true;
            break;
        }
    }
    (out.to_client, out.to_server, fault, [relay.requests(), relay.take_refused()])
}

/// Reads what the server was sent as a server does.
fn check_requests(to_server: &[u8]) {
    let mut rest = to_server.strip_prefix(&PREFACE[..]).expect("the preface comes first");
    let mut decoder = Decoder::default();
    // The relay lets a client use as large a table as the server allows: 64 KiB at most.
    decoder.allow(65_536);
    let mut highest = 0;
    let mut block: Option<(u32, Vec<u8>)> = None;
    while let Some((head, after)) = rest.split_first_chunk::<HEADER_LEN>() {
        let header = FrameHeader::parse(head);
        let Some((payload, after)) = after.split_at_checked(header.length as usize) else {
            return;
        };
        rest = after;
        match header.kind {
            kind::HEADERS => {
                assert!(block.is_none(), "HEADERS inside a block");
                let skip = if header.has(flag::PRIORITY) { 5 } else { 0 };
                block = Some((header.stream, payload[skip..].to_vec()));
            }
            kind::CONTINUATION => {
                let (stream, octets) = block.as_mut().expect("CONTINUATION follows HEADERS");
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
        let (stream, octets) = block.take().expect("a block has begun");
        let list = decoder.decode(&octets, 1 << 20).expect("the server can decode it");
        let named = |name: &'static [u8]| list.iter().filter(move |field| field.0.eq_ignore_ascii_case(name));
        let users: Vec<&[u8]> = named(b"x-remote-user").map(|(_, value)| value).collect();
        if stream > highest {
            highest = stream;
            assert_eq!(users, [USER], "a request is the relay's client's");
            assert_eq!(named(b"x-forwarded-for").count(), 1);
        } else {
            assert!(users.is_empty(), "trailers name nobody");
        }
        let others = list
            .iter()
            .filter(|(name, _)| name.to_ascii_lowercase().starts_with(b"x-remote-"));
        assert_eq!(others.count(), users.len(), "no other identity passes");
    }
}

fuzz_target!(|data: &[u8]| {
    let [settings, cut, data @ ..] = data else { return };
    let acts = acts(data);
    let watch_handover = settings & 1 != 0;
    let whole = play(&acts, watch_handover, usize::MAX);
    let parts = play(&acts, watch_handover, usize::from(*cut).max(1));
    assert_eq!(whole, parts, "how octets are cut changes nothing");
    check_requests(&whole.1);
    let came: usize = acts
        .iter()
        .map(|act| match act {
            Act::Client(octets) | Act::Server(octets) => octets.len(),
            Act::GoAway | Act::HandOver(_) => 64,
        })
        .sum();
    // A block of one octet may stand for a whole list.
    let most = came * 16 + (whole.3[0] as usize + acts.len() + 1) * (2 * MAX_HEADER_BYTES);
    assert!(whole.0.len() + whole.1.len() <= most + 1024);
});
