//! The maths: where the loads stand, and how many GOAWAYs each apiserver should send.
//!
//! Input: a view, what is in transit, what was learned of the load balancer, the policy. Output: a [`Balance`].
//! Must never look at the table: two agents with the same view and the same past come to the same parts, without a leader.
//!
//! By hand, for loads (500, 500, 0), a target of 5 % and a balancer that lets a third of the movers land on each:
//! 1. the mean is 333.3 and the target 350: the first two are donors, together 300 above it (the surplus);
//! 2. if G clients are told in all, each donor gets G/3 of them back, so each must tell `500 + G/3 - 350`;
//! 3. the sum of those is G: `300 + 2G/3 = G`, so G = 900, and each donor tells 450;
//! 4. if that takes another apiserver above the target it must tell as well, and step 3 is done again with it.

use super::{Spread, noise::Floor};
use crate::{
    ids::ApiserverName,
    policy::{Mode, Policy},
    rho::Rho,
    view::{Part, ServerState, View},
};

/// One apiserver that takes connections, as the maths sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    /// Which.
    pub name: ApiserverName,
    /// Its load without that of clients which are heavier than the target.
    pub load: f64,
    /// Its load, with what returns of those in transit.
    pub expected: f64,
    /// Its active connections.
    pub connections: u64,
    /// Its part of all clients when they are level: 1/n, or by its capacity.
    pub fair: f64,
    /// What it may have: its part of the load, and the target above it.
    pub target: f64,
    /// Whether its agent tells clients to go.
    pub acts: bool,
}

/// Where the loads stand, and what this apiserver should do about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Balance {
    /// The apiservers that take connections.
    pub servers: Vec<Server>,
    /// Load of this apiserver when all are level, with what is in transit counted.
    pub mean: f64,
    /// Its target.
    pub ceiling: f64,
    /// How far this apiserver is from its part of the loads in the view: what anybody works out from the table beside it.
    pub skew: f64,
    /// The same when those in transit have landed: what decisions rest on.
    pub expected_skew: f64,
    /// The largest expected skew of an apiserver whose agent acts.
    pub largest_skew: f64,
    /// Skew that chance makes behind this load balancer.
    pub noise_floor: f64,
    /// Expected skew that starts a rebalancing: the configured threshold or the noise floor, whichever is higher; the
    /// threshold alone when one apiserver is emptier than chance makes it.
    pub trigger: f64,
    /// The apiservers above the target whose agents act.
    pub donors: Vec<ApiserverName>,
    /// Rho for these donors that the parts rest on: the highest that is credible.
    pub rho: f64,
    /// How much all donors together are above the target.
    pub surplus: f64,
    /// This apiserver's part of the surplus, from 0 to 1.
    pub surplus_part: f64,
    /// This apiserver's part of all GOAWAYs that are needed, in the unit of the weight.
    pub needed: f64,
    /// Its part of them all, from 0 to 1.
    pub needed_part: f64,
    /// How much of it may be told now: whoever does not come back must not leave it below the mean.
    pub quota: f64,
    /// How far this apiserver is above the mean while it is above the target: more than that never leaves it.
    pub room: f64,
    /// The largest quota of any donor, in connections of mean weight: below a half nobody has anything to tell.
    pub largest_quota: f64,
    /// What a connection weighs on average.
    pub per_connection: f64,
}

/// Clients that were told and have not landed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Transit {
    /// How many.
    pub clients: f64,
    /// What they weigh.
    pub load: f64,
}

/// How many must be told.
#[derive(Clone, Debug, PartialEq)]
pub struct Need {
    /// By each apiserver.
    pub told: Vec<f64>,
    /// By all of them.
    pub all: f64,
}

/// No need is more than this many times the surplus: below such a rho nothing is worth being asked for.
const MOST: f64 = 100.0;

