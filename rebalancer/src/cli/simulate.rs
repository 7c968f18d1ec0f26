//! `rebalancer simulate`: what the rebalancer, the goaway lottery, an age limit and nobody do to the same cluster.
//!
//! Input: loads, a scenario, or a running agent's own view. Output: a table, JSON, a picture.
//! Must never touch a cluster: with `--from live` it reads one answer of the local API, and simulates.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use clap::{Args, ValueEnum};
use rebalancer_core::policy::{GoawayRate, Policy};
use rebalancer_sim::{
    balancer::LoadBalancer,
    figures::{Run, Summary, summarise},
    picture,
    scenario::{self, SCENARIOS},
    setup::{Contender, Group, Setup, Spread},
    simulate,
};
use serde_json::{Value, json};

use super::{Failure, client::Api, print, runtime, table::Table};
use crate::local::client;

/// What is simulated, and what is shown.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Clients on each apiserver at the start [default: 500,500,0]
    #[arg(long, value_delimiter = ',', value_name = "COUNT,COUNT,…", conflicts_with_all = ["scenario", "from"])]
    loads: Vec<usize>,
    /// A built-in scenario; `list` names them
    #[arg(long, value_name = "NAME", conflicts_with = "from")]
    scenario: Option<String>,
    /// Start from what the agent of this node sees
    #[arg(long, value_enum)]
    from: Option<From>,
    #[command(flatten)]
    api: Api,
    /// The load balancer: random, roundrobin, roundrobin-regions, leastconn, leastconn-sockets, leastconn-instances, p2c, affinity or maglev [default: roundrobin, or the scenario's own]
    #[arg(long, value_name = "NAME")]
    lb: Option<LoadBalancer>,
    /// Skew above which clients are moved [default: 0.10, or the scenario's own]
    #[arg(long, value_name = "SHARE")]
    skew_threshold: Option<f64>,
    /// Skew at which moving stops, and at which a cluster counts as balanced [default: 0.03, or the scenario's own]
    #[arg(long, value_name = "SHARE")]
    skew_target: Option<f64>,
    /// Only this one: rebalancer, goaway-chance=CHANCE, max-connection-age=SECONDSs or nothing; may be given several times [default: these five]
    #[arg(long = "policy", value_name = "NAME", value_parser = contender)]
    policies: Vec<Contender>,
    /// How often it is run, each time with other chances
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 0)]
    first_seed: u64,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
    /// Draw the first run of each policy into this file (SVG)
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum From {
    /// The running agent's view
    Live,
}

/// Who is set side by side.
const CONTENDERS: [Contender; 5] = [
    Contender::Rebalancer,
    Contender::GoawayChance(0.001),
    Contender::GoawayChance(0.01),
    Contender::MaxConnectionAge(Duration::from_secs(1_800)),
    Contender::Nothing,
];

/// One of those, by the name that tables and pictures have; the lottery's chance and the age are free.
fn contender(name: &str) -> Result<Contender, String> {
    let chance = |text: &str| text.parse().ok().filter(|chance| (0.0..=1.0).contains(chance));
    let age = |text: &str| {
        text.strip_suffix('s')
            .and_then(|seconds| seconds.parse().ok())
            .filter(|age| *age > 0)
    };
    let named = match name.split_once('=') {
        None if name == "rebalancer" => Some(Contender::Rebalancer),
        None if name == "nothing" => Some(Contender::Nothing),
        Some(("goaway-chance", text)) => chance(text).map(Contender::GoawayChance),
        Some(("max-connection-age", text)) => {
            age(text).map(|age| Contender::MaxConnectionAge(Duration::from_secs(age)))
        }
        _ => None,
    };
    named.ok_or_else(|| {
        "there is rebalancer, goaway-chance=CHANCE from 0 to 1, max-connection-age=SECONDSs (such as 1800s) and nothing".to_owned()
    })
}

/// Points of a picture.
const POINTS: u32 = 400;

