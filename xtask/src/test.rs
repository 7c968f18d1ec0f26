//! `test`: each group's tests, counted, with the reason of every skip.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::Context as _;
use clap::ValueEnum;

use crate::ebpf;
use crate::run::{cargo, is_root, root, run, shown, target};
use crate::vm;

#[derive(clap::Args)]
pub struct Arguments {
    /// Only these groups [default: all]
    #[arg(value_enum)]
    groups: Vec<Group>,
    /// Run the groups that need a kernel in a VM with this Debian kernel; may be given several times
    #[arg(long, value_name = "VERSION", value_parser = clap::builder::PossibleValuesParser::new(vm::versions()))]
    kernel: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Group {
    /// Unit, property and scripted-peer tests that need no root
    Core,
    /// Counting in the kernel
    Kernel,
    /// The front door, against scripted HTTP/2 peers
    Relay,
    /// GOAWAY from a uprobe
    Steer,
    /// Against a real kube-apiserver
    Apiserver,
    /// Several nodes in network namespaces
    Cluster,
}

impl Group {
    const ALL: [Self; 6] = [
        Self::Core,
        Self::Kernel,
        Self::Relay,
        Self::Steer,
        Self::Apiserver,
        Self::Cluster,
    ];

    /// Those that `--kernel` runs in a VM.
    const NEED_A_KERNEL: [Self; 2] = [Self::Kernel, Self::Steer];

    /// The integration test of the package `rebalancer-tests` that holds the group.
    fn name(self) -> String {
        self.to_possible_value()
            .expect("no group is hidden")
            .get_name()
            .to_owned()
    }

