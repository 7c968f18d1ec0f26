//! `bench`: each benchmark's figures, as a table, as JSON, and on their page in docs/.
//!
//! Must never write a page from a quick run.

mod compare;
mod flood;
mod kernel;
mod kubemark;
mod page;
mod planner;
mod relay;
mod scale;
mod steer;

use std::{
    fs,
    io::Write as _,
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, bail};

use crate::{
    run::{cargo, is_root, run, shown, target},
    vm,
};

#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(clap::Subcommand)]
enum Bench {
    /// One scene for each way there is to level apiservers: moves, time to level, errors, latency, cost
    Compare(compare::Arguments),
    /// Slow readers of large LISTs on a real kube-apiserver, and what holds them
    Flood(flood::Arguments),
    /// What the kernel programs cost for an event and a packet
    Kernel(kernel::Arguments),
    /// Light kubelets on real kube-apiservers: what the lottery costs, and what rebalancer does
    Kubemark(kubemark::Arguments),
    /// What a plan over 64 apiservers takes, and what a table of a million connections holds
    Planner(planner::Arguments),
    /// The relay beside haproxy, Envoy and a relay of bytes: processor time, latency, memory
    Relay(relay::Arguments),
    /// 64 apiservers and a million clients: what an agent's parts take there, and a simulation of the whole
    Scale(scale::Arguments),
    /// The probe's answer, beside a probe that does nothing
    Steer(steer::Arguments),
}

/// Runs one.
pub fn run_bench(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    match &arguments.bench {
        Bench::Compare(arguments) => compare::run_bench(arguments),
        Bench::Flood(arguments) => flood::run_bench(arguments),
        Bench::Kernel(arguments) => kernel::run_bench(arguments),
        Bench::Kubemark(arguments) => kubemark::run_bench(arguments),
        Bench::Planner(arguments) => planner::run_bench(arguments),
        Bench::Relay(arguments) => relay::run_bench(arguments),
        Bench::Scale(arguments) => scale::run_bench(arguments),
        Bench::Steer(arguments) => steer::run_bench(arguments),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// Builds the binary that is measured and the one that measures, as they are released.
fn build() -> anyhow::Result<()> {
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
        "rebalancer-bench",
    ]))
}

/// What a benchmark found.
struct Outcome {
    /// One JSON object.
    json: String,
    /// Markdown.
    tables: String,
}

/// Runs the measuring binary, as root where it must be.
fn measure(name: &str, needs_root: bool, flags: impl FnOnce(&mut Command)) -> anyhow::Result<Outcome> {
    let page = target().join(format!("bench-{name}.md"));
    let binary = target().join("release/rebalancer-bench");
    let mut command = if needs_root && !is_root() {
        eprintln!("network namespaces and eBPF need root: the benchmark runs under sudo");
        let mut command = Command::new("sudo");
        command.arg("-E").arg(&binary);
        command
    } else {
        Command::new(&binary)
    };
    command.arg(name).arg("--page").arg(&page);
    flags(&mut command);
    let line = shown(&command);
    eprintln!("+ {line}");
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start `{line}`"))?;
    if !output.status.success() {
        bail!("the benchmark failed ({})", output.status);
    }
    Ok(Outcome {
        json: String::from_utf8(output.stdout).context("the benchmark's figures are not text")?,
        tables: fs::read_to_string(&page).with_context(|| format!("cannot read {}", page.display()))?,
    })
}

/// Fetches haproxy and Envoy, builds, and runs the measuring binary as root with `rebalancer` and Envoy named.
fn measure_beside_envoy(name: &str, flags: impl FnOnce(&mut Command)) -> anyhow::Result<Outcome> {
    crate::debian::install("haproxy", "haproxy")?;
    let directory = target().join("bench");
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let envoy = relay::envoy(&directory)?;
    crate::ebpf::build(crate::arch::Arch::host())?;
    build()?;
    measure(name, true, |command| {
        command.arg("--rebalancer").arg(rebalancer());
        command.arg("--envoy").arg(&envoy);
        flags(command);
    })
}

/// Runs a benchmark of light kubelets on real kube-apiservers in a VM.
fn measure_kubelets_in_vm(version: &str, name: &str, flags: &[&str]) -> anyhow::Result<Outcome> {
    crate::debian::install("haproxy", "haproxy")?;
    build()?;
    // What the VM carries is built here.
    run(Command::new(target().join("release/rebalancer-bench")).arg("kubelets-programs"))?;
    let flags = [&["--rebalancer=/bin/rebalancer"][..], flags].concat();
    measure_in_vm(version, name, vm::extras::CLUSTER, &flags)
}

/// Runs the measuring binary in a VM with that kernel and what the group's carries; its tables come over the console.
fn measure_in_vm(version: &str, name: &str, group: &str, flags: &[&str]) -> anyhow::Result<Outcome> {
    let arguments: Vec<String> = [name, "--page=/proc/self/fd/1"]
        .iter()
        .chain(flags)
        .map(|flag| (*flag).to_owned())
        .collect();
    let (mut json, mut tables) = (None, String::new());
    let code = vm::listen(
        version,
        vm::Payload::Program("rebalancer-bench"),
        &arguments,
        group,
        |line| {
            if line.starts_with("vm: kernel") {
                // What the boot loader said is before it.
                tables.clear();
            } else if line.starts_with('{') {
                json = Some(format!("{line}\n"));
            } else if !["bench: ", "vm: ", "["].iter().any(|begin| line.starts_with(begin)) {
                tables.push_str(line);
                tables.push('\n');
            }
            writeln!(std::io::stderr(), "{line}").map_err(Into::into)
        },
    )?;
    if code != 0 {
        bail!("the benchmark failed in the VM");
    }
    Ok(Outcome {
        json: json.context("the VM printed no figures")?,
        tables,
    })
}

/// Where a benchmark's tables go.
enum Page {
    /// Between its marks on a page, in docs/, that has more.
    Part(&'static str),
    /// A page of its own, in docs/.
    Whole(&'static str),
}

/// Shows the outcome: with `json` the object alone on stdout; on its page unless the run was a quick one.
fn show(name: &str, outcome: &Outcome, page: &Page, json: bool, quick: bool) -> anyhow::Result<()> {
    if json {
        eprint!("{}", outcome.tables);
        print!("{}", outcome.json);
    } else {
        println!("{}\n{name} {}", outcome.tables, outcome.json.trim_end());
    }
    let (Page::Part(file) | Page::Whole(file)) = page;
    if quick {
        eprintln!("a quick run: docs/{file} stays as it is");
        return Ok(());
    }
    match page {
        Page::Part(_) => page::replace(file, name, &outcome.tables),
        Page::Whole(_) => page::write(file, &outcome.tables),
    }
}

/// The built `rebalancer`.
fn rebalancer() -> PathBuf {
    target().join("release/rebalancer")
}
