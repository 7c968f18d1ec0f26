//! Clients that mean harm: the relay's memory stays bounded, and others are served meanwhile.
//!
//! The bounds are far below what is offered and far above what a healthy connection needs.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use rebalancer_tests::{
    abuse::{bomb, made_you_reset},
    h2wire::{END_HEADERS, END_STREAM, Frame, PATIENCE, Peer, code, frame, get, integer, kind, request},
    process::{tail, wait_for},
};

use crate::world::{OK, RELAY, World};

/// What one misbehaving connection may cost: twice 64 KiB that wait, TLS's buffers, and a build without optimisation.
const BOUND_KIB: u64 = 4 * 1024;

/// How long no octet is taken before a flood counts as held back.
const HELD_BACK: Duration = Duration::from_secs(2);

/// How much a flood offers.
const OFFER: usize = 64 << 20;

/// Sends the same octets until [`OFFER`] is gone, or the other side holds them back or ends the connection.
fn flood(client: &mut Peer, octets: &[u8], mut between: impl FnMut()) -> usize {
    client.impatient(HELD_BACK);
    let piece = octets.repeat((1 << 18) / octets.len() + 1);
    let mut taken = 0;
    while taken < OFFER {
        if client.try_send(&piece).is_err() {
            break;
        }
        taken += piece.len();
        between();
    }
    taken
}

/// Floods a relay whose apiserver does not read, and sees that both memory and bystanders are well.
fn flood_is_bounded(octets: &[u8]) {
    let world = World::start(&[]);
    let mut bystander = world.bystander();
    let (mut client, _server) = world.open(None);
    let before = world.resident_kib();
    let mut worst = 0;
    let taken = flood(&mut client, octets, || {
        bystander.is_served();
        worst = worst.max(world.resident_kib().saturating_sub(before));
    });
    bystander.is_served();
    worst = worst.max(world.resident_kib().saturating_sub(before));
    assert!(
        taken < OFFER,
        "all {taken} octets were taken although nobody reads them"
    );
    assert!(worst < BOUND_KIB, "{worst} KiB more after {taken} octets");
}

#[test]
fn a_flood_of_settings_is_held_back() {
    flood_is_bounded(&frame(kind::SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]));
}

#[test]
fn a_flood_of_pings_is_held_back() {
    flood_is_bounded(&frame(kind::PING, 0, 0, b"12345678"));
}

#[test]
fn a_flood_of_empty_data_is_held_back() {
    flood_is_bounded(&frame(kind::DATA, 0, 1, b""));
}

#[test]
fn a_flood_of_window_updates_and_priorities_is_held_back() {
    let both = [
        frame(kind::WINDOW_UPDATE, 0, 1, &1_u32.to_be_bytes()),
        frame(kind::PRIORITY, 0, 1, &[0, 0, 0, 0, 1]),
    ];
    flood_is_bounded(&both.concat());
}

#[test]
fn a_rapid_reset_reaches_the_apiserver_slowly_and_leaves_nothing_behind() {
    /// What is free at once, and some that are not.
    const ROUNDS: u32 = 400;
    let world = World::start(&[]);
    let mut bystander = world.bystander();
    let (mut client, mut server) = world.open(None);
    let before = world.resident_kib();
    let reading = std::thread::spawn(move || {
        let mut seen = (0_u32, 0_u32);
        while let Some(frame) = server.try_next().expect("frames in time") {
            match frame.kind {
                kind::HEADERS => seen.0 += 1,
                kind::RST_STREAM => seen.1 += 1,
                _ => {}
            }
            if seen == (ROUNDS, ROUNDS) {
                break;
            }
        }
        (server, seen)
    });
    for round in 0..ROUNDS {
        let stream = round * 2 + 1;
        let reset = frame(kind::RST_STREAM, 0, stream, &code::CANCEL.to_be_bytes());
        client.send(&[request(stream, "/"), reset].concat());
        if round % 100 == 0 {
            bystander.is_served();
        }
    }
    let (_server, seen) = reading.join().expect("the server's script");
    assert_eq!(
        seen,
        (ROUNDS, ROUNDS),
        "every reset passes: the apiserver counts them itself"
    );
    let entry = wait_for(PATIENCE, || {
        let id = world.id_of(client.local());
        let all = world.connections();
        all.into_iter()
            .find(|entry| entry["id"] == id.as_str() && entry["open_streams"] == 0)
    });
    assert!(entry.is_some(), "no stream stays in the relay's books");
    let grown = world.resident_kib().saturating_sub(before);
    assert!(grown < BOUND_KIB, "{grown} KiB more");
    bystander.is_served();
}

