//! `rebalancer manifest`: prints what puts agent and relay onto a node.

use std::{fs, path::PathBuf};

use anyhow::Context as _;
use clap::{Args, Command, ValueEnum};

use super::{Failure, agent, print, relay};
use crate::manifest::{Flags, ManifestError, Part, Pods, Topology, check, daemonset, static_pod, units};

/// Print what puts agent and relay onto a node, for the flags given
#[derive(Debug, Args)]
pub struct Arguments {
    /// What is printed
    #[arg(value_enum)]
    kind: Kind,
    /// Whose files and ports are taken for flags that are not given
    #[arg(long, value_enum, default_value = "kubeadm")]
    topology: Topology,
    /// A flag of the agent, for example --agent-flag=--dry-run; may be given several times
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    agent_flag: Vec<String>,
    /// A flag of the relay, for example --relay-flag=--listen=[::]:6443; may be given several times
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    relay_flag: Vec<String>,
    /// The image that the pods run
    #[arg(long, default_value = concat!("rebalancer:", env!("CARGO_PKG_VERSION")))]
    image: String,
    /// The namespace that the pods are in, and a DaemonSet's Leases [default: kube-system for a static pod, rebalancer for a
    /// DaemonSet]
    #[arg(long)]
    namespace: Option<String>,
    /// Write a file each into this directory instead
    #[arg(long, value_name = "PATH")]
    directory: Option<PathBuf>,
}

/// What is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Units: rebalancer-agent.service and rebalancer-relay@.service
    Systemd,
    /// A pod of one node, for the kubelet's directory of manifests
    StaticPod,
    /// Pods on all control-plane nodes, with the rights they need, for kubectl apply
    Daemonset,
}

/// Prints it.
pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    let refused = |error: ManifestError| Failure::Configuration(error.into());
    let (agent, relay) = flags(arguments).map_err(refused)?;
    let files: Vec<(String, String)> = match arguments.kind {
        Kind::Systemd => units(&agent, relay.as_ref())
            .into_iter()
            .map(|unit| (unit.name.to_owned(), unit.text))
            .collect(),
        Kind::StaticPod | Kind::Daemonset => {
            let pods = Pods {
                image: arguments.image.clone(),
                namespace: namespace(arguments),
                agent,
                relay,
            };
            let text = match arguments.kind {
                Kind::Daemonset => daemonset(&pods).map_err(refused)?,
                _ => static_pod(&pods).map_err(refused)?,
            };
            vec![("rebalancer.yaml".to_owned(), text)]
        }
    };
    let Some(directory) = &arguments.directory else {
        let alone = files.len() == 1;
        let shown = files.iter().map(|(name, text)| {
            if alone {
                text.clone()
            } else {
                format!("# {name}\n{text}")
            }
        });
        return print(&shown.collect::<Vec<_>>().join("\n"));
    };
    for (name, text) in files {
        let path = directory.join(name);
        fs::write(&path, text).with_context(|| format!("--directory: cannot write {}", path.display()))?;
    }
    Ok(())
}

fn namespace(arguments: &Arguments) -> String {
    let default = match arguments.kind {
        Kind::Daemonset => "rebalancer",
        Kind::Systemd | Kind::StaticPod => "kube-system",
    };
    arguments.namespace.clone().unwrap_or_else(|| default.to_owned())
}

/// The flags of both, the topology's first; where the agent's shim is no relay there is none.
fn flags(arguments: &Arguments) -> Result<(Flags, Option<Flags>), ManifestError> {
    let are_none_given = arguments.agent_flag.is_empty() && arguments.relay_flag.is_empty();
    if arguments.kind == Kind::Systemd && arguments.topology == Topology::None && are_none_given {
        // The units' files of variables have them.
        return Ok((Flags::none(Part::Agent), Some(Flags::none(Part::Relay))));
    }
    let parsed = |words: Vec<String>| {
        Flags::parse(
            Part::Agent,
            <agent::Arguments as Args>::augment_args(Command::new("")),
            words,
        )
    };
    // A topology's flags are of a relay and the agent beside it.
    let is_other = |shim: &str| !shim.starts_with("relay:");
    let topology = match parsed(arguments.agent_flag.clone())?.value("shim") {
        Some(shim) if is_other(shim) => Topology::None,
        _ => arguments.topology,
    };
    let mut known: Vec<String> = topology.agent().iter().map(|flag| (*flag).to_owned()).collect();
    if arguments.kind == Kind::Daemonset {
        known.push("--peers=kubernetes".to_owned());
        known.push(format!("--lease-namespace={}", namespace(arguments)));
    }
    let agent = parsed(merged(&known, &arguments.agent_flag))?;
    if agent.value("shim").is_none_or(is_other) {
        if !arguments.relay_flag.is_empty() {
            return Err(ManifestError::Contradiction(
                "--relay-flag is given, and the agent's --shim is no relay: leave one of them out".to_owned(),
            ));
        }
        check(&agent, None)?;
        return Ok((agent, None));
    }
    let relay = Flags::parse(
        Part::Relay,
        <relay::Arguments as Args>::augment_args(Command::new("")),
        merged(
            &topology
                .relay()
                .iter()
                .map(|flag| (*flag).to_owned())
                .collect::<Vec<_>>(),
            &arguments.relay_flag,
        ),
    )?;
    check(&agent, Some(&relay))?;
    Ok((agent, Some(relay)))
}

/// A topology's flags without those that are given, and the given ones.
fn merged(known: &[String], given: &[String]) -> Vec<String> {
    let name = |flag: &str| flag.split('=').next().unwrap_or_default().to_owned();
    let known = known
        .iter()
        .filter(|known| given.iter().all(|flag| name(flag) != name(known)));
    known.cloned().chain(given.iter().cloned()).collect()
}
