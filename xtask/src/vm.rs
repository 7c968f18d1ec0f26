//! Tests in a virtual machine with a Debian kernel: emulated, so that it runs wherever a program runs.
//!
//! Job: fetch the kernel, pack an initramfs with the tests and what they run, boot it.
//! Must never need more than the target directory, but for qemu, which is installed when it is missing.

use std::{
    fs::{self, File},
    io::{BufWriter, Write as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use crate::{
    debian::{self, Suite},
    ebpf,
    extras::Extras,
    run::{cargo, is_root, run, target},
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

const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// No run of the tests takes longer, emulated as they are.
const SECONDS: &str = "1200";

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
    let qemu = qemu()?;
    let image = Image::fetch(version)?;
    let guest = Guest::build(group)?;
    let extras = Extras::of(group)?;
    let initramfs = target().join(format!("vm/initramfs-{version}"));
    guest.pack(&image, &extras, &initramfs)?;
    // What follows `--` is the first process's, which passes it on to the tests.
    let append = format!("console=ttyS0 panic=-1 quiet -- {}", extras.arguments.join(" "));
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
        .args(["-append", append.trim_end_matches([' ', '-'])])
        .args(&extras.machine)
        .stdin(std::process::Stdio::null());
    Ok(command)
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
        packages.sort_by_key(|package| numbers(package));
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

/// What runs inside.
struct Guest {
    init: PathBuf,
    tests: PathBuf,
    rebalancer: PathBuf,
}

impl Guest {
    /// Builds everything without shared libraries.
    fn build(group: &str) -> anyhow::Result<Self> {
        let objects = ebpf::build()?;
        let directory = target().join("vm/build");
        let build = |arguments: &[&str]| {
            let mut command = cargo(arguments);
            command
                .args(["--target", TRIPLE])
                .env("CARGO_TARGET_DIR", &directory)
                .env("RUSTFLAGS", "-Ctarget-feature=+crt-static -Cstrip=symbols")
                .env("REBALANCER_EBPF_OBJECTS", &objects);
            command
        };
        run(&mut build(&["build", "--package", "rebalancer", "--bin", "rebalancer"]))?;
        run(&mut build(&[
            "build",
            "--package",
            "rebalancer-tests",
            "--bin",
            "vm-init",
        ]))?;
        let mut tests = build(&["test", "--no-run", "--package", "rebalancer-tests", "--test", group]);
        tests.arg("--message-format=json-render-diagnostics");
        eprintln!("+ {}", crate::run::shown(&tests));
        let output = tests.stderr(std::process::Stdio::inherit()).output()?;
        if !output.status.success() {
            bail!("the tests cannot be built for the VM");
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let executable = |line: &str| -> Option<PathBuf> {
            let message: serde_json::Value = serde_json::from_str(line).ok()?;
            let is_it = message["target"]["name"] == group && message["profile"]["test"] == true;
            is_it
                .then(|| message["executable"].as_str().map(PathBuf::from))
                .flatten()
        };
        let tests = text
            .lines()
            .find_map(executable)
            .context("cargo named no test binary")?;
        let debug = directory.join(TRIPLE).join("debug");
        Ok(Self {
            init: debug.join("vm-init"),
            rebalancer: debug.join("rebalancer"),
            tests,
        })
    }

    /// Writes the initramfs.
    fn pack(&self, image: &Image, extras: &Extras, to: &Path) -> anyhow::Result<()> {
        let ip = Command::new("which").arg("ip").output().context("which")?;
        let ip = PathBuf::from(String::from_utf8_lossy(&ip.stdout).trim());
        if !ip.is_file() {
            bail!("`ip` is missing: install iproute2");
        }
        let mut archive = Archive::create(to)?;
        for directory in ["bin", "modules", "proc", "sys", "dev", "tmp", "run"] {
            archive.directory(directory)?;
        }
        archive.file("init", &fs::read(&self.init)?)?;
        archive.file("tests", &fs::read(&self.tests)?)?;
        archive.file("bin/rebalancer", &fs::read(&self.rebalancer)?)?;
        archive.file("bin/ip", &fs::read(&ip)?)?;
        for (name, path) in &extras.files {
            let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            archive.file(name, &content)?;
        }
        let mut made = vec!["bin".to_owned()];
        for library in libraries(&ip)? {
            let name = library.to_string_lossy().trim_start_matches('/').to_owned();
            archive.parents(&name, &mut made)?;
            archive.file(&name, &fs::read(&library)?)?;
        }
        for (index, (name, module)) in image.modules.iter().enumerate() {
            archive.file(&format!("modules/{index}-{name}.ko"), module)?;
        }
        archive.end()
    }
}

/// The shared libraries a program needs, its loader included.
fn libraries(program: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect())
}

/// A cpio archive of the kind the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst, "newc").
struct Archive {
    out: BufWriter<File>,
    entries: u32,
}

impl Archive {
    fn create(path: &Path) -> anyhow::Result<Self> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        Ok(Self {
            out: BufWriter::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?),
            entries: 0,
        })
    }

    fn directory(&mut self, name: &str) -> anyhow::Result<()> {
        self.entry(name, 0o040_755, &[])
    }

    fn file(&mut self, name: &str, content: &[u8]) -> anyhow::Result<()> {
        self.entry(name, 0o100_755, content)
    }

    /// Makes a file's directories, once.
    fn parents(&mut self, name: &str, made: &mut Vec<String>) -> anyhow::Result<()> {
        let mut path = String::new();
        let parts: Vec<&str> = name.split('/').collect();
        for part in &parts[..parts.len() - 1] {
            if !path.is_empty() {
                path.push('/');
            }
            path.push_str(part);
            if !made.contains(&path) {
                self.directory(&path)?;
                made.push(path.clone());
            }
        }
        Ok(())
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> anyhow::Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).context("a file of the initramfs is larger than 4 GiB")?;
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        write!(self.out, "070701")?;
        for field in fields {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(b"\0")?;
        self.pad(110 + name.len() + 1)?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    /// Fills up to four octets.
    fn pad(&mut self, written: usize) -> anyhow::Result<()> {
        let rest = written.next_multiple_of(4) - written;
        Ok(self.out.write_all(&[0; 3][..rest])?)
    }

    fn end(mut self) -> anyhow::Result<()> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.out.flush()?)
    }
}
