//! What a plan takes, and what the table of connections holds: the agent's core alone, on one core.
//!
//! Job: a table of a million connections, 64 apiservers in the view, and one plan after another.
//! Must never measure anything but the core: no kernel, no shim, no peers.

use std::{fs, net::SocketAddr, time::Instant};

use anyhow::Context as _;
use rebalancer_core::{
    agent::{Agent, Command, Effect, Input},
    ids::{ApiserverName, ConnectionId, Protocol, ShimKind, Timestamp},
    observation::{Observation, Socket},
    policy::{Policy, Weight},
    shim::{ConnectionState, Counters, GoawayResult, ShimConnection, ShimReport},
    view::{ServerState, Snapshot},
};
use serde_json::{Value, json};

use super::{machine::processor, report::median};

/// Connections in the table.
const CONNECTIONS: u64 = 1_000_000;

/// Apiservers in the view; all connections are at one of them, so that its agent must choose among all.
const APISERVERS: usize = 64;

/// Users behind the connections: many more than a cluster has nodes.
const USERS: u64 = 100_000;

/// User agents behind them.
const USER_AGENTS: u64 = 1_000;

/// How often a plan is made.
const ROUNDS: usize = 21;

/// When plans are made, in milliseconds: loads are measured by then.
pub(super) const PREVIEW: u64 = 60_000;

/// How many connections are told of at once while the table is filled: what is on the way is not what it holds.
const BATCH: u64 = 1_000;

/// The figures.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// A plan where connections are counted, in milliseconds.
    pub plan_ms: f64,
    /// A plan where they are weighed by their requests.
    pub weighed_plan_ms: f64,
    /// What an agent does in an interval: it hears its peers, samples what a look samples, decides, tells who is due.
    pub interval_ms: f64,
    /// The same where connections are weighed by their requests, of which a look samples all.
    pub weighed_interval_ms: f64,
    /// What the process grew by while the table was filled, in MiB.
    pub table_mib: f64,
}

impl Figures {
    /// The object of figures.
    pub fn json(&self) -> Value {
        let rounded = |figure: f64| json!((figure * 100.0).round() / 100.0);
        json!({
            "plan_ms": rounded(self.plan_ms),
            "table_mib": rounded(self.table_mib),
            "weighed_plan_ms": rounded(self.weighed_plan_ms),
            "interval_ms": rounded(self.interval_ms),
            "weighed_interval_ms": rounded(self.weighed_interval_ms),
        })
    }

    /// The table, as Markdown: readable on a terminal too.
    pub fn page(&self) -> String {
        format!(
            "{}, one core.\n{CONNECTIONS} connections of {USERS} users with {USER_AGENTS} user agents, all at one of \
             {APISERVERS} apiservers; times are the median of {ROUNDS} rounds.\n\n\
             | what | figure | bound |\n|---|--:|--:|\n\
             | a plan, counting connections | {:.1} ms | 5 ms |\n\
             | an interval of the agent: 63 peers heard, connections sampled, a decision, those told who are due | {:.1} ms | 10 ms |\n\
             | a plan, weighing by requests | {:.1} ms | |\n\
             | an interval, weighing by requests | {:.1} ms | |\n\
             | the table, by what the process grew | {:.0} MiB | 200 MiB |\n",
            processor(),
            self.plan_ms,
            self.interval_ms,
            self.weighed_plan_ms,
            self.weighed_interval_ms,
            self.table_mib,
        )
    }
}

/// Measures; `say` hears what is being done.
///
/// # Errors
///
/// The kernel does not say how large this process is, or the core does not plan what it is asked to.
pub fn run(say: impl Fn(&str)) -> anyhow::Result<Figures> {
    say("filling the table");
    let before = resident_mib()?;
    let mut agent = filled(Weight::Connections);
    let table_mib = resident_mib()? - before;
    say("planning");
    let plan_ms = planned(&agent)?;
    let interval_ms = intervals(&mut agent);
    drop(agent);
    say("planning by weight");
    let mut agent = filled(Weight::Requests);
    let weighed_plan_ms = planned(&agent)?;
    let weighed_interval_ms = intervals(&mut agent);
    Ok(Figures {
        plan_ms,
        weighed_plan_ms,
        interval_ms,
        weighed_interval_ms,
        table_mib,
    })
}

/// One interval after the other, with a shim that tells whoever it is asked to.
fn intervals(agent: &mut Agent) -> f64 {
    let mut times = Vec::new();
    for round in 1..=ROUNDS as u64 {
        let now = at(PREVIEW + round * 5_000);
        let began = Instant::now();
        peers(agent, now);
        for effect in agent.handle(now, Input::Tick) {
            if let Effect::SendGoaway(order) = effect {
                let told = order.victims.into_iter().map(|id| (id, GoawayResult::Sent));
                // What follows from it is of no interest: the time it takes is.
                let _ = agent.handle(now, Input::GoawayAnswered(told.collect()));
            }
        }
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    median(times)
}

pub(super) fn planned(agent: &Agent) -> anyhow::Result<f64> {
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let began = Instant::now();
        let decision = agent.preview(at(PREVIEW));
        times.push(began.elapsed().as_secs_f64() * 1e3);
        anyhow::ensure!(
            !decision.victims.is_empty() && decision.view.entries.len() == agent.peers().names().len(),
            "there is no plan: {}",
            decision.explanation
        );
    }
    Ok(median(times))
}

