//! The PROXY protocol: the real client reaches the apiserver, and nobody can name a client who may not.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
};

use rebalancer_tests::h2wire::{PATIENCE, Peer, fields, frame, kind, request};

use crate::world::{RELAY, World};

/// A binary header (haproxy's doc/proxy-protocol.txt, section 2.2).
fn v2(command: u8, family: u8, payload: &[u8]) -> Vec<u8> {
    let mut octets = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    octets.extend([0x20 | command, family]);
    octets.extend(u16::try_from(payload.len()).expect("a short payload").to_be_bytes());
    octets.extend(payload);
    octets
}

/// Connects, sends the header whole or octet by octet, and asks: what the apiserver hears of the client.
fn forwarded(world: &World, header: &[u8], slowly: bool) -> String {
    let mut socket = TcpStream::connect(RELAY).expect("the port is open");
    socket.set_nodelay(true).expect("a socket option");
    for piece in header.chunks(if slowly { 1 } else { header.len() }) {
        socket.write_all(piece).expect("room for a header");
    }
    let mut client = Peer::over(socket, &world.pki, None, b"h2").expect("a handshake");
    client.begin_client(&[]);
    let mut server = world.accept().peer;
    server.begin_server();
    client.send(&request(1, "/"));
    let list = fields(&server.expect(kind::HEADERS).payload);
    let (_, value) = list
        .into_iter()
        .find(|(name, _)| name == "x-forwarded-for")
        .expect("an address");
    value
}

#[test]
fn the_named_client_reaches_the_apiserver_and_the_list() {
    let world = World::start(&["--proxy-protocol=192.0.2.0/24,127.0.0.0/8"]);
    let v4 = [192, 0, 2, 77, 127, 0, 0, 1, 0x30, 0x39, 0x19, 0x2b];
    let mut v6 = vec![0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
    v6.extend([0; 15]);
    v6.extend([1, 0x30, 0x39, 0x19, 0x2b]);
    // Further fields, longer than what is read at once.
    let long = [&v4[..], &[4, 1, 0x90], &[0; 400]].concat();
    let cases: [(&[u8], &str); 7] = [
        (b"PROXY TCP4 192.0.2.7 127.0.0.1 12345 6443\r\n", "192.0.2.7"),
        (b"PROXY TCP6 2001:db8::7 ::1 12345 6443\r\n", "2001:db8::7"),
        (b"PROXY UNKNOWN\r\n", "127.0.0.1"),
        (&v2(1, 0x11, &v4), "192.0.2.77"),
        (&v2(1, 0x21, &v6), "2001:db8::9"),
        (&v2(1, 0x11, &long), "192.0.2.77"),
        (&v2(0, 0, &[]), "127.0.0.1"),
    ];
    for (header, expected) in cases {
        for slowly in [false, true] {
            assert_eq!(forwarded(&world, header, slowly), expected, "{header:?}");
        }
    }
    let mut socket = TcpStream::connect(RELAY).expect("the port is open");
    socket
        .write_all(b"PROXY TCP4 192.0.2.7 127.0.0.1 12345 6443\r\n")
        .expect("room");
    let mut client = Peer::over(socket, &world.pki, None, b"h2").expect("a handshake");
    client.begin_client(&[]);
    let mut server = world.accept().peer;
    server.begin_server();
    assert_eq!(client.expect(kind::SETTINGS).flags, 0);
    assert_eq!(client.expect(kind::SETTINGS).flags, 1);
    // By the client's own address it can be told to go.
    assert_eq!(world.go_away("192.0.2.7:12345".parse().expect("an address")), "sent");
    assert_eq!(client.expect(kind::GOAWAY).word(0), 0x7fff_ffff);
    server.send(&frame(kind::PING, 0, 0, b"12345678"));
}

#[test]
fn malformed_headers_missing_ones_and_those_from_elsewhere_are_refused() {
    let refused = |octets: &[u8]| {
        let mut socket = TcpStream::connect(RELAY).expect("the port is open");
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket option");
        socket.write_all(octets).expect("room for a header");
        let mut answer = Vec::new();
        // A reset is a refusal too; an alert of TLS is one as well.
        let _ = socket.read_to_end(&mut answer);
        answer
    };
    let world = World::start(&["--proxy-protocol=127.0.0.0/8"]);
    let mut hello = vec![22, 3, 1, 2, 0, 1, 0, 1, 252];
    hello.resize(517, 0);
    for octets in [
        &b"PROXY TCP4 192.0.2.7 127.0.0.1 12345\r\n"[..],
        b"PROXY TCP4 192.0.2.7 127.0.0.1 99999 6443\r\n",
        &[b"PROXY UNKNOWN ", &[b'x'; 200][..]].concat(),
        &v2(3, 0x11, &[0; 12]),
        &v2(1, 0x11, &[0; 4]),
        &v2(1, 0x12, &[0; 12]),
        &hello,
    ] {
        assert!(refused(octets).is_empty(), "{octets:?} is refused without a word");
    }
    assert!(
        Peer::connect(&world.pki, RELAY, None, b"h2").is_err(),
        "a client without a header"
    );
    let log = world.relay.log();
    assert!(log.contains("does not begin with a PROXY protocol header"), "{log}");
    drop(world);

    // Not listed: the header is no TLS, and nothing in it is believed.
    let world = World::start(&["--proxy-protocol=192.0.2.0/24"]);
    let answer = refused(b"PROXY TCP4 192.0.2.7 127.0.0.1 12345 6443\r\n");
    assert!(
        answer.is_empty() || answer[0] == 21,
        "an alert at most (RFC 8446, section 5.1): {answer:?}"
    );
    world.bystander();
}
