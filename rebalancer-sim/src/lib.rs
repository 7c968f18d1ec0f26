//! A seeded simulator in virtual time: apiservers, a load balancer, clients, and the contenders side by side.
//!
//! Job: say what the rebalancer, the goaway lottery, an age limit and nobody do to one and the same cluster, and what it costs.
//! Input: a [`setup::Setup`] and a seed. Output: a [`figures::Run`].
//! It drives the very core the agent runs; it must never read a clock or an unseeded source of randomness.
#![forbid(unsafe_code)]

mod agents;
pub mod balancer;
mod clock;
pub mod figures;
mod gauge;
mod incidents;
mod node;
pub mod picture;
mod queue;
mod random;
pub mod scenario;
pub mod setup;
mod strangers;
mod world;

pub use world::simulate;
