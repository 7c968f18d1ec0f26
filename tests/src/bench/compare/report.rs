//! The figures as one JSON object, and the tables of docs/compare.md.
//!
//! Must never show one contender's figure where another's is left out.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::{Contender, Figures, Level, Part, Row, world::Used};
use crate::{
    bench::machine::{kernel_release, processor},
    fixture::VERSION,
};

fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// Loads side by side.
fn shown(loads: &[usize]) -> String {
    let texts: Vec<String> = loads.iter().map(ToString::to_string).collect();
    texts.join(" / ")
}

impl Level {
    fn json(&self) -> Value {
        json!({
            "level_after_s": self.found.map(|found| rounded(found.second)),
            "share_of_looks_after": self.share().map(rounded),
        })
    }

    /// Which share of the looks since then were level.
    fn share(&self) -> Option<f64> {
        self.found?;
        Some(self.level_after as f64 / self.looks_after.max(1) as f64)
    }

    fn text(&self, seconds: u64) -> String {
        match (self.found, self.share()) {
            (Some(found), Some(share)) if share < 0.995 => {
                format!("{:.0} s, then in {:.0} % of looks", found.second, share * 100.0)
            }
            (Some(found), _) => format!("{:.0} s", found.second),
            (None, _) => format!("not within {seconds} s"),
        }
    }
}

impl Part {
    fn json(&self) -> Value {
        json!({
            "requests": self.times.count,
            "failed": self.errors,
            "broken_watches": self.broken,
            "early_watches": self.early,
            "stalls": self.times.stalls,
            "ms": {
                "average": rounded(self.times.average),
                "p50": rounded(self.times.p50),
                "p99": rounded(self.times.p99),
                "max": rounded(self.times.max),
            },
        })
    }
}

impl Row {
    /// Connections opened after the load was level.
    fn moves_after(&self) -> Option<u64> {
        self.requests.found.map(|found| self.moves - found.dials)
    }

    /// Milliseconds of processor time a second.
    fn ms(&self, used: Used) -> f64 {
        used.ns as f64 / 1e6 / self.seconds
    }

    fn json(&self) -> Value {
        let used = |used: Used| json!({"cpu_ms_per_s": rounded(self.ms(used)), "mib": rounded(mib(used))});
        json!({
            "ready_after_s": self.ready_s.map(rounded),
            "requests": self.requests.json(),
            "watches": self.watches.json(),
            "kubelets_at_the_end": self.requests_end,
            "watches_at_the_end": self.watches_end,
            "moves": self.moves,
            "moves_after_level": self.moves_after(),
            "open_at_the_end": self.open,
            "kill": self.kill.json(),
            "after": self.after.json(),
            "front": used(self.spent.front),
            "agents": used(self.spent.agents),
            "apiservers": used(self.spent.apiservers),
        })
    }

    /// For who waits.
    pub fn line(&self) -> String {
        let texts = |part: &Part| {
            let mut texts = part.times.error_texts.clone().unwrap_or_default();
            texts.truncate(2);
            texts
        };
        format!(
            "{}: {}; kill {:?}; after {:?}",
            self.contender.name(),
            self.json(),
            texts(&self.kill),
            texts(&self.after)
        )
    }
}

fn mib(used: Used) -> f64 {
    used.kib as f64 / 1024.0
}

impl Figures {
    /// The object of figures.
    pub fn json(&self) -> Value {
        let mut contenders = Map::new();
        for row in &self.rows {
            contenders.insert(row.contender.key().to_owned(), row.json());
        }
        json!({
            "kubelets": self.effort.kubelets,
            "seconds": self.effort.seconds,
            "requests_per_kubelet_and_s": rounded(self.rate()),
            "contenders": contenders,
            "steer_left_out": self.no_steer,
        })
    }

    /// Requests of one kubelet a second, watches excluded, after the restart, of all contenders.
    fn rate(&self) -> f64 {
        let requests: u64 = self.rows.iter().map(|row| row.after.times.count).sum();
        let seconds: f64 = self.rows.iter().map(|row| row.seconds).sum();
        requests as f64 / seconds / self.effort.kubelets as f64
    }

