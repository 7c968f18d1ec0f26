//! `test`: each group's tests, counted, with the reason of every skip.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::mpsc,
    thread,
    time::Instant,
};

use anyhow::Context as _;
use clap::ValueEnum;

use crate::arch::Arch;
use crate::debian;
use crate::ebpf;
use crate::release;
use crate::run::{cargo, is_root, programs, root, run, shown, target};
use crate::scratch::Scratch;
use crate::vm::{self, GuestClock, Machine, Mode};

#[derive(clap::Args)]
pub struct Arguments {
    /// Only these groups [default: all]
    #[arg(value_enum)]
    groups: Vec<Group>,
    /// Run the groups that need a kernel in a VM with this Debian kernel; may be given several times
    #[arg(long, value_name = "VERSION", value_parser = clap::builder::PossibleValuesParser::new(vm::versions()))]
    kernel: Vec<String>,
    /// The processor of that VM [default: this machine's]
    #[arg(long, value_enum, requires = "kernel")]
    arch: Option<Arch>,
    /// What that VM is besides; may be given several times, for one run each
    #[arg(long, value_enum, requires = "kernel")]
    mode: Vec<Mode>,
    /// Only tests whose names contain this; may be given several times
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    only: Vec<String>,
    /// With the group deploy: also do what docs/walkthrough.md says, on a control plane of three that kubeadm makes; a
    /// quarter of an hour, and as long again to build the image and Kubernetes' programs for the first time
    #[arg(long, conflicts_with = "kernel")]
    kubeadm: bool,
    /// With the group deploy: also look at the page of `top --web` in a headless Chromium, and write its pictures into docs/
    #[arg(long, conflicts_with = "kernel")]
    pictures: bool,
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
    /// What is installed
    Deploy,
}

impl Group {
    const ALL: [Self; 7] = [
        Self::Core,
        Self::Kernel,
        Self::Relay,
        Self::Steer,
        Self::Apiserver,
        Self::Cluster,
        Self::Deploy,
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

    /// Whether its tests start kube-apiserver and etcd.
    fn has_real_apiservers(self) -> bool {
        matches!(self, Self::Apiserver | Self::Cluster)
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

impl std::ops::Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
        }
    }
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
        let groups = chosen(&Group::ALL);
        for (flag, is_given) in [("--kubeadm", arguments.kubeadm), ("--pictures", arguments.pictures)] {
            anyhow::ensure!(
                !is_given || groups.contains(&Group::Deploy),
                "{flag} is for the group deploy, which is not among those that were named"
            );
        }
        if arguments.pictures {
            pictures()?;
        }
        let walked = arguments.kubeadm.then(walked).transpose()?;
        return run_selected(&groups, &[], walked.as_deref());
    }
    let groups = chosen(&Group::NEED_A_KERNEL);
    for group in &groups {
        anyhow::ensure!(
            Group::NEED_A_KERNEL.contains(group),
            "the group `{}` does not depend on the kernel: run it without --kernel",
            group.name()
        );
    }
    let arch = arguments.arch.unwrap_or_else(Arch::host);
    let modes: Vec<Option<Mode>> = match &arguments.mode[..] {
        [] => vec![None],
        modes => modes.iter().copied().map(Some).collect(),
    };
    let mut runs = Vec::new();
    for version in &arguments.kernel {
        for group in &groups {
            for mode in &modes {
                let machine = Machine {
                    version: version.clone(),
                    arch,
                    mode: *mode,
                };
                runs.push(Run {
                    group: *group,
                    machine,
                    only: arguments.only.clone(),
                });
            }
        }
    }
    run_selected(&[], &runs, None)
}

/// A group in a VM.
struct Run {
    group: Group,
    machine: Machine,
    /// Parts of the names of those tests that are run; all of them where there is none.
    only: Vec<String>,
}

impl Run {
    /// Whether it starts kube-apiserver in the VM.
    fn has_real_apiserver(&self) -> bool {
        let real = "real::a_real_apiserver";
        self.group == Group::Steer && (self.only.is_empty() || self.only.iter().any(|only| real.contains(&**only)))
    }
}

/// Everything there is, within CI's time: all of it on this kernel; in VMs what differs between kernels, most of it on the oldest
/// of Debian's that can count, one of them locked down and one too old; steer's answer on two. All else is a matter of `--kernel`.
pub fn run_all() -> anyhow::Result<ExitCode> {
    let groups: Vec<Group> = Group::ALL.into_iter().filter(|group| group.exists()).collect();
    let runs: Vec<Run> = IN_CI
        .into_iter()
        .map(|(group, version, mode, only)| Run {
            group,
            machine: Machine {
                mode,
                ..Machine::plain(version)
            },
            only: only.iter().map(|name| (*name).to_owned()).collect(),
        })
        .collect();
    run_selected(&groups, &runs, None)
}

