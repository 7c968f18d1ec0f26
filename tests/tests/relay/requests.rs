//! What a request carries when it comes out of the relay: identity, address, and nothing a client forged.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rebalancer_tests::{
    h2wire::{END_HEADERS, END_STREAM, PATIENCE, Peer, block, code, fields, frame, get, kind, request},
    process::wait_for,
};

use crate::world::{OK, RELAY, World};

fn values<'a>(list: &'a [(String, String)], name: &str) -> Vec<&'a str> {
    let named = list.iter().filter(|(key, _)| key.eq_ignore_ascii_case(name));
    named.map(|(_, value)| value.as_str()).collect()
}

#[test]
fn a_certificates_user_and_groups_are_named_over_the_front_proxys_certificate() {
    let world = World::start(&[]);
    let alice = world
        .pki
        .client("alice", "alice", &["dev", "ops"])
        .expect("a certificate");
    let (mut client, mut server) = world.open(Some(&alice));
    assert!(server.certified, "the front-proxy certificate is shown");
    client.send(&request(1, "/api"));
    let list = fields(&server.expect(kind::HEADERS).payload);
    assert_eq!(values(&list, ":path"), ["/api"]);
    assert_eq!(values(&list, "x-remote-user"), ["alice"]);
    assert_eq!(values(&list, "x-remote-group"), ["dev", "ops"]);
    assert_eq!(values(&list, "x-forwarded-for"), ["127.0.0.1"]);
    let entry = &world.connections()[0];
    assert_eq!((&entry["user"], &entry["protocol"]), (&"alice".into(), &"h2".into()));
}

#[test]
fn a_front_proxy_names_users_itself_under_all_the_apiservers_names() {
    let world = World::start_prepared(false, |pki| {
        for proxy in ["gateway", "other"] {
            pki.proxy(proxy).expect("a certificate");
        }
        vec![
            format!(
                "--requestheader-client-ca-file={}",
                pki.file("front-proxy-ca.crt").display()
            ),
            "--requestheader-allowed-names=gateway".to_owned(),
            "--requestheader-username-headers=X-Auth-User,X-Remote-User".to_owned(),
            "--requestheader-group-headers=X-Auth-Group".to_owned(),
        ]
    });
    let named = [
        ("x-remote-user", "erin"),
        ("x-auth-group", "dev"),
        ("x-remote-extra-a", "b"),
    ];
    let asking = |stream: u32, fields: &[(&str, &str)]| {
        let list = [get("/"), block(fields)].concat();
        frame(kind::HEADERS, END_STREAM | END_HEADERS, stream, &list)
    };
    let (mut client, mut server) = world.open(Some(&world.pki.pair("gateway")));
    assert!(server.certified);
    client.send(&asking(1, &named));
    let list = fields(&server.expect(kind::HEADERS).payload);
    for (name, value) in named {
        assert_eq!(values(&list, name), [value]);
    }
    // Without a name nobody asks, and nothing reaches the server.
    client.send(&asking(3, &named[1..]));
    assert_eq!(client.expect(kind::HEADERS).payload, [&[0x08, 3][..], b"401"].concat());
    client.send(&asking(5, &[("x-auth-user", "frank")]));
    assert_eq!(server.expect(kind::HEADERS).stream, 5);

    // A proxy whose name is not allowed is nobody, and what it says is taken away.
    let (mut client, mut server) = world.open(Some(&world.pki.pair("other")));
    assert!(!server.certified);
    client.send(&asking(1, &named));
    let list = fields(&server.expect(kind::HEADERS).payload);
    for (name, _) in named {
        assert_eq!(values(&list, name), [""; 0]);
    }
    assert_eq!(values(&list, "authorization").len(), 1);

    // A user's own claims go under every name, and its certificate's are written under the first.
    let alice = world.pki.client("alice", "alice", &["ops"]).expect("a certificate");
    let (mut client, mut server) = world.open(Some(&alice));
    client.send(&asking(
        1,
        &[("x-auth-user", "root"), ("x-auth-group", "system:masters"), named[0]],
    ));
    let list = fields(&server.expect(kind::HEADERS).payload);
    assert_eq!(values(&list, "x-auth-user"), ["alice"]);
    assert_eq!(values(&list, "x-auth-group"), ["ops"]);
    assert_eq!(values(&list, "x-remote-user"), [""; 0]);
}

