//! How even this load balancer's landings are: the noise floor is what it makes, not what pure chance would.
//!
//! Job: score windows of landings against chance. Input: landings per apiserver, and who stands above the mean.
//! Output: a factor for the noise floor, from nearly 0 (in turn, or to the emptiest) to 1 (by chance, or not known).
//! Must never call a balancer more even than it was seen to be: few windows say little.
//!
//! A window closes when eight landings have come for each apiserver. Only what lands too much on those that are above the
//! mean already counts: that is how chance makes skew, while a balancer that seeks the emptiest does the opposite. By chance
//! the excess `x` over `m/n` has the expected square `m/n (1 - 1/n)`, half of it on the side that counts. The quotient of
//! the sums of what was seen and what chance makes is the relative variance; its root scales the floor.

use std::collections::BTreeMap;

use crate::ids::ApiserverName;

/// Landings for each apiserver in one window.
const WINDOW: u64 = 8;

/// Chance is given so many windows in advance.
const PRIOR: f64 = 2.0;

/// Windows that are remembered: the balancer may be another one tomorrow.
const MEMORY: f64 = 64.0;

/// What is known of the balancer's evenness.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Spread {
    landed: BTreeMap<ApiserverName, u64>,
    windows: f64,
    seen: f64,
    by_chance: f64,
}

impl Spread {
    /// Takes in landings on the apiservers that are ready; `above` says who has more than its share now.
    pub fn learn(&mut self, landings: &[(ApiserverName, u64)], above: &[bool]) {
        let same =
            self.landed.len() == landings.len() && landings.iter().all(|(name, _)| self.landed.contains_key(name));
        if !same {
            self.landed = landings.iter().map(|(name, _)| (name.clone(), 0)).collect();
        }
        for (name, count) in landings {
            *self.landed.entry(name.clone()).or_default() += count;
        }
        let n = landings.len() as u64;
        let all: u64 = self.landed.values().sum();
        if n < 2 || all < WINDOW * n {
            return;
        }
        let even = all as f64 / n as f64;
        let mut counted = 0_u32;
        for ((name, _), _) in landings.iter().zip(above).filter(|(_, above)| **above) {
            let excess = (self.landed[name] as f64 - even).max(0.0);
            self.seen += excess * excess / even;
            counted += 1;
        }
        self.by_chance += f64::from(counted) * 0.5 * (1.0 - 1.0 / n as f64);
        self.windows += f64::from(counted.min(1));
        let keep = (MEMORY / self.windows.max(1.0)).min(1.0);
        self.windows *= keep;
        self.seen *= keep;
        self.by_chance *= keep;
        self.landed.values_mut().for_each(|count| *count = 0);
    }

    /// What the floor of pure chance is to be multiplied with.
    pub fn factor(&self) -> f64 {
        if self.windows < 1.0 {
            return 1.0;
        }
        let each = self.by_chance / self.windows;
        let variance = (self.seen + PRIOR * each) / (self.by_chance + PRIOR * each);
        // A sum of squares of so many windows is off by about this much.
        let credible = variance * (1.0 + 2.0 / self.windows.sqrt());
        credible.sqrt().min(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn landings(counts: &[u64]) -> Vec<(ApiserverName, u64)> {
        let name = |index: usize| ApiserverName::new(format!("n{index}"));
        counts
            .iter()
            .enumerate()
            .map(|(index, count)| (name(index), *count))
            .collect()
    }

    #[test]
    fn in_turn_is_even_by_chance_is_not_and_nothing_is_chance() {
        assert_eq!(Spread::default().factor(), 1.0);
        let mut turn = Spread::default();
        for _ in 0..12 {
            turn.learn(&landings(&[8, 8, 8]), &[true, true, false]);
        }
        assert!(turn.factor() < 0.5, "{}", turn.factor());

        let mut chance = Spread::default();
        let mut state = 7_u64;
        for _ in 0..200 {
            let mut counts = [0, 0, 0];
            for _ in 0..24 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                counts[(state >> 33) as usize % 3] += 1;
            }
            chance.learn(&landings(&counts), &[true, true, false]);
        }
        assert!(chance.factor() > 0.9, "{}", chance.factor());
    }

    #[test]
    fn who_seeks_the_emptiest_makes_no_chance_and_who_returns_to_the_fullest_does() {
        let mut emptiest = Spread::default();
        let mut fullest = Spread::default();
        for _ in 0..12 {
            emptiest.learn(&landings(&[0, 0, 24]), &[true, true, false]);
            fullest.learn(&landings(&[24, 0, 0]), &[true, false, false]);
        }
        assert!(emptiest.factor() < 0.5, "{}", emptiest.factor());
        assert_eq!(fullest.factor(), 1.0);
    }
}
