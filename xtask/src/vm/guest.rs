//! What runs in a VM: built without shared libraries, and packed with what it needs.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use super::{
    Image,
    archive::{Archive, libraries},
    extras::Extras,
};
use crate::{
    ebpf,
    run::{cargo, run, shown, target},
};

const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// What a VM is booted for.
#[derive(Clone, Copy)]
pub enum Payload<'a> {
    /// A test group.
    Tests(&'a str),
    /// A program of the package `rebalancer-tests`, as it is released.
    Program(&'a str),
}

/// What runs inside.
pub struct Guest {
    init: PathBuf,
    rebalancer: PathBuf,
    program: PathBuf,
    /// Where the program is in the guest.
    pub path: String,
}

impl Guest {
    /// Builds everything without shared libraries.
    pub fn build(payload: Payload<'_>) -> anyhow::Result<Self> {
        let objects = ebpf::build()?;
        let directory = target().join("vm/build");
        let profile: &[&str] = match payload {
            Payload::Tests(_) => &[],
            Payload::Program(_) => &["--release"],
        };
        let build = |arguments: &[&str]| {
            let mut command = cargo(arguments);
            command
                .args(profile)
                .args(["--target", TRIPLE])
                .env("CARGO_TARGET_DIR", &directory)
                .env("RUSTFLAGS", "-Ctarget-feature=+crt-static -Cstrip=symbols")
                // An emulated processor has no time for code that nobody optimised.
                .env("CARGO_PROFILE_DEV_OPT_LEVEL", "1")
                .env("REBALANCER_EBPF_OBJECTS", &objects);
            command
        };
        let mut binaries = vec!["build", "--package", "rebalancer", "--package", "rebalancer-tests"];
        binaries.extend(["--bin", "rebalancer", "--bin", "vm-init"]);
        let built = directory.join(TRIPLE).join(match payload {
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
            path,
        })
    }

    /// Writes the initramfs.
    pub fn pack(&self, image: &Image, extras: &Extras, to: &Path) -> anyhow::Result<()> {
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
        archive.file(&self.path, &fs::read(&self.program)?)?;
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
