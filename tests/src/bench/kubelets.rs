//! The light kubelets (tests/go/cmd/kubelets): the lines they say, and what they are told.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    path::Path,
    process::{ChildStdin, Command},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use serde::Deserialize;

use crate::{
    netns::Namespace,
    process::{Process, wait_for},
};

/// Counters of a group, since the start.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Counters {
    /// Kubelets all of whose watches are open.
    pub ready: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Watches that ended by an error.
    pub broken: u64,
    /// Watches that ended as if all had been said, but before their time.
    pub early: u64,
    /// Connections that were opened.
    pub dials: u64,
    /// Connections that are open.
    pub open: u64,
}

/// Times of a group's requests since they were last forgotten, in milliseconds.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Times {
    /// Requests.
    pub count: u64,
    /// The mean.
    pub average: f64,
    /// The median.
    pub p50: f64,
    /// What 90 of 100 took at most.
    pub p90: f64,
    /// 95 of 100.
    pub p95: f64,
    /// 99 of 100.
    pub p99: f64,
    /// The longest.
    pub max: f64,
    /// Requests that took more than a second.
    pub stalls: u64,
    /// Requests that opened their connection.
    pub fresh: u64,
    /// Requests that failed; they count with the time they took.
    pub errors: u64,
    /// Watches that were not begun.
    pub watch_errors: u64,
    /// Some of what they said.
    pub error_texts: Option<Vec<String>>,
}

/// Times of a group's requests, in two parts.
#[derive(Clone, Debug, Default)]
pub struct Parts {
    /// Since they were last forgotten.
    pub whole: Times,
    /// Of those that began after [`Kubelets::mark`]; nothing without one.
    pub after: Times,
}

/// What they have said.
#[derive(Debug, Default)]
struct Said {
    counters: BTreeMap<String, Counters>,
    times: Option<BTreeMap<String, Parts>>,
}

/// One line.
#[derive(Deserialize)]
struct Line {
    counters: Option<BTreeMap<String, Counters>>,
    times: Option<BTreeMap<String, Times>>,
    #[serde(default)]
    times_after: BTreeMap<String, Times>,
}

/// How often they report their status, where nothing else is said (kubelet's nodeStatusReportFrequency).
pub const STATUS: Duration = Duration::from_secs(300);

/// Running kubelets.
#[derive(Debug)]
pub struct Kubelets {
    process: Process,
    stdin: ChildStdin,
    said: Arc<Mutex<Said>>,
}

/// Kubelets that go to one address.
#[derive(Debug)]
pub struct Group<'a> {
    /// What its figures go by.
    pub name: &'a str,
    /// Where they go.
    pub server: SocketAddr,
    /// How many they are.
    pub count: usize,
}

impl Kubelets {
    /// Starts them; all have come after `ramp`, and report their status every `status`.
    ///
    /// # Errors
    ///
    /// They cannot be started.
    pub fn start(
        program: &Path,
        groups: &[Group<'_>],
        pki: &Path,
        ramp: Duration,
        status: Duration,
        namespace: &Namespace,
        logs: &Path,
    ) -> anyhow::Result<Self> {
        let mut command = Command::new(program);
        command
            .arg(format!("--pki={}", pki.display()))
            .arg(format!("--ramp={}ms", ramp.as_millis()))
            .arg(format!("--status={}ms", status.as_millis()));
        for Group { name, server, count } in groups {
            command.arg(format!("--group={name}={server}={count}"));
        }
        let (process, stdin, stdout) = Process::piped("kubelets", command, Some(namespace.fd()), logs)?;
        let said = Arc::new(Mutex::new(Said::default()));
        let newest = Arc::clone(&said);
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let Ok(mut line) = serde_json::from_str::<Line>(&line) else {
                    continue;
                };
                let mut said = newest.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(counters) = line.counters {
                    said.counters = counters;
                }
                if let Some(times) = line.times {
                    let with_after = |(name, whole)| {
                        let after = line.times_after.remove(&name).unwrap_or_default();
                        (name, Parts { whole, after })
                    };
                    said.times = Some(times.into_iter().map(with_after).collect());
                }
            }
        });
        Ok(Self { process, stdin, said })
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest counters.
    ///
    /// # Errors
    ///
    /// They have ended.
    pub fn counters(&mut self) -> anyhow::Result<BTreeMap<String, Counters>> {
        self.process.is_running()?;
        Ok(self.said().counters.clone())
    }

    /// From now on times are kept.
    ///
    /// # Errors
    ///
    /// They do not read.
    pub fn measure(&mut self) -> anyhow::Result<()> {
        writeln!(self.stdin, "measure").context("the kubelets do not read")
    }

    /// Requests that begin from now on are also counted apart.
    ///
    /// # Errors
    ///
    /// They do not read.
    pub fn mark(&mut self) -> anyhow::Result<()> {
        writeln!(self.stdin, "mark").context("the kubelets do not read")
    }

    /// Times since [`Self::measure`].
    ///
    /// # Errors
    ///
    /// They do not answer.
    pub fn times(&mut self) -> anyhow::Result<BTreeMap<String, Parts>> {
        self.said().times = None;
        writeln!(self.stdin, "figures").context("the kubelets do not read")?;
        wait_for(Duration::from_secs(30), || self.said().times.take()).context("the kubelets say no figures")
    }
}