/// Simulates and shows.
pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    if arguments.scenario.as_deref() == Some("list") {
        return list();
    }
    let (title, mut setup) = setup(arguments)?;
    if let Some(lb) = arguments.lb {
        setup.balancer = lb;
    }
    let Policy {
        skew_threshold,
        skew_target,
        ..
    } = &mut setup.policy;
    *skew_target = arguments.skew_target.unwrap_or(*skew_target);
    *skew_threshold = arguments.skew_threshold.unwrap_or(*skew_threshold);
    setup.policy = setup
        .policy
        .checked()
        .map_err(|error| Failure::Configuration(error.into()))?;

    let contenders = if arguments.policies.is_empty() {
        &CONTENDERS[..]
    } else {
        &arguments.policies
    };
    let results = side_by_side(&setup, contenders, arguments.seeds, arguments.first_seed);
    if let Some(path) = &arguments.svg {
        draw(path, &title, &setup, contenders, arguments.first_seed)?;
    }
    let answer = answer(&title, &setup, arguments.seeds, &results);
    if arguments.json {
        print(&format!("{answer}\n"))
    } else {
        print(&shown(&title, &setup, arguments.seeds, &results))
    }
}

fn list() -> Result<(), Failure> {
    let mut table = Table::new(&["SCENARIO", "WHAT HAPPENS"]);
    for scenario in SCENARIOS {
        table.row([scenario.name.to_owned(), scenario.about.to_owned()]);
    }
    print(&table.to_string())
}

fn setup(arguments: &Arguments) -> Result<(String, Setup), Failure> {
    if let Some(name) = &arguments.scenario {
        let scenario = scenario::named(name).ok_or_else(|| {
            let names: Vec<&str> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
            Failure::Configuration(anyhow!(
                "--scenario {name}: there is none of that name; choose one of {}",
                names.join(", ")
            ))
        })?;
        return Ok((format!("{}: {}", scenario.name, scenario.about), (scenario.build)()));
    }
    if arguments.from == Some(From::Live) {
        return live(&arguments.api);
    }
    let loads = if arguments.loads.is_empty() {
        vec![500, 500, 0]
    } else {
        arguments.loads.clone()
    };
    sized(&loads)?;
    let words: Vec<String> = loads.iter().map(ToString::to_string).collect();
    Ok((
        format!("({}) clients", words.join(", ")),
        Setup::of_loads(&loads, LoadBalancer::RoundRobin, scenario::default_policy()),
    ))
}

/// What one run can hold.
fn sized(loads: &[usize]) -> Result<(), Failure> {
    let total: usize = loads.iter().fold(0, |sum, load| sum.saturating_add(*load));
    if loads.len() < 2 || loads.len() > 64 || total == 0 || total > 1_000_000 {
        return Err(Failure::Configuration(anyhow!(
            "--loads names {} apiservers with {total} clients: allowed are 2 to 64 apiservers and 1 to 1000000 clients in all",
            loads.len()
        )));
    }
    Ok(())
}

/// The cluster as the local agent sees it.
fn live(api: &Api) -> Result<(String, Setup), Failure> {
    let runtime = runtime()?;
    let ask = |path: &'static str| runtime.block_on(client::get::<Value>(api.path(), path));
    let status = ask("/v1/status").context("--from live: cannot ask the agent")?;
    let connections = ask("/v1/connections?limit=100000").context("--from live: cannot ask the agent")?;
    cluster_of(&status, &connections)
}

/// The cluster behind an agent's `/v1/status` and `/v1/connections`.
fn cluster_of(status: &Value, connections: &Value) -> Result<(String, Setup), Failure> {
    let entries = status["view"].as_array().cloned().unwrap_or_default();
    let mut loads = Vec::new();
    for entry in &entries {
        if entry["state"] == "ready" {
            loads.push(entry["connections"].as_u64().unwrap_or_default() as usize);
        }
    }
    if loads.len() < 2 {
        let hold = status["hold"]["message"]
            .as_str()
            .unwrap_or("fewer than two apiservers are ready");
        return Err(Failure::Job(anyhow!(
            "--from live: there is nothing to compare: {hold}"
        )));
    }
    sized(&loads)?;
    let active: Vec<&Value> = connections["connections"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|connection| connection["state"] == "active")
        .collect();
    let mut setup = Setup::of_loads(&loads, LoadBalancer::RoundRobin, policy_of(status));
    setup.groups = groups_of(&active, loads.iter().sum());
    setup.identities = active.iter().any(|connection| connection["user"].is_string());
    let words: Vec<String> = loads.iter().map(ToString::to_string).collect();
    let sum = |key: &str| {
        active
            .iter()
            .filter_map(|connection| connection[key].as_f64())
            .sum::<f64>()
    };
    let known = active.len().max(1) as f64;
    let title = format!(
        "this cluster now: ({}) clients, counted by connections and taken to be like those of this node: {:.2} requests a \
         second and {:.1} watches on average",
        words.join(", "),
        sum("requests_per_second") / known,
        sum("open_watches") / known,
    );
    Ok((title, setup))
}

