//! The agent: one event loop around the core.
//!
//! Job: bring what happens to the core and carry out what it says.
//! Input: a checked configuration. Output: orders to the shim, decisions for whoever reads them.
//! Must never decide: see `rebalancer_core::agent`.

pub mod api;
pub mod config;
pub mod decision_log;
pub mod handle;
pub mod heart;
pub mod lb;
pub mod metrics;
pub mod peers;
mod places;
pub mod record;
pub mod run;
mod select;
pub mod state;
pub mod watch;
pub mod wire;