pub(super) fn at(ms: u64) -> Timestamp {
    Timestamp::from_millis(ms)
}

/// An agent with the full table, and peers that have nothing.
fn filled(weight: Weight) -> Agent {
    let names: Vec<_> = (0..APISERVERS)
        .map(|index| ApiserverName::new(format!("cp-{index}")))
        .collect();
    filled_with(weight, CONNECTIONS, &names, &peers)
}

/// The agent of the first of these apiservers with so many connections, and what its peers say.
pub(super) fn filled_with(
    weight: Weight,
    connections: u64,
    names: &[ApiserverName],
    peers: &dyn Fn(&mut Agent, Timestamp),
) -> Agent {
    let mut policy = Policy::new(names[0].clone(), names[1..].iter().cloned().collect());
    policy.shim = ShimKind::Relay;
    policy.weight = weight;
    let mut agent = Agent::new(policy, 1, at(0));
    let empty = Observation::Resync {
        sockets: Vec::new(),
        listener: Some(ConnectionId(u64::MAX)),
    };
    // What it decides before there is anything to see is of no interest.
    let _ = agent.handle(at(1), Input::Observations(vec![empty]));
    for first in (1..=connections).step_by(BATCH as usize) {
        let ids = first..(first + BATCH).min(connections + 1);
        let opened = ids.clone().map(|id| Observation::Opened(socket(id))).collect();
        let _ = agent.handle(at(2), Input::Observations(opened));
        let report = ShimReport {
            instance: "bench".to_owned(),
            connections: ids.map(shown).collect(),
            upstream_ready: Some(true),
            ..ShimReport::default()
        };
        let _ = agent.handle(at(3), Input::Shim(report));
    }
    // Looks, until loads are measured and all but confirmed; a plan that is under way would be in the way of the next.
    let confirming = if weight == Weight::Connections { 0 } else { 2 };
    let _ = agent.handle(
        at(4),
        Input::Command(Command::Pause {
            reason: String::new(),
            length: None,
        }),
    );
    for look in (1..PREVIEW / 5_000).rev() {
        let now = at(PREVIEW - look * 5_000);
        if look == confirming {
            let _ = agent.handle(at(PREVIEW - look * 5_000 - 1), Input::Command(Command::Resume));
        }
        peers(&mut agent, now);
        let _ = agent.handle(now, Input::Tick);
    }
    if confirming == 0 {
        let _ = agent.handle(at(PREVIEW - 4_000), Input::Command(Command::Resume));
    }
    peers(&mut agent, at(PREVIEW - 1));
    agent
}

fn peers(agent: &mut Agent, now: Timestamp) {
    let own = agent.snapshot(now);
    for name in own.names.iter().filter(|name| **name != own.apiserver) {
        let snapshot = Snapshot {
            apiserver: name.clone(),
            state: ServerState::Ready,
            connections: 0,
            load: 0.0,
            goaways_total: 0,
            left_total: 0,
            accepted_total: 0,
            departed_total: 0,
            counts_after: std::time::Duration::ZERO,
            plan_in_flight: false,
            rebalancing: false,
            ..own.clone()
        };
        let _ = agent.handle(now, Input::Peer(name.clone(), Ok(snapshot)));
    }
}

fn address(id: u64) -> SocketAddr {
    let [.., a, b, c] = ((id / 60_000) as u32).to_be_bytes();
    SocketAddr::from(([10, a, b, c], (id % 60_000) as u16 + 1_024))
}

fn socket(id: u64) -> Socket {
    Socket {
        id: ConnectionId(id),
        local: SocketAddr::from(([192, 0, 2, 1], 6_443)),
        remote: address(id),
        bytes_in: 0,
        bytes_out: 0,
        start: 0,
    }
}

fn shown(id: u64) -> ShimConnection {
    let user = id.wrapping_mul(0x9e37_79b9_7f4a_7c15) % USERS;
    ShimConnection {
        id: ConnectionId(id),
        client: address(id),
        local: socket(id).local,
        protocol: Protocol::H2Selected,
        can_be_told: true,
        age: None,
        state: ConnectionState::Active,
        user: Some(format!("system:node:worker-{user:06}.eu-central.example")),
        user_agent: Some(format!(
            "kubelet/v1.36.{} (linux/amd64) kubernetes/0123456",
            user % USER_AGENTS
        )),
        counters: Counters {
            requests: 1 + id % 977,
            open_streams: (id % 23) as u32,
            open_watches: (id % 23) as u32,
            bytes_in: id % 100_000,
            bytes_out: id % 1_000_000,
        },
    }
}

/// The memory that this process holds, in MiB.
pub(super) fn resident_mib() -> anyhow::Result<f64> {
    let status = fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("/proc/self/status does not say VmRSS")?;
    let kib: f64 = line
        .trim()
        .trim_end_matches("kB")
        .trim()
        .parse()
        .context("VmRSS is no number")?;
    Ok(kib / 1024.0)
}
