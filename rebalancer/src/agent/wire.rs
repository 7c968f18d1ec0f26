//! The JSON of snapshots, decisions and connections: what peers, the local API and the decision log say.
//!
//! Input: the core's values. Output: serde values. Must never lose a number a decision rests on.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use rebalancer_core::{
    agent::{Agent, Progress},
    decision::{Decision, Derivation, Fate, Heavy, Outcomes},
    hold::Hold,
    ids::{ApiserverName, ConnectionId, Protocol, ShimKind, Timestamp},
    membership::{Basis, Endpoint, Roll},
    planner::LeftOut,
    policy::{Mode, Policy},
    release::Release,
    table::{Connection, ConnectionTable},
};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::handle::Clock;

mod snapshot;

pub use snapshot::{
    LONGEST_PAUSE_MS, LONGEST_REASON, SNAPSHOT_VERSION, WirePart, WireSnapshot, WireState, WireSwitch, agreement,
    weight_name,
};

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
pub fn rounded(number: f64) -> Value {
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
                "release": entry.snapshot.release.as_ref().map(Release::as_str),
                "connections": entry.snapshot.connections,
                "load": rounded(entry.snapshot.load),
                "unmovable": rounded(entry.snapshot.unmovable),
                "node_local": entry.snapshot.node_local,
                "draining": entry.snapshot.draining,
                "rebalancing": entry.snapshot.rebalancing,
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

/// Of those who cannot be told so many are named.
const NAMED: usize = 50;

/// How far an evacuation is; of those who cannot be told the first are named.
pub fn evacuation(progress: &Progress, table: &ConnectionTable) -> Value {
    let named = &progress.stay[..progress.stay.len().min(NAMED)];
    json!({
        "state": if progress.is_done() { "evacuated" } else { "evacuating" },
        "since_s": progress.lasts.as_secs(),
        "told": progress.told,
        "to_go": progress.to_go,
        "at_next_answer": progress.at_next_answer,
        "draining": progress.draining,
        "draining_streams": progress.draining_streams,
        "stay": progress.stay.len(),
        "stay_why": left_out_in_words(&progress.stay),
        "staying": left_out(named, table),
        "stuck": progress.stuck,
    })
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
        Hold::SlowStart { left } => json!({"left_s": left.as_secs()}),
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
        Hold::ApiserverStarting {
            apiserver,
            up,
            connections,
        } => json!({"apiserver": apiserver.as_str(), "up_ms": up.map(millis), "connections": connections}),
        Hold::ApiserverOverloaded { apiserver, connections } => {
            json!({"apiserver": apiserver.as_str(), "connections": connections})
        }
        Hold::PortShared { why } => json!({"why": why}),
        Hold::LostEvents { total } => json!({"total": total}),
        Hold::UnknownProtocols { unknown, active, limit } => {
            json!({"unknown": unknown, "active": active, "limit": rounded(*limit)})
        }
        Hold::Paused { reason, left, by } => json!({
            "why": reason,
            "left_ms": left.map(millis),
            "by": by.as_ref().map(ApiserverName::as_str),
        }),
        Hold::Evacuating { apiserver } => json!({"apiserver": apiserver.as_str()}),
        Hold::UpgradeInProgress { why, left } => json!({"why": why, "left_s": left.as_secs()}),
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
                "part": snapshot.map(|(_, snapshot)| WirePart::from(snapshot.part)),
                "switch": snapshot.map(|(_, snapshot)| WireSwitch::from(&snapshot.switch)),
                "fault": peer.trouble(),
            })
        })
        .collect();
    json!({"peers": list, "switch": WireSwitch::from(&agent.switch(now)), "membership": agent.peers().roll().map(roll)})
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
