//! `rebalancer completions SHELL`: the completion script of one shell, on stdout.

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::Failure;

/// Which shell.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The shell to write the script for.
    shell: Shell,
}

/// Writes the script.
pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    clap_complete::generate(
        arguments.shell,
        &mut super::Arguments::command(),
        "rebalancer",
        &mut std::io::stdout(),
    );
    Ok(())
}
