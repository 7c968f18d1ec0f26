//! Watches of a draining connection are handed over: they end between two events, on both sides, and nothing is lost.

use rebalancer_tests::h2wire::{END_HEADERS, END_STREAM, Frame, Peer, block, code, frame, kind, request};

use crate::world::World;

fn answer(stream: u32, content_type: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let mut fields = vec![(":status", "200"), ("content-type", content_type)];
    fields.extend(more);
    frame(kind::HEADERS, END_HEADERS, stream, &block(&fields))
}

/// Tells a client to go, through both phases.
fn drain(world: &World, client: &mut Peer) {
    assert_eq!(world.go_away(client.local()), "sent");
    client.expect(kind::GOAWAY);
    let ping = client.expect(kind::PING);
    client.send(&frame(kind::PING, 1, 0, &ping.payload));
    client.expect(kind::GOAWAY);
}

fn end_of(stream: u32) -> Frame {
    Frame {
        kind: kind::DATA,
        flags: END_STREAM,
        stream,
        payload: Vec::new(),
    }
}

#[test]
fn watches_end_between_events_and_others_are_left_alone() {
    let world = World::start(&["--watch-handover=0s"]);
    let (mut client, mut server) = world.open(None);
    let protobuf = "application/vnd.kubernetes.protobuf;stream=watch";
    let watches = [
        (1, "application/json", &[][..], &b"{\"type\":\"ADDED\"}\n"[..], true),
        (3, protobuf, &[], b"\0\0\0\x05event", true),
        (5, "application/json", &[], b"", true),
        (7, "application/cbor-seq", &[], b"\xd9\xd9\xf7", false),
        (
            9,
            "application/json",
            &[("content-encoding", "gzip")],
            b"\x1f\x8b\n",
            false,
        ),
        (11, "application/json", &[], b"{\"type\":", false),
        (13, protobuf, &[], b"\0\0\0\x05eve\n", false),
    ];
    for (stream, content_type, more, data, _) in watches {
        client.send(&request(stream, "/api/v1/pods?watch=true&resourceVersion=5"));
        assert_eq!(server.expect(kind::HEADERS).stream, stream);
        server.send(&answer(stream, content_type, more));
        server.send(&frame(kind::DATA, 0, stream, data));
        assert_eq!(client.expect(kind::HEADERS).stream, stream);
        assert_eq!(client.expect(kind::DATA).payload, data);
    }
    // Not a watch: it is served to its own end.
    client.send(&request(15, "/api/v1/pods"));
    server.expect(kind::HEADERS);
    server.send(&answer(15, "application/json", &[]));
    client.expect(kind::HEADERS);
    drain(&world, &mut client);

    for stream in [1, 3, 5] {
        assert_eq!(client.receive(), end_of(stream));
        let reset = server.expect(kind::RST_STREAM);
        assert_eq!((reset.stream, reset.word(0)), (stream, code::CANCEL));
    }
    // What was on its way stays with the relay, and its window goes back on the connection.
    server.send(&frame(kind::DATA, 0, 1, b"{}\n"));
    let window = server.expect(kind::WINDOW_UPDATE);
    assert_eq!((window.stream, window.word(0)), (0, 3));
    // Those inside an event end with it.
    server.send(&frame(kind::DATA, 0, 11, b"\"ADDED\"}\n"));
    assert_eq!(client.expect(kind::DATA).payload, b"\"ADDED\"}\n");
    assert_eq!(client.receive(), end_of(11));
    assert_eq!(server.expect(kind::RST_STREAM).stream, 11);
    server.send(&frame(kind::DATA, 0, 13, b"t"));
    assert_eq!(client.expect(kind::DATA).payload, b"t");
    assert_eq!(client.receive(), end_of(13));
    assert_eq!(server.expect(kind::RST_STREAM).stream, 13);
    // The rest goes on.
    for stream in [7, 9, 15] {
        server.send(&frame(kind::DATA, 0, stream, b"\n"));
        assert_eq!(client.receive().stream, stream);
        server.send(&frame(kind::DATA, END_STREAM, stream, b""));
        assert_eq!(client.receive(), end_of(stream));
    }
    assert_eq!(client.rest(), []);
}

#[test]
fn without_the_flag_and_before_goaway_every_watch_is_left_alone() {
    for flags in [&[][..], &["--watch-handover=0s"]] {
        let world = World::start(flags);
        let (mut client, mut server) = world.open(None);
        client.send(&request(1, "/api/v1/pods?watch=true&resourceVersion=5"));
        server.expect(kind::HEADERS);
        server.send(&answer(1, "application/json", &[]));
        client.expect(kind::HEADERS);
        if flags.is_empty() {
            drain(&world, &mut client);
        }
        // A sign of life that takes longer than a hand-over would: the sweep has seen the connection since.
        for _ in 0..3 {
            server.send(&frame(kind::DATA, 0, 1, b"{}\n"));
            assert_eq!(client.expect(kind::DATA).payload, b"{}\n");
            client.impatient(std::time::Duration::from_secs(1));
            assert!(client.try_next().is_err(), "nothing ends the watch");
            client.impatient(rebalancer_tests::h2wire::PATIENCE);
        }
        assert_eq!(world.connections()[0]["open_watches"], 1);
    }
}

#[test]
fn a_relay_that_ends_hands_its_watches_over_first() {
    let mut world = World::start(&["--watch-handover=1s"]);
    let (mut client, mut server) = world.open(None);
    client.send(&request(1, "/api/v1/pods?watch=true&resourceVersion=5"));
    server.expect(kind::HEADERS);
    server.send(&answer(1, "application/json", &[]));
    client.expect(kind::HEADERS);
    world.relay.signal(libc::SIGTERM);
    client.expect(kind::GOAWAY);
    let ping = client.expect(kind::PING);
    client.send(&frame(kind::PING, 1, 0, &ping.payload));
    client.expect(kind::GOAWAY);
    assert_eq!(client.receive(), end_of(1));
    assert_eq!(client.rest(), []);
    drop(client);
    let status = world
        .relay
        .terminate(rebalancer_tests::h2wire::PATIENCE)
        .expect("it ends");
    assert!(status.success(), "{status}");
}
