//! The JSON of snapshots, decisions and connections: what peers, the local API and the decision log say.
//!
//! Input: the core's values. Output: serde values. Must never lose a number a decision rests on.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use rebalancer_core::{
    agent::Agent,
    decision::{Decision, Derivation, Fate, Heavy, Outcomes},
    hold::Hold,
    ids::{ApiserverName, ConnectionId, Protocol, ShimKind, Timestamp},
    membership::{Basis, Endpoint, Roll},
    planner::LeftOut,
    policy::{Mode, Policy, Weight},
    table::{Connection, ConnectionTable},
    view::{Part, PeerFault, ServerState, Snapshot},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::handle::Clock;

/// A snapshot between agents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WireSnapshot {
    /// The format's version.
    pub version: u32,
    /// Which apiserver.
    pub apiserver: String,
    /// `ready`, `starting`, `down` or `unknown`.
    pub state: WireState,
    /// Active connections.
    pub connections: u64,
    /// Their load.
    pub load: f64,
    /// The part of it that no move can place.
    pub unmovable: f64,
    /// Clients on that node; 0 from agents that do not tell.
    #[serde(default)]
    pub node_local: u64,
    /// Connections that heard their GOAWAY.
    pub draining: u64,
    /// Streams open on those.
    pub draining_streams: u64,
    /// What those who were told weighed.
    pub told_load_total: f64,
    /// Requests refused for overload a short while ago.
    pub refused: u64,
    /// GOAWAYs since the agent started.
    pub goaways_total: u64,
    /// Connections accepted since then.
    pub accepted_total: u64,
    /// Clients that its agent takes to be on their way, those of all apiservers.
    pub in_transit: u64,
    /// Its size relative to the others'.
    pub capacity: f64,
    /// What its agent does about skew.
    pub part: WirePart,
    /// Whether a plan is in flight.
    pub plan_in_flight: bool,
    /// Whether it takes part in a rebalancing.
    pub rebalancing: bool,
    /// Names the process.
    pub instance: u64,
    /// The apiservers it knows, its own included.
    pub names: Vec<String>,
    /// The flags all agents must be given alike, with its values.
    pub policy: BTreeMap<String, String>,
}

/// The format's version: agents of different ones do not understand each other.
///
/// It goes up with every member that is new, gone, or means something else.
pub const SNAPSHOT_VERSION: u32 = 3;

/// What is read of an answer first: all versions have it.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// The flags all agents must be given alike: a plan is each donor's part of what all of them reckon alike.
pub fn agreement(policy: &Policy) -> BTreeMap<String, String> {
    [
        ("--weight", weight_name(policy.weight).to_owned()),
        ("--skew-threshold", policy.skew_threshold.to_string()),
        ("--skew-target", policy.skew_target.to_string()),
        ("--client-cooldown", format!("{:?}", policy.client_cooldown)),
    ]
    .map(|(flag, value)| (flag.to_owned(), value))
    .into()
}

/// The same as one short word, for a Lease.
pub fn agreement_hash(policy: &Policy) -> String {
    let said: Vec<String> = agreement(policy)
        .into_iter()
        .map(|(flag, value)| format!("{flag}={value}"))
        .collect();
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, said.join(" ").as_bytes());
    digest.as_ref()[..8]
        .iter()
        .map(|octet| format!("{octet:02x}"))
        .collect()
}

/// [`ServerState`] as JSON has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WireState {
    /// It takes connections.
    Ready,
    /// Since a moment ago.
    Starting,
    /// Nobody listens.
    Down,
    /// Its agent does not know.
    Unknown,
}

/// [`Part`] as JSON has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WirePart {
    /// It tells clients to go.
    Acts,
    /// It only says what it would do.
    DryRun,
    /// It does nothing now.
    Watches,
}

impl From<Part> for WirePart {
    fn from(part: Part) -> Self {
        match part {
            Part::Acts => Self::Acts,
            Part::DryRun => Self::DryRun,
            Part::Watches => Self::Watches,
        }
    }
}

