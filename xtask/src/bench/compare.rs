//! `bench compare`: one scene for each way there is to level apiservers; its tables are in docs/compare.md.

use clap::builder::PossibleValuesParser;

use crate::vm;

#[derive(clap::Args)]
pub struct Arguments {
    /// One JSON object on stdout, all else on stderr
    #[arg(long)]
    json: bool,
    /// Three of them, with fewer kubelets, for a minute each; docs/compare.md stays as it is
    #[arg(long)]
    quick: bool,
    /// Instead: `steer`, the lottery and nothing, in a virtual machine with that Debian kernel: tables of their own on the page
    #[arg(long, value_name = "VERSION", conflicts_with = "quick", value_parser = PossibleValuesParser::new(vm::versions()))]
    vm: Option<String>,
}

/// How much an emulated processor bears.
const IN_VM: [&str; 3] = ["--kubelets=30", "--seconds=300", "--only=nothing,chance-0.02,steer"];

/// Fetches, builds, measures, shows, and puts the tables on their page.
pub fn run_bench(arguments: &Arguments) -> anyhow::Result<()> {
    let page = super::Page::Part("compare.md");
    if let Some(version) = &arguments.vm {
        let outcome = super::measure_kubelets_in_vm(version, "compare", &IN_VM)?;
        return super::show("compare-steer", &outcome, &page, arguments.json, false);
    }
    let outcome = super::measure_beside_envoy("compare", |command| {
        if arguments.quick {
            command.args(["--kubelets=60", "--seconds=60", "--only=chance-0.02,envoy,relay"]);
        }
    })?;
    super::show("compare", &outcome, &page, arguments.json, arguments.quick)
}
