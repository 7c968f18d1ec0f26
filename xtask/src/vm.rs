//! Tests in a virtual machine with a Debian kernel: emulated, so that it runs wherever a program runs.
//!
//! Job: fetch the kernel, pack an initramfs with the tests and what they run, boot it.
//! Must never need more than the target directory, but for qemu, which is installed when it is missing.

mod archive;
mod clock;
mod emulator;
pub mod extras;
mod guest;

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum;

pub use self::{clock::GuestClock, guest::Payload};
use self::{emulator::Emulator, extras::Extras, guest::Guest};
use crate::{
    arch::Arch,
    debian::{self, Suite},
    run::{shown, target},
};

/// Which Debian suites have a kernel of that version, in the order they are looked into: backports come and go.
const SUITES: [(&str, &[&str]); 7] = [
    ("5.10", &["bullseye-security", "bullseye"]),
    ("6.1", &["bookworm-security", "bookworm"]),
    ("6.12", &["trixie", "trixie-security"]),
    ("6.17", &["trixie-backports", "sid"]),
    ("6.18", &["trixie-backports", "sid"]),
    ("7.2", &["trixie-backports", "sid", "forky"]),
    ("7.3", &["trixie-backports", "sid", "experimental"]),
];
/// What a VM is besides a kernel: each is what some distribution or cluster has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// The kernel's memory and code are not to be changed, as with Secure Boot
    LockdownIntegrity,
    /// Nor is it to be read, as Talos' images for Secure Boot had it
    LockdownConfidentiality,
    /// No cgroup v2 is mounted, as on hosts with cgroup v1 only
    NoCgroup2,
    /// The tests are in a cgroup namespace of their own, as in a pod
    CgroupNamespace,
    /// Listeners are for MPTCP, as Go's are since Go 1.24
    Mptcp,
}

impl Mode {
    /// As it is typed.
    pub fn name(self) -> String {
        let value = self.to_possible_value().expect("no mode is hidden");
        value.get_name().to_owned()
    }

    /// The kernel's arguments; those it does not know are variables of the first process (kernel-parameters.rst).
    fn append(self) -> String {
        let kernel = match self {
            Self::LockdownIntegrity => "lockdown=integrity ",
            Self::LockdownConfidentiality => "lockdown=confidentiality ",
            Self::NoCgroup2 | Self::CgroupNamespace | Self::Mptcp => "",
        };
        format!("{kernel}REBALANCER_VM_MODE={}", self.name())
    }
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The kernel's version, one of [`versions`].
    pub version: String,
    /// Its processor.
    pub arch: Arch,
    /// What else it is.
    pub mode: Option<Mode>,
}

impl Machine {
    /// A plain one, of this machine's processor.
    pub fn plain(version: &str) -> Self {
        Self {
            version: version.to_owned(),
            arch: Arch::host(),
            mode: None,
        }
    }

    /// For people.
    pub fn name(&self) -> String {
        let mode = self.mode.map(|mode| format!(", {}", mode.name())).unwrap_or_default();
        format!("Debian's kernel {} ({}{mode})", self.version, self.arch.debian())
    }
}

/// Modules the tests need, in the order they are loaded: namespaces on a bridge, sock_diag, and a queue that drops packets.
const MODULES: [&str; 7] = ["llc", "stp", "bridge", "veth", "inet_diag", "tcp_diag", "sch_tbf"];

/// No run takes longer, emulated as it is: tests, and what is measured or shown in many scenes.
const TESTS_S: &str = "1800";
const SCENES_S: &str = "5400";

/// The versions `--kernel` takes.
pub fn versions() -> impl Iterator<Item = &'static str> {
    SUITES.iter().map(|(version, _)| *version)
}

/// A command that boots a VM, which runs a test group, or those of it whose names contain one of `filters`, and prints what
/// it says.
///
/// # Errors
///
/// The kernel, qemu or the tests cannot be had.
pub fn command(machine: &Machine, group: &str, filters: &[&str]) -> anyhow::Result<Command> {
    let extras = Extras::of(group, machine.arch)?;
    // What a test has seen is worth reading when it passes too.
    let arguments = ["--test-threads=1", "--show-output"]
        .into_iter()
        .chain(filters.iter().copied())
        .map(str::to_owned)
        .chain(extras.arguments.clone());
    boot(machine, Payload::Tests(group), &arguments.collect::<Vec<_>>(), &extras)
}

