//! What a client can make the relay hold, read or say is bounded.

use super::*;

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
fn an_idle_connection_is_small() {
    assert!(size_of::<Relay>() <= 900, "{}", size_of::<Relay>());
}

#[test]
fn a_header_list_beyond_the_bound_is_answered_431_and_the_next_request_is_served() {
    let (mut relay, mut out) = started();
    let too_large = |stream, flags| {
        // Fields that the table keeps, then many that it does not.
        let mut block = first_block("/a");
        for _ in 0..1000 {
            block.extend([0x00, 1, b'x', 1, b'y']);
        }
        frame(kind::HEADERS, flags, stream, &block)
    };
    relay
        .client_bytes(&too_large(1, flag::END_HEADERS | flag::END_STREAM), &mut out)
        .expect("no fault of the connection");
    assert_eq!(out.to_client, frame(kind::HEADERS, 5, 1, b"\x08\x03431"));
    assert!(out.to_server.is_empty(), "the server hears nothing of it");
    // One with a body, whose window is given back.
    out = Output::default();
    relay
        .client_bytes(&too_large(3, flag::END_HEADERS), &mut out)
        .expect("no fault of the connection");
    relay
        .client_bytes(&frame(kind::DATA, flag::END_STREAM, 3, &[0; 10]), &mut out)
        .expect("a body");
    let kinds: Vec<u8> = frames(&out.to_client).iter().map(|(header, _)| header.kind).collect();
    assert_eq!(kinds, [kind::HEADERS, kind::RST_STREAM, kind::WINDOW_UPDATE]);
    // What it put into the table is there for the next.
    out = Output::default();
    relay.client_bytes(&request(5, &AGAIN), &mut out).expect("a request");
    let mut server = Decoder::default();
    let list = server.decode(&frames(&out.to_server)[0].1, 4096).expect("a block");
    assert_eq!(list.get(b":path"), Some(&b"/a"[..]));
    // Trailers beyond it reset their stream alone.
    out = Output::default();
    relay
        .client_bytes(&frame(kind::HEADERS, flag::END_HEADERS, 7, &AGAIN), &mut out)
        .expect("a request");
    let mut trailers = Vec::new();
    for _ in 0..1000 {
        trailers.extend([0x00, 1, b'x', 1, b'y']);
    }
    out = Output::default();
    relay.client_bytes(&request(7, &trailers), &mut out).expect("trailers");
    assert!(out.to_client.is_empty());
    assert_eq!(out.to_server, frame(kind::WINDOW_UPDATE, 0, 7, &[0; 4]));
}

#[test]
fn what_cannot_be_followed_ends_the_connection_with_the_right_code() {
    let refused = |bytes: &[u8]| {
        let (mut relay, mut out) = started();
        let mut rest = bytes;
        loop {
            match relay.client_bytes(rest, &mut out) {
                Ok(taken) => rest = &rest[taken..],
                Err(error) => break error.code,
            }
            assert!(!rest.is_empty(), "a fault");
        }
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
    assert_eq!(refused(&request(1, &[0; 9000])), ErrorCode::EnhanceYourCalm);
    let flood = [&open[..], &frame(kind::CONTINUATION, 0, 1, b"").repeat(1000)].concat();
    assert_eq!(refused(&flood), ErrorCode::EnhanceYourCalm, "empty CONTINUATION frames");
    let mut fresh = relay();
    assert!(
        fresh
            .client_bytes(b"GET / HTTP/1.1\r\n", &mut Output::default())
            .is_err()
    );
}
