//! `rebalancer doctor`: what is missing, wrong or about to end on this node, each with what to do.
//!
//! Input: the machine, the files, the processes that run here. Output: findings.
//! Must never change anything, and never call good what could not be looked at.

mod files;
mod machine;
mod neighbours;
mod running;
mod trust;

pub use files::{certificate, room};
pub use machine::{Check, features};
pub use neighbours::{Neighbour, port, steering};
pub use running::{agent, apiserver, process, relay};
pub use trust::{Known, Told, trust};

/// How bad it is; the worst comes last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Gravity {
    /// As it should be.
    Good,
    /// Worth knowing, and nothing to do.
    Note,
    /// It works, and something should be done.
    Soon,
    /// It does not work.
    Wrong,
}

impl Gravity {
    /// In the table and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Note => "note",
            Self::Soon => "soon",
            Self::Wrong => "wrong",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What: a name that stays the same.
    pub what: String,
    /// How bad it is.
    pub gravity: Gravity,
    /// What was found.
    pub found: String,
    /// What to do; nothing where all is well.
    pub fix: Option<String>,
}

impl Finding {
    /// As it should be.
    pub fn good(what: &str, found: impl Into<String>) -> Self {
        Self {
            what: what.to_owned(),
            gravity: Gravity::Good,
            found: found.into(),
            fix: None,
        }
    }

    /// Worth knowing.
    pub fn note(what: &str, found: impl Into<String>) -> Self {
        Self {
            gravity: Gravity::Note,
            ..Self::good(what, found)
        }
    }

    /// To be mended.
    pub fn mend(what: &str, gravity: Gravity, found: impl Into<String>, fix: impl Into<String>) -> Self {
        debug_assert!(gravity >= Gravity::Soon, "what is well needs no fix");
        Self {
            gravity,
            fix: Some(fix.into()),
            ..Self::good(what, found)
        }
    }
}
