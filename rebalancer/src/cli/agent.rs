//! `rebalancer agent`: one on each control-plane node.

use clap::Args;

use super::{Failure, runtime};
use crate::agent::{config::Raw, run};

/// Count the local apiserver's connections, compare with the peers, and move clients when the skew asks for it
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    raw: Raw,
}

/// Runs the agent until it is told to end.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let config = arguments.raw.complete().map_err(Failure::Configuration)?;
    runtime()?.block_on(run::run(config)).map_err(Failure::Configuration)
}
