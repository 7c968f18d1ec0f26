//! What a soak found: whether lines are flat, and what clients noticed.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use serde::Serialize;

use super::sample::Sample;
use crate::chaos::{Heard, Row};

/// Memory that may come between the second quarter of the time and the last one: an allocator keeps what it had once.
const MEMORY: f64 = 4.0;

/// Open files that may: peers and health checks come and go.
const FILES: i64 = 8;

/// Something that happened to the cluster.
#[derive(Clone, Debug, Serialize)]
pub struct Happening {
    /// Seconds since the beginning, at its end.
    pub at: f64,
    pub what: String,
    pub goaways: u64,
    pub lower_bound: u64,
    pub seconds_to_level: Option<f64>,
    pub is_clean: bool,
}

/// All of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    pub hours: f64,
    pub clients: usize,
    pub seed: u64,
    pub apiserver_version: String,
    /// Small requests that were answered, while nothing happened and while something did.
    pub requests: u64,
    /// Connections clients opened.
    pub dials: u64,
    /// What clients noticed that they would not have noticed without us.
    pub client_errors: u64,
    pub watch_breaks: u64,
    pub relists: u64,
    pub missed_events: u64,
    pub doubled_events: u64,
    pub wrong_connections: usize,
    pub not_level: usize,
    /// All orders, and the sum of the least that levels.
    pub goaways: u64,
    pub lower_bound: u64,
    pub goaways_after: u64,
    pub error_texts: Vec<String>,
    /// What a process that ran from the beginning to the end has more than in the second quarter of its time.
    pub grown: Vec<String>,
    pub happenings: Vec<Happening>,
    #[serde(skip)]
    pub samples: Vec<Sample>,
}

impl Report {
    /// Counts what happened.
    pub fn happened(&mut self, at: Duration, row: &Row) {
        let ours = row.ours();
        self.requests += row.during.requests + row.after.requests;
        self.client_errors += ours.errors;
        self.watch_breaks += ours.watch_breaks;
        self.relists += ours.relists;
        self.missed_events += ours.missed;
        self.doubled_events += ours.doubled;
        self.wrong_connections += row.wrong_connections.len();
        self.not_level += usize::from(row.seconds_to_level.is_none());
        self.goaways += row.goaways + row.goaways_after;
        self.goaways_after += row.goaways_after;
        self.lower_bound += row.lower_bound;
        if ours.errors > 0 {
            self.error_texts.extend(row.error_texts.iter().take(3).cloned());
            self.error_texts.truncate(20);
        }
        self.happenings.push(Happening {
            at: at.as_secs_f64(),
            what: row.faults.join(" + "),
            goaways: row.goaways + row.goaways_after,
            lower_bound: row.lower_bound,
            seconds_to_level: row.seconds_to_level,
            is_clean: row.is_clean(),
        });
    }

    /// Counts what clients noticed while nothing happened.
    pub fn rested(&mut self, heard: &Heard) {
        let noticed = heard.noticed;
        self.requests += noticed.requests;
        self.dials += noticed.dials;
        self.client_errors += noticed.errors;
        self.watch_breaks += noticed.watch_breaks;
        self.relists += noticed.relists;
        self.missed_events += noticed.missed;
        self.doubled_events += noticed.doubled;
        if noticed.errors > 0 {
            self.error_texts.extend(heard.texts.iter().take(3).cloned());
            self.error_texts.truncate(20);
        }
    }

    /// Looks at what stayed from the beginning to the end.
    pub fn finish(&mut self) {
        self.hours = self.samples.last().map_or(0.0, |sample| sample.at / 3_600.0);
        self.grown = grown(&self.samples);
    }

    /// Whether it is as it must be.
    pub fn is_clean(&self) -> bool {
        self.client_errors + self.watch_breaks + self.relists + self.missed_events + self.doubled_events == 0
            && self.wrong_connections == 0
            && self.not_level == 0
            && self.grown.is_empty()
    }

