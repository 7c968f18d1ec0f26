//! One scene for each way there is to level apiservers: who does it in what time, and what it costs.
//!
//! Job: each contender alone, one after the other, with an etcd, apiservers and kubelets of its own: an apiserver is killed,
//! comes back empty, and is watched for a fixed time. Where kubelets are is the apiservers' own word for all.
//! Must never give a contender another scene, nor leave out what ours costs.

mod audit;
mod report;
mod world;

use std::{
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::{Args, ValueEnum};

use self::world::{Spent, World};
use super::{
    kubelets::{Counters, Group, Kubelets, STATUS, Times},
    kubemark::Programs,
    machine::version_of,
};
use crate::{
    demo::scene::{LEVEL, check_interrupt},
    fixture::Fixture,
    process::wait_for,
};

/// How large, for how long, and who.
#[derive(Args, Clone, Debug)]
pub struct Effort {
    /// Kubelets
    #[arg(long, default_value_t = 150)]
    pub kubelets: usize,
    /// Seconds that are watched after the restart
    #[arg(long, default_value_t = 180)]
    pub seconds: u64,
    /// These contenders alone
    #[arg(long, value_enum, value_delimiter = ',')]
    pub only: Vec<Contender>,
}

/// A way to level apiservers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Contender {
    /// Nothing but the load balancer
    Nothing,
    /// `--goaway-chance 0.001`
    #[value(name = "chance-0.001")]
    Low,
    /// `--goaway-chance 0.02`, the highest that may be set
    #[value(name = "chance-0.02")]
    High,
    /// Envoy as a balancer of requests
    Envoy,
    /// haproxy as a balancer of requests
    Haproxy,
    /// A proxy before each apiserver that tells each connection to go at an age
    Age,
    /// rebalancer with relays
    Relay,
    /// rebalancer with probes
    Steer,
}

impl Contender {
    /// In the figures' object, and of its logs.
    fn key(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Low => "chance-0.001",
            Self::High => "chance-0.02",
            Self::Envoy => "envoy",
            Self::Haproxy => "haproxy",
            Self::Age => "age",
            Self::Relay => "relay",
            Self::Steer => "steer",
        }
    }

    /// In a table.
    fn name(self) -> String {
        match self {
            Self::Nothing => "nothing".to_owned(),
            Self::Low => "`--goaway-chance 0.001`".to_owned(),
            Self::High => "`--goaway-chance 0.02`".to_owned(),
            Self::Envoy => "Envoy, layer 7".to_owned(),
            Self::Haproxy => "haproxy, layer 7".to_owned(),
            Self::Age => format!("connections of {} s at most", world::MAXIMUM_AGE.as_secs()),
            Self::Relay => "rebalancer, relay".to_owned(),
            Self::Steer => "rebalancer, steer".to_owned(),
        }
    }

    /// Whether something stands before each apiserver, on its node.
    fn has_front(self) -> bool {
        matches!(self, Self::Age | Self::Relay)
    }

    fn goaway_chance(self) -> f64 {
        match self {
            Self::Low => 0.001,
            Self::High => 0.02,
            // The least that has the apiserver ask.
            Self::Steer => 0.000_001,
            _ => 0.0,
        }
    }
}

/// When a load came to be level.
#[derive(Clone, Copy, Debug, Default)]
struct Level {
    /// The first look of those in a row that were level, and how many these are.
    candidate: Option<Moment>,
    in_a_row: usize,
    found: Option<Moment>,
    /// Looks since it was found, and those of them that were level.
    looks_after: usize,
    level_after: usize,
}

/// One look: seconds since the restart, and connections opened since then.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Moment {
    second: f64,
    dials: u64,
}

/// A load is level when so many looks in a row, one a second, have seen it so.
const LOOKS: usize = 10;

impl Level {
    fn look(&mut self, loads: &[usize], moment: Moment) {
        let is_level = is_level(loads);
        if self.found.is_some() {
            self.looks_after += 1;
            self.level_after += usize::from(is_level);
            return;
        }
        if !is_level {
            self.in_a_row = 0;
            return;
        }
        if self.in_a_row == 0 {
            self.candidate = Some(moment);
        }
        self.in_a_row += 1;
        if self.in_a_row == LOOKS {
            self.found = self.candidate;
        }
    }
}

/// Whether the largest is within a tenth of the mean.
fn is_level(loads: &[usize]) -> bool {
    let sum: usize = loads.iter().sum();
    let mean = sum as f64 / loads.len() as f64;
    let largest = loads.iter().copied().max().unwrap_or_default() as f64;
    sum > 0 && largest <= (1.0 + LEVEL) * mean
}

