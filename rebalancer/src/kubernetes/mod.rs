//! Peers by the cluster's own word: a Lease per agent says who is there, the apiservers' identity Leases who should be.
//!
//! Job: write this agent's Lease, read all others, and tell the loop who is who. Input: `--peers kubernetes` and what goes
//! with it. Output: rolls and the peers' answers. Must never wait for the API before the agent starts: it is the apiserver
//! that the agent is for; while it is away nothing is decided, and the hold says why.

mod access;
mod events;
mod flow_control;
mod leases;
mod membership;

pub use access::{Access, RequestLabels, Requests, credentials};
pub use flow_control::{FlowControl, FlowControlReader, Shown};
pub use membership::{Parts, identity, start};