/// Steps 2 to 4: the least that must be told so that nobody whose agent acts ends above its target, when `shares` of those
/// who are told land on each.
pub fn need(servers: &[Server], shares: &[f64]) -> Need {
    debug_assert_eq!(servers.len(), shares.len(), "a share for each apiserver");
    let mut tells: Vec<bool> = servers
        .iter()
        .map(|server| server.acts && server.expected > server.target)
        .collect();
    loop {
        let telling = || servers.iter().zip(shares).zip(&tells).filter(|(_, tells)| **tells);
        let surplus: f64 = telling().map(|((server, _), _)| server.expected - server.target).sum();
        let back: f64 = telling().map(|((_, share), _)| share).sum();
        let all = surplus.max(0.0) / (1.0 - back).max(1.0 / MOST);
        let ends_at = |(server, share): (&Server, &f64)| server.expected + share * all - server.target;
        let above: Vec<bool> = servers
            .iter()
            .zip(shares)
            .zip(&tells)
            .map(|((server, share), tells)| *tells || server.acts && ends_at((server, share)) > 1e-9)
            .collect();
        if above == tells {
            let part = |((server, share), tells): ((&Server, &f64), &bool)| {
                if *tells { ends_at((server, share)).max(0.0) } else { 0.0 }
            };
            let told: Vec<f64> = servers.iter().zip(shares).zip(&tells).map(part).collect();
            return Need { all, told };
        }
        tells = above;
    }
}

/// Step 1: who takes connections, and what each may have.
fn servers(view: &View, policy: &Policy, transit: Transit) -> Vec<Server> {
    let ready = || {
        let snapshots = view.entries.values().map(|entry| &entry.snapshot);
        snapshots.filter(|snapshot| snapshot.state == ServerState::Ready)
    };
    let capacity: f64 = ready().map(|snapshot| snapshot.capacity).sum();
    let load: f64 = ready()
        .map(|snapshot| (snapshot.load - snapshot.unmovable).max(0.0))
        .sum();
    let server = |snapshot: &crate::view::Snapshot| {
        let fair = snapshot.capacity / capacity;
        let load_here = (snapshot.load - snapshot.unmovable).max(0.0);
        Server {
            name: snapshot.apiserver.clone(),
            load: load_here,
            expected: load_here,
            connections: snapshot.connections,
            fair,
            target: (1.0 + policy.skew_target) * fair * (load + transit.load),
            // A dry run says what would be done if those that only try did it.
            acts: snapshot.apiserver == policy.node
                || snapshot.part == Part::Acts
                || policy.mode == Mode::DryRun && snapshot.part == Part::DryRun,
        }
    };
    ready().map(server).collect()
}

/// The apiservers above their target whose agents act.
pub fn donors(view: &View, policy: &Policy, transit: Transit) -> Vec<ApiserverName> {
    donors_of(&servers(view, policy, transit))
}

/// So many below its part are no accident.
const BELOW: f64 = 3.0;

/// The apiservers as far below their part as donors are above it, by more than some clients: whom they have told cannot have come
/// back to them alone.
pub fn below(view: &View, policy: &Policy, transit: Transit) -> Vec<ApiserverName> {
    let is_below = |server: &Server| {
        let part = server.target / (1.0 + policy.skew_target);
        // With an even choice's part of those who are on their way: they may have been told here.
        let load = server.load + server.fair * transit.load;
        load < part * (1.0 - policy.skew_target) && load + BELOW < part
    };
    let servers = servers(view, policy, transit);
    let those = servers.into_iter().filter(is_below);
    those.map(|server| server.name).collect()
}

fn donors_of(servers: &[Server]) -> Vec<ApiserverName> {
    let above = servers
        .iter()
        .filter(|server| server.acts && server.load > server.target);
    above.map(|server| server.name.clone()).collect()
}