#[test]
fn without_a_certificate_nobody_is_named_and_no_certificate_is_shown() {
    let world = World::start(&[]);
    let (mut client, mut server) = world.open(None);
    assert!(!server.certified);
    client.send(&request(1, "/"));
    let list = fields(&server.expect(kind::HEADERS).payload);
    assert!(list.iter().all(|(name, _)| !name.starts_with("x-remote-")), "{list:?}");
    assert_eq!(values(&list, "authorization"), [""; 0]);
}

#[test]
fn forged_identities_are_removed_from_headers_and_trailers() {
    let world = World::start(&[]);
    let bob = world.pki.client("bob", "bob", &[]).expect("a certificate");
    let (mut client, mut server) = world.open(Some(&bob));
    let mut forged = get("/");
    forged.extend(block(&[
        ("x-remote-user", "root"),
        ("x-remote-group", "system:masters"),
        ("x-remote-extra-scopes", "all"),
        ("x-remote-uid", "0"),
        ("x-forwarded-for", "192.0.2.9"),
        ("accept", "application/json"),
    ]));
    client.send(&frame(kind::HEADERS, END_HEADERS, 1, &forged));
    let trailers = block(&[("x-remote-group", "system:masters"), ("checksum", "1")]);
    client.send(&frame(kind::HEADERS, END_HEADERS | END_STREAM, 1, &trailers));
    let list = fields(&server.expect(kind::HEADERS).payload);
    assert_eq!(values(&list, "x-remote-user"), ["bob"]);
    assert_eq!(values(&list, "x-remote-group"), [""; 0]);
    assert_eq!(values(&list, "x-remote-extra-scopes"), [""; 0]);
    assert_eq!(values(&list, "x-remote-uid"), [""; 0]);
    assert_eq!(values(&list, "accept"), ["application/json"]);
    assert_eq!(values(&list, "x-forwarded-for"), ["192.0.2.9, 127.0.0.1"]);
    let list = fields(&server.expect(kind::HEADERS).payload);
    assert_eq!(list, [("checksum".to_owned(), "1".to_owned())]);
}

/// What Go's framer refuses without keeping the stream in mind never reaches the server, and the stream's number cannot be
/// used a second time: there it would be a request, here trailers.
#[test]
fn a_request_cannot_be_dressed_as_trailers() {
    let world = World::start(&[]);
    let alice = world.pki.client("alice", "alice", &["dev"]).expect("a certificate");
    for stream in [3, 0x7fff_ffff] {
        for malformed in [&[("Bad-Name", "x")][..], &[("x-control", "\u{1}")], &[(":late", "x")]] {
            let (mut client, mut server) = world.open(Some(&alice));
            client.send(&request(1, "/honest"));
            assert_eq!(server.expect(kind::HEADERS).stream, 1);
            let bad = [get("/malformed"), block(malformed)].concat();
            client.send(&frame(kind::HEADERS, END_STREAM | END_HEADERS, stream, &bad));
            let reset = client.expect(kind::RST_STREAM);
            assert_eq!((reset.stream, reset.word(0)), (stream, code::PROTOCOL_ERROR));
            client.send(&request(stream, "/smuggled"));
            let last = client.expect(kind::GOAWAY);
            assert_eq!((last.word(0), last.word(4)), (1, code::PROTOCOL_ERROR));
            // The relay reads until the client has closed.
            drop(client);
            assert_eq!(server.rest(), [], "the server hears nothing of either");
        }
    }
}

