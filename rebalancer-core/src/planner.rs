//! The planner's maths: how many GOAWAYs this apiserver should send, and to whom.
//!
//! Input: a view, what is on its way, rho, the policy, and the table. Output: a [`Balance`] and victims.
//! Must never look at anything that another agent with the same view would see differently, except for its own
//! connections: each donor computes its own share of one common plan, without a leader.

use std::collections::BTreeMap;

use crate::{
    decision::{Hold, Victim},
    policy::{Policy, Weight},
    rho::Rho,
    shim::ConnectionState,
    table::{ClientKey, Connection, ConnectionTable},
    view::{ServerState, View},
    words::{ApiserverName, ConnectionId, Protocol, Timestamp},
};

/// Where the loads stand, and what this apiserver should do about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Balance {
    /// Apiservers that take connections.
    pub apiservers: usize,
    /// Mean load, with what is on its way counted.
    pub mean: f64,
    /// Skew of this apiserver, with the returns it must expect counted.
    pub skew: f64,
    /// The largest skew of any apiserver, counted in the same way.
    pub largest_skew: f64,
    /// Skew that chance alone makes: twice the relative deviation of random placement.
    pub noise_floor: f64,
    /// Skew that starts a plan: the configured threshold or the noise floor, whichever is higher.
    pub trigger: f64,
    /// The apiservers above the target.
    pub donors: Vec<ApiserverName>,
    /// Rho for these donors that the quota rests on: the highest that is credible.
    pub rho: f64,
    /// How much all donors together are above the target.
    pub surplus: f64,
    /// The surplus in connections of mean weight: the moves that counting would need.
    pub surplus_connections: f64,
    /// How much load this apiserver should tell to go, in the unit of the weight.
    pub quota: f64,
    /// The largest quota of any donor, in connections of mean weight: below a half nobody has anything to tell.
    pub largest_quota: f64,
}

/// Deviations of random placement that make the noise floor.
const NOISE_DEVIATIONS: f64 = 2.0;

/// Computes where the loads stand.
///
/// With loads `c`, target `T = (1 + t) * mean`, surplus `E = sum (c - T)+` and the chance `rho` that a moved client
/// lands on no donor, `G = E / rho` GOAWAYs are needed in all; each donor gets its part of `(1 - rho) * G` back, by the
/// share of new connections that land on it, so its own quota is `(c + G * back - T)+`.
/// `in_transit` clients have been told and have not landed: they belong to nobody yet but count in the mean,
/// and their returns are expected in the same way.
pub fn balance(view: &View, node: &ApiserverName, target: f64, threshold: f64, rho: &Rho, in_transit: f64) -> Balance {
    let ready: BTreeMap<&ApiserverName, (f64, u64)> = view
        .entries
        .iter()
        .filter(|(_, entry)| entry.snapshot.state == ServerState::Ready)
        .map(|(name, entry)| (name, (entry.snapshot.load, entry.snapshot.connections)))
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
    let transit_load = in_transit * per_connection;
    let mean = (load + transit_load) / n;
    let ceiling = (1.0 + target) * mean;

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
            load + transit_load * back(name)
        } else {
            load
        }
    };
    let surplus: f64 = ready
        .iter()
        .map(|(name, (load, _))| (expected(name, *load) - ceiling).max(0.0))
        .sum();
    let all = if credible > 0.0 { surplus / credible } else { 0.0 };
    let quota_of = |name: &ApiserverName, load: f64| {
        let expected = expected(name, load);
        if expected > ceiling {
            expected + all * back(name) - ceiling
        } else {
            0.0
        }
    };
    let own = ready.get(node).map_or(0.0, |(load, _)| expected(node, *load));
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

    let population = connections as f64 + in_transit;
    let noise_floor = if population > 0.0 {
        NOISE_DEVIATIONS * ((n - 1.0) / population).sqrt()
    } else {
        f64::INFINITY
    };
    let skew_of = |expected: f64| if mean > 0.0 { expected / mean - 1.0 } else { 0.0 };
    Balance {
        apiservers,
        mean,
        skew: skew_of(own),
        largest_skew: ready
            .iter()
            .map(|(name, (load, _))| skew_of(expected(name, *load)))
            .fold(0.0, f64::max),
        noise_floor,
        trigger: threshold.max(noise_floor),
        donors,
        rho: credible,
        surplus,
        surplus_connections: in_connections(surplus),
        quota,
        largest_quota: in_connections(largest_quota),
    }
}