/// The policy of an agent, as its `/v1/status` tells it; but it counts connections, for what each of the other nodes' weighs
/// is not known here, and it excludes nobody.
fn policy_of(status: &Value) -> Policy {
    let mut policy = scenario::default_policy();
    let number = |key: &str, otherwise: f64| status[key].as_f64().unwrap_or(otherwise);
    let time = |key: &str, otherwise: Duration| {
        let seconds = status[key]
            .as_f64()
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        seconds.unwrap_or(otherwise)
    };
    policy.skew_threshold = number("skew_threshold", policy.skew_threshold);
    policy.skew_target = number("skew_target", policy.skew_target);
    if let Some(rate) = status["goaway_rate"].as_f64() {
        policy.goaway_rate = GoawayRate::PerSecond(rate);
    }
    policy.goaway_share = number("goaway_share", policy.goaway_share);
    policy.interval = time("interval_s", policy.interval);
    policy.settle = time("settle_s", policy.settle);
    policy.min_connection_age = time("min_connection_age_s", policy.min_connection_age);
    policy.client_cooldown = time("client_cooldown_s", policy.client_cooldown);
    policy.upgrade_patience = time("upgrade_patience_s", policy.upgrade_patience);
    policy
}

/// Parts of a node's clients that are told apart by what they ask.
const PARTS: usize = 20;

/// `total` clients that ask and watch as the active connections of one node do, the quiet ones and the busy ones in
/// the same proportion.
fn groups_of(active: &[&Value], total: usize) -> Vec<Group> {
    let number = |connection: &Value, key: &str| connection[key].as_f64().unwrap_or_default();
    let mut asked: Vec<(f64, f64)> = active
        .iter()
        .map(|connection| {
            // Without a shim no requests are seen; a client that is heard of at all asks once in 20 s or so.
            let requests = number(connection, "requests_per_second").max(0.05);
            (requests, number(connection, "open_watches"))
        })
        .collect();
    if asked.is_empty() {
        // This node's apiserver has just come back: nothing is known of anybody.
        asked.push((0.05, 0.0));
    }
    asked.sort_by(|a, b| a.0.total_cmp(&b.0));
    let parts = asked.len().min(PARTS);
    let cut = |part: usize, of: usize| part * of / parts;
    (0..parts)
        .map(|part| {
            let like = &asked[cut(part, asked.len())..cut(part + 1, asked.len())];
            let mean = |figure: fn(&(f64, f64)) -> f64| like.iter().map(figure).sum::<f64>() / like.len() as f64;
            Group {
                requests: Spread::Constant(mean(|asked| asked.0)),
                watches: mean(|asked| asked.1).round() as u32,
                ..Group::plain(cut(part + 1, total) - cut(part, total))
            }
        })
        .collect()
}