/// Boots a VM with that kernel that runs such a program, with what goes with a group: its JSON, where asked for, is the only
/// thing on stdout, and `hear` hears each other line. Answers with the program's exit code.
///
/// # Errors
///
/// The VM does not start, or ends before the program does.
pub fn show(
    version: &str,
    payload: Payload<'_>,
    arguments: &[String],
    group: &str,
    mut hear: impl FnMut(&str),
) -> anyhow::Result<u8> {
    listen(version, payload, arguments, group, |line| {
        if line.starts_with("{\"") {
            writeln!(std::io::stdout(), "{line}")?;
        } else {
            hear(line);
            writeln!(std::io::stderr(), "{line}")?;
        }
        Ok(())
    })
}

/// Boots a VM with that kernel that runs such a program, with what goes with a group; `hear` hears each line of its console.
/// Answers with the program's exit code.
///
/// # Errors
///
/// The VM does not start, or ends before the program does.
pub fn listen(
    version: &str,
    payload: Payload<'_>,
    arguments: &[String],
    group: &str,
    mut hear: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<u8> {
    let machine = Machine::plain(version);
    let extras = Extras::of(group, machine.arch)?;
    let mut command = boot(&machine, payload, arguments, &extras)?;
    eprintln!("+ {}", shown(&command));
    let mut child = command.stdout(Stdio::piped()).spawn().context("qemu")?;
    let stdout = child.stdout.take().context("stdout is piped")?;
    let (mut code, mut guest_clock) = (None, GuestClock::default());
    for read in BufReader::new(stdout).split(b'\n') {
        let read = read?;
        let text = String::from_utf8_lossy(&read);
        let text = text.trim_end_matches('\r');
        code = exit_code(text).or(code);
        if let Some(seconds) = clock(text) {
            guest_clock.told(seconds, Instant::now());
        }
        hear(text)?;
    }
    child.wait()?;
    if let Some(said) = guest_clock.runaway() {
        bail!(said);
    }
    code.context("the VM ended before the program did")
}

/// Takes `--vm VERSION` out of the flags of what is to run: it is this program's own.
///
/// # Errors
///
/// There is no such kernel.
pub fn without_version(flags: &[String]) -> anyhow::Result<(Option<String>, Vec<String>)> {
    let known: Vec<_> = versions().collect();
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

fn boot(machine: &Machine, payload: Payload<'_>, arguments: &[String], extras: &Extras) -> anyhow::Result<Command> {
    let Machine { version, arch, mode } = machine;
    let emulator = Emulator::get(*arch)?;
    let image = Image::fetch(version, *arch)?;
    let guest = Guest::build(payload, *arch)?;
    let initramfs = target().join(format!("vm/initramfs-{version}-{}", arch.debian()));
    guest.pack(&image, extras, &initramfs)?;
    let (emulated, console) = arch.machine();
    let is_large = extras.is_large && emulator.has_threads();
    let clock = if is_large { clock::by_time_stamps() } else { None };
    let clock = clock.unwrap_or_else(|| arch.clock().to_owned());
    let accelerator = if is_large {
        ["-accel", "tcg,thread=multi", "-smp", "2"]
    } else {
        ["-accel", "tcg", "-smp", "1"]
    };
    // What follows `--` is the first process's: what it is to run.
    // The long form of tests is asked for in the guest as it is here.
    let long = std::env::var_os("REBALANCER_LONG").map_or("", |_| "REBALANCER_LONG=1 ");
    let append = format!(
        "{console} {clock} panic=-1 quiet {long}{} -- /{} {}",
        mode.map(Mode::append).unwrap_or_default(),
        guest.path,
        arguments.join(" ")
    );
    let patience = match payload {
        Payload::Tests(_) => TESTS_S,
        Payload::Program(_) => SCENES_S,
    };
    let mut command = Command::new("timeout");
    command
        .arg(patience)
        .args(emulator.arguments())
        .args(emulated)
        .args(accelerator)
        .args(["-m", "3000"])
        .args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&initramfs)
        .args(["-append", append.trim_end()])
        .args(&extras.machine)
        .stdin(std::process::Stdio::null());
    Ok(command)
}

/// The exit code of what ran inside, from a line the first process prints last.
pub fn exit_code(line: &str) -> Option<u8> {
    line.strip_prefix("vm: exit ")?.parse().ok()
}

/// The guest's own clock, in seconds since it booted, from a line the first process prints at the beginning and the end.
pub fn clock(line: &str) -> Option<f64> {
    line.strip_prefix("vm: clock ")?.parse().ok()
}

/// A kernel and its modules.
struct Image {
    kernel: PathBuf,
    modules: Vec<(String, Vec<u8>)>,
}

impl Image {
    fn fetch(version: &str, arch: Arch) -> anyhow::Result<Self> {
        let Some((_, suites)) = SUITES.iter().find(|(known, _)| *known == version) else {
            let known: Vec<_> = versions().collect();
            bail!("--kernel {version}: known are {}", known.join(", "));
        };
        let pattern = format!(
            "^linux-(image|binary)-{}[.+-][^ ]*cloud-{}$",
            version.replace('.', "\\."),
            arch.debian()
        );
        let mut found = None;
        for name in *suites {
            let suite = match Suite::open(name, arch) {
                Ok(suite) => suite,
                Err(error) => {
                    eprintln!("{error:#}");
                    continue;
                }
            };
            let mut packages = suite.search(&pattern)?;
            packages.retain(|package| !package.contains("-unsigned"));
            // Of one version, the package with the kernel itself last: since 7.2 that is not the one named image.
            packages.sort_by_key(|package| (numbers(package), package.contains("-binary-")));
            if let Some(package) = packages.pop() {
                found = Some((suite, package));
                break;
            }
        }
        let (suite, package) = &found.with_context(|| {
            format!(
                "no Debian suite has a cloud kernel {version} for {} any more (looked into: {}); backports come and go",
                arch.debian(),
                suites.join(", ")
            )
        })?;
        let tree = suite.unpacked(package, None)?;
        let kernel = kernel_of(&tree).with_context(|| format!("{package} has no vmlinuz"))?;
        // Since 7.2 the modules are in a package of their own.
        let modules_tree = if debian::find(&tree, "veth.ko")
            .or_else(|| debian::find(&tree, "veth.ko.xz"))
            .is_some()
        {
            tree
        } else {
            // Only the kernel may be left of one that is gone from the suite.
            suite
                .unpacked(&package.replace("linux-binary-", "linux-modules-"), None)
                .with_context(|| format!("the kernel {version} is there and its modules are not"))?
        };
        let mut modules = Vec::new();
        for name in MODULES {
            match module(&modules_tree, name)? {
                Some(module) => modules.push((name.to_owned(), module)),
                None => eprintln!("kernel {version} has no module {name}: built in, or not there"),
            }
        }
        Ok(Self { kernel, modules })
    }
}

/// The numbers in a name, to sort versions by.
fn numbers(name: &str) -> Vec<u32> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|part| part.parse().ok())
        .collect()
}

