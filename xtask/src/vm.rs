//! Tests in a virtual machine with a Debian kernel: emulated, so that it runs wherever a program runs.
//!
//! Job: fetch the kernel, pack an initramfs with the tests and what they run, boot it.
//! Must never need more than the target directory, but for qemu, which is installed when it is missing.

mod archive;
pub mod extras;
mod guest;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use self::{
    extras::Extras,
    guest::{Guest, Payload},
};
use crate::{
    debian::{self, Suite},
    run::{is_root, run, target},
};

/// Which Debian suite has a kernel of that version.
const SUITES: [(&str, &str); 5] = [
    ("6.1", "bookworm"),
    ("6.12", "trixie"),
    ("6.17", "trixie-backports"),
    ("6.18", "trixie-backports"),
    ("7.2", "sid"),
];

/// Modules the tests need, in the order they are loaded: namespaces on a bridge, and sock_diag.
const MODULES: [&str; 6] = ["llc", "stp", "bridge", "veth", "inet_diag", "tcp_diag"];

/// No run takes longer, emulated as it is.
const SECONDS: &str = "1800";

/// The versions `--kernel` takes.
pub fn versions() -> impl Iterator<Item = &'static str> {
    SUITES.iter().map(|(version, _)| *version)
}

/// A command that boots a VM with that kernel, which runs a test group and prints what it says.
///
/// # Errors
///
/// The kernel, qemu or the tests cannot be had.
pub fn command(version: &str, group: &str) -> anyhow::Result<Command> {
    let extras = Extras::of(group)?;
    // What a test has seen is worth reading when it passes too.
    let arguments = ["--test-threads=1", "--show-output"]
        .map(str::to_owned)
        .into_iter()
        .chain(extras.arguments.clone());
    boot(version, Payload::Tests(group), &arguments.collect::<Vec<_>>(), &extras)
}

/// A command that boots a VM with that kernel, which runs a program of the package `rebalancer-tests` and prints what it
/// says; the programs that go with `group` are there too.
///
/// # Errors
///
/// The kernel, qemu or the program cannot be had.
pub fn program(version: &str, name: &str, arguments: &[String], group: &str) -> anyhow::Result<Command> {
    boot(version, Payload::Program(name), arguments, &Extras::of(group)?)
}

fn boot(version: &str, payload: Payload<'_>, arguments: &[String], extras: &Extras) -> anyhow::Result<Command> {
    let qemu = qemu()?;
    let image = Image::fetch(version)?;
    let guest = Guest::build(payload)?;
    let initramfs = target().join(format!("vm/initramfs-{version}"));
    guest.pack(&image, extras, &initramfs)?;
    // What follows `--` is the first process's: what it is to run.
    let append = format!(
        "console=ttyS0 panic=-1 quiet -- /{} {}",
        guest.path,
        arguments.join(" ")
    );
    let mut command = Command::new("timeout");
    command
        .args([SECONDS, &qemu])
        .args([
            "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", "3000", "-machine", "q35",
        ])
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

fn qemu() -> anyhow::Result<String> {
    const QEMU: &str = "qemu-system-x86_64";
    let there = || {
        Command::new(QEMU)
            .arg("--version")
            .output()
            .is_ok_and(|output| output.status.success())
    };
    if !there() {
        eprintln!("{QEMU} is needed and missing: installing Debian's package qemu-system-x86");
        let apt = |arguments: &[&str]| {
            let mut command = if is_root() {
                Command::new("apt-get")
            } else {
                let mut command = Command::new("sudo");
                command.arg("apt-get");
                command
            };
            command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
            run(&mut command)
        };
        apt(&["update", "-qq"])?;
        apt(&["install", "-qq", "--yes", "--no-install-recommends", "qemu-system-x86"])?;
        if !there() {
            bail!("{QEMU} is still missing; install it by hand");
        }
    }
    Ok(QEMU.to_owned())
}

/// A kernel and its modules.
struct Image {
    kernel: PathBuf,
    modules: Vec<(String, Vec<u8>)>,
}

impl Image {
    fn fetch(version: &str) -> anyhow::Result<Self> {
        let Some((_, suite)) = SUITES.iter().find(|(known, _)| *known == version) else {
            let known: Vec<_> = versions().collect();
            bail!("--kernel {version}: known are {}", known.join(", "));
        };
        let suite = Suite::open(suite)?;
        let pattern = format!(
            "^linux-(image|binary)-{}[.+-][^ ]*cloud-amd64$",
            version.replace('.', "\\.")
        );
        let mut packages = suite.search(&pattern)?;
        packages.retain(|package| !package.contains("-unsigned"));
        // Of one version, the package with the kernel itself last: since 7.2 that is not the one named image.
        packages.sort_by_key(|package| (numbers(package), package.contains("-binary-")));
        let package = packages
            .last()
            .with_context(|| format!("there is no cloud kernel {version} in that Debian suite"))?;
        let tree = suite.unpacked(package, None)?;
        let kernel = kernel_of(&tree).with_context(|| format!("{package} has no vmlinuz"))?;
        // Since 7.2 the modules are in a package of their own.
        let modules_tree = if debian::find(&tree, "veth.ko")
            .or_else(|| debian::find(&tree, "veth.ko.xz"))
            .is_some()
        {
            tree
        } else {
            suite.unpacked(&package.replace("linux-binary-", "linux-modules-"), None)?
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