#[test]
fn http1_and_upgrades_carry_the_same_identity_and_then_pass_octets() {
    let world = World::start(&[]);
    let alice = world.pki.client("alice", "alice", &["dev"]).expect("a certificate");
    let mut client = Peer::connect(&world.pki, RELAY, Some(&alice), b"http/1.1").expect("a handshake");
    client.send(
        b"POST /exec HTTP/1.1\r\nHost: kubernetes\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
          X-Remote-User: root\r\nx-remote-group: system:masters\r\nX-Forwarded-For: 192.0.2.9\r\n\r\n",
    );
    let accepted = world.accept();
    let mut server = accepted.peer;
    assert!(server.certified);
    let list: Vec<(String, String)> = accepted
        .head
        .lines()
        .skip(1)
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    assert_eq!(values(&list, "x-remote-user"), ["alice"]);
    assert_eq!(values(&list, "x-remote-group"), ["dev"]);
    assert_eq!(values(&list, "x-forwarded-for"), ["192.0.2.9, 127.0.0.1"]);
    assert_eq!(values(&list, "upgrade"), ["SPDY/3.1"]);
    server.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n");
    assert!(client.read_head().starts_with("HTTP/1.1 101 "));
    client.send(b"\x80\x03 from the client");
    assert_eq!(server.read(18), b"\x80\x03 from the client");
    server.send(b"\x80\x03 from the server");
    assert_eq!(client.read(18), b"\x80\x03 from the server");
    assert_eq!(world.go_away(client.local()), "not_h2");
}

#[test]
fn frames_and_windows_pass_untouched_both_ways() {
    let world = World::start(&[]);
    let (mut client, mut server) = world.open(None);
    client.send(&frame(kind::HEADERS, END_HEADERS, 1, &get("/")));
    server.expect(kind::HEADERS);
    let window = 70_000_u32.to_be_bytes();
    let cases: [(u8, u8, u32, &[u8]); 6] = [
        (kind::SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]),
        (kind::WINDOW_UPDATE, 0, 0, &window),
        (kind::WINDOW_UPDATE, 0, 1, &window),
        (kind::PRIORITY, 0, 1, &[0, 0, 0, 0, 16]),
        (kind::DATA, 8, 1, &[3, b'a', 0, 0, 0]),
        // A type nobody knows (RFC 9113, section 5.5).
        (0x42, 0x42, 1, b"extension"),
    ];
    for (kind, flags, stream, payload) in cases {
        client.send(&frame(kind, flags, stream, payload));
        let got = server.receive();
        assert_eq!(
            (got.kind, got.flags, got.stream, &got.payload[..]),
            (kind, flags, stream, payload)
        );
        server.send(&frame(kind, flags, stream, payload));
        let got = client.receive();
        assert_eq!(
            (got.kind, got.flags, got.stream, &got.payload[..]),
            (kind, flags, stream, payload)
        );
    }
    server.send(&frame(kind::HEADERS, END_HEADERS | END_STREAM, 1, &OK));
    assert_eq!(client.expect(kind::HEADERS).payload, OK);
}

