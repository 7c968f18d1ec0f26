//! `ci`: formatting, lints, and every test, on this kernel and on Debian's.

use std::process::ExitCode;

use crate::{
    run::{self, cargo},
    test,
};

/// Runs the three steps; the last one's exit code is this one's.
pub fn run() -> anyhow::Result<ExitCode> {
    run::run(&mut cargo(["fmt", "--all", "--check"]))?;
    run::run(&mut cargo([
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;
    test::run_all()
}
