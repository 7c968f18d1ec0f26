//! `bench compare`: one scene for each way there is to level apiservers; its tables are in docs/compare.md.

use std::fs;

use anyhow::Context as _;

use crate::{debian, run::target};

#[derive(clap::Args)]
pub struct Arguments {
    /// One JSON object on stdout, all else on stderr
    #[arg(long)]
    json: bool,
    /// Three of them, with fewer kubelets, for a minute each; docs/compare.md stays as it is
    #[arg(long)]
    quick: bool,
}

/// Fetches, builds, measures, shows, and puts the tables on their page.
pub fn run_bench(arguments: &Arguments) -> anyhow::Result<()> {
    debian::install("haproxy", "haproxy")?;
    let directory = target().join("bench");
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let envoy = super::relay::envoy(&directory)?;
    crate::ebpf::build(crate::arch::Arch::host())?;
    super::build()?;
    let outcome = super::measure("compare", true, |command| {
        command.arg("--rebalancer").arg(super::rebalancer());
        command.arg("--envoy").arg(&envoy);
        if arguments.quick {
            command.args(["--kubelets=60", "--seconds=60", "--only=chance-0.02,envoy,relay"]);
        }
    })?;
    let page = super::Page::Part("compare.md");
    super::show("compare", &outcome, &page, arguments.json, arguments.quick)
}
