//! `ci`: formatting, lints, a short fuzz, and every test, on this kernel and on Debian's.

use std::process::ExitCode;

use crate::{
    fuzz,
    run::{self, cargo},
    test,
};

/// Runs the four steps; the last one's exit code is this one's.
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
    fuzz::run_fuzz(&fuzz::Arguments::smoke())?;
    test::run_all()
}
