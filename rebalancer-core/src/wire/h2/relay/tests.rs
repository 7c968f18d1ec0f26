//! Both sides are scripted: a client that compresses as clients do, a server that decodes what arrives.

use std::{net::IpAddr, sync::Arc};

use proptest::prelude::*;

use super::*;
use crate::wire::h2::{
    frame::{MAX_STREAM_ID, PREFACE},
    hpack::{self, Decoder},
};

mod blocks;
mod bounds;
mod flows;
mod leaving;

const PING: [u8; 8] = *b"rebalnce";

fn settings() -> Settings {
    let policy = Policy::new(Arc::default(), IpAddr::from([192, 0, 2, 7]))
        .with_identity([("x-remote-user".into(), "alice".to_owned())]);
    Settings {
        policy,
        max_header_bytes: 4096,
        ping: PING,
        watch_handover: false,
    }
}

fn relay() -> Relay {
    Relay::new(settings())
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    FrameHeader {
        length: payload.len() as u32,
        kind,
        flags,
        stream,
    }
    .write(&mut out);
    out.extend_from_slice(payload);
    out
}

fn frames(mut bytes: &[u8]) -> Vec<(FrameHeader, Vec<u8>)> {
    let mut found = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk() {
        let header = FrameHeader::parse(head);
        let (payload, rest) = rest.split_at(header.length as usize);
        found.push((header, payload.to_vec()));
        bytes = rest;
    }
    assert!(bytes.is_empty(), "a frame is cut: {bytes:?}");
    found
}

/// `:path: …`, indexed, then `accept: json`, indexed: a later block may refer to them as 63 and 62.
fn first_block(path: &str) -> Vec<u8> {
    let mut block = vec![0x82, 0x87, 0x44, path.len() as u8];
    block.extend_from_slice(path.as_bytes());
    block.extend_from_slice(&[0x53, 4]);
    block.extend_from_slice(b"json");
    block
}

/// The same request again, by reference alone.
const AGAIN: [u8; 4] = [0x82, 0x87, 0xbf, 0xbe];

fn started() -> (Relay, Output) {
    let mut relay = relay();
    let mut out = Output::default();
    let settings = frame(kind::SETTINGS, 0, 0, &[]);
    relay
        .client_bytes(&[&PREFACE[..], &settings].concat(), &mut out)
        .expect("a preface");
    relay.server_bytes(&settings, &mut out).expect("settings");
    out.to_client.clear();
    assert_eq!(out.to_server, [&PREFACE[..], &settings].concat());
    out.to_server.clear();
    (relay, out)
}

fn request(stream: u32, block: &[u8]) -> Vec<u8> {
    frame(kind::HEADERS, flag::END_STREAM | flag::END_HEADERS, stream, block)
}

/// What the server reads: stream, and the fields after the pseudo-headers.
fn decoded(to_server: &[u8], server: &mut Decoder) -> Vec<(u32, Vec<(String, String)>)> {
    let text = |octets: &[u8]| String::from_utf8(octets.to_vec()).expect("ASCII");
    frames(to_server)
        .into_iter()
        .filter(|(header, _)| header.kind == kind::HEADERS)
        .map(|(header, block)| {
            let list: FieldList = server.decode(&block, 1 << 16).expect("the server can read it");
            let fields = list.iter().map(|(name, value)| (text(name), text(value)));
            (
                header.stream,
                fields
                    .filter(|(name, _)| name != ":method" && name != ":scheme")
                    .collect(),
            )
        })
        .collect()
}

