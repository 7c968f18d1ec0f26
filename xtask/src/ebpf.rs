//! `build-ebpf`: compiles the kernel programs for the BPF target.
//!
//! Core is built from its source, which is found where the machine has it: nightly's rust-src component, the same of
//! the default toolchain, or Debian's package of exactly this rustc's release where rustup cannot download.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use crate::{
    arch::Arch,
    debian,
    run::{root, run, target},
};

/// The linker that uses rustc's own LLVM, by LLVM's major version.
const LINKERS: [(&str, &str); 2] = [("21", "0.9.15"), ("22", "0.10.3")];

/// How core is built.
struct Toolchain {
    name: Option<&'static str>,
    bootstrap: bool,
    library: Option<PathBuf>,
}

/// The objects, by the names of the binaries they are: the programs that count, the one that answers in an apiserver's
/// place, which fewer kernels take, the one that steers new connections, and what benchmarks put beside the answering one.
const OBJECTS: [&str; 4] = [
    "rebalancer-ebpf",
    "rebalancer-steer",
    "rebalancer-intercept",
    "rebalancer-cost",
];

/// The directory a processor's objects are in; this machine's is where the binary's build looks for them.
pub fn directory(arch: Arch) -> PathBuf {
    if arch.is_host() {
        target().join("ebpf")
    } else {
        target().join(format!("ebpf-{}", arch.debian()))
    }
}

/// Builds the objects when a source is newer than one of them, says what it does, and answers with their directory.
pub fn build(arch: Arch) -> anyhow::Result<PathBuf> {
    let directory = directory(arch);
    let objects = OBJECTS.map(|name| directory.join(format!("{name}.o")));
    let mut fresh = true;
    for object in &objects {
        fresh &= is_fresh(object)?;
    }
    if fresh {
        eprintln!("the kernel programs are up to date: {}", directory.display());
        return Ok(directory);
    }
    let toolchain = toolchain()?;
    let linker = linker(&toolchain)?;
    let rustflags = [
        format!("--cfg=bpf_target_arch=\"{}\"", arch.rust()),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        format!("-Clinker={}", linker.display()),
    ];
    let mut command = Command::new("cargo");
    if let Some(name) = toolchain.name {
        command.arg(format!("+{name}"));
    }
    command
        .current_dir(root().join("rebalancer-ebpf"))
        // The outer cargo's own settings are for the host.
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", rustflags.join(" "))
        .env("CARGO_TARGET_DIR", directory.join("build"))
        .args([
            "build",
            "--release",
            "--locked",
            "-Zbuild-std=core",
            "--target",
            bpf_target(),
        ]);
    if toolchain.bootstrap {
        command.env("RUSTC_BOOTSTRAP", "1");
    }
    if let Some(library) = &toolchain.library {
        command.env("__CARGO_TESTS_ONLY_SRC_ROOT", library);
    }
    run(&mut command)?;
    for (name, object) in OBJECTS.iter().zip(&objects) {
        let built = directory.join("build").join(bpf_target()).join("release").join(name);
        fs::copy(&built, object).with_context(|| format!("cannot copy {} to {}", built.display(), object.display()))?;
        eprintln!("the kernel programs: {}", object.display());
    }
    Ok(directory)
}

fn bpf_target() -> &'static str {
    if cfg!(target_endian = "big") {
        "bpfeb-unknown-none"
    } else {
        "bpfel-unknown-none"
    }
}

fn is_fresh(object: &Path) -> anyhow::Result<bool> {
    let time = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified());
    let Ok(built) = time(object) else { return Ok(false) };
    for directory in ["rebalancer-ebpf/src", "rebalancer-common/src"] {
        for entry in fs::read_dir(root().join(directory))? {
            if time(&entry?.path())? > built {
                return Ok(false);
            }
        }
    }
    Ok(time(&root().join("rebalancer-ebpf/Cargo.lock"))? <= built)
}

