//! What one Lease says.
//!
//! Input: name, labels, annotations and holder of a Lease, as anybody with the right to may have written them.
//! Output: an [`AgentLease`] or an [`ApiserverLease`], or in words why it is neither. Must never take a part for the whole.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use crate::ids::ApiserverName;

/// The label by which agents' Leases are found, and its value.
pub const AGENT_LABEL: (&str, &str) = ("rebalancer/lease", "agent");

/// The label by which a kube-apiserver's identity Lease is found, and its value (KEP-1965; kubernetes,
/// pkg/controlplane/apiserver/server.go, `IdentityLeaseComponentLabelKey`).
pub const IDENTITY_LABEL: (&str, &str) = ("apiserver.kubernetes.io/identity", "kube-apiserver");

/// The label of an identity Lease that names the host (`labelAPIServerHeartbeatFunc` there).
const HOSTNAME_LABEL: &str = "kubernetes.io/hostname";

const NODE: &str = "rebalancer/node";
const HOST: &str = "rebalancer/host";
const ADDRESS: &str = "rebalancer/address";
const KEY: &str = "rebalancer/key-sha256";
const RELEASE: &str = "rebalancer/version";
const POLICY: &str = "rebalancer/policy";

/// What the name of an agent's Lease begins with.
const PREFIX: &str = "rebalancer-";

/// A name is no longer than a DNS name (RFC 1035, section 2.3.4), which is what Kubernetes takes for objects.
const LONGEST_NAME: usize = 253;

/// SHA-256 of a public key, as SubjectPublicKeyInfo in DER has it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// Takes the digest.
    pub const fn new(digest: [u8; 32]) -> Self {
        Self(digest)
    }
}

impl fmt::Display for KeyHash {
    /// All of it, or with a precision its first digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(64).min(64);
        let nibble = |index: usize| self.0[index / 2] >> if index.is_multiple_of(2) { 4 } else { 0 } & 0xf;
        (0..digits).try_for_each(|index| write!(f, "{:x}", nibble(index)))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:.8}")
    }
}

impl FromStr for KeyHash {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || "it is not a SHA-256 in 64 hexadecimal digits".to_owned();
        if text.len() != 64 || !text.bytes().all(|octet| octet.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        let mut digest = [0; 32];
        for (octet, digits) in digest.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = str::from_utf8(digits).map_err(|_| wrong())?;
            *octet = u8::from_str_radix(digits, 16).map_err(|_| wrong())?;
        }
        Ok(Self(digest))
    }
}

/// Where an agent answers, and by which key it is known there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// Address and port.
    pub address: SocketAddr,
    /// The key it shows.
    pub key: KeyHash,
}

/// An agent's Lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentLease {
    /// Its node.
    pub node: ApiserverName,
    /// The host's own name, which an apiserver on it goes by.
    pub host: String,
    /// Where it answers.
    pub endpoint: Endpoint,
    /// Its release.
    pub release: String,
    /// What the flags that all agents must be given alike come to.
    pub policy: String,
    /// Names the process: another one after each start.
    pub holder: String,
}

/// A kube-apiserver's identity Lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiserverLease {
    /// The host it runs on.
    pub host: String,
}

/// What the API shows of a Lease.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its labels.
    pub labels: &'a BTreeMap<String, String>,
    /// Its annotations.
    pub annotations: &'a BTreeMap<String, String>,
    /// Its `holderIdentity`.
    pub holder: &'a str,
}

/// The name of a node's Lease.
pub fn lease_name(node: &ApiserverName) -> String {
    format!("{PREFIX}{node}")
}

impl AgentLease {
    /// Reads it.
    ///
    /// # Errors
    ///
    /// What is missing or wrong, in words.
    pub fn read(shown: Shown<'_>) -> Result<Self, String> {
        let annotation = |name: &str| {
            let value = shown.annotations.get(name).map(String::as_str).unwrap_or_default();
            if value.is_empty() {
                Err(format!("its annotation {name} is missing"))
            } else if value.len() > LONGEST_NAME {
                Err(format!("its annotation {name} has {} octets", value.len()))
            } else {
                Ok(value)
            }
        };
        let node = annotation(NODE)?;
        let expected = shown.name.strip_prefix(PREFIX);
        if expected != Some(node) {
            return Err(format!(
                "it names the node {node}, whose Lease is {PREFIX}{node}: somebody else wrote it"
            ));
        }
        let address: SocketAddr = annotation(ADDRESS)?
            .parse()
            .map_err(|_| format!("its annotation {ADDRESS} is not ADDRESS:PORT"))?;
        if address.port() == 0 || address.ip().is_unspecified() || address.ip().is_multicast() {
            return Err(format!("its annotation {ADDRESS} is {address}, where nobody answers"));
        }
        let key = annotation(KEY)?
            .parse()
            .map_err(|error| format!("its annotation {KEY}: {error}"))?;
        if shown.holder.is_empty() {
            return Err("it has no holder".to_owned());
        }
        Ok(Self {
            node: ApiserverName::new(node),
            host: annotation(HOST)?.to_owned(),
            endpoint: Endpoint { address, key },
            release: annotation(RELEASE)?.to_owned(),
            policy: annotation(POLICY)?.to_owned(),
            holder: shown.holder.to_owned(),
        })
    }

    /// What is written so that [`Self::read`] reads it.
    pub fn annotations(&self) -> BTreeMap<String, String> {
        [
            (NODE, self.node.to_string()),
            (HOST, self.host.clone()),
            (ADDRESS, self.endpoint.address.to_string()),
            (KEY, self.endpoint.key.to_string()),
            (RELEASE, self.release.clone()),
            (POLICY, self.policy.clone()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }
}

impl ApiserverLease {
    /// Reads it.
    ///
    /// # Errors
    ///
    /// It names no host.
    pub fn read(shown: Shown<'_>) -> Result<Self, String> {
        match shown.labels.get(HOSTNAME_LABEL) {
            Some(host) if !host.is_empty() => Ok(Self { host: host.clone() }),
            _ => Err(format!("its label {HOSTNAME_LABEL} is missing")),
        }
    }
}

/// Whether a node of that name can have a Lease: its name is part of the Lease's, which is a DNS name (RFC 1123).
pub fn can_have_a_lease(node: &ApiserverName) -> bool {
    let name = node.as_str();
    let is_label = |label: &str| {
        let ends = |octet: Option<u8>| octet.is_some_and(|octet| octet.is_ascii_lowercase() || octet.is_ascii_digit());
        let (first, last) = (label.bytes().next(), label.bytes().next_back());
        ends(first)
            && ends(last)
            && label
                .bytes()
                .all(|octet| octet.is_ascii_lowercase() || octet.is_ascii_digit() || octet == b'-')
    };
    PREFIX.len() + name.len() <= LONGEST_NAME && name.split('.').all(is_label)
}

/// Whether an address can be told to others as this agent's.
pub fn can_be_reached(address: IpAddr) -> bool {
    !address.is_unspecified() && !address.is_multicast()
}
