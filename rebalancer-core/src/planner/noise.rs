//! The noise floor: how uneven chance alone makes the loads.
//!
//! Input: how many apiservers, which part of the connections belongs to one of them, how many there are. Output: how far chance
//! takes that one, where all are looked at.
//! Must never be tuned to a load balancer: random placement is the most uneven of those that are not sticky.
//!
//! Random placement of `N` connections gives an apiserver whose part is `p` (`1/n` of `n` equal ones) a binomial number with mean
//! `Np`, relative deviation `s = sqrt((1-p)/Np)` and skewness `g = (1-2p)/sqrt(Np(1-p))`. The agents look at the fullest and at the emptiest of the `n`:
//! that chance takes either over the floor in no more than 1 % of looks, each side of each is allowed `0.005/n` (Bonferroni),
//! and `z` is the normal quantile of that. Above, Cornish and Fisher's first correction for skewness makes it
//! `z + g(z^2-1)/6`, and half a connection more for its being a whole number. Below, it is
//! `z - g(z^2-1)/6` and that half; few are reckoned exactly, count by count.
//! A factor of 2 instead would be passed in 6 % of looks with three apiservers, in 85 % with 64.

/// The share of looks in which random placement may pass the floor.
const FALSE_STARTS: f64 = 0.01;

/// A mean of so many connections is few: how far below it one may come is reckoned exactly.
const FEW: f64 = 200.0;

/// How far chance takes loads from the mean, as skews; infinite without connections.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Floor {
    /// The fullest is no further above it.
    pub above: f64,
    /// The emptiest is no further below it; from 1 on, an empty one means nothing.
    pub below: f64,
}

impl Floor {
    /// Whether nothing can be said.
    pub const UNKNOWN: Self = Self {
        above: f64::INFINITY,
        below: f64::INFINITY,
    };
}

/// The floor of counted connections for one of so many apiservers, to which that part of them belongs.
pub fn floor(apiservers: usize, part: f64, connections: f64) -> Floor {
    let n = apiservers as f64;
    let mean = connections * part;
    if apiservers < 2 || mean <= 0.0 || part >= 1.0 {
        return Floor::UNKNOWN;
    }
    let tail = FALSE_STARTS / 2.0 / n;
    let deviation = ((1.0 - part) / mean).sqrt();
    let skewness = (1.0 - 2.0 * part) / (mean * (1.0 - part)).sqrt();
    let z = quantile(tail);
    let asymmetry = skewness * (z * z - 1.0) / 6.0;
    let half = 0.5 / mean;
    let none = (1.0 - part).powf(connections.round());
    Floor {
        above: deviation * (z + asymmetry) + half,
        // Where that is beyond what a number can say, it is of many.
        below: if mean <= FEW && none > 0.0 {
            match impossibly_few(part, connections.round(), none, tail) {
                Some(most) => 1.0 - (most + 0.5) / mean,
                None => f64::INFINITY,
            }
        } else {
            deviation * (z - asymmetry) + half
        },
    }
}

/// The most connections that an apiserver with that part has, of so many placed by chance, with no more than this probability;
/// `None` when it may well have none, which has the chance `none`.
fn impossibly_few(part: f64, connections: f64, none: f64, probability: f64) -> Option<f64> {
    debug_assert!(none > 0.0 && probability < 0.5, "{none}, {probability}");
    // The binomial distribution, from one count to the next.
    let (mut count, mut chance, mut sum) = (0.0, none, 0.0);
    let mut most = None;
    while count <= connections {
        sum += chance;
        if sum > probability {
            break;
        }
        most = Some(count);
        chance *= (connections - count) / (count + 1.0) * part / (1.0 - part);
        count += 1.0;
    }
    most
}