impl From<WirePart> for Part {
    fn from(part: WirePart) -> Self {
        match part {
            WirePart::Acts => Self::Acts,
            WirePart::DryRun => Self::DryRun,
            WirePart::Watches => Self::Watches,
        }
    }
}

impl From<ServerState> for WireState {
    fn from(state: ServerState) -> Self {
        match state {
            ServerState::Ready => Self::Ready,
            ServerState::Starting => Self::Starting,
            ServerState::Down => Self::Down,
            ServerState::Unknown => Self::Unknown,
        }
    }
}

impl From<WireState> for ServerState {
    fn from(state: WireState) -> Self {
        match state {
            WireState::Ready => Self::Ready,
            WireState::Starting => Self::Starting,
            WireState::Down => Self::Down,
            WireState::Unknown => Self::Unknown,
        }
    }
}

impl WireSnapshot {
    /// What a peer is told.
    pub fn of(snapshot: &Snapshot, policy: &Policy) -> Self {
        Self {
            version: SNAPSHOT_VERSION,
            apiserver: snapshot.apiserver.to_string(),
            state: snapshot.state.into(),
            connections: snapshot.connections,
            load: snapshot.load,
            unmovable: snapshot.unmovable,
            draining: snapshot.draining,
            draining_streams: snapshot.draining_streams,
            told_load_total: snapshot.told_load_total,
            refused: snapshot.refused,
            goaways_total: snapshot.goaways_total,
            node_local: snapshot.node_local,
            accepted_total: snapshot.accepted_total,
            in_transit: snapshot.in_transit,
            capacity: snapshot.capacity,
            part: snapshot.part.into(),
            plan_in_flight: snapshot.plan_in_flight,
            rebalancing: snapshot.rebalancing,
            instance: snapshot.instance,
            names: snapshot.names.iter().map(ToString::to_string).collect(),
            policy: agreement(policy),
        }
    }

    /// What a peer answered, for the core.
    ///
    /// # Errors
    ///
    /// It is no snapshot, or one that this agent cannot reckon with: in words.
    pub fn read(body: &[u8], policy: &Policy) -> Result<Snapshot, PeerFault> {
        let garbled = |error: serde_json::Error| PeerFault::Refused(format!("its answer is no snapshot: {error}"));
        let Versioned { version } = serde_json::from_slice(body).map_err(garbled)?;
        if version != SNAPSHOT_VERSION {
            return Err(PeerFault::Disagrees(format!(
                "its snapshots have version {version}, this agent's have {SNAPSHOT_VERSION}: they are of different \
                 releases, and go on when all agents are of one"
            )));
        }
        let snapshot: Self = serde_json::from_slice(body).map_err(garbled)?;
        snapshot.checked(policy).map_err(PeerFault::Disagrees)
    }

    fn checked(self, policy: &Policy) -> Result<Snapshot, String> {
        let ours = agreement(policy);
        let flags: BTreeSet<&String> = ours.keys().chain(self.policy.keys()).collect();
        for flag in flags {
            let (here, there) = (ours.get(flag), self.policy.get(flag));
            if here != there {
                let said = |value: Option<&String>| value.map_or("unknown", String::as_str).to_owned();
                return Err(format!(
                    "its {flag} is {}, this agent's is {}: give all agents the same",
                    said(there),
                    said(here)
                ));
            }
        }
        for (what, value) in [
            ("load", self.load),
            ("unmovable load", self.unmovable),
            ("told load", self.told_load_total),
        ] {
            if !value.is_finite() || value < 0.0 {
                return Err(format!("its {what} is {value}"));
            }
        }
        if !(0.01..=1_000.0).contains(&self.capacity) {
            return Err(format!("its capacity is {}", self.capacity));
        }
        Ok(Snapshot {
            apiserver: ApiserverName::new(self.apiserver),
            state: self.state.into(),
            connections: self.connections,
            load: self.load,
            unmovable: self.unmovable,
            draining: self.draining,
            draining_streams: self.draining_streams,
            told_load_total: self.told_load_total,
            refused: self.refused,
            goaways_total: self.goaways_total,
            node_local: self.node_local,
            accepted_total: self.accepted_total,
            in_transit: self.in_transit,
            capacity: self.capacity,
            part: self.part.into(),
            plan_in_flight: self.plan_in_flight,
            rebalancing: self.rebalancing,
            instance: self.instance,
            names: self.names.into_iter().map(ApiserverName::new).collect(),
        })
    }
}

