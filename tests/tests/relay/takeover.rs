//! A new relay takes the listening socket over: no connection is lost, and the old one drains.

use rebalancer_tests::{
    h2wire::{END_HEADERS, END_STREAM, PATIENCE, frame, kind, request},
    process::{Process, wait_for},
};

use crate::world::{OK, RELAY, World};

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
