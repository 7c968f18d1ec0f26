//! `bench kubemark`: light kubelets on real apiservers, with nothing, with a lottery, with proxies, with rebalancer;
//! docs/kubemark.md is its page.

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
}

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
    let outcome = super::measure_beside_envoy("kubemark", |command| {
        if arguments.quick {
            command.args(["--kubelets=40", "--runs=1", "--seconds=120"]);
        }
    })?;
    super::show("kubemark", &outcome, &page, arguments.json, arguments.quick)
}
