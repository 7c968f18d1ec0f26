//! `bench kernel`: what the kernel programs cost, from the kernel's own statistics.

use anyhow::Context as _;

use crate::arch::Arch;
use crate::ebpf;

#[derive(clap::Args)]
pub struct Arguments {
    /// One JSON object on stdout, all else on stderr
    #[arg(long)]
    json: bool,
}

/// Builds, measures, shows.
pub fn run_bench(arguments: &Arguments) -> anyhow::Result<()> {
    ebpf::build(Arch::host()).context("the kernel programs are what is measured")?;
    super::build()?;
    let outcome = super::measure("kernel", true, |command| {
        command.arg("--rebalancer").arg(super::rebalancer());
    })?;
    super::show(
        "kernel",
        &outcome,
        &super::Page::Part("bench.md"),
        arguments.json,
        false,
    )
}