/// What a connection weighs.
pub fn load_of(connection: &Connection, weight: Weight) -> f64 {
    match weight {
        Weight::Connections => 1.0,
        Weight::Requests => connection.rates.requests,
        Weight::Bytes => connection.rates.bytes,
        Weight::Streams => f64::from(connection.counters.open_streams),
    }
}

/// Who was told, and until when it is left alone.
#[derive(Clone, Debug, Default)]
pub struct Cooldowns {
    told: BTreeMap<ClientKey, Cooldown>,
}

#[derive(Clone, Debug)]
struct Cooldown {
    until: Timestamp,
    told: usize,
    /// A client with several connections may be told once for each.
    allowed: usize,
}

impl Cooldowns {
    /// Notes that a client with `connections` connections is told now.
    pub fn note(&mut self, key: ClientKey, connections: usize, until: Timestamp) {
        let entry = self.told.entry(key).or_insert(Cooldown {
            until,
            told: 0,
            allowed: connections.max(1),
        });
        entry.told += 1;
        entry.until = until;
    }

    /// Forgets who may be told again.
    pub fn expire(&mut self, now: Timestamp) {
        self.told.retain(|_, cooldown| cooldown.until > now);
    }

    /// Takes back a note: the client was not told after all.
    pub fn forget(&mut self, key: &ClientKey) {
        if let Some(cooldown) = self.told.get_mut(key) {
            cooldown.told = cooldown.told.saturating_sub(1);
            if cooldown.told == 0 {
                self.told.remove(key);
            }
        }
    }

    fn left(&self, key: &ClientKey) -> usize {
        self.told
            .get(key)
            .map_or(usize::MAX, |cooldown| cooldown.allowed.saturating_sub(cooldown.told))
    }
}

