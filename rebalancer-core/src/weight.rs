//! What a connection weighs, and everything that follows from it.
//!
//! Job: the one place that knows how the weights differ: a new weight is a change of this file and of the flag's spelling.
//! Input: a connection, or totals of a cluster. Output: loads, floors, words.
//! Must never say that a load is known before it can be.

use std::time::Duration;

use crate::{
    planner::noise::{self, Floor},
    table::Connection,
};

/// What a connection weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// Each connection weighs 1.
    Connections,
    /// Requests a second.
    Requests,
    /// Bytes a second, both directions.
    Bytes,
    /// Open streams.
    Streams,
}

/// How fast smoothed rates follow: the time in which an old rate loses 63 % of its weight.
pub const SMOOTHING: Duration = Duration::from_secs(30);

impl Weight {
    /// Whether each connection weighs 1: nothing must be measured, and all connections are alike.
    pub const fn is_counted(self) -> bool {
        matches!(self, Self::Connections)
    }

    /// What one connection weighs.
    pub fn of(self, connection: &Connection) -> f64 {
        match self {
            Self::Connections => 1.0,
            Self::Requests => connection.rates.requests,
            Self::Bytes => connection.rates.bytes,
            Self::Streams => f64::from(connection.counters.open_streams),
        }
    }

    /// How long loads must have been measured before they say anything.
    pub const fn measured_after(self) -> Duration {
        match self {
            Self::Connections | Self::Streams => Duration::ZERO,
            Self::Requests | Self::Bytes => SMOOTHING,
        }
    }

    /// Looks in a row that must pass the trigger before a rebalancing begins: one measured figure may be chance.
    pub const fn looks(self) -> u32 {
        if self.is_counted() { 1 } else { 3 }
    }

    /// How far chance takes the load of one of `apiservers` apiservers from its own `mean`, to which that `part` of all
    /// `connections` belongs.
    pub fn floor(self, apiservers: usize, part: f64, connections: f64, mean: f64) -> Floor {
        match self {
            Self::Connections => noise::floor(apiservers, part, connections),
            Self::Requests => noise::of_rates(apiservers, mean, SMOOTHING.as_secs_f64()),
            // How bytes and streams vary by themselves is not known: the threshold stands.
            Self::Bytes | Self::Streams => Floor { above: 0.0, below: 0.0 },
        }
    }

    /// The unit, for people.
    pub const fn unit(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Requests => "requests a second",
            Self::Bytes => "bytes a second",
            Self::Streams => "open streams",
        }
    }

    /// Who is told first, for people.
    pub const fn choice(self) -> &'static str {
        match self {
            Self::Connections => "those with the fewest open watches, then the oldest",
            Self::Requests | Self::Bytes | Self::Streams => "the heaviest that fit",
        }
    }
}
