//! HTTP/2 as RFC 9113 wants it, through the relay and directly: the same octets, and no worse an answer.
//!
//! The cases follow the sections that h2spec has a case for.

use std::net::SocketAddr;

use rebalancer_tests::{
    h2wire::{END_HEADERS, END_STREAM, PADDED, PREFACE, Peer, block, frame, get, kind, request},
    pki::{Pair, SERVER_NAME},
};

use crate::world::World;

/// How a server takes something.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Taken {
    /// It still answers a PING; streams it answered, and those it reset.
    Alive { answered: Vec<u32>, reset: Vec<u32> },
    /// It ended the connection.
    Ended,
}

fn take(world: &World, server: SocketAddr, client: &Pair, octets: &[u8]) -> Taken {
    let mut peer = Peer::connect(&world.pki, server, Some(client), b"h2").expect("a handshake");
    // A server may close before all is written.
    let _ = peer.try_send(octets);
    let _ = peer.try_send(&frame(kind::PING, 0, 0, b"question"));
    let (mut answered, mut reset) = (Vec::new(), Vec::new());
    let mut pong = false;
    // Those that were opened get an answer or a reset; the answer to PING may overtake them.
    let opened = openings(octets);
    loop {
        answered.sort_unstable();
        reset.sort_unstable();
        if pong && answered.len() + reset.len() >= opened {
            return Taken::Alive { answered, reset };
        }
        match peer.try_next().expect("an answer or the end, in time") {
            None => return Taken::Ended,
            Some(got) => match got.kind {
                kind::GOAWAY if got.word(4) != 0 => return Taken::Ended,
                kind::PING if got.payload == b"question" => pong = true,
                kind::RST_STREAM => {
                    answered.retain(|stream| *stream != got.stream);
                    if !reset.contains(&got.stream) {
                        reset.push(got.stream);
                    }
                }
                // RFC 9113, section 5.1: nothing comes on a stream after its reset.
                kind::HEADERS | kind::DATA if reset.contains(&got.stream) => {
                    panic!("a frame of kind {} on stream {} after its reset", got.kind, got.stream)
                }
                kind::HEADERS if !answered.contains(&got.stream) => answered.push(got.stream),
                _ => {}
            },
        }
    }
}

/// How many whole requests the octets hold.
fn openings(octets: &[u8]) -> usize {
    let mut rest = octets.strip_prefix(PREFACE).unwrap_or(octets);
    let mut ended = std::collections::BTreeSet::new();
    while let [l0, l1, l2, kind, flags, s0, s1, s2, s3, after @ ..] = rest {
        let length = u32::from_be_bytes([0, *l0, *l1, *l2]) as usize;
        let stream = u32::from_be_bytes([*s0, *s1, *s2, *s3]);
        if matches!(*kind, kind::HEADERS | kind::DATA) && flags & END_STREAM != 0 && stream % 2 == 1 {
            ended.insert(stream);
        }
        let Some(after) = after.get(length..) else { break };
        rest = after;
    }
    ended.len()
}

