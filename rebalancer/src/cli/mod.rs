//! The command line: one subcommand a job; exit codes 0 done, 2 usage or configuration, 1 failure.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod agent;
mod client;
mod completions;
mod relay;
mod simulate;
mod system_info;
mod table;

/// Moves just the right kube-apiserver connections to where they belong.
#[derive(Debug, Parser)]
#[command(name = "rebalancer", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// One job each.
#[derive(Debug, Subcommand)]
enum Command {
    Agent(Box<agent::Arguments>),
    Relay(Box<relay::Arguments>),
    #[command(flatten)]
    Ask(client::Question),
    /// Show what would happen, and what it costs: in virtual time, with the agent's own planner
    Simulate(simulate::Arguments),
    /// Show what this machine lets the agent do, each feature by really trying it
    SystemInfo(system_info::Arguments),
    /// Print a shell's completion script.
    Completions(completions::Arguments),
}

/// How a command ended when it did not do its job.
#[derive(Debug)]
pub enum Failure {
    /// Usage or configuration is wrong: the operator can mend it. Exit code 2.
    Configuration(anyhow::Error),
    /// The job could not be done. Exit code 1.
    Job(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Job(error)
    }
}

/// Parses the command line, runs the command, and says on stderr why when it failed.
pub fn run() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Agent(arguments) => logged(|| agent::run(*arguments)),
        Command::Relay(arguments) => logged(|| relay::run(*arguments)),
        Command::Ask(question) => runtime().and_then(|runtime| runtime.block_on(client::run(question))),
        Command::Simulate(arguments) => simulate::run(&arguments),
        Command::SystemInfo(arguments) => system_info::run(&arguments),
        Command::Completions(arguments) => completions::run(&arguments),
    };
    let (error, code) = match outcome {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Configuration(error)) => (error, 2),
        Err(Failure::Job(error)) => (error, 1),
    };
    eprintln!("rebalancer: {error:#}");
    ExitCode::from(code)
}

/// Runs a service: with a log.
fn logged(job: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    crate::log::start().map_err(Failure::Configuration)?;
    job()
}

/// The runtime of a service.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Job(anyhow::Error::new(error).context("cannot start the async runtime")))
}

/// Writes an answer to stdout; a reader that has gone away (`| head`) is no failure.
fn print(text: &str) -> Result<(), Failure> {
    use std::io::Write as _;
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("cannot write to stdout").into())
        }
        _ => Ok(()),
    }
}
