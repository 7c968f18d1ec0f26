//! What a group's VM carries besides its tests: programs, a disk, and which tests are not for a VM.
//!
//! Must never fail for a program that is missing: the tests that want it skip themselves, and say so.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use clap::ValueEnum as _;

use crate::{
    arch::Arch,
    debian::on_path,
    run::{root, run, target},
};

/// Where the guest looks for the apiserver and etcd, and for the small server with the apiserver's filter.
const PROGRAMS: [(&str, &str); 2] = [("kube-apiserver", "KUBE_APISERVER"), ("etcd", "ETCD")];

/// Their clients, which the guest is told of.
const CLIENTS: [&str; 2] = ["swarm", "kubelets"];

/// The group whose VM has a load balancer too, and no disk: live clusters, no tests.
pub const CLUSTER: &str = "cluster-in-vm";

/// How large the swap disk is.
const SWAP_OCTETS: u64 = 1 << 30;

/// What one VM gets.
#[derive(Default)]
pub struct Extras {
    /// Names in the guest and files here.
    pub files: Vec<(String, PathBuf)>,
    /// More arguments for qemu.
    pub machine: Vec<String>,
    /// Whether it has two processors and tells the time by counting: several apiservers are too much for one, whose clock
    /// is a device.
    pub is_large: bool,
    /// Arguments for the test binary.
    pub arguments: Vec<String>,
}

impl Extras {
    /// Those of a group.
    ///
    /// # Errors
    ///
    /// The disk cannot be made, or a program that should build does not.
    pub fn of(group: &str, arch: Arch) -> anyhow::Result<Self> {
        if !["steer", CLUSTER].contains(&group) {
            return Ok(Self::default());
        }
        let mut files = Vec::new();
        if let Some(server) = goaway_server(arch)? {
            files.push(("bin/goaway-server".to_owned(), server));
        }
        for (name, variable) in PROGRAMS {
            if let Some(found) = fixture(name, variable, arch) {
                files.push((format!("bin/{name}"), found));
            }
        }
        for name in CLIENTS {
            files.extend(built(name, arch).map(|found| (format!("bin/{name}"), found)));
        }
        if group == CLUSTER {
            files.extend(on_path("haproxy").map(|found| ("bin/haproxy".to_owned(), found)));
        }
        let mut machine = vec!["-m".to_owned(), "6000".to_owned()];
        if group != CLUSTER {
            machine.extend(swap()?);
        }
        Ok(Self {
            files,
            machine,
            is_large: group == CLUSTER,
            // These build Go programs, or are about this machine's kernel.
            arguments: vec!["--skip=here::".to_owned()],
        })
    }
}

/// A disk where pages that are to be paged out have a place to go to.
fn swap() -> anyhow::Result<[String; 4]> {
    let disk = target().join("vm/swap");
    fs::create_dir_all(target().join("vm"))?;
    let file = fs::File::create(&disk).with_context(|| format!("cannot make {}", disk.display()))?;
    file.set_len(SWAP_OCTETS)?;
    let drive = format!("file={},if=none,id=swap,format=raw,cache=unsafe", disk.display());
    Ok(["-drive", &drive, "-device", "nvme,drive=swap,serial=swap"].map(str::to_owned))
}

/// The small server on k8s.io/apiserver's filter, built from its Go modules; `None` without Go.
///
/// # Errors
///
/// It does not build.
pub fn goaway_server(arch: Arch) -> anyhow::Result<Option<PathBuf>> {
    if on_path("go").is_none() {
        eprintln!("there is no `go` on PATH: the tests that need a server with the apiserver's filter are skipped");
        return Ok(None);
    }
    let server = if arch.is_host() {
        target().join("go/goaway-server")
    } else {
        target().join(format!("go/goaway-server-{}", arch.debian()))
    };
    run(Command::new("go")
        .current_dir(root().join("tests/go"))
        .env("CGO_ENABLED", "0")
        .env("GOARCH", arch.debian())
        .args(["build", "-trimpath", "-ldflags", "-s -w", "-o"])
        .arg(&server)
        .arg("./cmd/goaway-server"))?;
    Ok(Some(server))
}

/// kube-apiserver and etcd, where both are at hand.
pub fn control_plane() -> Option<[PathBuf; 2]> {
    let [apiserver, etcd] = PROGRAMS.map(|(name, variable)| fixture(name, variable, Arch::host()));
    Some([apiserver?, etcd?])
}

/// A program of the real control plane: named, on PATH, or built before by the tests.
///
/// Another processor's are those that were named or built for it: `KUBE_APISERVER_ARM64`, `apiserver-VERSION-arm64`.
fn fixture(name: &str, variable: &str, arch: Arch) -> Option<PathBuf> {
    let is_host = arch.is_host();
    let named = if is_host {
        env::var_os(variable)
    } else {
        env::var_os(format!("{variable}_{}", arch.debian().to_uppercase()))
    };
    let named = named.map(PathBuf::from);
    named
        .or_else(|| on_path(name).filter(|_| is_host))
        .or_else(|| built(name, arch))
}

/// One that the tests have built.
fn built(name: &str, arch: Arch) -> Option<PathBuf> {
    let cache = env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))?;
    let directories = fs::read_dir(cache.join("rebalancer")).ok()?.flatten();
    directories
        .map(|entry| entry.path())
        .filter(|path| {
            // What was built for this machine has no processor in its name.
            let of = |arch: &Arch| path.to_string_lossy().ends_with(&format!("-{}", arch.debian()));
            if arch.is_host() {
                !Arch::value_variants().iter().any(of)
            } else {
                of(&arch)
            }
        })
        .map(|path| path.join(name))
        .filter(|path| path.is_file())
        .max()
}
