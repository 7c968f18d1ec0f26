//! Rho: the chance that a moved client lands on an apiserver that is not a donor.
//!
//! Job: learn where new connections land while clients are on their way.
//! Input: landings per apiserver. Output: a mean and an upper credible bound for any set of donors.
//! Must never depend on client addresses: a proxying load balancer hides them.

use std::collections::BTreeMap;

use crate::words::ApiserverName;

/// Landings by apiserver: a Dirichlet posterior, so that rho of a set of donors is a Beta one.
///
/// One share per apiserver and not one rho: when a donor has reached the target, rho of those that remain is another.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rho {
    landed: BTreeMap<ApiserverName, f64>,
}

/// Landings that are remembered: older ones fade, because a load balancer may change.
const MEMORY: f64 = 400.0;

/// What the prior, an even choice among the apiservers, is worth in landings.
const PRIOR: f64 = 2.0;

/// With fewer landings nothing is known yet.
const FEW: f64 = 10.0;

/// Landings from which rho near 0 is believed.
const ENOUGH: f64 = 100.0;

/// Below this upper bound moving is futile.
const FUTILE: f64 = 0.05;

impl Rho {
    /// Learns from landings since the last call; no more of them count than clients were `expected` to land, for the others
    /// come for reasons of their own: after a crash they are many.
    pub fn learn<'a>(&mut self, landings: impl IntoIterator<Item = (&'a ApiserverName, u64)>, expected: f64) {
        let landings: Vec<_> = landings.into_iter().filter(|(_, count)| *count > 0).collect();
        let all: u64 = landings.iter().map(|(_, count)| count).sum();
        let part = (expected / all.max(1) as f64).min(1.0);
        for (name, count) in landings {
            *self.landed.entry(name.clone()).or_default() += count as f64 * part;
        }
        let total = self.landings();
        if total > MEMORY {
            self.landed.values_mut().for_each(|count| *count *= MEMORY / total);
        }
    }

    /// The share of new connections that land on one of `apiservers` apiservers; it starts from an even choice.
    pub fn share(&self, name: &ApiserverName, apiservers: usize) -> f64 {
        let landed = self.landed.get(name).copied().unwrap_or_default();
        (landed + PRIOR / apiservers.max(1) as f64) / (self.landings() + PRIOR)
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
        let landings = self.landings();
        if landings < FEW {
            return 1.0;
        }
        let on_donors: f64 = donors.iter().filter_map(|donor| self.landed.get(donor)).sum();
        let (a, b) = (landings - on_donors + 1.0, on_donors + 1.0);
        let n = a + b;
        let deviation = (a * b / (n * n * (n + 1.0))).sqrt();
        (a / n + 2.0 * deviation).min(1.0)
    }

    /// Whether moving clients off these donors has been seen to be pointless.
    pub fn is_futile(&self, donors: &[ApiserverName]) -> bool {
        self.landings() >= ENOUGH && self.upper(donors) < FUTILE
    }

    /// Landings on apiservers that are no donors.
    pub fn elsewhere(&self, donors: &[ApiserverName]) -> f64 {
        let landed = self.landed.iter().filter(|(name, _)| !donors.contains(name));
        landed.map(|(_, count)| count).sum()
    }

    /// Landings that it rests on.
    pub fn landings(&self) -> f64 {
        self.landed.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> [ApiserverName; 3] {
        ["a", "b", "c"].map(ApiserverName::new)
    }

    fn learned(landings: [u64; 3]) -> Rho {
        let mut rho = Rho::default();
        rho.learn(names().iter().zip(landings), 1e12);
        rho
    }

    #[test]
    fn unknown_is_an_even_choice_and_optimistic() {
        let donors = &names()[..2];
        assert_eq!(Rho::default().upper(donors), 1.0);
        assert!((Rho::default().mean(donors, 3) - 1.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn landings_are_learned_for_any_set_of_donors() {
        let rho = learned([30, 30, 30]);
        let [a, b, _] = names();
        for (donors, expected) in [(vec![a.clone(), b], 1.0 / 3.0), (vec![a], 2.0 / 3.0)] {
            assert!((rho.mean(&donors, 3) - expected).abs() < 0.02, "{donors:?}: {rho:?}");
            assert!(
                (expected..expected + 0.12).contains(&rho.upper(&donors)),
                "{donors:?}: {rho:?}"
            );
            assert!(!rho.is_futile(&donors));
        }
    }

    #[test]
    fn all_back_is_futile_and_is_forgotten_when_it_changes() {
        let mut rho = learned([200, 0, 0]);
        let donors = &names()[..1];
        assert!(rho.is_futile(donors));
        assert!(!rho.is_futile(&names()[1..2]), "clients of b would land on a");
        for _ in 0..40 {
            rho.learn([(&names()[2], 20)], 1e12);
        }
        assert!(!rho.is_futile(donors));
        assert!(rho.mean(donors, 3) > 0.7, "{rho:?}");
    }
}
