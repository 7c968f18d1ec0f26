//! Rho: the chance that a moved client lands on an apiserver that is not a donor.
//!
//! Job: learn where new connections land while clients are on their way.
//! Input: landings per apiserver. Output: a mean and an upper credible bound for any set of donors.
//! Must never depend on client addresses: a proxying load balancer hides them.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::ApiserverName;

/// For each apiserver, the share of new connections that landed on it while it was a donor.
///
/// One share per apiserver and not one rho: when a donor has reached the target, rho of those that remain is another.
/// While it was a donor, and not at all times: a balancer that seeks the emptiest sends everyone to an apiserver that just
/// came back, and nobody when that has become the fullest.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rho {
    seen: BTreeMap<ApiserverName, Seen>,
    /// The newest landings everywhere while there were donors: where those land who do not land on donors.
    lately: BTreeMap<ApiserverName, f64>,
}

/// Landings while one apiserver was a donor.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Seen {
    here: f64,
    all: f64,
}

/// Landings that are remembered of each: older ones fade, because a load balancer may change.
const MEMORY: f64 = 400.0;

/// And at least those of so many looks: where thousands land a second, one look is askew, for its snapshots are of different
/// instants.
const LOOKS: f64 = 12.0;

/// The newest landings fade faster: a balancer that seeks the emptiest sends them elsewhere once that is full.
const LATELY: f64 = 100.0;

/// What the prior, an even choice among the apiservers, is worth in landings.
const PRIOR: f64 = 2.0;

/// With fewer landings nothing is known yet.
const FEW: f64 = 10.0;

impl Rho {
    /// Learns from landings since the last call; no more of them count than clients were `expected` to land, for the others
    /// come for reasons of their own: after a crash they are many.
    pub fn learn(&mut self, landings: &[(ApiserverName, u64)], donors: &[ApiserverName], expected: f64) {
        let all = landings.iter().map(|(_, count)| count).sum::<u64>() as f64;
        if all == 0.0 {
            return;
        }
        let part = (expected / all).min(1.0);
        if !donors.is_empty() {
            for (name, count) in landings {
                *self.lately.entry(name.clone()).or_default() += *count as f64 * part;
            }
            let keep = (LATELY.max(LOOKS * all * part) / self.lately.values().sum::<f64>()).min(1.0);
            self.lately.values_mut().for_each(|count| *count *= keep);
        }
        let mut landed: BTreeMap<&ApiserverName, u64> = BTreeMap::new();
        for (name, count) in landings {
            *landed.entry(name).or_default() += count;
        }
        for donor in donors {
            let here = landed.get(donor).copied().unwrap_or_default();
            let seen = self.seen.entry(donor.clone()).or_default();
            seen.here += here as f64 * part;
            seen.all += all * part;
            let keep = (MEMORY.max(LOOKS * all * part) / seen.all).min(1.0);
            seen.here *= keep;
            seen.all *= keep;
        }
    }

    /// The share of new connections that land on one of `apiservers` apiservers; it starts from an even choice.
    pub fn share(&self, name: &ApiserverName, apiservers: usize) -> f64 {
        let Seen { here, all } = self.seen.get(name).copied().unwrap_or_default();
        (here + PRIOR / apiservers.max(1) as f64) / (all + PRIOR)
    }

    /// Mean of rho's posterior; without landings it is `1 - k/n`.
    pub fn mean(&self, donors: &[ApiserverName], apiservers: usize) -> f64 {
        let on_donors: f64 = donors.iter().map(|donor| self.share(donor, apiservers)).sum();
        (1.0 - on_donors).max(0.0)
    }

    /// The highest rho that is still credible: two standard deviations above the mean, 1 while nothing is learned.
    ///
    /// Quotas use this one: a first plan never sends more than a load balancer with rho = 1 needs,
    /// and what it leaves undone the next plan does with a rho that is known.
    pub fn upper(&self, donors: &[ApiserverName]) -> f64 {
        let landings = self.landings(donors);
        if landings < FEW {
            return 1.0;
        }
        let elsewhere = self.elsewhere(donors);
        let (a, b) = (elsewhere + 1.0, landings - elsewhere + 1.0);
        let n = a + b;
        let deviation = (a * b / (n * n * (n + 1.0))).sqrt();
        (a / n + 2.0 * deviation).min(1.0)
    }

