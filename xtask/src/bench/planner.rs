//! `bench planner`: what a plan takes and what the table holds.

use crate::run::{cargo, run};

#[derive(clap::Args)]
pub struct Arguments {
    /// One JSON object on stdout, all else on stderr
    #[arg(long)]
    json: bool,
}

/// Builds, measures, shows.
pub fn run_bench(arguments: &Arguments) -> anyhow::Result<()> {
    run(&mut cargo([
        "build",
        "--release",
        "--package",
        "rebalancer-tests",
        "--bin",
        "rebalancer-bench",
    ]))?;
    let outcome = super::measure("planner", false, |_| {})?;
    super::show(
        "planner",
        &outcome,
        &super::Page::Part("bench.md"),
        arguments.json,
        false,
    )
}
