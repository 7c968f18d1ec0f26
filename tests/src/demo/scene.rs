//! What happens in the demo, in order, and what is measured.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use serde_json::Value;

use super::{
    cluster::{Cluster, START},
    report::{LatencyMs, Report},
};
use crate::{balancer::Policy, process::wait_for, swarm::Driver};

mod rolling;

pub use rolling::Rolling;

/// The load counts as level within this distance from the mean.
pub const LEVEL: f64 = 0.10;

/// How often the scene is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What the audience hears.
pub enum Event<'a> {
    /// A step begins.
    Step(&'a str),
    /// The state, once a second.
    State {
        /// Active connections per apiserver.
        loads: &'a [u64],
        /// Sockets per apiserver at the load balancer, draining ones included.
        sockets: &'a [usize],
        /// GOAWAYs since the restart.
        goaways: u64,
        /// Errors the clients saw since the restart.
        errors: u64,
        /// Since the restart.
        elapsed: Option<Duration>,
    },
    /// An agent decided.
    Decision(&'a Value),
}

/// Set by Ctrl-C: the scene ends at its next look.
pub static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// # Errors
///
/// Somebody wants it to end.
pub fn check_interrupt() -> anyhow::Result<()> {
    if INTERRUPTED.load(Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}

/// Plays the scene on a started cluster.
pub struct Scene<'a> {
    cluster: &'a mut Cluster,
    policy: Policy,
    limit: Duration,
    quiet: Duration,
    tell: &'a mut dyn FnMut(Event<'_>),
    seen: Vec<u64>,
    /// GOAWAYs that were sent before the restart.
    goaways_before: u64,
}

