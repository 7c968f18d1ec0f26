//! Rho: the chance that a moved client lands on an apiserver that is not a donor.
//!
//! Job: learn it from where new connections land while a plan settles.
//! Input: counts of landings. Output: a mean and its upper credible bound.
//! Must never depend on client addresses: a proxying load balancer hides them.

/// A Beta posterior over rho.
#[derive(Clone, Debug, PartialEq)]
pub struct Rho {
    elsewhere: f64,
    on_donors: f64,
}

/// Landings that are remembered: older ones fade, because a load balancer may change.
const MEMORY: f64 = 400.0;

/// Landings from which rho near 0 is believed.
const ENOUGH: f64 = 20.0;

/// Below this upper bound moving is futile.
const FUTILE: f64 = 0.05;

impl Default for Rho {
    fn default() -> Self {
        Self {
            elsewhere: 0.0,
            on_donors: 0.0,
        }
    }
}

impl Rho {
    /// Learns from landings since the last call.
    pub fn learn(&mut self, elsewhere: u64, on_donors: u64) {
        self.elsewhere += elsewhere as f64;
        self.on_donors += on_donors as f64;
        let total = self.elsewhere + self.on_donors;
        if total > MEMORY {
            self.elsewhere *= MEMORY / total;
            self.on_donors *= MEMORY / total;
        }
    }

    /// Mean of the posterior; the prior is Beta(1, 1) shifted to `1 - k/n` as design requires, worth two landings.
    pub fn mean(&self, donors: usize, apiservers: usize) -> f64 {
        let prior = 1.0 - donors as f64 / apiservers.max(1) as f64;
        (2.0 * prior + self.elsewhere) / (2.0 + self.elsewhere + self.on_donors)
    }

    /// The highest rho that is still credible: two standard deviations above the mean, 1 while nothing is learned.
    ///
    /// Quotas use this one: a first plan never sends more than a load balancer with rho = 1 needs,
    /// and what it leaves undone the next plan does with a rho that is known.
    pub fn upper(&self) -> f64 {
        let a = self.elsewhere + 1.0;
        let b = self.on_donors + 1.0;
        let n = a + b;
        if n < 12.0 {
            return 1.0;
        }
        let deviation = (a * b / (n * n * (n + 1.0))).sqrt();
        (a / n + 2.0 * deviation).min(1.0)
    }

    /// Whether moving has been seen to be pointless.
    pub fn is_futile(&self) -> bool {
        self.elsewhere + self.on_donors >= ENOUGH * 5.0 && self.upper() < FUTILE
    }

    /// Landings that it rests on.
    pub fn landings(&self) -> f64 {
        self.elsewhere + self.on_donors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_is_optimistic() {
        assert_eq!(Rho::default().upper(), 1.0);
        assert!((Rho::default().mean(2, 3) - 1.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn landings_are_learned() {
        let mut rho = Rho::default();
        rho.learn(30, 60);
        assert!((0.30..0.37).contains(&rho.mean(2, 3)), "{rho:?}");
        assert!((0.35..0.47).contains(&rho.upper()), "{rho:?}");
        assert!(!rho.is_futile());
    }

    #[test]
    fn all_back_is_futile_and_is_forgotten_when_it_changes() {
        let mut rho = Rho::default();
        rho.learn(0, 200);
        assert!(rho.is_futile());
        for _ in 0..40 {
            rho.learn(20, 0);
        }
        assert!(!rho.is_futile());
        assert!(rho.mean(2, 3) > 0.7, "{rho:?}");
    }
}