/// `connections`, `requests`, `bytes` or `streams`.
pub fn weight_name(weight: Weight) -> &'static str {
    match weight {
        Weight::Connections => "connections",
        Weight::Requests => "requests",
        Weight::Bytes => "bytes",
        Weight::Streams => "streams",
    }
}

/// `active`, `dry-run` or `propose`.
pub fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Active => "active",
        Mode::DryRun => "dry-run",
        Mode::Propose => "propose",
    }
}

/// `relay`, `steer` or `none`.
pub fn shim_name(shim: ShimKind) -> &'static str {
    match shim {
        ShimKind::Relay => "relay",
        ShimKind::Steer => "steer",
        ShimKind::None => "none",
    }
}

/// `unknown`, `http/1.1`, `offered` or `h2`.
pub fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Unknown => "unknown",
        Protocol::Http1 => "http/1.1",
        Protocol::H2Offered => "offered",
        Protocol::H2Selected => "h2",
    }
}

/// `active` or `draining`.
pub fn state_name(connection: &Connection) -> &'static str {
    match connection.state {
        rebalancer_core::shim::ConnectionState::Active => "active",
        rebalancer_core::shim::ConnectionState::Draining => "draining",
    }
}

/// An instant as RFC 3339.
pub fn instant(clock: &Clock, at: Timestamp) -> String {
    OffsetDateTime::from(clock.wall(at))
        .format(&Rfc3339)
        .unwrap_or_default()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A number with four digits after the point: enough to read, short enough to.
fn rounded(number: f64) -> Value {
    if number.is_finite() {
        json!((number * 10_000.0).round() / 10_000.0)
    } else {
        Value::Null
    }
}

/// A decision, as the contract has it.
pub fn decision(decision: &Decision, clock: &Clock) -> Value {
    let view: Vec<Value> = decision
        .view
        .entries
        .values()
        .map(|entry| {
            json!({
                "apiserver": entry.snapshot.apiserver.as_str(),
                "state": WireState::from(entry.snapshot.state),
                "connections": entry.snapshot.connections,
                "load": rounded(entry.snapshot.load),
                "unmovable": rounded(entry.snapshot.unmovable),
                "node_local": entry.snapshot.node_local,
                "draining": entry.snapshot.draining,
                "age_ms": millis(entry.age),
            })
        })
        .collect();
    let victims: Vec<Value> = decision
        .victims
        .iter()
        .map(|victim| {
            let mut shown = json!({
                "connection": victim.connection.to_string(),
                "client": victim.client.to_string(),
                "load": rounded(victim.load),
                "age_s": victim.age.as_secs(),
                "why": victim.why,
                "fate": fate_name(victim.fate),
            });
            for (key, value) in [("user", &victim.user), ("user_agent", &victim.user_agent)] {
                if let Some(value) = value {
                    shown[key] = json!(value);
                }
            }
            shown
        })
        .collect();
    json!({
        "id": decision.id,
        "generation": decision.generation,
        "at": instant(clock, decision.at),
        "mode": mode_name(decision.mode),
        "node": decision.node.as_str(),
        "weight": weight_name(decision.weight),
        "view": view,
        "mean": rounded(decision.mean),
        "skew": rounded(decision.skew),
        "threshold": rounded(decision.threshold),
        "noise_floor": rounded(decision.noise_floor),
        "rho": rounded(decision.rho),
        "quota": decision.quota,
        "derivation": derivation(&decision.derivation),
        "victims": victims,
        "hold": decision.hold.as_ref().map(hold),
        "outcomes": outcomes(decision.outcomes),
        "heaviest": decision.heaviest.iter().map(heavy).collect::<Vec<_>>(),
        "explanation": decision.explanation,
    })
}

/// What a decision's numbers follow from.
fn derivation(derivation: &Derivation) -> Value {
    json!({
        "donors": derivation.donors.iter().map(ApiserverName::as_str).collect::<Vec<_>>(),
        "surplus": rounded(derivation.surplus),
        "rho": rounded(derivation.rho),
        "needed": rounded(derivation.needed),
        "in_transit": derivation.in_transit,
        "expected_skew": rounded(derivation.expected_skew),
        "allowance": derivation.allowance.map(rounded),
        "limit": derivation.limit,
        "goaway_rate": rounded(derivation.goaway_rate),
    })
}

/// What became of one victim.
pub fn fate_name(fate: Fate) -> &'static str {
    match fate {
        Fate::Pending => "pending",
        Fate::Told => "told",
        Fate::Returned => "returned",
        Fate::Gone => "gone",
        Fate::NotTold => "not_told",
    }
}

