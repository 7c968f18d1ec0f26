//! One agent among so many apiservers: what its core takes, what its table holds, and how large what it says is.
//!
//! Must never measure two sizes in one process: memory that was given back may not be the system's yet.

use std::time::Instant;

use rebalancer::agent::{handle::Clock, wire};
use rebalancer_core::{
    agent::{Agent, Command, Input},
    ids::{ApiserverName, Timestamp},
    policy::Weight,
    view::{Part as Acting, ServerState, Snapshot},
};
use serde::{Deserialize, Serialize};

use super::{
    super::{
        planner::{PREVIEW, at, filled_with, planned, resident_mib},
        report::median,
    },
    talk::{self, Talk},
};

/// Of 64 apiservers so many are empty, and of other numbers as many in proportion.
pub(super) const EMPTY_OF_64: usize = 12;

/// How often the core hears a peer.
const HEARD: u64 = 600;

/// The figures of one size.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Part {
    /// How many apiservers there are.
    pub apiservers: usize,
    /// Connections in this agent's table: it is one of the full ones.
    pub connections: u64,
    /// What the process grew by while the table was filled, in MiB.
    pub table_mib: f64,
    /// All that the process holds while it talks to all peers, in MiB.
    pub process_mib: f64,
    /// A plan, in milliseconds.
    pub plan_ms: f64,
    /// What the core does when it hears a peer while nobody is on the way, in microseconds.
    pub quiet_us: f64,
    /// The same while a rebalancing is under way: each is a look at all apiservers.
    pub busy_us: f64,
    /// A snapshot, in octets.
    pub snapshot_octets: u64,
    /// A line of the decision log that names nobody, in octets.
    pub hold_octets: u64,
    /// What each client that a plan names adds to that.
    pub victim_octets: u64,
    /// What `/v1/peers` answers, in octets.
    pub peers_octets: u64,
    /// The agents' talk.
    #[serde(flatten)]
    pub talk: Talk,
}

/// Which of so many apiservers are empty: the last ones.
pub(super) fn empty_of(apiservers: usize) -> usize {
    (apiservers * EMPTY_OF_64 / 64).max(1)
}

/// Measures one size; the agents' talk is watched for so many seconds.
///
/// # Errors
///
/// The kernel does not say how large this process is, the core does not plan what it is asked to, or agents do not
/// understand each other.
pub fn part(apiservers: usize, clients: u64, seconds: u64) -> anyhow::Result<Part> {
    anyhow::ensure!(apiservers > 1, "one apiserver has no peers");
    let names: Vec<_> = (0..apiservers)
        .map(|index| ApiserverName::new(format!("cp-{index:03}.eu-central-1.example")))
        .collect();
    let full = apiservers - empty_of(apiservers);
    let connections = clients / full as u64;
    let peers = |agent: &mut Agent, now: Timestamp| {
        let own = agent.snapshot(now);
        for (index, name) in names.iter().enumerate().skip(1) {
            let load = if index < full { connections } else { 0 };
            let _ = agent.handle(now, Input::Peer(name.clone(), Ok(said(&own, name, load))));
        }
    };
    let before = resident_mib()?;
    let mut agent = filled_with(Weight::Connections, connections, &names, &peers);
    let table_mib = resident_mib()? - before;
    let plan_ms = planned(&agent)?;

    let clock = Clock::start();
    let policy = agent.policy().clone();
    let octets = |value: &serde_json::Value| value.to_string().len() as u64;
    let mut plan = agent.preview(at(PREVIEW));
    let named = plan.victims.len() as u64;
    let with_victims = octets(&wire::decision(&plan, &clock));
    plan.victims.clear();
    let without = octets(&wire::decision(&plan, &clock));
    // A line that only says that it is level names nobody who is heavy either.
    plan.heaviest.clear();
    let hold_octets = octets(&wire::decision(&plan, &clock));
    let snapshot = wire::WireSnapshot::of(&agent.snapshot(at(PREVIEW)), &policy);

    let pause = Command::Pause {
        reason: String::new(),
        length: None,
    };
    let _ = agent.handle(at(PREVIEW), Input::Command(pause));
    let quiet_us = heard_us(&mut agent, &names, PREVIEW, false);
    let busy_us = heard_us(&mut agent, &names, PREVIEW + HEARD * 2, true);
    let from = PREVIEW + HEARD * 4;
    // All say that they have what this one has.
    let talk = talk::measure(agent, &names, from, seconds)?;
    Ok(Part {
        apiservers,
        connections,
        table_mib,
        process_mib: talk.process_mib,
        plan_ms,
        quiet_us,
        busy_us,
        snapshot_octets: serde_json::to_vec(&snapshot)?.len() as u64,
        hold_octets,
        victim_octets: (with_victims - without) / named.max(1),
        peers_octets: talk.peers_octets,
        talk,
    })
}

/// What that apiserver's agent says, with so many connections.
fn said(own: &Snapshot, name: &ApiserverName, connections: u64) -> Snapshot {
    Snapshot {
        apiserver: name.clone(),
        state: ServerState::Ready,
        part: Acting::Acts,
        connections,
        load: connections as f64,
        goaways_total: 0,
        left_total: 0,
        accepted_total: 0,
        in_transit: 0,
        plan_in_flight: false,
        rebalancing: false,
        ..own.clone()
    }
}

/// One peer after the other is heard, a few milliseconds apart: what one takes, in microseconds.
fn heard_us(agent: &mut Agent, names: &[ApiserverName], from: u64, is_busy: bool) -> f64 {
    let full = names.len() - empty_of(names.len());
    let connections = agent.snapshot(at(from)).connections;
    let mut times = Vec::new();
    for round in 0..HEARD {
        let now = at(from + round * 2);
        let index = 1 + round as usize % (names.len() - 1);
        let name = names[index].clone();
        let load = if index < full { connections } else { 0 };
        let mut snapshot = said(&agent.snapshot(now), &name, load);
        if is_busy {
            // It tells twenty clients between two words of it, and as many land there.
            let turns = 1 + round / (names.len() as u64 - 1);
            snapshot.goaways_total = 20 * turns;
            snapshot.accepted_total = 20 * turns;
            (snapshot.in_transit, snapshot.draining) = (1_000, 100);
            (snapshot.plan_in_flight, snapshot.rebalancing) = (true, true);
        }
        let input = Input::Peer(name, Ok(snapshot));
        let began = Instant::now();
        let effects = agent.handle(now, input);
        times.push(began.elapsed().as_secs_f64() * 1e6);
        drop(effects);
    }
    median(times)
}
