//! Both sides are scripted: a client that compresses as clients do, a server that decodes what arrives.

use std::{net::IpAddr, sync::Arc};

use proptest::prelude::*;

use super::*;
use crate::h2::{
    frame::{MAX_STREAM_ID, PREFACE},
    hpack::{self, Decoder},
};

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

#[test]
fn requests_pass_with_identity_and_address_and_keep_the_tables_equal() {
    let (mut relay, mut out) = started();
    let mut server = Decoder::default();
    let both = [request(1, &first_block("/api/v1/a?watch=true")), request(3, &AGAIN)].concat();
    relay.client_bytes(&both, &mut out).expect("requests");
    let expected = pairs(&[
        (":path", "/api/v1/a?watch=true"),
        ("accept", "json"),
        ("x-forwarded-for", "192.0.2.7"),
        ("x-remote-user", "alice"),
    ]);
    assert_eq!(
        decoded(&out.to_server, &mut server),
        [(1, expected.clone()), (3, expected)]
    );
    assert_eq!(
        (relay.requests(), relay.open_streams(), relay.open_watches()),
        (2, 2, 2)
    );
    let ended = frame(kind::DATA, flag::END_STREAM, 1, b"x");
    relay.server_bytes(&ended, &mut out).expect("data");
    assert_eq!(out.to_client, ended);
    assert_eq!((relay.open_streams(), relay.open_watches()), (1, 1));
}

#[test]
fn a_forged_identity_is_removed_and_later_references_still_mean_the_same() {
    let (mut relay, mut out) = started();
    let mut server = Decoder::default();
    let mut forged = first_block("/a");
    // Indexed, so that the next request could refer to it as well.
    forged.extend_from_slice(&[0x40, 13]);
    forged.extend_from_slice(b"x-remote-user");
    forged.extend_from_slice(&[4]);
    forged.extend_from_slice(b"root");
    relay.client_bytes(&request(1, &forged), &mut out).expect("a request");
    let later = [0x82, 0x87, 0xc0, 0xbf, 0xbe];
    relay.client_bytes(&request(3, &later), &mut out).expect("a request");
    let expected = pairs(&[
        (":path", "/a"),
        ("accept", "json"),
        ("x-forwarded-for", "192.0.2.7"),
        ("x-remote-user", "alice"),
    ]);
    assert_eq!(
        decoded(&out.to_server, &mut server),
        [(1, expected.clone()), (3, expected)]
    );
}