/// Frames that have the server work and bring their sender nothing: it hears of what is free, and of little more.
#[test]
fn whoever_floods_is_slowed_and_nobody_else() {
    const FREE: usize = 250;
    const SENT: usize = 20_000;
    /// What one read brings goes on before it is known to be too much: frames without a payload.
    const READ: usize = 32 * 1024 / 9;
    let unknown = frame(0x42, 0, 0, b"12345678");
    let ping = frame(kind::PING, 0, 0, b"12345678");
    let update = frame(kind::WINDOW_UPDATE, 0, 1, &1_u32.to_be_bytes());
    let priority = frame(kind::PRIORITY, 0, 1, &[0, 0, 0, 0, 1]);
    let settings = frame(kind::SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]);
    let data = frame(kind::DATA, 0, 1, b"");
    let world = World::start(&[]);
    let mut bystander = world.bystander();
    for one in [unknown, ping, update, priority, settings, data] {
        let (mut client, mut server) = world.open(None);
        client.send(&frame(kind::HEADERS, END_HEADERS, 1, &get("/")));
        server.expect(kind::HEADERS);
        // At once, so that all of it is there to be read.
        client.send(&one.repeat(SENT));
        let mut heard = 0;
        let began = Instant::now();
        while heard < FREE {
            heard += usize::from(server.receive().kind == one[3]);
        }
        // Whoever asks for an answer is given none before its turn.
        server.impatient(Duration::from_millis(500));
        while let Ok(Some(got)) = server.try_next() {
            heard += usize::from(got.kind == one[3]);
        }
        let seconds = began.elapsed().as_secs() as usize + 6;
        assert!(
            heard <= READ + FREE + 100 * seconds,
            "{heard} of kind {} in {seconds} s",
            one[3]
        );
        bystander.is_served();
    }
    let said = wait_for(PATIENCE, || {
        world.relay.log().contains("brings it nothing").then_some(())
    });
    assert!(said.is_some(), "the log does not say so:\n{}", tail(&world.relay.log()));
}

#[test]
fn a_server_that_is_made_to_reset_streams_leaves_nothing_behind_and_others_are_served() {
    const ROUNDS: u32 = 300;
    const AT_ONCE: u32 = 100;
    let world = World::start(&[]);
    let mut bystander = world.bystander();
    let before = world.resident_kib();
    for (at, (name, _)) in made_you_reset(1).iter().enumerate() {
        let (mut client, mut server) = world.open(None);
        // A server as those that fell for it: it resets at the frame, and works on.
        let serving = std::thread::spawn(move || {
            let (mut requests, mut last_reset) = (0, 0);
            while let Ok(Some(got)) = server.try_next() {
                match got.kind {
                    kind::HEADERS => requests += 1,
                    kind::WINDOW_UPDATE | kind::PRIORITY | kind::DATA if got.stream > last_reset => {
                        last_reset = got.stream;
                        server.send(&frame(
                            kind::RST_STREAM,
                            0,
                            got.stream,
                            &code::PROTOCOL_ERROR.to_be_bytes(),
                        ));
                    }
                    _ => {}
                }
            }
            requests
        });
        for first in (0..ROUNDS).step_by(AT_ONCE as usize) {
            let streams = (first..first + AT_ONCE).map(|round| round * 2 + 1);
            let last = first * 2 + AT_ONCE * 2 - 1;
            let attack =
                streams.flat_map(|stream| [request(stream, "/"), made_you_reset(stream)[at].1.clone()].concat());
            client.send(&attack.collect::<Vec<u8>>());
            let is_last = |frame: Frame| (frame.kind, frame.stream) == (kind::RST_STREAM, last);
            while !is_last(client.receive()) {}
            bystander.is_served();
        }
        let entry = world.entry(client.local());
        assert_eq!(
            (&entry["requests"], &entry["open_streams"]),
            (&ROUNDS.into(), &0.into()),
            "{name}"
        );
        drop(client);
        assert_eq!(
            serving.join().expect("the server's script"),
            ROUNDS,
            "{name}: the apiserver counts them itself"
        );
        bystander.is_served();
    }
    let grown = world.resident_kib().saturating_sub(before);
    assert!(grown < 2 * BOUND_KIB, "{grown} KiB more");
}

