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

use super::{Driver, LEVEL, Report, START, Scene};
use crate::{binary, process::wait_for};

/// How long an apiserver may take to end on SIGTERM before it is killed: a static pod's `terminationGracePeriodSeconds`.
const END: Duration = Duration::from_secs(30);

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
    /// Whether they were killed, as a machine that is reset does, and not ended by SIGTERM.
    pub kill: bool,
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
    /// Those of evacuations.
    pub goaways_of_evacuations: u64,
    /// Seconds from the last restart until the loads were level; absent when they were not in time.
    pub seconds_to_level: Option<f64>,
    /// The skew at the end.
    pub skew_after: f64,
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
        let how = match (self.evacuate, self.kill) {
            (true, false) => "evacuated and restarted",
            (true, true) => "evacuated, killed and started again",
            (false, false) => "restarted",
            (false, true) => "killed and started again",
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
            "  clients saw {} failed requests of {}, {} broken watches, {} relists, {} missed and {} doubled events; {} GOAWAYs, {} of them of evacuations",
            self.client_errors,
            self.requests,
            self.watch_breaks,
            self.relists,
            self.missed_events,
            self.doubled_events,
            self.goaways,
            self.goaways_of_evacuations
        )?;
        match self.seconds_to_level {
            Some(seconds) => write!(f, "; level {seconds:.0} s after the last restart"),
            None => write!(f, "; not level at the end: {:.0} %", self.skew_after * 100.0),
        }
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
                rolling.goaways_of_evacuations += self.evacuate(index, &mut swarm)?;
                rolling.evacuation_seconds.push(evacuating.elapsed().as_secs_f64());
            }
            rolling.connections_at_end.push(self.cluster.loads()?[index]);
            if rolling.kill {
                self.step(&format!("killing the apiserver of {name} (SIGKILL)"));
                self.cluster.kill_apiserver(index);
            } else {
                self.step(&format!("ending the apiserver of {name} (SIGTERM)"));
                self.cluster.end_apiserver(index, END);
            }
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
            // Between two restarts nobody waits for agents that wait for the next one.
            while !is_last && levelling.elapsed() < LEVELLING && !self.at_rest()? && !self.agents_wait()? {
                self.look(&mut swarm, Some(began), goaways)?;
            }
        }
        let levelling = Instant::now();
        while rolling.seconds_to_level.is_none() && levelling.elapsed() < self.limit {
            let loads = self.look(&mut swarm, Some(began), goaways)?;
            rolling.skew_after = Report::skew(&loads);
            if rolling.skew_after <= LEVEL && self.at_rest()? {
                rolling.seconds_to_level = Some(levelling.elapsed().as_secs_f64());
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

    /// Whether all agents see an upgrade and wait for its next step.
    fn agents_wait(&self) -> anyhow::Result<bool> {
        for node in &self.cluster.nodes {
            if node.status()?["hold"]["reason"] != "upgrade_in_progress" {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// As an ExecStop or a pre-stop hook does it; how many were told.
    fn evacuate(&mut self, index: usize, swarm: &mut Driver) -> anyhow::Result<u64> {
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
        })?;
        answer["evacuation"]["told"].as_u64().context("how many were told")
    }
}
