//! A new relay takes the listening socket over: no connection is lost, and the old one drains.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::TcpStream,
    os::unix::net::{UnixListener, UnixStream},
};

use rebalancer_tests::{
    h2wire::{END_HEADERS, END_STREAM, PATIENCE, Peer, frame, kind, request},
    process::{Process, tail, wait_for},
};

use crate::world::{OK, RELAY, UPSTREAM, World, serve};

fn ends(relay: &mut Process) {
    let ended = wait_for(PATIENCE, || relay.is_running().err());
    let said = format!("{:#}", ended.expect("the old relay ends by itself"));
    assert!(said.contains("exit status: 0"), "{said}");
}

#[test]
fn restarts_under_a_storm_of_connections_lose_none() {
    const RESTARTS: usize = 3;
    let mut world = World::answering(&[]);
    let storm = world.storm(4);
    let wait_for_more = |more: u64| {
        let target = storm.served() + more;
        wait_for(PATIENCE, || {
            (storm.served() >= target || storm.failed() > 0).then_some(())
        })
        .expect("the storm goes on");
    };
    wait_for_more(100);
    for round in 0..RESTARTS {
        let instance = world.control("GET /v1/connections", "")["instance"].clone();
        let newer = world.start_another(&format!("relay-{round}"), RELAY);
        let mut older = std::mem::replace(&mut world.relay, newer);
        ends(&mut older);
        wait_for_more(100);
        assert_ne!(
            world.control("GET /v1/connections", "")["instance"],
            instance,
            "another process answers"
        );
    }
    let outcome = storm.end();
    assert_eq!((outcome.failed, &outcome.errors[..]), (0, &[][..]), "{outcome:?}");
}

#[test]
fn the_old_relay_serves_what_is_open_and_tells_its_clients_to_go() {
    let mut world = World::start(&[]);
    let (mut client, mut server) = world.open(None);
    client.send(&request(1, "/slow"));
    server.expect(kind::HEADERS);
    let newer = world.start_another("newer", RELAY);
    let mut older = std::mem::replace(&mut world.relay, newer);
    client.expect(kind::GOAWAY);
    let ping = client.expect(kind::PING);
    client.send(&frame(kind::PING, 1, 0, &ping.payload));
    assert_eq!(client.expect(kind::GOAWAY).word(0), 1);
    let mut bystander = world.bystander();
    server.send(&frame(kind::HEADERS, END_HEADERS | END_STREAM, 1, &OK));
    assert_eq!(client.expect(kind::HEADERS).stream, 1);
    assert_eq!(client.rest(), []);
    drop(client);
    ends(&mut older);
    bystander.is_served();
    assert_eq!(world.connections().len(), 1, "the new relay lists its own");
}

/// Whoever hears of it connects anew at once, and is to be refused, whichever relay served him.
#[test]
fn clients_of_a_relay_that_drains_hear_that_the_apiserver_goes_when_its_successors_port_is_closed() {
    let mut world = World::start(&[]);
    let (mut client, mut server) = world.open(None);
    client.send(&request(1, "/api/v1/pods?watch=true"));
    server.expect(kind::HEADERS);
    let newer = world.start_another("newer", RELAY);
    let _older = std::mem::replace(&mut world.relay, newer);
    client.expect(kind::GOAWAY);
    let _bystander = world.bystander();
    world.stop_listening();
    server.shut_down();
    while let Ok(Some(_)) = client.try_next() {}
    let error = TcpStream::connect(RELAY).expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
}

#[test]
fn a_relay_with_another_address_does_not_take_over() {
    let mut world = World::start(&[]);
    let mut other = world.start_another("other", "127.0.0.1:7443".parse().expect("an address"));
    let ended = wait_for(PATIENCE, || other.is_running().err()).expect("it refuses to start");
    let said = format!("{ended:#}");
    assert!(
        said.contains("exit status: 2") && said.contains("127.0.0.1:6443"),
        "{said}"
    );
    world.relay.is_running().expect("the first goes on");
    world.bystander();
}

#[test]
fn connections_that_wait_when_a_relay_ends_are_served() {
    let mut world = World::answering(&[]);
    let storm = world.storm(4);
    wait_for(PATIENCE, || (storm.served() >= 50).then_some(())).expect("the storm begins");
    world.relay.signal(libc::SIGTERM);
    let status = world.relay.terminate(PATIENCE).expect("it ends by itself");
    assert!(status.success(), "{status}");
    let outcome = storm.end();
    // From then on the port is closed, which a load balancer sees; nobody was cut off after connecting.
    let refused = |error: &String| error.contains("cannot connect");
    assert!(outcome.errors.iter().all(refused), "{outcome:?}");
}

#[test]
fn a_relay_that_drains_is_in_nobodys_way() {
    let mut world = World::start(&[]);
    let (mut client, mut server) = world.open(None);
    client.send(&request(1, "/watch"));
    server.expect(kind::HEADERS);
    // It is told to end, and a watch keeps it; a crash loop starts the next one at once.
    world.relay.signal(libc::SIGTERM);
    let mut newer = world.start_another("newer", RELAY);
    client.expect(kind::GOAWAY);
    let ping = client.expect(kind::PING);
    client.send(&frame(kind::PING, 1, 0, &ping.payload));
    assert_eq!(client.expect(kind::GOAWAY).word(0), 1);
    let older = std::mem::replace(&mut world.relay, newer);
    let listed = wait_for(PATIENCE, || {
        let own = TcpStream::connect(RELAY).ok()?;
        drop(own);
        world.try_control("GET /v1/connections")
    });
    assert!(listed.is_some(), "the new one answers:\n{}", tail(&world.relay.log()));
    world.bystander();
    server.send(&frame(kind::HEADERS, END_HEADERS | END_STREAM, 1, &OK));
    assert_eq!(
        client.expect(kind::HEADERS).stream,
        1,
        "the old one serves what is open"
    );
    newer = world.start_another("third", RELAY);
    ends(&mut std::mem::replace(&mut world.relay, newer));
    drop((client, older));
}