/// What CI runs in VMs, one after the other: group, kernel, mode, and parts of the names of the tests, all where there is
/// none.
const IN_CI: [(Group, &str, Option<Mode>, &[&str]); 7] = [
    (
        Group::Kernel,
        "6.1",
        None,
        &["offers", "storm", "ends::", "where_it_runs::"],
    ),
    // How it refuses, and what works all the same.
    (Group::Kernel, "5.10", None, &["too_old"]),
    (Group::Kernel, "6.12", Some(Mode::LockdownIntegrity), COUNTS),
    (Group::Kernel, "6.18", None, COUNTS),
    (Group::Kernel, NEWEST, None, COUNTS),
    // The answer itself, and two who answer, in both orders and by mistake.
    (
        Group::Steer,
        "6.18",
        None,
        &["probe::", "together::a_program", "together::a_second_agent"],
    ),
    (
        Group::Steer,
        NEWEST,
        None,
        &[
            "probe::only_the_victims",
            "together::a_program_that_comes",
            "together::a_second_agent",
        ],
    ),
];

/// The newest of Debian's that the tests know.
const NEWEST: &str = "7.3";

/// What differs between kernels: whether the programs load, what they see of hellos, and that nothing is missed.
const COUNTS: &[&str] = &["offers", "storm"];

/// Programs that tests have for peers, and Debian's packages of them: installed where they are missing, as qemu is.
const PEERS: [(Group, &str, &str); 3] = [
    (Group::Cluster, "haproxy", "haproxy"),
    (Group::Cluster, "curl", "curl"),
    (Group::Deploy, "systemd-analyze", "systemd"),
];

/// Looks at the page in a browser, and has its pictures written.
fn pictures() -> anyhow::Result<()> {
    debian::install("chromium", "chromium")?;
    let mut command = cargo([
        "test",
        "--package",
        "rebalancer",
        "--lib",
        "--",
        "--ignored",
        "browser::",
    ]);
    run(command.env("REBALANCER_PICTURES", absolute(&root().join("docs"))?))
}

/// What a node of kubeadm's needs beside Kubernetes' own programs, and what images are made with.
const OF_NODES: [(&str, &str); 10] = [
    ("buildah", "buildah"),
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("conntrack", "conntrack"),
    ("ethtool", "ethtool"),
    ("socat", "socat"),
    ("iptables", "iptables"),
    ("ss", "iproute2"),
    // The network of pods that are not the host's: a runtime without it is not ready.
    ("/usr/lib/cni/loopback", "containernetworking-plugins"),
    ("haproxy", "haproxy"),
];

/// Makes ready what the walk-through takes: packages, and the image that it installs.
fn walked() -> anyhow::Result<PathBuf> {
    for (program, package) in OF_NODES {
        debian::install(program, package)?;
    }
    release::make_image(Arch::host(), false)
}

/// Runs groups here, and others in VMs; the last line counts all of it. The group deploy walks through with an image.
fn run_selected(groups: &[Group], runs: &[Run], walked: Option<&Path>) -> anyhow::Result<ExitCode> {
    for group in groups.iter().chain(runs.iter().map(|run| &run.group)) {
        anyhow::ensure!(group.exists(), "there is no test group `{}` yet", group.name());
    }

    let skips = target().join("skips");
    fs::create_dir_all(target()).context("cannot make the target directory")?;
    fs::write(&skips, "").with_context(|| format!("cannot write {}", skips.display()))?;
    let beyond_core = groups.iter().any(|group| *group != Group::Core);
    // Kernel programs that were built once go into the binary: they must be those of these sources.
    if beyond_core || ebpf::directory(Arch::host()).is_dir() {
        ebpf::build(Arch::host())?;
    }
    if beyond_core {
        programs(&[])?;
    }

    for (_, program, package) in PEERS.iter().filter(|(group, ..)| groups.contains(group)) {
        if let Err(error) = debian::install(program, package) {
            eprintln!("{error:#}: the tests that need it are skipped");
        }
    }

    let scratch = Scratch::make()?;
    let total = if groups.is_empty() || runs.is_empty() {
        let real: Vec<_> = runs.iter().filter(|run| run.has_real_apiserver()).collect();
        if !real.is_empty() && !beyond_core {
            programs(&[])?;
        }
        for run in real {
            build_apiserver(run.machine.arch);
        }
        let here = Here {
            skips: &skips,
            scratch: scratch.path(),
            walked,
        };
        here.run(groups, || build_apiserver(Arch::host()))? + run_in_vms(runs, &skips)?
    } else {
        side_by_side(groups, runs, &skips, scratch.path())?
    };
    if total.failed > 0 {
        println!("what the tests wrote, until the next run: {}", scratch.keep().display());
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

/// Groups here wait for most of their time, and a VM has one processor: run at the same moment they take half as long.
/// The real apiserver is built beside both, and waited for by those that need it.
fn side_by_side(groups: &[Group], runs: &[Run], skips: &Path, scratch: &Path) -> anyhow::Result<Counts> {
    let needs_apiserver = groups.iter().any(|group| group.has_real_apiservers());
    let (built, is_built) = mpsc::channel();
    thread::scope(|scope| {
        if needs_apiserver {
            scope.spawn(move || {
                build_apiserver(Arch::host());
                // Nobody listens where the groups have failed already.
                let _ = built.send(());
            });
        }
        let beside = scope.spawn(move || run_in_vms(runs, skips));
        // It can only fail when the other has ended, whose panic is shown below.
        let here = Here {
            skips,
            scratch,
            walked: None,
        };
        let here = here.run(groups, || is_built.recv().unwrap_or_default());
        let there = beside.join().expect("the thread that runs VMs does not panic");
        Ok(here? + there?)
    })
}

/// Builds kube-apiserver and etcd where they are not at hand, and for this machine the client-go swarm; tests that lack
/// them say so.
fn build_apiserver(arch: Arch) {
    let mut command = Command::new(target().join("debug/rebalancer-demo"));
    command.arg("prepare");
    if !arch.is_host() {
        command.args(["--processor", arch.debian()]);
    }
    if let Err(error) = run(&mut command) {
        eprintln!("there is no real apiserver to test with: {error:#}");
    }
}

/// Runs on this machine.
#[derive(Clone, Copy)]
struct Here<'a> {
    /// The file that tests which skip themselves write a line to.
    skips: &'a Path,
    /// Where they write.
    scratch: &'a Path,
    /// The image that the group deploy walks through with.
    walked: Option<&'a Path>,
}

impl Here<'_> {
    /// Runs groups, one after the other; `ready` returns when the real apiserver is there.
    fn run(self, groups: &[Group], ready: impl Fn()) -> anyhow::Result<Counts> {
        let mut total = Counts::default();
        let mut is_ready = false;
        for group in groups {
            if group.has_real_apiservers() && !is_ready {
                ready();
                is_ready = true;
            }
            let began = Instant::now();
            total = total + self.run_group(*group)?;
            eprintln!("the group `{}` took {} s", group.name(), began.elapsed().as_secs());
        }
        Ok(total)
    }

    fn run_group(self, group: Group) -> anyhow::Result<Counts> {
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
            && let Some(server) = vm::extras::goaway_server(Arch::host())?
        {
            command.env("REBALANCER_GOAWAY_SERVER", absolute(&server)?);
        }
        if group == Group::Deploy {
            command.env("REBALANCER_PROMTOOL", absolute(&promtool()?)?);
            if let Some(image) = self.walked {
                command.env("REBALANCER_IMAGE", absolute(image)?);
            }
        }
        command.env("REBALANCER_SKIPS", absolute(self.skips)?);
        command.env("TMPDIR", self.scratch);
        counted(&mut command, self.skips, "")
    }
}

