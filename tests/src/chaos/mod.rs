//! Faults on live clusters of real apiservers, one after the other and in pairs, and what clients noticed of each.
//!
//! Two clusters of the same make stand side by side: one with relays and agents that act, one whose agents tell nobody and
//! whose clients talk to the apiservers themselves. Each fault that exists without relay and agent hits both at the same
//! moment, so that what it breaks by itself is not taken for ours.
//! Must never call a fault harmless that was not seen to be there.

mod clock;
pub mod command;
mod evidence;
mod fault;
pub(crate) mod limits;
mod look;
mod made;
mod noticed;
mod report;
mod row;
mod side;

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

pub(crate) use self::{
    fault::Fault,
    row::Row,
    side::{Heard, Make, Side},
};
use self::{
    look::{First, Look},
    made::Made,
    row::Bound,
};
use crate::{
    demo::{cluster::Cluster, scene::check_interrupt},
    process::wait_for,
};

/// How long a cluster may take to serve all clients again, and then to be level: where two apiservers were restarted one after the
/// other, agents wait five minutes for the third before they spread clients.
const PATIENCE: Duration = Duration::from_secs(240 + 300);

/// For how long nothing more may happen after that.
const QUIET: Duration = Duration::from_secs(8);

/// So many GOAWAYs more than a quarter above the least are no finding: chance makes a skew of its own with so few clients.
const SLACK: u64 = 12;

/// How long a process or a load balancer may take to be back where it was between two looks.
const SETTLES: Duration = Duration::from_secs(90);

/// Both clusters.
pub(crate) struct Pair {
    /// With relays and agents that act.
    pub with_us: Side,
    /// Without, where it is compared.
    without: Option<Side>,
    /// What each process of ours held when it was first looked at.
    first: First,
    /// Certificates were renewed: for an hour relays have clients go by themselves.
    renews: bool,
}

/// Faults on one side.
struct Playing {
    made: Vec<Made>,
}

impl Playing {
    /// Makes them, each on its node.
    fn begin(faults: impl Iterator<Item = (Fault, usize)>, cluster: &mut Cluster) -> anyhow::Result<Self> {
        let made = faults.map(|(fault, node)| {
            let made = fault.make(cluster, node);
            made.with_context(|| format!("{} on node {}", fault.name(), node + 1))
        });
        Ok(Self {
            made: made.collect::<anyhow::Result<_>>()?,
        })
    }

    /// Goes on with them; whether each has done all it does.
    fn goes_on(&mut self, cluster: &mut Cluster) -> anyhow::Result<bool> {
        let mut done = true;
        for one in &mut self.made {
            done &= one.goes_on(cluster)?;
        }
        Ok(done)
    }

    /// Takes them away; by what it was seen that they were there.
    fn end(self, cluster: &mut Cluster) -> anyhow::Result<Vec<String>> {
        let seen = self.made.iter().map(|one| one.seen(cluster));
        let seen = seen
            .collect::<anyhow::Result<Vec<_>>>()
            .context("the fault was not there")?;
        for one in self.made.into_iter().rev() {
            one.end(cluster)?;
        }
        Ok(seen)
    }
}

impl Pair {
    /// With that one, and the other where it is compared.
    pub fn new(with_us: Side, without: Option<Side>) -> Self {
        Self {
            with_us,
            without,
            first: First::default(),
            renews: false,
        }
    }

