//! `bench compare`: one scene for each way there is to level apiservers; its tables are in docs/compare.md.

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
    let outcome = super::measure_beside_envoy("compare", |command| {
        if arguments.quick {
            command.args(["--kubelets=60", "--seconds=60", "--only=chance-0.02,envoy,relay"]);
        }
    })?;
    let page = super::Page::Part("compare.md");
    super::show("compare", &outcome, &page, arguments.json, arguments.quick)
}