#[test]
fn streams_that_are_opened_without_end_end_the_connection() {
    let world = World::start(&[]);
    let mut bystander = world.bystander();
    let (mut client, mut server) = world.open(None);
    let reading = std::thread::spawn(move || server.rest().len());
    let before = world.resident_kib();
    for stream in (1..10_000_u32).step_by(2) {
        client.send(&request(stream, "/"));
    }
    let last = client.rest().pop().expect("a GOAWAY");
    assert_eq!((last.kind, last.word(4)), (kind::GOAWAY, code::ENHANCE_YOUR_CALM));
    drop(client);
    let passed = reading.join().expect("the server's script");
    assert!(passed < 5_000, "all {passed} streams were passed on");
    let grown = world.resident_kib().saturating_sub(before);
    assert!(grown < BOUND_KIB, "{grown} KiB more");
    bystander.is_served();
}

#[test]
fn continuation_without_end_ends_the_connection() {
    let world = World::start(&["--max-header-bytes=65536"]);
    let mut bystander = world.bystander();
    let before = world.resident_kib();
    for payload in [&[0x82_u8; 1000][..], &[]] {
        let continuation = frame(kind::CONTINUATION, 0, 1, payload);
        let (mut client, _server) = world.open(None);
        client.send(&frame(kind::HEADERS, 0, 1, &get("/")));
        // Twice the bound may come: a list that is a little larger is answered 431.
        client.send(&continuation.repeat(2 * 65_536 / continuation.len() + 1));
        let last = client.rest().pop().expect("a GOAWAY");
        assert_eq!((last.kind, last.word(4)), (kind::GOAWAY, code::ENHANCE_YOUR_CALM));

        // One that goes on all the same is cut off.
        let (mut client, _server) = world.open(None);
        client.send(&frame(kind::HEADERS, 0, 1, &get("/")));
        let taken = flood(&mut client, &continuation, || bystander.is_served());
        assert!(taken < OFFER, "{taken} octets of one header block were taken");
        bystander.is_served();
    }
    let grown = world.resident_kib().saturating_sub(before);
    assert!(grown < BOUND_KIB, "{grown} KiB more");
}

#[test]
fn header_bombs_cost_no_more_than_the_bound_however_many_there_are() {
    const BOMBERS: usize = 20;
    let world = World::start(&["--max-header-bytes=65536"]);
    let mut bystander = world.bystander();
    let before = world.resident_kib();
    for _ in 0..BOMBERS {
        let (mut client, _server) = world.open(None);
        // 16 KB that stand for 48 MB are answered 431, as Go does, and again each time: what the first put into the table
        // is there for the others.
        let first = [&get("/")[..], &bomb(12_000)].concat();
        client.send(&frame(kind::HEADERS, END_STREAM | END_HEADERS, 1, &first));
        let again = [&get("/")[..], &[0xbe; 12_000]].concat();
        for stream in [3, 5] {
            client.send(&frame(kind::HEADERS, END_STREAM | END_HEADERS, stream, &again));
        }
        for stream in [1, 3, 5] {
            let answer = client.expect(kind::HEADERS);
            assert_eq!((answer.stream, &answer.payload[..]), (stream, &b"\x08\x03431"[..]));
        }
        bystander.is_served();
    }
    let grown = world.resident_kib().saturating_sub(before);
    assert!(grown < 2 * BOUND_KIB, "{grown} KiB more after {BOMBERS} bombs");
}

/// A field of 4 KB in the client's table, which each octet of later requests then names again. One that the relay merges
/// into a field of its own would be said anew each time.
#[test]
fn small_blocks_that_stand_for_large_ones_cost_no_more_than_there_is_room() {
    const BOMBERS: u64 = 20;
    let world = World::start(&[]);
    let mut bystander = world.bystander();
    for name in ["x-large", "x-forwarded-for"] {
        let mut first = get("/");
        first.extend([0x40, u8::try_from(name.len()).expect("a short name")]);
        first.extend(name.as_bytes());
        integer(4000, 7, &mut first);
        first.extend([b'1'; 4000]);
        let mut bomb = frame(kind::HEADERS, END_STREAM | END_HEADERS, 1, &first);
        // GET https://…/ by the static table, and index 62, the newest entry of the dynamic one.
        let small = [&[0x82, 0x87, 0x84][..], &[0xbe; 12]].concat();
        for stream in (3..4000).step_by(2) {
            bomb.extend(frame(kind::HEADERS, END_STREAM | END_HEADERS, stream, &small));
        }
        let before = world.resident_kib();
        let mut worst = 0;
        let _held: Vec<_> = (0..BOMBERS)
            .map(|_| {
                let (mut client, server) = world.open(None);
                // The relay may end it.
                let _ = client.try_send(&bomb);
                bystander.is_served();
                worst = worst.max(world.resident_kib().saturating_sub(before));
                (client, server)
            })
            .collect();
        assert!(
            worst < BOMBERS * 512,
            "{worst} KiB more after {BOMBERS} times {} octets",
            bomb.len()
        );
    }
}

