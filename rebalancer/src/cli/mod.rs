//! The command line: one subcommand a job; exit codes 0 done, 2 usage or configuration, 1 failure.

use std::{process::ExitCode, sync::LazyLock};

use clap::{
    Parser, Subcommand,
    error::{ContextKind, ContextValue, ErrorKind},
};

use rebalancer_core::unseen::is_unseen;

use crate::log::{self, Format};

mod advise;
mod agent;
mod client;
mod completions;
mod doctor;
mod flows;
mod follow;
mod man;
mod manifest;
mod relay;
mod show;
mod simulate;
mod system_info;
mod table;
pub mod top;
mod users;

/// Moves just the right kube-apiserver connections to where they belong.
#[derive(Debug, Parser)]
#[command(name = "rebalancer", version, long_version = LONG_VERSION.as_str(), about)]
struct Arguments {
    /// How the log of `agent` and `relay` is written
    #[arg(
        long,
        global = true,
        env = "REBALANCER_LOG_FORMAT",
        value_enum,
        default_value = "text",
        value_name = "FORMAT"
    )]
    log_format: Format,
    /// Log more: -v what is done, -vv each step; without it REBALANCER_LOG says what is logged
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

/// What `--version` says; `-V` says its first line.
static LONG_VERSION: LazyLock<String> = LazyLock::new(|| {
    format!(
        "{}\ncommit: {}\nfeatures: {}\nkernel programs: {}\nsnapshots between agents: version {}\nbuilt for: {}",
        env!("CARGO_PKG_VERSION"),
        option_env!("REBALANCER_COMMIT").unwrap_or("a work tree, no release"),
        if cfg!(feature = "kubernetes") {
            "kubernetes"
        } else {
            "none"
        },
        env!("REBALANCER_PROGRAMS"),
        crate::agent::wire::SNAPSHOT_VERSION,
        std::env::consts::ARCH,
    )
});

/// One job each.
#[derive(Debug, Subcommand)]
enum Command {
    Agent(Box<agent::Arguments>),
    Relay(Box<relay::Arguments>),
    #[command(flatten)]
    Ask(client::Question),
    Advise(advise::Arguments),
    /// Show what would happen, and what it costs: in virtual time, with the agent's own planner
    Simulate(simulate::Arguments),
    /// Show what this machine lets the agent do, each feature by really trying it
    SystemInfo(system_info::Arguments),
    Top(top::Arguments),
    Doctor(doctor::Arguments),
    Manifest(manifest::Arguments),
    /// Print the manual
    Man(man::Arguments),
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

impl Failure {
    /// Why something did not start. What the machine lacks it may have in a moment, such as an address, a port or memory:
    /// then the configuration may be right, and whoever starts it again does well.
    pub fn to_start(error: anyhow::Error) -> Self {
        let passes = |cause: &(dyn std::error::Error + 'static)| cause.downcast_ref().is_some_and(is_passing);
        if error.chain().any(passes) {
            Self::Job(error)
        } else {
            Self::Configuration(error)
        }
    }
}

/// Whether the machine may have tomorrow what it has not today.
fn is_passing(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EADDRINUSE
                | libc::EADDRNOTAVAIL
                | libc::EAGAIN
                | libc::EINTR
                | libc::EMFILE
                | libc::ENFILE
                | libc::ENOBUFS
                | libc::ENOMEM
                | libc::ENOSPC
        )
    )
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Job(error)
    }
}

