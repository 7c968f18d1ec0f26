//! HTTP/1.1 through the relay: heads as they came, trailers that do not pass, and clients that are told to go.

use std::{fmt::Write as _, net::SocketAddr};

use rebalancer_tests::{
    h2wire::{PATIENCE, Peer},
    process::wait_for,
};

use crate::world::{RELAY, World};

const GET: &[u8] = b"GET /one HTTP/1.1\r\nHost: kubernetes\r\n\r\n";
const NO_CONTENT: &[u8] = b"HTTP/1.1 204 No Content\r\n\r\n";

fn connect(world: &World, user: Option<&str>) -> Peer {
    let pair = user.map(|user| world.pki.client(user, user, &[]).expect("a certificate"));
    Peer::connect(&world.pki, RELAY, pair.as_ref(), b"http/1.1").expect("a handshake")
}

/// A client whose first request has been answered, its upstream connection, and its own address.
fn served(world: &World) -> (Peer, Peer, SocketAddr) {
    let mut client = connect(world, None);
    client.send(GET);
    let mut server = world.accept().peer;
    server.send(NO_CONTENT);
    assert_eq!(client.read_head().as_bytes(), NO_CONTENT, "an answer passes as it came");
    let address = client.local();
    (client, server, address)
}

/// The fields of that name, in order.
fn values(head: &str, name: &str) -> Vec<String> {
    let fields = head.lines().skip(1).filter_map(|line| line.split_once(": "));
    let named = fields.filter(|(key, _)| key.eq_ignore_ascii_case(name));
    named.map(|(_, value)| value.to_owned()).collect()
}

#[test]
fn any_number_of_fields_passes_both_ways() {
    const GROUPS: usize = 300;
    const WARNINGS: usize = 250;
    let world = World::start(&[]);
    let mut client = connect(&world, Some("alice"));
    let mut request =
        "POST /exec HTTP/1.1\r\nHost: kubernetes\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n".to_owned();
    for group in 0..GROUPS {
        write!(
            request,
            "Impersonate-Group: CN=g{group},OU=Groups,DC=example,DC=test\r\n"
        )
        .expect("a string");
    }
    request.push_str("\r\n");
    client.send(request.as_bytes());
    let accepted = world.accept();
    let groups = values(&accepted.head, "impersonate-group");
    assert_eq!(groups.len(), GROUPS);
    assert_eq!(groups[GROUPS - 1], "CN=g299,OU=Groups,DC=example,DC=test");
    assert_eq!(values(&accepted.head, "x-remote-user"), ["alice"]);
    let mut server = accepted.peer;
    let mut answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n".to_owned();
    for warning in 0..WARNINGS {
        write!(answer, "Warning: 299 - \"{warning}\"\r\n").expect("a string");
    }
    answer.push_str("\r\n");
    server.send(answer.as_bytes());
    assert_eq!(client.read_head(), answer);
}

#[test]
fn a_head_larger_than_the_bound_is_refused_and_one_below_it_is_not() {
    let world = World::start(&["--max-header-bytes=65536"]);
    let head = |octets: usize| format!("GET / HTTP/1.1\r\nHost: a\r\nPadding: {}\r\n\r\n", "x".repeat(octets));
    let mut client = connect(&world, None);
    client.send(head(60_000).as_bytes());
    assert_eq!(values(&world.accept().head, "padding")[0].len(), 60_000);
    for request in [
        head(70_000),
        format!("GET / HTTP/1.1\r\n{}\r\n", "a:\r\n".repeat(2_000)),
    ] {
        let mut client = connect(&world, None);
        client.send(request.as_bytes());
        assert!(client.read_head().starts_with("HTTP/1.1 431 "));
    }
}

#[test]
fn targets_and_methods_pass_as_they_came() {
    let world = World::start(&[]);
    for line in [
        "pAtCh /a\"<>^`{|}\\%20?q=<1>#f HTTP/1.1",
        "OPTIONS * HTTP/1.1",
        "GET http://kubernetes/é HTTP/1.1",
    ] {
        let mut client = connect(&world, None);
        client.send(format!("{line}\r\nHost: kubernetes\r\n\r\n").as_bytes());
        assert_eq!(world.accept().head.lines().next(), Some(line));
    }
}

