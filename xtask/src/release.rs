//! `image`, `package` and `release`: what is installed, each made from one static program.
//!
//! Output: files in `target/dist`, the same octets each time from the same sources; what they are is said on stdout.
//! Must never publish anything.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, ensure};

use crate::{
    arch::Arch,
    container,
    run::{root, run, target},
    sbom::sbom,
    standard::Standard,
};

/// What `image` and `package` take.
#[derive(clap::Args)]
pub struct Arguments {
    /// For this processor [default: this machine's]
    #[arg(long, value_enum)]
    arch: Option<Arch>,
}

/// What `image` takes.
#[derive(clap::Args)]
pub struct ImageArguments {
    #[command(flatten)]
    made: Arguments,
    /// Build it twice, compare, and run it in podman: with all it asks for, and with each thing left out
    #[arg(long)]
    check: bool,
}

/// What `release` takes.
#[derive(clap::Args)]
pub struct ReleaseArguments {
    #[command(flatten)]
    made: Arguments,
    /// Make everything and publish nothing, which is all this command does
    #[arg(long, required = true)]
    dry_run: bool,
}

/// The name of the section that cargo-auditable makes, as it is in an ELF file's table of names.
const AUDITED: &[u8] = b"\0.dep-v0\0";

/// The version of everything here, from the workspace.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Seconds since 1970 that files in archives are dated: the same each time.
const EPOCH: &str = "0";

/// What the program says that it was built from: a commit, `-dirty` where files differ from it.
fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").current_dir(root()).args(arguments).output().ok()?;
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success().then_some(said)
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".to_owned();
    };
    match git(&["status", "--porcelain", "--untracked-files=no"]) {
        Some(changes) if changes.is_empty() => commit,
        _ => format!("{commit}-dirty"),
    }
}

/// The program for a processor, without shared libraries, symbols and paths of this machine.
///
/// # Errors
///
/// It does not build.
pub fn program(arch: Arch) -> anyhow::Result<PathBuf> {
    let objects = crate::ebpf::build(arch)?;
    let triple = arch.triple();
    let standard = Standard::of(arch)?;
    let directory = target().join("release-build");
    let home = env::var_os("CARGO_HOME").map_or_else(
        || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        PathBuf::from,
    );
    let flags = [
        "-Ctarget-feature=+crt-static".to_owned(),
        "-Cstrip=symbols".to_owned(),
        format!("--remap-path-prefix={}=/src", root().display()),
        format!("--remap-path-prefix={}=/cargo", home.display()),
    ];
    // What it was linked from is in it: `cargo audit bin`, trivy and syft read that.
    subcommand("auditable", "0.7.7")?;
    let build = ["auditable", "build", "--release", "--locked", "--package", "rebalancer"];
    let mut command = crate::run::cargo(build);
    command
        .args(["--bin", "rebalancer", "--target", &triple])
        .env("CARGO_TARGET_DIR", &directory)
        .env("RUSTFLAGS", flags.join(" "))
        // C's own file names are in what it says of failed checks.
        .env(
            "CFLAGS",
            format!(
                "-ffile-prefix-map={}=/cargo -ffile-prefix-map={}=/src",
                home.display(),
                root().display()
            ),
        )
        .env("REBALANCER_COMMIT", commit())
        .env("REBALANCER_EBPF_OBJECTS", std::path::absolute(objects)?);
    standard.prepare(&mut command, arch);
    run(&mut command)?;
    let program = directory.join(triple).join("release/rebalancer");
    let octets = fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
    ensure!(
        octets.windows(AUDITED.len()).any(|octets| octets == AUDITED),
        "{} does not say what it was linked from",
        program.display()
    );
    Ok(program)
}

/// Makes the image.
pub fn image(arguments: &ImageArguments) -> anyhow::Result<ExitCode> {
    let arch = arguments.made.arch.unwrap_or_else(Arch::host);
    make_image(arch, arguments.check)?;
    Ok(ExitCode::SUCCESS)
}

/// Makes the image for a processor, an archive that `ctr images import`, `podman load` and `docker load` take; looks at
/// it when it is to be checked.
///
/// # Errors
///
/// It does not build, or is not what it should be.
pub fn make_image(arch: Arch, is_checked: bool) -> anyhow::Result<PathBuf> {
    let program = program(arch)?;
    let context = emptied("image")?;
    put(&program, &context.join("rebalancer"), 0o755)?;
    put(
        &root().join("deploy/Containerfile"),
        &context.join("Containerfile"),
        0o644,
    )?;
    let archive = target().join(format!("dist/rebalancer-{VERSION}-{}.image.tar", arch.debian()));
    let image = container::Image {
        // In full: a name that is not gets a second one in the archive, which nobody would take away.
        name: format!("docker.io/library/rebalancer:{VERSION}"),
        version: VERSION.to_owned(),
        commit: commit(),
        arch,
        context,
    };
    image.archive(&archive)?;
    bill_of_materials(arch)?;
    said(&archive)?;
    if is_checked {
        image.check(&archive)?;
    }
    Ok(archive)
}

