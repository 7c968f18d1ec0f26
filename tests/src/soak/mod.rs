//! A cluster's days at speed: clients that come and go, and one thing or another that happens to it, hour after hour.
//!
//! Input: how long, and a seed. Output: what its processes held over that time, and what clients noticed.
//! Must never take growth for churn: the last node's processes are the same ones from the beginning to the end.

pub mod command;
mod picture;
mod report;
mod sample;

use std::time::{Duration, Instant};

use anyhow::Context as _;

use self::{report::Report, sample::Sample};
use crate::{
    chaos::{Fault, Pair, Side},
    demo::scene::check_interrupt,
};

/// How often it is looked at what the processes hold.
const EVERY: Duration = Duration::from_secs(10);

/// What happens to a cluster in a week, and how often: a restart is what makes a skew.
const DAYS: [(Fault, u64); 8] = [
    (Fault::ApiserverKilled, 5),
    (Fault::AgentReplaced, 2),
    (Fault::RelayReplaced, 2),
    (Fault::CertificatesRenewed, 1),
    (Fault::LeasesLost, 1),
    (Fault::Strangers, 1),
    (Fault::AgentsApart, 1),
    (Fault::BalancerKilled, 1),
];

/// What runs.
struct Soak<'a> {
    pair: Pair,
    began: Instant,
    report: Report,
    say: &'a dyn Fn(&str),
}

impl Soak<'_> {
    /// Goes on until the time is over.
    ///
    /// # Errors
    ///
    /// The cluster does not come back from something.
    fn run(&mut self, lasts: Duration, pause: Duration, seed: u64) -> anyhow::Result<()> {
        let mut draw = crate::chaos::command::drawn(seed);
        while self.began.elapsed() < lasts {
            self.rest(pause)?;
            let fault = chosen(draw());
            // The last node's own processes stay, so that what they hold can be followed.
            let nodes = if fault.ends_ours() {
                Side::NODES - 1
            } else {
                Side::NODES
            };
            let node = (draw() % nodes as u64) as usize;
            let row = self
                .pair
                .play(&[fault], node, self.say)
                .with_context(|| format!("after {} s", self.began.elapsed().as_secs()))?;
            self.report.happened(self.began.elapsed(), &row);
            self.look()?;
        }
        Ok(())
    }

    /// Nothing happens but clients that come and go: nobody may notice anything.
    fn rest(&mut self, pause: Duration) -> anyhow::Result<()> {
        let since = Instant::now();
        while since.elapsed() < pause {
            self.look()?;
            let until = Instant::now() + EVERY.min(pause);
            while Instant::now() < until {
                check_interrupt()?;
                self.pair.with_us.cluster.check()?;
                std::thread::park_timeout(Duration::from_millis(200));
            }
        }
        let heard = self.pair.with_us.heard()?;
        self.report.rested(&heard);
        Ok(())
    }

    fn look(&mut self) -> anyhow::Result<()> {
        let goaways = self.pair.with_us.goaways().by_order;
        let sample = Sample::at(self.began.elapsed(), &self.pair.with_us.cluster, goaways)?;
        self.report.samples.push(sample);
        Ok(())
    }
}

/// The one of the week's happenings that a number falls on.
fn chosen(number: u64) -> Fault {
    let all: u64 = DAYS.iter().map(|(_, weight)| weight).sum();
    let mut left = number % all;
    for (fault, weight) in DAYS {
        if left < weight {
            return fault;
        }
        left -= weight;
    }
    unreachable!("the rest of a division by the sum of all weights is below that sum")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_happening_has_its_share() {
        let all: u64 = DAYS.iter().map(|(_, weight)| weight).sum();
        for (fault, weight) in DAYS {
            assert_eq!(
                (0..all).filter(|number| chosen(*number) == fault).count() as u64,
                weight
            );
        }
    }
}
