//! An overloaded apiserver is neither restarting nor a donor.

use super::*;

fn shim(ready: bool, overloaded: bool, gone: bool, listener: u64) -> Input {
    Input::Shim(ShimReport {
        upstream_ready: Some(ready),
        upstream_overloaded: overloaded,
        upstream_gone: gone,
        upstream_listener: Some(listener),
        ..ShimReport::default()
    })
}

#[test]
fn its_flooders_are_not_moved_onto_its_neighbours_and_nobody_onto_it() {
    let mut world = World::new(&[100, 100, 100], Balancer::LeastSockets, |_| {});
    world.run(60);
    let before = world.goaways;
    for _ in 0..60 {
        world.land(0);
    }
    // It answers in time between two waves.
    for second in 0..120 {
        let is_overloaded = second % 20 < 5;
        world.input(0, shim(!is_overloaded, is_overloaded, false, 1));
        world.run(1);
        let state = world.agents[0].snapshot(world.now()).state;
        assert_eq!(state, ServerState::Overloaded, "second {second}");
        let advice = world.agents[0].advice(world.now());
        assert_eq!(
            advice.is_down, is_overloaded,
            "a load balancer sends nobody new while it does not answer"
        );
        assert_eq!(world.agents[0].snapshot(world.now()).restarts, 0);
    }
    assert_eq!(world.goaways, before, "nobody is told while it lasts");
    assert_eq!(world.holds(), ["apiserver_overloaded"; 3]);
    for agent in 0..2 {
        let hold = world.agents[agent].preview(world.now()).hold;
        let Some(Hold::ApiserverOverloaded { apiserver, connections }) = &hold else {
            panic!("{hold:?}");
        };
        assert_eq!(
            (apiserver.as_str(), *connections),
            ("n0", 160),
            "it and the others say whose it is, and that it has its clients"
        );
    }
    // When the flood is over it is the apiserver it was: what it has above the others is shared out.
    world.input(0, shim(true, false, false, 1));
    world.run(150);
    assert!(
        world.goaways > before && world.goaways <= before + 60,
        "{}",
        world.goaways
    );
}

#[test]
fn what_was_overloaded_and_ends_is_down() {
    let overloaded = |after: Input| {
        let mut world = World::new(&[100, 100], Balancer::LeastSockets, |_| {});
        world.run(60);
        world.input(0, shim(true, false, false, 1));
        world.input(0, shim(false, true, false, 1));
        assert_eq!(world.agents[0].snapshot(world.now()).state, ServerState::Overloaded);
        world.input(0, after);
        let snapshot = world.agents[0].snapshot(world.now());
        (snapshot.state, snapshot.restarts)
    };
    // It says itself that it is not ready, by the same socket: it is the same process, and busy.
    assert_eq!(overloaded(shim(false, false, false, 1)), (ServerState::Overloaded, 0));
    assert_eq!(overloaded(shim(false, false, true, 1)), (ServerState::Down, 1));
    assert_eq!(overloaded(shim(false, false, false, 2)), (ServerState::Down, 1));
    assert_eq!(overloaded(shim(true, false, false, 2)), (ServerState::Starting, 1));
}