impl<'a> Scene<'a> {
    /// A scene that gives up when the load is not level `limit` after the restart.
    pub fn new(cluster: &'a mut Cluster, policy: Policy, limit: Duration, tell: &'a mut dyn FnMut(Event<'_>)) -> Self {
        let nodes = cluster.nodes.len();
        Self {
            cluster,
            policy,
            limit,
            quiet: Duration::from_secs(60),
            tell,
            seen: vec![0; nodes],
            goaways_before: 0,
        }
    }

    /// For how long nothing more may happen after the load is level; a minute unless this says otherwise.
    #[must_use]
    pub fn quiet(mut self, quiet: Duration) -> Self {
        self.quiet = quiet;
        self
    }

    /// Plays it to its end.
    ///
    /// # Errors
    ///
    /// A process ended that should not, or something did not become ready.
    pub fn play(&mut self, mut report: Report) -> anyhow::Result<Report> {
        let mut swarm = self.crash(&mut report)?;
        let ready = Instant::now();
        let goaways_before = self.goaways_before;
        self.step(&format!(
            "the load balancer has admitted it after {:.0} s",
            report.seconds_to_admission
        ));

        self.level(&mut swarm, &mut report, ready, goaways_before)?;
        report.goaways = self.cluster.goaways()? - goaways_before;
        report.after = self.cluster.loads()?;
        report.skew_after = Report::skew(&report.after);
        let line = swarm.line()?;
        report.client_errors = line.errors;
        report.relists = line.relists;
        report.watch_breaks = line.watch_breaks;
        report.missed_events = line.missed;
        report.doubled_events = line.doubled;
        report.latency_ms = LatencyMs {
            p50: line.latency_ms.p50,
            p90: line.latency_ms.p90,
            p99: line.latency_ms.p99,
        };
        for text in line.error_texts.unwrap_or_default() {
            self.step(&format!("a client saw: {text}"));
        }
        Ok(report)
    }

    /// The clients come, to a cluster that is ready.
    ///
    /// # Errors
    ///
    /// As for [`Self::play`].
    pub fn begin(&mut self, report: &mut Report) -> anyhow::Result<Driver> {
        let count = self.cluster.nodes.len();
        self.step("waiting for the apiservers");
        self.wait(START, "the apiservers are not ready", |cluster| {
            let all_ready = (0..count).all(|index| cluster.is_ready(index));
            Ok(all_ready && cluster.admitted().iter().all(|admitted| *admitted))
        })?;
        report.apiserver_version = self.cluster.version();
        self.wait(START, "the agents do not know their connections", |cluster| {
            let known = |status: anyhow::Result<Value>| {
                status.is_ok_and(|status| status["view"].as_array().is_some_and(|view| view.len() == count))
            };
            Ok(cluster.nodes.iter().all(|node| known(node.status())))
        })?;
        report.source = self.cluster.nodes[0].status()?["source"]
            .as_str()
            .unwrap_or("?")
            .to_owned();

        self.step(&format!("starting {} clients that list and watch", report.clients));
        let mut swarm = self.cluster.start_clients()?;
        let all = report.clients as u64;
        self.wait_for_clients(&mut swarm, all)?;
        report.before = self.settled(&mut swarm)?;
        Ok(swarm)
    }

    /// Its first half: the clients come, one apiserver is killed, and is back and empty.
    ///
    /// # Errors
    ///
    /// As for [`Self::play`].
    pub fn crash(&mut self, report: &mut Report) -> anyhow::Result<Driver> {
        let mut swarm = self.begin(report)?;
        let all = report.clients as u64;
        self.step(&format!("killing {} (SIGKILL)", self.cluster.nodes[0].name));
        self.cluster.kill_apiserver(0);
        self.wait(
            START,
            "the load balancer still sends to the dead apiserver",
            |cluster| Ok(!cluster.admitted()[0]),
        )?;
        self.wait_for_clients(&mut swarm, all)?;
        self.settled(&mut swarm)?;
        // It is gone for as long as a pod that has crashed. A cluster's clients have been there for hours: what the agents'
        // least age protects is who has just come.
        self.step("it stays away until the clients are no newcomers any more where they are");
        self.wait(START, "the clients' connections do not last", |cluster| {
            for node in &cluster.nodes[1..] {
                if !node.has_old_connections()? {
                    return Ok(false);
                }
            }
            Ok(true)
        })?;

        self.step(&format!("starting {} again", self.cluster.nodes[0].name));
        self.cluster.restart_apiserver(0)?;
        self.wait(START, "the apiserver does not come back", |cluster| {
            Ok(cluster.is_ready(0))
        })?;
        let ready = Instant::now();
        // Requests that its death broke may still be tried again: they count as part of the crash.
        self.wait_for_clients(&mut swarm, all)?;
        swarm.reset()?;
        report.after_restart = self.cluster.loads()?;
        self.goaways_before = self.cluster.goaways()?;
        self.step("it is ready and empty; the agents compare");
        while !self.cluster.admitted()[0] {
            anyhow::ensure!(
                ready.elapsed() < START,
                "the load balancer does not admit the apiserver"
            );
            self.look(&mut swarm, Some(ready), self.goaways_before)?;
        }
        report.seconds_to_admission = ready.elapsed().as_secs_f64();
        let target = self.cluster.nodes[0].status()?["skew_target"]
            .as_f64()
            .context("the status has no skew_target")?;
        report.lower_bound = lower_bound(&report.after_restart, target, self.policy);
        Ok(swarm)
    }

    /// Watches until the load is level and was left alone for a while, or the time is over.
    fn level(
        &mut self,
        swarm: &mut Driver,
        report: &mut Report,
        ready: Instant,
        goaways_before: u64,
    ) -> anyhow::Result<()> {
        let mut level_since: Option<(Instant, u64)> = None;
        let mut work = Workload::new(self.cluster.nodes.len());
        loop {
            let loads = self.look(swarm, Some(ready), goaways_before)?;
            work.look(self.cluster)?;
            // Empty where the shim sees none.
            report.watches.clone_from(&work.watches);
            if work.watches.is_empty() || Report::skew(&work.watches) > LEVEL {
                report.seconds_to_watches_level = None;
            } else if report.seconds_to_watches_level.is_none() {
                report.seconds_to_watches_level = Some(ready.elapsed().as_secs_f64());
            }
            let goaways = self.cluster.goaways()?;
            match level_since {
                None if Report::skew(&loads) <= LEVEL && self.at_rest()? => {
                    let took = ready.elapsed();
                    self.step(&format!(
                        "level after {:.0} s; watching that nothing more happens",
                        took.as_secs_f64()
                    ));
                    report.seconds_to_balance = Some(took.as_secs_f64());
                    level_since = Some((Instant::now(), goaways));
                    work.requests.fill(0);
                }
                None if ready.elapsed() > self.limit => return Ok(()),
                None => {}
                Some((since, at)) => {
                    report.goaways_after_balance = goaways - at;
                    report.seconds_after_balance = since.elapsed().as_secs_f64();
                    if since.elapsed() >= self.quiet {
                        report.requests = work.requests;
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Whether no agent has a plan in flight, would start one, or waits for somebody who may push it above the target again.
    fn at_rest(&self) -> anyhow::Result<bool> {
        for node in &self.cluster.nodes {
            let status = node.status()?;
            let hold = &status["hold"]["reason"];
            if hold != "below_threshold" && hold != "noise" {
                return Ok(false);
            }
            let view = status["view"].as_array().context("the status has no view")?;
            if view.iter().any(|entry| entry["rebalancing"] != false) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn wait_for_clients(&mut self, swarm: &mut Driver, all: u64) -> anyhow::Result<()> {
        let mut seen = 0;
        let ready = wait_for(START, || {
            if check_interrupt().is_err() {
                return Some(Err(anyhow::anyhow!("interrupted")));
            }
            match swarm.line() {
                Ok(line) if line.clients > 0 && line.ready >= all => Some(Ok(())),
                Ok(line) => {
                    seen = line.ready;
                    None
                }
                Err(error) => Some(Err(error)),
            }
        });
        ready.with_context(|| format!("only {seen} of {all} clients have their watch"))?
    }

    /// The loads, once they add up to all clients and stay.
    fn settled(&mut self, swarm: &mut Driver) -> anyhow::Result<Vec<u64>> {
        let deadline = Instant::now() + START;
        let mut last = Vec::new();
        loop {
            let loads = self.look(swarm, None, 0)?;
            if loads == last {
                return Ok(loads);
            }
            anyhow::ensure!(Instant::now() < deadline, "the connections never settled: {loads:?}");
            last = loads;
        }
    }

    /// One look, told to the audience.
    fn look(&mut self, swarm: &mut Driver, since: Option<Instant>, goaways_before: u64) -> anyhow::Result<Vec<u64>> {
        std::thread::park_timeout(LOOK);
        check_interrupt()?;
        self.cluster.check()?;
        let loads = self.cluster.loads()?;
        for index in 0..self.cluster.nodes.len() {
            for decision in self.cluster.nodes[index].decisions(self.seen[index])? {
                self.seen[index] = decision["id"].as_u64().unwrap_or(self.seen[index]);
                (self.tell)(Event::Decision(&decision));
            }
        }
        let goaways = self.cluster.goaways()?;
        let line = swarm.line()?;
        (self.tell)(Event::State {
            loads: &loads,
            sockets: &self.cluster.sockets(),
            goaways: goaways.saturating_sub(goaways_before),
            errors: line.errors,
            elapsed: since.map(|since| since.elapsed()),
        });
        Ok(loads)
    }

    fn wait(
        &mut self,
        patience: Duration,
        otherwise: &str,
        look: impl Fn(&Cluster) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let done = wait_for(patience, || {
            let looked = check_interrupt()
                .and_then(|()| self.cluster.check())
                .and_then(|()| look(self.cluster));
            match looked {
                Ok(true) => Some(Ok(())),
                Ok(false) => None,
                Err(error) => Some(Err(error)),
            }
        });
        done.with_context(|| otherwise.to_owned())?
    }

    fn step(&mut self, what: &str) {
        (self.tell)(Event::Step(what));
    }
}

/// What the apiservers have to do, as the shims count it.
struct Workload {
    /// Open watches; empty where a shim sees none.
    watches: Vec<u64>,
    requests: Vec<u64>,
    seen: Vec<HashMap<String, u64>>,
}

impl Workload {
    fn new(nodes: usize) -> Self {
        Self {
            watches: Vec::new(),
            requests: vec![0; nodes],
            seen: vec![HashMap::new(); nodes],
        }
    }

    /// Takes the open watches, and adds the requests since the last look; what a connection asked between that and its
    /// end is not seen.
    fn look(&mut self, cluster: &Cluster) -> anyhow::Result<()> {
        self.watches.clear();
        for (index, node) in cluster.nodes.iter().enumerate() {
            let work = node.work()?;
            if node.sees_watches() {
                self.watches.push(work.iter().map(|(_, work)| work.watches).sum());
            }
            for (id, work) in &work {
                let before = self.seen[index].get(id).copied().unwrap_or_default();
                self.requests[index] += work.requests.saturating_sub(before);
            }
            self.seen[index] = work.into_iter().map(|(id, work)| (id, work.requests)).collect();
        }
        Ok(())
    }
}

/// E/rho: what all donors are above the target, over the chance that a moved client lands on another apiserver.
pub fn lower_bound(loads: &[u64], target: f64, policy: Policy) -> u64 {
    let mean = loads.iter().sum::<u64>() as f64 / loads.len() as f64;
    let ceiling = mean * (1.0 + target);
    let surplus: f64 = loads.iter().map(|load| (*load as f64 - ceiling).max(0.0)).sum();
    (surplus / policy.rho(loads.len())).round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lower_bound_is_the_designs() {
        assert_eq!(lower_bound(&[0, 500, 500], 0.05, Policy::Leastconn), 300);
        assert_eq!(lower_bound(&[0, 500, 500], 0.05, Policy::Roundrobin), 900);
    }
}