/// What happened to clients in one part of the scene.
#[derive(Clone, Debug, Default)]
struct Part {
    times: Times,
    errors: u64,
    broken: u64,
    early: u64,
}

/// What was seen of one contender.
#[derive(Clone, Debug)]
struct Row {
    contender: Contender,
    /// From the kill until the restart.
    kill: Part,
    /// From the restart on.
    after: Part,
    /// Seconds from the restart until the apiserver said that it is ready.
    ready_s: Option<f64>,
    /// By kubelets' last requests, and by their open watches.
    requests: Level,
    watches: Level,
    /// The same at the end.
    requests_end: Vec<usize>,
    watches_end: Vec<usize>,
    /// Connections that kubelets opened after the restart, and those that are open at the end.
    moves: u64,
    open: u64,
    /// After the restart.
    spent: Spent,
    seconds: f64,
}

/// All that was seen.
#[derive(Debug)]
pub struct Figures {
    effort: Effort,
    rows: Vec<Row>,
    /// Why the probe was left out.
    no_steer: Option<String>,
    /// Its version, where it is one of them.
    envoy: Option<String>,
    haproxy: String,
}

/// Within which all kubelets come.
const RAMP: Duration = Duration::from_secs(10);

/// How long it may take until they have their watches, and nobody has anything to do.
const READY: Duration = Duration::from_secs(180);

/// How long it is watched before an apiserver is killed, and for how long that is gone.
const CALM: Duration = Duration::from_secs(10);
const GONE: Duration = Duration::from_secs(10);

/// Measures; `say` hears what is being done.
///
/// # Errors
///
/// Not root, no apiserver, or something does not start.
pub fn run(
    programs: &Programs,
    effort: &Effort,
    directory: &Path,
    say: impl Fn(&str) + Copy,
) -> anyhow::Result<Figures> {
    let _interrupts = crate::demo::interrupts()?;
    crate::process::open_files()?;
    let fixture = Fixture::get(say)?;
    let kubelets = crate::fixture::kubelets()?;
    let mut figures = Figures {
        effort: effort.clone(),
        rows: Vec::new(),
        no_steer: steer_refusal(&programs.rebalancer)?,
        envoy: programs.envoy().ok().map(|envoy| version_of(envoy, "--version", None)),
        haproxy: version_of(&PathBuf::from(crate::balancer::haproxy_program()), "-v", None),
    };
    for contender in Contender::value_variants() {
        if !effort.only.is_empty() && !effort.only.contains(contender) {
            continue;
        }
        if let (Contender::Steer, Some(why)) = (contender, &figures.no_steer) {
            say(&format!("steer is left out: {why}"));
            continue;
        }
        say(&format!("{}: three apiservers start", contender.name()));
        let logs = directory.join(contender.key());
        let row = World::start(*contender, programs, &fixture, &logs).and_then(|mut world| {
            let row = watch(*contender, &mut world, &kubelets, effort, &logs, say);
            world.end();
            row
        });
        let row = row.with_context(|| format!("{}; logs: {}", contender.name(), logs.display()))?;
        say(&row.line());
        figures.rows.push(row);
    }
    Ok(figures)
}

/// Why this kernel does not take the probe's answer, as the product says.
fn steer_refusal(rebalancer: &Path) -> anyhow::Result<Option<String>> {
    let mut command = Command::new(rebalancer);
    let output = command.args(["system-info", "--output=json"]).output()?;
    let features: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("what `rebalancer system-info` says")?;
    let kernel = &features["steer-kernel"];
    let why = kernel["why"].as_str().unwrap_or("it does not say why");
    Ok((kernel["ok"] != true).then(|| why.to_owned()))
}

