//! Faults on live clusters of real apiservers, one after the other and in pairs, and what clients noticed of each.
//!
//! Two clusters of the same make stand side by side: one with relays and agents that act, one whose agents tell nobody and
//! whose clients talk to the apiservers themselves. Each fault that exists without relay and agent hits both at the same
//! moment, so that what it breaks by itself is not taken for ours.
//! Must never call a fault harmless that was not seen to be there.

mod clock;
pub mod command;
mod fault;
pub(crate) mod limits;
mod look;
mod report;
mod side;

use std::time::{Duration, Instant};

use anyhow::Context as _;

pub(crate) use self::{
    fault::Fault,
    report::Row,
    side::{Make, Side},
};
use self::{look::Look, report::Noticed};
use crate::{demo::scene::check_interrupt, process::wait_for};

/// How long a cluster may take to serve all clients again, and then to be level: where two apiservers were restarted one after the
/// other, agents wait five minutes for the third before they spread clients.
const PATIENCE: Duration = Duration::from_secs(240 + 300);

/// For how long nothing more may happen after that.
const QUIET: Duration = Duration::from_secs(8);

/// Both clusters.
pub(crate) struct Pair {
    /// With relays and agents that act.
    pub with_us: Side,
    /// Without, where it is compared.
    without: Option<Side>,
}

impl Pair {
    /// One with us that nothing is compared with.
    pub fn alone(with_us: Side) -> Self {
        Self { with_us, without: None }
    }

    /// Plays some faults at once, the first on the node of that index, the second on the next, and looks at what is left.
    ///
    /// # Errors
    ///
    /// A fault cannot be made, or a cluster does not come back: that is a finding, and the run ends.
    pub fn play(&mut self, faults: &[Fault], first: usize, say: &dyn Fn(&str)) -> anyhow::Result<Row> {
        let node = |index: usize| (first + index) % Side::NODES;
        let names: Vec<_> = faults.iter().map(|fault| fault.name()).collect();
        say(&format!("{}: {}", names.join(" + "), faults[0].what()));
        let before = Look::at(&self.with_us.cluster)?;
        if let Some(side) = &mut self.without
            && faults.iter().any(|fault| fault.without_us().is_some())
        {
            side.start_anew().context("the cluster without us, before the fault")?;
        }
        for side in self.sides() {
            side.swarm.reset()?;
        }
        let sent = self.with_us.goaways();

        let mut made = Vec::new();
        for (index, fault) in faults.iter().enumerate() {
            made.push(fault.make(&mut self.with_us.cluster, node(index))?);
        }
        let mut of_control = Vec::new();
        if let Some(side) = &mut self.without {
            for (index, fault) in faults.iter().enumerate() {
                if let Some(fault) = fault.without_us() {
                    of_control.push(fault.make(&mut side.cluster, node(index))?);
                }
            }
        }
        let lasts = faults.iter().map(|fault| fault.lasts()).max().unwrap_or_default();
        let since = Instant::now();
        while since.elapsed() < lasts {
            check_interrupt()?;
            // This is how long the fault is there, and not a wait for a state.
            std::thread::park_timeout(Duration::from_millis(200));
        }
        for one in made.into_iter().rev() {
            one.end(&mut self.with_us.cluster)?;
        }
        if let Some(side) = &mut self.without {
            for one in of_control.into_iter().rev() {
                one.end(&mut side.cluster)?;
            }
        }
        for side in self.sides() {
            side.revive().context("after the fault")?;
        }
        let during = Noticed::of(&self.with_us.swarm.line()?);
        let control = match &mut self.without {
            Some(side) => Some(Noticed::of(&side.swarm.line()?)),
            None => None,
        };
        let mut texts = self.with_us.swarm.line()?.error_texts.unwrap_or_default();

        // From here on nothing is broken: what clients notice now is ours.
        self.with_us.swarm.reset()?;
        let healed = Instant::now();
        let told_meanwhile = self.with_us.goaways().saturating_sub(sent);
        let (loads, least) = self.with_us.least()?;
        let seconds_to_level = self.with_us.levels(PATIENCE)?.then(|| healed.elapsed().as_secs_f64());
        let told = self.with_us.goaways().saturating_sub(sent);
        let quiet = Instant::now();
        while quiet.elapsed() < QUIET {
            check_interrupt()?;
            std::thread::park_timeout(Duration::from_millis(200));
        }
        let line = self.with_us.swarm.line()?;
        let after = Noticed::of(&line);
        texts.extend(line.error_texts.unwrap_or_default());
        let told_after = self.with_us.goaways().saturating_sub(sent + told);
        // Health checks come and go between two looks: what is wrong stays wrong.
        let mut wrong = Vec::new();
        let agreed = wait_for(Duration::from_secs(30), || {
            match look::wrong_connections(&self.with_us.cluster) {
                Ok(found) if found.is_empty() => Some(()),
                Ok(found) => {
                    wrong = found;
                    None
                }
                Err(error) => {
                    wrong = vec![format!("{error:#}")];
                    None
                }
            }
        });
        let at_end = Look::at(&self.with_us.cluster)?;
        let row = Row {
            faults: names.iter().map(|name| (*name).to_owned()).collect(),
            plays: 1,
            is_ours: faults.iter().all(|fault| fault.is_ours()),
            during,
            control,
            after,
            error_texts: texts,
            loads_after_fault: loads,
            lower_bound: least,
            goaways_during: told_meanwhile,
            goaways: told,
            goaways_after: told_after,
            seconds_to_level,
            wrong_connections: if agreed.is_some() { Vec::new() } else { wrong },
            leaks: at_end.grown_since(&before),
            memory_mib: at_end.memory(),
        };
        say(&format!("  {}", row.sentence()));
        Ok(row)
    }

    fn sides(&mut self) -> impl Iterator<Item = &mut Side> {
        std::iter::once(&mut self.with_us).chain(&mut self.without)
    }

    /// Ends both.
    pub fn end(&mut self) {
        for side in self.sides() {
            side.cluster.end();
            side.keep();
        }
    }
}