#[test]
fn a_client_that_opens_its_window_and_reads_nothing_is_held_back() {
    let world = World::start(&[]);
    let mut bystander = world.bystander();
    let (mut client, mut server) = world.open(None);
    // Windows of 2^31-1, on the connection and on every stream (RFC 9113, section 6.9.2).
    client.send(&frame(kind::SETTINGS, 0, 0, &[0, 4, 0x7f, 0xff, 0xff, 0xff]));
    client.send(&frame(kind::WINDOW_UPDATE, 0, 0, &0x7fff_0000_u32.to_be_bytes()));
    client.send(&request(1, "/large"));
    for expected in [kind::SETTINGS, kind::WINDOW_UPDATE, kind::HEADERS] {
        server.expect(expected);
    }
    server.send(&frame(kind::HEADERS, END_HEADERS, 1, &OK));
    let before = world.resident_kib();
    let mut worst = 0;
    let taken = flood(&mut server, &frame(kind::DATA, 0, 1, &[0; 16_384]), || {
        bystander.is_served();
        worst = worst.max(world.resident_kib().saturating_sub(before));
    });
    bystander.is_served();
    assert!(
        taken < OFFER,
        "all {taken} octets were taken although the client reads nothing"
    );
    assert!(worst < BOUND_KIB, "{worst} KiB more after {taken} octets");
}

#[test]
fn requests_in_single_octets_are_served_and_hold_nobody_up() {
    let world = World::start(&[]);
    let mut bystander = world.bystander();
    let (mut client, mut server) = world.open(None);
    for octet in request(1, "/slow") {
        client.send(&[octet]);
        if octet == b'/' {
            bystander.is_served();
        }
    }
    assert_eq!(server.expect(kind::HEADERS).stream, 1);
    for octet in frame(kind::HEADERS, END_STREAM | END_HEADERS, 1, &OK) {
        server.send(&[octet]);
    }
    assert_eq!(client.expect(kind::HEADERS).stream, 1);
    bystander.is_served();
}

#[test]
fn handshakes_that_never_end_are_ended_and_cost_little() {
    const HALF_OPEN: usize = 300;
    let world = World::start(&["--handshake-timeout=3s"]);
    let mut bystander = world.bystander();
    let before = world.resident_kib();
    let sockets: Vec<TcpStream> = (0..HALF_OPEN)
        .map(|index| {
            let mut socket = TcpStream::connect(RELAY).expect("the port is open");
            socket.set_read_timeout(Some(PATIENCE)).expect("a socket option");
            if index % 2 == 0 {
                // The beginning of a ClientHello of 512 octets.
                socket
                    .write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252])
                    .expect("room for nine octets");
            }
            socket
        })
        .collect();
    bystander.is_served();
    let mut newcomer = world.bystander();
    let grown = world.resident_kib().saturating_sub(before);
    assert!(
        grown < 3 * BOUND_KIB,
        "{grown} KiB for {HALF_OPEN} half-open handshakes"
    );
    for mut socket in sockets {
        let mut end = Vec::new();
        // A reset is an end too.
        let _ = socket.read_to_end(&mut end);
    }
    newcomer.is_served();
    bystander.is_served();
    let left = wait_for(PATIENCE, || (world.connections().len() == 2).then_some(()));
    assert!(
        left.is_some(),
        "{} connections are still listed",
        world.connections().len()
    );
}

#[test]
fn more_connections_than_allowed_are_refused_and_the_others_stay() {
    let world = World::start(&["--max-connections=2"]);
    let mut first = world.bystander();
    let mut second = world.bystander();
    let mut refused = TcpStream::connect(RELAY).expect("the port is open");
    refused.set_read_timeout(Some(PATIENCE)).expect("a socket option");
    let mut end = Vec::new();
    let _ = refused.read_to_end(&mut end);
    assert!(end.is_empty(), "it is closed without a word");
    first.is_served();
    second.is_served();
}

