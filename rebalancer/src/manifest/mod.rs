//! What puts agent and relay onto a node: systemd units, static pods, a DaemonSet.
//!
//! Input: the flags both shall run with. Output: text that is printed, or written by a package.
//! Must never ask for more than the flags need: what is mounted and which capabilities there are follows from them.

mod contradictions;
mod flags;
mod pods;
#[cfg(test)]
mod tests;
mod units;

use std::fmt;

pub use contradictions::{check, is_itself};
pub use flags::{Flags, Mount, Part};
pub use pods::{Pods, daemonset, static_pod};
pub use units::{Unit, units};

/// What `--topology` knows: where a cluster's files are, and how its apiserver is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Topology {
    /// kubeadm's files below /etc/kubernetes/pki, the apiserver on port 6443 of every address
    Kubeadm,
    /// Nothing is known: every flag is given
    None,
}

impl Topology {
    /// Flags of the relay that are not given because they are the same everywhere.
    ///
    /// The relay listens on a port of its own on loopback, and the agent steers the apiserver's new connections to it.
    pub fn relay(self) -> &'static [&'static str] {
        match self {
            Self::None => &[],
            Self::Kubeadm => &[
                "--listen=127.0.0.1:6445",
                "--upstream=127.0.0.1:6443",
                "--upstream-server-name=kubernetes.default.svc",
                "--upstream-ca=/etc/kubernetes/pki/ca.crt",
                "--client-ca=/etc/kubernetes/pki/ca.crt",
                "--tls-cert=/etc/kubernetes/pki/apiserver.crt",
                "--tls-key=/etc/kubernetes/pki/apiserver.key",
                "--proxy-client-cert=/etc/kubernetes/pki/front-proxy-client.crt",
                "--proxy-client-key=/etc/kubernetes/pki/front-proxy-client.key",
                "--requestheader-client-ca-file=/etc/kubernetes/pki/front-proxy-ca.crt",
                "--requestheader-allowed-names=front-proxy-client",
                "--watch-handover=5s",
                "--metrics=127.0.0.1:9471",
            ],
        }
    }

    /// Flags of the agent beside that relay.
    pub fn agent(self) -> &'static [&'static str] {
        match self {
            Self::None => &[],
            Self::Kubeadm => &["--shim=relay:unix:/run/rebalancer/relay.sock", "--intercept"],
        }
    }
}

/// Why there is no manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The part itself would refuse its flags.
    #[error("the {part} would refuse its flags: {why}")]
    Refused {
        /// Whose.
        part: Part,
        /// In its own words.
        why: String,
    },
    /// Files named in a file cannot be mounted.
    #[error("--config: what that file names would not be in the pod: give its keys as flags")]
    ConfigFile,
    /// A path that cannot be mounted.
    #[error("--{flag} {path}: a pod needs an absolute path, of a file in a directory of its own")]
    Path {
        /// The flag.
        flag: String,
        /// Its value.
        path: String,
    },
    /// Agents of one manifest cannot have peers by name.
    #[error("--peer: all pods of a DaemonSet have the same flags: leave it out, and they find each other by Leases")]
    Peers,
    /// Rights to all Leases there are.
    #[error(
        "--namespace kube-system: the agents' right to write Leases would hold for those of others: give one of its own"
    )]
    Namespace,
    /// Flags that are good by themselves and not together.
    #[error("{0}")]
    Contradiction(String),
}

impl fmt::Display for Part {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}
