//! The scene of an upgrade: every apiserver is restarted, one after the other, as kubeadm and kOps do it.
//!
//! Output: what the clients saw of it, with `rebalancer evacuate` before each restart or without.

use std::{
    fmt,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use serde_json::Value;

use super::{Driver, Report, START, Scene};
use crate::{binary, process::wait_for};

/// How long an apiserver may take to end on SIGTERM: requests may run for a minute.
const END: Duration = Duration::from_secs(90);

/// In this time an evacuation tells all clients.
const OVER: &str = "15s";

/// How long the agents may take to make the loads level between two restarts: it is no part of the scene.
const LEVELLING: Duration = Duration::from_secs(60);

/// What the clients saw while every apiserver was restarted once.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Rolling {
    /// `real` or `standin`.
    pub apiserver: &'static str,
    /// Its version.
    pub apiserver_version: String,
    /// The load balancer, and the options of its servers.
    pub lb: String,
    /// How many apiservers.
    pub nodes: usize,
    /// How many clients.
    pub clients: usize,
    /// Whether each apiserver was evacuated before its restart.
    pub evacuate: bool,
    /// Connections of each apiserver when it was told to end.
    pub connections_at_end: Vec<u64>,
    /// Seconds that each evacuation took, watches handed over.
    pub evacuation_seconds: Vec<f64>,
    /// Requests that failed.
    pub client_errors: u64,
    /// Some of their messages.
    pub error_texts: Vec<String>,
    /// LISTs after a client's first.
    pub relists: u64,
    /// Watches that broke.
    pub watch_breaks: u64,
    /// Watch events that never came.
    pub missed_events: u64,
    /// Watch events that came twice.
    pub doubled_events: u64,
    /// Requests that were answered meanwhile.
    pub requests: u64,
    /// GOAWAYs, those of evacuations and of rebalancings.
    pub goaways: u64,
    /// For how long it was watched.
    pub seconds: f64,
}

impl Rolling {
    /// Whether no client noticed anything.
    pub fn is_unnoticed(&self) -> bool {
        self.client_errors + self.relists + self.watch_breaks + self.missed_events + self.doubled_events == 0
    }
}

impl fmt::Display for Rolling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.evacuate {
            "evacuated and restarted"
        } else {
            "restarted"
        };
        writeln!(
            f,
            "{} apiservers ({} {}) behind {} {how} one after the other in {:.0} s, under {} clients",
            self.nodes, self.apiserver, self.apiserver_version, self.lb, self.seconds, self.clients
        )?;
        writeln!(
            f,
            "  connections of each when it was told to end: {:?}",
            self.connections_at_end
        )?;
        if self.evacuate {
            writeln!(f, "  seconds of each evacuation: {:.0?}", self.evacuation_seconds)?;
        }
        write!(
            f,
            "  clients saw {} failed requests of {}, {} broken watches, {} relists, {} missed and {} doubled events; {} GOAWAYs",
            self.client_errors,
            self.requests,
            self.watch_breaks,
            self.relists,
            self.missed_events,
            self.doubled_events,
            self.goaways
        )
    }
}

impl Scene<'_> {
    /// Plays it.
    ///
    /// # Errors
    ///
    /// A process ended that should not, or something did not become ready.
    pub fn roll(&mut self, mut rolling: Rolling) -> anyhow::Result<Rolling> {
        let mut report = Report {
            clients: rolling.clients,
            ..Report::default()
        };
        let mut swarm = self.begin(&mut report)?;
        rolling.apiserver_version = report.apiserver_version;
        let (all, goaways) = (rolling.clients as u64, self.cluster.goaways()?);
        swarm.reset()?;
        let began = Instant::now();
        for index in 0..self.cluster.nodes.len() {
            let name = self.cluster.nodes[index].name.clone();
            if rolling.evacuate {
                self.step(&format!("rebalancer evacuate on {name}"));
                let evacuating = Instant::now();
                self.evacuate(index, &mut swarm)?;
                rolling.evacuation_seconds.push(evacuating.elapsed().as_secs_f64());
            }
            rolling.connections_at_end.push(self.cluster.loads()?[index]);
            self.step(&format!("ending the apiserver of {name} (SIGTERM)"));
            self.cluster.end_apiserver(index, END);
            self.wait(START, "the load balancer still sends to it", |cluster| {
                Ok(!cluster.admitted()[index])
            })?;
            self.step(&format!("starting the apiserver of {name} again"));
            self.cluster.restart_apiserver(index)?;
            self.wait(START, "the apiserver does not come back", |cluster| {
                Ok(cluster.is_ready(index) && cluster.admitted()[index])
            })?;
            self.wait_for_clients(&mut swarm, all)?;
            let is_last = index + 1 == self.cluster.nodes.len();
            let levelling = Instant::now();
            while !is_last && levelling.elapsed() < LEVELLING && !self.at_rest()? {
                self.look(&mut swarm, Some(began), goaways)?;
            }
        }
        self.settled(&mut swarm)?;
        let line = swarm.line()?;
        rolling.client_errors = line.errors;
        rolling.error_texts = line.error_texts.unwrap_or_default();
        rolling.relists = line.relists;
        rolling.watch_breaks = line.watch_breaks;
        rolling.missed_events = line.missed;
        rolling.doubled_events = line.doubled;
        rolling.requests = line.requests;
        rolling.goaways = self.cluster.goaways()?.saturating_sub(goaways);
        rolling.seconds = began.elapsed().as_secs_f64();
        Ok(rolling)
    }

    /// As an ExecStop or a pre-stop hook does it.
    fn evacuate(&mut self, index: usize, swarm: &mut Driver) -> anyhow::Result<()> {
        let mut command = Command::new(binary());
        command
            .args(["evacuate", "--wait", "--over", OVER, "--output=json"])
            .arg(format!("--api=unix:{}", self.cluster.nodes[index].api().display()))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().context("the product runs")?;
        let ended = loop {
            if let Some(ended) = child.try_wait()? {
                break ended;
            }
            self.look(swarm, None, 0)?;
        };
        let output = child.wait_with_output()?;
        ensure!(
            ended.success(),
            "the evacuation failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let answer: Value = serde_json::from_slice(&output.stdout).context("what it answered")?;
        ensure!(answer["evacuation"]["state"] == "evacuated", "it said {answer}");
        // The load balancer hears of a closed connection a moment later.
        let gone = wait_for(START, || (self.cluster.sockets()[index] == 0).then_some(()));
        gone.with_context(|| {
            format!(
                "{} sockets are left at the load balancer",
                self.cluster.sockets()[index]
            )
        })
    }
}
