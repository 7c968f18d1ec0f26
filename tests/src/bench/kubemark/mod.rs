//! Light kubelets on real apiservers: how long requests take with nothing, with a lottery, with proxies, with rebalancer.
//!
//! Job: all variants of a shim's table at the same moment, each with apiservers of its own and one etcd for all, in several
//! runs that rotate who gets which addresses and ports; `none` is there twice, so that what chance does is a line of the table.
//! Must never compare figures of different runs, nor call a difference a finding that is no larger than that line.

pub mod hollow;
mod report;
mod world;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use clap::Args;

use self::world::{Used, World};
use super::{
    kubelets::{Counters, Group, Kubelets, Parts, STATUS, Times},
    machine::Idle,
};
use crate::{
    demo::{scene::check_interrupt, screen::decision_line},
    fixture::Fixture,
    node::Shim,
    process::wait_for,
};

/// How large, and for how long.
#[derive(Args, Clone, Debug)]
pub struct Effort {
    /// Kubelets of each apiserver
    #[arg(long, default_value_t = 84)]
    pub kubelets: usize,
    /// Runs, each with new processes
    #[arg(long, default_value_t = 3)]
    pub runs: usize,
    /// Seconds of each run that are measured
    #[arg(long, default_value_t = 240)]
    pub seconds: u64,
    /// What rebalancer tells clients by; with `steer` there is nothing else beside it but two who have nothing
    #[arg(long, value_enum, default_value_t = Shim::Relay)]
    pub shim: Shim,
}

impl Effort {
    /// What is compared, in the order of the table.
    fn variants(&self) -> &'static [Variant] {
        match self.shim {
            Shim::Steer => &[Variant::None, Variant::NoneAgain, Variant::Steer],
            Shim::Relay | Shim::None => &VARIANTS,
        }
    }

    fn apiservers(&self) -> usize {
        self.variants().iter().map(|variant| variant.apiservers()).sum()
    }
}

/// What is run beside what is in the fixture.
#[derive(Args, Clone, Debug)]
pub struct Programs {
    /// The `rebalancer` binary
    #[arg(long)]
    pub rebalancer: PathBuf,
    /// Envoy, where it is one of those that are compared
    #[arg(long)]
    envoy: Option<PathBuf>,
}

impl Programs {
    /// Envoy.
    ///
    /// # Errors
    ///
    /// It was not named.
    pub fn envoy(&self) -> anyhow::Result<&Path> {
        self.envoy
            .as_deref()
            .context("`--envoy` is missing: Envoy is one of those that are compared")
    }
}

/// What stands between kubelets and etcd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Variant {
    /// The apiserver itself.
    None,
    /// The same once more: what is between the two is chance.
    NoneAgain,
    /// `--goaway-chance 0.001`.
    Low,
    /// `--goaway-chance 0.01`.
    High,
    /// What any proxy that holds the certificates costs at least.
    Hop,
    /// Envoy.
    Envoy,
    /// Three apiservers, one of which is killed: what a restart costs by itself.
    Restart,
    /// The same three with relays and agents.
    Rebalancer,
    /// Two with agents that answer by a probe, one of which is killed.
    Steer,
}

/// In the order of the table.
const VARIANTS: [Variant; 8] = [
    Variant::None,
    Variant::NoneAgain,
    Variant::Low,
    Variant::High,
    Variant::Hop,
    Variant::Envoy,
    Variant::Restart,
    Variant::Rebalancer,
];