/// Runs every contender with every seed, on all processors; the order of the results does not depend on that.
fn side_by_side(
    setup: &Setup,
    contenders: &[Contender],
    seeds: u64,
    first_seed: u64,
) -> Vec<(Contender, Summary, Run)> {
    let seeds = seeds as usize;
    let jobs = contenders.len() * seeds;
    let next = AtomicUsize::new(0);
    let workers = thread::available_parallelism().map_or(1, usize::from).min(jobs);
    let work = || {
        let mut done = Vec::new();
        loop {
            let job = next.fetch_add(1, Relaxed);
            if job >= jobs {
                return done;
            }
            let seed = first_seed.wrapping_add((job % seeds) as u64);
            done.push((job, simulate(setup, contenders[job / seeds], seed)));
        }
    };
    let mut runs: Vec<(usize, Run)> = thread::scope(|scope| {
        let handles: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        handles
            .into_iter()
            // A panic in a run is a defect: it goes on up.
            .flat_map(|handle| handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    runs.sort_by_key(|(job, _)| *job);
    let mut runs: Vec<Run> = runs.into_iter().map(|(_, run)| run).collect();
    contenders
        .iter()
        .map(|contender| {
            let rest = runs.split_off(seeds);
            let own = std::mem::replace(&mut runs, rest);
            let summary = summarise(&own);
            (*contender, summary, own.into_iter().next().unwrap_or_default())
        })
        .collect()
}

/// Draws one run of each, with points as close as a picture can show.
fn draw(path: &PathBuf, title: &str, setup: &Setup, contenders: &[Contender], seed: u64) -> Result<(), Failure> {
    let length = |run: &Run| run.series.last().map_or(0.0, |sample| sample.at);
    let drawn = |every: Duration| -> Vec<(String, Run)> {
        let setup = Setup {
            sample: Some(every),
            ..setup.clone()
        };
        let run = |contender: &Contender| (contender.to_string(), simulate(&setup, *contender, seed));
        contenders.iter().map(run).collect()
    };
    let rough = drawn(Duration::from_secs(10));
    let longest = rough.iter().map(|(_, run)| length(run)).fold(1.0, f64::max);
    let runs = drawn(Duration::from_secs_f64(longest / f64::from(POINTS)).max(Duration::from_millis(500)));
    let shown: Vec<(String, &Run)> = runs.iter().map(|(name, run)| (name.clone(), run)).collect();
    let title = format!("{title}, behind {}", setup.balancer);
    std::fs::write(path, picture::draw(&title, &shown, setup.policy.skew_target))
        .with_context(|| format!("--svg {}: cannot write it", path.display()))?;
    Ok(())
}

fn answer(title: &str, setup: &Setup, seeds: u64, results: &[(Contender, Summary, Run)]) -> Value {
    let policies = results
        .iter()
        .map(|(contender, summary, first)| policy(*contender, summary, first));
    json!({
        "simulated": title,
        "lb": setup.balancer.to_string(),
        "skew_threshold": setup.policy.skew_threshold,
        "skew_target": setup.policy.skew_target,
        "seeds": seeds,
        "policies": policies.collect::<Vec<_>>(),
    })
}

fn policy(contender: Contender, summary: &Summary, first: &Run) -> Value {
    json!({
        "name": contender.to_string(),
        "goaways_mean": summary.goaways_mean,
        "goaways_p95": summary.goaways_p95,
        "goaways_after_balance": summary.goaways_after_balance,
        "seconds_to_balance_mean": summary.seconds_to_balance,
        "balanced_ratio": summary.balanced as f64 / summary.runs.max(1) as f64,
        "goaways_total_mean": summary.goaways_total,
        "skew_mean": summary.mean_skew,
        "skew_end": summary.last_skew,
        "reconnects_mean": summary.reconnects,
        "swings_mean": summary.swings,
        "refused_lists_mean": summary.refused_lists,
        "worst_list_seconds_mean": summary.worst_list_queue,
        "holds_of_first_run": first.holds,
    })
}

fn shown(title: &str, setup: &Setup, seeds: u64, results: &[(Contender, Summary, Run)]) -> String {
    let mut table = Table::new(&[
        "POLICY",
        "GOAWAYS",
        "P95",
        "AFTER",
        "TO BALANCE",
        "BALANCED",
        "TOTAL",
        "MEAN SKEW",
        "SKEW AT END",
    ]);
    for (contender, summary, _) in results {
        table.row([
            contender.to_string(),
            format!("{:.1}", summary.goaways_mean),
            format!("{:.0}", summary.goaways_p95),
            format!("{:.1}", summary.goaways_after_balance),
            summary.seconds_to_balance.map_or("-".to_owned(), picture::duration),
            format!("{:.0} %", 100.0 * summary.balanced as f64 / summary.runs.max(1) as f64),
            format!("{:.1}", summary.goaways_total),
            format!("{:+.1} %", 100.0 * summary.mean_skew),
            format!("{:+.1} %", 100.0 * summary.last_skew),
        ]);
    }
    let mut text = format!(
        "{title}; load balancer {}, target {:.1} %, {seeds} runs\n\n{table}",
        setup.balancer,
        100.0 * setup.policy.skew_target
    );
    if let Some((_, _, first)) = results.first()
        && !first.explanations.is_empty()
    {
        text.push_str("\nwhat the agents said in the first run:\n");
        for explanation in &first.explanations {
            text.push_str("  ");
            text.push_str(explanation);
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use rebalancer_core::policy::Weight;

    use super::*;

    fn status(states: [&str; 3]) -> Value {
        let entry = |(state, count): (&str, u64)| json!({"apiserver": "x", "state": state, "connections": count});
        json!({
            "view": states.into_iter().zip([90, 60, 30]).map(entry).collect::<Vec<_>>(),
            "skew_threshold": 0.2,
            "skew_target": 0.04,
            "settle_s": 7.5,
            "goaway_rate": 2.0,
            "weight": "requests",
            "hold": {"message": "apiserver b is down"},
        })
    }

    fn connections() -> Value {
        let connection = |state: &str, requests: f64, watches: u64| json!({"state": state, "requests_per_second": requests, "open_watches": watches, "user": "a"});
        json!({"connections": [
            connection("active", 1.0, 4),
            connection("active", 3.0, 6),
            connection("draining", 100.0, 100),
        ]})
    }

    #[test]
    fn a_live_cluster_is_what_its_agent_sees() {
        let (title, setup) = cluster_of(&status(["ready", "ready", "ready"]), &connections()).expect("a cluster");
        assert_eq!(
            setup.placement,
            rebalancer_sim::setup::Placement::Counts(vec![90, 60, 30])
        );
        assert_eq!((setup.policy.skew_threshold, setup.policy.skew_target), (0.2, 0.04));
        assert_eq!(setup.policy.settle, Duration::from_millis(7_500));
        assert_eq!(
            (setup.policy.goaway_rate, setup.policy.weight),
            (GoawayRate::PerSecond(2.0), Weight::Connections)
        );
        // The quiet half and the busy half; draining ones are not clients any more.
        let groups = setup
            .groups
            .iter()
            .map(|group| (group.count, group.requests, group.watches));
        assert_eq!(
            groups.collect::<Vec<_>>(),
            [(90, Spread::Constant(1.0), 4), (90, Spread::Constant(3.0), 6)]
        );
        assert!(setup.identities && title.contains("(90, 60, 30)"), "{title}");
    }

    #[test]
    fn clients_of_a_node_stand_for_all_whatever_their_number() {
        let connection = |requests: u64| json!({"requests_per_second": requests, "open_watches": 1});
        for known in [0_u64, 1, 7, 20, 1_000] {
            let all: Vec<Value> = (0..known).map(connection).collect();
            let groups = groups_of(&all.iter().collect::<Vec<_>>(), 333);
            assert!(groups.len() <= PARTS, "{known}");
            assert_eq!(groups.iter().map(|group| group.count).sum::<usize>(), 333, "{known}");
        }
    }

    #[test]
    fn a_policy_is_named_as_the_table_names_it() {
        for one in CONTENDERS {
            assert_eq!(contender(&one.to_string()), Ok(one));
        }
        for wrong in [
            "",
            "lottery",
            "goaway-chance",
            "goaway-chance=2",
            "goaway-chance=NaN",
            "max-connection-age=0s",
        ] {
            assert!(
                contender(wrong).is_err_and(|why| why.contains("max-connection-age=")),
                "{wrong}"
            );
        }
    }

    #[test]
    fn without_a_peer_there_is_nothing_to_simulate() {
        let Err(Failure::Job(error)) = cluster_of(&status(["ready", "down", "unknown"]), &connections()) else {
            panic!("one apiserver is no cluster");
        };
        assert!(error.to_string().contains("apiserver b is down"), "{error}");
    }

    /// The object of the contract, whatever else it holds; and the same whoever ran it, on however many processors.
    #[test]
    fn the_answer_has_the_fields_of_the_contract() {
        let mut setup = Setup::of_loads(&[40, 40, 0], LoadBalancer::RoundRobin, scenario::default_policy());
        setup.horizon = rebalancer_sim::setup::Horizon::Fixed(Duration::from_secs(300));
        let contenders = [Contender::Rebalancer, Contender::GoawayChance(0.001)];
        let once = answer("t", &setup, 3, &side_by_side(&setup, &contenders, 3, 7));
        assert_eq!(once, answer("t", &setup, 3, &side_by_side(&setup, &contenders, 3, 7)));
        let names: Vec<_> = once["policies"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|policy| policy["name"].as_str().expect("a name"))
            .collect();
        assert_eq!(names, ["rebalancer", "goaway-chance=0.001"]);
        for field in [
            "goaways_mean",
            "goaways_p95",
            "goaways_after_balance",
            "seconds_to_balance_mean",
        ] {
            assert!(once["policies"][0].get(field).is_some(), "{field} is missing");
        }
    }
}
