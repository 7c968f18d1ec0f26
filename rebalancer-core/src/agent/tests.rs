//! Three agents and a load balancer in virtual time: what they do together, and when they stop.

mod evacuation;
mod orders;
mod overload;

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::{
    ids::Protocol,
    observation::Socket,
    policy::Mode,
    shim::{ConnectionState, Counters, ShimConnection},
};

#[derive(Clone, Copy, Debug)]
enum Balancer {
    RoundRobin,
    LeastSockets,
    Affinity,
}

struct World {
    agents: Vec<Agent>,
    /// Live sockets of each apiserver: connection, and whether it heard its GOAWAY.
    sockets: Vec<BTreeMap<u64, bool>>,
    /// Clients that come back: when, and where they were.
    coming: BTreeSet<(u64, u64, usize)>,
    balancer: Balancer,
    turn: usize,
    next_id: u64,
    ms: u64,
    goaways: usize,
    per_second: BTreeMap<(usize, u64), usize>,
    /// Whether the shims say who comes.
    speaks: bool,
    /// What the shims can do.
    abilities: Abilities,
}

/// The connection of that number.
pub(in crate::agent) fn socket(id: u64) -> Socket {
    Socket {
        id: ConnectionId(id),
        local: "10.0.0.1:6443".parse().expect("an address"),
        remote: format!("10.1.0.1:{}", 1000 + id).parse().expect("an address"),
        bytes_in: 0,
        bytes_out: 0,
        start: 0,
    }
}

/// That connection as a shim shows it.
fn shown(socket: &Socket) -> ShimConnection {
    ShimConnection {
        id: socket.id,
        client: socket.remote,
        local: socket.local,
        protocol: Protocol::H2Selected,
        can_be_told: true,
        age: None,
        state: ConnectionState::Active,
        user: None,
        user_agent: None,
        counters: Counters::default(),
    }
}

/// How long a told client takes to its next request, and so to its new connection.
const RETURN_MS: u64 = 700;

