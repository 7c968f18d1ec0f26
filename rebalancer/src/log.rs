//! The process's log: lines on stderr, level from `REBALANCER_LOG`.

use std::io::{self, IsTerminal as _};

use tracing_subscriber::EnvFilter;

/// The variable that says what is logged, as tracing-subscriber's directives: `debug`, `rebalancer::relay=trace`.
pub const LEVEL: &str = "REBALANCER_LOG";

/// Starts the log; bad directives in [`LEVEL`] are an error that names them.
///
/// # Errors
///
/// The variable cannot be parsed.
pub fn start() -> anyhow::Result<()> {
    let filter = match std::env::var(LEVEL) {
        Ok(text) => EnvFilter::try_new(&text).map_err(|error| anyhow::anyhow!("{LEVEL}={text}: {error}"))?,
        // The kernel programs have a level of their own (`--kernel-log`).
        Err(_) => EnvFilter::new("info,rebalancer_ebpf=trace"),
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal());
    builder.init();
    Ok(())
}
