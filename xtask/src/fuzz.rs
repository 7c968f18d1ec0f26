//! `fuzz`: builds the fuzz targets with libFuzzer and coverage, which stable Rust can, and runs them.

use std::{
    fs,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, bail};
use clap::ValueEnum as _;

use crate::run::{root, run, target};

/// What rustc is told so that libFuzzer sees which paths an input takes: as cargo-fuzz does, without a sanitizer, since
/// what is fuzzed forbids unsafe code.
const INSTRUMENTED: [&str; 7] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
];

/// How many inputs a smoke run tries for each target, whatever the machine's speed; from the same seed every time.
const SMOKE_RUNS: u32 = 100_000;

/// The longest input.
const LONGEST: u32 = 4096;

/// Seconds that one input may take, on a machine that is busy: more is an endless walk.
const SLOWEST: u32 = 60;

#[derive(clap::Args)]
pub struct Arguments {
    /// Only these targets [default: all]
    #[arg(value_enum)]
    targets: Vec<Target>,
    /// A fixed number of inputs from a fixed seed, for CI
    #[arg(long, conflicts_with = "seconds")]
    smoke: bool,
    /// How long each target is fuzzed
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    seconds: u32,
}

impl Arguments {
    /// What CI runs.
    pub fn smoke() -> Self {
        Self {
            targets: Vec::new(),
            smoke: true,
            seconds: 0,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Target {
    /// Both sides of a relayed connection
    Relay,
    /// Header blocks
    Hpack,
    /// ClientHellos, whole and in pieces
    ClientHello,
    /// PROXY protocol headers
    ProxyProtocol,
    /// Go programs, as the probe's place is looked for in them
    Golang,
    /// The kernel's type information
    Btf,
    /// Heads of HTTP/1.1 requests
    Http1,
    /// Certificates and chains of them
    X509,
    /// The kernel's answers about sockets
    Netlink,
    /// The relay's flag for more certificates
    Sni,
    /// What agents tell each other
    Snapshot,
}

impl Target {
    fn name(self) -> String {
        self.to_possible_value()
            .expect("no target is hidden")
            .get_name()
            .to_owned()
    }
}

/// Runs what was asked for; an input that breaks a rule is kept, and how to run it again is said.
pub fn run_fuzz(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let built = target().join("fuzz");
    eprintln!("libFuzzer is built from its source once: that needs a C++ compiler");
    run(Command::new("cargo")
        .current_dir(root().join("fuzz"))
        .env("RUSTFLAGS", INSTRUMENTED.join(" "))
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("CARGO_TARGET_DIR", &built)
        // A triple keeps build scripts free of instrumentation.
        .args(["build", "--release", "--locked", "--target", &triple]))?;
    let targets = if arguments.targets.is_empty() {
        Target::value_variants().to_vec()
    } else {
        arguments.targets.clone()
    };
    let mut broken = Vec::new();
    for fuzzed in targets {
        let name = fuzzed.name();
        let found = built.join("found").join(&name);
        // What is found on the way goes to the first directory of inputs: never to the seeds.
        let inputs = built.join(if arguments.smoke { "smoke" } else { "inputs" }).join(&name);
        if arguments.smoke && inputs.exists() {
            fs::remove_dir_all(&inputs).with_context(|| format!("cannot empty {}", inputs.display()))?;
        }
        for directory in [&found, &inputs] {
            fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
        }
        let mut command = Command::new(built.join(&triple).join("release").join(&name));
        command
            .arg(format!("-artifact_prefix={}/", found.display()))
            .arg(format!("-max_len={LONGEST}"))
            .arg(format!("-timeout={SLOWEST}"))
            .arg("-print_final_stats=1")
            .arg("-verbosity=1");
        if arguments.smoke {
            command.arg(format!("-runs={SMOKE_RUNS}")).arg("-seed=1");
        } else {
            command.arg(format!("-max_total_time={}", arguments.seconds));
        }
        command.arg(&inputs).arg(root().join("fuzz/seeds").join(&name));
        eprintln!("fuzzing {name}");
        let output = command
            .output()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let said = String::from_utf8_lossy(&output.stderr);
        let figure = |name: &str| {
            said.lines()
                .rev()
                .find_map(|line| line.strip_prefix(name)?.split(' ').next_back())
        };
        if !output.status.success() {
            eprintln!("{said}");
            eprintln!(
                "{name}: an input breaks a rule ({}); again: {} {}/FILE",
                output.status,
                command.get_program().display(),
                found.display()
            );
            broken.push(name);
            continue;
        }
        let covered = said.lines().rev().find_map(|line| {
            let (_, after) = line.split_once("cov: ")?;
            after.split(' ').next()
        });
        println!(
            "{name}: {} inputs, {} places of the code reached, no rule broken",
            figure("stat::number_of_executed_units:").unwrap_or("?"),
            covered.unwrap_or("?")
        );
    }
    if !broken.is_empty() {
        bail!("an input breaks a rule in: {}", broken.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}