impl World {
    fn new(loads: &[u64], balancer: Balancer, change: impl Fn(&mut Policy)) -> Self {
        let names: Vec<_> = (0..loads.len())
            .map(|index| ApiserverName::new(format!("n{index}")))
            .collect();
        let agents = names.iter().map(|name| {
            let peers = names.iter().filter(|other| *other != name).cloned().collect();
            let mut policy = Policy::new(name.clone(), peers);
            policy.shim = ShimKind::Relay;
            change(&mut policy);
            Agent::new(policy.checked().expect("a policy"), 1, Timestamp::default())
        });
        let mut world = Self {
            agents: agents.collect(),
            sockets: vec![BTreeMap::new(); loads.len()],
            coming: BTreeSet::new(),
            balancer,
            turn: 0,
            next_id: 1,
            ms: 0,
            goaways: 0,
            per_second: BTreeMap::new(),
            speaks: true,
            abilities: Abilities::default(),
        };
        for (index, load) in loads.iter().enumerate() {
            let listener = Some(ConnectionId(u64::MAX - index as u64));
            let empty = Observation::Resync {
                sockets: vec![],
                listener,
            };
            world.input(index, Input::Observations(vec![empty]));
            let first = ShimReport {
                upstream_ready: Some(true),
                ..ShimReport::default()
            };
            world.input(index, Input::Shim(first));
            for _ in 0..*load {
                world.land(index);
            }
        }
        world
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.ms)
    }

    fn socket(&self, index: usize, id: u64) -> Socket {
        let port = 1024 + (id % 60_000) as u16;
        Socket {
            id: ConnectionId(id),
            local: format!("10.0.0.{}:6443", index + 1).parse().expect("an address"),
            remote: (std::net::Ipv4Addr::new(10, 1, (id >> 16) as u8, 1), port).into(),
            bytes_in: 0,
            bytes_out: 0,
            start: 0,
        }
    }

    fn land(&mut self, index: usize) {
        let id = self.next_id;
        self.next_id += 1;
        self.sockets[index].insert(id, false);
        let socket = self.socket(index, id);
        self.input(index, Input::Observations(vec![Observation::Opened(socket)]));
        if self.speaks {
            self.introduce(index, id);
        }
    }

    /// The shim says who that is.
    fn introduce(&mut self, index: usize, id: u64) {
        let report = ShimReport {
            connections: vec![shown(&self.socket(index, id))],
            upstream_ready: Some(true),
            abilities: self.abilities,
            ..ShimReport::default()
        };
        self.input(index, Input::Shim(report));
    }

    fn choose(&mut self, from: usize) -> usize {
        self.turn += 1;
        match self.balancer {
            Balancer::RoundRobin => self.turn % self.sockets.len(),
            Balancer::LeastSockets => (0..self.sockets.len())
                .min_by_key(|index| self.sockets[*index].len())
                .expect("apiservers"),
            Balancer::Affinity => from,
        }
    }

    fn input(&mut self, index: usize, input: Input) {
        let now = self.now();
        let effects = self.agents[index].handle(now, input);
        let has = |is: fn(&Effect) -> bool| effects.iter().any(is);
        let told_and_settled = |effect: &Effect| match effect {
            Effect::Settled(decision) => decision.outcomes.lost < decision.victims.len() as u64,
            _ => false,
        };
        if has(told_and_settled) {
            assert!(
                has(|effect| matches!(effect, Effect::Record(_))),
                "what a plan left over is decided as soon as it has settled"
            );
        }
        for effect in effects {
            let Effect::SendGoaway(order) = effect else { continue };
            self.goaways += order.victims.len();
            *self.per_second.entry((index, self.ms / 1000)).or_default() += order.victims.len();
            let mut results = Vec::new();
            for id in order.victims {
                let told = self.sockets[index].get_mut(&id.0).expect("a live connection");
                assert!(!*told, "{id} is told twice");
                *told = true;
                self.coming.insert((self.ms + RETURN_MS + id.0 % 13, id.0, index));
                results.push((id, GoawayResult::Sent));
            }
            self.input(index, Input::GoawayAnswered(results));
        }
    }

    fn run(&mut self, seconds: u64) {
        let until = self.ms + seconds * 1000;
        while self.ms < until {
            self.ms += 50;
            while let Some((_, _, from)) = self.coming.pop_first_if(|(at, ..)| *at <= self.ms) {
                let to = self.choose(from);
                self.land(to);
            }
            for index in 0..self.agents.len() {
                // As the agents do: peers once a second, none of them at the same instant.
                if self.ms % 1000 == index as u64 * 150 {
                    for other in 0..self.agents.len() {
                        if other != index {
                            let snapshot = self.agents[other].snapshot(self.now());
                            let name = snapshot.apiserver.clone();
                            self.input(index, Input::Peer(name, Ok(snapshot)));
                        }
                    }
                }
                self.input(index, Input::Tick);
            }
        }
    }

    fn active(&self) -> Vec<usize> {
        let active = |sockets: &BTreeMap<u64, bool>| sockets.values().filter(|told| !**told).count();
        self.sockets.iter().map(active).collect()
    }

    fn holds(&self) -> Vec<&'static str> {
        let last = |agent: &Agent| agent.history().next_back().and_then(|decision| decision.hold.clone());
        self.agents
            .iter()
            .map(|agent| last(agent).map_or("none", |hold| hold.reason()))
            .collect()
    }
}

trait PopFirstIf<T> {
    fn pop_first_if(&mut self, condition: impl Fn(&T) -> bool) -> Option<T>;
}

impl<T: Ord> PopFirstIf<T> for BTreeSet<T> {
    fn pop_first_if(&mut self, condition: impl Fn(&T) -> bool) -> Option<T> {
        if condition(self.first()?) {
            self.pop_first()
        } else {
            None
        }
    }
}

