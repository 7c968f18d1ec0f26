//! `rebalancer agent`: one on each control-plane node.

use clap::Args;

use super::{Failure, runtime};
use crate::{
    agent::{
        config::{Config, Peering, Raw},
        peers::tls::FileTls,
        run,
        wire::{agreement, shim_name},
    },
    kubernetes::cluster_url,
    service, sys,
};

/// Count the local apiserver's connections, compare with the peers, and move clients when the skew asks for it
#[derive(Debug, Args)]
pub struct Arguments {
    /// Check flags, environment, --config and the certificates' files, say what they come to, and end
    #[arg(long)]
    check_config: bool,
    #[command(flatten)]
    raw: Raw,
}

/// Runs the agent until it is told to end. What stops it before it has begun can be mended by the operator.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let config = arguments.raw.complete().map_err(Failure::Configuration)?;
    if arguments.check_config {
        return check(&config);
    }
    sys::survive_full_files();
    runtime()?.block_on(async {
        let running = run::start(config).await.map_err(Failure::to_start)?;
        service::ready();
        running.run().await.map_err(Failure::Job)
    })
}

fn check(config: &Config) -> Result<(), Failure> {
    let policy = &config.policy;
    let mut said = format!("node {}, shim {}", policy.node, shim_name(policy.shim));
    match &config.peers {
        None => {}
        Some(Peering::Static(peers)) => {
            FileTls::load(peers).map_err(Failure::Configuration)?;
            let names: Vec<_> = policy.peers.iter().map(ToString::to_string).collect();
            said += &format!(", peers {}", names.join(", "));
        }
        Some(Peering::Kubernetes(peers)) => {
            let url = cluster_url(peers.kubeconfig.as_deref());
            let url = runtime()?.block_on(url).map_err(Failure::Configuration)?;
            said += &format!(", peers by Leases in {} of {url}", peers.namespace);
        }
    }
    said += "\nthe same for all agents:";
    for (flag, value) in agreement(policy) {
        said += &format!(" {flag} {value}");
    }
    super::print(&format!("the configuration is good: {said}\n"))
}