/// Computes where the loads stand. Load of clients that are heavier than the target (`Snapshot::unmovable`) counts nowhere: no
/// move helps, and the others are balanced as if it were not there. Clients in transit belong to nobody yet but count in
/// the mean, and the donors' part of them is expected back.
pub fn balance(view: &View, policy: &Policy, rho: &Rho, spread: &Spread, transit: Transit) -> Balance {
    let mut servers = servers(view, policy, transit);
    let apiservers = servers.len();
    let loads: f64 = servers.iter().map(|server| server.load).sum();
    let total = loads + transit.load;
    let connections: u64 = servers.iter().map(|server| server.connections).sum();
    let per_connection = if connections == 0 {
        0.0
    } else {
        loads / connections as f64
    };

    let donors = donors_of(&servers);
    let credible = rho.upper(&donors);
    let shares = {
        let names: Vec<&ApiserverName> = servers.iter().map(|server| &server.name).collect();
        rho.shares(&names, &donors, credible)
    };
    for (server, share) in servers.iter_mut().zip(&shares) {
        if server.load > server.target {
            server.expected = server.load + transit.load * share;
        }
    }
    let Need { told, all } = need(&servers, &shares);
    let surplus: f64 = servers
        .iter()
        .filter(|server| server.acts)
        .map(|server| (server.expected - server.target).max(0.0))
        .sum();

    let quota_of = |server: &Server, needed: f64| {
        let spare = server.load - server.fair * total;
        let quota = needed.min(spare).max(0.0);
        // Each weighs 1: half a connection is rounded to the nearest whole one, but never below the mean.
        if policy.weight.is_counted() {
            (quota + 0.5).floor().min((spare + 1e-9).floor()).max(0.0)
        } else {
            quota
        }
    };
    let largest_quota = servers
        .iter()
        .zip(&told)
        .map(|(server, needed)| quota_of(server, *needed))
        .fold(0.0, f64::max);
    let skew_of = |load: f64, fair: f64, total: f64| {
        if fair * total > 0.0 {
            load / (fair * total) - 1.0
        } else {
            0.0
        }
    };
    let expected_skews = || {
        servers
            .iter()
            .map(|server| (server.acts, skew_of(server.expected, server.fair, total)))
    };
    let wider = if policy.weight.is_counted() {
        spread.factor()
    } else {
        1.0
    };
    let clients = connections as f64 + transit.clients;
    let floors: Vec<Floor> = servers
        .iter()
        .map(|server| {
            policy
                .weight
                .floor(apiservers, server.fair, clients, server.fair * total)
        })
        .collect();
    let noise_floor = floors.iter().map(|floor| floor.above * wider).fold(0.0, f64::max);
    let is_any_empty = expected_skews()
        .zip(&floors)
        .any(|((_, skew), floor)| skew < -floor.below * wider);
    let trigger = if is_any_empty {
        policy.skew_threshold
    } else {
        policy.skew_threshold.max(noise_floor)
    };

    let here = servers.iter().position(|server| server.name == policy.node);
    let own = |figure: &dyn Fn(usize) -> f64| here.map_or(0.0, figure);
    let spare = own(&|at| servers[at].load - servers[at].fair * total);
    let is_above = here.is_some_and(|at| servers[at].expected > servers[at].target);
    let surplus_here = own(&|at| (servers[at].expected - servers[at].target).max(0.0));
    let needed = own(&|at| told[at]);
    let part = |own: f64, all: f64| if all > 0.0 { (own / all).min(1.0) } else { 0.0 };
    let balance = Balance {
        mean: own(&|at| servers[at].fair * total),
        ceiling: own(&|at| servers[at].target),
        skew: own(&|at| skew_of(servers[at].load, servers[at].fair, loads)),
        expected_skew: own(&|at| skew_of(servers[at].expected, servers[at].fair, total)),
        largest_skew: expected_skews()
            .filter(|(acts, _)| *acts)
            .map(|(_, skew)| skew)
            .fold(0.0, f64::max),
        noise_floor,
        trigger,
        donors,
        rho: credible,
        surplus,
        surplus_part: part(surplus_here, surplus),
        needed,
        needed_part: part(needed, all),
        quota: own(&|at| quota_of(&servers[at], told[at])),
        room: if is_above { spare.max(0.0) } else { 0.0 },
        largest_quota: if per_connection > 0.0 {
            largest_quota / per_connection
        } else {
            0.0
        },
        per_connection,
        servers,
    };
    debug_assert!(
        balance.quota >= 0.0 && balance.quota <= balance.needed + 1.0,
        "{balance:?}"
    );
    debug_assert!(
        balance.quota == 0.0 || balance.quota <= spare + 1e-6,
        "nobody is taken below the mean: {balance:?}"
    );
    balance
}

