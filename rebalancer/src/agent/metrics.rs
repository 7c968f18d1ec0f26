//! Prometheus metrics: the contract's names, no client or user labels.
//!
//! Input: decisions and answers as they happen, and a look at the core at most once a second, when somebody scrapes.
//! Must never have the core decide anything: what a stranger may ask for costs one walk over the table a second.

use std::{
    fmt::Write as _,
    time::{Duration, Instant, SystemTime},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Registry, Unit},
};
use rebalancer_core::{
    agent::Agent,
    decision::{Decision, Outcomes},
    ids::{Protocol, Timestamp},
    observation::HelloLoss,
    shim::{ConnectionState, GoawayResult},
    table::Repairs,
    view::ServerState,
};

use super::{
    lb::Counts,
    wire::{mode_name, protocol_name, shim_name},
};
use crate::{kubernetes::Requests, steer::Answers};

/// How old a look may be that a scrape is answered with.
const FRESH: Duration = Duration::from_secs(1);

/// A gauge of a ratio or an amount.
pub type Amount = Gauge<f64, std::sync::atomic::AtomicU64>;

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
struct ApiserverLabel {
    apiserver: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

/// A kind of whatever is counted.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct KindLabel {
    /// Which.
    pub kind: &'static str,
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
    paused: Gauge,
    evacuating: Gauge,
    evacuation: Family<StateLabel, Gauge>,
    plan_in_flight: Gauge,
    last_decision: Amount,
    hold: Family<ReasonLabel, Gauge>,
    snapshot_age: Family<ApiserverLabel, Amount>,
    /// There is none without a shim.
    shim_up: Option<Gauge>,
    log_lines: Family<ResultLabel, Counter>,
    counted_lines: (u64, u64),
    looked_at: Option<Instant>,
    hellos_lost: Family<KindLabel, Counter>,
    counted_hellos: [u64; HelloLoss::ALL.len()],
    repairs: Family<KindLabel, Counter>,
    counted_repairs: Repairs,
    unknown: Gauge,
    node_local: Gauge,
    /// There is none where peers are named by flags.
    membership: Family<KindLabel, Gauge>,
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

    /// One more counter, for an agent that load balancers ask: what they were answered.
    pub fn lb_answers(&mut self) -> Counts {
        let counts = Counts::default();
        self.registry.register(
            "lb_answers",
            "Answers on the port of --lb-agent: share, drain, http_200, http_503; refused for want of a place, too_slow",
            counts.answers.clone(),
        );
        counts
    }

    /// One more gauge, for an agent with peers: when its certificate expires.
    pub fn certificate_expiry(&mut self) -> Amount {
        let gauge = Amount::default();
        self.registry.register_with_unit(
            "peer_certificate_expiry_timestamp",
            "When the certificate of --peer-cert that is in use expires, in Unix time",
            Unit::Seconds,
            gauge.clone(),
        );
        gauge
    }

    /// One more counter, for an agent with peers: handshakes on the peers' port that were refused.
    pub fn refused_handshakes(&mut self) -> Counter {
        let counter = Counter::default();
        self.registry.register(
            "peer_handshakes_refused",
            "Connections to the peers' port that were refused: no certificate, a wrong one, too slow, too many",
            counter.clone(),
        );
        counter
    }

    /// One more counter, for an agent whose peers are found by Leases.
    pub fn kubernetes_requests(&mut self) -> Requests {
        let requests = Requests::default();
        self.registry.register(
            "kubernetes_requests",
            "Requests to the Kubernetes API by what became of them; a watch is one request for as long as it lasts",
            requests.clone(),
        );
        self.registry.register(
            "membership_troubles",
            "What stands against the set of apiservers: doubt, which holds; blind, when the API cannot be read; Leases refused",
            self.membership.clone(),
        );
        requests
    }

    /// One more gauge, for an agent with a shim: 1 while it answers.
    pub fn with_shim(&mut self) {
        let gauge = Gauge::default();
        self.registry.register(
            "shim_up",
            "1 while the shim answers, 0 while it does not",
            gauge.clone(),
        );
        self.shim_up = Some(gauge);
    }

