//! `chaos`: which faults, in which order, and where the page goes.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, ensure};
use clap::Args;

use super::{
    Make, Pair, Row, Side,
    fault::{ALL, Fault, Stage},
    limits,
    report::{Report, Run},
    side::PYTHON,
};
use crate::{
    fixture::Fixture,
    node::Shim,
    process::{is_emulated, log_directory, open_files},
};

/// The faults of a quick run: one of each kind that costs little.
const QUICK: [Fault; 6] = [
    Fault::AgentKilled,
    Fault::RelayReplaced,
    Fault::ApiserverKilled,
    Fault::NoDescriptors,
    Fault::CertificatesRenewed,
    Fault::ClockStepped,
];

/// What it takes.
#[derive(Args)]
pub struct Arguments {
    /// A few faults of each kind and no pairs
    #[arg(long)]
    quick: bool,
    /// These faults only, by name and comma, instead of all; several at once with `+`
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    only: Vec<String>,
    /// So many pairs of faults at once, after the single ones
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u16).range(0..=200))]
    pairs: u16,
    /// What the pairs are drawn by
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Clients of each cluster
    #[arg(long, default_value_t = 150, value_parser = clap::value_parser!(u16).range(30..=2000))]
    clients: u16,
    /// What sends the GOAWAY: with `steer` no second cluster is played, the faults are those that concern it, and where no
    /// kube-apiserver is at hand small servers on its own filter stand in its place
    #[arg(long, value_enum, default_value_t = Shim::Relay)]
    shim: Shim,
    /// Options of haproxy's servers
    #[arg(long, default_value = "inter 1s fall 2 rise 2")]
    lb_options: String,
    /// No second cluster without us: what a fault breaks by itself is then not looked at
    #[arg(long)]
    alone: bool,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
    /// Where the page goes
    #[arg(long)]
    page: Option<PathBuf>,
}

impl Arguments {
    fn rounds(&self, stage: Stage) -> anyhow::Result<Vec<Vec<Fault>>> {
        let known = |name: &str| {
            let all = || ALL.into_iter().filter(|fault| fault.is_of(stage));
            let found = all().find(|fault| fault.name() == name);
            found.with_context(|| {
                let names: Vec<_> = all().map(Fault::name).collect();
                format!("--only {name}: allowed are {}", names.join(", "))
            })
        };
        if !self.only.is_empty() {
            let at_once = |names: &String| names.split('+').map(known).collect();
            return self.only.iter().map(at_once).collect();
        }
        let single = if self.quick { QUICK.to_vec() } else { ALL.to_vec() };
        let of_this = single.into_iter().filter(|fault| fault.is_of(stage));
        let mut rounds: Vec<Vec<Fault>> = of_this.map(|fault| vec![fault]).collect();
        if !self.quick {
            rounds.extend(
                pairs(self.seed, usize::from(self.pairs), stage)
                    .into_iter()
                    .map(|pair| pair.to_vec()),
            );
        }
        Ok(rounds)
    }
}

