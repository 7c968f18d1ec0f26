//! What was found: a row a fault, the sums, and the page.

use std::fmt::Write as _;

use serde::Serialize;

use super::{fault, noticed::Noticed, row::Row};
use crate::bench::machine::{kernel_release, processors_are};

/// What was played.
pub struct Run {
    pub seed: u64,
    pub clients: usize,
    /// Whether the same was played without us.
    pub compared: bool,
    pub apiserver_version: String,
    /// Whether probes tell, and no relays.
    pub steers: bool,
    /// Clients of Python's kind.
    pub python: usize,
    /// Options of haproxy's servers.
    pub lb_options: String,
    /// Flags of agents and relays beside the defaults.
    pub flags: String,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub faults: usize,
    pub client_errors: u64,
    pub missed_events: u64,
    pub doubled_events: u64,
    pub relists: u64,
    pub watch_breaks: u64,
    pub wrong_connections: usize,
    pub leaks: usize,
    pub not_level: usize,
    /// GOAWAYs beyond what levels.
    pub goaways_beyond: u64,
    pub goaways_after: u64,
    /// Faults of which it is not known what they break without us.
    pub not_compared: usize,
    pub seed: u64,
    pub clients: usize,
    pub compared: bool,
    pub apiserver_version: String,
    /// Whether probes tell, and no relays.
    pub steers: bool,
    pub python: usize,
    pub lb_options: String,
    pub flags: String,
    pub rows: Vec<Row>,
}

impl Report {
    /// The sums of these rows.
    pub fn of(rows: Vec<Row>, run: Run) -> Self {
        let Run {
            seed,
            clients,
            compared,
            apiserver_version,
            steers,
            python,
            lb_options,
            flags,
        } = run;
        let ours = rows.iter().fold(Noticed::default(), |sum, row| sum.plus(row.ours()));
        Self {
            faults: rows.len(),
            client_errors: ours.errors,
            missed_events: ours.missed,
            doubled_events: ours.doubled,
            relists: ours.relists,
            watch_breaks: ours.watch_breaks,
            wrong_connections: rows.iter().map(|row| row.wrong_connections.len()).sum(),
            leaks: rows.iter().map(|row| row.leaks.len()).sum(),
            not_level: rows
                .iter()
                .filter(|row| row.seconds_to_level.is_none() || !row.uneven.is_empty())
                .count(),
            goaways_beyond: rows.iter().map(Row::too_many).sum(),
            not_compared: rows.iter().filter(|row| !row.is_judged()).count(),
            goaways_after: rows.iter().map(|row| row.goaways_after).sum(),
            seed,
            clients,
            compared,
            apiserver_version,
            steers,
            python,
            lb_options,
            flags,
            rows,
        }
    }

    /// Whether all of it is as it must be.
    pub fn is_clean(&self) -> bool {
        self.rows.iter().all(Row::is_clean)
    }

    fn about(&self) -> String {
        if self.steers {
            let scene = if self.apiserver_version.starts_with("standin") {
                "three small servers on kube-apiserver's own goaway filter in its place, their agents with probes, a balancer of \
                 the tests' own"
                    .to_owned()
            } else {
                format!(
                    "three kube-apiservers ({}), agents with probes that find each other by Leases, haproxy",
                    self.apiserver_version
                )
            };
            return format!(
                "## With `steer`\n\n\
                 Written by `cargo xtask chaos --vm VERSION --seed {}`, in a virtual machine with Linux {}, whose {} emulated: {scene}, \
                 {} clients that list and watch. The machine has no packet filter, and no relay to break. Nothing is played without \
                 us, so that requests that fail, watches that break and lists that follow while a fault of an apiserver, of etcd or \
                 of the load balancer lasts are counted and not judged.\n\n",
                self.seed,
                kernel_release(),
                processors_are(),
                self.clients
            );
        }
        let beside = if self.compared {
            "Beside it is a cluster without us. A fault that is there without us as well hits both, and what it breaks there is not \
             ours: one missed or doubled event more than there is a finding, and one broken watch more than there or than clients \
             are parted from what served them; of failed requests and relists, which go by the moment, one more than chance makes \
             of the same (a play with more than one standard deviation above the other side's count is played twice more, and \
             three together may have two). A relay's death, standstill or want of descriptors is held against an apiserver's, which stands at the front door there. \
             The clients of the other cluster come anew before each such fault, so that as many are hit."
        } else {
            "Nothing is played without us, so that what fails while a fault lasts that is there without us as well is counted and \
             not judged."
        };
        format!(
            "# Faults, and what clients notice\n\n\
             Written by `cargo xtask chaos --seed {}`: three kube-apiservers ({}) on an etcd of three members, with relays and agents behind haproxy (`{}`), \
             agents that find each other by Leases. {} client-go clients list, watch and read, one of them writes an object each \
             second, two more a second come, ask once and go; {} Python clients do the same over HTTP/1.1. {beside}\n\n\
             Defaults but for {}: one fault follows the other, and each hits a node that the seed draws. A fault is there for 6 to 90 \
             s, and is not taken for one before it was seen to be there (the last column). Then it is looked at until all are served, \
             the load is level by the agents' word and by the load balancer's sessions, and another 8 s have gone by. GOAWAYs are \
             those that agents ordered; the least is what levels the loads that the fault leaves, and a quarter and {} more of what \
             the fault itself parts are allowed, none where it parts nobody and is ours alone.\n\n",
            self.seed,
            self.apiserver_version,
            self.lb_options,
            self.clients,
            self.python,
            self.flags,
            super::SLACK
        )
    }

    /// The page, or its part.
    pub fn page(&self) -> String {
        let mut page = self.about();
        page.push_str(
            "| fault | requests failed: with us, without | watches broken | relists | stalls over 1 s | events missed, doubled | level after | GOAWAYs (least) | wrong connections, leaks | it was seen |\n\
             |---|---|---|---|---|---|---|---|---|---|\n",
        );
        for row in &self.rows {
            let pair = |ours: u64, control: Option<u64>| match control {
                _ if row.is_ours => ours.to_string(),
                Some(control) => format!("{ours}, {control}"),
                None => format!("{ours}, -"),
            };
            let all = row.during.plus(row.after);
            let level = row
                .seconds_to_level
                .map_or_else(|| "**never**".to_owned(), |seconds| format!("{seconds:.0} s"));
            let _ = writeln!(
                page,
                "| {}{}{} | {} | {} | {} | {} | {}, {} | {level} | {} ({}) | {}, {} | {} |",
                if row.is_clean() { "" } else { "**not clean**: " },
                named(&row.faults),
                if row.plays > 1 {
                    format!(" (played {} times, all counted)", row.plays)
                } else {
                    String::new()
                },
                pair(all.errors, row.control.map(|control| control.errors)),
                pair(all.watch_breaks, row.control.map(|control| control.watch_breaks)),
                pair(all.relists, row.control.map(|control| control.relists)),
                pair(all.stalls, row.control.map(|control| control.stalls)),
                all.missed,
                all.doubled,
                row.goaways,
                row.lower_bound,
                row.wrong_connections.len(),
                row.leaks.len(),
                row.seen.join("; ")
            );
        }
        page
    }
}

/// A single fault in words, several by name.
fn named(names: &[String]) -> String {
    match names {
        [name] => fault::ALL
            .iter()
            .find(|fault| fault.name() == name)
            .map_or_else(|| name.clone(), |fault| fault.what().to_owned()),
        _ => names.join(" + "),
    }
}