impl Variant {
    /// In the figures' object, and of its kubelets.
    pub fn key(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::NoneAgain => "none-again",
            Self::Low => "chance-0.001",
            Self::High => "chance-0.01",
            Self::Hop => "hop",
            Self::Envoy => "envoy",
            Self::Restart => "none-restart",
            Self::Rebalancer => "rebalancer",
            Self::Steer => "steer",
        }
    }

    /// In a table.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::NoneAgain => "none, again",
            Self::Low => "`--goaway-chance 0.001`",
            Self::High => "`--goaway-chance 0.01`",
            Self::Hop => "a hop that ends TLS and copies octets",
            Self::Envoy => "Envoy before it",
            Self::Restart => "none, three of them, one killed",
            Self::Rebalancer => "rebalancer, relay before each of three, one killed",
            Self::Steer => "rebalancer, a probe on each of two, one killed",
        }
    }

    fn apiservers(self) -> usize {
        match self {
            Self::Restart | Self::Rebalancer => 3,
            Self::Steer => 2,
            _ => 1,
        }
    }

    /// Whether it is the one with agents.
    fn is_ours(self) -> bool {
        matches!(self, Self::Rebalancer | Self::Steer)
    }

    /// Whether one of its apiservers is killed while it is measured.
    fn has_restart(self) -> bool {
        self.is_ours() || self == Self::Restart
    }

    /// Whether something stands before its apiserver.
    fn has_front(self) -> bool {
        matches!(self, Self::Hop | Self::Envoy | Self::Rebalancer)
    }

    fn goaway_chance(self) -> f64 {
        match self {
            Self::Low => 0.001,
            Self::High => 0.01,
            // Without one the apiserver has no filter to answer for.
            Self::Steer => 0.000_001,
            _ => 0.0,
        }
    }
}

/// One variant in one run.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// How many there are.
    pub kubelets: usize,
    /// Of their requests.
    pub times: Times,
    /// Of those that began after our load was level again and all kubelets had their watches.
    pub times_after: Times,
    /// Connections that were opened while it was measured.
    pub reconnects: u64,
    /// Of these after our load had been level again for [`LOOKS`] looks.
    pub reconnects_after: u64,
    /// Connections that are open at the end.
    pub open: u64,
    /// Processor time while it was measured, and memory at the end.
    pub used: Used,
    /// That agents ordered while it was measured.
    pub goaways: u64,
    /// Of these after the load had been level again for [`LOOKS`] looks.
    pub goaways_after: u64,
    /// Sockets of each apiserver at the end, as the load balancer counts them.
    pub loads: Vec<usize>,
}

/// One run.
#[derive(Clone, Debug)]
pub struct Run {
    /// What was seen of each.
    pub rows: BTreeMap<Variant, Row>,
    /// Seconds from the moment the apiserver is killed until the load is level again and agents are at rest.
    pub level_after: f64,
    /// Seconds that were measured after all kubelets had their watches again as well.
    pub rest_s: f64,
    /// The share of the time in which the machine's processors had nothing to do.
    pub idle: f64,
    /// Of `rest_s` alone.
    pub idle_at_rest: f64,
}

/// All runs.
#[derive(Debug)]
pub struct Figures {
    effort: Effort,
    runs: Vec<Run>,
    version: String,
}

/// Within which all kubelets come.
const RAMP: Duration = Duration::from_secs(30);

/// How long they may take to have their watches.
const READY: Duration = Duration::from_secs(300);

/// How long it is measured before an apiserver is killed, and for how long that is gone.
const CALM: Duration = Duration::from_secs(10);
const GONE: Duration = Duration::from_secs(5);

/// At rest is who says so in so many looks, one a second.
const LOOKS: usize = 8;

/// Seconds between two words about what is between ours and rest.
const SAYS: u64 = 30;

/// What is measured at rest is at least so long.
const REST: Duration = Duration::from_secs(60);

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
    let mut runs = Vec::new();
    for turn in 0..effort.runs {
        let count = effort.apiservers();
        say(&format!(
            "run {} of {}: {count} apiservers start",
            turn + 1,
            effort.runs
        ));
        let logs = directory.join(format!("run-{}", turn + 1));
        let mut world = World::start(programs, &fixture, effort, turn, &logs, say)?;
        let measured = measure(&mut world, &kubelets, effort, &logs, say);
        world.end();
        runs.push(measured.with_context(|| format!("run {}; logs: {}", turn + 1, logs.display()))?);
    }
    Ok(Figures {
        effort: effort.clone(),
        runs,
        version: crate::fixture::VERSION.to_owned(),
    })
}

