//! The budget of GOAWAYs: a token bucket that is told the time.

use std::time::Duration;

use crate::ids::Timestamp;

/// Tokens that refill steadily; one pays for a GOAWAY whose client brings few watches with it.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    rate: f64,
    capacity: f64,
    tokens: f64,
    at: Timestamp,
}

impl TokenBucket {
    /// A full bucket of one second's worth, at least one token.
    pub fn new(rate: f64, now: Timestamp) -> Self {
        let capacity = rate.max(1.0);
        Self {
            rate,
            capacity,
            tokens: capacity,
            at: now,
        }
    }

    /// Another rate from now on: an apiserver with more connections tells faster.
    pub fn set_rate(&mut self, rate: f64, now: Timestamp) {
        if rate != self.rate {
            self.refill(now);
            self.rate = rate;
            self.capacity = rate.max(1.0);
            self.tokens = self.tokens.min(self.capacity);
        }
    }

    /// Tokens a second.
    pub fn rate(&self) -> f64 {
        self.rate
    }

    /// Pays `cost` if the bucket holds it, or is full: what costs more than a full bucket is paid for afterwards, and until
    /// then nobody gets anything.
    pub fn pay(&mut self, cost: f64, now: Timestamp) -> bool {
        self.refill(now);
        let affordable = self.tokens >= self.worth(cost);
        if affordable {
            self.tokens -= cost;
        }
        affordable
    }

    /// Tokens at hand.
    pub fn tokens(&self, now: Timestamp) -> f64 {
        (self.tokens + self.rate * now.since(self.at).as_secs_f64()).min(self.capacity)
    }

    /// When `cost` can be paid.
    pub fn affords_at(&self, cost: f64, now: Timestamp) -> Timestamp {
        let missing = (self.worth(cost) - self.tokens(now)).max(0.0);
        now + Duration::from_millis((missing / self.rate * 1000.0).ceil() as u64)
    }

    /// What must be in the bucket for a cost.
    fn worth(&self, cost: f64) -> f64 {
        // A refill is a sum of rounded numbers.
        cost.min(self.capacity) - 1e-9
    }

    fn refill(&mut self, now: Timestamp) {
        self.tokens = self.tokens(now);
        self.at = self.at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_more_than_rate_and_burst_in_any_window(
            rate in 0.1f64..50.0,
            steps in prop::collection::vec((0u64..2_000, 1.0f64..300.0, 0usize..40), 1..60),
        ) {
            let mut bucket = TokenBucket::new(rate, Timestamp::default());
            let mut now = Timestamp::default();
            let mut paid = Vec::new();
            for (wait, cost, wanted) in steps {
                now = now + Duration::from_millis(wait);
                // A few that cost more than a full bucket among those that cost one token.
                let cost = if cost < 250.0 { 1.0 } else { cost };
                let times = (0..wanted).take_while(|_| bucket.pay(cost, now)).count();
                paid.push((now, cost * times as f64, if times > 0 { cost } else { 0.0 }));
            }
            for from in 0..paid.len() {
                let (mut sum, mut last) = (0.0, 0.0);
                for &(at, cost, each) in &paid[from..] {
                    sum += cost;
                    last = if each > 0.0 { each } else { last };
                    let allowed = rate.max(1.0) + rate * at.since(paid[from].0).as_secs_f64();
                    // Only the last one may be paid for later.
                    prop_assert!(sum - last <= allowed + 1e-6, "{sum} - {last} > {allowed}");
                }
            }
        }

        #[test]
        fn what_is_affordable_then_can_be_paid_then(rate in 0.1f64..50.0, costs in prop::collection::vec(1.0f64..90.0, 1..20)) {
            let mut bucket = TokenBucket::new(rate, Timestamp::default());
            let mut now = Timestamp::default();
            for cost in costs {
                now = bucket.affords_at(cost, now);
                prop_assert!(bucket.pay(cost, now));
            }
        }
    }
}