/// Its port is open, and nobody is served there: whoever is sent there is lost. Two that stand still name themselves.
#[test]
fn a_relay_that_stands_still_is_sent_nobody() {
    let mut world = World::new(&[150, 150, 0], Balancer::LeastSockets, |policy| {
        policy.settle = Duration::from_secs(2);
    });
    let stalls = || Input::ShimStalled("it does not answer".to_owned());
    let answers = || {
        Input::Shim(ShimReport {
            upstream_ready: Some(true),
            ..ShimReport::default()
        })
    };
    world.input(2, stalls());
    world.run(90);
    assert_eq!(world.goaways, 0, "{:?}", world.holds());
    assert_eq!(world.holds(), ["peer_unknown", "peer_unknown", "shim_unavailable"]);
    world.input(1, stalls());
    world.run(20);
    assert_eq!(world.holds(), ["peer_unknown", "shim_unavailable", "shim_unavailable"]);
    for index in [1, 2] {
        world.input(index, answers());
        let state = world.agents[index].snapshot(world.now()).state;
        assert_eq!(state, ServerState::Unknown, "a load balancer learns of it later");
    }
    world.run(6);
    assert_eq!(world.agents[2].snapshot(world.now()).state, ServerState::Ready);
    world.run(180);
    let active = world.active();
    assert!(active.iter().all(|load| (90..=104).contains(load)), "{active:?}");

    // Whoever cannot be asked at all is no such: the kernel knows whether its port is open.
    world.input(2, Input::ShimFailed("no such file".to_owned()));
    assert_eq!(world.agents[2].snapshot(world.now()).state, ServerState::Ready);
}

#[test]
fn loads_become_level_at_the_least_cost_and_then_nothing_happens() {
    for (loads, balancer, rho) in [
        (&[150, 150, 0][..], Balancer::RoundRobin, 1.0 / 3.0),
        (&[150, 150, 0], Balancer::LeastSockets, 1.0),
        (&[152, 148, 0], Balancer::RoundRobin, 1.0 / 3.0),
        (&[500, 500, 0], Balancer::RoundRobin, 1.0 / 3.0),
        (&[500, 500, 0], Balancer::LeastSockets, 1.0),
        (&[800, 100, 100], Balancer::LeastSockets, 1.0),
        (&[250, 250, 250, 250, 0], Balancer::RoundRobin, 0.2),
    ] {
        let case = format!("{loads:?} {balancer:?}");
        let mut world = World::new(loads, balancer, |_| {});
        world.run(180);
        let active = world.active();
        let total: usize = active.iter().sum();
        let mean = total as f64 / active.len() as f64;
        assert_eq!(total as u64, loads.iter().sum::<u64>(), "{case}: everybody is back");
        let ceiling = mean * (1.0 + Policy::new(ApiserverName::new("a"), BTreeSet::new()).skew_target);
        // Whoever was above the target ends at it; what is missing below is as much.
        let lowest = mean - (ceiling - mean) * (active.len() - 1) as f64;
        for load in &active {
            assert!(
                (lowest - 1.0..=ceiling + 1.0).contains(&(*load as f64)),
                "{case}: {active:?}"
            );
        }
        let surplus: f64 = loads.iter().map(|load| (*load as f64 - ceiling).max(0.0)).sum();
        let least = surplus / rho;
        let goaways = world.goaways;
        assert!(
            goaways as f64 <= 1.25 * least,
            "{case}: {goaways} GOAWAYs, {least:.0} are needed"
        );
        let fullest = loads.iter().max().copied().unwrap_or_default();
        let rate = crate::policy::GoawayRate::Auto.per_second(fullest as usize);
        for count in world.per_second.values() {
            assert!(
                *count as f64 <= 2.0 * rate + 1.0,
                "{case}: {count} in a second, {rate} are allowed and as many at once"
            );
        }
        assert_eq!(world.holds(), vec!["below_threshold"; loads.len()], "{case}");
        world.run(600);
        assert_eq!(world.goaways, goaways, "{case}: it goes on");
    }
}

#[test]
fn who_was_there_before_the_relay_keeps_nobody_else_from_going() {
    let mut world = World::new(&[25, 0, 25], Balancer::LeastSockets, |_| {});
    world.speaks = false;
    for index in [0, 2] {
        (0..50).for_each(|_| world.land(index));
    }
    world.speaks = true;
    world.run(180);
    let active = world.active();
    assert_eq!(active.iter().sum::<usize>(), 150, "everybody is back");
    // All the others are told, and level it is but for what is left to chance and rounding.
    assert!(active.iter().all(|load| (48..=52).contains(load)), "{active:?}");
}

#[test]
fn affinity_is_seen_to_be_futile() {
    let mut world = World::new(&[150, 150, 0], Balancer::Affinity, |policy| {
        policy.client_cooldown = Duration::from_secs(60);
    });
    world.run(600);
    let holds = world.holds();
    assert_eq!(
        holds,
        ["futile", "futile", "below_threshold"],
        "moving has been seen not to help"
    );
    world.run(6 * 3_600 - 600);
    assert!(
        world.goaways <= 120,
        "{} GOAWAYs in six hours, for nothing",
        world.goaways
    );
}