#[test]
fn a_certificate_that_expires_on_an_open_connection_names_nobody_any_more() {
    let world = World::start(&[]);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock");
    let soon = rcgen::date_time_ymd(1970, 1, 1) + (now + Duration::from_secs(4));
    let brief = world
        .pki
        .client_with("brief", |params| params.not_after = soon)
        .expect("a certificate");
    let mut http1 = Peer::connect(&world.pki, RELAY, Some(&brief), b"http/1.1").expect("a handshake");
    http1.send(b"GET /one HTTP/1.1\r\nHost: kubernetes\r\n\r\n");
    let accepted = world.accept();
    assert!(accepted.head.contains("x-remote-user: brief"), "{}", accepted.head);
    let mut http1_server = accepted.peer;
    http1_server.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    http1.read_head();
    // It is in flight when the certificate expires, so the connection stays.
    let (mut client, mut server) = world.open(Some(&brief));
    client.send(&request(1, "/watch?watch=true"));
    assert_eq!(
        values(&fields(&server.expect(kind::HEADERS).payload), "x-remote-user"),
        ["brief"]
    );

    // The first request after that second is answered by the relay: nothing without a name goes over this connection.
    let over = || (SystemTime::now().duration_since(UNIX_EPOCH).ok()? > now + Duration::from_secs(5)).then_some(());
    wait_for(PATIENCE, over).expect("the clock goes on");
    client.send(&request(3, "/after"));
    let mut heard = Vec::new();
    let answer = loop {
        let frame = client.receive();
        if frame.stream == 3 {
            break frame;
        }
        heard.push(frame);
    };
    assert_eq!(answer.payload, [&[0x08, 3][..], b"401"].concat());
    let mut next = || {
        if heard.is_empty() {
            client.receive()
        } else {
            heard.remove(0)
        }
    };

    // It is told to go; its watch goes on, as it does directly, and new requests are asked elsewhere who they are.
    assert_eq!(next().word(0), 0x7fff_ffff);
    assert_eq!(next().kind, kind::PING);
    // It does not answer, and hears the last GOAWAY all the same: no new stream is served.
    assert_eq!(next().kind, kind::GOAWAY);
    client.send(&request(5, "/late"));
    assert_eq!(client.expect(kind::RST_STREAM).stream, 5);
    server.send(&frame(kind::HEADERS, END_HEADERS, 1, &OK));
    assert_eq!(client.expect(kind::HEADERS).stream, 1);

    http1.send(b"GET /two HTTP/1.1\r\nHost: kubernetes\r\n\r\n");
    let head = http1.read_head().to_ascii_lowercase();
    assert!(
        head.starts_with("http/1.1 401 ") && head.contains("connection: close"),
        "{head}"
    );
    // Over the front proxy's connection goes nothing that names nobody.
    assert!(
        http1_server.try_read(1).is_err(),
        "the apiserver hears the end, and no request"
    );
    assert!(http1_server.try_read(1).is_err(), "the server hears nothing of it");
    let (_, newer) = world.open(Some(&brief));
    assert!(!newer.certified, "a new connection names nobody");
}

#[test]
fn clients_refused_for_overload_are_counted_once_and_what_the_api_itself_says_is_none() {
    let world = World::start(&[]);
    let refused_total = || world.control("GET /v1/connections", "")["refused_total"].clone();
    assert_eq!(refused_total(), 0);
    let overload = block(&[
        (":status", "429"),
        ("retry-after", "1"),
        ("content-type", "text/plain; charset=utf-8"),
    ]);
    let starting = block(&[(":status", "503"), ("retry-after", "5")]);
    let forbidden = block(&[(":status", "429"), ("content-type", "application/json")]);
    // A watch cache that is not filled yet, as each client is told of it in its own type.
    let filling = |kind| block(&[(":status", "429"), ("retry-after", "1"), ("content-type", kind)]);
    for (answer, counted) in [
        (overload, 1),
        (starting, 2),
        (forbidden, 2),
        (filling("application/json"), 2),
        (filling("application/vnd.kubernetes.protobuf"), 2),
        (filling("Application/YAML"), 2),
    ] {
        let (mut client, mut server) = world.open(None);
        for stream in [1, 3, 5] {
            client.send(&request(stream, "/"));
            server.expect(kind::HEADERS);
            server.send(&frame(kind::HEADERS, END_HEADERS | END_STREAM, stream, &answer));
            assert_eq!(client.expect(kind::HEADERS).payload, answer, "it passes as it came");
        }
        assert_eq!(refused_total(), counted, "one client that is throttled is no overload");
    }

    let mut client = Peer::connect(&world.pki, RELAY, None, b"http/1.1").expect("a handshake");
    client.send(b"GET / HTTP/1.1\r\nHost: kubernetes\r\n\r\n");
    let mut server = world.accept().peer;
    server.send(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n");
    assert!(client.read_head().starts_with("HTTP/1.1 429 "));
    assert_eq!(refused_total(), 3);
    let mut client = Peer::connect(&world.pki, RELAY, None, b"http/1.1").expect("a handshake");
    client.send(b"GET / HTTP/1.1\r\nHost: kubernetes\r\n\r\n");
    let mut server = world.accept().peer;
    let filling = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n";
    server.send(filling);
    assert!(client.read_head().starts_with("HTTP/1.1 429 "));
    assert_eq!(refused_total(), 3, "nor over HTTP/1.1");
}
