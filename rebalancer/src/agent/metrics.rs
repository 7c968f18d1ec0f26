//! Prometheus metrics: the contract's names, no client or user labels.
//!
//! Input: decisions and answers as they happen, and the core at the moment of a scrape.

use std::{fmt::Write as _, time::Duration};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Registry, Unit},
};
use rebalancer_core::{
    agent::Agent,
    decision::{Decision, Outcomes},
    ids::{Protocol, Timestamp},
    shim::{ConnectionState, GoawayResult},
    view::ServerState,
};

use super::wire::{mode_name, protocol_name, shim_name};

/// A gauge of a ratio or an amount.
type Amount = Gauge<f64, std::sync::atomic::AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConnectionLabels {
    protocol: &'static str,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GoawayLabels {
    shim: &'static str,
    result: &'static str,
    mode: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

/// Every metric of the agent.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    connections: Family<ConnectionLabels, Gauge>,
    requests: Counter,
    skew: Amount,
    peers: Family<StateLabel, Gauge>,
    goaways: Family<GoawayLabels, Counter>,
    holds: Family<ReasonLabel, Counter>,
    outcomes: Family<OutcomeLabel, Counter>,
    counted_outcomes: Outcomes,
    counted_requests: u64,
    rho: Amount,
    budget: Amount,
    decision_duration: Histogram,
    events: Family<KindLabel, Counter>,
    events_lost: Counter,
    counted_lost: u64,
}

impl Metrics {
    /// One more gauge, for an agent that steers new connections: 1 while they go to the relay.
    pub fn intercepting(&mut self) -> Gauge {
        let gauge = Gauge::default();
        self.registry.register(
            "intercepting",
            "1 while new connections are steered to the relay, 0 while they reach the apiserver itself",
            gauge.clone(),
        );
        gauge
    }

