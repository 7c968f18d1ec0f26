//! Many clients that list and watch as client-go does, and how they fare.
//!
//! Two programs speak the same lines: the client-go swarm (`tests/go/cmd/swarm`) against real apiservers, and
//! [`clients`] against the stand-in. [`Driver`] starts either and reads what it says.

pub mod clients;

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::fd::OwnedFd,
    path::Path,
    process::{ChildStdin, Command},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::process::{Process, wait_for};

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Latency {
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
    /// How many requests.
    pub count: u64,
}

/// One line of a swarm; counters count from the last reset.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Line {
    /// Reports and resets so far.
    pub mark: u64,
    /// Clients.
    pub clients: u64,
    /// Clients whose watch is open.
    pub ready: u64,
    /// Requests made.
    pub requests: u64,
    /// Small requests that took more than a second.
    pub stalls: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Some of their messages.
    pub error_texts: Option<Vec<String>>,
    /// LISTs after a client's first.
    pub relists: u64,
    /// Watches that ended in anything but a clean end.
    pub watch_breaks: u64,
    /// Watches resumed by resourceVersion.
    pub watch_resumes: u64,
    /// Watch events.
    pub events: u64,
    /// Events that never came.
    pub missed: u64,
    /// Events that came twice.
    pub doubled: u64,
    /// Connections opened.
    pub dials: u64,
    /// Of small requests.
    pub latency_ms: Latency,
    /// The local port of each client's newest connection, where that is known.
    pub ports: Option<Vec<u16>>,
}

/// A running swarm.
pub struct Driver {
    process: Process,
    stdin: ChildStdin,
    last: Arc<Mutex<Line>>,
}

impl Driver {
    /// Starts the program and follows its lines.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn start(name: &str, command: Command, namespace: Option<&Arc<OwnedFd>>, logs: &Path) -> anyhow::Result<Self> {
        let (process, stdin, stdout) = Process::piped(name, command, namespace, logs)?;
        let last = Arc::new(Mutex::new(Line::default()));
        let newest = Arc::clone(&last);
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Ok(line) = serde_json::from_str(&line) {
                    *newest.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = line;
                }
            }
        });
        Ok(Self { process, stdin, last })
    }

    /// The newest line.
    ///
    /// # Errors
    ///
    /// The swarm has ended.
    pub fn line(&mut self) -> anyhow::Result<Line> {
        self.process.is_running()?;
        Ok(self
            .last
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .clone())
    }

    /// How it is at this moment.
    ///
    /// # Errors
    ///
    /// The swarm does not answer.
    pub fn report(&mut self) -> anyhow::Result<Line> {
        self.command("report")
    }

    /// Sets all counters to zero, and waits until a line says so.
    ///
    /// # Errors
    ///
    /// The swarm does not answer.
    pub fn reset(&mut self) -> anyhow::Result<()> {
        self.command("reset").map(drop)
    }

    /// Says one, and answers the first line from then on.
    fn command(&mut self, command: &str) -> anyhow::Result<Line> {
        let mark = self.line()?.mark;
        writeln!(self.stdin, "{command}").context("the swarm does not read")?;
        wait_for(Duration::from_secs(20), || {
            self.line().ok().filter(|line| line.mark > mark)
        })
        .with_context(|| format!("the swarm does not hear `{command}`"))
    }
}