#[test]
fn trailers_and_what_asks_for_them_do_not_pass() {
    let world = World::start(&[]);
    let mut client = connect(&world, Some("alice"));
    client.send(
        b"POST /echo HTTP/1.1\r\nHost: kubernetes\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\n\
          Trailer: X-Remote-User, X-Remote-Group\r\nConnection: keep-alive, X-Remote-Group\r\n\r\n\
          3;x=y\r\nabc\r\n0\r\nX-Remote-User: root\r\nX-Remote-Group: system:masters\r\n\r\nGET /next HTTP/1.1\r\nHost: a\r\n\r\n",
    );
    let accepted = world.accept();
    let mut server = accepted.peer;
    assert_eq!(values(&accepted.head, "connection"), ["keep-alive"]);
    for gone in ["te", "trailer", "x-remote-group"] {
        assert!(values(&accepted.head, gone).is_empty(), "{}", accepted.head);
    }
    assert_eq!(values(&accepted.head, "x-remote-user"), ["alice"]);
    assert_eq!(server.read(13), b"3\r\nabc\r\n0\r\n\r\n");
    server.send(NO_CONTENT);
    client.read_head();
    // What came behind the body is the next request, and has an identity of its own.
    let head = server.read_head();
    assert!(head.starts_with("GET /next "), "{head}");
    assert_eq!(values(&head, "x-remote-user"), ["alice"]);
}

