//! The budget of GOAWAYs: a token bucket that is told the time.

use std::time::Duration;

use crate::words::Timestamp;

/// Tokens that refill steadily; one pays for one GOAWAY.
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

    /// Takes up to `wanted` whole tokens and says how many it gave.
    pub fn take(&mut self, wanted: usize, now: Timestamp) -> usize {
        self.refill(now);
        let given = (self.tokens.floor() as usize).min(wanted);
        self.tokens -= given as f64;
        given
    }

    /// Tokens at hand.
    pub fn tokens(&self, now: Timestamp) -> f64 {
        (self.tokens + self.rate * now.since(self.at).as_secs_f64()).min(self.capacity)
    }

    /// When the next whole token is there.
    pub fn next_token(&self, now: Timestamp) -> Timestamp {
        let missing = (1.0 - self.tokens(now)).max(0.0);
        now + Duration::from_millis((missing / self.rate * 1000.0).ceil() as u64)
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
            steps in prop::collection::vec((0u64..2_000, 0usize..40), 1..60),
        ) {
            let mut bucket = TokenBucket::new(rate, Timestamp::default());
            let mut now = Timestamp::default();
            let mut taken = Vec::new();
            for (wait, wanted) in steps {
                now = now + Duration::from_millis(wait);
                taken.push((now, bucket.take(wanted, now)));
            }
            for from in 0..taken.len() {
                let mut sum = 0;
                for &(at, count) in &taken[from..] {
                    sum += count;
                    let allowed = rate.max(1.0) + rate * at.since(taken[from].0).as_secs_f64();
                    prop_assert!(sum as f64 <= allowed + 1e-6, "{sum} > {allowed}");
                }
            }
        }
    }
}
