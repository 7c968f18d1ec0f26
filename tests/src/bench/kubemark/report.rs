//! The figures as one JSON object, and docs/kubemark.md.
//!
//! Must never call a difference a finding that is no larger than that between the two who have nothing.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::{Figures, Row, Run, Shim, Variant};
use crate::bench::{
    kubelets::Times,
    machine::{kernel_release, processor, processors_are},
};

/// The table of the article, in milliseconds: average, P50, P90, P95, P99
/// (kubemark, 1,000 nodes; palark.com/blog/kubernetes-api-flow-control-management names its source).
const ARTICLE: [(&str, [u32; 5]); 3] = [
    ("none", [44, 29, 65, 96, 426]),
    ("0.01", [48, 30, 80, 125, 419]),
    ("0.001", [46, 30, 59, 90, 540]),
];

fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// The middle one.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// Which of a row's requests.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    /// All, with the restart in it.
    Whole,
    /// Those that began after our load was level and all kubelets had their watches again: what a variant costs at rest.
    After,
}

impl Part {
    fn of(self, row: &Row) -> &Times {
        match self {
            Self::Whole => &row.times,
            Self::After => &row.times_after,
        }
    }
}

/// What one of a row's times is.
type Of = fn(&Times) -> f64;

const AVERAGE: Of = |times| times.average;
const P50: Of = |times| times.p50;
const P99: Of = |times| times.p99;
const TIMES: [(&str, Of); 5] = [
    ("average", AVERAGE),
    ("P50", P50),
    ("P90", |times| times.p90),
    ("P95", |times| times.p95),
    ("P99", P99),
];

impl Run {
    fn row(&self, variant: Variant) -> &Row {
        &self.rows[&variant]
    }

    fn time(&self, variant: Variant, part: Part, of: Of) -> f64 {
        of(part.of(self.row(variant)))
    }

    /// What the mean of the two who have nothing is.
    fn nothing(&self, part: Part, of: Of) -> f64 {
        f64::midpoint(
            self.time(Variant::None, part, of),
            self.time(Variant::NoneAgain, part, of),
        )
    }

    /// One of a variant's times over the mean of the two who have nothing.
    fn ratio(&self, variant: Variant, part: Part, of: Of) -> f64 {
        self.time(variant, part, of) / self.nothing(part, of)
    }

    /// How far the two who have nothing are from each other: the larger over the smaller.
    fn spread(&self, part: Part, of: Of) -> f64 {
        let (one, other) = (
            self.time(Variant::None, part, of),
            self.time(Variant::NoneAgain, part, of),
        );
        one.max(other) / one.min(other)
    }
}

impl Figures {
    fn median(&self, of: impl Fn(&Run) -> f64) -> f64 {
        median(self.runs.iter().map(of).collect())
    }

    fn sum(&self, variant: Variant, of: impl Fn(&Row) -> u64) -> u64 {
        self.runs.iter().map(|run| of(run.row(variant))).sum()
    }

    fn variants(&self) -> impl Iterator<Item = Variant> {
        self.effort.variants().iter().copied()
    }

    /// The one with agents.
    fn ours(&self) -> Variant {
        self.variants()
            .find(|variant| variant.is_ours())
            .expect("each table has one")
    }

    /// The largest spread of any run.
    fn spread(&self, part: Part, of: Of) -> f64 {
        self.runs.iter().map(|run| run.spread(part, of)).fold(1.0, f64::max)
    }

    /// What of each variant.
    fn each(&self, of: impl Fn(Variant) -> Value) -> Value {
        let pairs: Map<String, Value> = self
            .variants()
            .map(|variant| (variant.key().to_owned(), of(variant)))
            .collect();
        Value::Object(pairs)
    }

    /// The figures of requests that `part` has.
    fn times_json(&self, part: Part) -> Value {
        let ratio = |of: Of| self.each(|variant| json!(rounded(self.median(|run| run.ratio(variant, part, of)))));
        json!({
            "aa_ratio": rounded(self.spread(part, P50)),
            "aa_average_ratio": rounded(self.spread(part, AVERAGE)),
            "aa_p99_ratio": rounded(self.spread(part, P99)),
            "p50_ratio": ratio(P50),
            "average_ratio": ratio(AVERAGE),
            "p99_ratio": ratio(P99),
            "stalls": self.each(|variant| json!(self.sum(variant, |row| part.of(row).stalls))),
            "errors": self.each(|variant| json!(self.sum(variant, |row| part.of(row).errors))),
            "watch_errors": self.each(|variant| json!(self.sum(variant, |row| part.of(row).watch_errors))),
            "requests": self.each(|variant| json!(self.sum(variant, |row| part.of(row).count))),
        })
    }

