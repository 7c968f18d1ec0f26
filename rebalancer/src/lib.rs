//! The library half of the `rebalancer` binary, so that its parts can be tested from outside.
//!
//! Job: everything that touches the world: kernel programs, sockets, files, clocks, the command line.
//! Must never decide: what is decided comes from `rebalancer-core`.

pub mod agent;
pub mod cli;
pub mod doctor;
mod heap;
pub mod intercept;
pub mod kernel;
pub mod kubernetes;
mod listen;
pub mod local;
pub mod log;
pub mod manifest;
mod random;
#[cfg(test)]
mod reference;
pub mod relay;
pub mod service;
pub mod shim;
pub mod span;
pub mod steer;
mod sys;