/// Plays the scene for one contender.
fn watch(
    contender: Contender,
    world: &mut World,
    program: &Path,
    effort: &Effort,
    logs: &Path,
    say: impl Fn(&str),
) -> anyhow::Result<Row> {
    let key = contender.key();
    let group = Group {
        name: key,
        server: world.server,
        count: effort.kubelets,
    };
    let kubelets = Kubelets::start(
        program,
        &[group],
        world.pki.path(),
        RAMP,
        STATUS,
        &world.network.hub,
        logs,
    )?;
    let mut scene = Scene { key, world, kubelets };
    say(&format!("{}: {} kubelets come", contender.name(), effort.kubelets));
    scene.until_settled(effort.kubelets as u64)?;
    say(&format!("{}: an apiserver will be killed", contender.name()));
    scene.pass(CALM, |_| Ok(()))?;
    let calm = scene.counters()?;
    scene.kubelets.measure()?;
    scene.world.kill();
    scene.pass(GONE, |_| Ok(()))?;

    let kill = scene.part(calm)?;
    let restarted = scene.counters()?;
    scene.kubelets.measure()?;
    let before = scene.world.spent()?;
    scene.world.restart()?;
    let began = Instant::now();
    let (mut ready_s, mut requests, mut watches) = (None, Level::default(), Level::default());
    scene.pass(Duration::from_secs(effort.seconds), |scene| {
        let moment = Moment {
            second: began.elapsed().as_secs_f64(),
            dials: scene.counters()?.dials - restarted.dials,
        };
        requests.look(&scene.world.audit.loads(), moment);
        watches.look(&scene.world.audit.watches(), moment);
        if ready_s.is_none() && scene.world.is_ready(0) {
            ready_s = Some(began.elapsed().as_secs_f64());
        }
        Ok(())
    })?;
    let after = scene.part(restarted)?;
    let last = scene.counters()?;
    let spent = scene.world.spent()?;
    Ok(Row {
        contender,
        kill,
        after,
        ready_s,
        requests,
        watches,
        requests_end: scene.world.audit.loads(),
        watches_end: scene.world.audit.watches(),
        moves: last.dials - restarted.dials,
        open: last.open,
        spent: Spent {
            apiservers: spent.apiservers.since(before.apiservers),
            front: spent.front.since(before.front),
            agents: spent.agents.since(before.agents),
        },
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// A contender with its kubelets.
struct Scene<'a> {
    key: &'a str,
    world: &'a mut World,
    kubelets: Kubelets,
}

impl Scene<'_> {
    fn counters(&mut self) -> anyhow::Result<Counters> {
        Ok(self.kubelets.counters()?.get(self.key).copied().unwrap_or_default())
    }

    /// What has happened since `earlier`, which is when times were last forgotten.
    fn part(&mut self, earlier: Counters) -> anyhow::Result<Part> {
        let times = self
            .kubelets
            .times()?
            .remove(self.key)
            .context("the kubelets' times")?
            .whole;
        let now = self.counters()?;
        Ok(Part {
            times,
            errors: now.errors - earlier.errors,
            broken: now.broken - earlier.broken,
            early: now.early - earlier.early,
        })
    }

    /// Until all kubelets have their watches, the load is level, and agents have nothing to do.
    fn until_settled(&mut self, kubelets: u64) -> anyhow::Result<()> {
        let mut look = || -> anyhow::Result<bool> {
            check_interrupt()?;
            self.world.check()?;
            self.world.audit.look()?;
            let is_level = is_level(&self.world.audit.loads());
            Ok(self.counters()?.ready >= kubelets && is_level && self.world.is_at_rest())
        };
        let settled = wait_for(READY, || match look() {
            Ok(true) => Some(Ok(())),
            Ok(false) => None,
            Err(error) => Some(Err(error)),
        });
        let loads = self.world.audit.loads();
        settled.with_context(|| format!("not all kubelets have their watches on a level load: {loads:?}"))?
    }

    /// Lets so much time pass, with a look each second: this is how long it is watched, and no wait for a state.
    fn pass(&mut self, time: Duration, mut look: impl FnMut(&mut Self) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let until = Instant::now() + time;
        let mut next = Instant::now();
        while Instant::now() < until {
            check_interrupt()?;
            next += Duration::from_secs(1);
            thread::sleep(next.saturating_duration_since(Instant::now()));
            self.world.check()?;
            self.world.audit.look()?;
            look(self)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn level_is_a_tenth_above_the_mean_and_nothing_is_not() {
        assert!(is_level(&[55, 55, 40]));
        assert!(!is_level(&[56, 54, 40]));
        assert!(!is_level(&[0, 0, 0]));
    }

    #[test]
    fn a_load_is_level_from_the_first_look_of_enough_in_a_row() {
        let at = |second: usize| Moment {
            second: second as f64,
            dials: second as u64 * 2,
        };
        let (even, askew) = ([50, 50, 50], [75, 75, 0]);
        let mut level = Level::default();
        level.look(&even, at(1));
        level.look(&askew, at(2));
        for second in 3..3 + LOOKS {
            assert_eq!(level.found, None, "at {second}");
            level.look(&even, at(second));
        }
        assert_eq!(level.found, Some(at(3)));
        level.look(&askew, at(40));
        level.look(&even, at(41));
        assert_eq!((level.looks_after, level.level_after), (2, 1));
        assert_eq!(level.found, Some(at(3)));
    }
}
