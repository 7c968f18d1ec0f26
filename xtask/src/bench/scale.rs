//! `bench scale`: an agent's parts among many apiservers, and the whole in the simulator.

use crate::run::{cargo, run};

#[derive(clap::Args)]
pub struct Arguments {
    /// One JSON object on stdout, all else on stderr
    #[arg(long)]
    json: bool,
    /// 64,000 clients instead of a million, and shorter looks at the agents' talk; docs/scale.md stays as it is
    #[arg(long)]
    quick: bool,
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
    let outcome = super::measure("scale", false, |command| {
        if arguments.quick {
            command.arg("--quick");
        }
    })?;
    let page = super::Page::Part("scale.md");
    super::show("scale", &outcome, &page, arguments.json, arguments.quick)
}