/// Why a connection that an operator named is not told.
pub fn left_out_name(why: LeftOut) -> &'static str {
    match why {
        LeftOut::Gone => "gone",
        LeftOut::Draining => "draining",
        LeftOut::Deaf => "cannot_be_told",
        LeftOut::UnknownProtocol => "unknown_protocol",
        LeftOut::Excluded => "excluded",
        LeftOut::NodeLocal => "node_local",
    }
}

/// Those who are not told, and why.
pub fn left_out(left_out: &[(ConnectionId, LeftOut)], table: &ConnectionTable) -> Value {
    let one = |(id, why): &(ConnectionId, LeftOut)| {
        let connection = table.connection(*id);
        json!({
            "connection": id.to_string(),
            "client": connection.map(|connection| connection.client().to_string()),
            "user": connection.and_then(Connection::user),
            "why": left_out_name(*why),
        })
    };
    left_out.iter().map(one).collect()
}

/// The same, counted.
pub fn left_out_in_words(left_out: &[(ConnectionId, LeftOut)]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, why) in left_out {
        *counts.entry(left_out_name(*why)).or_default() += 1;
    }
    let counted: Vec<String> = counts.iter().map(|(why, count)| format!("{count} {why}")).collect();
    counted.join(", ")
}

/// One of the heaviest connections, whether it moves or not.
pub fn heavy(heavy: &Heavy) -> Value {
    json!({
        "connection": heavy.connection.to_string(),
        "client": heavy.client.to_string(),
        "user": heavy.user,
        "user_agent": heavy.user_agent,
        "load": rounded(heavy.load),
        "requests_per_second": rounded(heavy.requests_per_second),
        "bytes_per_second": rounded(heavy.bytes_per_second),
        "open_watches": heavy.open_watches,
        "unmovable": heavy.unmovable,
    })
}

/// Outcomes, as the contract has them.
pub fn outcomes(outcomes: Outcomes) -> Value {
    json!({
        "pending": outcomes.pending,
        "draining": outcomes.draining,
        "moved": outcomes.moved,
        "returned": outcomes.returned,
        "lost": outcomes.lost,
    })
}

