//! `soak`: for how long, and where page and picture go.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use clap::Args;

use super::{Soak, picture, report::Report};
use crate::{
    chaos::{Make, Pair, Side, limits},
    fixture::Fixture,
    node::Shim,
    process::{log_directory, open_files},
};

/// What it takes.
#[derive(Args)]
pub struct Arguments {
    /// For how many hours
    #[arg(long, default_value_t = 6.0)]
    hours: f64,
    /// Clients of the cluster
    #[arg(long, default_value_t = 150, value_parser = clap::value_parser!(u16).range(30..=2000))]
    clients: u16,
    /// So many seconds nothing happens before something does
    #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u16).range(10..=3600))]
    pause: u16,
    /// What happens when is drawn by this
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
    /// Where the page goes
    #[arg(long)]
    page: Option<PathBuf>,
    /// Where the picture goes
    #[arg(long)]
    picture: Option<PathBuf>,
}

/// Runs it.
///
/// # Errors
///
/// The cluster does not start, or does not come back from something.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    ensure!(
        (0.05..=1_000.0).contains(&arguments.hours),
        "--hours {}: allowed are 0.05 to 1000",
        arguments.hours
    );
    limits::own_mounts()?;
    let interrupts = crate::demo::interrupts()?;
    open_files().context("cannot ask how many files may be open")?;
    let say = |line: &str| eprintln!("{line}");
    let fixture = Fixture::get(say)?;
    let directory = log_directory("rebalancer-soak-")?;
    let clients = usize::from(arguments.clients);
    let side = Side::start(
        Make {
            fixture: Some(&fixture),
            clients,
            shim: Shim::Relay,
            lb_options: "inter 1s fall 2 rise 2",
            agent_flags: vec!["--client-cooldown=30s".to_owned()],
            relay_flags: vec!["--watch-handover=5s".to_owned()],
            client_flags: vec!["--life=5m".to_owned(), "--short=2".to_owned()],
            directory: directory.clone(),
        },
        &say,
    )
    .with_context(|| format!("logs: {}", directory.display()))?;
    let report = Report {
        clients,
        seed: arguments.seed,
        apiserver_version: side.cluster.version(),
        ..Report::default()
    };
    let mut soak = Soak {
        pair: Pair::new(side, None),
        began: Instant::now(),
        report,
        say: &say,
    };
    let lasts = Duration::from_secs_f64(arguments.hours * 3_600.0);
    let ran = soak.run(lasts, Duration::from_secs(arguments.pause.into()), arguments.seed);
    soak.pair.end();
    drop(interrupts);
    let mut report = soak.report;
    report.finish();
    if let Some(page) = &arguments.page {
        std::fs::write(page, report.page()).with_context(|| format!("cannot write {}", page.display()))?;
    }
    if let Some(picture) = &arguments.picture {
        std::fs::write(picture, picture::draw(&report))
            .with_context(|| format!("cannot write {}", picture.display()))?;
    }
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    }
    ran.with_context(|| format!("logs: {}", directory.display()))?;
    for grown in &report.grown {
        eprintln!("{grown}");
    }
    for text in &report.error_texts {
        eprintln!("a client saw: {text}");
    }
    if report.is_clean() {
        // Logs are worth keeping only when something went wrong.
        let _ = std::fs::remove_dir_all(&directory);
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("logs: {}", directory.display());
    Ok(ExitCode::FAILURE)
}