    /// The page; the picture is beside it.
    pub fn page(&self) -> String {
        let mut page = format!(
            "# Hour after hour\n\n\
             Written by `cargo xtask soak --hours {:.1} --seed {}`: three kube-apiservers ({}) with relays and agents behind \
             haproxy; {} client-go clients that list, watch, read and write, each of which ends after five minutes or so and is \
             followed by another one, and two a second besides that make one request and go. Every other minute something \
             happens: {}. The last node's agent and relay run from the beginning to the end, and all of them are looked at each \
             ten seconds.\n\n\
             ![What processes hold, loads and GOAWAYs over time](soak.svg)\n\n\
             | | |\n|---|---|\n",
            self.hours,
            self.seed,
            self.apiserver_version,
            self.clients,
            self.kinds()
        );
        let mut line = |what: &str, figure: String| {
            let _ = writeln!(page, "| {what} | {figure} |");
        };
        line("hours", format!("{:.1}", self.hours));
        line("what happened", self.happenings.len().to_string());
        line("requests", self.requests.to_string());
        line("requests that failed because of us", self.client_errors.to_string());
        line("watches broken because of us", self.watch_breaks.to_string());
        line("relists because of us", self.relists.to_string());
        line(
            "events missed, doubled",
            format!("{}, {}", self.missed_events, self.doubled_events),
        );
        line(
            "GOAWAYs, and the sum of the least that levels",
            format!("{}, {}", self.goaways, self.lower_bound),
        );
        line(
            "not level in nine minutes (an upgrade is waited for five)",
            self.not_level.to_string(),
        );
        line("wrong connections in the tables", self.wrong_connections.to_string());
        for (what, (first, last)) in stayed(&self.samples) {
            line(
                &format!("{what}: MiB and files, second quarter and last"),
                format!("{:.1}, {:.1}; {}, {}", first.0, last.0, first.1, last.1),
            );
        }
        // `cargo xtask soak` puts the rows of earlier runs before this one's.
        let _ = write!(
            page,
            "\n## All runs\n\nThe newest is the last; the picture and the table above are its.\n\n\
             | hours | seed | clients | happenings | requests | failed, broken watches, relists | missed, doubled | GOAWAYs \
             (least) | not level | wrong connections |\n|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n<!-- runs -->\n\
             | {:.1} | {} | {} | {} | {} | {}, {}, {} | {}, {} | {} ({}) | {} | {} |\n<!-- /runs -->\n",
            self.hours,
            self.seed,
            self.clients,
            self.happenings.len(),
            self.requests,
            self.client_errors,
            self.watch_breaks,
            self.relists,
            self.missed_events,
            self.doubled_events,
            self.goaways,
            self.lower_bound,
            self.not_level,
            self.wrong_connections,
        );
        page
    }

    fn kinds(&self) -> String {
        let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
        for happening in &self.happenings {
            *kinds.entry(&happening.what).or_default() += 1;
        }
        let words: Vec<_> = kinds.iter().map(|(what, count)| format!("{what} ({count})")).collect();
        words.join(", ")
    }
}

/// Medians of MiB and files.
type Held = (f64, i64);

/// What each process that ran from the beginning to the end held in the second quarter of the time, and in the last one.
fn stayed(samples: &[Sample]) -> Vec<(String, (Held, Held))> {
    let (Some(first), Some(last)) = (samples.first(), samples.last()) else {
        return Vec::new();
    };
    let between = |from: f64, to: f64, what: &str| -> Held {
        let (mut memory, mut files): (Vec<f64>, Vec<i64>) = samples
            .iter()
            .filter(|sample| sample.at >= from * last.at && sample.at <= to * last.at)
            .flat_map(|sample| &sample.processes)
            .filter(|process| process.what == what)
            .map(|process| (process.memory, process.files))
            .unzip();
        memory.sort_by(f64::total_cmp);
        files.sort_unstable();
        let middle = memory.len() / 2;
        (
            memory.get(middle).copied().unwrap_or_default(),
            files.get(middle).copied().unwrap_or_default(),
        )
    };
    let same = |what: &str, id: u32| {
        samples.iter().all(|sample| {
            sample
                .processes
                .iter()
                .any(|process| process.what == what && process.id == id)
        })
    };
    let stayed = first.processes.iter().filter(|process| same(&process.what, process.id));
    stayed
        .map(|process| {
            let what = process.what.as_str();
            (what.to_owned(), (between(0.25, 0.5, what), between(0.75, 1.0, what)))
        })
        .collect()
}

fn grown(samples: &[Sample]) -> Vec<String> {
    let mut grown = Vec::new();
    for (what, (before, now)) in stayed(samples) {
        if now.0 - before.0 > MEMORY || now.1 - before.1 > FILES {
            grown.push(format!(
                "{what}: {:.1} MiB and {} files in the second quarter, {:.1} and {} in the last",
                before.0, before.1, now.0, now.1
            ));
        }
    }
    grown
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soak::sample::Process;

    fn samples(memory: impl Fn(f64) -> f64, files: impl Fn(f64) -> i64) -> Vec<Sample> {
        let process = |at: f64, what: &str, id| Process {
            what: what.to_owned(),
            id,
            memory: memory(at),
            files: files(at),
            threads: 4,
        };
        (0..=100)
            .map(|at| f64::from(at) * 36.0)
            .map(|at| Sample {
                at,
                processes: vec![process(at, "stays", 1), process(at, "replaced", (at / 1_000.0) as u32)],
                loads: Vec::new(),
                goaways: 0,
            })
            .collect()
    }

    #[test]
    fn what_grows_all_the_time_is_named_and_what_is_had_once_is_not() {
        assert!(grown(&samples(|at| if at < 500.0 { 10.0 } else { 30.0 }, |_| 12)).is_empty());
        let leak = grown(&samples(|at| 10.0 + at / 100.0, |_| 12));
        assert_eq!(
            leak,
            ["stays: 23.7 MiB and 12 files in the second quarter, 41.7 and 12 in the last"]
        );
        assert_eq!(grown(&samples(|_| 10.0, |at| (at / 100.0) as i64)).len(), 1);
    }
}
