//! What single flags of the agent mean: text in, a value or a sentence of what is allowed out.

use std::{net::IpAddr, path::PathBuf, str::FromStr};

use clap::ValueEnum;
use ipnet::IpNet;
use rebalancer_core::{
    ids::ApiserverName,
    policy::{GoawayRate, NodeLocal, Weight},
};
use rustls::pki_types::ServerName;
use serde::{Deserialize, Deserializer};

use crate::local::SocketPath;

/// Reads a value that the file spells as the flag does.
pub(super) fn parsed<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    let text = <Option<String>>::deserialize(deserializer)?;
    text.map(|text| text.parse().map_err(serde::de::Error::custom))
        .transpose()
}

pub(super) fn parsed_list<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    let texts = <Vec<String>>::deserialize(deserializer)?;
    texts
        .iter()
        .map(|text| text.parse().map_err(serde::de::Error::custom))
        .collect()
}

/// `ADDRESS/BITS`, or an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network(pub(super) IpNet);

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse::<IpNet>()
            .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
            .map(Self)
            .map_err(|_| format!("`{text}` is not a network: give ADDRESS/BITS, for example 10.0.0.0/8"))
    }
}

/// What sends the GOAWAY, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shim {
    /// A relay, by its control socket.
    Relay(SocketPath),
    /// The uprobe.
    Steer(Option<PathBuf>),
    /// Nothing.
    None,
}

impl FromStr for Shim {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            Some(("relay", path)) => path.parse().map(Self::Relay),
            Some(("steer", "auto")) => Ok(Self::Steer(None)),
            Some(("steer", path)) if path.starts_with('/') => Ok(Self::Steer(Some(path.into()))),
            _ => Err(format!(
                "`{text}` is not a shim: allowed are relay:unix:PATH, steer:auto, steer:PATH and none, with absolute paths"
            )),
        }
    }
}

/// How peers are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Discovery {
    /// By `--peer`.
    Static,
    /// By Leases of the cluster.
    Kubernetes,
}

/// `--goaway-rate`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate(pub(super) GoawayRate);

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "auto" {
            return Ok(Self(GoawayRate::Auto));
        }
        let rate = text
            .parse()
            .map_err(|_| format!("{text} is neither auto nor a number"))?;
        Ok(Self(GoawayRate::PerSecond(rate)))
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Text {
            Number(f64),
            Word(String),
        }
        match Text::deserialize(deserializer)? {
            Text::Number(rate) => Ok(Self(GoawayRate::PerSecond(rate))),
            Text::Word(word) => word.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// `--mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ModeName {
    /// Plans are carried out.
    Active,
    /// Everything is decided and recorded, nothing is sent.
    DryRun,
    /// Each rebalancing waits until an operator approves it.
    Propose,
}

/// `--weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum WeightName {
    /// Each connection weighs 1.
    Connections,
    /// Requests a second; needs a shim that sees them.
    Requests,
    /// Bytes a second.
    Bytes,
    /// Open streams; needs a shim that sees them.
    Streams,
}

impl From<WeightName> for Weight {
    fn from(name: WeightName) -> Self {
        match name {
            WeightName::Connections => Self::Connections,
            WeightName::Requests => Self::Requests,
            WeightName::Bytes => Self::Bytes,
            WeightName::Streams => Self::Streams,
        }
    }
}

/// `--node-local`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum NodeLocalName {
    /// Counted apart: neither load nor landings, and never told to go.
    Exclude,
    /// Load, but never told to go.
    Count,
    /// Clients like others.
    Move,
}

impl From<NodeLocalName> for NodeLocal {
    fn from(name: NodeLocalName) -> Self {
        match name {
            NodeLocalName::Exclude => Self::Exclude,
            NodeLocalName::Count => Self::Count,
            NodeLocalName::Move => Self::Move,
        }
    }
}

/// `NAME=https://HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAddress {
    /// The peer's node name.
    pub name: ApiserverName,
    /// Host, as its certificate names it, and port.
    pub host: String,
    /// The port.
    pub port: u16,
    /// The host as TLS checks it.
    pub server_name: ServerName<'static>,
}

impl FromStr for PeerAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = |what: &str| format!("`{text}` is not NAME=https://HOST:PORT: {what}");
        let (name, url) = text.split_once('=').ok_or_else(|| wrong("there is no `=`"))?;
        if name.is_empty() {
            return Err(wrong("the name is empty"));
        }
        let authority = url
            .strip_prefix("https://")
            .ok_or_else(|| wrong("the URL does not begin with https://"))?
            .trim_end_matches('/');
        let (host, port) = authority.rsplit_once(':').ok_or_else(|| wrong("there is no port"))?;
        let port = port
            .parse()
            .map_err(|_| wrong("the port is not a number from 0 to 65535"))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let server_name =
            ServerName::try_from(host.clone()).map_err(|_| wrong("the host is neither a name nor an address"))?;
        Ok(Self {
            name: ApiserverName::new(name),
            host,
            port,
            server_name,
        })
    }
}