/// What is known of each group at one moment.
struct Moment {
    counters: BTreeMap<String, Counters>,
    goaways: u64,
}

fn measure(world: &mut World, program: &Path, effort: &Effort, logs: &Path, say: impl Fn(&str)) -> anyhow::Result<Run> {
    let groups: Vec<Group<'_>> = world
        .running
        .iter()
        .map(|running| Group {
            name: running.variant.key(),
            server: running.server,
            count: effort.kubelets * running.variant.apiservers(),
        })
        .collect();
    let mut kubelets = Kubelets::start(
        program,
        &groups,
        world.pki.path(),
        RAMP,
        STATUS,
        &world.network.hub,
        logs,
    )?;
    let wanted: BTreeMap<&str, u64> = groups.iter().map(|group| (group.name, group.count as u64)).collect();
    say(&format!("{} kubelets come", wanted.values().sum::<u64>()));
    let have_watches = |kubelets: &mut Kubelets| -> anyhow::Result<bool> {
        let counters = kubelets.counters()?;
        let mut each = wanted.iter();
        Ok(each.all(|(name, count)| counters.get(*name).is_some_and(|counters| counters.ready >= *count)))
    };
    until(READY, "not all kubelets have their watches", || {
        Ok(have_watches(&mut kubelets)? && world.ours()?.is_at_rest())
    })?;

    let moment = |world: &mut World, kubelets: &mut Kubelets| -> anyhow::Result<Moment> {
        Ok(Moment {
            counters: kubelets.counters()?,
            goaways: world.ours()?.goaways()?,
        })
    };
    say(&format!("{} s are measured", effort.seconds));
    kubelets.measure()?;
    let began = Instant::now();
    let idle = Idle::now()?;
    let mut at_rest: Option<(Instant, Idle)> = None;
    let before: Vec<Used> = world
        .running
        .iter()
        .map(|running| running.used())
        .collect::<anyhow::Result<_>>()?;
    let first = moment(world, &mut kubelets)?;
    let (mut killed, mut restarted, mut rested) = (None, false, None);
    let (mut looks, mut said) = (0, 0);
    let mut level: Option<(Instant, Moment)> = None;
    while began.elapsed() < Duration::from_secs(effort.seconds) {
        check_interrupt()?;
        // This is how long it is measured, and no wait for a state.
        thread::park_timeout(Duration::from_secs(1));
        match killed {
            None if began.elapsed() >= CALM => {
                world.kill()?;
                killed = Some(Instant::now());
            }
            Some(since) if !restarted && since.elapsed() >= GONE => {
                world.restart()?;
                restarted = true;
            }
            _ if restarted && level.is_none() => {
                world.revive()?;
                let ours = world.ours()?;
                let is_level = ours.balancer.healthy().iter().all(|up| *up) && ours.is_at_rest();
                let since = *rested.get_or_insert_with(Instant::now);
                (rested, looks) = if is_level { (Some(since), looks + 1) } else { (None, 0) };
                let waited = killed.map_or(0, |since| since.elapsed().as_secs());
                if looks == 0 && said + SAYS <= waited {
                    said = waited;
                    let idle = Idle::now()?.share(idle) * 100.0;
                    let ours = world.ours()?.says();
                    say(&format!(
                        "{waited} s after the kill, {idle:.0} % idle until now: {ours}"
                    ));
                }
                if looks == LOOKS {
                    level = Some((since, moment(world, &mut kubelets)?));
                }
            }
            _ if level.is_some() && at_rest.is_none() => {
                world.revive()?;
                if world.is_healthy() && have_watches(&mut kubelets)? {
                    kubelets.mark()?;
                    at_rest = Some((Instant::now(), Idle::now()?));
                }
            }
            _ => {}
        }
    }
    let mut times = kubelets.times()?;
    let ended = Instant::now();
    let idle_then = Idle::now()?;
    let last = moment(world, &mut kubelets)?;
    world.is_whole()?;
    let (level, killed) = level
        .zip(killed)
        .context("the load was not level again before the end: on a machine with too little time that says nothing")?;
    let (rest, idle_since) = at_rest
        .filter(|(since, _)| ended.duration_since(*since) >= REST)
        .with_context(|| {
            format!(
                "less than {} s were left after all kubelets had their watches again",
                REST.as_secs()
            )
        })?;
    let mut rows = BTreeMap::new();
    for (running, before) in world.running.iter().zip(before) {
        let key = running.variant.key();
        let of = |moment: &Moment| moment.counters.get(key).copied().unwrap_or_default();
        let used = running.used()?;
        let since_level = of(&last).dials - of(&level.1).dials;
        let goaways = |earlier: &Moment| {
            if running.variant.is_ours() {
                last.goaways.saturating_sub(earlier.goaways)
            } else {
                0
            }
        };
        let Parts { whole, after } = times.remove(key).context("a group's times")?;
        if after.count == 0 {
            bail!("no kubelet of `{}` asked anything at rest", running.variant.name());
        }
        rows.insert(
            running.variant,
            Row {
                kubelets: effort.kubelets * running.variant.apiservers(),
                times: whole,
                times_after: after,
                reconnects: of(&last).dials - of(&first).dials,
                reconnects_after: since_level,
                open: of(&last).open,
                used: Used {
                    apiservers_ns: used.apiservers_ns - before.apiservers_ns,
                    front_ns: used.front_ns - before.front_ns,
                    agents_ns: used.agents_ns - before.agents_ns,
                    ..used
                },
                goaways: goaways(&first),
                goaways_after: goaways(&level.1),
                loads: running.balancer.sockets(),
            },
        );
    }
    let run = Run {
        rows,
        level_after: level.0.duration_since(killed).as_secs_f64(),
        rest_s: ended.duration_since(rest).as_secs_f64(),
        idle: idle_then.share(idle),
        idle_at_rest: idle_then.share(idle_since),
    };
    for (variant, row) in &run.rows {
        say(&format!(
            "{}: n {}, average {:.1} ms, P50 {:.1}, P99 {:.1}, {} stalls ({} after), {} errors, {} reconnects, {} after; {:?}",
            variant.name(),
            row.times.count,
            row.times.average,
            row.times.p50,
            row.times.p99,
            row.times.stalls,
            row.times_after.stalls,
            row.times.errors,
            row.reconnects,
            row.reconnects_after,
            row.times
                .error_texts
                .as_deref()
                .unwrap_or_default()
                .iter()
                .take(2)
                .collect::<Vec<_>>(),
        ));
    }
    let mut holds = Vec::new();
    for node in &world.ours()?.nodes {
        for decision in node.decisions(0)? {
            if let Some(line) = decision_line(&decision, &mut holds) {
                say(&format!("{} {line}", decision["at"].as_str().unwrap_or_default()));
            }
        }
    }
    say(&format!(
        "level again after {:.0} s, {:.0} s at rest were measured; the processors had nothing to do {:.0} % of the time, at rest \
         {:.0} %",
        run.level_after,
        run.rest_s,
        run.idle * 100.0,
        run.idle_at_rest * 100.0
    ));
    Ok(run)
}

fn until(patience: Duration, otherwise: &str, mut look: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let done = wait_for(patience, || match check_interrupt().and_then(|()| look()) {
        Ok(true) => Some(Ok(())),
        Ok(false) => None,
        Err(error) => Some(Err(error)),
    });
    done.with_context(|| otherwise.to_owned())?
}
