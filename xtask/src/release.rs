//! `image` and `package`: what is installed, each made from one static program.
//!
//! Output: files in `target/dist`, the same octets each time from the same sources; what they are is said on stdout.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, ensure};

use crate::{
    arch::Arch,
    debian,
    run::{root, run, target},
    standard::Standard,
};

/// What both take.
#[derive(clap::Args)]
pub struct Arguments {
    /// For this processor [default: this machine's]
    #[arg(long, value_enum)]
    arch: Option<Arch>,
}

/// The version of everything here, from the workspace.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Seconds since 1970 that files in archives are dated: the same each time.
const EPOCH: &str = "0";

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
    let mut command = crate::run::cargo(["build", "--release", "--locked", "--package", "rebalancer"]);
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
        .env("REBALANCER_EBPF_OBJECTS", std::path::absolute(objects)?);
    standard.prepare(&mut command, arch);
    run(&mut command)?;
    Ok(directory.join(triple).join("release/rebalancer"))
}

/// Makes the image: an archive that `ctr images import`, `podman load` and `docker load` take.
pub fn image(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let arch = arguments.arch.unwrap_or_else(Arch::host);
    debian::install("buildah", "buildah")?;
    let program = program(arch)?;
    let context = emptied("image")?;
    put(&program, &context.join("rebalancer"), 0o755)?;
    put(
        &root().join("deploy/Containerfile"),
        &context.join("Containerfile"),
        0o644,
    )?;
    let name = format!("rebalancer:{VERSION}");
    let store = target().join("dist/store");
    let buildah = || {
        let mut command = Command::new("buildah");
        command
            .arg("--root")
            .arg(store.join("root"))
            .arg("--runroot")
            .arg(store.join("run"));
        command
    };
    run(buildah()
        .args(["bud", "--quiet", "--timestamp", EPOCH, "--arch", arch.debian()])
        .args(["--build-arg", &format!("VERSION={VERSION}")])
        .args(["--tag", &name])
        .arg(&context))?;
    let archive = target().join(format!("dist/rebalancer-{VERSION}-{}.image.tar", arch.debian()));
    // An archive is added to, and not written anew.
    let _ = fs::remove_file(&archive);
    run(buildah()
        .args(["push", "--quiet", &name])
        .arg(format!("docker-archive:{}:{name}", archive.display())))?;
    said(&archive)
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
    run(Command::new("tar")
        .args([
            "--create",
            // Without the time at which it was made.
            "--use-compress-program=gzip -n",
            "--sort=name",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
        ])
        .arg(format!("--mtime=@{EPOCH}"))
        .args([
            "--directory".as_ref(),
            tree.as_os_str(),
            "--file".as_ref(),
            archive.as_os_str(),
        ])
        .arg("."))?;
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