/// A hold: its reason, its numbers, and the sentence.
pub fn hold(hold: &Hold) -> Value {
    let mut shown = match hold {
        Hold::FewerThanTwoApiservers { apiservers } => json!({"apiservers": apiservers}),
        Hold::PeerUnknown { peer, why } => json!({"peer": peer.as_str(), "why": why}),
        Hold::MembershipUnknown { why } => json!({"why": why}),
        Hold::ApiserverGone { apiserver } => json!({"apiserver": apiserver.as_str()}),
        Hold::SnapshotStale { peer, age, limit } => {
            json!({"peer": peer.as_str(), "age_ms": millis(*age), "limit_ms": millis(*limit)})
        }
        Hold::BelowThreshold { skew, threshold } => json!({"skew": rounded(*skew), "threshold": rounded(*threshold)}),
        Hold::Noise { skew, noise_floor } => json!({"skew": rounded(*skew), "noise_floor": rounded(*noise_floor)}),
        Hold::Unconfirmed { skew, looks, needed } => {
            json!({"skew": rounded(*skew), "looks": looks, "needed": needed})
        }
        Hold::Unmovable { client, load, room } => {
            json!({"client": client, "load": rounded(*load), "room": rounded(*room)})
        }
        Hold::RecipientsStressed {
            apiserver,
            refused,
            limit,
        } => json!({"apiserver": apiserver.as_str(), "refused": refused, "limit": limit}),
        Hold::PeerPlanInFlight { apiserver } => json!({"apiserver": apiserver.as_str()}),
        Hold::CoolingDown {
            cooling,
            young,
            excluded,
            unknown,
        } => json!({"cooling": cooling, "young": young, "excluded": excluded, "unknown": unknown}),
        Hold::BudgetSpent { tokens, allowance } => {
            json!({"tokens": rounded(*tokens), "allowance": rounded(*allowance)})
        }
        Hold::Probing { told, left } | Hold::Futile { told, left } => {
            json!({"told": told, "left_ms": millis(*left)})
        }
        Hold::ClientsInTransit { clients } => json!({"clients": clients}),
        Hold::AwaitsApproval { proposal, goaways } => json!({"proposal": proposal, "goaways": goaways}),
        Hold::DryRun { decision, goaways } => json!({"decision": decision, "goaways": goaways}),
        Hold::PlanInFlight {
            generation,
            unsent,
            in_transit,
        } => json!({"generation": generation, "unsent": unsent, "in_transit": in_transit}),
        Hold::ApiserverStarting { apiserver, up } => {
            json!({"apiserver": apiserver.as_str(), "up_ms": up.map(millis)})
        }
        Hold::LostEvents { total } => json!({"total": total}),
        Hold::UnknownProtocols { unknown, active, limit } => {
            json!({"unknown": unknown, "active": active, "limit": rounded(*limit)})
        }
        Hold::Paused { reason, left } => json!({"why": reason, "left_ms": left.map(millis)}),
        Hold::ShimUnavailable { why } => json!({"why": why}),
    };
    shown["reason"] = json!(hold.reason());
    shown["message"] = json!(hold.to_string());
    shown
}

/// A connection of this apiserver.
pub fn connection(id: ConnectionId, connection: &Connection, now: Timestamp) -> Value {
    let address = |address: SocketAddr| address.to_string();
    json!({
        "connection": id.to_string(),
        "client": address(connection.client()),
        "local": address(connection.local()),
        "protocol": protocol_name(connection.protocol),
        "state": state_name(connection),
        "age_s": now.since(connection.opened_at).as_secs(),
        "seeded": connection.seeded,
        "node_local": connection.is_node_local(),
        "user": connection.user(),
        "user_agent": connection.user_agent(),
        "requests": connection.counters.requests,
        "open_streams": connection.counters.open_streams,
        "open_watches": connection.counters.open_watches,
        "bytes_in": connection.counters.bytes_in,
        "bytes_out": connection.counters.bytes_out,
        "requests_per_second": rounded(connection.rates.requests),
        "bytes_per_second": rounded(connection.rates.bytes),
    })
}

/// What is said when most clients are on this node.
pub fn node_local_warning(table: &ConnectionTable) -> String {
    format!(
        "{} clients are on this node, {} are not: a load balancer on this node hides its clients behind the node's own \
         address, and they are not balanced; with --node-local move they are clients like others, with --node-local count \
         they are load",
        table.node_local(),
        table.active()
    )
}

/// The peers, and what is known of each.
pub fn peers(agent: &Agent, now: Timestamp) -> Value {
    let list: Vec<Value> = agent
        .peers()
        .iter()
        .map(|(name, peer)| {
            let snapshot = peer.snapshot.as_ref();
            json!({
                "apiserver": name.as_str(),
                "state": snapshot.map(|(_, snapshot)| WireState::from(snapshot.state)),
                "connections": snapshot.map(|(_, snapshot)| snapshot.connections),
                "load": snapshot.map(|(_, snapshot)| rounded(snapshot.load)),
                "draining": snapshot.map(|(_, snapshot)| snapshot.draining),
                "age_ms": snapshot.map(|(at, _)| millis(now.since(*at))),
                "fault": peer.trouble(),
            })
        })
        .collect();
    json!({"peers": list, "membership": agent.peers().roll().map(roll)})
}

