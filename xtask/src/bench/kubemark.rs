//! `bench kubemark`: light kubelets on real apiservers, with nothing, with a lottery, with proxies, with rebalancer;
//! docs/kubemark.md is its page.

use std::fs;

use anyhow::Context as _;

use crate::{debian, run::target};

#[derive(clap::Args)]
pub struct Arguments {
    /// One JSON object on stdout, all else on stderr
    #[arg(long)]
    json: bool,
    /// One run of two minutes with a quarter of the kubelets; docs/kubemark.md stays as it is
    #[arg(long)]
    quick: bool,
}

/// Fetches, builds, measures, shows, and writes the page.
pub fn run_bench(arguments: &Arguments) -> anyhow::Result<()> {
    debian::install("haproxy", "haproxy")?;
    let directory = target().join("bench");
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let envoy = super::relay::envoy(&directory)?;
    crate::ebpf::build(crate::arch::Arch::host())?;
    super::build()?;
    let outcome = super::measure("kubemark", true, |command| {
        command.arg("--rebalancer").arg(super::rebalancer());
        command.arg("--envoy").arg(&envoy);
        if arguments.quick {
            command.args(["--kubelets=40", "--runs=1", "--seconds=120"]);
        }
    })?;
    let page = super::Page::Whole("kubemark.md");
    super::show("kubemark", &outcome, &page, arguments.json, arguments.quick)
}
