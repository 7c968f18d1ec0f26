//! `ci`: formatting, lints, a short fuzz, the other processor's kernel programs, faults on a live cluster, and every test, on this
//! kernel and on Debian's.

use std::process::ExitCode;

use crate::{
    arch::Arch,
    chaos, ebpf, fuzz,
    run::{self, cargo},
    test,
};

/// Runs them all; the last one's exit code is this one's.
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
    // What the demo is made of.
    run::run(&mut cargo([
        "clippy",
        "--package",
        "rebalancer",
        "--no-default-features",
        "--",
        "-D",
        "warnings",
    ]))?;
    fuzz::run_fuzz(&fuzz::Arguments::smoke())?;
    // All of it, and its tests in a VM, take as long as everything else: `cargo xtask test --arch arm64 --kernel 6.12 kernel`.
    ebpf::build(Arch::Arm64)?;
    chaos::run_quick()?;
    test::run_all()
}
