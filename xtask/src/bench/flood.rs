//! `bench flood`: slow readers of large LISTs on a real kube-apiserver, and what holds them; docs/flood.md is its page.

#[derive(clap::Args)]
pub struct Arguments {
    /// One JSON object on stdout, all else on stderr
    #[arg(long)]
    json: bool,
    /// Half the clients for a quarter of the time; docs/flood.md stays as it is
    #[arg(long)]
    quick: bool,
}

/// Builds, measures, shows, and writes the page.
pub fn run_bench(arguments: &Arguments) -> anyhow::Result<()> {
    super::build()?;
    let outcome = super::measure("flood", true, |command| {
        command.arg("--rebalancer").arg(super::rebalancer());
        if arguments.quick {
            command.args(["--clients=30", "--seconds=10"]);
        }
    })?;
    let page = super::Page::Whole("flood.md");
    super::show("flood", &outcome, &page, arguments.json, arguments.quick)
}
