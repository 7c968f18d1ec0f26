//! The planner's maths: how many GOAWAYs this apiserver should send, and to whom.
//!
//! Input: a view, what is on its way, rho, the policy, and the table. Output: a [`Balance`] and victims.
//! Must never look at anything that another agent with the same view would see differently, except for its own
//! connections: each donor computes its own share of one common plan, without a leader.

use std::collections::BTreeMap;

use crate::{
    ids::ApiserverName,
    policy::{Policy, Weight},
    rho::Rho,
    table::{Connection, ConnectionTable, SMOOTHING_SECONDS},
    view::{ServerState, View},
};

mod choose;
mod cooldown;
pub mod noise;

pub use choose::{Request, choose, heavy};
pub use cooldown::Cooldowns;
use noise::Floor;

/// Where the loads stand, and what this apiserver should do about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Balance {
    /// Apiservers that take connections.
    pub apiservers: usize,
    /// Mean load, with what is on its way counted.
    pub mean: f64,
    /// `(1 + target) * mean`.
    pub ceiling: f64,
    /// Skew of this apiserver, with the returns it must expect counted.
    pub skew: f64,
    /// The largest skew of any apiserver, counted in the same way.
    pub largest_skew: f64,
    /// Skew that chance alone makes (see [`noise::floor`]).
    pub noise_floor: f64,
    /// Skew that starts a plan: the configured threshold or the noise floor, whichever is higher; the threshold alone when
    /// one apiserver is emptier than chance makes it.
    pub trigger: f64,
    /// The apiservers above the target.
    pub donors: Vec<ApiserverName>,
    /// Rho for these donors that the quota rests on: the highest that is credible.
    pub rho: f64,
    /// How much all donors together are above the target.
    pub surplus: f64,
    /// The surplus in connections of mean weight: the moves that counting would need.
    pub surplus_connections: f64,
    /// This apiserver's part of all GOAWAYs that are needed, in the unit of the weight.
    pub needed: f64,
    /// How much of it may be told now: whoever does not come back must not leave it below the mean.
    pub quota: f64,
    /// How far this apiserver is above the mean while it is above the target: more than that never leaves it.
    pub room: f64,
    /// The largest quota of any donor, in connections of mean weight: below a half nobody has anything to tell.
    pub largest_quota: f64,
}

/// Clients that were told and have not landed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Transit {
    /// How many.
    pub clients: f64,
    /// What they weigh.
    pub load: f64,
}

/// Computes where the loads stand.
///
/// With loads `c`, target `T = (1 + t) * mean`, surplus `E = sum (c - T)+` and the chance `rho` that a moved client
/// lands on no donor, `G = E / rho` GOAWAYs are needed in all; each donor gets its part of `(1 - rho) * G` back, by the
/// share of new connections that land on it, so its own part is `(c + G * back - T)+`. Its quota now is never so much that it
/// would be below the mean if nobody came back: what is missing is told when it is known who did.
/// Clients in transit have been told and have not landed: they belong to nobody yet but count in the mean,
/// and their returns are expected in the same way.
/// Load of clients that are heavier than the target (`Snapshot::unmovable`) counts nowhere: no move helps, and the others
/// are balanced as if it were not there.
pub fn balance(view: &View, policy: &Policy, rho: &Rho, transit: Transit) -> Balance {
    let ready: BTreeMap<&ApiserverName, (f64, u64)> = view
        .entries
        .iter()
        .map(|(name, entry)| (name, &entry.snapshot))
        .filter(|(_, snapshot)| snapshot.state == ServerState::Ready)
        .map(|(name, snapshot)| {
            (
                name,
                ((snapshot.load - snapshot.unmovable).max(0.0), snapshot.connections),
            )
        })
        .collect();
    let apiservers = ready.len();
    let n = apiservers.max(1) as f64;
    let load: f64 = ready.values().map(|(load, _)| load).sum();
    let connections: u64 = ready.values().map(|(_, connections)| connections).sum();
    let per_connection = if connections == 0 {
        0.0
    } else {
        load / connections as f64
    };
    let mean = (load + transit.load) / n;
    let ceiling = (1.0 + policy.skew_target) * mean;

    let donors: Vec<ApiserverName> = ready
        .iter()
        .filter(|(_, (load, _))| *load > ceiling)
        .map(|(name, _)| (*name).clone())
        .collect();
    let credible = rho.upper(&donors);
    let on_donors: f64 = donors.iter().map(|donor| rho.share(donor, apiservers)).sum();
    let back = |name: &ApiserverName| (1.0 - credible) * rho.share(name, apiservers) / on_donors;
    let expected = |name: &ApiserverName, load: f64| {
        if load > ceiling {
            load + transit.load * back(name)
        } else {
            load
        }
    };
    let surplus: f64 = ready
        .iter()
        .map(|(name, (load, _))| (expected(name, *load) - ceiling).max(0.0))
        .sum();
    let all = if credible > 0.0 { surplus / credible } else { 0.0 };
    let needed_of = |name: &ApiserverName, load: f64| {
        let expected = expected(name, load);
        if expected > ceiling {
            expected + all * back(name) - ceiling
        } else {
            0.0
        }
    };
    let quota_of = |name: &ApiserverName, load: f64| {
        let quota = needed_of(name, load).min(load - mean).max(0.0);
        // Each weighs 1: half a connection is rounded to the nearest whole one, but never below the mean.
        if policy.weight == Weight::Connections {
            (quota + 0.5).floor().min((load - mean + 1e-9).floor()).max(0.0)
        } else {
            quota
        }
    };
    let node = &policy.node;
    let own = ready.get(node).map_or(0.0, |(load, _)| expected(node, *load));
    let needed = ready.get(node).map_or(0.0, |(load, _)| needed_of(node, *load));
    let quota = ready.get(node).map_or(0.0, |(load, _)| quota_of(node, *load));
    let largest_quota = ready
        .iter()
        .map(|(name, (load, _))| quota_of(name, *load))
        .fold(0.0, f64::max);
    let in_connections = |load: f64| {
        if per_connection > 0.0 {
            load / per_connection
        } else {
            0.0
        }
    };

    let floor = match policy.weight {
        Weight::Connections => noise::floor(apiservers, connections as f64 + transit.clients),
        Weight::Requests => noise::of_rates(apiservers, mean, SMOOTHING_SECONDS),
        // How bytes and streams vary by themselves is not known: the threshold stands.
        Weight::Bytes | Weight::Streams => Floor { above: 0.0, below: 0.0 },
    };
    let skew_of = |expected: f64| if mean > 0.0 { expected / mean - 1.0 } else { 0.0 };
    let smallest_skew = ready
        .values()
        .map(|(load, _)| skew_of(*load))
        .fold(f64::INFINITY, f64::min);
    Balance {
        apiservers,
        mean,
        ceiling,
        skew: skew_of(own),
        largest_skew: ready
            .iter()
            .map(|(name, (load, _))| skew_of(expected(name, *load)))
            .fold(0.0, f64::max),
        noise_floor: floor.above,
        trigger: if smallest_skew < -floor.below {
            policy.skew_threshold
        } else {
            policy.skew_threshold.max(floor.above)
        },
        donors,
        rho: credible,
        surplus,
        surplus_connections: in_connections(surplus),
        needed,
        quota,
        room: ready.get(node).map_or(0.0, |(load, _)| {
            if expected(node, *load) > ceiling {
                (load - mean).max(0.0)
            } else {
                0.0
            }
        }),
        largest_quota: in_connections(largest_quota),
    }
}