#[test]
fn the_relay_takes_everything_no_worse_than_the_apiserver() {
    let Some(world) = World::get() else { return };
    // A stranger would hear GOAWAY with its first answer, at another frame each time.
    let client = world
        .pki
        .client("conformance", "conformance", &[])
        .expect("a certificate");
    let begin = [PREFACE, &frame(kind::SETTINGS, 0, 0, &[])].concat();
    let after = |parts: &[Vec<u8>]| [&begin[..], &parts.concat()].concat();
    let path = "/version";
    let ask = |stream| request(stream, path);
    let headers = |flags: u8, stream: u32, block: &[u8]| frame(kind::HEADERS, flags, stream, block);
    let whole = END_STREAM | END_HEADERS;
    let pseudo = |fields: &[(&str, &str)]| after(&[headers(whole, 1, &block(fields))]);
    let (method, scheme, authority, target) = (
        (":method", "GET"),
        (":scheme", "https"),
        (":authority", SERVER_NAME),
        (":path", path),
    );
    let long = get(path);
    let (front, back) = long.split_at(10);
    let padded = [&[4][..], &get(path), &[0; 4]].concat();
    let priority = [&[0, 0, 0, 0, 15][..], &get(path)].concat();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("3.4 an invalid preface", b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n".to_vec()),
        (
            "4.1 a frame of an unknown type",
            after(&[frame(0x42, 0xff, 0, b"x"), ask(1)]),
        ),
        (
            "4.1 undefined flags",
            after(&[frame(kind::PING, 0xfe, 0, b"12345678"), ask(1)]),
        ),
        (
            "4.1 the reserved bit",
            after(&[frame(kind::PING, 0, 0x8000_0000, b"12345678"), ask(1)]),
        ),
        (
            "4.2 DATA beyond the frame size",
            after(&[
                headers(END_HEADERS, 1, &get(path)),
                frame(kind::DATA, END_STREAM, 1, &vec![0; 1 << 20 | 1]),
            ]),
        ),
        (
            "4.2 HEADERS beyond the frame size",
            after(&[headers(whole, 1, &vec![0x82; 1 << 20 | 1])]),
        ),
        (
            "4.3 an invalid block",
            after(&[headers(whole, 1, &[0xff, 0xff, 0xff, 0xff, 0xff])]),
        ),
        (
            "4.3 PRIORITY inside a block",
            after(&[headers(END_STREAM, 1, front), frame(kind::PRIORITY, 0, 1, &[0; 5])]),
        ),
        (
            "4.3 another stream's HEADERS inside a block",
            after(&[headers(END_STREAM, 1, front), headers(whole, 3, &get(path))]),
        ),
        (
            "5.1 DATA on an idle stream",
            after(&[frame(kind::DATA, END_STREAM, 1, b"x")]),
        ),
        (
            "5.1 RST_STREAM on an idle stream",
            after(&[frame(kind::RST_STREAM, 0, 1, &[0, 0, 0, 8])]),
        ),
        (
            "5.1 WINDOW_UPDATE on an idle stream",
            after(&[frame(kind::WINDOW_UPDATE, 0, 1, &[0, 0, 0, 9])]),
        ),
        (
            "5.1 CONTINUATION on an idle stream",
            after(&[frame(kind::CONTINUATION, END_HEADERS, 1, &get(path))]),
        ),
        (
            "5.1 DATA after END_STREAM",
            after(&[ask(1), frame(kind::DATA, END_STREAM, 1, b"x")]),
        ),
        (
            "5.1 HEADERS after END_STREAM",
            after(&[ask(1), headers(whole, 1, &block(&[("x", "y")]))]),
        ),
        ("5.1.1 an even stream", after(&[ask(2)])),
        ("5.1.1 a lower stream", after(&[ask(5), ask(3)])),
        (
            "5.3.1 a stream that depends on itself",
            after(&[headers(whole | 0x20, 1, &[&[0, 0, 0, 1, 255][..], &get(path)].concat())]),
        ),
        ("6.1 DATA on stream 0", after(&[frame(kind::DATA, 0, 0, b"x")])),
        (
            "6.1 DATA with too much padding",
            after(&[
                headers(END_HEADERS, 1, &get(path)),
                frame(kind::DATA, PADDED | END_STREAM, 1, &[9, 0]),
            ]),
        ),
        (
            "6.2 HEADERS with padding",
            after(&[headers(whole | PADDED, 1, &padded)]),
        ),
        (
            "6.2 HEADERS with priority",
            after(&[headers(whole | 0x20, 1, &priority)]),
        ),
        ("6.2 HEADERS on stream 0", after(&[headers(whole, 0, &get(path))])),
        (
            "6.2 HEADERS with too much padding",
            after(&[headers(whole | PADDED, 1, &[255, 0x82])]),
        ),
        (
            "6.3 PRIORITY on stream 0",
            after(&[frame(kind::PRIORITY, 0, 0, &[0; 5])]),
        ),
        (
            "6.3 PRIORITY of four octets",
            after(&[ask(1), frame(kind::PRIORITY, 0, 1, &[0; 4])]),
        ),
        (
            "6.4 RST_STREAM on stream 0",
            after(&[frame(kind::RST_STREAM, 0, 0, &[0; 4])]),
        ),
        (
            "6.4 RST_STREAM of three octets",
            after(&[
                headers(END_HEADERS, 1, &get(path)),
                frame(kind::RST_STREAM, 0, 1, &[0; 3]),
            ]),
        ),
        (
            "6.5 SETTINGS with ACK and a payload",
            after(&[frame(kind::SETTINGS, 1, 0, &[0])]),
        ),
        ("6.5 SETTINGS on a stream", after(&[frame(kind::SETTINGS, 0, 1, &[])])),
        (
            "6.5 SETTINGS of five octets",
            after(&[frame(kind::SETTINGS, 0, 0, &[0; 5])]),
        ),
        (
            "6.5.2 an invalid ENABLE_PUSH",
            after(&[frame(kind::SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 2])]),
        ),
        (
            "6.5.2 a window beyond its maximum",
            after(&[frame(kind::SETTINGS, 0, 0, &[0, 4, 0x80, 0, 0, 0])]),
        ),
        (
            "6.5.2 a frame size below its minimum",
            after(&[frame(kind::SETTINGS, 0, 0, &[0, 5, 0, 0, 0, 1])]),
        ),
        (
            "6.5.2 an unknown setting",
            after(&[frame(kind::SETTINGS, 0, 0, &[0x7f, 0xff, 0, 0, 0, 1]), ask(1)]),
        ),
        ("6.7 PING on a stream", after(&[frame(kind::PING, 0, 1, b"12345678")])),
        ("6.7 PING of six octets", after(&[frame(kind::PING, 0, 0, b"123456")])),
        ("6.8 GOAWAY on a stream", after(&[frame(kind::GOAWAY, 0, 1, &[0; 8])])),
        (
            "6.9 WINDOW_UPDATE of 0",
            after(&[frame(kind::WINDOW_UPDATE, 0, 0, &[0; 4])]),
        ),
        (
            "6.9 WINDOW_UPDATE of 0 on a stream",
            after(&[
                headers(END_HEADERS, 1, &get(path)),
                frame(kind::WINDOW_UPDATE, 0, 1, &[0; 4]),
            ]),
        ),
        (
            "6.9 WINDOW_UPDATE of three octets",
            after(&[frame(kind::WINDOW_UPDATE, 0, 0, &[0; 3])]),
        ),
        (
            "6.9.1 a window beyond its maximum",
            after(&[frame(kind::WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]).repeat(2)]),
        ),
        (
            "6.10 HEADERS and CONTINUATIONs",
            after(&[
                headers(END_STREAM, 1, front),
                frame(kind::CONTINUATION, 0, 1, &back[..5]),
                frame(kind::CONTINUATION, END_HEADERS, 1, &back[5..]),
            ]),
        ),
        (
            "6.10 CONTINUATION on stream 0",
            after(&[
                headers(END_STREAM, 1, front),
                frame(kind::CONTINUATION, END_HEADERS, 0, back),
            ]),
        ),
        (
            "6.10 CONTINUATION after END_HEADERS",
            after(&[ask(1), frame(kind::CONTINUATION, END_HEADERS, 1, back)]),
        ),
        (
            "8.1 a second HEADERS without END_STREAM",
            after(&[
                headers(END_HEADERS, 1, &get(path)),
                headers(END_HEADERS, 1, &block(&[("x", "y")])),
            ]),
        ),
        (
            "8.1 trailers with a name in upper case",
            after(&[
                headers(END_HEADERS, 1, &get(path)),
                headers(whole, 1, &block(&[("X-Test", "1")])),
            ]),
        ),
        (
            "8.1 trailers with a pseudo-header",
            after(&[
                headers(END_HEADERS, 1, &get(path)),
                headers(whole, 1, &block(&[target])),
            ]),
        ),
        (
            "8.2.1 a name in upper case",
            pseudo(&[method, scheme, authority, target, ("X-Test", "1")]),
        ),
        (
            "8.2.2 a connection-specific field",
            pseudo(&[method, scheme, authority, target, ("connection", "keep-alive")]),
        ),
        (
            "8.2.2 TE other than trailers",
            pseudo(&[method, scheme, authority, target, ("te", "gzip")]),
        ),
        (
            "8.3 an unknown pseudo-header",
            pseudo(&[method, scheme, authority, target, (":test", "1")]),
        ),
        (
            "8.3 a response's pseudo-header",
            pseudo(&[method, scheme, authority, target, (":status", "200")]),
        ),
        (
            "8.3 a pseudo-header after a field",
            pseudo(&[method, scheme, authority, ("x-test", "1"), target]),
        ),
        (
            "8.3.1 an empty path",
            pseudo(&[method, scheme, authority, (":path", "")]),
        ),
        ("8.3.1 no method", pseudo(&[scheme, authority, target])),
        ("8.3.1 no scheme", pseudo(&[method, authority, target])),
        ("8.3.1 no path", pseudo(&[method, scheme, authority])),
        ("8.3.1 two paths", pseudo(&[method, scheme, authority, target, target])),
        (
            "8.1.1 a length that is not the body's",
            after(&[
                headers(
                    END_HEADERS,
                    1,
                    &block(&[(":method", "POST"), scheme, authority, target, ("content-length", "1")]),
                ),
                frame(kind::DATA, END_STREAM, 1, b"test"),
            ]),
        ),
        ("plain requests", after(&[ask(1), ask(3)])),
    ];
    let mut stricter = Vec::new();
    for (name, octets) in &cases {
        let direct = take(world, world.apiserver, &client, octets);
        let relayed = take(world, world.relay, &client, octets);
        if relayed != direct {
            // Ending what the other side let live is no worse; letting live what it ended would be.
            assert_eq!(relayed, Taken::Ended, "{name}: directly {direct:?}");
            stricter.push(*name);
        }
    }
    // RFC 9113, section 6.2, wants the connection ended; Go resets the stream.
    assert_eq!(stricter, ["6.2 HEADERS with too much padding"]);
}