#[test]
fn nothing_is_done_about_a_skew_of_connections_that_nobody_knows() {
    let mut world = World::new(&[100, 100, 20], Balancer::RoundRobin, |_| {});
    // Of a shim that can tell others too than those it names.
    world.abilities.names_all = false;
    (0..3).for_each(|index| world.land(index));
    // More than the band of those that count on the first one, and fewer of those on the second.
    world.speaks = false;
    let first = world.next_id;
    (0..60).for_each(|_| world.land(0));
    (0..4).for_each(|_| world.land(1));
    world.speaks = true;
    world.run(60);
    assert_eq!(world.holds()[0], "unknown_protocols");
    let told = |world: &World, index| world.per_second.keys().filter(|(at, _)| *at == index).count();
    assert_eq!(told(&world, 0), 0);
    assert!(told(&world, 1) > 0, "few that nobody knows stop nobody");
    // Whoever they are turns out.
    (first..first + 60).for_each(|id| world.introduce(0, id));
    world.run(60);
    assert!(told(&world, 0) > 0);
}

#[test]
fn chance_alone_starts_nothing() {
    let mut world = World::new(&[108, 100, 92], Balancer::RoundRobin, |_| {});
    world.run(120);
    assert_eq!(world.goaways, 0);
}

#[test]
fn a_dry_run_decides_no_more_often_than_the_interval() {
    let mut world = World::new(&[150, 150, 0], Balancer::RoundRobin, |policy| {
        policy.mode = Mode::DryRun
    });
    world.run(100);
    for agent in &world.agents {
        let times: Vec<_> = agent.history().map(|decision| decision.at).collect();
        let apart = |pair: &[Timestamp]| pair[1].since(pair[0]) >= agent.policy().interval;
        assert!(times.len() >= 15 && times.windows(2).all(apart), "{times:?}");
    }
    assert_eq!(world.goaways, 0);
}

#[test]
fn a_preview_names_the_heaviest_of_a_level_load_and_the_log_does_not() {
    let mut world = World::new(&[100, 100, 100], Balancer::RoundRobin, |_| {});
    world.run(60);
    for agent in &world.agents {
        let preview = agent.preview(world.now());
        let recorded = agent.history().next_back().expect("a decision");
        assert_eq!(preview.hold.as_ref().map(Hold::reason), Some("below_threshold"));
        assert_eq!((preview.heaviest.len(), recorded.heaviest.len()), (5, 0));
        assert_eq!(preview.hold, recorded.hold);
    }
}

#[test]
fn a_word_to_all_waits_until_each_peer_was_asked_once() {
    let mut world = World::new(&[1, 1], Balancer::RoundRobin, |_| {});
    let pause = || Command::PauseAll {
        reason: "upgrade".to_owned(),
        length: None,
    };
    let now = world.now();
    assert_eq!(world.agents[0].command(now, pause()).0, Answer::TooEarly);
    let unreachable = PeerFault::Unreachable("it is down".to_owned());
    world.input(0, Input::Peer(ApiserverName::new("n1"), Err(unreachable)));
    assert_eq!(world.agents[0].command(now, pause()).0, Answer::Done);
    // Who comes back with another word of as many is heard, whoever it calls itself: but not in another's name.
    let mut stranger = world.agents[1].snapshot(now);
    stranger.switch.stamp = 9;
    stranger.apiserver = ApiserverName::new("n0");
    world.input(0, Input::Peer(ApiserverName::new("n1"), Ok(stranger)));
    assert_eq!(world.agents[0].switch(now).stamp, 1);
    world.run(12);
    assert!(world.agents[1].is_paused());
    assert_eq!(world.holds(), ["paused"; 2]);
}

