//! Where observations come from: kernel programs, or the kernel's socket list.
//!
//! Job: tell the agent of every connection on the watched port, and say when something was missed.
//! Output: [`Observation`]s, the first of which is a complete list. Must never invent what was not seen.

mod ebpf;
mod release;
mod sockdiag;

use clap::ValueEnum;
use rebalancer_core::observation::Observation;
use serde::{Deserialize, Serialize};

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
impl From<ebpf::EbpfError> for SourceError {
    fn from(error: ebpf::EbpfError) -> Self {
        Self::Ebpf(error.to_string().into())
    }
}

impl From<sockdiag::SockdiagError> for SourceError {
    fn from(error: sockdiag::SockdiagError) -> Self {
        Self::Sockdiag(error.to_string().into())
    }
}

/// An open source.
pub enum Source {
    /// The kernel programs.
    Ebpf(Box<ebpf::Programs>),
    /// The polled socket list.
    Sockdiag(sockdiag::Sockdiag),
}

impl Source {
    /// Opens the source for one port in this process's network namespace.
    ///
    /// # Errors
    ///
    /// What the kernel refuses, and what to do about it.
    pub fn open(kind: SourceKind, port: u16, log: KernelLog) -> Result<Self, SourceError> {
        match kind {
            SourceKind::Ebpf => Ok(Self::Ebpf(Box::new(ebpf::Programs::open(port, log)?))),
            SourceKind::Sockdiag => Ok(Self::Sockdiag(sockdiag::Sockdiag::open(port)?)),
            SourceKind::Auto => match ebpf::Programs::open(port, log) {
                Ok(programs) => Ok(Self::Ebpf(Box::new(programs))),
                Err(error) => {
                    tracing::warn!(
                        "counting by the socket list (sockdiag), because kernel programs cannot be used: {error}"
                    );
                    Ok(Self::Sockdiag(sockdiag::Sockdiag::open(port)?))
                }
            },
        }
    }

    /// `ebpf` or `sockdiag`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ebpf(_) => "ebpf",
            Self::Sockdiag(_) => "sockdiag",
        }
    }

    /// What happened since the last call: at least one observation. Dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// The source has failed for good.
    pub async fn next(&mut self) -> Result<Vec<Observation>, SourceError> {
        match self {
            Self::Ebpf(source) => Ok(source.next().await?),
            Self::Sockdiag(source) => Ok(source.next().await?),
        }
    }

    /// Makes the next observation a complete list.
    pub fn resync(&mut self) {
        match self {
            Self::Ebpf(source) => source.resync(),
            Self::Sockdiag(source) => source.resync(),
        }
    }
}
