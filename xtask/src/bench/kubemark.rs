//! `bench kubemark`: light kubelets on real kube-apiservers, with nothing, with a lottery, with proxies, with rebalancer;
//! docs/kubemark.md is its page.

use clap::builder::PossibleValuesParser;

use crate::vm;

#[derive(clap::Args)]
pub struct Arguments {
    /// One JSON object on stdout, all else on stderr
    #[arg(long)]
    json: bool,
    /// One run of two minutes with a quarter of the kubelets; docs/kubemark.md stays as it is
    #[arg(long)]
    quick: bool,
    /// Instead: so many hollow kubelets of Kubernetes beside as many light ones, at most 100, held against each other by what
    /// the apiserver's audit log says that they ask; docs/kubemark.md stays as it is
    #[arg(long, value_name = "COUNT")]
    hollow: Option<u32>,
    /// Instead: `steer` beside nothing, in a virtual machine with that Debian kernel: a part of docs/kubemark.md
    #[arg(long, value_name = "VERSION", conflicts_with_all = ["quick", "hollow"],
          value_parser = PossibleValuesParser::new(vm::versions()))]
    vm: Option<String>,
}

/// How much an emulated processor bears: it starts an apiserver in a minute.
const IN_VM: [&str; 4] = ["--shim=steer", "--kubelets=6", "--runs=1", "--seconds=900"];

/// Fetches, builds, measures, shows, and writes the page.
pub fn run_bench(arguments: &Arguments) -> anyhow::Result<()> {
    let page = super::Page::Whole("kubemark.md");
    if let Some(count) = arguments.hollow {
        super::build()?;
        let outcome = super::measure("hollow", true, |command| {
            command.arg(format!("--count={count}"));
        })?;
        return super::show("hollow", &outcome, &page, arguments.json, true);
    }
    if let Some(version) = &arguments.vm {
        let outcome = super::measure_kubelets_in_vm(version, "kubemark", &IN_VM)?;
        let part = super::Page::Part("kubemark.md");
        return super::show("kubemark-steer", &outcome, &part, arguments.json, false);
    }
    let outcome = super::measure_beside_envoy("kubemark", |command| {
        if arguments.quick {
            command.args(["--kubelets=20", "--runs=1", "--seconds=120"]);
        }
    })?;
    super::show("kubemark", &outcome, &page, arguments.json, arguments.quick)
}
