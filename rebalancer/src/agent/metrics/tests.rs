use std::collections::BTreeSet;

use rebalancer_core::{
    agent::{Effect, Input},
    ids::{ApiserverName, ConnectionId},
    observation::Observation,
    policy::Policy,
    view::Snapshot,
};

use super::*;

/// An agent with one peer, and its metrics as the loop keeps them.
struct World {
    agent: Agent,
    metrics: Metrics,
    now: Timestamp,
}

impl World {
    fn new() -> Self {
        let peers = BTreeSet::from([ApiserverName::new("b")]);
        let policy = Policy::new(ApiserverName::new("a"), peers);
        let now = Timestamp::from_millis(0);
        Self {
            agent: Agent::new(policy, 1, now),
            metrics: Metrics::new(),
            now,
        }
    }

    fn tell(&mut self, input: Input) {
        for effect in self.agent.handle(self.now, input) {
            if let Effect::Record(decision) = effect {
                self.metrics.decided(&decision, &self.agent);
            }
        }
    }

    fn after(&mut self, seconds: u64) -> &mut Self {
        self.now = self.now + Duration::from_secs(seconds);
        self.tell(Input::Tick);
        self
    }

    /// The value of a series, which must be there once.
    fn value(&mut self, series: &str) -> f64 {
        self.metrics.look(&self.agent, self.now);
        let text = self.metrics.text();
        let values: Vec<f64> = text
            .lines()
            .filter_map(|line| line.strip_prefix(series)?.strip_prefix(' '))
            .map(|value| value.parse().expect("a number"))
            .collect();
        assert_eq!(values.len(), 1, "{series} in {text}");
        values[0]
    }
}

#[test]
fn what_is_not_known_is_no_number() {
    const SKEW: &str = "rebalancer_skew_ratio";
    const AGE: &str = "rebalancer_snapshot_age_seconds{apiserver=\"b\"}";
    let mut world = World::new();
    world.tell(Input::Observations(vec![Observation::Resync {
        sockets: Vec::new(),
        listener: Some(ConnectionId(1)),
    }]));
    world.after(20);
    assert!(world.value(SKEW).is_nan(), "the peer was never heard");
    assert!(world.value(AGE).is_nan());
    assert_eq!(world.value("rebalancer_hold{reason=\"peer_unknown\"}"), 1.0);
    let peer = Snapshot {
        apiserver: ApiserverName::new("b"),
        connections: 10,
        load: 10.0,
        ..world.agent.snapshot(world.now)
    };
    world.tell(Input::Peer(ApiserverName::new("b"), Ok(peer)));
    world.after(5);
    assert_eq!(world.value(SKEW), -1.0, "nobody is here, ten are there");
    assert_eq!(world.value(AGE), 5.0);
    let text = world.metrics.text();
    assert!(
        !text.contains("rebalancer_hold{reason=\"peer_unknown\"}"),
        "it is over: {text}"
    );
    world.after(600);
    assert!(world.value(SKEW).is_nan(), "what was heard is too old");
    assert_eq!(world.value("rebalancer_hold{reason=\"snapshot_stale\"}"), 1.0);
}

#[test]
fn each_connection_that_was_told_is_counted_once() {
    let mut world = World::new();
    for result in [GoawayResult::Pending, GoawayResult::Sent] {
        world.metrics.told(&world.agent, result);
    }
    let text = world.metrics.text();
    assert!(!text.contains("pending"), "{text}");
    let sent = "rebalancer_goaways_total{shim=\"none\",result=\"sent\",mode=\"active\"}";
    assert_eq!(world.value(sent), 1.0);
}

#[test]
fn a_pause_and_the_decision_log_show() {
    let mut world = World::new();
    assert_eq!(world.value("rebalancer_paused"), 0.0);
    world.tell(Input::Command(rebalancer_core::agent::Command::Pause {
        reason: String::new(),
        length: None,
    }));
    world.metrics.logged((5, 0));
    world.metrics.logged((7, 3));
    assert_eq!(world.value("rebalancer_paused"), 1.0);
    assert_eq!(
        world.value("rebalancer_decision_log_lines_total{result=\"written\"}"),
        7.0
    );
    assert_eq!(
        world.value("rebalancer_decision_log_lines_total{result=\"dropped\"}"),
        3.0
    );
}

/// A scrape of an agent that has everything an agent may have, with a series of each family.
fn scrape_of_everything() -> String {
    let mut world = World::new();
    world.metrics.intercepting();
    world.metrics.certificate_expiry();
    world.metrics.refused_handshakes();
    world.metrics.with_shim();
    world.metrics.steer_answers();
    let labels = crate::kubernetes::RequestLabels {
        verb: "list",
        result: "ok",
    };
    world.metrics.kubernetes_requests().get_or_create(&labels).inc();
    world
        .metrics
        .membership
        .get_or_create(&KindLabel { kind: "doubt" })
        .set(0);
    let answered = KindLabel { kind: "share" };
    world.metrics.lb_answers().answers.get_or_create(&answered).inc();
    world.after(20);
    world.metrics.goaway(&world.agent, "sent", 1);
    world.metrics.observed("opened");
    world.metrics.logged((1, 0));
    world.metrics.look(&world.agent, world.now);
    let left = StateLabel { state: "to_go" };
    world.metrics.evacuation.get_or_create(&left).set(1);
    world.metrics.text()
}

#[test]
fn the_page_of_metrics_has_every_metric_of_the_agent() {
    let (table, families) = crate::reference::metrics(&scrape_of_everything());
    let source = include_str!("../metrics.rs");
    let registered = source.matches("registry.register").count();
    assert_eq!(
        families, registered,
        "one is registered that `scrape_of_everything` leaves out"
    );
    crate::reference::check("docs/metrics.md", "agent", &table);
}