    /// One more counter, for an agent that answers in an apiserver's place.
    pub fn steer_answers(&mut self) -> Answers {
        let answers = Answers::default();
        self.registry.register(
            "steer_answers",
            "How often the apiserver asked whether to say GOAWAY (hits), and what became of it",
            answers.family(),
        );
        answers
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
            paused: Gauge::default(),
            evacuating: Gauge::default(),
            evacuation: Family::default(),
            plan_in_flight: Gauge::default(),
            last_decision: Amount::default(),
            hold: Family::default(),
            snapshot_age: Family::default(),
            shim_up: None,
            log_lines: Family::default(),
            counted_lines: (0, 0),
            looked_at: None,
            hellos_lost: Family::default(),
            counted_hellos: [0; HelloLoss::ALL.len()],
            repairs: Family::default(),
            counted_repairs: Repairs::default(),
            unknown: Gauge::default(),
            node_local: Gauge::default(),
            membership: Family::default(),
            registry: Registry::default(),
        };
        // Nothing is known before the first decision.
        metrics.skew.set(f64::NAN);
        registry.register(
            "connections",
            "Connections to the local apiserver",
            metrics.connections.clone(),
        );
        registry.register(
            "requests",
            "Requests seen by the shim since the agent started",
            metrics.requests.clone(),
        );
        registry.register(
            "skew_ratio",
            "Load of the local apiserver over the mean of all, minus 1, as of the last decision; NaN while it is not known",
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
            "paused",
            "1 while an operator has paused the agent",
            metrics.paused.clone(),
        );
        registry.register(
            "evacuating",
            "1 from `rebalancer evacuate` to `rebalancer return` or the apiserver's restart",
            metrics.evacuating.clone(),
        );
        registry.register(
            "evacuation_connections",
            "Connections while the apiserver is evacuated: to_go, draining, or staying since they cannot be told",
            metrics.evacuation.clone(),
        );
        registry.register(
            "plan_in_flight",
            "1 while a plan is carried out or settles",
            metrics.plan_in_flight.clone(),
        );
        registry.register_with_unit(
            "last_decision_timestamp",
            "When the last decision was made, or the agent started, in Unix time",
            Unit::Seconds,
            metrics.last_decision.clone(),
        );
        registry.register(
            "hold",
            "1 for the reason the last decision did nothing for",
            metrics.hold.clone(),
        );
        registry.register_with_unit(
            "snapshot_age",
            "Age of the newest snapshot of a peer; NaN when there is none",
            Unit::Seconds,
            metrics.snapshot_age.clone(),
        );
        registry.register(
            "decision_log_lines",
            "Lines of the decision log, written and dropped",
            metrics.log_lines.clone(),
        );
        registry.register(
            "bpf_hellos_lost",
            "ClientHellos that were lost, so that their connections stay unknown, by how",
            metrics.hellos_lost.clone(),
        );
        registry.register(
            "table_repairs",
            "What the kernel's list put right in the table that events had missed, by kind",
            metrics.repairs.clone(),
        );
        registry.register(
            "connections_unknown",
            "Connections that count as load and are not known to speak HTTP/2 or not",
            metrics.unknown.clone(),
        );
        registry.register(
            "connections_node_local",
            "Clients on this node",
            metrics.node_local.clone(),
        );
        registry.register(
            "build",
            "The running program",
            Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]),
        );
        // An agent that never decides is as old as that, and not as old as Unix time.
        metrics.last_decision.set(unix_time());
        Self { registry, ..metrics }
    }

    /// A decision was made.
    pub fn decided(&self, decision: &Decision, agent: &Agent) {
        self.hold.clear();
        if let Some(hold) = &decision.hold {
            let label = ReasonLabel { reason: hold.reason() };
            self.holds.get_or_create(&label).inc();
            self.hold.get_or_create(&label).set(1);
        }
        self.rho.set(decision.rho);
        self.skew.set(known_skew(decision, agent).unwrap_or(f64::NAN));
        self.last_decision.set(unix_time());
    }

    /// The decision log has written and dropped so many lines.
    pub fn logged(&mut self, (written, dropped): (u64, u64)) {
        let before = std::mem::replace(&mut self.counted_lines, (written, dropped));
        for (result, now, before) in [("written", written, before.0), ("dropped", dropped, before.1)] {
            self.log_lines
                .get_or_create(&ResultLabel { result })
                .inc_by(now.saturating_sub(before));
        }
    }

    /// The shim answered for one connection.
    pub fn told(&self, agent: &Agent, result: GoawayResult) {
        let result = match result {
            GoawayResult::Sent => "sent",
            // Another result follows: each connection is counted once.
            GoawayResult::Pending => return,
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

    /// Whether the last look at the core is too old to answer a scrape with.
    pub fn is_stale(&self) -> bool {
        self.looked_at.is_none_or(|at| at.elapsed() >= FRESH)
    }

    /// Looks at the core.
    pub fn look(&mut self, agent: &Agent, now: Timestamp) {
        self.looked_at = Some(Instant::now());
        self.connections.clear();
        for connection in agent.table().scan() {
            let labels = ConnectionLabels {
                protocol: protocol_name(connection.protocol),
                state: match connection.state {
                    ConnectionState::Active => "active",
                    ConnectionState::Draining => "draining",
                },
            };
            self.connections.get_or_create(&labels).inc();
        }
        let requests = agent.table().requests_total();
        self.requests
            .inc_by(requests.saturating_sub(std::mem::replace(&mut self.counted_requests, requests)));
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
            "evacuating",
            "overloaded",
            "unreachable",
            "refused",
            "disagrees",
            "gone",
        ] {
            self.peers.get_or_create(&StateLabel { state }).set(0);
        }
        self.snapshot_age.clear();
        if let Some(roll) = agent.peers().roll() {
            let gone = i64::try_from(roll.gone.len()).unwrap_or(i64::MAX);
            self.peers.get_or_create(&StateLabel { state: "gone" }).set(gone);
            for (kind, count) in [
                ("doubt", usize::from(roll.doubt.is_some())),
                ("blind", usize::from(roll.blind.is_some())),
                ("refused", roll.refused.len()),
            ] {
                let count = i64::try_from(count).unwrap_or(i64::MAX);
                self.membership.get_or_create(&KindLabel { kind }).set(count);
            }
        }
        for (name, peer) in agent.peers().iter() {
            let age = peer.snapshot.as_ref().map(|(at, _)| now.since(*at).as_secs_f64());
            let apiserver = name.to_string();
            self.snapshot_age
                .get_or_create(&ApiserverLabel { apiserver })
                .set(age.unwrap_or(f64::NAN));
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
                    ServerState::Evacuating => "evacuating",
                    ServerState::Overloaded => "overloaded",
                },
                (None, None) => "unknown",
            };
            self.peers.get_or_create(&StateLabel { state }).inc();
        }
        self.budget.set(agent.budget_tokens(now));
        self.paused.set(i64::from(agent.is_paused()));
        let evacuation = agent.evacuation(now);
        self.evacuating.set(i64::from(evacuation.is_some()));
        if let Some(progress) = evacuation {
            for (state, count) in [
                ("to_go", progress.to_go),
                ("draining", progress.draining),
                ("staying", progress.at_next_answer + progress.stay.len() as u64),
            ] {
                let count = i64::try_from(count).unwrap_or(i64::MAX);
                self.evacuation.get_or_create(&StateLabel { state }).set(count);
            }
        } else {
            self.evacuation.clear();
        }
        self.plan_in_flight.set(i64::from(!agent.is_idle()));
        if let Some(shim_up) = &self.shim_up {
            shim_up.set(i64::from(agent.shim_fault().is_none()));
        }
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
        let table = agent.table();
        self.unknown.set(table.unknown() as i64);
        self.node_local.set(table.node_local() as i64);
        for (how, counted) in HelloLoss::ALL.into_iter().zip(&mut self.counted_hellos) {
            let lost = table.hellos_lost(how);
            self.hellos_lost
                .get_or_create(&KindLabel { kind: how.name() })
                .inc_by(lost.saturating_sub(std::mem::replace(counted, lost)));
        }
        let repairs = table.repairs();
        let counted = std::mem::replace(&mut self.counted_repairs, repairs);
        for (kind, now, before) in [
            ("opened", repairs.opened, counted.opened),
            ("closed", repairs.closed, counted.closed),
            ("listener", repairs.listener, counted.listener),
        ] {
            self.repairs
                .get_or_create(&KindLabel { kind })
                .inc_by(now.saturating_sub(before));
        }
        let lost = table.lost_events_total();
        self.events_lost
            .inc_by(lost.saturating_sub(std::mem::replace(&mut self.counted_lost, lost)));
    }

    /// The text for a scrape (OpenMetrics), as of the last look.
    pub fn text(&self) -> String {
        let mut text = String::new();
        if let Err(error) = encode(&mut text, &self.registry) {
            // Writing to a String cannot fail; if it ever does, the scrape says so.
            let _ = write!(text, "# {error}");
        }
        text
    }
}

/// The skew, when it is one: this apiserver takes connections, and what is known of every peer is as of now.
fn known_skew(decision: &Decision, agent: &Agent) -> Option<f64> {
    let policy = agent.policy();
    let stale_after = policy.stale_after();
    let is_known = |name| {
        let entry = decision.view.entries.get(name)?;
        let knows = entry.snapshot.state != ServerState::Unknown;
        (knows && entry.age <= stale_after).then_some(entry.snapshot.state)
    };
    let takes = is_known(&policy.node) == Some(ServerState::Ready);
    let all_known = agent.peers().iter().all(|(peer, _)| is_known(peer).is_some());
    (takes && all_known && decision.skew.is_finite()).then_some(decision.skew)
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Seconds since 1970, not known where the clock is before that.
fn unix_time() -> f64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(f64::NAN, |now| now.as_secs_f64())
}

#[cfg(test)]
mod tests;