    /// The object of figures: those of requests are of the whole time, and once more of the time after the load was level.
    pub fn json(&self) -> Value {
        let each = |of: &dyn Fn(Variant) -> Value| self.each(of);
        let mut object = self.times_json(Part::Whole);
        let others = json!({
            "after_balance": self.times_json(Part::After),
            "reconnects": each(&|variant| json!(self.sum(variant, |row| row.reconnects))),
            "reconnects_after_balance": each(&|variant| json!(self.sum(variant, |row| row.reconnects_after))),
            "goaways": self.sum(self.ours(), |row| row.goaways),
            "goaways_after_balance": self.sum(self.ours(), |row| row.goaways_after),
            "level_after_s": self.runs.iter().map(|run| rounded(run.level_after)).collect::<Vec<_>>(),
            "runs": self.runs.len(),
            "idle": self.runs.iter().map(|run| rounded(run.idle)).collect::<Vec<_>>(),
            "idle_at_rest": self.runs.iter().map(|run| rounded(run.idle_at_rest)).collect::<Vec<_>>(),
            "kubelets": self.runs.first().map_or(0, |run| run.rows.values().map(|row| row.kubelets).sum::<usize>()),
        });
        if let (Value::Object(object), Value::Object(others)) = (&mut object, others) {
            object.extend(others);
        }
        object
    }

    /// docs/kubemark.md; with `steer` the part of it that is measured in a virtual machine.
    pub fn page(&self) -> String {
        match self.effort.shim {
            Shim::Steer => self.part(),
            Shim::Relay | Shim::None => self.whole(),
        }
    }

    fn kubelets(&self) -> usize {
        self.runs[0].rows.values().map(|row| row.kubelets).sum()
    }

    fn whole(&self) -> String {
        let mut page = format!(
            "# A thousand kubelets, and what the lottery costs\n\n\
             Written by `cargo xtask bench kubemark`: {} light kubelets on {} kube-apiservers ({}) of one etcd, all at the \
             same moment, on {} with Linux {}, in {} runs of {} s each. The processors had nothing to do in {}.\n\n\
             A light kubelet is a client-go client with a connection and a certificate of its own that asks what a hollow \
             kubelet (k8s.io/kubernetes/cmd/kubemark) was seen to ask: five watches, its Lease each ten seconds, its status \
             each five minutes, in protobuf; `--hollow COUNT` holds as many real ones beside them, by what the apiserver's \
             audit log says that either asks. Each variant has apiservers of its own, {} kubelets on each, and a haproxy in TCP \
             mode before them; `none` is there twice. Which addresses, ports and turn at the start a variant has changes with \
             each run. Ten seconds into each run one of rebalancer's three apiservers and one of three that have nothing else \
             are killed, and started again five seconds later; nobody else's is, but all share the processors. The hop that \
             ends TLS and copies octets is lent the key of the cluster's authority, so that the apiserver has as much to ask \
             about each kubelet as it has without a hop.\n\n\
             ## How long a request takes\n\n",
            self.kubelets(),
            self.effort.apiservers(),
            self.version,
            processor(),
            kernel_release(),
            self.runs.len(),
            self.effort.seconds,
            self.idle(),
            self.effort.kubelets,
        );
        page += &self.times();
        page += "\n## What can be counted\n\n";
        page += &self.counts();
        page += "\n## Processor and memory\n\n";
        page += &self.used();
        page += "\n## The article's table\n\n\
                 What it measured on a cluster of 1,000 hollow nodes, in milliseconds:\n\n\
                 | `--goaway-chance` | average | P50 | P90 | P95 | P99 |\n|---|--:|--:|--:|--:|--:|\n";
        for (name, times) in ARTICLE {
            let _ = writeln!(page, "| {name} | {} |", times.map(|time| time.to_string()).join(" | "));
        }
        // What another run writes.
        page += "\n## With `steer`\n\n<!-- kubemark-steer -->\n<!-- /kubemark-steer -->\n";
        page
    }

