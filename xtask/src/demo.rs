//! `demo`: builds what the demo needs, and becomes it.

use std::{os::unix::process::CommandExt as _, process::Command};

use anyhow::Context as _;

use crate::ebpf;
use crate::run::{cargo, is_root, run, target};

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Arguments {
    /// Flags of the demo; `cargo xtask demo --help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    flags: Vec<String>,
}

/// Builds, and replaces this process by the demo: Ctrl-C reaches it directly.
pub fn run_demo(arguments: &Arguments) -> anyhow::Result<std::process::ExitCode> {
    if let Err(error) = ebpf::build() {
        eprintln!("the kernel programs cannot be built, so the agents count by the socket list: {error:#}");
    }
    run(&mut cargo([
        "build",
        "--release",
        "--package",
        "rebalancer",
        "--package",
        "rebalancer-tests",
        "--bin",
        "rebalancer",
        "--bin",
        "rebalancer-demo",
    ]))?;
    let demo = target().join("release/rebalancer-demo");
    let mut command = if is_root() {
        Command::new(&demo)
    } else {
        eprintln!("network namespaces and eBPF need root: the demo runs under sudo");
        let mut command = Command::new("sudo");
        command.arg("-E").arg(&demo);
        command
    };
    let error = command.args(&arguments.flags).exec();
    Err(error).with_context(|| format!("cannot start {}", demo.display()))
}