/// Who is who by the cluster's Leases.
fn roll(roll: &Roll) -> Value {
    let asked = |(name, endpoint): (&ApiserverName, &Endpoint)| {
        let shown = json!({"address": endpoint.address.to_string(), "key_sha256": endpoint.key.to_string()});
        (name.to_string(), shown)
    };
    json!({
        "set_from": match roll.basis {
            Basis::Identities => "identity_leases",
            Basis::Agents => "agents",
        },
        "gone": roll.gone.iter().map(ApiserverName::as_str).collect::<Vec<_>>(),
        "agents": roll.ask.iter().map(asked).collect::<serde_json::Map<_, _>>(),
        "doubt": roll.doubt,
        "blind": roll.blind,
        "refused": roll.refused,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(node: &str, peers: &[&str]) -> Policy {
        let peers = peers.iter().map(|name| ApiserverName::new(*name)).collect();
        Policy::new(ApiserverName::new(node), peers)
    }

    /// What the agent of `policy` answers.
    fn answer(policy: &Policy) -> Value {
        let agent = Agent::new(policy.clone(), 1, Timestamp::from_millis(0));
        let snapshot = agent.snapshot(Timestamp::from_millis(0));
        serde_json::to_value(WireSnapshot::of(&snapshot, policy)).expect("JSON")
    }

    fn read(answer: &Value) -> Result<Snapshot, PeerFault> {
        WireSnapshot::read(answer.to_string().as_bytes(), &policy("a", &["b", "c"]))
    }

    fn disagrees(answer: &Value) -> String {
        match read(answer) {
            Err(PeerFault::Disagrees(said)) => said,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn agents_that_agree_understand_each_other() {
        let b = policy("b", &["a", "c"]);
        assert!(read(&answer(&b)).is_ok());
    }

    #[test]
    fn a_flag_that_differs_is_named_with_both_values() {
        let b = || policy("b", &["a", "c"]);
        for (theirs, parts) in [
            (
                Policy {
                    skew_target: 0.05,
                    ..b()
                },
                ["--skew-target", "0.05", "0.03"],
            ),
            (
                Policy {
                    skew_threshold: 0.2,
                    ..b()
                },
                ["--skew-threshold", "0.2", "0.1"],
            ),
            (
                Policy {
                    weight: Weight::Bytes,
                    ..b()
                },
                ["--weight", "bytes", "connections"],
            ),
            (
                Policy {
                    client_cooldown: Duration::from_secs(60),
                    ..b()
                },
                ["--client-cooldown", "60s", "600s"],
            ),
        ] {
            let said = disagrees(&answer(&theirs));
            for part in parts {
                assert!(said.contains(part), "{said}");
            }
        }
        // What may differ: how fast, whether anything is sent, who is left alone.
        let theirs = Policy {
            mode: Mode::DryRun,
            goaway_rate: rebalancer_core::policy::GoawayRate::PerSecond(1.0),
            interval: Duration::from_secs(1),
            ..b()
        };
        assert!(read(&answer(&theirs)).is_ok());
    }

    #[test]
    fn another_release_is_told_as_one() {
        let mut other = answer(&policy("b", &["a", "c"]));
        other["version"] = json!(1);
        other.as_object_mut().expect("an object").remove("policy");
        assert!(disagrees(&other).contains("version 1"), "before what is missing");
        for garbled in [json!({}), json!("ok"), json!({"version": SNAPSHOT_VERSION})] {
            assert!(matches!(read(&garbled), Err(PeerFault::Refused(_))), "{garbled}");
        }
        let mut wrong = answer(&policy("b", &["a", "c"]));
        wrong["load"] = json!(-1.0);
        assert!(disagrees(&wrong).contains("load"));
    }
}
