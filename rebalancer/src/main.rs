//! The `rebalancer` binary: agent, relay and the commands that read them.

use std::process::ExitCode;

fn main() -> ExitCode {
    rebalancer::cli::run()
}