/// Writes the list of what is in the program, beside it.
fn bill_of_materials(arch: Arch) -> anyhow::Result<ExitCode> {
    let path = target().join(format!("dist/rebalancer-{VERSION}-{}.cdx.json", arch.debian()));
    let list = sbom(&arch.triple(), VERSION, &commit())?;
    fs::write(&path, serde_json::to_string_pretty(&list)? + "\n")
        .with_context(|| format!("cannot write {}", path.display()))?;
    said(&path)
}

/// Makes everything that a release has, and one file of all checksums.
pub fn release(arguments: &ReleaseArguments) -> anyhow::Result<ExitCode> {
    debug_assert!(arguments.dry_run, "clap asks for it");
    let made = Arguments {
        arch: arguments.made.arch,
    };
    oldest_compiler()?;
    licenses()?;
    package(&made)?;
    image(&ImageArguments { made, check: false })?;
    let dist = target().join("dist");
    // The chart has the rules and the dashboard themselves, not links to them.
    packed(
        &root().join("deploy/helm"),
        "rebalancer",
        &dist.join(format!("rebalancer-chart-{VERSION}.tgz")),
        &["--dereference"],
    )?;
    packed(
        &root().join("deploy"),
        "mixin",
        &dist.join(format!("rebalancer-mixin-{VERSION}.tgz")),
        &[],
    )?;
    let mut names: Vec<String> = fs::read_dir(&dist)?
        .flatten()
        .filter(|entry| entry.path().is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains(VERSION))
        .collect();
    names.sort();
    let output = Command::new("sha256sum").current_dir(&dist).args(&names).output()?;
    ensure!(output.status.success(), "the checksums cannot be made");
    fs::write(dist.join("SHA256SUMS"), &output.stdout)?;
    print!("{}", String::from_utf8_lossy(&output.stdout));
    println!(
        "{} files of {VERSION} ({}) in {}; nothing was published",
        names.len(),
        commit(),
        dist.display()
    );
    Ok(ExitCode::SUCCESS)
}

/// Has the oldest compiler that `rust-version` promises take everything: the one at hand, or rustup's of that version.
fn oldest_compiler() -> anyhow::Result<()> {
    let manifest = fs::read_to_string(root().join("Cargo.toml"))?;
    let oldest = manifest
        .lines()
        .find_map(|line| line.strip_prefix("rust-version = \"")?.strip_suffix('"'))
        .context("Cargo.toml has no rust-version")?;
    let said = Command::new("rustc").arg("--version").output()?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    if said.starts_with(&format!("rustc {oldest}.")) {
        println!("built with the oldest compiler that is promised, {}", said.trim());
        return Ok(());
    }
    println!("{}: what is promised is {oldest}, so that one checks it", said.trim());
    run(Command::new("rustup")
        .current_dir(root())
        .args(["run", "--install", oldest, "cargo", "check", "--workspace", "--locked"])
        .env("CARGO_TARGET_DIR", target().join("oldest-compiler")))
}

/// Has Cargo have a subcommand; one that is there is taken, of whatever version.
fn subcommand(name: &str, version: &str) -> anyhow::Result<()> {
    let is_there = Command::new("cargo").args([name, "--version"]).output();
    if is_there.is_ok_and(|output| output.status.success()) {
        return Ok(());
    }
    eprintln!("cargo-{name} {version} is compiled once, for this user");
    run(Command::new("cargo").args(["install", "--locked", &format!("cargo-{name}@{version}")]))
}

/// Has cargo-deny judge licences, sources and duplicates by deny.toml.
fn licenses() -> anyhow::Result<()> {
    subcommand("deny", "0.20.2")?;
    for manifest in ["Cargo.toml", "rebalancer-ebpf/Cargo.toml"] {
        run(crate::run::cargo([
            "deny",
            "--locked",
            "--log-level",
            "error",
            "--manifest-path",
            manifest,
            "--config",
        ])
        .arg(root().join("deny.toml"))
        .args(["check", "bans", "licenses", "sources"]))?;
    }
    Ok(())
}

