//! API Priority and Fairness by its documented arithmetic: how many seats a level has, how likely a quiet flow is crowded
//! out, and which manifest holds somebody who floods.
//!
//! Job: [`advise`] answers an operator's question with a FlowSchema and a PriorityLevelConfiguration, why, and what it will
//! cost. Input: the cluster's own levels and schemas, who floods, what was seen of him. Output: an [`Advice`] or one clear
//! sentence why there is none. Must never apply anything, nor take a number from anywhere but its input and the
//! documentation.

mod advice;
mod place;
mod schemas;
mod seats;
mod shuffle;
mod words;
mod yaml;

pub use advice::{Advice, LISTS, Observed, Question, Refused, advise};
pub use schemas::{Resources, Rule, Schema, Subject};
pub use seats::{lists_at_once, nominal_seats, widest_list};
pub use shuffle::{Hand, crowded_out};

/// A PriorityLevelConfiguration, as far as it bears on others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Level {
    /// Its name.
    pub name: String,
    /// Whether it has no limit.
    pub is_exempt: bool,
    /// `nominalConcurrencyShares`.
    pub shares: u32,
    /// `borrowingLimitPercent`; `None` borrows every seat that others lend.
    pub borrowing_limit_percent: Option<u32>,
}
