//! `demo`: builds what the demo needs, and becomes it; or boots a VM that does.

use std::{
    os::unix::process::CommandExt as _,
    process::{Command, ExitCode},
};

use anyhow::Context as _;

use crate::arch::Arch;
use crate::debian;
use crate::ebpf;
use crate::run::{cargo, is_root, run, target};
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
    let (version, mut flags) = vm::without_version(&arguments.flags)?;
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

/// Clients in a VM, whose emulated processors play them, the balancer and all nodes.
const VM_CLIENTS: u16 = 150;

/// Boots a VM that runs the demo; the summary's JSON, where asked for, is the only thing on stdout.
fn in_vm(version: &str, flags: &[String]) -> anyhow::Result<ExitCode> {
    let mut flags = flags.to_vec();
    if !flags.iter().any(|flag| flag.starts_with("--clients")) {
        eprintln!("the processors of the VM are emulated: {VM_CLIENTS} clients, unless --clients says otherwise");
        flags.push(format!("--clients={VM_CLIENTS}"));
    }
    vm::show(
        version,
        vm::Payload::Program("rebalancer-demo"),
        &flags,
        "steer",
        |_| {},
    )
    .map(ExitCode::from)
}