fn kernel_of(tree: &Path) -> Option<PathBuf> {
    let boot = fs::read_dir(tree.join("boot")).into_iter().flatten().flatten();
    boot.map(|entry| entry.path())
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
        })
        .or_else(|| debian::find(tree, "vmlinuz"))
}

fn module(tree: &Path, name: &str) -> anyhow::Result<Option<Vec<u8>>> {
    if let Some(path) = debian::find(tree, &format!("{name}.ko")) {
        return Ok(Some(fs::read(path)?));
    }
    let Some(path) = debian::find(tree, &format!("{name}.ko.xz")) else {
        return Ok(None);
    };
    let output = Command::new("xz")
        .args(["--decompress", "--stdout"])
        .arg(&path)
        .output()
        .context("xz")?;
    if !output.status.success() {
        bail!("xz cannot read {}", path.display());
    }
    Ok(Some(output.stdout))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vm_is_no_flag_of_what_runs_in_it() {
        let split = |line: &str| {
            let flags: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            without_version(&flags).map(|(version, others)| (version, others.join(" ")))
        };
        let steer = || "--shim steer --json".to_owned();
        for line in ["--vm 6.18 --shim steer --json", "--shim steer --vm=6.18 --json"] {
            assert_eq!(split(line).expect("a version"), (Some("6.18".to_owned()), steer()));
        }
        assert_eq!(split("--shim steer --json").expect("no version"), (None, steer()));
        assert!(split("--vm 5.4").is_err() && split("--vm").is_err());
    }
}
