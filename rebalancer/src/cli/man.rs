//! `rebalancer man`: the manual pages, one for the program and one for each command.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::CommandFactory as _;

use super::{Failure, print};

/// Where they go.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Write every page into this directory [default: the program's own on stdout]
    #[arg(long, value_name = "PATH")]
    directory: Option<PathBuf>,
}

/// Writes them.
pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    // A page of `help COMMAND` says nothing that COMMAND's own does not.
    let mut command = super::Arguments::command().disable_help_subcommand(true);
    command.build();
    let Some(directory) = &arguments.directory else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command)
            .render(&mut page)
            .context("the page cannot be written")?;
        return print(&String::from_utf8_lossy(&page));
    };
    clap_mangen::generate_to(command, directory)
        .with_context(|| format!("--directory {}: the pages cannot be written", directory.display()))?;
    Ok(())
}
