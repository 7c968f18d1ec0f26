//! Everything a person does with the project.

mod arch;
mod bench;
mod chaos;
mod ci;
mod container;
mod debian;
mod demo;
mod ebpf;
mod fuzz;
mod release;
mod run;
mod sbom;
mod scratch;
mod standard;
mod test;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Everything a person does with the project", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The main job, end to end, in network namespaces of its own
    Demo(demo::Arguments),
    /// Run the tests, set-up included; the last line counts passed, failed and skipped
    Test(test::Arguments),
    /// Measure: processor time, latency and memory, beside what else there is
    Bench(bench::Arguments),
    /// Break things on live clusters, and see what clients notice
    Chaos(chaos::Arguments),
    /// Let a live cluster grow old among clients that come and go, and see what it holds and what they notice
    Soak(chaos::Arguments),
    /// Compile the kernel programs, and install what that needs into the target directory
    BuildEbpf {
        /// For this processor [default: this machine's]
        #[arg(long, value_enum)]
        arch: Option<arch::Arch>,
    },
    /// Give the parsers and the relay's state machine inputs that nobody thought of
    Fuzz(fuzz::Arguments),
    /// Make the container image: one static program, for `ctr images import` and `podman load`
    Image(release::ImageArguments),
    /// Make a tarball and a Debian package: program, systemd units, manual, completions
    Package(release::Arguments),
    /// Make everything that a release has, with checksums; nothing is published
    Release(release::ReleaseArguments),
    /// Formatting, lints, a short fuzz, then the tests: what CI runs
    Ci,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Demo(arguments) => demo::run_demo(&arguments),
        Command::Test(arguments) => test::run_tests(&arguments),
        Command::Bench(arguments) => bench::run_bench(&arguments),
        Command::Chaos(arguments) => chaos::run_chaos(&arguments),
        Command::Soak(arguments) => chaos::run_soak(&arguments),
        Command::BuildEbpf { arch } => ebpf::build(arch.unwrap_or_else(arch::Arch::host)).map(|_| ExitCode::SUCCESS),
        Command::Fuzz(arguments) => fuzz::run_fuzz(&arguments),
        Command::Image(arguments) => release::image(&arguments),
        Command::Package(arguments) => release::package(&arguments),
        Command::Release(arguments) => release::release(&arguments),
        Command::Ci => ci::run(),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