    /// Plays some faults at once, the first on the node of that index, the second on the next, and looks at what is left.
    ///
    /// # Errors
    ///
    /// A fault cannot be made, is not seen to be there, or a cluster does not come back: that is a finding, and the run ends.
    pub fn play(&mut self, faults: &[Fault], first: usize, say: &dyn Fn(&str)) -> anyhow::Result<Row> {
        let on: Vec<(Fault, usize)> = (first..)
            .map(|node| node % Side::NODES)
            .zip(faults)
            .map(|(node, fault)| (*fault, node))
            .collect();
        let names: Vec<_> = faults.iter().map(|fault| fault.name()).collect();
        say(&format!("{}: {}", names.join(" + "), faults[0].what()));
        let before = Look::at(&self.with_us.cluster)?;
        self.first.know(&before);
        let loads_before = self.with_us.cluster.loads()?;
        let without_us = || on.iter().filter_map(|(fault, node)| Some((fault.without_us()?, *node)));
        let mut other = self.without.as_mut().filter(|_| without_us().next().is_some());
        if let Some(side) = &mut other {
            side.start_anew().context("the cluster without us, before the fault")?;
        }
        let sent = self.with_us.goaways();

        let began = Instant::now();
        let mut ours = Playing::begin(on.iter().copied(), &mut self.with_us.cluster)?;
        let mut of_control = match &mut other {
            Some(side) => Some(Playing::begin(without_us(), &mut side.cluster)?),
            None => None,
        };
        let lasts = faults.iter().map(|fault| fault.lasts()).max().unwrap_or_default();
        loop {
            check_interrupt()?;
            let mut done = ours.goes_on(&mut self.with_us.cluster)?;
            if let (Some(side), Some(playing)) = (&mut other, &mut of_control) {
                done &= playing.goes_on(&mut side.cluster)?;
            }
            // This is how long the fault is there, and not a wait for a state.
            if done && began.elapsed() >= lasts {
                break;
            }
            ensure!(
                began.elapsed() < PATIENCE,
                "{}: it does not come to its end",
                names.join(" + ")
            );
            std::thread::park_timeout(Duration::from_millis(200));
        }
        let seen = ours.end(&mut self.with_us.cluster)?;
        if let (Some(side), Some(playing)) = (&mut other, of_control) {
            playing.end(&mut side.cluster).context("the cluster without us")?;
        }
        self.with_us.revive().context("after the fault")?;
        let during = self.with_us.heard()?;
        let control = match &mut other {
            Some(side) => {
                side.revive().context("the cluster without us, after the fault")?;
                Some((side.heard()?.noticed, side.cluster.loads()?))
            }
            None => None,
        };

        // From here on nothing is broken: what clients notice now is ours.
        let healed = Instant::now();
        let told_meanwhile = self.with_us.goaways().since(sent);
        let loads = self.with_us.cluster.loads()?;
        let least = self.with_us.least(&loads)?;
        let seconds_to_level = self.with_us.levels(PATIENCE)?.then(|| healed.elapsed().as_secs_f64());
        let told = self.with_us.goaways().since(sent);
        let quiet = Instant::now();
        while quiet.elapsed() < QUIET {
            check_interrupt()?;
            std::thread::park_timeout(Duration::from_millis(200));
        }
        let after = self.with_us.heard()?;
        ensure!(
            after.noticed.requests > 0 && after.noticed.events >= self.with_us.clients(),
            "clients say nothing of what they saw: {after:?}"
        );
        let told_after = self.with_us.goaways().since(sent).since(told);
        let uneven = settled(|| Ok(self.with_us.uneven()?.into_iter().collect()));
        // Health checks come and go between two looks: what is wrong stays wrong.
        let wrong = settled(|| look::wrong_connections(&self.with_us.cluster));
        let mut leaks = settled(|| look::left_over(&mut self.with_us.cluster));
        let at_end = Look::at(&self.with_us.cluster)?;
        leaks.extend(at_end.grown_since(&before));
        leaks.extend(self.first.grown_to(&at_end));
        self.renews |= faults.contains(&Fault::CertificatesRenewed);
        let renewed = if self.renews {
            Fault::renewal(began.elapsed())
        } else {
            0
        };
        let bound = bound(
            &on,
            self.with_us.least(&left_alone(&loads_before, &on))?,
            match &control {
                Some((_, loads)) => self.with_us.least(loads)?,
                None => 0,
            },
            renewed,
        );
        // What came when nothing was broken is read first.
        let mut texts = after.texts;
        texts.extend(during.texts);
        let row = Row {
            faults: names.iter().map(|name| (*name).to_owned()).collect(),
            node: first,
            seen,
            plays: 1,
            is_ours: faults.iter().all(|fault| fault.is_ours()),
            cut: cut(&loads_before, &on),
            during: during.noticed,
            control: control.map(|(noticed, _)| noticed),
            after: after.noticed,
            error_texts: texts,
            loads_after_fault: loads,
            lower_bound: least,
            goaways_during: told_meanwhile.by_order,
            goaways: told.by_order,
            goaways_by_itself: told.by_itself,
            bound,
            goaways_after: told_after.by_order,
            seconds_to_level,
            uneven,
            wrong_connections: wrong,
            leaks,
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

/// What is found and stays; nothing when a look finds nothing.
fn settled(mut look: impl FnMut() -> anyhow::Result<Vec<String>>) -> Vec<String> {
    let mut found = Vec::new();
    let gone = wait_for(SETTLES, || {
        found = look().unwrap_or_else(|error| vec![format!("{error:#}")]);
        found.is_empty().then_some(())
    });
    if gone.is_some() { Vec::new() } else { found }
}

/// The loads when the clients that faults part from what served them have gone to the others, each to as many.
fn left_alone(loads: &[u64], on: &[(Fault, usize)]) -> Vec<u64> {
    let parted: Vec<usize> = on
        .iter()
        .filter(|(fault, _)| fault.empties())
        .map(|(_, node)| *node)
        .collect();
    let moved: u64 = parted.iter().map(|node| loads[*node]).sum();
    let others = (loads.len() - parted.len()).max(1) as u64;
    let of = |(index, load): (usize, &u64)| {
        if parted.contains(&index) {
            0
        } else {
            load + moved / others
        }
    };
    loads.iter().enumerate().map(of).collect()
}

/// How many clients faults part from what served them.
fn cut(loads: &[u64], on: &[(Fault, usize)]) -> u64 {
    if on.iter().any(|(fault, _)| fault.parts_all()) {
        return loads.iter().sum();
    }
    let parted = on.iter().filter(|(fault, _)| fault.parts());
    parted.map(|(fault, node)| loads[*node] * fault.times()).sum()
}

/// How many GOAWAYs there may be: what levels the loads that the faults leave, by the loads before them or by those that they left
/// without us, each time they do, and some more; and by relays themselves those whose certificate towards the apiserver is renewed.
fn bound(on: &[(Fault, usize)], least: u64, without_us: u64, renewed: u64) -> Bound {
    let times = on.iter().map(|(fault, _)| fault.times()).max().unwrap_or(1);
    let parts = on.iter().any(|(fault, _)| fault.empties() || !fault.is_ours());
    let is_bounded = on
        .iter()
        .all(|(fault, _)| fault.is_ours() && *fault != Fault::RelayReplaced);
    Bound {
        by_order: if parts {
            least.max(without_us) * times * 5 / 4 + SLACK
        } else {
            0
        },
        by_itself: is_bounded.then_some(renewed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goaways_are_bound_by_what_the_fault_parts_and_not_by_what_was_done_about_it() {
        let loads = [50, 50, 50];
        let killed = [(Fault::ApiserverKilled, 1)];
        assert_eq!(left_alone(&loads, &killed), [75, 0, 75]);
        assert_eq!(cut(&loads, &killed), 50);
        assert_eq!(cut(&loads, &[(Fault::BalancerKilled, 0)]), 150);
        let bound = |on: &[(Fault, usize)], least, without| super::bound(on, least, without, 0);
        assert_eq!(bound(&killed, 100, 120).by_order, 150 + SLACK);
        assert_eq!(bound(&[(Fault::AgentKilled, 0)], 3, 0).by_order, 0, "nobody is parted");
        assert_eq!(bound(&[(Fault::AgentKilled, 0)], 3, 0).by_itself, Some(0));
        assert_eq!(
            bound(&killed, 100, 0).by_itself,
            None,
            "a relay says that its apiserver has gone"
        );
        assert_eq!(left_alone(&loads, &[(Fault::ClockStepped, 0)]), loads);
    }
}