#[test]
fn a_line_too_much_is_skipped_behind_a_post_alone_as_go_does() {
    let world = World::start(&[]);
    for (first, too_much, passes) in [
        (
            "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx",
            "\r\n",
            true,
        ),
        (
            "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx",
            "\r\n\r\n\r\n",
            false,
        ),
        ("GET /a HTTP/1.1\r\nHost: a\r\n\r\n", "\r\n", false),
    ] {
        let mut client = connect(&world, None);
        client.send(first.as_bytes());
        let mut server = world.accept().peer;
        if first.starts_with("POST") {
            server.read(1);
        }
        server.send(NO_CONTENT);
        client.read_head();
        client.send(format!("{too_much}GET /b HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes());
        if passes {
            assert!(server.read_head().starts_with("GET /b "));
        } else {
            assert!(client.read_head().starts_with("HTTP/1.1 400 "), "{first}{too_much}");
        }
    }
}

#[test]
fn what_two_readers_could_take_differently_reaches_nobody() {
    let world = World::start(&[]);
    for request in [
        "GET / HTTP/1.1\r\nX-Remote-User : root\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nA: b\rX-Remote-User: root\r\n\r\n",
        "GET / HTTP/1.1 x\r\nHost: a\r\n\r\n",
    ] {
        let mut client = connect(&world, Some("alice"));
        client.send(request.as_bytes());
        let answer = client.read_head();
        assert!(answer.starts_with("HTTP/1.1 400 "), "{request:?}: {answer}");
    }
}

#[test]
fn an_early_answer_arrives_and_interim_ones_pass() {
    let world = World::start(&[]);
    let mut client = connect(&world, None);
    client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n");
    let mut server = world.accept().peer;
    server.send(b"HTTP/1.1 100 Continue\r\n\r\n");
    assert_eq!(client.read_head(), "HTTP/1.1 100 Continue\r\n\r\n");
    client.send(&[7; 1000]);
    assert_eq!(server.read(1000), [7; 1000]);
    let answer = "HTTP/1.1 413 Request Entity Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    server.send(answer.as_bytes());
    assert_eq!(client.read_head(), answer);
    assert!(client.try_read(1).is_err(), "and the connection ends");
}

#[test]
fn a_victim_hears_it_with_its_next_answer() {
    let world = World::start(&[]);
    let (mut client, mut server, address) = served(&world);
    assert_eq!(world.entry(address)["can_be_told"], true);
    assert_eq!(world.go_away(address), "pending");
    assert_eq!(world.entry(address)["state"], "active", "it has not been told yet");
    client.send(GET);
    server.read_head();
    server.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok");
    assert_eq!(
        client.read_head(),
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n"
    );
    assert_eq!(client.read(2), b"ok");
    assert!(client.try_read(1).is_err(), "the relay closes it");
    drop(client);
    let outcomes = wait_for(PATIENCE, || {
        let mut outcomes = world.control("GET /v1/outcomes?since=0", "");
        let list = outcomes["outcomes"].take();
        (list.as_array()?.len() == 2).then_some(list)
    })
    .expect("both outcomes");
    let kinds = [&outcomes[0]["outcome"], &outcomes[1]["outcome"]];
    assert_eq!(kinds, ["draining", "closed"]);
}

#[test]
fn a_stream_and_an_upgrade_are_never_broken_by_it() {
    let world = World::start(&[]);
    let (mut client, mut server, address) = served(&world);
    client.send(GET);
    server.read_head();
    server.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n");
    let head = client.read_head();
    assert_eq!(client.read(8), b"3\r\none\r\n");
    assert!(values(&head, "connection").is_empty());
    let told = wait_for(PATIENCE, || {
        (world.entry(address)["can_be_told"] == false).then_some(())
    });
    assert!(told.is_some(), "it streams");
    assert_eq!(world.go_away(address), "pending");
    server.send(b"3\r\ntwo\r\n0\r\n\r\n");
    assert_eq!(client.read(13), b"3\r\ntwo\r\n0\r\n\r\n");
    client.send(b"GET /exec HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n");
    server.read_head();
    let switched = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    server.send(switched.as_bytes());
    assert_eq!(client.read_head(), switched);
    let upgraded = wait_for(PATIENCE, || {
        (world.entry(address)["can_be_told"] == false).then_some(())
    });
    assert!(upgraded.is_some());
    assert_eq!(world.go_away(address), "not_h2");
    for _ in 0..3 {
        client.send(b"ping");
        assert_eq!(server.read(4), b"ping");
        server.send(b"pong");
        assert_eq!(client.read(4), b"pong");
    }
}

#[test]
fn a_relay_that_ends_answers_what_comes_and_cuts_at_the_deadline() {
    let mut world = World::start(&["--drain-deadline=6s"]);
    let (mut idle, mut idle_server, _) = served(&world);
    let (mut open, mut open_server, _) = served(&world);
    open.send(b"GET /logs?follow=true HTTP/1.1\r\nHost: a\r\n\r\n");
    open_server.read_head();
    open_server.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n");
    open.read_head();
    open.read(8);
    world.relay.signal(libc::SIGTERM);
    // A request that comes while the relay ends is served, and hears that it is the last.
    let closed = wait_for(PATIENCE, || std::net::TcpStream::connect(RELAY).err());
    assert!(closed.is_some(), "the port closes");
    idle.send(GET);
    idle_server.read_head();
    idle_server.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(values(&idle.read_head(), "connection"), ["close"]);
    // What lasts goes on until the deadline, and no longer.
    open_server.send(b"3\r\ntwo\r\n");
    assert_eq!(open.read(8), b"3\r\ntwo\r\n");
    assert!(open.try_read(1).is_err());
    drop((open, idle));
    let status = world.relay.terminate(PATIENCE).expect("it ends by itself");
    assert!(status.success(), "{status}");
}

#[test]
fn a_client_that_leaves_is_seen_by_the_server_and_so_is_the_servers_end() {
    let world = World::start(&[]);
    let mut client = connect(&world, None);
    client.send(b"GET /watch?watch=true HTTP/1.1\r\nHost: a\r\n\r\n");
    let mut server = world.accept().peer;
    server.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n");
    client.read_head();
    client.read(8);
    drop(client);
    assert!(
        server.try_read(1).is_err(),
        "the apiserver sees that nobody listens any more"
    );

    let (mut client, server, _) = served(&world);
    drop(server);
    assert!(client.try_read(1).is_err(), "an idle connection ends with its upstream");
}
