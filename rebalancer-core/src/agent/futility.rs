//! Futility: what to do when moved clients have been seen to come back.
//!
//! Input: rho, and the time. Output: whether to hold, and whether a plan is only a probe.
//! Must never hold for ever, for a load balancer may be another one tomorrow; must never cost much to find out.

use std::time::Duration;

use crate::{
    ids::{ApiserverName, Timestamp},
    rho::Rho,
};

/// How long futility is believed at first; each probe that confirms it doubles that.
const FIRST_WAIT: Duration = Duration::from_secs(30 * 60);

/// And never longer than this.
const LONGEST_WAIT: Duration = Duration::from_secs(12 * 60 * 60);

/// So many are told to find out whether it is still so.
pub(super) const PROBE: usize = 20;

/// What is believed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum Futility {
    /// Moving helps, as far as is known.
    #[default]
    None,
    /// It does not, and is not tried before that time.
    Until(Timestamp, Duration),
    /// It did not when last tried, and is being tried again.
    Probing(Duration),
}

impl Futility {
    /// Looks at what was learned; what was learned before a probe is forgotten.
    pub fn look(&mut self, rho: &mut Rho, donors: &[ApiserverName], now: Timestamp) {
        *self = match *self {
            Self::None if rho.is_futile(donors) => Self::Until(now + FIRST_WAIT, FIRST_WAIT),
            Self::Until(until, wait) if now >= until => {
                *rho = Rho::default();
                Self::Probing(wait)
            }
            Self::Probing(wait) if rho.landings(donors) >= PROBE as f64 => {
                if rho.elsewhere(donors) < 1.0 {
                    let wait = (wait * 2).min(LONGEST_WAIT);
                    Self::Until(now + wait, wait)
                } else {
                    Self::None
                }
            }
            unchanged => unchanged,
        };
    }

    /// Whether to hold.
    pub fn holds(self) -> bool {
        matches!(self, Self::Until(..))
    }

    /// Whether a plan is only to find out.
    pub fn is_probe(self) -> bool {
        matches!(self, Self::Probing(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_believed_for_longer_each_time_and_given_up_at_the_first_who_stays_away() {
        let at = |minutes: u64| Timestamp::from_millis(minutes * 60_000);
        let (donor, other) = (ApiserverName::new("a"), ApiserverName::new("b"));
        let donors = [donor.clone()];
        let mut rho = Rho::default();
        let mut futility = Futility::default();
        rho.learn(&[(donor.clone(), 300)], &donors, 1e12);
        futility.look(&mut rho, &donors, at(0));
        assert!(futility.holds());
        futility.look(&mut rho, &donors, at(29));
        assert!(futility.holds());
        futility.look(&mut rho, &donors, at(30));
        assert!(futility.is_probe() && rho.landings(&donors) == 0.0);
        rho.learn(&[(donor.clone(), PROBE as u64)], &donors, 1e12);
        futility.look(&mut rho, &donors, at(31));
        assert!(futility.holds());
        futility.look(&mut rho, &donors, at(90));
        assert!(futility.holds(), "an hour this time");
        futility.look(&mut rho, &donors, at(91));
        assert!(futility.is_probe());
        rho.learn(&[(donor.clone(), PROBE as u64), (other, 2)], &donors, 1e12);
        futility.look(&mut rho, &donors, at(92));
        assert!(!futility.holds() && !futility.is_probe());
    }
}