    /// All at zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("rebalancer");
        let metrics = Self {
            connections: Family::default(),
            requests: Counter::default(),
            skew: Amount::default(),
            peers: Family::default(),
            goaways: Family::default(),
            holds: Family::default(),
            outcomes: Family::default(),
            counted_outcomes: Outcomes::default(),
            counted_requests: 0,
            rho: Amount::default(),
            budget: Amount::default(),
            decision_duration: Histogram::new([0.000_01, 0.000_1, 0.001, 0.01, 0.1, 1.0]),
            events: Family::default(),
            events_lost: Counter::default(),
            counted_lost: 0,
            registry: Registry::default(),
        };
        registry.register(
            "connections",
            "Connections to the local apiserver",
            metrics.connections.clone(),
        );
        registry.register(
            "requests",
            "Requests seen by the shim, of connections that are open",
            metrics.requests.clone(),
        );
        registry.register(
            "skew_ratio",
            "Load of the local apiserver over the mean of all, minus 1",
            metrics.skew.clone(),
        );
        registry.register("peers", "Peers by what is known of them", metrics.peers.clone());
        registry.register("goaways", "Connections told to go", metrics.goaways.clone());
        registry.register("holds", "Decisions to do nothing, by reason", metrics.holds.clone());
        registry.register(
            "outcomes",
            "What became of connections told to go",
            metrics.outcomes.clone(),
        );
        registry.register(
            "rho_ratio",
            "Share of moved clients that land on another apiserver, as learned",
            metrics.rho.clone(),
        );
        registry.register("budget_tokens", "GOAWAYs the budget allows now", metrics.budget.clone());
        registry.register_with_unit(
            "decision_duration",
            "Time one turn of the core takes",
            Unit::Seconds,
            metrics.decision_duration.clone(),
        );
        registry.register("bpf_events", "Events of the source, by kind", metrics.events.clone());
        registry.register(
            "bpf_events_lost",
            "Events of the source that were lost",
            metrics.events_lost.clone(),
        );
        registry.register(
            "build",
            "The running program",
            Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]),
        );
        Self { registry, ..metrics }
    }

    /// A decision was made.
    pub fn decided(&self, decision: &Decision) {
        if let Some(hold) = &decision.hold {
            self.holds.get_or_create(&ReasonLabel { reason: hold.reason() }).inc();
        }
        self.rho.set(decision.rho);
    }

    /// The shim answered for one connection.
    pub fn told(&self, agent: &Agent, result: GoawayResult) {
        let result = match result {
            GoawayResult::Sent => "sent",
            GoawayResult::Pending => "pending",
            GoawayResult::Expired => "expired",
            GoawayResult::AlreadyDraining => "already_draining",
            GoawayResult::Unknown => "unknown",
            GoawayResult::NotH2 => "not_h2",
        };
        self.goaway(agent, result, 1);
    }

    /// An order failed, or was only thought of.
    pub fn goaway(&self, agent: &Agent, result: &'static str, count: usize) {
        let labels = GoawayLabels {
            shim: shim_name(agent.policy().shim),
            result,
            mode: mode_name(agent.policy().mode),
        };
        self.goaways.get_or_create(&labels).inc_by(count as u64);
    }

    /// The source spoke.
    pub fn observed(&self, kind: &'static str) {
        self.events.get_or_create(&KindLabel { kind }).inc();
    }

    /// A turn of the core took so long.
    pub fn turned(&self, took: Duration) {
        self.decision_duration.observe(took.as_secs_f64());
    }

    /// The text for a scrape (OpenMetrics).
    pub fn text(&mut self, agent: &Agent, now: Timestamp) -> String {
        self.connections.clear();
        let mut requests = 0;
        for (_, connection) in agent.table().iter() {
            let labels = ConnectionLabels {
                protocol: protocol_name(connection.protocol),
                state: match connection.state {
                    ConnectionState::Active => "active",
                    ConnectionState::Draining => "draining",
                },
            };
            self.connections.get_or_create(&labels).inc();
            requests += connection.counters.requests;
        }
        // A counter never falls: requests of connections that closed are not taken back.
        self.requests.inc_by(requests.saturating_sub(self.counted_requests));
        self.counted_requests = requests;
        for (protocol, state) in [
            (Protocol::H2Selected, "active"),
            (Protocol::H2Selected, "draining"),
            (Protocol::H2Offered, "active"),
            (Protocol::Http1, "active"),
            (Protocol::Unknown, "active"),
        ] {
            // A series that exists from the start is zero rather than missing.
            let _ = self.connections.get_or_create(&ConnectionLabels {
                protocol: protocol_name(protocol),
                state,
            });
        }
        self.peers.clear();
        for state in [
            "ready",
            "starting",
            "down",
            "unknown",
            "unreachable",
            "refused",
            "disagrees",
        ] {
            self.peers.get_or_create(&StateLabel { state }).set(0);
        }
        for (_, peer) in agent.peers().iter() {
            use rebalancer_core::view::PeerFault;
            let state = match (&peer.fault, &peer.snapshot) {
                (Some(PeerFault::Unreachable(_)), _) => "unreachable",
                (Some(PeerFault::Refused(_)), _) => "refused",
                (Some(PeerFault::Disagrees(_)), _) => "disagrees",
                (None, Some((_, snapshot))) => match snapshot.state {
                    ServerState::Ready => "ready",
                    ServerState::Starting => "starting",
                    ServerState::Down => "down",
                    ServerState::Unknown => "unknown",
                },
                (None, None) => "unknown",
            };
            self.peers.get_or_create(&StateLabel { state }).inc();
        }
        let preview = agent.preview(now);
        self.skew.set(preview.skew);
        self.rho.set(preview.rho);
        self.budget.set(agent.budget_tokens(now));
        let outcomes = agent.outcomes_total();
        let counted = std::mem::replace(&mut self.counted_outcomes, outcomes);
        for (outcome, now, before) in [
            ("moved", outcomes.moved, counted.moved),
            ("returned", outcomes.returned, counted.returned),
            ("lost", outcomes.lost, counted.lost),
        ] {
            self.outcomes
                .get_or_create(&OutcomeLabel { outcome })
                .inc_by(now.saturating_sub(before));
        }
        let lost = agent.table().lost_events_total();
        self.events_lost
            .inc_by(lost.saturating_sub(std::mem::replace(&mut self.counted_lost, lost)));
        let mut text = String::new();
        if let Err(error) = encode(&mut text, &self.registry) {
            // Writing to a String cannot fail; if it ever does, the scrape says so.
            let _ = write!(text, "# {error}");
        }
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}
