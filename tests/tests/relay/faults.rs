//! Clients that break HTTP/2: each ends its own connection, with the code RFC 9113 names, and nobody else's.

use rebalancer_tests::h2wire::{END_HEADERS, END_STREAM, PADDED, Peer, code, frame, get, kind, request};

use crate::world::{RELAY, World};

#[test]
fn a_malformed_frame_ends_its_own_connection_alone() {
    let world = World::start(&["--max-header-bytes=65536"]);
    let mut bystander = world.bystander();
    let open = frame(kind::HEADERS, 0, 1, &get("/"));
    let headers = |flags: u8, stream: u32, block: &[u8]| frame(kind::HEADERS, flags | END_HEADERS, stream, block);
    let then = |first: &[u8], second: &[u8]| [first, second].concat();
    let cases = [
        (
            "DATA inside a header block",
            then(&open, &frame(kind::DATA, 0, 1, b"")),
            code::PROTOCOL_ERROR,
        ),
        (
            "another stream's CONTINUATION",
            then(&open, &frame(kind::CONTINUATION, 0, 3, b"")),
            code::PROTOCOL_ERROR,
        ),
        (
            "an unknown frame inside a header block",
            then(&open, &frame(0x42, 0, 0, b"")),
            code::PROTOCOL_ERROR,
        ),
        (
            "CONTINUATION without HEADERS",
            frame(kind::CONTINUATION, END_HEADERS, 1, b""),
            code::PROTOCOL_ERROR,
        ),
        (
            "HEADERS on stream 0",
            headers(END_STREAM, 0, &get("/")),
            code::PROTOCOL_ERROR,
        ),
        (
            "HEADERS on a server's stream",
            headers(END_STREAM, 2, &get("/")),
            code::PROTOCOL_ERROR,
        ),
        (
            "padding longer than the payload",
            headers(PADDED, 1, &[200, 0x82]),
            code::PROTOCOL_ERROR,
        ),
        (
            "PADDED without a pad length",
            headers(PADDED, 1, &[]),
            code::FRAME_SIZE_ERROR,
        ),
        (
            "PRIORITY fields cut short",
            headers(0x20, 1, &[0, 0, 0]),
            code::FRAME_SIZE_ERROR,
        ),
        (
            "an index that names nothing",
            headers(END_STREAM, 1, &[0xff, 0x7f]),
            code::COMPRESSION_ERROR,
        ),
        ("index 0", headers(END_STREAM, 1, &[0x80]), code::COMPRESSION_ERROR),
        (
            "a table larger than allowed",
            headers(END_STREAM, 1, &[0x3f, 0xe1, 0xff, 0x7f]),
            code::COMPRESSION_ERROR,
        ),
        (
            "a string that never ends",
            headers(END_STREAM, 1, &[0x00, 0x7f, 0xff, 0xff, 0xff]),
            code::COMPRESSION_ERROR,
        ),
        (
            "Huffman padding of zeros",
            headers(END_STREAM, 1, &[0x00, 0x81, 0x00, 0x00]),
            code::COMPRESSION_ERROR,
        ),
    ];
    for (what, octets, expected) in cases {
        let (mut client, mut server) = world.open(None);
        client.send(&octets);
        let last = client.rest().pop().unwrap_or_else(|| panic!("{what}: no GOAWAY"));
        assert_eq!((last.kind, last.word(4)), (kind::GOAWAY, expected), "{what}");
        drop(client);
        assert!(
            server.rest().iter().all(|frame| frame.kind != kind::HEADERS),
            "{what}: nothing of it reaches the apiserver"
        );
        bystander.is_served();
    }
}

#[test]
fn a_client_that_does_not_speak_http2_is_shut_out() {
    let world = World::start(&[]);
    let mut bystander = world.bystander();
    let mut client = Peer::connect(&world.pki, RELAY, None, b"h2").expect("a handshake");
    client.send(b"GET / HTTP/1.1\r\nHost: kubernetes\r\n\r\n");
    let _server = world.accept().peer;
    // GOAWAY may be left out for somebody who would not understand it (RFC 9113, section 3.4).
    assert_eq!(client.rest(), []);
    bystander.is_served();
}

#[test]
fn a_client_that_vanishes_takes_its_upstream_connection_with_it() {
    let world = World::start(&[]);
    let mut bystander = world.bystander();
    let (mut client, mut server) = world.open(None);
    client.send(&request(1, "/"));
    server.expect(kind::HEADERS);
    drop(client);
    assert_eq!(server.rest(), []);
    bystander.is_served();
}

#[test]
fn a_server_that_ends_is_seen_by_its_client_after_its_last_octet() {
    let world = World::start(&[]);
    let (mut client, mut server) = world.open(None);
    client.send(&request(1, "/"));
    server.expect(kind::HEADERS);
    server.send(&frame(kind::DATA, 0, 1, &[7; 10_000]));
    drop(server);
    let rest = client.rest();
    assert_eq!(rest.len(), 1);
    assert_eq!((rest[0].kind, rest[0].payload.len()), (kind::DATA, 10_000));
}
