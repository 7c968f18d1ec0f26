//! Where observations come from: kernel programs, or the kernel's socket list.
//!
//! Job: tell the agent of every connection on the watched port, and say when something was missed.
//! Output: [`Observation`]s, the first of which is a complete list. Must never invent what was not seen.

mod addresses;
mod ebpf;
mod ebpf_error;
mod events;
mod hook;
mod listeners;
mod offsets;
mod records;
mod refusal;
mod release;
pub mod sockdiag;

use std::{io, net::IpAddr, path::PathBuf};

use clap::ValueEnum;
use listeners::Listeners;
use rebalancer_core::observation::Observation;
use serde::{Deserialize, Serialize};

pub use refusal::{Lockdown, hint, probe_hint};
pub use release::OLDEST;
pub use sockdiag::list;

/// Which source is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SourceKind {
    /// Kernel programs where they load, else the socket list; one line says what is missing.
    #[default]
    Auto,
    /// Kernel programs.
    Ebpf,
    /// The kernel's socket list, polled.
    Sockdiag,
}

/// What the kernel programs say of themselves in the log; each level includes those before it.
///
/// Off, the verifier removes every log statement: the programs are as if there were none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KernelLog {
    /// Nothing.
    #[default]
    Off = 0,
    /// What failed.
    Error = 1,
    /// What found no room.
    Warn = 2,
    /// What is worth knowing.
    Info = 3,
    /// Each event.
    Debug = 4,
    /// Each step.
    Trace = 5,
}

/// Whether what clients offer is read from their packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Classify {
    /// Unless the shim names the protocol of every connection, as a relay does.
    #[default]
    Auto,
    /// No packet is looked at.
    Off,
}

/// What is watched, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which source.
    pub source: SourceKind,
    /// The watched port, in this process's network namespace.
    pub port: u16,
    /// The apiserver's addresses, where something else has the port at another one; empty for all of them.
    pub addresses: Vec<IpAddr>,
    /// What the kernel programs log.
    pub kernel_log: KernelLog,
    /// Whether ClientHellos are read.
    pub classify: bool,
    /// Where the host's cgroup2 hierarchy is; found where it is not named.
    pub cgroup_root: Option<PathBuf>,
}

/// Why a source cannot be had, or has failed.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The kernel refuses the socket list.
    #[error("--source sockdiag: {0}")]
    Sockdiag(Box<str>),
    /// The kernel refuses the programs.
    #[error("--source ebpf: {0}")]
    Ebpf(Box<str>),
}

// The whole chain is in the message: a verifier's answer should be read once, not once a layer.
impl From<ebpf_error::EbpfError> for SourceError {
    fn from(error: ebpf_error::EbpfError) -> Self {
        Self::Ebpf(error.to_string().into())
    }
}

impl From<sockdiag::SockdiagError> for SourceError {
    fn from(error: sockdiag::SockdiagError) -> Self {
        Self::Sockdiag(error.to_string().into())
    }
}

/// An open source.
pub struct Source {
    kind: Kind,
    listeners: Listeners,
}

enum Kind {
    /// The kernel programs.
    Ebpf(Box<ebpf::Programs>),
    /// The polled socket list.
    Sockdiag(Box<sockdiag::Sockdiag>),
}

impl Source {
    /// Opens the source for one port in this process's network namespace.
    ///
    /// # Errors
    ///
    /// What the kernel refuses, and what to do about it.
    pub fn open(options: &Options) -> Result<Self, SourceError> {
        let sockdiag = || sockdiag::Sockdiag::open(options.port, options.classify).map(Box::new);
        let kind = match options.source {
            SourceKind::Ebpf => Kind::Ebpf(Box::new(ebpf::Programs::open(options)?)),
            SourceKind::Sockdiag => Kind::Sockdiag(sockdiag()?),
            SourceKind::Auto => match ebpf::Programs::open(options) {
                Ok(programs) => Kind::Ebpf(Box::new(programs)),
                Err(error) => {
                    tracing::warn!(
                        "counting by the socket list (sockdiag), because kernel programs cannot be used: {error}"
                    );
                    Kind::Sockdiag(sockdiag()?)
                }
            },
        };
        Ok(Self {
            kind,
            listeners: Listeners::new(options.port, &options.addresses),
        })
    }

    /// `ebpf` or `sockdiag`.
    pub fn name(&self) -> &'static str {
        match &self.kind {
            Kind::Ebpf(_) => "ebpf",
            Kind::Sockdiag(_) => "sockdiag",
        }
    }

    /// What happened since the last call: at least one observation. Dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// The source has failed for good.
    pub async fn next(&mut self) -> Result<Vec<Observation>, SourceError> {
        loop {
            let observations = match &mut self.kind {
                Kind::Ebpf(source) => source.next().await?,
                Kind::Sockdiag(source) => source.next().await?,
            };
            let passed = self.listeners.pass(observations);
            if !passed.is_empty() {
                return Ok(passed);
            }
        }
    }

    /// Makes the next observation a complete list.
    pub fn resync(&mut self) {
        match &mut self.kind {
            Kind::Ebpf(source) => source.resync(),
            Kind::Sockdiag(source) => source.resync(),
        }
    }

    /// Lists once more soon, beside the events.
    pub fn confirm(&mut self) {
        match &mut self.kind {
            Kind::Ebpf(source) => source.confirm(),
            Kind::Sockdiag(source) => source.confirm(),
        }
    }

    /// Where ClientHellos are read, or why they are not; `None` when they are not to be, or nobody has looked yet.
    pub fn reading(&self) -> Option<Result<String, String>> {
        match &self.kind {
            Kind::Ebpf(source) => source.reading().cloned(),
            Kind::Sockdiag(_) => Some(Err(sockdiag::BLIND.to_owned())),
        }
    }
}

/// The node's addresses, when they are others than before.
fn changed_addresses(known: &mut Vec<IpAddr>, found: io::Result<Vec<IpAddr>>) -> Option<Observation> {
    match found {
        Ok(found) if found != *known => {
            known.clone_from(&found);
            Some(Observation::Addresses(found))
        }
        Ok(_) => None,
        Err(error) => {
            tracing::debug!(%error, "this node's addresses cannot be read: those that were known hold");
            None
        }
    }
}