#[test]
fn strangers_do_not_keep_out_those_who_have_a_certificate_nor_fill_the_log() {
    const PLACES: usize = 10;
    let world = World::start(&["--max-connections=10", "--handshake-timeout=3s"]);
    let alice = world.pki.client("alice", "alice", &[]).expect("a certificate");
    // One address may have three quarters of what strangers may have: six of eight.
    let strangers: Vec<_> = (0..6).map(|_| world.open(None)).collect();
    for _ in 0..50 {
        let mut refused = Peer::connect(&world.pki, RELAY, None, b"h2").expect("TLS is for everybody");
        refused.begin_client(&[]);
        assert!(refused.rest().is_empty(), "it is closed without a word");
    }
    // Nor do those who never finish.
    let silent: Vec<_> = (0..100).filter_map(|_| TcpStream::connect(RELAY).ok()).collect();
    let (mut client, mut server) = world.open(Some(&alice));
    client.send(&request(1, "/"));
    server.expect(kind::HEADERS);
    server.send(&frame(kind::HEADERS, END_STREAM | END_HEADERS, 1, &OK));
    assert_eq!(client.expect(kind::HEADERS).stream, 1);
    assert!(
        world.connections().len() <= PLACES + 16,
        "unfinished ones have a bound of their own"
    );
    let log = world.relay.log();
    let lines = log.lines().filter(|line| line.contains("there is no place")).count();
    assert!((1..=5).contains(&lines), "{lines} lines for 50 refusals");
    drop((strangers, silent));
}

#[test]
fn the_apiserver_hears_nothing_of_a_client_that_says_nothing() {
    let world = World::start(&[]);
    let silent: Vec<_> = (0..20)
        .map(|_| Peer::connect(&world.pki, RELAY, None, b"h2").expect("a handshake"))
        .collect();
    // Whoever speaks is the first that the apiserver sees.
    let (mut client, mut server) = world.open(None);
    client.send(&request(1, "/first"));
    server.expect(kind::HEADERS);
    assert_eq!(world.connections().len(), 21);
    drop(silent);
}

#[test]
fn a_user_agent_costs_no_more_than_what_is_shown_of_it() {
    const CLIENTS: usize = 20;
    let world = World::start(&[]);
    let mut bystander = world.bystander();
    let before = world.resident_kib();
    let agent = "x".repeat(500_000);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let mut client = Peer::connect(&world.pki, RELAY, None, b"http/1.1").expect("a handshake");
            client.send(format!("GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: {agent}\r\n\r\n").as_bytes());
            let mut server = world.accept().peer;
            server.send(b"HTTP/1.1 204 No Content\r\n\r\n");
            client.read_head();
            (client, server)
        })
        .collect();
    let shown = world.entry(clients[0].0.local())["user_agent"].as_str().map(str::len);
    assert_eq!(shown, Some(256));
    let grown = world.resident_kib().saturating_sub(before);
    assert!(grown < 2 * BOUND_KIB, "{grown} KiB more for {CLIENTS} clients");
    bystander.is_served();
}

#[test]
fn refused_streams_without_end_are_bounded_although_the_server_stops_inside_a_frame() {
    let world = World::start(&[]);
    let mut bystander = world.bystander();
    let (mut client, mut server) = world.open(None);
    client.send(&request(1, "/"));
    server.expect(kind::HEADERS);
    world.go_away(client.local());
    client.expect(kind::GOAWAY);
    let ping = client.expect(kind::PING);
    client.send(&frame(kind::PING, 1, 0, &ping.payload));
    client.expect(kind::GOAWAY);
    // From here on the relay has no place for a frame of its own.
    let data = frame(kind::DATA, 0, 1, &[0; 1000]);
    server.send(&data[..100]);
    let before = world.resident_kib();
    let mut stream = 1;
    client.impatient(HELD_BACK);
    let block = get("/");
    let mut offered = 0;
    while offered < OFFER {
        let mut piece = Vec::new();
        for _ in 0..1000 {
            stream += 2;
            piece.extend(frame(kind::HEADERS, END_STREAM | END_HEADERS, stream, &block));
        }
        offered += piece.len();
        if client.try_send(&piece).is_err() {
            break;
        }
    }
    let grown = world.resident_kib().saturating_sub(before);
    assert!(offered < OFFER, "every refused stream was taken");
    assert!(grown < BOUND_KIB, "{grown} KiB more");
    bystander.is_served();
}

#[test]
fn a_long_literal_is_bounded_before_it_is_whole() {
    let world = World::start(&["--max-header-bytes=65536"]);
    let mut bystander = world.bystander();
    let (mut client, _server) = world.open(None);
    let mut begun = vec![0x00, 1, b'a'];
    integer(1 << 24, 7, &mut begun);
    client.send(&frame(kind::HEADERS, 0, 1, &begun));
    client.send(&frame(kind::CONTINUATION, 0, 1, &[b'a'; 16_384]).repeat(8));
    let last = client.rest().pop().expect("a GOAWAY");
    assert_eq!((last.kind, last.word(4)), (kind::GOAWAY, code::ENHANCE_YOUR_CALM));
    bystander.is_served();
}