    fn part(&self) -> String {
        let mut part = format!(
            "Written by `cargo xtask bench kubemark --vm VERSION`: the same kubelets, {} of them, {} on each of four \
             kube-apiservers of one etcd, all at the same moment, in a virtual machine with Linux {}, whose {} emulated: a \
             request takes ten times as long there, and only what stands beside it in the same table says anything. {} of {} \
             s, in which there was nothing to do in {}.\n\n",
            self.kubelets(),
            self.effort.kubelets,
            kernel_release(),
            processors_are(),
            if self.runs.len() == 1 {
                "One run".to_owned()
            } else {
                format!("{} runs", self.runs.len())
            },
            self.effort.seconds,
            self.idle(),
        );
        for table in [self.times(), self.counts(), self.used()] {
            part += &table;
            part.push('\n');
        }
        part
    }

    /// The share of the time in which the processors had nothing to do, of each run.
    fn idle(&self) -> String {
        let each = |of: fn(&Run) -> f64| {
            let shares = self.runs.iter().map(|run| format!("{:.0} %", of(run) * 100.0));
            shares.collect::<Vec<_>>().join(", ")
        };
        format!(
            "{} of that time, at rest {}",
            each(|run| run.idle),
            each(|run| run.idle_at_rest)
        )
    }

    /// How long a request takes, and that over what it takes with nothing: at rest, and with the restart in it.
    fn times(&self) -> String {
        let has_control = self.variants().any(|variant| variant == Variant::Restart);
        let (uneven, recoveries) = if has_control {
            (
                ", while the three with nothing stayed as the restart had left them",
                ", between two who had no restart: of how far two recoveries are from each other it says nothing",
            )
        } else {
            ("", ", between two who had no restart")
        };
        format!(
            "Milliseconds until the whole answer is there; the median of the runs. Watches are not in it; a request that failed \
             counts with the time it took.\n\n\
             At rest: requests that began after rebalancer's load was level and all kubelets had their watches again, of all \
             variants in the same seconds{uneven}.\n\n{}\n\
             The whole time, the restart in it:\n\n{}\n\
             What is within the last line of a table of ratios is what chance does{recoveries}.\n",
            self.times_of(Part::After),
            self.times_of(Part::Whole),
        )
    }

    fn times_of(&self, part: Part) -> String {
        let mut text =
            "| | n | average | P50 | P90 | P95 | P99 | stalls over 1 s | of 10,000 | failed | watches not begun |\n\
                        |---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n"
                .to_owned();
        for variant in self.variants() {
            let count = self.sum(variant, |row| part.of(row).count);
            let _ = write!(text, "| {} | {count} |", variant.name());
            for (_, of) in TIMES {
                let _ = write!(text, " {:.1} |", self.median(|run| run.time(variant, part, of)));
            }
            let stalls = self.sum(variant, |row| part.of(row).stalls);
            let _ = writeln!(
                text,
                " {stalls} | {:.0} | {} | {} |",
                stalls as f64 * 1e4 / count.max(1) as f64,
                self.sum(variant, |row| part.of(row).errors),
                self.sum(variant, |row| part.of(row).watch_errors)
            );
        }
        text += "\nOver the mean of the two who have nothing, each run for itself, the median of the runs (least to most):\n\n\
                 | | average | P50 | P90 | P95 | P99 |\n|---|--:|--:|--:|--:|--:|\n";
        let mut line = |name: &str, ratio: &dyn Fn(&Run, Of) -> f64| {
            let _ = write!(text, "| {name} |");
            for (_, of) in TIMES {
                let ratios: Vec<f64> = self.runs.iter().map(|run| ratio(run, of)).collect();
                let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
                let most = ratios.iter().copied().fold(0.0, f64::max);
                let _ = write!(text, " {:.2} ({least:.2} to {most:.2}) |", median(ratios));
            }
            text.push('\n');
        };
        for variant in self.variants().skip(2) {
            line(variant.name(), &|run, of| run.ratio(variant, part, of));
        }
        if self.variants().any(|variant| variant == Variant::Restart) {
            line(
                "*rebalancer over the three with nothing and the same restart*",
                &|run, of| run.time(self.ours(), part, of) / run.time(Variant::Restart, part, of),
            );
        }
        text += "| *the two who have nothing, the larger over the smaller, at most* |";
        for (_, of) in TIMES {
            let _ = write!(text, " {:.2} |", self.spread(part, of));
        }
        text.push('\n');
        text
    }

