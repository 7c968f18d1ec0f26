//! The whole in virtual time: the agents' own core in each of 64 apiservers, clients, load balancers, five regions.
//!
//! Job: what a rebalancing costs there, how long it takes, and how many clients come to one apiserver in a second.
//! Output: an [`Outcome`] of each case. Must never say a figure that another seed would not: one run is one run, and its seed
//! is 0.

use std::{
    fs,
    sync::{
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::Duration,
};

use rebalancer_core::{
    ids::ApiserverName,
    planner::{Server, need},
    policy::{GoawayRate, Policy},
};
use rebalancer_sim::{
    balancer::LoadBalancer,
    figures::Run,
    scenario::default_policy,
    setup::{Contender, Horizon, Incident, Setup},
    simulate,
};
use serde::Serialize;

use super::part::empty_of;

/// Apiservers.
pub(super) const APISERVERS: usize = 64;

/// Regions; apiserver `i` is in region `i` modulo that.
pub(super) const REGIONS: usize = 5;

/// Round trips between the regions, in milliseconds; within one it is the first.
pub(super) const ROUND_TRIPS: [[u64; REGIONS]; REGIONS] = [
    [1, 12, 80, 140, 250],
    [12, 1, 90, 150, 240],
    [80, 90, 1, 65, 220],
    [140, 150, 65, 1, 170],
    [250, 240, 220, 170, 1],
];

/// A region is cut off then, and back then.
pub(super) const CUT: [Duration; 2] = [Duration::from_secs(20), Duration::from_secs(80)];

/// The budget of an operator who wants no apiserver to be sent more than a thousand clients a second, in whichever way its
/// share comes about: a thousand for the twelve that are empty, from the fifty-two that are full.
pub(super) const CAREFUL: f64 = 230.0;

/// Clients of the runs in which it is no matter how many there are.
const FEW: usize = 64_000;

/// Nothing is waited for longer in a quick run.
const SHORT: Duration = Duration::from_secs(240);

/// One case.
struct Case {
    title: String,
    setup: Setup,
    /// GOAWAYs that are needed; `None` where no number of them would do.
    needed: Option<f64>,
}

/// What one showed.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Which.
    pub title: String,
    /// Clients.
    pub clients: usize,
    /// From the start until all are at the target.
    pub level_s: Option<f64>,
    /// GOAWAYs until then, or in all.
    pub goaways: u64,
    /// GOAWAYs that are needed: what is above the target, by the share of those who are told that lands below it.
    pub needed: Option<f64>,
    /// GOAWAYs afterwards.
    pub afterwards: u64,
    /// The most GOAWAYs in a second, of all apiservers.
    pub most_told: u64,
    /// The most clients by which an apiserver grew in a second.
    pub most_landed: f64,
    /// How far the fullest is above the mean at the end.
    pub last_skew: f64,
    /// Decisions of all agents.
    pub decisions: u64,
    /// The longest hold, for another reason than that it is level.
    pub longest_hold: Option<(&'static str, f64)>,
    /// Processor seconds for the run.
    pub processor_s: f64,
}

/// Simulates all cases, on as many threads as there are processors.
pub(super) fn run(clients: usize, quick: bool, say: &impl Fn(&str)) -> Vec<Outcome> {
    let mut cases = cases(clients);
    if quick {
        for case in &mut cases {
            shorten(&mut case.setup.horizon);
        }
    }
    let next = AtomicUsize::new(0);
    let (sender, outcomes) = mpsc::channel();
    let mut found: Vec<(usize, Outcome)> = thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from).min(4) {
            let (sender, cases, next) = (sender.clone(), &cases, &next);
            scope.spawn(move || {
                while let Some((index, case)) = {
                    let index = next.fetch_add(1, Relaxed);
                    cases.get(index).map(|case| (index, case))
                } {
                    // Who listens goes on until all have ended.
                    let _ = sender.send((index, outcome(case)));
                }
            });
        }
        drop(sender);
        let said = outcomes.iter().inspect(|(_, outcome): &(usize, Outcome)| {
            let Outcome {
                title,
                level_s,
                goaways,
                processor_s,
                ..
            } = outcome;
            let level = level_s.map_or("never level".to_owned(), |seconds| {
                format!("level after {seconds:.0} s")
            });
            say(&format!(
                "{title}: {level}, {goaways} GOAWAYs ({processor_s:.0} s of a processor)"
            ));
        });
        said.collect()
    });
    found.sort_by_key(|(index, _)| *index);
    found.into_iter().map(|(_, outcome)| outcome).collect()
}

