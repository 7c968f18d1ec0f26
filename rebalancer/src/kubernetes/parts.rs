//! What the agent hands to the task that finds its peers by Leases.

use std::sync::Arc;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use rebalancer_core::{agent::Input, membership::KeyHash, policy::Policy};
use tokio::sync::mpsc;

use crate::agent::{
    config::KubernetesConfig,
    handle::{AgentHandle, Clock},
    peers::{
        Manners,
        pin::{Identity, PinnedTls},
        tls::PeerTls,
    },
};

/// What requests came to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// What was asked for.
    pub verb: &'static str,
    /// What came of it.
    pub result: &'static str,
}

/// Requests to the Kubernetes API, counted.
pub type Requests = Family<RequestLabels, Counter>;

/// What the task works with.
pub struct Parts {
    /// Who this agent is.
    pub policy: Arc<Policy>,
    /// The port of its apiserver.
    pub apiserver_port: u16,
    /// Where the way in is.
    pub config: KubernetesConfig,
    /// The clock of the loop.
    pub clock: Clock,
    /// Requests, counted.
    pub requests: Requests,
    /// Who may ask.
    pub tls: Arc<PeerTls>,
    /// What peers show beside their snapshots.
    pub manners: Manners,
    /// This process's key.
    pub key: KeyHash,
    /// Names this process.
    pub instance: u64,
    /// To the loop.
    pub inputs: mpsc::Sender<Input>,
    /// Whose decisions are told of.
    pub agent: AgentHandle,
}

/// Makes this process's key, and TLS that knows nobody yet.
///
/// # Errors
///
/// The system gives no randomness.
pub fn identity() -> anyhow::Result<(PeerTls, KeyHash)> {
    let identity = Identity::make()?;
    let key = identity.hash;
    Ok((PeerTls::Pinned(PinnedTls::new(identity)?), key))
}
