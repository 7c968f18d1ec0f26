//! GOAWAY in two phases (RFC 9113, section 6.8), as both sides see it.

use rebalancer_tests::{
    h2wire::{END_HEADERS, END_STREAM, PATIENCE, code, frame, kind, request},
    process::wait_for,
};

use crate::world::{OK, World};

/// 2^31-1: the highest stream id there is.
const HIGHEST: u32 = 0x7fff_ffff;

#[test]
fn goaway_comes_in_two_phases_and_no_stream_is_lost() {
    let world = World::start(&[]);
    let (mut client, mut server) = world.open(None);
    client.send(&request(1, "/first"));
    assert_eq!(server.expect(kind::HEADERS).stream, 1);

    assert_eq!(world.go_away(client.local()), "sent");
    let announced = client.expect(kind::GOAWAY);
    assert_eq!((announced.word(0), announced.word(4)), (HIGHEST, code::NO_ERROR));
    let ping = client.expect(kind::PING);
    assert_eq!((ping.flags, ping.payload.len()), (0, 8));
    assert_eq!(world.go_away(client.local()), "already_draining");

    // A request that crossed the GOAWAY on the wire is served; the answer to the PING stays with the relay.
    client.send(&request(3, "/crossed"));
    client.send(&frame(kind::PING, 1, 0, &ping.payload));
    assert_eq!(server.expect(kind::HEADERS).stream, 3);
    let last = client.expect(kind::GOAWAY);
    assert_eq!((last.word(0), last.word(4)), (3, code::NO_ERROR));

    // A later one is refused, which tells the client that it may be sent elsewhere.
    client.send(&request(5, "/late"));
    let refused = client.expect(kind::RST_STREAM);
    assert_eq!((refused.stream, refused.word(0)), (5, code::REFUSED_STREAM));

    // A PING of the client's own still goes through, with its answer.
    client.send(&frame(kind::PING, 0, 0, b"clients!"));
    assert_eq!(server.expect(kind::PING).payload, b"clients!");
    server.send(&frame(kind::PING, 1, 0, b"clients!"));
    assert_eq!(client.expect(kind::PING).flags, 1);

    server.send(&frame(kind::HEADERS, END_HEADERS, 1, &OK));
    server.send(&frame(kind::DATA, END_STREAM, 1, b"first"));
    server.send(&frame(kind::HEADERS, END_HEADERS | END_STREAM, 3, &OK));
    assert_eq!(client.expect(kind::HEADERS).stream, 1);
    assert_eq!(client.expect(kind::DATA).payload, b"first");
    assert_eq!(client.expect(kind::HEADERS).stream, 3);
    assert_eq!(client.rest(), [], "then the connection ends in order");
    client.shut_down();
    assert_eq!(server.rest(), []);

    let outcomes = wait_for(PATIENCE, || {
        let mut outcomes = world.control("GET /v1/outcomes?since=0", "");
        let list = outcomes["outcomes"].take();
        (list.as_array()?.len() == 2).then_some(list)
    })
    .expect("both outcomes");
    assert_eq!(
        (&outcomes[0]["outcome"], &outcomes[1]["outcome"]),
        (&"draining".into(), &"closed".into())
    );
    assert_eq!(outcomes[1]["reason"], "drained");
}

#[test]
fn the_relays_frames_never_land_inside_the_servers() {
    let world = World::start(&[]);
    let (mut client, mut server) = world.open(None);
    client.send(&request(1, "/"));
    server.expect(kind::HEADERS);
    // Half a header block, then half a frame: GOAWAY fits in neither.
    server.send(&frame(kind::HEADERS, 0, 1, &OK));
    client.expect(kind::HEADERS);
    world.go_away(client.local());
    let data = frame(kind::DATA, END_STREAM, 1, b"0123456789");
    server.send(&[&frame(kind::CONTINUATION, END_HEADERS, 1, &[]), &data[..12]].concat());
    assert_eq!(client.expect(kind::CONTINUATION).stream, 1);
    client.expect(kind::GOAWAY);
    client.expect(kind::PING);
    server.send(&data[12..]);
    assert_eq!(client.expect(kind::DATA).payload, b"0123456789");
}

#[test]
fn a_relay_that_ends_tells_everybody_and_serves_what_is_open() {
    let mut world = World::start(&[]);
    let (mut client, mut server) = world.open(None);
    client.send(&request(1, "/watch?watch=true"));
    server.expect(kind::HEADERS);
    world.relay.signal(libc::SIGTERM);
    assert_eq!(client.expect(kind::GOAWAY).word(0), HIGHEST);
    let ping = client.expect(kind::PING);
    client.send(&frame(kind::PING, 1, 0, &ping.payload));
    assert_eq!(client.expect(kind::GOAWAY).word(0), 1);
    server.send(&frame(kind::HEADERS, END_HEADERS, 1, &OK));
    server.send(&frame(kind::DATA, END_STREAM, 1, b"event\n"));
    assert_eq!(client.expect(kind::HEADERS).stream, 1);
    assert_eq!(client.expect(kind::DATA).payload, b"event\n");
    assert_eq!(client.rest(), []);
    drop(client);
    let status = world.relay.terminate(PATIENCE).expect("it ends by itself");
    assert!(status.success(), "{status}");
}

#[test]
fn the_servers_own_goaway_passes_unchanged() {
    let world = World::start(&[]);
    let (mut client, mut server) = world.open(None);
    client.send(&request(1, "/"));
    server.expect(kind::HEADERS);
    let told = [1_u32.to_be_bytes(), code::NO_ERROR.to_be_bytes()].concat();
    server.send(&frame(kind::GOAWAY, 0, 0, &told));
    assert_eq!(client.expect(kind::GOAWAY).payload, told);
    assert_eq!(world.go_away(client.local()), "already_draining");
    server.send(&frame(kind::HEADERS, END_HEADERS | END_STREAM, 1, &OK));
    assert_eq!(client.expect(kind::HEADERS).stream, 1);
}
