//! The tables of docs/scale.md.
//!
//! Must never hold a figure that was not measured or follows from measured ones by a line of arithmetic beside it.

use std::fmt::Write as _;

use super::{ASKED, DECISIONS_A_DAY, Figures, Part, simulated::Outcome};
use crate::bench::machine::processor;

impl Figures {
    /// The tables, as Markdown: readable on a terminal too.
    pub fn page(&self) -> String {
        let mut page = String::new();
        self.write(&mut page)
            .expect("writing to a string fails only when memory does");
        page
    }

    fn write(&self, page: &mut String) -> std::fmt::Result {
        let Self {
            clients,
            seconds,
            parts,
            runs,
        } = self;
        writeln!(
            page,
            "{}. {clients} clients in all. Each column is a process of its own: one agent of that many, a full one, with what \
             its peers say; the talk is watched for {seconds} s.\n",
            processor()
        )?;
        let sizes: Vec<String> = parts.iter().map(|part| part.apiservers.to_string()).collect();
        writeln!(page, "| apiservers | {} |", sizes.join(" | "))?;
        writeln!(page, "|---|{}", "--:|".repeat(parts.len()))?;
        let peers = |part: &Part| (part.apiservers - 1) as f64;
        let asked = |part: &Part| ASKED * peers(part);
        let exchange = |part: &Part| (part.talk.question_octets + part.talk.answer_octets) as f64;
        type Row<'a> = (&'a str, usize, Box<dyn Fn(&Part) -> f64 + 'a>);
        let row = |title, digits, figure: Box<dyn Fn(&Part) -> f64>| -> Row<'_> { (title, digits, figure) };
        let rows = [
            row("connections in its table", 0, Box::new(|part| part.connections as f64)),
            row("a snapshot, octets", 0, Box::new(|part| part.snapshot_octets as f64)),
            row(
                "a question on the wire, octets",
                0,
                Box::new(|part| part.talk.question_octets as f64),
            ),
            row(
                "an answer on the wire, octets",
                0,
                Box::new(|part| part.talk.answer_octets as f64),
            ),
            row("questions asked, and answered, a second", 0, Box::new(asked)),
            row(
                "an agent sends, Mbit/s",
                2,
                Box::new(move |part| asked(part) * exchange(part) * 8.0 / 1e6),
            ),
            row(
                "all agents send, Mbit/s",
                1,
                Box::new(move |part| part.apiservers as f64 * asked(part) * exchange(part) * 8.0 / 1e6),
            ),
            row(
                "a handshake, octets both ways",
                0,
                Box::new(|part| part.talk.handshake_octets as f64),
            ),
            row("a handshake, both ends, µs", 0, Box::new(|part| part.talk.handshake_us)),
            row(
                "handshakes when all agents begin anew",
                0,
                Box::new(move |part| part.apiservers as f64 * peers(part)),
            ),
            row(
                "the talk while nothing happens, % of a core",
                2,
                Box::new(|part| 100.0 * part.talk.share),
            ),
            row(
                "a peer is heard while nothing happens, µs",
                1,
                Box::new(|part| part.quiet_us),
            ),
            row(
                "the same while clients are on their way, µs",
                1,
                Box::new(|part| part.busy_us),
            ),
            row(
                "the talk then, % of a core",
                1,
                Box::new(move |part| {
                    100.0 * (part.talk.share + asked(part) * (part.busy_us - part.quiet_us).max(0.0) / 1e6)
                }),
            ),
            row("a plan, ms", 2, Box::new(|part| part.plan_ms)),
            row("the table, MiB", 1, Box::new(|part| part.table_mib)),
            row("all of the process, MiB", 1, Box::new(|part| part.process_mib)),
            row(
                "a line of the decision log, octets",
                0,
                Box::new(|part| part.hold_octets as f64),
            ),
            row(
                "each victim in it, octets",
                0,
                Box::new(|part| part.victim_octets as f64),
            ),
            row(
                "the decision log of a level day, MB",
                0,
                Box::new(|part| part.hold_octets as f64 * DECISIONS_A_DAY / 1e6),
            ),
            row("/v1/peers, octets", 0, Box::new(|part| part.peers_octets as f64)),
            row(
                "/v1/decisions, the newest hundred, kB",
                0,
                Box::new(|part| part.hold_octets as f64 * 100.0 / 1e3),
            ),
        ];
        for (title, digits, figure) in rows {
            let figures: Vec<String> = parts.iter().map(|part| format!("{:.digits$}", figure(part))).collect();
            writeln!(page, "| {title} | {} |", figures.join(" | "))?;
        }

        writeln!(page, "\n64 apiservers in the simulator, one run each (seed 0).\n")?;
        writeln!(
            page,
            "| case | clients | level after, s | GOAWAYs | needed | afterwards | most told in 1 s | most landed on one in 1 s | \
             skew at the end | longest hold | decisions |"
        )?;
        writeln!(page, "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|")?;
        for Outcome {
            title,
            clients,
            level_s,
            goaways,
            needed,
            afterwards,
            most_told,
            most_landed,
            last_skew,
            decisions,
            longest_hold,
            processor_s: _,
        } in runs
        {
            let level = level_s.map_or("never".to_owned(), |seconds| format!("{seconds:.0}"));
            let needed = needed.map_or(String::new(), |needed| format!("{needed:.0}"));
            let hold = longest_hold.map_or(String::new(), |(reason, seconds)| format!("`{reason}` {seconds:.0} s"));
            writeln!(
                page,
                "| {title} | {clients} | {level} | {goaways} | {needed} | {afterwards} | {most_told} | {most_landed:.0} | \
                 {:.1} % | {hold} | {decisions} |",
                100.0 * last_skew,
            )?;
        }
        Ok(())
    }
}
