//! What was found: a row a fault, the sums, and the page.

use std::{collections::BTreeMap, fmt::Write as _};

use serde::Serialize;

use super::fault;
use crate::{
    bench::machine::{kernel_release, processors_are},
    swarm::Line,
};

/// What clients noticed in a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Noticed {
    pub requests: u64,
    pub errors: u64,
    pub relists: u64,
    pub watch_breaks: u64,
    pub missed: u64,
    pub doubled: u64,
}

impl Noticed {
    /// Of a swarm's line.
    pub fn of(line: &Line) -> Self {
        Self {
            requests: line.requests,
            errors: line.errors,
            relists: line.relists,
            watch_breaks: line.watch_breaks,
            missed: line.missed,
            doubled: line.doubled,
        }
    }

    /// What of it the same fault without us did not make.
    fn beyond(self, control: Self) -> Self {
        Self {
            requests: self.requests,
            errors: beyond(self.errors, control.errors),
            relists: beyond(self.relists, control.relists),
            watch_breaks: beyond(self.watch_breaks, control.watch_breaks),
            missed: beyond(self.missed, control.missed),
            doubled: beyond(self.doubled, control.doubled),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            errors: self.errors + other.errors,
            relists: self.relists + other.relists,
            watch_breaks: self.watch_breaks + other.watch_breaks,
            missed: self.missed + other.missed,
            doubled: self.doubled + other.doubled,
        }
    }

    fn any(self) -> u64 {
        self.errors + self.relists + self.watch_breaks + self.missed + self.doubled
    }
}

/// Counts of rare events scatter by their square root: within three of those of both, two counts are the same. Where
/// nothing happens without us, nothing may happen with us.
fn beyond(ours: u64, control: u64) -> u64 {
    if control == 0 {
        return ours;
    }
    let scatter = 3.0 * ((ours + control) as f64).sqrt();
    if ours as f64 > control as f64 + scatter {
        ours - control
    } else {
        0
    }
}

/// One fault, or several at once.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub faults: Vec<String>,
    /// How often: the counts below are of all plays together.
    pub plays: u32,
    /// Nothing of it is there without us.
    pub is_ours: bool,
    /// Until it was over and everybody was back.
    pub during: Noticed,
    /// The same without us.
    pub control: Option<Noticed>,
    /// From then on.
    pub after: Noticed,
    pub error_texts: Vec<String>,
    pub loads_after_fault: Vec<u64>,
    /// E/rho then.
    pub lower_bound: u64,
    pub goaways_during: u64,
    /// All, until level.
    pub goaways: u64,
    pub goaways_after: u64,
    pub seconds_to_level: Option<f64>,
    pub wrong_connections: Vec<String>,
    pub leaks: Vec<String>,
    /// What each of our processes has in RAM at the end.
    pub memory_mib: BTreeMap<String, i64>,
}

impl Row {
    /// What clients noticed that they would not have noticed without us: all of it when nothing of the fault is there
    /// without us; nothing of the fault's own time when it was not compared.
    pub fn ours(&self) -> Noticed {
        let during = match self.control {
            _ if self.is_ours => self.during,
            Some(control) => self.during.beyond(control),
            None => Noticed::default(),
        };
        during.plus(self.after)
    }

    /// Whether nothing is wrong but that more of what the fault breaks without us, too, was counted with us.
    pub fn may_be_chance(&self) -> bool {
        let Some(control) = self.control.filter(|_| !self.is_ours && !self.is_clean()) else {
            return false;
        };
        let (ours, without) = (self.during, control);
        let happens_too = [
            (ours.errors, without.errors),
            (ours.relists, without.relists),
            (ours.watch_breaks, without.watch_breaks),
            (ours.missed, without.missed),
            (ours.doubled, without.doubled),
        ];
        let as_without = Self {
            control: Some(ours),
            ..self.clone()
        };
        happens_too.iter().all(|(ours, without)| *ours == 0 || *without > 0) && as_without.is_clean()
    }

    /// Both plays of it.
    #[must_use]
    pub fn and(self, again: Self) -> Self {
        debug_assert_eq!(self.faults, again.faults);
        let both = |one: Vec<String>, other: Vec<String>| [one, other].concat();
        Self {
            faults: self.faults,
            plays: self.plays + again.plays,
            is_ours: self.is_ours,
            during: self.during.plus(again.during),
            control: self.control.zip(again.control).map(|(one, other)| one.plus(other)),
            after: self.after.plus(again.after),
            error_texts: both(self.error_texts, again.error_texts),
            loads_after_fault: again.loads_after_fault,
            lower_bound: self.lower_bound + again.lower_bound,
            goaways_during: self.goaways_during + again.goaways_during,
            goaways: self.goaways + again.goaways,
            goaways_after: self.goaways_after + again.goaways_after,
            seconds_to_level: self
                .seconds_to_level
                .zip(again.seconds_to_level)
                .map(|(one, other)| one.max(other)),
            wrong_connections: both(self.wrong_connections, again.wrong_connections),
            leaks: both(self.leaks, again.leaks),
            memory_mib: again.memory_mib,
        }
    }

    /// Whether it is as it must be.
    pub fn is_clean(&self) -> bool {
        self.ours().any() == 0
            && self.wrong_connections.is_empty()
            && self.leaks.is_empty()
            && self.seconds_to_level.is_some()
            && self.goaways_after == 0
    }