    /// What is between the marks of docs/compare.md.
    pub fn page(&self) -> String {
        let envoy = self
            .envoy
            .as_ref()
            .map(|version| format!("Envoy {version}, "))
            .unwrap_or_default();
        let mut page = format!(
            "{} kubelets, kube-apiserver {VERSION}, {envoy}haproxy {}, on {} with Linux {}; one run each, {} s from the \
             restart on.\n",
            self.effort.kubelets,
            self.haproxy,
            processor(),
            kernel_release(),
            self.effort.seconds,
        );
        if self.no_steer.is_some() {
            let _ = writeln!(
                page,
                "`steer` was not run: this machine's kernel, {}, does not let a probe answer (`rebalancer system-info` says \
                 so); [steer.md](steer.md) says which do, and [bench.md](bench.md) has what it costs.",
                kernel_release()
            );
        }
        self.load(&mut page);
        self.clients(&mut page);
        self.costs(&mut page);
        page
    }

    fn load(&self, page: &mut String) {
        *page += "\n### The load\n\n\
                  | | ready | level by requests | kubelets at each at the end | level by watches | watches at each at the end \
                  | connections opened | of these after it was level | open at the end |\n\
                  |---|--:|--:|--:|--:|--:|--:|--:|--:|\n";
        let seconds = self.effort.seconds;
        for row in &self.rows {
            let _ = writeln!(
                page,
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                row.contender.name(),
                row.ready_s.map_or("-".to_owned(), |ready| format!("{ready:.0} s")),
                row.requests.text(seconds),
                shown(&row.requests_end),
                row.watches.text(seconds),
                shown(&row.watches_end),
                row.moves,
                row.moves_after().map_or("-".to_owned(), |moves| moves.to_string()),
                row.open,
            );
        }
        let rate = self.rate();
        let lotteries = [Contender::High, Contender::Low]
            .into_iter()
            .filter(|lottery| self.rows.iter().any(|row| row.contender == *lottery))
            .map(|lottery| {
                let chance = lottery.goaway_chance();
                format!("every {:.0} minutes at {chance}", 1.0 / (chance * rate) / 60.0)
            });
        let _ = writeln!(
            page,
            "\nThe first is the apiserver that was killed. A kubelet asked {rate:.2} times a second, watches excluded, so a \
             lottery tells it {}, level or not; clients that ask more are told sooner, and go on being told sooner.",
            lotteries.collect::<Vec<_>>().join(" and "),
        );
    }

    fn clients(&self, page: &mut String) {
        *page += "\n### What clients saw\n\n\
                  In the ten seconds of the kill, and after the restart:\n\n\
                  | | failed requests: kill | after | broken watches: kill | after | watches ended early: kill | after | stalls \
                  over 1 s: kill | after | average ms after | P50 | P99 | longest |\n\
                  |---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n";
        for row in &self.rows {
            let (kill, after) = (&row.kill, &row.after);
            let _ = writeln!(
                page,
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {:.1} | {:.1} | {:.1} | {:.0} |",
                row.contender.name(),
                kill.errors,
                after.errors,
                kill.broken,
                after.broken,
                kill.early,
                after.early,
                kill.times.stalls,
                after.times.stalls,
                after.times.average,
                after.times.p50,
                after.times.p99,
                after.times.max,
            );
        }
    }

    fn costs(&self, page: &mut String) {
        *page += "\n### What it costs\n\n\
                  | | in front: ms of processor a second | agents | the three apiservers | in front: MiB | agents | the three \
                  apiservers |\n|---|--:|--:|--:|--:|--:|--:|\n";
        for row in &self.rows {
            let spent = row.spent;
            let _ = writeln!(
                page,
                "| {} | {:.1} | {:.1} | {:.0} | {:.0} | {:.0} | {:.0} |",
                row.contender.name(),
                row.ms(spent.front),
                row.ms(spent.agents),
                row.ms(spent.apiservers),
                mib(spent.front),
                mib(spent.agents),
                mib(spent.apiservers),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Moment;
    use super::*;

    #[test]
    fn a_load_that_does_not_stay_level_is_said_to() {
        let mut level = Level::default();
        assert_eq!(level.text(180), "not within 180 s");
        level.found = Some(Moment { second: 61.4, dials: 0 });
        (level.looks_after, level.level_after) = (100, 100);
        assert_eq!(level.text(180), "61 s");
        level.level_after = 60;
        assert_eq!(level.text(180), "61 s, then in 60 % of looks");
    }
}