/// As many clients on each as on any other, the last `empty` ones apart, who have nobody.
fn loads_of(apiservers: usize, clients: usize, empty: usize) -> Vec<usize> {
    let full = apiservers - empty;
    (0..apiservers)
        .map(|index| if index < full { clients / full } else { 0 })
        .collect()
}

fn cases(clients: usize) -> Vec<Case> {
    use LoadBalancer::{Leastconn, RoundRobin, RoundRobinRegions};
    let twelve = loads_of(APISERVERS, clients, empty_of(APISERVERS));
    let one = loads_of(APISERVERS, clients, 1);
    let default = default_policy;
    let careful = with(|policy| policy.goaway_rate = GoawayRate::PerSecond(CAREFUL));
    // Below 1/(n-1), and a fourth of that.
    let fine = |rate: GoawayRate| {
        with(|policy| (policy.skew_threshold, policy.skew_target, policy.goaway_rate) = (0.015, 0.0035, rate))
    };
    let far = |setup: Setup| with_incidents(setup, [(Duration::ZERO, Incident::RegionDelays(one_way()))]);
    let late = |setup: Setup, seconds| {
        with_incidents(
            setup,
            [(Duration::ZERO, Incident::SnapshotDelay(Duration::from_secs(seconds)))],
        )
    };
    let cut = |setup: Setup| {
        let region = (0..APISERVERS).filter(|index| index % REGIONS == 0).collect();
        with_incidents(
            setup,
            [
                (Duration::ZERO, Incident::RegionDelays(one_way())),
                (CUT[0], Incident::Partition(region)),
                (CUT[1], Incident::Partition(Vec::new())),
            ],
        )
    };
    let of = |title: &str, setup: Setup| Case {
        title: title.to_owned(),
        needed: needed(&setup),
        setup,
    };
    let [in_turn, least] = [RoundRobin, Leastconn].map(|lb| level(&twelve, lb, default()));
    let mut cases = vec![
        of("12 empty, round robin", in_turn.clone()),
        of("12 empty, leastconn", least.clone()),
        of("the same in five regions, round robin", far(in_turn.clone())),
        of("the same in five regions, leastconn", far(least.clone())),
        of("five regions, one cut off for a minute, round robin", cut(in_turn)),
        of("snapshots 3 s late, leastconn", late(least, 3)),
        of(
            &format!("12 empty, --goaway-rate {CAREFUL}, leastconn"),
            level(&twelve, Leastconn, careful),
        ),
        of("1 empty, leastconn", level(&one, Leastconn, default())),
        of(
            "1 empty, --skew-threshold 0.015 --skew-target 0.0035, leastconn",
            level(&one, Leastconn, fine(GoawayRate::Auto)),
        ),
        of(
            "the same, --goaway-rate 16",
            level(&one, Leastconn, fine(GoawayRate::PerSecond(16.0))),
        ),
    ];
    // A balancer for each region. What happens has nothing to do with how many clients there are.
    let regions = RoundRobinRegions(REGIONS);
    let few = loads_of(APISERVERS, FEW, empty_of(APISERVERS));
    let busy: Vec<usize> = (0..APISERVERS)
        .map(|index| if index % REGIONS == 0 { 2_000 } else { 745 })
        .collect();
    let in_one: Vec<usize> = (0..APISERVERS)
        .map(|index| match (index % REGIONS, index) {
            (0, 0..45) => 1_300,
            (0, _) => 0,
            _ => 1_000,
        })
        .collect();
    let apart: Vec<usize> = in_one.iter().copied().step_by(REGIONS).collect();
    let mut vain = level(&busy, regions, default());
    vain.horizon = Horizon::Fixed(Duration::from_secs(1_200));
    cases.extend([
        of(
            "a balancer for each region: 12 empty, in all regions",
            level(&few, regions, default()),
        ),
        of(
            "a balancer for each region: 3 of 13 empty in one",
            level(&in_one, regions, default()),
        ),
        Case {
            needed: None,
            ..of(
                "a balancer for each region: one has the most clients, for 20 minutes",
                vain,
            )
        },
        of(
            "that region's 13 agents as a group of their own: 3 of 13 empty",
            level(&apart, RoundRobin, default()),
        ),
    ]);
    cases
}

/// What goes on for ever, or nearly, is not waited for in a quick run.
fn shorten(horizon: &mut Horizon) {
    match horizon {
        Horizon::Fixed(length) => *length = (*length).min(SHORT),
        Horizon::Balanced { limit, after } => (*limit, *after) = ((*limit).min(SHORT), Duration::ZERO),
    }
}

