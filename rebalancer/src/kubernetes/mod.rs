//! Peers by the cluster's own word: a Lease per agent says who is there, the apiservers' identity Leases who should be.
//!
//! Job: write this agent's Lease, read all others, and tell the loop who is who. Input: `--peers kubernetes` and what goes
//! with it. Output: rolls and the peers' answers. Must never wait for the API before the agent starts: it is the apiserver
//! that the agent is for; while it is away nothing is decided, and the hold says why.
//!
//! Without cargo's feature `kubernetes` all of it is left out, with what it is made of, and `absent.rs` refuses in its place.

#[cfg(not(feature = "kubernetes"))]
mod absent;
#[cfg(feature = "kubernetes")]
mod access;
#[cfg(feature = "kubernetes")]
mod events;
mod flow_control;
#[cfg(feature = "kubernetes")]
mod flow_reader;
#[cfg(feature = "kubernetes")]
mod leases;
#[cfg(feature = "kubernetes")]
mod membership;
mod parts;

#[cfg(not(feature = "kubernetes"))]
pub use absent::{Access, FlowControlReader, cluster_url, start};
#[cfg(feature = "kubernetes")]
pub use access::{Access, cluster_url};
pub use flow_control::{FlowControl, Shown};
#[cfg(feature = "kubernetes")]
pub use flow_reader::FlowControlReader;
#[cfg(feature = "kubernetes")]
pub use membership::start;
pub use parts::{Parts, RequestLabels, Requests, identity};

/// Whether this program can ask the Kubernetes API.
pub const IS_BUILT_IN: bool = cfg!(feature = "kubernetes");

/// Why it cannot where it cannot, and what to do.
pub const ABSENT: &str = "this program was built without the Kubernetes API (cargo's feature `kubernetes`, which \
                          `rebalancer --version` shows): take one that has it";
