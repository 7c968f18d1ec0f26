//! Holds: why nothing is done, and the sentence that says so.
//!
//! Job: the closed list of reasons, each with its numbers. Output: one word for metrics, one sentence for people.
//! Must never need a view or a decision: both of them name holds.

use std::{fmt, time::Duration};

use crate::ids::ApiserverName;

/// A time as people say it, to two digits or so.
fn spoken(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..=99 => format!("{seconds} s"),
        100..=5_999 => format!("{} min", (seconds + 30) / 60),
        _ => format!("{:.1} h", time.as_secs_f64() / 3_600.0),
    }
}

/// Why nothing is done. Closed, and each with its numbers.
#[derive(Clone, Debug, PartialEq)]
pub enum Hold {
    /// There is nobody to move to.
    FewerThanTwoApiservers {
        /// How many can take connections.
        apiservers: usize,
    },
    /// Nothing usable is known of a peer.
    PeerUnknown {
        /// Which.
        peer: ApiserverName,
        /// Why.
        why: String,
    },
    /// Who the apiservers are is not known, or this agent is not one of them by its Lease.
    MembershipUnknown {
        /// Why, and what to grant or to repair.
        why: String,
    },
    /// An apiserver has left the set without a word: the others go on from the next decision.
    ApiserverGone {
        /// Which.
        apiserver: ApiserverName,
    },
    /// A peer's snapshot is too old.
    SnapshotStale {
        /// Which.
        peer: ApiserverName,
        /// How old.
        age: Duration,
        /// How old it may be.
        limit: Duration,
    },
    /// This apiserver is not far enough above the mean.
    BelowThreshold {
        /// Its skew.
        skew: f64,
        /// What it takes.
        threshold: f64,
    },
    /// The skew is above the configured threshold, but chance alone makes as much.
    Noise {
        /// The skew.
        skew: f64,
        /// What chance makes.
        noise_floor: f64,
    },
    /// The skew of measured loads passes the trigger, but not for long enough to be believed.
    Unconfirmed {
        /// The largest skew.
        skew: f64,
        /// Looks in a row that passed.
        looks: u32,
        /// How many it takes.
        needed: u32,
    },
    /// Whoever could be a victim was told a moment ago, is too young, excluded or otherwise not to be moved.
    CoolingDown {
        /// Connections in their client's cool-down.
        cooling: usize,
        /// Younger than the minimum age.
        young: usize,
        /// Excluded by configuration, or on this node.
        excluded: usize,
        /// Not known to speak HTTP/2.
        unknown: usize,
    },
    /// The budget is spent.
    BudgetSpent {
        /// Tokens at hand.
        tokens: f64,
        /// GOAWAYs this apiserver may still send in this rebalancing.
        allowance: f64,
    },
    /// Nobody who was told a moment ago landed elsewhere: the load balancer may not send anybody there yet.
    Probing {
        /// Clients told in vain since somebody last landed elsewhere.
        told: u64,
        /// Until the next few are told.
        left: Duration,
    },
    /// An apiserver that was admitted a moment ago takes few: its load balancer starts it slowly.
    SlowStart {
        /// Until the next plan, of as many as it took lately.
        left: Duration,
    },
    /// Moved clients come back, again and again: moving them does not help behind this load balancer.
    Futile {
        /// Clients told in vain since somebody last landed elsewhere.
        told: u64,
        /// Until the next few are told.
        left: Duration,
    },
    /// Level, once those who were told have landed.
    ClientsInTransit {
        /// How many have not.
        clients: u64,
    },
    /// A rebalancing waits for an operator's approval.
    AwaitsApproval {
        /// What is to be approved.
        proposal: u64,
        /// GOAWAYs that this apiserver would send.
        goaways: u64,
    },
    /// A dry run has said what it would do, and nobody does it.
    DryRun {
        /// The decision that says so.
        decision: u64,
        /// GOAWAYs that it would take here.
        goaways: u64,
    },
    /// Clients that could be moved are heavier than what there is to move.
    Unmovable {
        /// The heaviest client.
        client: String,
        /// What it weighs.
        load: f64,
        /// What there is to move.
        room: f64,
    },
    /// An apiserver that would take clients refuses requests for overload.
    RecipientsStressed {
        /// Which.
        apiserver: ApiserverName,
        /// Requests it refused a short while ago.
        refused: u64,
        /// How many are taken for normal.
        limit: u64,
    },
    /// Another apiserver's plan is under way, and its clients' load is not measured yet where they landed.
    PeerPlanInFlight {
        /// Whose.
        apiserver: ApiserverName,
    },
    /// A plan is being carried out or settles.
    PlanInFlight {
        /// Its generation.
        generation: u64,
        /// Victims not yet told.
        unsent: usize,
        /// Clients told that have not landed anywhere yet.
        in_transit: u64,
    },
    /// An apiserver just (re)started, is down, or says that it is not ready.
    ApiserverStarting {
        /// Which.
        apiserver: ApiserverName,
        /// For how long it is up; `None` while it is down, or not ready.
        up: Option<Duration>,
        /// Its connections: one that is down has none, one that is about to end has.
        connections: u64,
    },
    /// Kernel events were lost and the complete list has not come yet.
    LostEvents {
        /// How many were lost since the start.
        total: u64,
    },
    /// Several services listen on the port: whose the connections are is not known.
    PortShared {
        /// Who listens where, and what to do.
        why: String,
    },
    /// More of the load than the band is wide is of connections whose protocol is not known.
    UnknownProtocols {
        /// How many.
        unknown: usize,
        /// Of how many.
        active: usize,
        /// The share that is allowed.
        limit: f64,
    },
    /// An operator paused the agent.
    Paused {
        /// On which node it was said, when it was said to all agents.
        by: Option<ApiserverName>,
        /// What for; may be empty.
        reason: String,
        /// Until it ends by itself.
        left: Option<Duration>,
    },
    /// All clients of an apiserver are being told to go, by an operator's order; at this one for as long as it is to have
    /// none.
    Evacuating {
        /// Which.
        apiserver: ApiserverName,
    },
    /// Apiservers are of different releases, or are restarted or evacuated one after the other: clients are spread once,
    /// after the last.
    UpgradeInProgress {
        /// What shows it.
        why: String,
        /// How long another step is waited for.
        left: Duration,
    },
    /// An apiserver has more to do than it can: its clients are not moved onto the others, nor others onto it.
    ApiserverOverloaded {
        /// Which.
        apiserver: ApiserverName,
        /// How many clients are connected to it.
        connections: u64,
    },
    /// The shim does not answer: nothing could be sent.
    ShimUnavailable {
        /// What it said.
        why: String,
    },
}

