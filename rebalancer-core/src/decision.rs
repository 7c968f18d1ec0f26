//! Decisions: what is decided, with the numbers it rests on.
//!
//! Every turn of the planner ends in one [`Decision`]; a decision to do nothing names its [`Hold`].

use std::{net::SocketAddr, time::Duration};

use crate::{
    hold::Hold,
    ids::{ApiserverName, ConnectionId, Timestamp},
    policy::{Mode, Weight},
    view::View,
};

/// One connection chosen to move.
#[derive(Clone, Debug, PartialEq)]
pub struct Victim {
    /// Which connection.
    pub connection: ConnectionId,
    /// Its client's address.
    pub client: SocketAddr,
    /// Its user, where known.
    pub user: Option<String>,
    /// Its user agent, where known.
    pub user_agent: Option<String>,
    /// What it weighs.
    pub load: f64,
    /// How old it is; older when it was there before the agent.
    pub age: Duration,
    /// Why this one.
    pub why: String,
    /// What became of it, once the plan has settled.
    pub fate: Fate,
}

/// What became of one victim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is not known yet.
    Pending,
    /// It was told, and has not been seen here since.
    Told,
    /// It was told, and came back here.
    Returned,
    /// It was gone, or had heard a GOAWAY already, when the shim was to tell it.
    Gone,
    /// It was not told: a doubt came up, there was no room any more, the order expired, or it is a dry run.
    NotTold,
}

/// What a decision's numbers follow from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Derivation {
    /// The apiservers above the target whose agents act.
    pub donors: Vec<ApiserverName>,
    /// How much they are above it together.
    pub surplus: f64,
    /// The highest credible share of movers that land on no donor.
    pub rho: f64,
    /// What this apiserver must tell until it is level, those included who come back.
    pub needed: f64,
    /// Clients on their way.
    pub in_transit: u64,
    /// Skew of this apiserver when they have landed.
    pub expected_skew: f64,
    /// GOAWAYs that the rebalancing may still cost, all apiservers together.
    pub allowance: Option<f64>,
    /// Connections that a plan may have now; `None` while it is waited after a plan in vain.
    pub limit: Option<usize>,
    /// GOAWAYs a second.
    pub goaway_rate: f64,
}

/// One of the heaviest connections, whether it moves or not.
#[derive(Clone, Debug, PartialEq)]
pub struct Heavy {
    /// Which connection.
    pub connection: ConnectionId,
    /// Its client's address.
    pub client: SocketAddr,
    /// Its user, where known.
    pub user: Option<String>,
    /// Its user agent, where known.
    pub user_agent: Option<String>,
    /// What it weighs.
    pub load: f64,
    /// Requests a second.
    pub requests_per_second: f64,
    /// Bytes a second, both directions.
    pub bytes_per_second: f64,
    /// Watches open on it.
    pub open_watches: u32,
    /// Whether it is heavier than the target: wherever it is, that apiserver is above it.
    pub unmovable: bool,
}

impl Heavy {
    /// Who it is, as well as is known.
    pub fn name(&self) -> String {
        match (&self.user, &self.user_agent) {
            (Some(user), Some(agent)) => format!("{user} ({agent})"),
            (Some(name), None) | (None, Some(name)) => name.clone(),
            (None, None) => self.client.to_string(),
        }
    }
}

/// What became of the victims of a plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// Not told yet.
    pub pending: u64,
    /// Told, and not seen again anywhere yet.
    pub draining: u64,
    /// Was seen on another apiserver.
    pub moved: u64,
    /// Came back here.
    pub returned: u64,
    /// Was not told: it was gone, or a doubt came up.
    pub lost: u64,
}

/// What one turn decided, and why.
#[must_use = "an unread decision is not actionable"]
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// Counts the decisions of this agent's process.
    pub id: u64,
    /// Counts its plans, and goes on across restarts.
    pub generation: u64,
    /// When.
    pub at: Timestamp,
    /// Whether it is carried out.
    pub mode: Mode,
    /// Whose decision.
    pub node: ApiserverName,
    /// What a connection weighs.
    pub weight: Weight,
    /// What it rests on.
    pub view: View,
    /// This apiserver's load when all are level, clients in transit counted.
    pub mean: f64,
    /// Skew of this apiserver: its load in the view against the mean of those in it.
    pub skew: f64,
    /// Skew that starts a plan.
    pub threshold: f64,
    /// Skew that chance alone makes.
    pub noise_floor: f64,
    /// Rho, as learned.
    pub rho: f64,
    /// GOAWAYs that this apiserver should send.
    pub quota: u64,
    /// What that follows from.
    pub derivation: Derivation,
    /// Who is told.
    pub victims: Vec<Victim>,
    /// Why nobody is; `None` exactly when there are victims.
    pub hold: Option<Hold>,
    /// What became of them.
    pub outcomes: Outcomes,
    /// The heaviest connections, whether they move or not; a recorded decision that finds the load level leaves them out.
    pub heaviest: Vec<Heavy>,
    /// In plain words: why these, why so many, what is expected.
    pub explanation: String,
}
