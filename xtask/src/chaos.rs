//! `chaos`: builds what the faults need, plays them, and writes docs/faults.md.

use std::{
    fs,
    process::{Command, ExitCode},
};

use anyhow::Context as _;

use crate::{
    arch::Arch,
    debian, ebpf,
    run::{cargo, is_root, root, run, shown, target},
};

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Arguments {
    /// Flags of the run; `cargo xtask chaos --help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    flags: Vec<String>,
}

/// Flags that leave some of it out: what they find is no page.
const PARTS: [&str; 3] = ["--quick", "--only", "--alone"];

/// Plays the faults; the page is written from a whole run alone.
pub fn run_chaos(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    for (program, package) in [("haproxy", "haproxy"), ("iptables", "iptables"), ("ss", "iproute2")] {
        debian::install(program, package)?;
    }
    ebpf::build(Arch::host())?;
    let packages = ["--package", "rebalancer", "--package", "rebalancer-tests"];
    run(cargo(["build", "--bin", "rebalancer", "--bin", "rebalancer-demo"]).args(packages))?;
    let chaos = target().join("debug/rebalancer-demo");
    let mut command = if is_root() {
        Command::new(&chaos)
    } else {
        eprintln!("network namespaces and eBPF need root: it runs under sudo");
        let mut command = Command::new("sudo");
        command.arg("-E").arg(&chaos);
        command
    };
    let page = target().join("faults.md");
    command.arg("chaos").args(&arguments.flags).arg("--page").arg(&page);
    eprintln!("+ {}", shown(&command));
    // It ends its clusters in order on Ctrl-C, which reaches both.
    let status = command.status().context("the run cannot be started")?;
    let in_part = |flag: &String| PARTS.iter().any(|part| flag.starts_with(part));
    if status.success() && !arguments.flags.iter().any(in_part) {
        let at = root().join("docs/faults.md");
        fs::copy(&page, &at).with_context(|| format!("cannot write {}", at.display()))?;
        eprintln!("the table is in {}", at.display());
    }
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