#[test]
fn a_request_without_a_token_is_given_one_and_another_keeps_its_own() {
    let mut out = Output::default();
    let mut relay = Relay::new(Settings {
        policy: Policy::new(Arc::default(), IpAddr::from([192, 0, 2, 7]))
            .with_authorization_unless_token("Bearer none"),
        ..settings()
    });
    relay.client_bytes(PREFACE, &mut out).expect("a preface");
    out.to_server.clear();
    let mut own = vec![0x82, 0x84, 0x87];
    hpack::write_literal(b"authorization", b"Bearer own", &mut own);
    let mut other = vec![0x82, 0x84, 0x87];
    hpack::write_literal(b"authorization", b"x", &mut other);
    let all = [request(1, &[0x82, 0x84, 0x87]), request(3, &own), request(5, &other)];
    relay.client_bytes(&all.concat(), &mut out).expect("requests");
    let values: Vec<_> = decoded(&out.to_server, &mut Decoder::default())
        .into_iter()
        .map(|(_, fields)| {
            let values = fields.into_iter().filter(|(name, _)| name == "authorization");
            values.map(|(_, value)| value).collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(values, [["Bearer none"], ["Bearer own"], ["Bearer none"]]);
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
fn a_malformed_request_is_reset_here_and_its_stream_is_used_up() {
    let (mut relay, mut out) = started();
    let mut server = Decoder::default();
    let mut malformed = first_block("/a");
    malformed.extend_from_slice(&[0x40, 3]);
    malformed.extend_from_slice(b"Bad");
    malformed.extend_from_slice(&[1, b'x']);
    let body = frame(kind::DATA, 0, 3, b"body");
    let window = frame(kind::WINDOW_UPDATE, 0, 3, &[0, 0, 0, 1]);
    let bad = frame(kind::HEADERS, flag::END_HEADERS, 3, &malformed);
    relay
        .client_bytes(&[&bad[..], &body, &window].concat(), &mut out)
        .expect("a stream error");
    assert!(
        out.to_server.is_empty(),
        "the server hears nothing that it could forget"
    );
    assert_eq!(
        told(&mut out),
        [
            (kind::RST_STREAM, 3, ErrorCode::ProtocolError as u32),
            (kind::WINDOW_UPDATE, 0, 4)
        ]
    );
    assert_eq!((relay.requests(), relay.open_streams()), (0, 0));
    // Later references still mean the same, although the server never saw the block they refer to.
    relay
        .client_bytes(&request(5, &[0x82, 0x87, 0xc0, 0xbf]), &mut out)
        .expect("a request");
    let expected = pairs(&[
        (":path", "/a"),
        ("accept", "json"),
        ("x-forwarded-for", "192.0.2.7"),
        ("x-remote-user", "alice"),
    ]);
    assert_eq!(
        decoded(&std::mem::take(&mut out.to_server), &mut server),
        [(5, expected)]
    );
    // The id again, as a request: for the server it would be a new one.
    let error = relay.client_bytes(&request(3, &first_block("/smuggled")), &mut out);
    assert_eq!(error.expect_err("a used stream").code, ErrorCode::ProtocolError);
    assert!(out.to_server.is_empty());
}

#[test]
fn the_highest_stream_used_up_leaves_no_request_that_could_pass_as_trailers() {
    let (mut relay, mut out) = started();
    let highest = frame(
        kind::HEADERS,
        flag::END_HEADERS,
        MAX_STREAM_ID,
        &[0x82, 0x40, 1, b'B', 1, b'x'],
    );
    relay.client_bytes(&highest, &mut out).expect("a stream error");
    relay
        .client_bytes(&request(1, &first_block("/unmarked")), &mut out)
        .expect_err("a lower stream");
    assert!(out.to_server.is_empty());
    relay.fail(ConnectionError::protocol("x"), &mut out);
    let last = told(&mut out).pop().expect("a GOAWAY");
    assert_eq!((last.0, last.2), (kind::GOAWAY, 0), "the server has served none");
}

#[test]
fn trailers_are_those_of_an_open_stream_that_end_it_and_nothing_else() {
    let open = frame(kind::HEADERS, flag::END_HEADERS, 1, &first_block("/a"));
    let trailers = |flags: u8, block: &[u8]| frame(kind::HEADERS, flag::END_HEADERS | flags, 1, block);
    let mut good = Vec::new();
    hpack::write_literal(b"grpc-status", b"0", &mut good);
    hpack::write_literal(b"x-remote-user", b"root", &mut good);
    hpack::write_literal(b"x-forwarded-for", b"10.9.9.9", &mut good);
    let (mut relay, mut out) = started();
    relay.client_bytes(&open, &mut out).expect("a request");
    relay
        .client_bytes(&trailers(flag::END_STREAM, &good), &mut out)
        .expect("trailers");
    let went = decoded(&out.to_server, &mut Decoder::default());
    assert_eq!(went[1], (1, pairs(&[("grpc-status", "0")])));

    // Another block on it: the client has ended it.
    out = Output::default();
    relay
        .client_bytes(&trailers(flag::END_STREAM, &good), &mut out)
        .expect("a stream error");
    let closed = ErrorCode::StreamClosed as u32;
    assert_eq!(told(&mut out), [(kind::RST_STREAM, 1, closed)]);
    assert_eq!(out.to_server, frame(kind::RST_STREAM, 0, 1, &closed.to_be_bytes()));
    // And another, after that: it crossed the reset.
    out = Output::default();
    relay
        .client_bytes(&trailers(flag::END_STREAM, &good), &mut out)
        .expect("late trailers");
    assert!(out.to_client.is_empty() && out.to_server.is_empty());

    let mut upper = Vec::new();
    hpack::write_literal(b"Upper", b"x", &mut upper);
    for (what, refused) in [
        ("without END_STREAM", trailers(0, &good)),
        ("a request again", trailers(flag::END_STREAM, &[0x82, 0x87, 0x84])),
        ("malformed", trailers(flag::END_STREAM, &upper)),
    ] {
        let (mut relay, mut out) = started();
        relay.client_bytes(&open, &mut out).expect("a request");
        out = Output::default();
        relay.client_bytes(&refused, &mut out).expect("a stream error");
        let code = ErrorCode::ProtocolError as u32;
        assert_eq!(told(&mut out), [(kind::RST_STREAM, 1, code)], "{what}");
        assert_eq!(
            out.to_server,
            frame(kind::RST_STREAM, 0, 1, &code.to_be_bytes()),
            "{what}"
        );
        assert_eq!(relay.open_streams(), 0, "{what}");
    }
}

#[test]
fn a_server_that_resets_a_stream_gets_neither_its_trailers_nor_a_request_in_their_place() {
    let (mut relay, mut out) = started();
    let mut server = Decoder::default();
    relay
        .client_bytes(
            &frame(kind::HEADERS, flag::END_HEADERS, 1, &first_block("/a")),
            &mut out,
        )
        .expect("a request");
    decoded(&std::mem::take(&mut out.to_server), &mut server);
    relay
        .server_bytes(&frame(kind::RST_STREAM, 0, 1, &[0, 0, 0, 1]), &mut out)
        .expect("a reset");
    let mut late = vec![0x40, 1];
    late.extend_from_slice(b"t\x01v");
    relay.client_bytes(&request(1, &late), &mut out).expect("late trailers");
    assert!(out.to_server.is_empty());
    // `t: v` is in the client's table, and not in the server's.
    relay
        .client_bytes(&request(3, &[0x82, 0x87, 0xc0, 0xbe]), &mut out)
        .expect("a request");
    let went = decoded(&std::mem::take(&mut out.to_server), &mut server);
    assert_eq!(went[0].1[..2], pairs(&[(":path", "/a"), ("t", "v")]));
    relay
        .client_bytes(&request(1, &[0x82, 0x87, 0x84]), &mut out)
        .expect_err("a request on a used stream");
    assert!(out.to_server.is_empty());
}

#[test]
fn a_withdrawn_identity_is_over_with_the_next_block() {
    let (mut relay, mut out) = started();
    relay
        .client_bytes(&request(1, &first_block("/a")), &mut out)
        .expect("a request");
    out = Output::default();
    relay.withdraw();
    relay.client_bytes(&request(3, &AGAIN), &mut out).expect("a request");
    assert!(
        out.to_server.is_empty(),
        "nothing without identity goes where identity is expected"
    );
    let answer = frames(&out.to_client);
    assert_eq!(answer.len(), 1);
    assert_eq!(
        (answer[0].0.kind, answer[0].0.stream, answer[0].0.flags),
        (kind::HEADERS, 3, 5)
    );
    let list = Decoder::default()
        .decode(&answer[0].1, 64)
        .expect("the client reads it");
    assert_eq!(list.get(b":status"), Some(&b"401"[..]));
    assert_eq!(relay.open_streams(), 1, "what is under way stays");
}

#[test]
fn the_servers_settings_bound_what_the_client_is_offered_and_what_is_sent() {
    let mut relay = relay();
    let mut out = Output::default();
    let settings = |table: u32, list: u32| {
        let (mut table, mut list) = (table.to_be_bytes().to_vec(), list.to_be_bytes().to_vec());
        table.splice(..0, [0, 1]);
        list.splice(..0, [0, 6]);
        frame(
            kind::SETTINGS,
            0,
            0,
            &[&table[..], &[0, 5, 0, 0, 0x40, 0], &list].concat(),
        )
    };
    relay.client_bytes(PREFACE, &mut out).expect("a preface");
    relay
        .server_bytes(&settings(65_536, 1 << 20), &mut out)
        .expect("SETTINGS");
    assert_eq!(out.to_client, settings(4096, 4096), "the relay's own bounds");
    out = Output::default();
    relay.server_bytes(&settings(0, 200), &mut out).expect("SETTINGS");
    assert_eq!(out.to_client, settings(0, 200));
    relay
        .client_bytes(&request(1, &first_block("/a")), &mut out)
        .expect("a request");
    assert!(out.to_server.is_empty());
    assert_eq!(
        out.to_client[settings(0, 0).len()..],
        frame(kind::HEADERS, 5, 1, b"\x08\x03431")
    );
    relay.server_bytes(&settings(0, 4096), &mut out).expect("SETTINGS");
    relay.client_bytes(&request(3, &AGAIN), &mut out).expect("a request");
    let block = &frames(&out.to_server)[0].1;
    assert_eq!(block[0], 0x20, "the table is empty from here on");
    let mut server = Decoder::default();
    server.decode(block, 4096).expect("it stands without a table");
    assert!(server.decode(&[0xbe], 4096).is_err(), "and leaves nothing in it");
}

#[test]
fn few_octets_that_stand_for_many_are_taken_as_they_find_room_and_not_for_ever() {
    let mut relay = Relay::new(Settings {
        max_header_bytes: 1 << 16,
        ..settings()
    });
    let mut out = Output::default();
    let begin = frame(kind::SETTINGS, 0, 0, &[]);
    relay
        .client_bytes(&[&PREFACE[..], &begin].concat(), &mut out)
        .expect("a preface");
    relay.server_bytes(&begin, &mut out).expect("SETTINGS");
    // A large field that the server never saw, named again and again.
    let mut first = vec![0x82, 0x87, 0x84, 0x40, 15];
    first.extend_from_slice(b"x-forwarded-for");
    first.extend_from_slice(&[0x7f, 0xa1, 0x1e]);
    first.extend_from_slice(&[b'1'; 4000]);
    relay.client_bytes(&request(1, &first), &mut out).expect("a request");
    let mut bomb = Vec::new();
    for stream in 1..1000 {
        bomb.extend(request(
            stream * 2 + 1,
            &[&[0x82, 0x87, 0x84][..], &[0xbe; 12]].concat(),
        ));
    }
    let mut rest = &bomb[..];
    let mut went = 0;
    let error = loop {
        out.to_server.clear();
        match relay.client_bytes(rest, &mut out) {
            Ok(taken) => rest = &rest[taken..],
            Err(error) => break error,
        }
        assert!(
            out.to_server.len() <= HIGH_WATER + (1 << 16) + 1024,
            "{}",
            out.to_server.len()
        );
        assert!(!rest.is_empty(), "it was taken whole");
        went += out.to_server.len();
    };
    assert_eq!(error.code, ErrorCode::EnhanceYourCalm);
    let came = bomb.len() - rest.len();
    assert!(went <= came * 8 + 3 * 65_536, "{came} octets became {went}");
}

#[test]
fn a_user_agent_is_told_once_and_cut() {
    let (mut relay, mut out) = started();
    relay
        .client_bytes(&request(1, &first_block("/a")), &mut out)
        .expect("a request");
    assert_eq!(relay.take_user_agent(), None);
    let with = |agent: &[u8]| {
        let mut block = vec![0x82, 0x87, 0x84];
        hpack::write_literal(b"user-agent", agent, &mut block);
        block
    };
    relay
        .client_bytes(&request(3, &with(&[b'a'; 1000])), &mut out)
        .expect("a request");
    assert_eq!(relay.take_user_agent(), Some("a".repeat(256)));
    relay
        .client_bytes(&request(5, &with(b"another")), &mut out)
        .expect("a request");
    assert_eq!(relay.take_user_agent(), None, "the first is kept");
}

#[test]
fn a_goaway_of_the_servers_between_the_relays_two_is_not_raised() {
    let goaway = |last: u32| frame(kind::GOAWAY, 0, 0, &[last.to_be_bytes(), [0; 4]].concat());
    let (mut relay, mut out) = started();
    let both = [request(1, &first_block("/a")), request(3, &AGAIN)].concat();
    relay.client_bytes(&both, &mut out).expect("requests");
    relay.go_away(&mut out);
    relay.server_bytes(&goaway(1), &mut out).expect("a GOAWAY");
    out = Output::default();
    relay
        .client_bytes(&frame(kind::PING, flag::ACK, 0, &PING), &mut out)
        .expect("a PONG");
    assert_eq!(told(&mut out), [(kind::GOAWAY, 0, 1)]);
    assert_eq!(relay.drain(), Drain::Final { last: 1 });
    relay
        .server_bytes(&frame(kind::DATA, flag::END_STREAM, 1, b""), &mut out)
        .expect("an answer");
    assert!(relay.is_finished(), "stream 3 was given up by everybody");

    let (mut relay, mut out) = started();
    relay.client_bytes(&both, &mut out).expect("requests");
    relay.server_bytes(&goaway(1), &mut out).expect("a GOAWAY");
    out = Output::default();
    relay.fail(ConnectionError::protocol("x"), &mut out);
    assert_eq!(told(&mut out)[0].2, 1, "last words raise nothing either");
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
fn an_idle_connection_is_small() {
    assert!(size_of::<Relay>() <= 900, "{}", size_of::<Relay>());
}

#[test]
fn goaway_has_two_phases_and_no_request_is_lost_between_them() {
    let (mut relay, mut out) = started();
    let mut server = Decoder::default();
    relay
        .client_bytes(&request(1, &first_block("/a")), &mut out)
        .expect("a request");
    assert!(relay.go_away(&mut out));
    assert!(!relay.go_away(&mut out), "once is enough");
    let told = frames(&std::mem::take(&mut out.to_client));
    assert_eq!(told.len(), 2);
    assert_eq!(
        (told[0].0.kind, &told[0].1[..4]),
        (kind::GOAWAY, &MAX_STREAM_ID.to_be_bytes()[..])
    );
    assert_eq!((told[1].0.kind, &told[1].1[..]), (kind::PING, &PING[..]));

    // A request that crossed the GOAWAY on the wire is served; the client's answer to the PING stays here.
    let crossed = [request(3, &AGAIN), frame(kind::PING, flag::ACK, 0, &PING)].concat();
    relay.client_bytes(&crossed, &mut out).expect("a crossed request");
    assert_eq!(relay.drain(), Drain::Final { last: 3 });
    let told = frames(&std::mem::take(&mut out.to_client));
    assert_eq!(told.len(), 1);
    assert_eq!(
        (told[0].0.kind, &told[0].1[..4]),
        (kind::GOAWAY, &3_u32.to_be_bytes()[..])
    );
    assert_eq!(decoded(&std::mem::take(&mut out.to_server), &mut server).len(), 2);

    // A later one is refused so that the client may send it elsewhere, and gets its window back.
    let late = [
        frame(kind::HEADERS, flag::END_HEADERS, 5, &first_block("/late")),
        frame(kind::DATA, flag::END_STREAM, 5, b"body"),
    ];
    relay.client_bytes(&late.concat(), &mut out).expect("a late request");
    assert!(out.to_server.is_empty());
    let told = frames(&std::mem::take(&mut out.to_client));
    assert_eq!((told[0].0.kind, told[0].0.stream), (kind::RST_STREAM, 5));
    assert_eq!(
        (told[1].0.kind, &told[1].1[..]),
        (kind::WINDOW_UPDATE, &4_u32.to_be_bytes()[..])
    );

    assert!(!relay.is_finished());
    for stream in [1, 3] {
        relay
            .server_bytes(&frame(kind::DATA, flag::END_STREAM, stream, b""), &mut out)
            .expect("an answer");
    }
    assert!(relay.is_finished());
}

#[test]
fn a_draining_connections_watches_end_between_events_and_windows_are_given_back() {
    let mut relay = Relay::new(Settings {
        watch_handover: true,
        ..settings()
    });
    let mut out = Output::default();
    let begin = frame(kind::SETTINGS, 0, 0, &[]);
    relay
        .client_bytes(&[&PREFACE[..], &begin].concat(), &mut out)
        .expect("a preface");
    relay.server_bytes(&begin, &mut out).expect("settings");
    let both = [
        request(1, &first_block("/api/v1/pods?watch=true")),
        request(3, &first_block("/a")),
    ]
    .concat();
    relay.client_bytes(&both, &mut out).expect("requests");
    let mut answer = vec![0x88];
    hpack::write_literal(b"content-type", b"application/json", &mut answer);
    let answered = frame(kind::HEADERS, flag::END_HEADERS, 1, &answer);
    let event = frame(kind::DATA, 0, 1, b"{}\n");
    relay
        .server_bytes(&[&answered[..], &event, &event[..11]].concat(), &mut out)
        .expect("one event and half of another");
    relay.hand_over(1, &mut out);
    relay.go_away(&mut out);
    relay
        .client_bytes(&frame(kind::PING, flag::ACK, 0, &PING), &mut out)
        .expect("a PONG");
    relay.hand_over(1, &mut out);
    out = Output::default();
    assert_eq!(relay.open_watches(), 1, "it stands inside an event");

    // The client is inside a frame of its own when the event ends: the server's RST_STREAM waits for its rest.
    let window = frame(kind::WINDOW_UPDATE, 0, 0, &[0, 0, 0, 9]);
    relay.client_bytes(&window[..10], &mut out).expect("half a frame");
    relay
        .server_bytes(&event[11..], &mut out)
        .expect("the rest of the event");
    assert_eq!(out.to_server, window[..10]);
    relay
        .client_bytes(&window[10..], &mut out)
        .expect("the rest of the frame");
    let reset = frame(kind::RST_STREAM, 0, 1, &[0, 0, 0, 8]);
    assert_eq!(out.to_server, [window, reset].concat());
    let told = frames(&out.to_client[1..]);
    let last = &told.last().expect("the end of the watch").0;
    assert_eq!(
        (last.kind, last.flags, last.stream, last.length),
        (kind::DATA, flag::END_STREAM, 1, 0)
    );
    assert_eq!((relay.open_streams(), relay.open_watches()), (1, 0));
    assert!(!relay.is_finished());

    // What the server had sent by then stays here, and its window goes back.
    out = Output::default();
    let answered = frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, 3, &[0x88]);
    relay
        .server_bytes(&[&event[..], &answered].concat(), &mut out)
        .expect("a late event");
    assert_eq!(out.to_client, answered);
    assert_eq!(out.to_server, frame(kind::WINDOW_UPDATE, 0, 0, &[0, 0, 0, 3]));
    assert!(relay.is_finished());

    // Trailers of the ended watch: the client has seen its end, and its table needs nothing of them.
    out = Output::default();
    let mut trailers = Vec::new();
    hpack::write_literal(b"late", b"1", &mut trailers);
    let last = frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, 1, &trailers);
    relay.server_bytes(&last, &mut out).expect("late trailers");
    assert!(out.to_client.is_empty() && relay.is_finished());
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

#[test]
fn a_client_that_never_answers_hears_the_last_goaway_all_the_same() {
    let (mut relay, mut out) = started();
    relay.conclude(&mut out);
    assert!(out.to_client.is_empty(), "nothing was announced");
    relay
        .client_bytes(&request(1, &first_block("/a")), &mut out)
        .expect("a request");
    relay.go_away(&mut out);
    out = Output::default();
    relay.conclude(&mut out);
    assert_eq!(relay.drain(), Drain::Final { last: 1 });
    let told = frames(&std::mem::take(&mut out.to_client));
    assert_eq!(told[0].1[..4], 1_u32.to_be_bytes());
    // Its answer comes late, and is no business of the server's.
    relay
        .client_bytes(&frame(kind::PING, flag::ACK, 0, &PING), &mut out)
        .expect("a PONG");
    assert!(out.to_client.is_empty() && out.to_server.is_empty());
}

#[test]
fn the_relays_frames_wait_for_a_place_between_the_servers() {
    let mut fresh = relay();
    let mut out = Output::default();
    assert!(fresh.go_away(&mut out));
    assert!(out.to_client.is_empty(), "SETTINGS come first");

    let (mut relay, mut out) = started();
    relay
        .client_bytes(&request(1, &first_block("/a")), &mut out)
        .expect("a request");
    let head = frame(kind::HEADERS, 0, 1, &[0x88]);
    let tail = frame(kind::CONTINUATION, flag::END_HEADERS, 1, &[0x88]);
    let data = frame(kind::DATA, 0, 1, b"abcdef");
    relay.server_bytes(&head, &mut out).expect("half a block");
    relay.go_away(&mut out);
    assert_eq!(out.to_client, head);
    relay.server_bytes(&tail[..10], &mut out).expect("the other half");
    relay.server_bytes(&data[..11], &mut out).expect("half a frame");
    let kinds: Vec<u8> = {
        relay.server_bytes(&data[11..], &mut out).expect("the rest");
        frames(&out.to_client).iter().map(|(header, _)| header.kind).collect()
    };
    assert_eq!(
        kinds,
        [kind::HEADERS, kind::CONTINUATION, kind::GOAWAY, kind::PING, kind::DATA]
    );
}

#[test]
fn the_servers_own_goaway_passes_but_never_raises_what_was_said() {
    let goaway = |last: u32| frame(kind::GOAWAY, 0, 0, &[last.to_be_bytes(), [0; 4]].concat());
    let (mut relay, mut out) = started();
    relay.server_bytes(&goaway(9), &mut out).expect("a GOAWAY");
    assert_eq!((relay.drain(), &out.to_client), (Drain::ByServer, &goaway(9)));
    assert!(!relay.go_away(&mut out), "the client is leaving already");

    let (mut relay, mut out) = started();
    relay.go_away(&mut out);
    relay
        .client_bytes(&frame(kind::PING, flag::ACK, 0, &PING), &mut out)
        .expect("a PONG");
    out.to_client.clear();
    relay.server_bytes(&goaway(MAX_STREAM_ID), &mut out).expect("a GOAWAY");
    assert_eq!(out.to_client, goaway(0));
}

#[test]
fn what_cannot_be_followed_ends_the_connection_with_the_right_code() {
    let refused = |bytes: &[u8]| {
        let (mut relay, mut out) = started();
        relay.client_bytes(bytes, &mut out).expect_err("a fault").code
    };
    let open = frame(kind::HEADERS, 0, 1, &[0x82]);
    assert_eq!(
        refused(&[&open[..], &frame(kind::DATA, 0, 1, b"")].concat()),
        ErrorCode::ProtocolError
    );
    assert_eq!(refused(&frame(kind::CONTINUATION, 0, 1, b"")), ErrorCode::ProtocolError);
    assert_eq!(refused(&request(2, &[0x82])), ErrorCode::ProtocolError);
    assert_eq!(refused(&request(1, &[0x80])), ErrorCode::CompressionError);
    assert_eq!(
        refused(&frame(kind::HEADERS, flag::PADDED, 1, &[])),
        ErrorCode::FrameSizeError
    );
    assert_eq!(
        refused(&frame(kind::HEADERS, flag::PADDED, 1, &[2, 0])),
        ErrorCode::ProtocolError
    );
    assert_eq!(refused(&request(1, &[0; 5000])), ErrorCode::EnhanceYourCalm);
    let flood = [&open[..], &frame(kind::CONTINUATION, 0, 1, b"").repeat(500)].concat();
    assert_eq!(refused(&flood), ErrorCode::EnhanceYourCalm, "empty CONTINUATION frames");
    let mut fresh = relay();
    assert!(
        fresh
            .client_bytes(b"GET / HTTP/1.1\r\n", &mut Output::default())
            .is_err()
    );
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