#[test]
fn a_relay_that_is_told_to_end_accepts_until_its_successor_has_decided() {
    for taken in [true, false] {
        let mut world = World::answering(&[]);
        // A successor that has been lent the socket, and is not ready yet.
        let mut successor =
            UnixStream::connect(world.control_path().with_extension("sock.listener")).expect("it lends");
        successor.write_all(b"T").expect("room");
        let mut octet = [0];
        successor.read_exact(&mut octet).expect("an answer");
        assert_eq!(&octet, b"S");
        world.relay.signal(libc::SIGTERM);
        // From here on it leaves its local sockets.
        wait_for(PATIENCE, || world.try_control("GET /livez").is_none().then_some(())).expect("it leaves them");
        for _ in 0..5 {
            let mut client = Peer::connect(&world.pki, RELAY, None, b"h2").expect("it is accepted");
            client.begin_client(&[]);
            client.expect(kind::SETTINGS);
        }
        if taken {
            successor.write_all(b"!").expect("room");
        }
        drop(successor);
        ends(&mut world.relay);
        // The copy that was lent here was never received, so nobody has the socket any more.
        assert!(
            TcpStream::connect(RELAY).is_err(),
            "the port is closed, and not filtered"
        );
    }
}

/// The port of a relay that has lent its socket is shut when the apiserver goes. When that comes back, the port is the taker's if he
/// takes it, and this relay's if he says nothing; in neither case is somebody reset who has connected.
#[test]
fn an_apiserver_that_restarts_during_a_takeover_finds_one_relay_on_the_port() {
    for decides in [true, false] {
        let mut world = World::start(&[]);
        let (mut client, server) = world.open(None);
        let path = world.control_path().with_extension("sock.listener");
        let mut successor = UnixStream::connect(path).expect("it lends");
        successor.write_all(b"T").expect("room");
        let mut octet = [0];
        successor.read_exact(&mut octet).expect("an answer");
        assert_eq!(&octet, b"S");
        world.stop_listening();
        server.shut_down();
        while let Ok(Some(_)) = client.try_next() {}
        let error = TcpStream::connect(RELAY).expect_err("nobody is there");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
        let is_lost = || (world.control("GET /v1/connections", "")["upstream"] != "ready").then_some(());
        wait_for(PATIENCE, is_lost).expect("it is gone");
        let _accepted = serve(&world.pki, UPSTREAM, true);
        if decides {
            // When this relay has seen it too.
            let is_seen = || (world.control("GET /v1/connections", "")["upstream"] == "ready").then_some(());
            wait_for(PATIENCE, is_seen).expect("it is ready again");
            successor.write_all(b"!").expect("room");
            ends(&mut world.relay);
            assert!(TcpStream::connect(RELAY).is_err(), "he has not bound it here");
            let bound = world.relay.log().matches("listening").count();
            assert_eq!(bound, 1, "{}", world.relay.log());
            continue;
        }
        let come = || Peer::connect(&world.pki, RELAY, None, b"h2").ok();
        let mut client = wait_for(PATIENCE, come).expect("it listens again");
        client.begin_client(&[]);
        client.expect(kind::SETTINGS);
        // And who connects while it goes after all is served.
        let mut late: Vec<TcpStream> = (0..5).map(|_| TcpStream::connect(RELAY).expect("it listens")).collect();
        successor.write_all(b"!").expect("room");
        for stream in &mut late {
            stream.write_all(b"no TLS").expect("room");
            stream.read_to_end(&mut Vec::new()).expect("it is accepted, not reset");
        }
        drop(client);
        ends(&mut world.relay);
    }
}

#[test]
fn a_successor_that_finds_no_apiserver_takes_nothing() {
    let mut world = World::start(&[]);
    // It asks somebody who is not there.
    let mut other = world.start_another_with("other", RELAY, &["--upstream=127.0.0.1:1"]);
    let ended = wait_for(PATIENCE, || other.is_running().err()).expect("it gives up");
    let said = format!("{ended:#}");
    assert!(said.contains("exit status: 2") && said.contains("it goes on"), "{said}");
    world.relay.is_running().expect("the first goes on");
    world.bystander();
}

#[test]
fn what_a_crash_left_of_a_local_socket_is_in_nobodys_way() {
    let mut world = World::start(&[]);
    world.relay.kill();
    // A process that ended between binding and moving, and the files of the one that was killed.
    let left = format!("{}.~00000001", world.control_path().display());
    drop(UnixListener::bind(&left).expect("a socket"));
    world.relay = world.start_another("again", RELAY);
    let open = wait_for(PATIENCE, || {
        let answers = world.try_control("GET /v1/connections").is_some();
        TcpStream::connect(RELAY).ok().filter(|_| answers).map(drop)
    });
    assert!(
        open.is_some(),
        "it answers:
{}",
        tail(&world.relay.log())
    );
    assert!(
        !std::path::Path::new(&left).exists(),
        "what nobody answers on is removed"
    );
    world.bystander();
}