    /// Which share of those who move lands on each of `names`, when `rho` of them do not land on donors: what the donors
    /// get is split among them by what each was seen to get, and so is the rest among the others.
    pub fn shares(&self, names: &[&ApiserverName], donors: &[ApiserverName], rho: f64) -> Vec<f64> {
        let even = PRIOR / names.len().max(1) as f64;
        // Each look asks this of all apiservers, and there may be many.
        let donors: BTreeSet<&ApiserverName> = donors.iter().collect();
        let weighed = |name: &&ApiserverName| {
            let is_donor = donors.contains(name);
            let weight = if is_donor {
                self.share(name, names.len())
            } else {
                self.lately.get(*name).copied().unwrap_or_default() + even
            };
            (is_donor, weight)
        };
        let weighed: Vec<(bool, f64)> = names.iter().map(weighed).collect();
        let sum = |donor: bool| -> f64 {
            let of = weighed.iter().filter(|(is_donor, _)| *is_donor == donor);
            of.map(|(_, weight)| weight).sum::<f64>().max(f64::EPSILON)
        };
        let (on_donors, on_others) = (sum(true), sum(false));
        let share = |(is_donor, weight): &(bool, f64)| {
            if *is_donor {
                (1.0 - rho) * weight / on_donors
            } else {
                rho * weight / on_others
            }
        };
        weighed.iter().map(share).collect()
    }

    /// Landings that it rests on, for these donors: those of the one that is known least.
    pub fn landings(&self, donors: &[ApiserverName]) -> f64 {
        let known = donors
            .iter()
            .map(|donor| self.seen.get(donor).map_or(0.0, |seen| seen.all));
        known.reduce(f64::min).unwrap_or(0.0)
    }

    /// How many of those were on apiservers that are no donors.
    pub fn elsewhere(&self, donors: &[ApiserverName]) -> f64 {
        let on_donors: f64 = donors
            .iter()
            .filter_map(|donor| self.seen.get(donor))
            .filter(|seen| seen.all > 0.0)
            .map(|seen| seen.here / seen.all)
            .sum();
        (1.0 - on_donors).max(0.0) * self.landings(donors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> [ApiserverName; 3] {
        ["a", "b", "c"].map(ApiserverName::new)
    }

    fn land(rho: &mut Rho, landings: [u64; 3], donors: &[ApiserverName]) {
        let landings: Vec<_> = names().into_iter().zip(landings).collect();
        rho.learn(&landings, donors, f64::INFINITY);
    }

    #[test]
    fn unknown_is_an_even_choice_and_optimistic() {
        let donors = &names()[..2];
        assert_eq!(Rho::default().upper(donors), 1.0);
        assert!((Rho::default().mean(donors, 3) - 1.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn landings_are_learned_for_any_set_of_donors() {
        let mut rho = Rho::default();
        land(&mut rho, [30, 30, 30], &names()[..2]);
        let [a, b, c] = names();
        for (donors, expected) in [(vec![a.clone(), b], 1.0 / 3.0), (vec![a], 2.0 / 3.0)] {
            assert!((rho.mean(&donors, 3) - expected).abs() < 0.02, "{donors:?}: {rho:?}");
            assert!(
                (expected..expected + 0.12).contains(&rho.upper(&donors)),
                "{donors:?}: {rho:?}"
            );
        }
        assert_eq!(
            rho.upper(&[c]),
            1.0,
            "c was no donor: nothing is known of what it gets as one"
        );
    }

    #[test]
    fn what_was_learned_fades_when_the_balancer_changes() {
        let mut rho = Rho::default();
        let donors = &names()[..1];
        land(&mut rho, [200, 0, 0], donors);
        assert!(rho.upper(donors) < 0.05);
        for _ in 0..40 {
            land(&mut rho, [0, 0, 20], donors);
        }
        assert!(rho.mean(donors, 3) > 0.7, "{rho:?}");
    }

    #[test]
    fn shares_add_up_and_follow_what_was_seen() {
        let mut rho = Rho::default();
        let [a, b, c] = names();
        let all = [&a, &b, &c];
        let shares = rho.shares(&all, std::slice::from_ref(&a), 1.0);
        assert_eq!(shares, [0.0, 0.5, 0.5], "nothing is known: the others alike");
        land(&mut rho, [30, 0, 60], std::slice::from_ref(&a));
        let shares = rho.shares(&all, std::slice::from_ref(&a), 2.0 / 3.0);
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        assert!(shares[1] < 0.02 && shares[2] > 0.64, "{shares:?}");
    }

    #[test]
    fn those_who_come_for_reasons_of_their_own_do_not_count() {
        let mut rho = Rho::default();
        let [a, b, _] = names();
        let landings = [(a.clone(), 500), (b, 500)];
        rho.learn(&landings, std::slice::from_ref(&a), 2.0);
        assert_eq!(rho.landings(&[a]), 2.0);
    }
}