/// The target with everybody counted, those who are heavier than it included.
pub fn full_ceiling(view: &View, target: f64) -> f64 {
    let snapshots = view.entries.values().map(|entry| &entry.snapshot);
    let ready: Vec<f64> = snapshots
        .filter(|snapshot| snapshot.state == ServerState::Ready)
        .map(|snapshot| snapshot.load)
        .collect();
    (1.0 + target) * ready.iter().sum::<f64>() / ready.len().max(1) as f64
}

/// The load of those who are heavier than the target: wherever they go, that apiserver is above it.
pub fn unmovable(table: &ConnectionTable, weight: Weight, ceiling: f64) -> f64 {
    if weight == Weight::Connections {
        return 0.0;
    }
    let heavy = |connection: &&Connection| connection.is_active() && connection.load(weight) > ceiling;
    table
        .scan()
        .filter(heavy)
        .map(|connection| connection.load(weight))
        // Not `sum`, which is -0 for nothing.
        .fold(0.0, |sum, load| sum + load)
}

/// A token of the budget pays for one reconnect, or for the start of so many watches where the client lands.
const WATCHES_PER_TOKEN: u32 = 10;

/// What telling a connection costs, in tokens: one, and one more for each ten watches that start anew elsewhere.
///
/// A watch takes a seat of the recipient's flow control until its first events are sent; a client with a thousand watches
/// is not moved at the pace of a thousand clients with one.
pub fn cost_of(connection: &Connection) -> f64 {
    f64::from(1 + connection.counters.open_watches / WATCHES_PER_TOKEN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{Entry, Snapshot};
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
                refused: 0,
                node_local: 0,
                accepted_total: 0,
                plan_in_flight: false,
                rebalancing: false,
                instance: 1,
                names: vec![],
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

    fn balances(loads: &[f64], rho: f64, weight: Weight) -> Vec<Balance> {
        let rho = landings(loads, rho);
        (0..loads.len())
            .map(|index| balance(&view(loads), &policy(index, weight), &rho, Transit::default()))
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
            Transit::default(),
        );
        assert_eq!((balance.apiservers, balance.skew, balance.quota), (2, 0.0, 0.0));
    }

    #[test]
    fn a_client_that_is_heavier_than_the_target_counts_nowhere() {
        let mut view = view(&[980.0, 180.0, 180.0]);
        view.entries
            .get_mut(&name(0))
            .expect("three entries")
            .snapshot
            .unmovable = 800.0;
        let balance = balance(&view, &policy(0, Weight::Requests), &Rho::default(), Transit::default());
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