impl Hold {
    /// Whether it says that the load is level: the decision of nearly every interval.
    pub fn is_level(&self) -> bool {
        matches!(self, Self::BelowThreshold { .. } | Self::Noise { .. })
    }

    /// The reason as one word, for metrics and JSON.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::FewerThanTwoApiservers { .. } => "fewer_than_two_apiservers",
            Self::PeerUnknown { .. } => "peer_unknown",
            Self::MembershipUnknown { .. } => "membership_unknown",
            Self::ApiserverGone { .. } => "apiserver_gone",
            Self::SnapshotStale { .. } => "snapshot_stale",
            Self::BelowThreshold { .. } => "below_threshold",
            Self::Noise { .. } => "noise",
            Self::Unconfirmed { .. } => "unconfirmed",
            Self::CoolingDown { .. } => "cooling_down",
            Self::BudgetSpent { .. } => "budget_spent",
            Self::Probing { .. } => "probing",
            Self::SlowStart { .. } => "slow_start",
            Self::Futile { .. } => "futile",
            Self::ClientsInTransit { .. } => "clients_in_transit",
            Self::AwaitsApproval { .. } => "awaits_approval",
            Self::DryRun { .. } => "dry_run",
            Self::Unmovable { .. } => "unmovable",
            Self::RecipientsStressed { .. } => "recipients_stressed",
            Self::PeerPlanInFlight { .. } => "peer_plan_in_flight",
            Self::PlanInFlight { .. } => "plan_in_flight",
            Self::ApiserverStarting { .. } => "apiserver_starting",
            Self::ApiserverOverloaded { .. } => "apiserver_overloaded",
            Self::LostEvents { .. } => "lost_events",
            Self::PortShared { .. } => "port_shared",
            Self::UnknownProtocols { .. } => "unknown_protocols",
            Self::Paused { .. } => "paused",
            Self::Evacuating { .. } => "evacuating",
            Self::UpgradeInProgress { .. } => "upgrade_in_progress",
            Self::ShimUnavailable { .. } => "shim_unavailable",
        }
    }
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FewerThanTwoApiservers { apiservers } => {
                write!(
                    f,
                    "{apiservers} apiserver can take connections: there is nobody to move clients to"
                )
            }
            Self::PeerUnknown { peer, why } => write!(f, "nothing is known of peer {peer}: {why}"),
            Self::MembershipUnknown { why } => write!(f, "who the apiservers are is not certain: {why}"),
            Self::ApiserverGone { apiserver } => write!(
                f,
                "apiserver {apiserver} is gone: its Leases stand still and its agent does not answer; the others go on \
                 without it until it is back"
            ),
            Self::SnapshotStale { peer, age, limit } => write!(
                f,
                "the snapshot of peer {peer} is {:.1} s old, {:.1} s is allowed",
                age.as_secs_f64(),
                limit.as_secs_f64()
            ),
            Self::BelowThreshold { skew, threshold } => {
                write!(f, "skew {:+.1} % is within {:.1} %", skew * 100.0, threshold * 100.0)
            }
            Self::Noise { skew, noise_floor } => write!(
                f,
                "skew {:+.1} % is within what chance makes behind this load balancer, {:.1} %",
                skew * 100.0,
                noise_floor * 100.0
            ),
            Self::Unconfirmed { skew, looks, needed } => write!(
                f,
                "skew {:+.1} % passes in {looks} of {needed} looks in a row that it takes where loads are measured, or have just grown",
                skew * 100.0
            ),
            Self::CoolingDown {
                cooling,
                young,
                excluded,
                unknown,
            } => write!(
                f,
                "nobody can be moved now: {cooling} in their cool-down, {young} too young, {excluded} excluded or on this node, {unknown} not known to speak HTTP/2"
            ),
            Self::BudgetSpent { tokens, allowance } => write!(
                f,
                "the budget is spent: {tokens:.1} tokens, {allowance:.1} GOAWAYs left in this rebalancing"
            ),
            Self::Probing { told, left } => write!(
                f,
                "none of {told} told landed elsewhere; does the load balancer send clients there yet? next try in {}",
                spoken(*left)
            ),
            Self::SlowStart { left } => write!(
                f,
                "fewer land elsewhere than expected: does the load balancer start an apiserver slowly? next in {}",
                spoken(*left)
            ),
            Self::Futile { told, left } => write!(
                f,
                "moved clients come back: {told} told in vain; next try in {}",
                spoken(*left)
            ),
            Self::ClientsInTransit { clients } => {
                write!(f, "level when {clients} clients on their way have landed")
            }
            Self::AwaitsApproval { proposal, goaways } => write!(
                f,
                "{goaways} would be told here: waits for `rebalancer approve {proposal}`"
            ),
            Self::DryRun { decision, goaways } => {
                write!(f, "dry run: {goaways} would be told here, see decision {decision}")
            }
            Self::Unmovable { client, load, room } => write!(
                f,
                "whoever could be moved is heavier than the {room:.1} there is to move; the heaviest, {client}, weighs {load:.1}"
            ),
            Self::RecipientsStressed {
                apiserver,
                refused,
                limit,
            } => write!(
                f,
                "apiserver {apiserver} refuses more for overload than its share ({refused} just now, {limit} would be): it gets no more clients"
            ),
            Self::PeerPlanInFlight { apiserver } => write!(
                f,
                "a plan of {apiserver} is under way: what its clients weigh is not measured yet where they land"
            ),
            Self::PlanInFlight {
                generation,
                unsent,
                in_transit,
            } => {
                write!(
                    f,
                    "plan {generation} is in flight: {unsent} not told yet, {in_transit} on their way"
                )
            }
            Self::ApiserverStarting {
                apiserver,
                up: Some(up),
                connections: _,
            } => {
                write!(f, "apiserver {apiserver} is up for {:.1} s only", up.as_secs_f64())
            }
            Self::ApiserverStarting {
                apiserver,
                up: None,
                connections: 0,
            } => {
                write!(
                    f,
                    "apiserver {apiserver} is down, or its clients are still looking for another"
                )
            }
            Self::ApiserverStarting {
                apiserver,
                up: None,
                connections,
            } => {
                write!(
                    f,
                    "apiserver {apiserver} is not ready, with {connections} clients connected: it is about to end, or not whole yet"
                )
            }
            Self::ApiserverOverloaded { apiserver, connections } => write!(
                f,
                "apiserver {apiserver} is overloaded: it answers too late, or that it is not ready, with {connections} clients connected: who floods it \
                 would flood another; `rebalancer flows` there shows who, `rebalancer advise` what holds them"
            ),
            Self::PortShared { why } => f.write_str(why),
            Self::LostEvents { total } => write!(f, "{total} kernel events were lost: waiting for the complete list"),
            Self::UnknownProtocols { unknown, active, limit } => write!(
                f,
                "of {active} connections {unknown} are not known to speak HTTP/2 or not: {:.1} % is allowed",
                limit * 100.0
            ),
            Self::Paused { reason, left, by } => {
                f.write_str("paused by an operator")?;
                if let Some(by) = by {
                    write!(f, ", all agents, on {by}")?;
                }
                if let Some(left) = left {
                    write!(f, " for {} more", spoken(*left))?;
                }
                if !reason.is_empty() {
                    write!(f, ": {reason}")?;
                }
                Ok(())
            }
            Self::Evacuating { apiserver } => write!(
                f,
                "apiserver {apiserver} is evacuated by an operator: until `rebalancer return` there, or its restart"
            ),
            Self::UpgradeInProgress { why, left } => write!(
                f,
                "an upgrade is under way: {why}; clients are spread once, after the last, or when nothing more happens for \
                 {} (--upgrade-patience)",
                spoken(*left)
            ),
            Self::ShimUnavailable { why } => write!(f, "the shim does not answer: {why}"),
        }
    }
}