fn with(change: impl FnOnce(&mut Policy)) -> Policy {
    let mut policy = default_policy();
    change(&mut policy);
    policy
}

fn level(loads: &[usize], balancer: LoadBalancer, policy: Policy) -> Setup {
    let mut setup = Setup::of_loads(loads, balancer, policy);
    setup.horizon = Horizon::Balanced {
        limit: Duration::from_secs(1_800),
        after: Duration::from_secs(120),
    };
    setup.sample = Some(Duration::from_secs(1));
    setup
}

fn with_incidents<const N: usize>(mut setup: Setup, incidents: [(Duration, Incident); N]) -> Setup {
    setup.incidents = incidents.into();
    setup
}

/// A snapshot is made when the question comes: what is late is its way back, half a round trip.
fn one_way() -> Vec<Vec<Duration>> {
    let half = |ms: &u64| Duration::from_millis(ms.div_ceil(2));
    ROUND_TRIPS.iter().map(|row| row.iter().map(half).collect()).collect()
}

/// GOAWAYs that are needed, by the planner's own steps, when it is known where those land who are told.
fn needed(setup: &Setup) -> Option<f64> {
    let rebalancer_sim::setup::Placement::Counts(loads) = &setup.placement else {
        return None;
    };
    let apiservers = loads.len();
    let mean = loads.iter().sum::<usize>() as f64 / apiservers as f64;
    let server = |(index, load): (usize, &usize)| Server {
        name: ApiserverName::new(index.to_string()),
        load: *load as f64,
        expected: *load as f64,
        connections: *load as u64,
        fair: 1.0 / apiservers as f64,
        target: (1.0 + setup.policy.skew_target) * mean,
        acts: true,
    };
    let servers: Vec<Server> = loads.iter().enumerate().map(server).collect();
    let regions = match setup.balancer {
        LoadBalancer::RoundRobinRegions(regions) => regions,
        _ => 1,
    };
    let of_region = |region: usize| -> f64 {
        let there: Vec<Server> = servers.iter().skip(region).step_by(regions).cloned().collect();
        let below = there.iter().filter(|server| server.load < mean).count();
        let share = |server: &Server| match setup.balancer {
            LoadBalancer::Leastconn if server.load < mean => 1.0 / below as f64,
            LoadBalancer::Leastconn => 0.0,
            _ => 1.0 / there.len() as f64,
        };
        let shares: Vec<f64> = there.iter().map(share).collect();
        need(&there, &shares).all
    };
    Some((0..regions).map(of_region).sum())
}

fn outcome(case: &Case) -> Outcome {
    let before = processor_ns();
    let run = simulate(&case.setup, Contender::Rebalancer, 0);
    let processor_s = (processor_ns() - before) as f64 / 1e9;
    let last_incident = case.setup.incidents.last().map_or(Duration::ZERO, |(at, _)| *at);
    let is_level = |reason: &&str| {
        matches!(
            *reason,
            "below_threshold" | "noise" | "clients_in_transit" | "plan_in_flight"
        )
    };
    let holds = run.longest_holds.iter().filter(|(reason, _)| !is_level(reason));
    Outcome {
        title: case.title.clone(),
        clients: case.setup.groups.iter().map(|group| group.count).sum(),
        level_s: run.to_balance.map(|took| (last_incident + took).as_secs_f64()),
        goaways: run.goaways_total - run.goaways_after,
        needed: case.needed,
        afterwards: run.goaways_after,
        most_told: most_told(&run),
        most_landed: most_landed(&run),
        last_skew: run.last_skew,
        decisions: run.decisions,
        longest_hold: holds
            .max_by(|(_, a), (_, b)| a.total_cmp(b))
            .map(|(reason, seconds)| (*reason, *seconds)),
        processor_s,
    }
}

fn most_told(run: &Run) -> u64 {
    let last = run.marks.last().map_or(0.0, |mark| mark.at);
    let mut seconds = vec![0; last as usize + 1];
    for mark in &run.marks {
        seconds[mark.at as usize] += 1;
    }
    seconds.into_iter().max().unwrap_or(0)
}

/// A client counts where it was until it has landed: what an apiserver grows by is what lands there, less who has left it.
fn most_landed(run: &Run) -> f64 {
    let grown = run.series.windows(2).flat_map(|pair| {
        let loads = pair[0].loads.iter().zip(&pair[1].loads);
        loads.map(|(before, after)| after - before)
    });
    grown.fold(0.0, f64::max)
}

/// The processor time of this thread so far; 0 where the kernel does not say.
fn processor_ns() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(0)
}