    /// What does not depend on how fast the machine is.
    fn counts(&self) -> String {
        let mut text =
            "| | requests that opened a connection | connections opened | of these after the load was level again \
                        | open at the end, for so many kubelets | GOAWAYs | of these after |\n\
                        |---|--:|--:|--:|--:|--:|--:|\n"
                .to_owned();
        for variant in self.variants() {
            let count = self.sum(variant, |row| row.times.count).max(1);
            let fresh = self.sum(variant, |row| row.times.fresh) as f64 / count as f64 * 100.0;
            let (told, after) = if variant.is_ours() {
                let told = self.sum(variant, |row| row.goaways);
                (told.to_string(), self.sum(variant, |row| row.goaways_after).to_string())
            } else {
                ("-".to_owned(), "-".to_owned())
            };
            let _ = writeln!(
                text,
                "| {} | {fresh:.2} % | {} | {} | {:.0} for {} | {told} | {after} |",
                variant.name(),
                self.sum(variant, |row| row.reconnects),
                self.sum(variant, |row| row.reconnects_after),
                self.median(|run| run.row(variant).open as f64),
                self.runs[0].row(variant).kubelets,
            );
        }
        let seconds: Vec<String> = self
            .runs
            .iter()
            .map(|run| format!("{:.0} s ({:.0} s at rest were measured)", run.level_after, run.rest_s))
            .collect();
        let loads = |variant: Variant| {
            let each = self.runs.iter().map(|run| format!("{:?}", run.row(variant).loads));
            each.collect::<Vec<_>>().join(", ")
        };
        let _ = writeln!(
            text,
            "\nThe load was level again after the restart, agents at rest: {}. Sockets of its apiservers at the end, as haproxy \
             counts them: {}.{}",
            seconds.join("; "),
            loads(self.ours()),
            if self.variants().any(|variant| variant == Variant::Restart) {
                format!(
                    " Of the three with nothing and the same restart: {}.",
                    loads(Variant::Restart)
                )
            } else {
                String::new()
            }
        );
        text
    }

    /// What each variant's parts used.
    fn used(&self) -> String {
        let mut text = "| | apiserver, ms of processor a second | in front of it | agents | apiserver, MiB | in front | agents |\n\
                        |---|--:|--:|--:|--:|--:|--:|\n"
            .to_owned();
        for variant in self.variants() {
            let share = variant.apiservers() as f64;
            let ms = |of: fn(&Row) -> u64| {
                self.median(|run| of(run.row(variant)) as f64) / 1e6 / self.effort.seconds as f64 / share
            };
            let mib = |of: fn(&Row) -> u64| self.median(|run| of(run.row(variant)) as f64) / 1024.0 / share;
            let _ = writeln!(
                text,
                "| {} | {:.1} | {:.1} | {:.1} | {:.0} | {:.1} | {:.1} |",
                variant.name(),
                ms(|row| row.used.apiservers_ns),
                ms(|row| row.used.front_ns),
                ms(|row| row.used.agents_ns),
                mib(|row| row.used.apiservers_kib),
                mib(|row| row.used.front_kib),
                mib(|row| row.used.agents_kib),
            );
        }
        text += "\nEach for one apiserver; one that is killed counts with what it used until then, and its successor with its start and the \
                 memory of a young process.\n";
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_an_even_number_lies_between_two() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(Vec::new()).is_nan());
    }

    #[test]
    fn a_ratio_is_to_the_mean_of_both_who_have_nothing_and_the_spread_is_at_least_one() {
        let row = |p50| {
            let mut row = Row::default();
            row.times.p50 = p50;
            row.times_after.p50 = if p50 == 6.0 { 3.0 } else { 1.0 };
            row
        };
        let rows = [
            (Variant::None, row(2.0)),
            (Variant::NoneAgain, row(4.0)),
            (Variant::High, row(6.0)),
        ];
        let run = Run {
            rows: rows.into_iter().collect(),
            level_after: 0.0,
            rest_s: 0.0,
            idle: 0.0,
            idle_at_rest: 0.0,
        };
        assert_eq!(run.ratio(Variant::High, Part::Whole, P50), 2.0);
        assert_eq!(run.spread(Part::Whole, P50), 2.0);
        assert_eq!(run.ratio(Variant::High, Part::After, P50), 3.0);
    }
}