/// The floor of loads that are counted over the smoothing time: requests come as they please, so that `m` a second are
/// measured with a deviation of `sqrt(m / 2 tau)` by an exponential mean of time constant `tau`.
///
/// Placement by chance is left out: where a few clients carry the load, chance makes large skews that a few moves mend.
pub fn of_rates(apiservers: usize, mean: f64, smoothing_seconds: f64) -> Floor {
    if apiservers < 2 || mean <= 0.0 {
        return Floor::UNKNOWN;
    }
    let skew = quantile(FALSE_STARTS / 2.0 / apiservers as f64) / (2.0 * smoothing_seconds * mean).sqrt();
    Floor {
        above: skew,
        below: skew,
    }
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

    /// The exact chance that one of them is outside its floor, at most (Bonferroni), for random placement by capacity.
    fn false_starts(capacities: &[f64], connections: usize) -> f64 {
        let logs = log_factorials(connections);
        let all: f64 = capacities.iter().sum();
        let outside = |capacity: &f64| {
            let part = capacity / all;
            let mean = connections as f64 * part;
            let Floor { above, below } = floor(capacities.len(), part, connections as f64);
            let above = ((1.0 + above) * mean).floor() as usize + 1;
            // Those below: none when even an empty one is within the floor.
            let below = ((1.0 - below) * mean).ceil().max(0.0) as usize;
            let (p, q) = (part.ln(), (1.0 - part).ln());
            let chance = |count: usize| {
                let ways = logs[connections] - logs[count] - logs[connections - count];
                (ways + count as f64 * p + (connections - count) as f64 * q).exp()
            };
            (above..=connections).chain(0..below).map(chance).sum::<f64>()
        };
        capacities.iter().map(outside).sum()
    }

    /// Exactly, from the binomial distribution, at many sizes; and it is not far below what is allowed where that is possible.
    #[test]
    fn chance_passes_the_floor_in_less_than_one_look_in_a_hundred() {
        for n in [2, 3, 4, 5, 7, 10, 16, 32, 64] {
            for connections in [2, 5, 10, 20, 50, 60, 100, 300, 1_000, 3_000, 10_000, 100_000] {
                let chance = false_starts(&vec![1.0; n], connections);
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

    /// What belongs to a small one is less, and goes further up and down.
    #[test]
    fn nor_where_apiservers_are_of_different_capacity() {
        for capacities in [
            &[2.0, 2.0, 1.0][..],
            &[4.0, 4.0, 1.0],
            &[8.0, 1.0],
            &[1.0, 1.0, 1.0, 0.1],
            &[99.0, 0.5, 0.5],
        ] {
            for connections in [10, 30, 60, 200, 500, 1_000, 3_000, 30_000] {
                let chance = false_starts(capacities, connections);
                assert!(chance < 0.01, "{capacities:?}, {connections} connections: {chance}");
            }
        }
    }

    /// From few to many nothing jumps: a client more or less is no other trigger.
    #[test]
    fn a_few_connections_more_make_no_other_floor() {
        for (n, part) in [(2, 0.5), (3, 1.0 / 3.0), (3, 1.0 / 9.0), (5, 0.2), (64, 1.0 / 64.0)] {
            let few = (FEW / part) as usize;
            for connections in few - 50..few + 50 {
                let below = |connections: usize| floor(n, part, connections as f64).below;
                let jump = (below(connections) - below(connections + 1)).abs();
                assert!(jump < 2.5 / FEW, "{n}, {part}, {connections}: {jump}");
            }
        }
    }

    /// Twenty nodes: an apiserver that came back empty is no chance, though the others are within theirs; nor is one that had
    /// one or two clients before anybody looked.
    #[test]
    fn a_nearly_empty_apiserver_of_a_small_cluster_is_seen() {
        for (connections, few) in [(30.0, 2.0), (60.0, 9.0), (300.0, 76.0), (600.0, 166.0)] {
            let Floor { above, below } = floor(3, 1.0 / 3.0, connections);
            let mean = connections / 3.0;
            assert!(few / mean - 1.0 < -below, "{few} of {connections}: {below}");
            assert!(
                (few + 1.0) / mean - 1.0 > -below,
                "{few} and one of {connections}: {below}"
            );
            assert!(connections > 30.0 || above > 0.5, "above {above}");
        }
        let Floor { below, .. } = floor(3, 1.0 / 3.0, 10.0);
        assert!(below >= 1.0, "three apiservers may well have 10, 0 and 0: {below}");
    }
}
