//! The process's log: lines on stderr, as text or JSON, level from `-v` or `REBALANCER_LOG`.

use std::io::{self, IsTerminal as _};

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// The variable that says what is logged, as tracing-subscriber's directives: `debug`, `rebalancer::relay=trace`.
pub const LEVEL: &str = "REBALANCER_LOG";

/// How a line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    #[default]
    Text,
    /// One JSON object a line
    Json,
}

/// Starts the log; bad directives in [`LEVEL`] are an error that names them.
///
/// # Errors
///
/// The variable cannot be parsed.
pub fn start(format: Format, verbose: u8) -> anyhow::Result<()> {
    let filter = match (verbose, std::env::var(LEVEL)) {
        (0, Ok(text)) => EnvFilter::try_new(&text).map_err(|error| anyhow::anyhow!("{LEVEL}={text}: {error}"))?,
        // The kernel programs have a level of their own (`--kernel-log`). What the Kubernetes client says of a request that
        // failed is said by this program, with what to do.
        (0, Err(_)) => EnvFilter::new("info,kube_client=off,rebalancer_ebpf=trace"),
        // The libraries' own debug lines would bury this program's.
        (1, _) => EnvFilter::new("info,kube_client=off,rebalancer=debug,rebalancer_ebpf=trace"),
        (_, _) => EnvFilter::new("debug,rebalancer=trace,rebalancer_ebpf=trace"),
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_target(false);
    match format {
        Format::Text => builder.with_ansi(io::stderr().is_terminal()).init(),
        Format::Json => builder.json().flatten_event(true).init(),
    }
    Ok(())
}