/// The target of this apiserver with everybody counted, those who are heavier than it included.
pub fn full_ceiling(view: &View, policy: &Policy) -> f64 {
    let ready = || {
        let snapshots = view.entries.values().map(|entry| &entry.snapshot);
        snapshots.filter(|snapshot| snapshot.state == ServerState::Ready)
    };
    let capacity: f64 = ready().map(|snapshot| snapshot.capacity).sum();
    let load: f64 = ready().map(|snapshot| snapshot.load).sum();
    if capacity > 0.0 {
        (1.0 + policy.skew_target) * load * policy.capacity / capacity
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        policy::Weight,
        view::{Entry, Snapshot},
    };
    use proptest::prelude::*;
    use std::time::Duration;

    fn name(index: usize) -> ApiserverName {
        ApiserverName::new(format!("node-{index}"))
    }

    fn view(loads: &[f64]) -> View {
        let entries = loads.iter().enumerate().map(|(index, load)| {
            let snapshot = Snapshot {
                apiserver: name(index),
                state: ServerState::Ready,
                connections: *load as u64,
                load: *load,
                unmovable: 0.0,
                draining: 0,
                draining_streams: 0,
                goaways_total: 0,
                told_load_total: 0.0,
                left_total: 0,
                refused: 0,
                node_local: 0,
                accepted_total: 0,
                departed_total: 0,
                counts_after: Duration::ZERO,
                in_transit: 0,
                capacity: 1.0,
                part: Part::Acts,
                plan_in_flight: false,
                rebalancing: false,
                instance: 1,
                names: vec![],
                release: None,
                restarts: 0,
                switch: crate::agent::Switch::default(),
            };
            (
                name(index),
                Entry {
                    snapshot,
                    age: Duration::ZERO,
                },
            )
        });
        View {
            entries: entries.collect(),
        }
    }

    /// Landings from which every set of donors has about this rho: `others` apiservers that are no donors share it.
    fn landings(loads: &[f64], rho: f64) -> Rho {
        let mean = loads.iter().sum::<f64>() / loads.len() as f64;
        let (donors, others): (Vec<_>, Vec<_>) = (0..loads.len()).partition(|index| loads[*index] > 1.05 * mean);
        let mut learned = Rho::default();
        let each = |of: &[usize], share: f64| (share * 1e9 / of.len().max(1) as f64) as u64;
        let of = |group: &[usize], share| -> Vec<_> {
            group.iter().map(|index| (name(*index), each(group, share))).collect()
        };
        let landings = [of(&donors, 1.0 - rho), of(&others, rho)].concat();
        let donors: Vec<_> = donors.into_iter().map(name).collect();
        learned.learn(&landings, &donors, f64::INFINITY);
        learned
    }

    fn policy(index: usize, weight: Weight) -> Policy {
        let mut policy = Policy::new(name(index), std::collections::BTreeSet::new());
        policy.skew_target = 0.05;
        policy.weight = weight;
        policy
    }

    #[test]
    fn one_whose_clients_are_on_their_way_back_is_not_below() {
        let below_of = |loads: &[f64], clients: f64| {
            let transit = Transit { clients, load: clients };
            below(&view(loads), &policy(0, Weight::Connections), transit)
        };
        assert_eq!(below_of(&[161.0, 167.0, 0.0], 0.0), [name(2)]);
        assert_eq!(below_of(&[155.0, 167.0, 0.0], 167.0), [name(2)]);
        assert_eq!(below_of(&[20.0, 167.0, 200.0], 20.0), [name(0)], "a pool of nodes went");
    }

    fn balances(loads: &[f64], rho: f64, weight: Weight) -> Vec<Balance> {
        let rho = landings(loads, rho);
        (0..loads.len())
            .map(|index| {
                balance(
                    &view(loads),
                    &policy(index, weight),
                    &rho,
                    &Spread::default(),
                    Transit::default(),
                )
            })
            .collect()
    }

    /// The worked figures of the design, (500, 500, 0) at 5 %.
    #[test]
    fn the_parts_are_the_worked_figures() {
        for (rho, goaways) in [(1.0, 300.0), (1.0 - 4.0 / 9.0, 540.0), (1.0 / 3.0, 900.0)] {
            let loads = [500.0, 500.0, 0.0];
            let balances = balances(&loads, rho, Weight::Connections);
            let sum: f64 = balances.iter().map(|balance| balance.needed).sum();
            // The quota rests on the highest credible rho, which is a little above what was learned.
            let credible = landings(&loads, rho).upper(&[name(0), name(1)]);
            assert!(
                (sum - goaways * rho / credible).abs() < 1e-6,
                "rho {rho}: {sum}, expected {goaways}"
            );
            assert!(
                (goaways * 0.85..=goaways + 1e-6).contains(&sum),
                "rho {rho}: {sum}, expected {goaways}"
            );
        }
    }

    /// The table of need by hand: loads, shares, who acts, and what all must tell at a target of 0.
    #[test]
    fn need_is_what_anybody_can_work_out() {
        let check = |loads: &[f64], shares: &[f64], acts: &[bool], told: &[f64]| {
            let mean = loads.iter().sum::<f64>() / loads.len() as f64;
            let servers: Vec<Server> = loads
                .iter()
                .zip(acts)
                .enumerate()
                .map(|(index, (load, acts))| Server {
                    name: name(index),
                    load: *load,
                    expected: *load,
                    connections: *load as u64,
                    fair: 1.0 / loads.len() as f64,
                    target: mean,
                    acts: *acts,
                })
                .collect();
            let need = need(&servers, shares);
            for (one, expected) in need.told.iter().zip(told) {
                assert!(
                    (one - expected).abs() < 1e-6,
                    "{loads:?} {shares:?}: {need:?}, expected {told:?}"
                );
            }
            assert!((need.all - told.iter().sum::<f64>()).abs() < 1e-6, "{need:?}");
        };
        let third = [1.0 / 3.0; 3];
        check(&[500.0, 500.0, 0.0], &third, &[true; 3], &[500.0, 500.0, 0.0]);
        check(
            &[500.0, 500.0, 0.0],
            &[0.0, 0.0, 1.0],
            &[true; 3],
            &[500.0 / 3.0, 500.0 / 3.0, 0.0],
        );
        // The second begins below the mean of 100 and is taken above it by those who land there: it tells as well.
        check(&[180.0, 90.0, 30.0], &third, &[true; 3], &[150.0, 60.0, 0.0]);
        // Who does not act tells nobody, and the others tell what they would without it.
        check(&[180.0, 90.0, 30.0], &third, &[true, false, true], &[120.0, 0.0, 0.0]);
        check(&[100.0, 100.0, 100.0], &third, &[true; 3], &[0.0; 3]);
    }

    #[test]
    fn parts_are_in_proportion_to_capacity() {
        let mut view = view(&[200.0, 100.0, 100.0]);
        let big = &mut view.entries.get_mut(&name(0)).expect("three entries").snapshot;
        big.capacity = 2.0;
        let policy = policy(0, Weight::Connections);
        let balance = balance(&view, &policy, &Rho::default(), &Spread::default(), Transit::default());
        assert_eq!((balance.mean, balance.skew, balance.quota), (200.0, 0.0, 0.0));
        assert_eq!(balance.largest_skew, 0.0);
    }

    #[test]
    fn clients_on_their_way_are_not_asked_for_again() {
        // Of (500, 500, 0) the donors told 150 each, nobody has landed yet.
        let transit = Transit {
            clients: 300.0,
            load: 300.0,
        };
        let during = balance(
            &view(&[350.0, 350.0, 0.0]),
            &policy(0, Weight::Connections),
            &Rho::default(),
            &Spread::default(),
            transit,
        );
        assert_eq!((during.mean, during.quota), (1000.0 / 3.0, 0.0));
    }

    #[test]
    fn an_apiserver_that_is_down_is_no_recipient() {
        let mut view = view(&[100.0, 100.0, 0.0]);
        view.entries.get_mut(&name(2)).expect("three entries").snapshot.state = ServerState::Down;
        let balance = balance(
            &view,
            &policy(0, Weight::Connections),
            &Rho::default(),
            &Spread::default(),
            Transit::default(),
        );
        assert_eq!((balance.servers.len(), balance.skew, balance.quota), (2, 0.0, 0.0));
    }

    #[test]
    fn a_client_that_is_heavier_than_the_target_counts_nowhere() {
        let mut view = view(&[980.0, 180.0, 180.0]);
        view.entries
            .get_mut(&name(0))
            .expect("three entries")
            .snapshot
            .unmovable = 800.0;
        let balance = balance(
            &view,
            &policy(0, Weight::Requests),
            &Rho::default(),
            &Spread::default(),
            Transit::default(),
        );
        assert_eq!((balance.mean, balance.skew, balance.quota), (180.0, 0.0, 0.0));
    }

    proptest! {
        #[test]
        fn no_donor_goes_below_the_mean_whoever_comes_back(
            loads in prop::collection::vec(0.0f64..5_000.0, 2..12),
            rho in 0.05f64..1.0,
        ) {
            for weight in [Weight::Connections, Weight::Requests] {
                let mean = loads.iter().sum::<f64>() / loads.len() as f64;
                for (load, balance) in loads.iter().zip(balances(&loads, rho, weight)) {
                    prop_assert!(balance.quota >= 0.0);
                    let after = load - balance.quota;
                    prop_assert!(balance.quota == 0.0 || after >= mean - 1e-6, "{load} - {balance:?}");
                }
            }
        }

        #[test]
        fn only_ratios_matter(loads in prop::collection::vec(1.0f64..5_000.0, 2..12), scale in 0.5f64..50.0) {
            let scaled: Vec<f64> = loads.iter().map(|load| load * scale).collect();
            let pairs = balances(&loads, 0.5, Weight::Requests).into_iter().zip(balances(&scaled, 0.5, Weight::Requests));
            for (one, other) in pairs {
                prop_assert!((one.quota * scale - other.quota).abs() <= 1e-6 * (1.0 + other.quota.abs()));
            }
        }
    }
}