    fn exists(self) -> bool {
        self == Self::Core || root().join("tests/tests").join(self.name()).join("main.rs").is_file()
    }
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: usize,
    failed: usize,
}

/// Runs what was asked for.
pub fn run_tests(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let chosen = |possible: &[Group]| -> Vec<Group> {
        if arguments.groups.is_empty() {
            possible.iter().copied().filter(|group| group.exists()).collect()
        } else {
            arguments.groups.clone()
        }
    };
    if arguments.kernel.is_empty() {
        return run_selected(&chosen(&Group::ALL), &[]);
    }
    let groups = chosen(&Group::NEED_A_KERNEL);
    for group in &groups {
        anyhow::ensure!(
            Group::NEED_A_KERNEL.contains(group),
            "the group `{}` does not depend on the kernel: run it without --kernel",
            group.name()
        );
    }
    let on = |version: &String| groups.iter().map(|group| (*group, version.clone())).collect::<Vec<_>>();
    let machines: Vec<_> = arguments.kernel.iter().flat_map(on).collect();
    run_selected(&[], &machines)
}

/// Everything there is; the kernel group on the oldest and the newest long-term kernels of Debian as well, and the steer
/// group on the first that takes it.
pub fn run_all() -> anyhow::Result<ExitCode> {
    let groups: Vec<Group> = Group::ALL.into_iter().filter(|group| group.exists()).collect();
    let machines = [(Group::Kernel, "6.1"), (Group::Kernel, "6.12"), (Group::Steer, "6.18")];
    run_selected(&groups, &machines.map(|(group, version)| (group, version.to_owned())))
}

/// Runs groups here, and others in VMs; the last line counts all of it.
fn run_selected(groups: &[Group], machines: &[(Group, String)]) -> anyhow::Result<ExitCode> {
    for group in groups.iter().chain(machines.iter().map(|(group, _)| group)) {
        anyhow::ensure!(group.exists(), "there is no test group `{}` yet", group.name());
    }

    let skips = target().join("skips");
    fs::create_dir_all(target()).context("cannot make the target directory")?;
    fs::write(&skips, "").with_context(|| format!("cannot write {}", skips.display()))?;
    let beyond_core = groups.iter().any(|group| *group != Group::Core);
    // Kernel programs that were built once go into the binary: they must be those of these sources.
    if beyond_core || ebpf::directory().is_dir() {
        ebpf::build()?;
    }
    if beyond_core {
        run(&mut cargo([
            "build",
            "--package",
            "rebalancer",
            "--package",
            "rebalancer-tests",
            "--bins",
        ]))?;
    }

    let mut total = Counts::default();
    for group in groups {
        let counts = run_group(*group, &skips)?;
        total.passed += counts.passed;
        total.failed += counts.failed;
    }

    for (group, version) in machines {
        eprintln!("the group `{}` on Debian's kernel {version}, in a VM", group.name());
        let counts = counted(&mut vm::command(version, &group.name())?, &skips)?;
        total.passed += counts.passed;
        total.failed += counts.failed;
    }

    let reasons = fs::read_to_string(&skips).with_context(|| format!("cannot read {}", skips.display()))?;
    let skipped = reasons.lines().count();
    for reason in reasons.lines() {
        println!("skipped {reason}");
    }
    // A test that skips itself returns, so cargo counted it as passed.
    let passed = total.passed.saturating_sub(skipped);
    println!("{passed} passed, {} failed, {skipped} skipped", total.failed);
    Ok(if total.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run_group(group: Group, skips: &Path) -> anyhow::Result<Counts> {
    let mut command = cargo(["test", "--no-fail-fast"]);
    if group != Group::Core {
        command.args(["--package", "rebalancer-tests", "--test", &group.name()]);
        // One at a time: these tests own namespaces, ports and kernel hooks.
        command.args(["--", "--test-threads=1"]);
        if !is_root() {
            eprintln!("the group `{}` needs root: its tests run under sudo", group.name());
            command.env(runner_variable(), "sudo -E");
        }
    }
    if group == Group::Steer
        && let Some(server) = vm::extras::goaway_server()?
    {
        command.env("REBALANCER_GOAWAY_SERVER", absolute(&server)?);
    }
    command.env("REBALANCER_SKIPS", absolute(skips)?);
    counted(&mut command, skips)
}

/// Runs `cargo test` or a VM, shows what it prints and adds up its result lines; a VM's skips are added to the file.
fn counted(command: &mut Command, skips: &Path) -> anyhow::Result<Counts> {
    let line = shown(command);
    eprintln!("+ {line}");
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{line}`"))?;
    let stdout = child.stdout.take().expect("the child's stdout is piped");
    let mut counts = Counts::default();
    let mut results = 0;
    for read in BufReader::new(stdout).split(b'\n') {
        let read = read.with_context(|| format!("cannot read what `{line}` prints"))?;
        let text = String::from_utf8_lossy(&read);
        let text = text.trim_end_matches('\r');
        if let Some(reason) = text.strip_prefix("vm: skipped ") {
            let mut file = fs::OpenOptions::new().append(true).open(skips)?;
            writeln!(file, "in the VM: {reason}")?;
        }
        if let Some(result) = parse_result(text) {
            results += 1;
            counts.passed += result.passed;
            counts.failed += result.failed;
        }
        writeln!(std::io::stdout(), "{text}")?;
    }
    let status = child.wait().with_context(|| format!("cannot wait for `{line}`"))?;
    if counts.failed == 0 && (!status.success() || results == 0) {
        eprintln!("`{line}` ended ({status}) without a failed test, or without any result: counted as one failure");
        counts.failed = 1;
    }
    Ok(counts)
}

/// Reads `test result: ok. 17 passed; 0 failed; …`, the line libtest ends each binary's run with.
fn parse_result(line: &str) -> Option<Counts> {
    let (_, numbers) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |word: &str| {
        numbers
            .split(';')
            .find_map(|part| part.trim().strip_suffix(word)?.trim().parse().ok())
    };
    Some(Counts {
        passed: number("passed")?,
        failed: number("failed")?,
    })
}

/// Cargo's variable that names the program test binaries are run with, for the host this was built for.
fn runner_variable() -> String {
    let triple = format!("{}_UNKNOWN_LINUX_GNU", std::env::consts::ARCH.to_uppercase());
    format!("CARGO_TARGET_{triple}_RUNNER")
}

fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("cannot make {} absolute", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtest_result_lines_are_read_and_others_are_not() {
        let line = "test result: FAILED. 17 passed; 2 failed; 0 ignored; 0 measured; 3 filtered out; finished in 0.31s";
        assert_eq!(parse_result(line), Some(Counts { passed: 17, failed: 2 }));
        assert_eq!(parse_result("test agent::tests::balances ... ok"), None);
        assert_eq!(parse_result("test result: "), None);
    }
}
