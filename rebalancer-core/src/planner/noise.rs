//! The noise floor: how uneven chance alone makes the loads.
//!
//! Input: how many apiservers, how many connections. Output: the skew that the fullest of them stays below in 99 % of looks.
//! Must never be tuned to a load balancer: random placement is the most uneven of those that are not sticky.
//!
//! Random placement of `N` connections on `n` apiservers gives each a binomial number with mean `N/n`, relative deviation
//! `s = sqrt((n-1)/N)` and skewness `g = (n-2)/sqrt(N(n-1))`. The agents look at the fullest of the `n`, so that one of them
//! may be above the floor in 1 % of looks each is allowed `0.01/n` (Bonferroni): `z` is the normal quantile of `1 - 0.01/n`.
//! Cornish and Fisher's first correction for skewness makes it `z + g(z^2-1)/6`, and half a connection more for its being a
//! whole number. A factor of 2 instead would be passed in 6 % of looks with three apiservers, in 85 % with 64.

/// The share of looks in which random placement may pass the floor.
const FALSE_STARTS: f64 = 0.01;

/// The floor, as a skew; infinite without connections.
pub fn floor(apiservers: usize, connections: f64) -> f64 {
    let n = apiservers as f64;
    if apiservers < 2 || connections <= 0.0 {
        return f64::INFINITY;
    }
    let deviation = ((n - 1.0) / connections).sqrt();
    let skewness = (n - 2.0) / (connections * (n - 1.0)).sqrt();
    let z = quantile(FALSE_STARTS / n);
    let corrected = z + skewness * (z * z - 1.0) / 6.0;
    deviation * corrected + 0.5 * n / connections
}

/// The floor of loads that are counted over the smoothing time: requests come as they please, so that `m` a second are
/// measured with a deviation of `sqrt(m / 2 tau)` by an exponential mean of time constant `tau`.
///
/// Placement by chance is left out: where a few clients carry the load, chance makes large skews that a few moves mend.
pub fn of_rates(apiservers: usize, mean: f64, smoothing_seconds: f64) -> f64 {
    if apiservers < 2 || mean <= 0.0 {
        return f64::INFINITY;
    }
    quantile(FALSE_STARTS / apiservers as f64) / (2.0 * smoothing_seconds * mean).sqrt()
}

/// The point of the standard normal distribution that is passed with probability `tail`, which is below 0.5.
///
/// Abramowitz and Stegun 26.2.23: off by less than 4.5e-4.
fn quantile(tail: f64) -> f64 {
    let t = (-2.0 * tail.ln()).sqrt();
    t - (2.515_517 + t * (0.802_853 + t * 0.010_328)) / (1.0 + t * (1.432_788 + t * (0.189_269 + t * 0.001_308)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quantiles_are_those_of_the_tables() {
        for (tail, z) in [(0.025, 1.96), (0.01, 2.326), (0.001, 3.090), (0.000_1, 3.719)] {
            assert!((quantile(tail) - z).abs() < 1e-3, "{tail}: {}", quantile(tail));
        }
    }

    /// The logarithm of `count!`, by its sum.
    fn log_factorials(most: usize) -> Vec<f64> {
        let mut sums = vec![0.0];
        for number in 1..=most {
            sums.push(sums[number - 1] + (number as f64).ln());
        }
        sums
    }

    /// The exact chance that one of `n` is above the floor, at most (Bonferroni), for random placement.
    fn false_starts(n: usize, connections: usize) -> f64 {
        let mean = connections as f64 / n as f64;
        let above = ((1.0 + floor(n, connections as f64)) * mean).floor() as usize + 1;
        let logs = log_factorials(connections);
        let (p, q) = ((1.0 / n as f64).ln(), (1.0 - 1.0 / n as f64).ln());
        let chance = |count: usize| {
            let ways = logs[connections] - logs[count] - logs[connections - count];
            (ways + count as f64 * p + (connections - count) as f64 * q).exp()
        };
        n as f64 * (above..=connections).map(chance).sum::<f64>()
    }

    /// Exactly, from the binomial distribution, at many sizes; and it is not far below what is allowed where that is possible.
    #[test]
    fn chance_passes_the_floor_in_less_than_one_look_in_a_hundred() {
        for n in [2, 3, 4, 5, 7, 10, 16, 32, 64] {
            for connections in [2, 5, 10, 20, 50, 100, 300, 1_000, 3_000, 10_000, 100_000] {
                let chance = false_starts(n, connections);
                assert!(chance < 0.01, "{n} apiservers, {connections} connections: {chance}");
                if connections >= 1_000 * n {
                    assert!(
                        chance > 0.004,
                        "{n} apiservers, {connections} connections: only {chance}"
                    );
                }
            }
        }
    }
}