/// Packs a directory, the same octets each time.
fn packed(parent: &Path, name: &str, archive: &Path, more: &[&str]) -> anyhow::Result<()> {
    run(Command::new("tar")
        .args(["--create", "--use-compress-program=gzip -n", "--sort=name"])
        .args(["--owner=0", "--group=0", "--numeric-owner", "--mode=go=rX,u+rw,a-s"])
        .arg(format!("--mtime=@{EPOCH}"))
        .args(more)
        .arg("--directory")
        .arg(parent)
        .arg("--file")
        .arg(archive)
        .arg(name))
}

/// Makes a tarball and a Debian package: program, units, manual, completions.
pub fn package(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let arch = arguments.arch.unwrap_or_else(Arch::host);
    let built = program(arch)?;
    // What writes units and pages must run here.
    let here = if arch.is_host() {
        built.clone()
    } else {
        program(Arch::host())?
    };
    let tree = emptied("package")?;
    for directory in TREE {
        fs::create_dir_all(tree.join(directory))?;
    }
    put(&built, &tree.join("usr/bin/rebalancer"), 0o755)?;
    run(Command::new(&here)
        .args(["manifest", "systemd", "--topology", "none", "--directory"])
        .arg(tree.join("lib/systemd/system")))?;
    run(Command::new(&here)
        .args(["man", "--directory"])
        .arg(tree.join("usr/share/man/man1")))?;
    for (shell, file) in COMPLETIONS {
        let output = Command::new(&here).args(["completions", shell]).output()?;
        ensure!(output.status.success(), "the completions of {shell} cannot be written");
        fs::write(tree.join(file), output.stdout)?;
    }
    for license in ["LICENSE-APACHE", "LICENSE-MIT", "CHANGELOG.md", "README.md"] {
        put(
            &root().join(license),
            &tree.join("usr/share/doc/rebalancer").join(license),
            0o644,
        )?;
    }
    for example in ["agent.env", "relay.env"] {
        put(
            &root().join("deploy").join(example),
            &tree.join("etc/rebalancer").join(example),
            0o600,
        )?;
    }
    let archive = target().join(format!("dist/rebalancer-{VERSION}-{}.tar.gz", arch.debian()));
    packed(&tree, ".", &archive, &[])?;
    said(&archive)?;
    fs::create_dir_all(tree.join("DEBIAN"))?;
    fs::write(tree.join("DEBIAN/control"), control(arch))?;
    // Settings that somebody has made stay over an upgrade.
    fs::write(
        tree.join("DEBIAN/conffiles"),
        "/etc/rebalancer/agent.env\n/etc/rebalancer/relay.env\n",
    )?;
    let package = target().join(format!("dist/rebalancer_{VERSION}_{}.deb", arch.debian()));
    run(Command::new("dpkg-deb")
        .args(["--root-owner-group", "--build"])
        .arg(&tree)
        .arg(&package)
        .env("SOURCE_DATE_EPOCH", EPOCH))?;
    said(&package)
}

const TREE: [&str; 8] = [
    "usr/bin",
    "lib/systemd/system",
    "usr/share/man/man1",
    "usr/share/doc/rebalancer",
    "usr/share/bash-completion/completions",
    "usr/share/zsh/vendor-completions",
    "usr/share/fish/vendor_completions.d",
    "etc/rebalancer",
];

const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "usr/share/bash-completion/completions/rebalancer"),
    ("zsh", "usr/share/zsh/vendor-completions/_rebalancer"),
    ("fish", "usr/share/fish/vendor_completions.d/rebalancer.fish"),
];

/// Debian's description of the package (deb-control(5)); nothing is needed beside the kernel.
fn control(arch: Arch) -> String {
    format!(
        "\
Package: rebalancer
Version: {VERSION}
Architecture: {}
Section: admin
Priority: optional
Maintainer: The rebalancer authors <rebalancer@localhost>
Description: levels the load of kube-apiservers behind a layer-4 load balancer
 An agent on each control-plane node counts live HTTP/2 client connections,
 compares with its peers, and has a relay or a uprobe send GOAWAY to just the
 connections that must move. Nothing starts by itself: see
 /usr/share/doc/rebalancer.
",
        arch.debian()
    )
}

/// An empty directory in `target/dist`.
fn emptied(name: &str) -> anyhow::Result<PathBuf> {
    let directory = target().join("dist").join(name);
    if directory.exists() {
        fs::remove_dir_all(&directory).with_context(|| format!("cannot empty {}", directory.display()))?;
    }
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory)
}

fn put(from: &Path, to: &Path, mode: u32) -> anyhow::Result<()> {
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

/// Says what was made, with the checksum that others compare.
fn said(path: &Path) -> anyhow::Result<ExitCode> {
    run(Command::new("sha256sum").arg(path))?;
    Ok(ExitCode::SUCCESS)
}
