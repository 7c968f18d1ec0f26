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
    /// Told, old streams still open, and not yet settled.
    pub draining: u64,
    /// Went to another apiserver.
    pub moved: u64,
    /// Came back here.
    pub returned: u64,
    /// Was gone before it could be told.
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
    /// Mean load of the apiservers that take connections.
    pub mean: f64,
    /// Skew of this apiserver.
    pub skew: f64,
    /// Skew that starts a plan.
    pub threshold: f64,
    /// Skew that chance alone makes.
    pub noise_floor: f64,
    /// Rho, as learned.
    pub rho: f64,
    /// GOAWAYs that this apiserver should send.
    pub quota: u64,
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
