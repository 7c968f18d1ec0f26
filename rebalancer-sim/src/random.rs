//! Seeded randomness: the same seed gives the same run, on every machine and in every release.
//!
//! Input: a seed. Output: numbers of the distributions that the models need.
//! Must never take anything from the system; the generator is xoshiro256++ (Blackman and Vigna, 2019), seeded by
//! SplitMix64, because a run must stay the same when a library changes its own.

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Random {
    state: [u64; 4],
}

/// One step of SplitMix64: also a good hash of one number.
pub fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Random {
    /// The stream of one seed and one purpose: another purpose takes nothing from it.
    pub fn new(seed: u64, purpose: u64) -> Self {
        let mut at = mix(seed) ^ mix(purpose.wrapping_add(0x5bd1_e995));
        let mut next = || {
            at = at.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(at)
        };
        Self {
            state: [next(), next(), next(), next()],
        }
    }

    /// Any number.
    pub fn u64(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.state;
        let result = a.wrapping_add(*d).rotate_left(23).wrapping_add(*a);
        let t = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= t;
        *d = d.rotate_left(45);
        result
    }

    /// Below `bound`, which is at least 1; the bias of the multiplication is below 2^-32 for bounds below 2^32.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.u64()) * bound as u128) >> 64) as usize
    }

    /// From 0 to below 1.
    pub fn unit(&mut self) -> f64 {
        (self.u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Whether something with that probability happens.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    /// Evenly between two numbers.
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// The wait for the next of events that come `rate` times a second on average; infinite for none.
    pub fn wait(&mut self, rate: f64) -> f64 {
        if rate > 0.0 {
            -(1.0 - self.unit()).ln() / rate
        } else {
            f64::INFINITY
        }
    }

    /// Of the standard normal distribution (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// How many of events that come `mean` times on average (Knuth below 30, the normal approximation above).
    pub fn poisson(&mut self, mean: f64) -> u64 {
        if mean > 30.0 {
            return (mean + mean.sqrt() * self.normal()).round().max(0.0) as u64;
        }
        let limit = (-mean).exp();
        let mut product = self.unit();
        let mut count = 0;
        while product > limit {
            product *= self.unit();
            count += 1;
        }
        count
    }

    /// Puts a slice into random order.
    pub fn shuffle<T>(&mut self, slice: &mut [T]) {
        for last in (1..slice.len()).rev() {
            slice.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean(count: usize, mut draw: impl FnMut() -> f64) -> f64 {
        (0..count).map(|_| draw()).sum::<f64>() / count as f64
    }

    #[test]
    fn the_distributions_have_their_means() {
        let mut random = Random::new(1, 0);
        for (name, expected, drawn) in [
            ("unit", 0.5, mean(20_000, || random.unit())),
            ("below", 4.5, mean(20_000, || random.below(10) as f64)),
            ("wait", 0.25, mean(20_000, || random.wait(4.0))),
            ("normal", 0.0, mean(20_000, || random.normal())),
            ("poisson", 3.0, mean(20_000, || random.poisson(3.0) as f64)),
            ("poisson", 80.0, mean(20_000, || random.poisson(80.0) as f64)),
        ] {
            let spread = 0.03 * (1.0 + expected);
            assert!(
                (drawn - expected).abs() < spread,
                "{name}: {drawn}, expected {expected}"
            );
        }
    }

    #[test]
    fn a_seed_is_a_stream_and_a_purpose_another() {
        let draws = |seed, purpose| {
            let mut random = Random::new(seed, purpose);
            (0..8).map(|_| random.u64()).collect::<Vec<_>>()
        };
        assert_eq!(draws(7, 1), draws(7, 1));
        assert_ne!(draws(7, 1), draws(7, 2));
        assert_ne!(draws(7, 1), draws(8, 1));
    }
}