/// Chooses the victims that make up `quota` of load, at most `limit` of them.
///
/// With equal weights: those with the fewest open watches first, then the oldest; with other weights: the heaviest
/// first that still fits. Ties are broken by id.
///
/// # Errors
///
/// The hold that says why nobody can be moved.
pub fn choose(
    table: &ConnectionTable,
    policy: &Policy,
    cooldowns: &Cooldowns,
    quota: f64,
    limit: usize,
    now: Timestamp,
) -> Result<Vec<Victim>, Hold> {
    let (mut cooling, mut young, mut excluded, mut unknown) = (0, 0, 0, 0);
    let mut candidates: Vec<(ConnectionId, &Connection, f64)> = Vec::new();
    for (id, connection) in table.iter() {
        if connection.state == ConnectionState::Draining || connection.protocol == Protocol::Http1 {
            continue;
        }
        if connection.protocol == Protocol::Unknown {
            unknown += 1;
        } else if connection.is_node_local()
            || policy
                .exclusions
                .matches(connection.client().ip(), connection.user(), connection.user_agent())
        {
            excluded += 1;
        } else if now.since(connection.opened_at) < policy.min_connection_age && !connection.seeded {
            young += 1;
        } else if cooldowns.left(&connection.client_key()) == 0 {
            cooling += 1;
        } else {
            candidates.push((id, connection, load_of(connection, policy.weight)));
        }
    }
    if candidates.is_empty() {
        return Err(Hold::CoolingDown {
            cooling,
            young,
            excluded,
            unknown,
        });
    }
    match policy.weight {
        Weight::Connections => {
            candidates.sort_by_key(|(id, connection, _)| (connection.counters.open_watches, connection.opened_at, *id))
        }
        _ => candidates.sort_by(|a, b| b.2.total_cmp(&a.2).then(a.0.cmp(&b.0))),
    }

    // Each weighs 1: half a connection of quota is rounded to the nearest whole one.
    let mut room = if policy.weight == Weight::Connections {
        (quota + 0.5).floor()
    } else {
        quota
    };
    let mut spent: BTreeMap<ClientKey, usize> = BTreeMap::new();
    let mut victims = Vec::new();
    for (id, connection, load) in candidates {
        if victims.len() == limit {
            break;
        }
        if load > room || load <= 0.0 {
            continue;
        }
        let key = connection.client_key();
        let told = spent.entry(key.clone()).or_default();
        if *told >= cooldowns.left(&key) {
            continue;
        }
        *told += 1;
        room -= load;
        victims.push(Victim {
            connection: id,
            client: connection.client(),
            user: connection.user().map(str::to_owned),
            user_agent: connection.user_agent().map(str::to_owned),
            load,
            age: now.since(connection.opened_at),
            why: match policy.weight {
                Weight::Connections => format!("{} open watches, cheap to move", connection.counters.open_watches),
                _ => "the heaviest that still fits".to_owned(),
            },
        });
    }
    Ok(victims)
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
                draining: 0,
                goaways_total: 0,
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
        let names: Vec<_> = (0..loads.len()).map(name).collect();
        let each = |of: &[usize], share: f64| (share * 1e9 / of.len().max(1) as f64) as u64;
        let of = |group: &[usize], share| -> Vec<_> {
            group.iter().map(|index| (&names[*index], each(group, share))).collect()
        };
        learned.learn([of(&donors, 1.0 - rho), of(&others, rho)].concat());
        learned
    }

    fn quotas(loads: &[f64], rho: f64) -> Vec<f64> {
        let rho = landings(loads, rho);
        (0..loads.len())
            .map(|index| balance(&view(loads), &name(index), 0.05, 0.10, &rho, 0.0).quota)
            .collect()
    }

    /// The worked figures of the design, (500, 500, 0) at 5 %.
    #[test]
    fn quotas_are_the_worked_figures() {
        for (rho, goaways) in [(1.0, 300.0), (1.0 - 4.0 / 9.0, 540.0), (1.0 / 3.0, 900.0)] {
            let loads = [500.0, 500.0, 0.0];
            let sum: f64 = quotas(&loads, rho).iter().sum();
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
        let during = balance(
            &view(&[350.0, 350.0, 0.0]),
            &name(0),
            0.05,
            0.10,
            &Rho::default(),
            300.0,
        );
        assert_eq!((during.mean, during.quota), (1000.0 / 3.0, 0.0));
    }

    #[test]
    fn an_apiserver_that_is_down_is_no_recipient() {
        let mut view = view(&[100.0, 100.0, 0.0]);
        view.entries.get_mut(&name(2)).expect("three entries").snapshot.state = ServerState::Down;
        let balance = balance(&view, &name(0), 0.05, 0.10, &Rho::default(), 0.0);
        assert_eq!((balance.apiservers, balance.skew, balance.quota), (2, 0.0, 0.0));
    }

    proptest! {
        #[test]
        fn no_donor_goes_below_the_mean(
            loads in prop::collection::vec(0.0f64..5_000.0, 2..12),
            rho in 0.05f64..1.0,
        ) {
            let landings = landings(&loads, rho);
            let balance = balance(&view(&loads), &name(0), 0.05, 0.10, &landings, 0.0);
            let quotas = quotas(&loads, rho);
            let (k, rho) = (balance.donors.len().max(1) as f64, balance.rho);
            let all: f64 = quotas.iter().sum();
            let mean = loads.iter().sum::<f64>() / loads.len() as f64;
            for (load, quota) in loads.iter().zip(&quotas) {
                let after = load - quota + if *quota > 0.0 { all * (1.0 - rho) / k } else { 0.0 };
                prop_assert!(*quota >= 0.0);
                prop_assert!(*quota == 0.0 || after >= mean - 1e-6, "{load} - {quota} -> {after} < {mean}");
            }
        }

        #[test]
        fn only_ratios_matter(loads in prop::collection::vec(1.0f64..5_000.0, 2..12), scale in 0.5f64..50.0) {
            let scaled: Vec<f64> = loads.iter().map(|load| load * scale).collect();
            for (one, other) in quotas(&loads, 0.5).iter().zip(quotas(&scaled, 0.5)) {
                // Counts are whole, so per-connection loads differ by rounding only.
                prop_assert!((one * scale - other).abs() <= 1e-6 * (1.0 + other.abs()));
            }
        }
    }
}