/// Numbers from a seed, by splitmix64 (Steele, Lea, Flood 2014): the same on every machine.
pub(crate) fn drawn(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// Two different faults each, drawn by the seed.
fn pairs(seed: u64, count: usize, stage: Stage) -> Vec<[Fault; 2]> {
    let all: Vec<Fault> = ALL.into_iter().filter(|fault| fault.is_of(stage)).collect();
    let mut next = drawn(seed);
    let mut drawn = Vec::with_capacity(count);
    while drawn.len() < count {
        let mut draw = || all[(next() % all.len() as u64) as usize];
        let pair = [draw(), draw()];
        if pair[0] != pair[1] && !both_whole(pair) {
            drawn.push(pair);
        }
    }
    drawn
}

/// Both hit the one etcd or the one load balancer: one could not be told from the other.
fn both_whole(pair: [Fault; 2]) -> bool {
    let all = |of: &[Fault]| pair.iter().all(|fault| of.contains(fault));
    all(&[
        Fault::EtcdKilled,
        Fault::EtcdStopped,
        Fault::EtcdMemberKilled,
        Fault::EtcdMemberStopped,
    ]) || all(&[Fault::BalancerKilled, Fault::BalancerStopped, Fault::BalancerLate])
}

/// So often a round is played at most.
const PLAYS: usize = 3;

/// Years of faults come within an hour: by the usual cool-down nobody would be left who may be told.
const COOLDOWN: &str = "--client-cooldown=30s";

/// Watches go with their clients.
const HANDOVER: &str = "--watch-handover=5s";

/// Plays a round, and again where all that is not clean of it is that the fault broke more with us than without: how many
/// requests a kill hits goes by the moment, so that two counts of one kill say little. Then it is played as often as it ever is:
/// who stopped at the first good sum would find one.
fn played(pair: &mut Pair, faults: &[Fault], node: usize, say: &dyn Fn(&str)) -> anyhow::Result<Row> {
    let mut row = pair.play(faults, node, say)?;
    if row.may_be_chance() {
        say("  it is played again, and counts of all plays are held against each other");
        for _ in 1..PLAYS {
            row = row.and(pair.play(faults, node, say)?);
        }
    }
    Ok(row)
}

/// Plays them.
///
/// # Errors
///
/// The clusters do not start, or one does not come back after a fault.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let say = |line: &str| eprintln!("{line}");
    let fixture = match arguments.shim {
        Shim::Steer => Fixture::at_hand(),
        Shim::Relay | Shim::None => Some(Fixture::get(say)?),
    };
    let rounds = arguments.rounds(Stage {
        shim: arguments.shim,
        is_real: fixture.is_some(),
    })?;
    limits::own_mounts()?;
    let interrupts = crate::demo::interrupts()?;
    open_files().context("cannot ask how many files may be open")?;
    let directory = log_directory("rebalancer-chaos-")?;
    let clients = usize::from(arguments.clients);
    let compared = !arguments.alone && arguments.shim != Shim::Steer;
    let short = if is_emulated() { 0.2 } else { 2.0 };
    let make = |shim: Shim, name: &str| {
        Side::start(
            Make {
                fixture: fixture.as_ref(),
                clients,
                shim,
                lb_options: &arguments.lb_options,
                agent_flags: vec![COOLDOWN.to_owned()],
                relay_flags: vec![HANDOVER.to_owned()],
                client_flags: vec![format!("--short={short}")],
                directory: directory.join(name),
            },
            &say,
        )
    };
    let with_us = make(arguments.shim, "with").with_context(|| format!("logs: {}", directory.display()))?;
    let mut pair = Pair::new(with_us, compared.then(|| make(Shim::None, "without")).transpose()?);
    let mut rows = Vec::new();
    let mut broken = None;
    let mut draw = drawn(arguments.seed);
    for faults in &rounds {
        let node = (draw() % Side::NODES as u64) as usize;
        match played(&mut pair, faults, node, &say) {
            Ok(row) => rows.push(row),
            Err(error) => {
                let names: Vec<_> = faults.iter().map(|fault| fault.name()).collect();
                broken = Some(error.context(format!("{}; logs: {}", names.join(" + "), directory.display())));
                break;
            }
        }
    }
    let version = pair.with_us.cluster.version();
    pair.end();
    drop(interrupts);
    let report = Report::of(
        rows,
        Run {
            seed: arguments.seed,
            clients,
            compared,
            apiserver_version: version,
            steers: arguments.shim == Shim::Steer,
            python: if is_emulated() { 0 } else { PYTHON },
            lb_options: arguments.lb_options.clone(),
            flags: format!("`{COOLDOWN}` and `{HANDOVER}`"),
        },
    );
    // A run that was broken off has seen too little for one.
    if let Some(page) = arguments.page.as_ref().filter(|_| broken.is_none()) {
        std::fs::write(page, report.page()).with_context(|| format!("cannot write {}", page.display()))?;
    }
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    }
    if let Some(error) = broken {
        return Err(error);
    }
    ensure!(
        report.faults == rounds.len(),
        "{} of {} rounds were played",
        report.faults,
        rounds.len()
    );
    let clean = report.rows.iter().filter(|row| row.is_clean()).count();
    eprintln!("{clean} of {} rounds are clean", report.faults);
    if report.is_clean() {
        // Logs are worth keeping only when something went wrong.
        let _ = std::fs::remove_dir_all(&directory);
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("logs: {}", directory.display());
    Ok(ExitCode::FAILURE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_draws_the_same_pairs_each_time_and_never_twice_the_same_fault() {
        let stage = Stage {
            shim: Shim::Relay,
            is_real: true,
        };
        assert_eq!(pairs(7, 20, stage), pairs(7, 20, stage));
        assert_ne!(pairs(7, 20, stage), pairs(8, 20, stage));
        assert!(pairs(7, 200, stage).iter().all(|pair| pair[0] != pair[1]));
    }
}