fn rustc(toolchain: Option<&str>, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new("rustc");
    command.env_remove("RUSTUP_TOOLCHAIN");
    if let Some(name) = toolchain {
        command.arg(format!("+{name}"));
    }
    let output = command.args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then_some(text)
}

fn has_source(toolchain: Option<&str>) -> bool {
    rustc(toolchain, &["--print", "sysroot"]).is_some_and(|sysroot| {
        Path::new(sysroot.trim())
            .join("lib/rustlib/src/rust/library/core/src/lib.rs")
            .is_file()
    })
}

fn toolchain() -> anyhow::Result<Toolchain> {
    let nightly = Toolchain {
        name: Some("nightly"),
        bootstrap: false,
        library: None,
    };
    let stable = |library| Toolchain {
        name: None,
        bootstrap: true,
        library,
    };
    if has_source(Some("nightly")) {
        return Ok(nightly);
    }
    if has_source(None) {
        return Ok(stable(None));
    }
    eprintln!("core's source is needed to build for BPF: `rustup component add rust-src --toolchain nightly`");
    let added = Command::new("rustup")
        .args(["component", "add", "rust-src", "--toolchain", "nightly"])
        .status();
    if added.is_ok_and(|status| status.success()) && has_source(Some("nightly")) {
        return Ok(nightly);
    }
    eprintln!("rustup cannot add it here: taking Debian's package of this rustc's release instead");
    debian_library().map(|library| stable(Some(library)))
}

/// The standard library's source for this very toolchain; `None` when it has its own.
pub fn standard_library() -> anyhow::Result<Option<PathBuf>> {
    if has_source(None) {
        return Ok(None);
    }
    debian_library().map(Some)
}

/// Debian's source of exactly this rustc's release.
fn debian_library() -> anyhow::Result<PathBuf> {
    let version = rustc(None, &["-vV"]).context("rustc does not run")?;
    let release = version
        .lines()
        .find_map(|line| line.strip_prefix("release: "))
        .context("rustc does not say its release")?;
    for name in ["trixie-backports", "sid"] {
        let suite = debian::Suite::open(name, Arch::host())?;
        let found = suite.versions("rust-src")?;
        let Some(package) = found.iter().find(|version| version.starts_with(&format!("{release}+"))) else {
            continue;
        };
        let tree = suite.unpacked("rust-src", Some(package))?;
        let core = debian::find(&tree, "library/core/src/lib.rs").context("the package has no library/core")?;
        let library = core
            .ancestors()
            .nth(3)
            .context("library/core/src/lib.rs has three parents")?;
        return Ok(library.to_owned());
    }
    bail!(
        "there is no source of core for rustc {release}: with network access, \
         `rustup toolchain install nightly --component rust-src` is all that is needed"
    )
}

/// Installs the linker that fits the toolchain's LLVM into the target directory.
fn linker(toolchain: &Toolchain) -> anyhow::Result<PathBuf> {
    let version = rustc(toolchain.name, &["-vV"]).context("rustc does not run")?;
    let llvm = version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: ")?.split('.').next())
        .context("rustc does not say its LLVM's version")?;
    let Some((_, wanted)) = LINKERS.iter().find(|(known, _)| *known == llvm) else {
        bail!("no bpf-linker is known for LLVM {llvm}, which this rustc uses; known are LLVM 21 and 22");
    };
    let tools = target().join("tools");
    let path = tools.join("bin/bpf-linker");
    let installed = Command::new(&path).arg("--version").output();
    if installed.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(wanted)) {
        return Ok(path);
    }
    eprintln!(
        "installing bpf-linker {wanted} into {}, once (a minute)",
        tools.display()
    );
    // Its work is LLVM's, which is as it comes with rustc: optimising its own code takes longer than it ever saves.
    run(Command::new("cargo")
        .env_remove("RUSTFLAGS")
        .env("CARGO_PROFILE_DEV_DEBUG", "false")
        .args([
            "install",
            "bpf-linker",
            "--locked",
            "--debug",
            "--version",
            wanted,
            "--root",
        ])
        .arg(&tools))?;
    Ok(path)
}
