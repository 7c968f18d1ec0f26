//! `demo`: builds what the demo needs, and becomes it; or boots a VM that does.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, ensure};

use crate::arch::Arch;
use crate::debian;
use crate::ebpf;
use crate::run::{cargo, is_root, run, shown, target};
use crate::vm;

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Arguments {
    /// Flags of the demo; `cargo xtask demo --help` lists them. With --vm VERSION it runs in a virtual machine with that
    /// Debian kernel; with --release everything is built as it is installed, which takes minutes longer
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    flags: Vec<String>,
}

/// Builds, and replaces this process by the demo: Ctrl-C reaches it directly.
pub fn run_demo(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (version, mut flags) = without_vm(&arguments.flags)?;
    let given = flags.len();
    flags.retain(|flag| flag != "--release");
    let release = flags.len() < given;
    if let Some(version) = version {
        return in_vm(&version, &flags);
    }
    if flags.iter().any(|flag| flag.contains("haproxy")) {
        debian::install("haproxy", "haproxy")?;
    }
    if let Err(error) = ebpf::build(Arch::host()) {
        eprintln!("the kernel programs cannot be built, so the agents count by the socket list: {error:#}");
    }
    // As the tests are built: the first look at it should not take longer than the scene.
    let (profile, built): (&[&str], _) = if release {
        (&["--release"], "release")
    } else {
        (&[], "debug")
    };
    let mut build = cargo([
        "build",
        "--package",
        "rebalancer",
        "--package",
        "rebalancer-tests",
        "--bin",
        "rebalancer",
        "--bin",
        "rebalancer-demo",
    ]);
    // kube and its types are a minute of a first build, and are for this one flag.
    if !release && !flags.iter().any(|flag| flag.contains("kubernetes")) {
        build.arg("--no-default-features");
    }
    run(build.args(profile))?;
    let demo = target().join(built).join("rebalancer-demo");
    let mut command = if is_root() {
        Command::new(&demo)
    } else {
        eprintln!("network namespaces and eBPF need root: the demo runs under sudo");
        let mut command = Command::new("sudo");
        command.arg("-E").arg(&demo);
        command
    };
    if flags.iter().any(|flag| flag.contains("steer"))
        && let Some(server) = vm::extras::goaway_server(Arch::host())?
    {
        command.env("REBALANCER_GOAWAY_SERVER", std::path::absolute(server)?);
    }
    let error = command.args(&flags).exec();
    Err(error).with_context(|| format!("cannot start {}", demo.display()))
}

/// Takes `--vm VERSION` out of the demo's flags: it is this program's own.
fn without_vm(flags: &[String]) -> anyhow::Result<(Option<String>, Vec<String>)> {
    let known: Vec<_> = vm::versions().collect();
    let mut version = None;
    let mut others = Vec::new();
    let mut rest = flags.iter();
    while let Some(flag) = rest.next() {
        let given = match flag.strip_prefix("--vm") {
            Some("") => rest.next().cloned().unwrap_or_default(),
            Some(value) if value.starts_with('=') => value[1..].to_owned(),
            _ => {
                others.push(flag.clone());
                continue;
            }
        };
        ensure!(
            known.contains(&given.as_str()),
            "--vm `{given}`: allowed are Debian's kernels {}",
            known.join(", ")
        );
        version = Some(given);
    }
    Ok((version, others))
}

/// Clients in a VM, whose one processor is emulated and plays them, the balancer and all nodes.
const VM_CLIENTS: u16 = 150;

/// Boots a VM that runs the demo; the summary's JSON, where asked for, is the only thing on stdout.
fn in_vm(version: &str, flags: &[String]) -> anyhow::Result<ExitCode> {
    let mut flags = flags.to_vec();
    if !flags.iter().any(|flag| flag.starts_with("--clients")) {
        eprintln!("the VM has one emulated processor: {VM_CLIENTS} clients, unless --clients says otherwise");
        flags.push(format!("--clients={VM_CLIENTS}"));
    }
    let mut command = vm::program(version, vm::Payload::Scene("rebalancer-demo"), &flags, "steer")?;
    eprintln!("+ {}", shown(&command));
    let mut child = command.stdout(Stdio::piped()).spawn().context("qemu")?;
    let stdout = child.stdout.take().context("stdout is piped")?;
    let mut code = None;
    for read in BufReader::new(stdout).split(b'\n') {
        let read = read?;
        let text = String::from_utf8_lossy(&read);
        let text = text.trim_end_matches('\r');
        code = vm::exit_code(text).or(code);
        if text.starts_with("{\"") {
            writeln!(std::io::stdout(), "{text}")?;
        } else {
            writeln!(std::io::stderr(), "{text}")?;
        }
    }
    child.wait()?;
    code.map(ExitCode::from).context("the VM ended before the demo did")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vm_is_not_the_demos_own_flag() {
        let split = |line: &str| {
            let flags: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            without_vm(&flags).map(|(version, others)| (version, others.join(" ")))
        };
        let steer = || "--shim steer --json".to_owned();
        for line in ["--vm 6.18 --shim steer --json", "--shim steer --vm=6.18 --json"] {
            assert_eq!(split(line).expect("a version"), (Some("6.18".to_owned()), steer()));
        }
        assert_eq!(split("--shim steer --json").expect("no version"), (None, steer()));
        assert!(split("--vm 5.4").is_err() && split("--vm").is_err());
    }
}