/// Parses the command line, runs the command, and says on stderr why when it failed.
pub fn run() -> ExitCode {
    let ignored = ignore_service_variables();
    let Arguments {
        log_format,
        verbose,
        command,
    } = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return refuse(&error),
    };
    let with_log = || {
        log::start(log_format, verbose).map_err(Failure::Configuration)?;
        for variable in &ignored {
            tracing::warn!(
                "{variable} is ignored: Kubernetes sets it for a Service of that name, and it is no setting"
            );
        }
        Ok(())
    };
    let outcome = match command {
        Command::Agent(arguments) => with_log().and_then(|()| agent::run(*arguments)),
        Command::Relay(arguments) => with_log().and_then(|()| relay::run(*arguments)),
        Command::Ask(question) => runtime().and_then(|runtime| runtime.block_on(client::run(question))),
        Command::Advise(arguments) => runtime().and_then(|runtime| runtime.block_on(advise::run(arguments))),
        Command::Simulate(arguments) => simulate::run(&arguments),
        Command::SystemInfo(arguments) => system_info::run(&arguments),
        Command::Man(arguments) => man::run(&arguments),
        Command::Top(arguments) => top::run(&arguments),
        Command::Doctor(arguments) => match doctor::run(&arguments) {
            Ok(code) => return ExitCode::from(code),
            Err(failure) => Err(failure),
        },
        Command::Manifest(arguments) => manifest::run(&arguments),
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

/// Takes what Kubernetes sets for Services out of the environment, and names it: a Service `rebalancer-apiserver` makes
/// `REBALANCER_APISERVER_PORT=tcp://10.96.0.7:6443`, which is nobody's setting.
fn ignore_service_variables() -> Vec<String> {
    let ignored: Vec<_> = std::env::vars_os()
        .filter(|(name, value)| name.to_string_lossy().starts_with(PREFIX) && is_of_service(&value.to_string_lossy()))
        .map(|(name, _)| name)
        .collect();
    for name in &ignored {
        // SAFETY: this is the first thing the program does, and it has one thread: nobody reads the environment meanwhile.
        unsafe { std::env::remove_var(name) };
    }
    ignored
        .into_iter()
        .map(|name| name.to_string_lossy().into_owned())
        .collect()
}

/// Whether a variable's value is what Kubernetes says of a Service.
fn is_of_service(value: &str) -> bool {
    ["tcp://", "udp://", "sctp://"]
        .iter()
        .any(|scheme| value.starts_with(scheme))
}

/// What the names of all variables begin with.
const PREFIX: &str = "REBALANCER_";

/// Shows what is wrong with the command line; a value that came from the environment is told as one.
fn refuse(error: &clap::Error) -> ExitCode {
    // stderr, or stdout for help, may be closed.
    let _ = error.print();
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return ExitCode::SUCCESS;
    }
    if let Some(ContextValue::String(flag)) = error.get(ContextKind::InvalidArg) {
        let flag = flag.split(' ').next().unwrap_or_default();
        let variable = PREFIX.to_owned() + &flag.trim_start_matches('-').replace('-', "_").to_uppercase();
        let is_given = std::env::args().any(|given| given.split('=').next() == Some(flag));
        if !is_given && let Ok(value) = std::env::var(&variable) {
            eprintln!("the value comes from the environment: {variable}={value}");
        }
    }
    ExitCode::from(2)
}

/// The runtime of a service.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Job(anyhow::Error::new(error).context("cannot start the async runtime")))
}

/// An answer as JSON, a line at its end.
fn json(answer: &impl serde::Serialize) -> Result<String, Failure> {
    let text = serde_json::to_string_pretty(answer).map_err(anyhow::Error::from)?;
    Ok(escaped(&text) + "\n")
}

/// The same JSON, but what nobody sees and a terminal obeys is written as an escape: names in it are strangers' own.
fn escaped(json: &str) -> String {
    let mut plain = String::with_capacity(json.len());
    for c in json.chars() {
        // Outside of strings there is nothing of the kind but ends of lines, which are escaped inside.
        if c == '\n' || !is_unseen(c) {
            plain.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            plain.push_str(&format!("\\u{unit:04x}"));
        }
    }
    plain
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

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::reference;

    #[test]
    fn json_commands_no_terminal_and_says_the_same() {
        let answer = serde_json::json!({"user": "a\u{9b}2J\u{7f}\u{202e}\u{2066}\u{2028}\n\u{1b}\u{e0041}\u{feff}ü", "n": [1, {}]});
        let text = json(&answer).expect("JSON");
        assert!(text.chars().all(|c| c == '\n' || !is_unseen(c)), "{text:?}");
        assert!(
            text.contains("a\\u009b2J\\u007f\\u202e") && text.contains('ü'),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).expect("JSON"), answer);
    }

    #[test]
    fn the_page_of_commands_in_the_docs_is_what_the_program_takes() {
        let mut program = Arguments::command();
        program.build();
        let global: Vec<&str> = program
            .get_arguments()
            .filter(|one| one.is_global_set())
            .map(|one| one.get_id().as_str())
            .collect();
        // Said once, above.
        let of_all = |command: clap::Command| {
            command.mut_args(|argument| {
                let is_general = ["help", "version"].contains(&argument.get_id().as_str()) || argument.is_global_set();
                argument.hide(is_general)
            })
        };
        let names: Vec<String> = program.get_subcommands().map(|one| one.get_name().to_owned()).collect();
        let mut shown = program.clone();
        for name in names.iter().filter(|name| *name != "help") {
            shown = shown.mut_subcommand(name, of_all);
        }
        shown = shown.mut_subcommand("help", |command| command.hide(true));
        assert_eq!(global.len(), 2, "{global:?}");
        reference::check("docs/cli.md", "commands", &reference::commands(&shown));
    }
}