/// Runs groups in VMs, one after the other.
fn run_in_vms(runs: &[Run], skips: &Path) -> anyhow::Result<Counts> {
    let mut total = Counts::default();
    for Run { group, machine, only } in runs {
        eprintln!("the group `{}` on {}, in a VM", group.name(), machine.name());
        let only: Vec<&str> = only.iter().map(String::as_str).collect();
        let mut command = vm::command(machine, &group.name(), &only)?;
        let began = Instant::now();
        let counts = counted(&mut command, skips, &format!("{}| ", machine.version))?;
        println!(
            "{} on {}: {} passed, {} failed, in {} s",
            group.name(),
            machine.name(),
            counts.passed,
            counts.failed,
            began.elapsed().as_secs(),
        );
        total = total + counts;
    }
    Ok(total)
}

/// Prometheus' tool for rules: on PATH, or out of Debian's package, which is not installed, since it would start a server.
fn promtool() -> anyhow::Result<PathBuf> {
    if let Some(found) = debian::on_path("promtool") {
        return Ok(found);
    }
    let suite = debian::Suite::open("bookworm", Arch::host())?;
    let tree = suite.unpacked("prometheus", None)?;
    debian::find(&tree, "usr/bin/promtool").context("Debian's package prometheus has no promtool")
}

/// Runs `cargo test` or a VM, shows what it prints, each line behind `prefix`, and adds up its result lines; a VM's skips
/// are added to the file.
fn counted(command: &mut Command, skips: &Path, prefix: &str) -> anyhow::Result<Counts> {
    let line = shown(command);
    eprintln!("+ {line}");
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{line}`"))?;
    let stdout = child.stdout.take().expect("the child's stdout is piped");
    let mut counts = Counts::default();
    let mut results = 0;
    let mut clock = GuestClock::default();
    for read in BufReader::new(stdout).split(b'\n') {
        let read = read.with_context(|| format!("cannot read what `{line}` prints"))?;
        let text = String::from_utf8_lossy(&read);
        let text = text.trim_end_matches('\r');
        if let Some(guest) = vm::clock(text) {
            clock.told(guest, Instant::now());
        }
        if let Some(reason) = text.strip_prefix("vm: skipped ") {
            let mut file = fs::OpenOptions::new().append(true).open(skips)?;
            writeln!(file, "in the VM: {reason}")?;
        }
        if let Some(result) = parse_result(text) {
            results += 1;
            counts.passed += result.passed;
            counts.failed += result.failed;
        }
        writeln!(std::io::stdout(), "{prefix}{text}")?;
    }
    if let Some(runaway) = clock.runaway() {
        println!("{runaway}");
        if counts.failed > 0 {
            eprintln!("what failed may have failed for that: run it again on a machine that is less busy");
        }
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