/// Every donor's operator approves; another number is none that waits.
#[test]
fn a_rebalancing_waits_for_its_approval_and_begins_with_it() {
    let mut world = World::new(&[150, 150, 0], Balancer::LeastSockets, |policy| {
        policy.mode = Mode::Propose
    });
    world.run(60);
    assert_eq!(world.goaways, 0, "nobody approved anything");
    assert_eq!(world.holds(), ["awaits_approval", "awaits_approval", "below_threshold"]);
    for index in [0, 1] {
        let now = world.now();
        let agent = &mut world.agents[index];
        let proposal = agent.proposal().expect("it waits");
        let (answer, _) = agent.command(now, Command::Approve(proposal + 1_000));
        assert_eq!(
            answer,
            Answer::NoSuchProposal {
                waiting: Some(proposal)
            }
        );
        world.input(index, Input::Command(Command::Approve(proposal)));
        assert_eq!(world.agents[index].proposal(), None, "it is approved");
    }
    world.run(120);
    let active = world.active();
    assert!(active.iter().all(|load| (90..=104).contains(load)), "{active:?}");
    assert!(world.goaways <= 110, "{} GOAWAYs", world.goaways);
    // What comes later is another rebalancing: it waits again.
    for _ in 0..90 {
        world.land(2);
    }
    world.run(60);
    assert!(world.holds().contains(&"awaits_approval"), "{:?}", world.holds());
}

/// Whatever falls silent in the middle of a plan: who has not been told is not told until it speaks again, and then it goes
/// on at no higher cost.
#[test]
fn silence_in_the_middle_of_a_plan_ends_the_plan_and_not_the_rebalancing() {
    for silent in ["shim", "source", "clock"] {
        let mut world = World::new(&[150, 150, 0], Balancer::LeastSockets, |policy| {
            policy.goaway_rate = crate::policy::GoawayRate::PerSecond(2.0);
        });
        while world.agents[0].goaways_total() < 10 {
            world.run(1);
        }
        let told = world.agents[0].goaways_total();
        match silent {
            "shim" => world.input(0, Input::ShimFailed("it does not answer".to_owned())),
            "source" => world.input(0, Input::Observations(vec![Observation::Lost { events: 1 }])),
            // The machine was suspended: all that was heard is old at once.
            _ => world.ms += 600_000,
        }
        world.input(0, Input::Tick);
        assert!(
            world.agents[0].goaways_total() <= told + 2,
            "{silent}: {} after {told}",
            world.agents[0].goaways_total()
        );
        if silent == "clock" {
            assert_eq!(world.holds()[0], "snapshot_stale");
        } else {
            world.run(30);
            let held = world.agents[0].goaways_total();
            assert!(held <= told + 2, "{silent}: {held} after {told}");
            let reason = if silent == "shim" {
                "shim_unavailable"
            } else {
                "lost_events"
            };
            assert_eq!(world.holds()[0], reason);
        }
        if silent == "source" {
            let sockets = world.sockets[0].keys().map(|id| world.socket(0, *id)).collect();
            let listener = Some(ConnectionId(u64::MAX));
            world.input(0, Input::Observations(vec![Observation::Resync { sockets, listener }]));
        }
        let heard = ShimReport {
            upstream_ready: Some(true),
            ..ShimReport::default()
        };
        world.input(0, Input::Shim(heard));
        world.run(180);
        let active = world.active();
        assert!(
            active.iter().all(|load| (90..=104).contains(load)),
            "{silent}: {active:?}"
        );
        assert!(
            world.goaways <= 118,
            "{silent}: {} GOAWAYs where 94 are needed",
            world.goaways
        );
    }
}

/// An apiserver that says it is not ready may have its clients: nobody says that they look for another.
#[test]
fn an_apiserver_that_is_not_ready_is_not_said_to_be_gone() {
    let mut world = World::new(&[60, 60], Balancer::RoundRobin, |_| {});
    world.run(30);
    let unready = ShimReport {
        upstream_ready: Some(false),
        ..ShimReport::default()
    };
    world.input(0, Input::Shim(unready));
    let said = |world: &World, index: usize| {
        let hold = world.agents[index].preview(world.now()).hold.expect("a hold");
        (hold.reason(), hold.to_string())
    };
    world.run(2);
    for (index, clients) in [(0, "60 clients"), (1, "60 clients")] {
        let (reason, sentence) = said(&world, index);
        assert_eq!(reason, "apiserver_starting");
        assert!(
            sentence.contains(clients) && sentence.contains("about to end"),
            "{index}: {sentence}"
        );
    }
}