    /// In a line.
    pub fn sentence(&self) -> String {
        let ours = self.ours();
        let mut text = format!(
            "{}: {} errors, {} relists, {} broken watches, {} missed and {} doubled events of ours; ",
            if self.is_clean() { "clean" } else { "NOT CLEAN" },
            ours.errors,
            ours.relists,
            ours.watch_breaks,
            ours.missed,
            ours.doubled
        );
        let level = match self.seconds_to_level {
            Some(seconds) => format!("level after {seconds:.0} s"),
            None => "NOT level".to_owned(),
        };
        let _ = write!(
            text,
            "{level} with {} GOAWAYs ({} while it lasted; {} are the least), {} after",
            self.goaways, self.goaways_during, self.lower_bound, self.goaways_after
        );
        for what in self.wrong_connections.iter().chain(&self.leaks).take(4) {
            let _ = write!(text, "; {what}");
        }
        text
    }
}

/// What was played.
pub struct Run {
    pub seed: u64,
    pub clients: usize,
    /// Whether the same was played without us.
    pub compared: bool,
    pub apiserver_version: String,
    /// Whether probes tell, and no relays.
    pub steers: bool,
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
    pub goaways_after: u64,
    pub seed: u64,
    pub clients: usize,
    pub compared: bool,
    pub apiserver_version: String,
    /// Whether probes tell, and no relays.
    pub steers: bool,
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
            not_level: rows.iter().filter(|row| row.seconds_to_level.is_none()).count(),
            goaways_after: rows.iter().map(|row| row.goaways_after).sum(),
            seed,
            clients,
            compared,
            apiserver_version,
            steers,
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
                 us: what a fault of an apiserver breaks by itself is not looked at while it lasts.\n\n",
                self.seed,
                kernel_release(),
                processors_are(),
                self.clients
            );
        }
        format!(
            "# Faults, and what clients notice\n\n\
             Written by `cargo xtask chaos --seed {}`: three kube-apiservers ({}) with relays and agents behind haproxy, {} \
             client-go clients that list, watch, read and write, agents that find each other by Leases; beside it, at the same \
             moment, the same without us. A fault that is there without us as well hits both, and what it breaks there is not \
             ours (counts within three standard deviations of each other are the same); the clients of the other cluster come anew \
             before it, so that as many are hit. The agents have their default flags but for \
             `--client-cooldown 30s`, as one fault follows the other. Each stays for 6 to 15 s; then it is \
             looked at until the load is level, no agent would do more, and another 8 s have gone by.\n\n",
            self.seed, self.apiserver_version, self.clients
        )
    }

    /// The page, or its part.
    pub fn page(&self) -> String {
        let mut page = self.about();
        page.push_str(
            "| fault | requests failed: with us, without | watches broken | relists | events missed, doubled | level after | GOAWAYs (least) | wrong connections, leaks |\n\
             |---|---|---|---|---|---|---|---|\n",
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
                "| {}{} | {} | {} | {} | {}, {} | {level} | {} ({}) | {}, {} |",
                named(&row.faults),
                if row.plays > 1 {
                    format!(" (played {} times, all counted)", row.plays)
                } else {
                    String::new()
                },
                pair(all.errors, row.control.map(|control| control.errors)),
                pair(all.watch_breaks, row.control.map(|control| control.watch_breaks)),
                pair(all.relists, row.control.map(|control| control.relists)),
                all.missed,
                all.doubled,
                row.goaways,
                row.lower_bound,
                row.wrong_connections.len(),
                row.leaks.len()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_fault_breaks_without_us_is_not_ours() {
        assert_eq!(beyond(0, 0), 0);
        assert_eq!(beyond(1, 0), 1, "nothing may happen where nothing happens without us");
        assert_eq!(beyond(105, 100), 0);
        assert_eq!(beyond(300, 100), 200);
    }

    fn row(during: [u64; 2], control: Option<[u64; 2]>) -> Row {
        let noticed = |[errors, missed]: [u64; 2]| Noticed {
            errors,
            missed,
            ..Noticed::default()
        };
        Row {
            faults: vec!["apiserver-flaps".to_owned()],
            plays: 1,
            is_ours: control.is_none(),
            during: noticed(during),
            control: control.map(noticed),
            after: Noticed::default(),
            error_texts: vec![],
            loads_after_fault: vec![],
            lower_bound: 0,
            goaways_during: 0,
            goaways: 0,
            goaways_after: 0,
            seconds_to_level: Some(7.0),
            wrong_connections: vec![],
            leaks: vec![],
            memory_mib: BTreeMap::new(),
        }
    }

    #[test]
    fn only_how_many_of_a_fault_is_played_again_and_counted_together() {
        let unlucky = row([28, 0], Some([3, 0]));
        assert!(!unlucky.is_clean() && unlucky.may_be_chance());
        let both = unlucky.clone().and(row([25, 0], Some([25, 0])));
        assert!(both.is_clean() && both.plays == 2, "{both:?}");
        let ours = unlucky.clone().and(unlucky.clone()).and(unlucky.clone());
        assert!(!ours.is_clean(), "each time more is no chance");
        assert!(!row([28, 0], Some([25, 0])).may_be_chance(), "it is clean");
        assert!(
            !row([28, 0], Some([0, 0])).may_be_chance(),
            "it does not happen without us"
        );
        assert!(
            !row([28, 1], Some([3, 0])).may_be_chance(),
            "an event is missed with us alone"
        );
        assert!(!row([1, 0], None).may_be_chance());
        let mut later = unlucky;
        later.after.errors = 1;
        assert!(!later.may_be_chance(), "the fault is over");
    }
}