fn pairs(fields: &[(&str, &str)]) -> Vec<(String, String)> {
    fields
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

/// What the client is told on each stream: the kind of frame, and the code of a reset.
fn told(out: &mut Output) -> Vec<(u8, u32, u32)> {
    frames(&std::mem::take(&mut out.to_client))
        .into_iter()
        .map(|(header, payload)| {
            let word = payload.first_chunk().map_or(0, |octets| u32::from_be_bytes(*octets));
            (header.kind, header.stream, word)
        })
        .collect()
}

#[test]
fn an_early_answer_and_its_reset_are_written_apart() {
    let (mut relay, mut out) = started();
    let open = |stream| frame(kind::HEADERS, flag::END_HEADERS, stream, &[0x83, 0x87, 0x84]);
    let both = [open(1), open(3)].concat();
    relay.client_bytes(&both, &mut out).expect("requests");
    let reset = |stream| frame(kind::RST_STREAM, 0, stream, &[0; 4]);
    relay
        .server_bytes(&reset(1), &mut out)
        .expect("a reset without an answer");
    assert_eq!(out.cut, None);
    let answer = frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, 3, &[0x88]);
    relay
        .server_bytes(&[&answer[..], &reset(3)].concat(), &mut out)
        .expect("an early answer");
    assert_eq!(out.cut, Some(reset(1).len() + answer.len()));
}

#[test]
fn refusals_for_overload_are_counted_and_every_answer_passes_as_it_came() {
    let (mut relay, mut out) = started();
    let three = [request(1, &first_block("/a")), request(3, &AGAIN), request(5, &AGAIN)];
    relay.client_bytes(&three.concat(), &mut out).expect("requests");
    // `:status: 429` and `retry-after: 1` with indexing, then both by reference, then an answer that is none.
    let refusal = [&[0x48, 3][..], b"429", &[0x75, 1], b"1"].concat();
    let last = flag::END_HEADERS | flag::END_STREAM;
    let answers = [
        frame(kind::HEADERS, last, 1, &refusal),
        frame(kind::HEADERS, last, 3, &[0xbf, 0xbe]),
        frame(kind::HEADERS, last, 5, &[0x88]),
    ]
    .concat();
    for octet in &answers {
        relay.server_bytes(&[*octet], &mut out).expect("answers");
    }
    assert_eq!(relay.take_refused(), 2);
    assert_eq!(out.to_client, answers);
}

fn any_frames() -> impl Strategy<Value = Vec<u8>> {
    let block = prop_oneof![
        Just(first_block("/api/v1/a?watch=1")),
        Just(vec![0x82, 0x87, 0x84]),
        prop::collection::vec(any::<u8>(), 0..64)
    ];
    let any_frame = prop_oneof![
        (0_u32..9, block).prop_map(|(stream, block)| request(stream * 2 + 1, &block)),
        (
            0_u8..12,
            any::<u8>(),
            0_u32..9,
            prop::collection::vec(any::<u8>(), 0..64)
        )
            .prop_map(|(kind, flags, stream, payload)| frame(kind, flags, stream, &payload)),
    ];
    prop::collection::vec(any_frame, 0..24).prop_map(|all| all.concat())
}

proptest! {
    #[test]
    fn how_bytes_are_cut_changes_nothing(
        client in any_frames(),
        server in any_frames(),
        cut in 1_usize..40,
        goaway in any::<bool>(),
    ) {
        let run = |cut: usize| {
            let (mut relay, mut out) = started();
            if goaway {
                relay.go_away(&mut out);
            }
            let fault = client.chunks(cut).find_map(|part| relay.client_bytes(part, &mut out).err());
            // A few frames of 64 octets never fill it.
            assert!(out.has_room_for_client());
            let server_fault = server.chunks(cut).find_map(|part| relay.server_bytes(part, &mut out).err());
            (fault, server_fault, out.to_client, out.to_server, relay.requests(), relay.open_streams())
        };
        let whole = run(usize::MAX);
        let parts = run(cut);
        prop_assert_eq!(whole, parts);
    }

    #[test]
    fn any_bytes_are_survived(client in prop::collection::vec(any::<u8>(), 0..600), server in prop::collection::vec(any::<u8>(), 0..600)) {
        let (mut relay, mut out) = started();
        let _ = relay.client_bytes(&client, &mut out);
        let _ = relay.server_bytes(&server, &mut out);
        relay.go_away(&mut out);
        let _ = relay.client_bytes(&client, &mut out);
        prop_assert!(relay.open_streams() as usize <= Streams::LIMIT);
    }
}
