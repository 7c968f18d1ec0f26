use std::time::Duration;

use super::*;
use crate::shim::wire::{GoawayResult, Protocol, State};

const LONG: Duration = Duration::from_secs(3600);

fn registry() -> Arc<Registry> {
    Registry::new("i".to_owned())
}

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 7], port))
}

fn open(registry: &Arc<Registry>, id: u64, protocol: Protocol) -> Arc<Connection> {
    let connection = registry.open(id, address(1000 + id as u16), address(6443));
    connection.established(protocol, None);
    connection
}

fn go_away(registry: &Registry, expires_in: Duration, id: u64) -> GoawayResult {
    registry.go_away(1, expires_in, &[Id(id)]).expect("the first plan")[0].result
}

#[test]
fn an_http1_client_is_told_with_its_next_answer_and_once() {
    let registry = registry();
    let connection = open(&registry, 1, Protocol::Http1);
    assert!(!connection.tell_with_answer(), "nobody asked for it");
    assert_eq!(go_away(&registry, LONG, 1), GoawayResult::Pending);
    assert_eq!(connection.shown().state, State::Active, "it weighs until it is told");
    assert!(connection.tell_with_answer());
    assert!(!connection.tell_with_answer());
    assert_eq!(connection.shown().state, State::Draining);
    assert_eq!(go_away(&registry, LONG, 1), GoawayResult::AlreadyDraining);
    connection.close("done");
    let outcomes: Vec<_> = registry
        .outcomes(0)
        .outcomes
        .iter()
        .map(|entry| entry.outcome)
        .collect();
    assert_eq!(outcomes, [Outcome::Draining, Outcome::Closed]);
}

#[test]
fn an_order_that_expires_tells_nobody_and_another_may_come() {
    let registry = registry();
    let connection = open(&registry, 1, Protocol::Http1);
    assert_eq!(go_away(&registry, Duration::ZERO, 1), GoawayResult::Expired);
    assert_eq!(go_away(&registry, Duration::from_nanos(1), 1), GoawayResult::Pending);
    assert!(!connection.tell_with_answer(), "it is over");
    registry.sweep(LONG, LONG);
    assert_eq!(registry.outcomes(0).outcomes[0].outcome, Outcome::Expired);
    assert_eq!(go_away(&registry, LONG, 1), GoawayResult::Pending);
    assert!(connection.tell_with_answer());
}

#[test]
fn an_upgraded_connection_and_one_that_streams_cannot_be_told() {
    let registry = registry();
    let connection = open(&registry, 1, Protocol::Http1);
    assert_eq!(connection.shown().can_be_told, Some(true));
    connection.begin_request(false);
    connection.set_answering();
    assert_eq!(connection.shown().can_be_told, Some(false));
    connection.end_request();
    assert_eq!(connection.shown().can_be_told, Some(true));
    connection.begin_request(false);
    connection.set_upgraded();
    assert_eq!(connection.shown().can_be_told, Some(false));
    assert_eq!(go_away(&registry, LONG, 1), GoawayResult::NotH2);
    assert_eq!(open(&registry, 2, Protocol::H2).shown().can_be_told, Some(true));
}

#[tokio::test]
async fn the_end_of_the_process_has_a_deadline_for_every_protocol() {
    let registry = registry();
    let open: Vec<_> = [(1, Protocol::H2), (2, Protocol::Http1), (3, Protocol::Http1)]
        .map(|(id, protocol)| open(&registry, id, protocol))
        .into();
    open[2].begin_request(false);
    open[2].set_upgraded();
    registry.go_away_some(10, Duration::ZERO);
    for connection in &open {
        assert_eq!(connection.ordered().await, Order::GoAway);
    }
    registry.sweep(LONG, LONG);
    for connection in &open {
        assert_eq!(connection.ordered().await, Order::Close);
    }
}

#[test]
fn a_draining_connection_is_said_to_drain_once() {
    let registry = registry();
    let connection = open(&registry, 1, Protocol::H2);
    // The server said it, and an order comes in the same instant.
    connection.set_draining();
    assert_eq!(go_away(&registry, LONG, 1), GoawayResult::AlreadyDraining);
    connection.set_draining();
    connection.set_final();
    assert_eq!(registry.outcomes(0).outcomes.len(), 1);
}

#[test]
fn a_user_agent_is_cut_at_a_character() {
    let registry = registry();
    let connection = open(&registry, 1, Protocol::H2);
    connection.set_user_agent(&"é".repeat(300));
    assert_eq!(connection.shown().user_agent, Some("é".repeat(128)));
}

#[test]
fn an_entry_stays_small() {
    assert!(size_of::<Connection>() <= 440, "{}", size_of::<Connection>());
}
