//! What runs in a VM: built without shared libraries, and packed with what it needs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use super::{
    Image,
    archive::{Archive, foreign_libraries, libraries},
    extras::Extras,
};
use crate::{
    arch::Arch,
    debian::{self, Suite},
    ebpf,
    run::{cargo, programs, run, shown, target},
    standard::Standard,
};

/// Whose programs a guest of another processor gets.
const SUITE: &str = "bookworm";

/// What the tests in a guest run beside their own, by Debian's packages.
const PROGRAMS: [(&str, &[&str]); 4] = [
    ("dash", &["sh"]),
    ("iproute2", &["ip", "ss", "tc"]),
    ("util-linux", &["unshare", "setpriv"]),
    ("mount", &["mount", "umount"]),
];

/// What a VM is booted for.
#[derive(Clone, Copy)]
pub enum Payload<'a> {
    /// A test group.
    Tests(&'a str),
    /// A program of the package `rebalancer-tests`, as it is released: an emulated processor has no time for more.
    Program(&'a str),
}

/// What runs inside.
pub struct Guest {
    init: PathBuf,
    rebalancer: PathBuf,
    program: PathBuf,
    arch: Arch,
    /// Where the program is in the guest.
    pub path: String,
}

impl Guest {
    /// Tests for this machine's processor are those that run here too, with the libraries they need; everything else is
    /// built without shared libraries.
    pub fn build(payload: Payload<'_>, arch: Arch) -> anyhow::Result<Self> {
        match payload {
            Payload::Tests(group) if arch.is_host() => {
                programs(&[])?;
                let mut tests = cargo(["test", "--no-run", "--package", "rebalancer-tests", "--test", group]);
                Self::as_here(&test_binary(&mut tests, group)?, "tests".to_owned())
            }
            _ => Self::without_libraries(payload, arch),
        }
    }

    /// What `cargo test` runs here: a second build of everything would take longer than the tests.
    fn as_here(program: &Path, path: String) -> anyhow::Result<Self> {
        let built = target().join("debug");
        Ok(Self {
            init: stripped(&built.join("vm-init"))?,
            rebalancer: stripped(&built.join("rebalancer"))?,
            program: stripped(program)?,
            arch: Arch::host(),
            path,
        })
    }

    fn without_libraries(payload: Payload<'_>, arch: Arch) -> anyhow::Result<Self> {
        let objects = ebpf::build(arch)?;
        let directory = target().join("vm/build");
        let triple = arch.triple();
        let standard = Standard::of(arch)?;
        let profile: &[&str] = match payload {
            Payload::Tests(_) => &[],
            Payload::Program(_) => &["--release"],
        };
        let build = |arguments: &[&str]| {
            let mut command = cargo(arguments);
            command
                .args(profile)
                .args(["--target", &triple])
                .env("CARGO_TARGET_DIR", &directory)
                .env("RUSTFLAGS", RUSTFLAGS)
                // An emulated processor has no time for code that nobody optimised.
                .env("CARGO_PROFILE_DEV_OPT_LEVEL", "1")
                .env("REBALANCER_EBPF_OBJECTS", &objects);
            standard.prepare(&mut command, arch);
            command
        };
        let mut binaries = vec!["build", "--package", "rebalancer", "--package", "rebalancer-tests"];
        binaries.extend(["--bin", "rebalancer", "--bin", "vm-init"]);
        let built = directory.join(&triple).join(match payload {
            Payload::Tests(_) => "debug",
            Payload::Program(_) => "release",
        });
        let (program, path) = match payload {
            Payload::Program(name) => {
                binaries.extend(["--bin", name]);
                run(&mut build(&binaries))?;
                (built.join(name), format!("bin/{name}"))
            }
            Payload::Tests(group) => {
                run(&mut build(&binaries))?;
                let mut tests = build(&["test", "--no-run", "--package", "rebalancer-tests", "--test", group]);
                (test_binary(&mut tests, group)?, "tests".to_owned())
            }
        };
        Ok(Self {
            init: built.join("vm-init"),
            rebalancer: built.join("rebalancer"),
            program,
            arch,
            path,
        })
    }

    /// Writes the initramfs.
    pub fn pack(&self, image: &Image, extras: &Extras, to: &Path) -> anyhow::Result<()> {
        let Programs {
            programs,
            libraries: mut needed,
        } = Programs::of(self.arch)?;
        if self.arch.is_host() {
            let more = extras.files.iter().map(|(_, path)| path);
            for program in [&self.init, &self.rebalancer, &self.program].into_iter().chain(more) {
                needed.extend(libraries(program)?.into_iter().map(as_here));
            }
        }
        let mut archive = Archive::create(to)?;
        for directory in ["bin", "modules", "proc", "sys", "dev", "tmp", "run"] {
            archive.directory(directory)?;
        }
        archive.file("init", &fs::read(&self.init)?)?;
        archive.file(&self.path, &fs::read(&self.program)?)?;
        archive.file("bin/rebalancer", &fs::read(&self.rebalancer)?)?;
        for (name, program) in &programs {
            archive.file(&format!("bin/{name}"), &fs::read(program)?)?;
        }
        for (name, path) in &extras.files {
            let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            archive.file(name, &content)?;
        }
        let mut made = vec!["bin".to_owned()];
        for (name, library) in needed {
            archive.parents(&name, &mut made)?;
            archive.file(&name, &fs::read(&library)?)?;
        }
        for (index, (name, module)) in image.modules.iter().enumerate() {
            archive.file(&format!("modules/{index}-{name}.ko"), module)?;
        }
        archive.end()
    }
}

/// A file of this machine, in the same place in the guest.
fn as_here(file: PathBuf) -> (String, PathBuf) {
    (file.to_string_lossy().trim_start_matches('/').to_owned(), file)
}

/// A program without what nobody reads in a guest: its memory holds every file of it.
fn stripped(program: &Path) -> anyhow::Result<PathBuf> {
    let directory = target().join("vm/stripped");
    fs::create_dir_all(&directory)?;
    let to = directory.join(program.file_name().context("a program has a name")?);
    run(Command::new("strip").arg("-o").arg(&to).arg(program))?;
    Ok(to)
}

/// No shared libraries, and nothing that nobody reads.
const RUSTFLAGS: &str = "-Ctarget-feature=+crt-static -Cstrip=symbols";

/// The programs of [`PROGRAMS`], and the libraries they need by where the loader looks for them.
struct Programs {
    programs: Vec<(&'static str, PathBuf)>,
    libraries: BTreeMap<String, PathBuf>,
}

impl Programs {
    fn of(arch: Arch) -> anyhow::Result<Self> {
        if arch.is_host() {
            Self::of_this_machine()
        } else {
            Self::of_debian(arch)
        }
    }

    fn of_this_machine() -> anyhow::Result<Self> {
        let mut found = Self {
            programs: Vec::new(),
            libraries: BTreeMap::new(),
        };
        for (package, names) in PROGRAMS {
            for name in names {
                let program =
                    debian::on_path(name).with_context(|| format!("`{name}` is missing: install {package}"))?;
                found.libraries.extend(libraries(&program)?.into_iter().map(as_here));
                found.programs.push((name, program));
            }
        }
        Ok(found)
    }

    fn of_debian(arch: Arch) -> anyhow::Result<Self> {
        let suite = Suite::open(SUITE, arch)?;
        let mut packages = BTreeSet::new();
        for (package, _) in PROGRAMS {
            packages.extend(suite.closure(package)?);
        }
        let trees = packages
            .iter()
            .map(|package| suite.unpacked(package, None))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let find = |name: &str| {
            trees
                .iter()
                .find_map(|tree| debian::find(tree, name))
                .and_then(|path| path.canonicalize().ok())
        };
        let mut found = Self {
            programs: Vec::new(),
            libraries: BTreeMap::new(),
        };
        for (package, names) in PROGRAMS {
            for name in names {
                // Debian's `sh` is a link to it that its scripts make.
                let file = if *name == "sh" { package } else { name };
                let program = find(&format!("bin/{file}"))
                    .or_else(|| find(&format!("sbin/{file}")))
                    .with_context(|| format!("the package {package} has no `{file}`"))?;
                for (library, path) in foreign_libraries(&program, find)? {
                    // The loader is named by its path, the others are looked for here.
                    let inside = if library.contains('/') {
                        library
                    } else {
                        format!("lib/{}-linux-gnu/{library}", arch.rust())
                    };
                    found.libraries.insert(inside, path);
                }
                found.programs.push((name, program));
            }
        }
        Ok(found)
    }
}

/// Builds a test, and answers with its binary as cargo names it.
fn test_binary(build: &mut Command, group: &str) -> anyhow::Result<PathBuf> {
    build.arg("--message-format=json-render-diagnostics");
    eprintln!("+ {}", shown(build));
    let output = build.stderr(std::process::Stdio::inherit()).output()?;
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
    text.lines().find_map(executable).context("cargo named no test binary")
}
