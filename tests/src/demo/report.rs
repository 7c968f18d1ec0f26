//! What the demo measured: one JSON object, and the same in words.

use std::fmt;

use serde::Serialize;

use super::scene::LEVEL;

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct LatencyMs {
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
}

/// The contract's fields.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// `real` or `standin`.
    pub apiserver: &'static str,
    /// Its version.
    pub apiserver_version: String,
    /// `ebpf` or `sockdiag`.
    pub source: String,
    /// `relay` or `steer`.
    pub shim: &'static str,
    /// The load balancer's policy.
    pub lb: &'static str,
    /// Which load balancer: `own`, or `haproxy` and the options of its servers.
    pub lb_kind: String,
    /// How many apiservers.
    pub nodes: usize,
    /// How many clients.
    pub clients: usize,
    /// Whether the relays hand watches over.
    pub watch_handover: bool,
    /// Active connections per apiserver before the crash.
    pub before: Vec<u64>,
    /// When the apiserver was ready again.
    pub after_restart: Vec<u64>,
    /// At the end.
    pub after: Vec<u64>,
    /// Largest distance from the mean at the end.
    pub skew_after: f64,
    /// Open watches per apiserver at the end, those of draining connections included; empty where the shim sees none.
    pub watches: Vec<u64>,
    /// From the restart until the open watches were level, and stayed so; `None` when they were not at the end.
    pub seconds_to_watches_level: Option<f64>,
    /// Requests per apiserver from when the load was level to the end.
    pub requests: Vec<u64>,
    /// GOAWAYs sent since the restart.
    pub goaways: u64,
    /// E/rho at the restart.
    pub lower_bound: u64,
    /// From when the apiserver was ready again until the load balancer sent clients there.
    pub seconds_to_admission: f64,
    /// From then until the load was level; `None` when it never was.
    pub seconds_to_balance: Option<f64>,
    /// GOAWAYs sent after that.
    pub goaways_after_balance: u64,
    /// For how long that was watched.
    pub seconds_after_balance: f64,
    /// Requests that failed since the restart.
    pub client_errors: u64,
    /// LISTs after a client's first, since the restart.
    pub relists: u64,
    /// Watches that broke since the restart.
    pub watch_breaks: u64,
    /// Watch events that never came, since the restart.
    pub missed_events: u64,
    /// Watch events that came twice, since the restart.
    pub doubled_events: u64,
    /// Of small requests since the restart.
    pub latency_ms: LatencyMs,
}

impl Report {
    /// Largest distance from the mean, as a share of it.
    pub fn skew(loads: &[u64]) -> f64 {
        let mean = loads.iter().sum::<u64>() as f64 / loads.len().max(1) as f64;
        if mean == 0.0 {
            return 0.0;
        }
        loads
            .iter()
            .map(|load| (*load as f64 / mean - 1.0).abs())
            .fold(0.0, f64::max)
    }

    /// What chance makes of as many requests, in three standard deviations and as a share of their mean.
    fn scatter(&self) -> f64 {
        let mean = self.requests.iter().sum::<u64>() as f64 / self.requests.len().max(1) as f64;
        3.0 / mean.max(1.0).sqrt()
    }

    /// Whether the load became level and no client noticed.
    pub fn is_success(&self) -> bool {
        let handed_over = !self.watch_handover
            || (self.seconds_to_watches_level.is_some()
                && Self::skew(&self.requests) <= LEVEL + self.scatter()
                && self.relists + self.watch_breaks + self.missed_events + self.doubled_events == 0);
        self.seconds_to_balance.is_some() && self.client_errors == 0 && handed_over
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_node = |loads: &[u64]| loads.iter().map(u64::to_string).collect::<Vec<_>>().join(" / ");
        writeln!(
            f,
            "{} clients, {} apiservers ({} {}), load balancer {} ({}), shim {}, source {}",
            self.clients,
            self.nodes,
            self.apiserver,
            self.apiserver_version,
            self.lb,
            self.lb_kind,
            self.shim,
            self.source
        )?;
        writeln!(f, "  before the crash      {}", per_node(&self.before))?;
        writeln!(f, "  after the restart     {}", per_node(&self.after_restart))?;
        writeln!(
            f,
            "  at the end            {}   ({:.1} % from the mean at most)",
            per_node(&self.after),
            self.skew_after * 100.0
        )?;
        match self.seconds_to_balance {
            Some(seconds) => writeln!(
                f,
                "  admitted after {:.0} s, level {seconds:.0} s later with {} GOAWAYs (the least possible here is {}); {} in the {:.0} s since",
                self.seconds_to_admission,
                self.goaways,
                self.lower_bound,
                self.goaways_after_balance,
                self.seconds_after_balance
            )?,
            None => writeln!(f, "  NOT level at the end; {} GOAWAYs", self.goaways)?,
        }
        let share = |loads: &[u64]| format!("{} ({:.1} %)", per_node(loads), Self::skew(loads) * 100.0);
        write!(f, "  ")?;
        match self.seconds_to_watches_level {
            _ if self.watches.is_empty() => {}
            Some(seconds) => write!(f, "open watches level after {seconds:.0} s: {}; ", share(&self.watches))?,
            None => write!(f, "open watches NOT level at the end: {}; ", share(&self.watches))?,
        }
        writeln!(f, "requests since then {}", share(&self.requests))?;
        write!(
            f,
            "  clients saw {} errors, {} relists, {} broken watches, {} missed and {} doubled events; latency p50 {:.1} ms, p90 {:.1} ms, p99 {:.1} ms",
            self.client_errors,
            self.relists,
            self.watch_breaks,
            self.missed_events,
            self.doubled_events,
            self.latency_ms.p50,
            self.latency_ms.p90,
            self.latency_ms.p99
        )
    }
}
