//! Shuffle sharding: how likely it is that a quiet flow finds all its queues taken by heavy ones.
//!
//! Job: the probability that kubernetes.io's page on API Priority and Fairness has a table of. Input: a hand, how many heavy
//! flows. Output: a probability. Must never count a hand that the apiserver refuses.

/// A level's queues, and how many of them one flow's requests go to: `queues` and `handSize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hand {
    /// `queues`.
    pub queues: u32,
    /// `handSize`.
    pub size: u32,
}

/// Bits of a flow's hash that there are (k8s.io/apiserver/pkg/util/shufflesharding).
const BITS: f64 = 60.0;

impl Hand {
    /// Whether the apiserver takes it: no more queues in the hand than there are, and no more bits than a hash has.
    pub fn is_valid(self) -> bool {
        let bits = f64::from(self.queues).log2() * f64::from(self.size);
        1 <= self.size && self.size <= self.queues && bits.ceil() <= BITS
    }
}

/// The probability that each queue in the hand of a quiet flow is in the hand of at least one of `heavy` flows, all hands
/// being dealt by chance.
pub fn crowded_out(hand: Hand, heavy: u32) -> f64 {
    let (queues, size) = (hand.queues as usize, hand.size as usize);
    let ways = Ways::up_to(queues);
    let all = ways.choose(queues, size);
    // How likely it is that the heavy flows have so many queues together.
    let mut taken = vec![0.0; queues + 1];
    taken[0] = 1.0;
    for _ in 0..heavy {
        let mut next = vec![0.0; queues + 1];
        for (count, probability) in taken.iter().enumerate().filter(|(_, probability)| **probability > 0.0) {
            for new in 0..=size.min(queues - count) {
                let dealt = ways.choose(count, size - new) + ways.choose(queues - count, new) - all;
                next[count + new] += probability * dealt.exp();
            }
        }
        taken = next;
    }
    let within = |(count, probability): (usize, &f64)| probability * (ways.choose(count, size) - all).exp();
    taken.iter().enumerate().map(within).sum()
}

/// Logarithms of factorials, and so of binomial coefficients.
struct Ways(Vec<f64>);

impl Ways {
    fn up_to(largest: usize) -> Self {
        let mut logarithms = vec![0.0];
        let mut sum = 0.0;
        for number in 1..=largest {
            sum += (number as f64).ln();
            logarithms.push(sum);
        }
        Self(logarithms)
    }

    /// The logarithm of how many ways there are to choose so many of all.
    fn choose(&self, all: usize, chosen: usize) -> f64 {
        if chosen > all {
            return f64::NEG_INFINITY;
        }
        self.0[all] - self.0[chosen] - self.0[all - chosen]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of <https://kubernetes.io/docs/concepts/cluster-administration/flow-control/>: hand, queues, and the
    /// probability with 1, 4 and 16 elephants.
    const DOCUMENTED: [(u32, u32, [f64; 3]); 11] = [
        (12, 32, [4.428838398950118e-09, 0.11431348830099144, 0.9935089607656024]),
        (10, 32, [1.550093439632541e-08, 0.0626479840223545, 0.9753101519027554]),
        (
            10,
            64,
            [6.601827268370426e-12, 0.00045571320990370776, 0.49999929150089345],
        ),
        (
            9,
            64,
            [3.6310049976037345e-11, 0.00045501212304112273, 0.4282314876454858],
        ),
        (
            8,
            64,
            [2.25929199850899e-10, 0.0004886697053040446, 0.35935114681123076],
        ),
        (
            8,
            128,
            [6.994461389026097e-13, 3.4055790161620863e-06, 0.02746173137155063],
        ),
        (
            7,
            128,
            [1.0579122850901972e-11, 6.960839379258192e-06, 0.02406157386340147],
        ),
        (
            7,
            256,
            [7.597695465552631e-14, 6.728547142019406e-08, 0.0006709661542533682],
        ),
        (
            6,
            256,
            [2.7134626662687968e-12, 2.9516464018476436e-07, 0.0008895654642000348],
        ),
        (
            6,
            512,
            [4.116062922897309e-14, 4.982983350480894e-09, 2.26025764343413e-05],
        ),
        (
            6,
            1024,
            [6.337324016514285e-16, 8.09060164312957e-11, 4.517408062903668e-07],
        ),
    ];

    #[test]
    fn it_is_what_the_documentation_has() {
        for (size, queues, expected) in DOCUMENTED {
            let hand = Hand { queues, size };
            assert!(hand.is_valid(), "{hand:?}");
            for (heavy, expected) in [1, 4, 16].into_iter().zip(expected) {
                let got = crowded_out(hand, heavy);
                assert!(
                    (got / expected - 1.0).abs() < 1e-9,
                    "{hand:?}, {heavy}: {got} is not {expected}"
                );
            }
        }
    }

    #[test]
    fn nobody_crowds_out_without_being_there_and_one_queue_is_everybodys() {
        assert_eq!(crowded_out(Hand { queues: 64, size: 8 }, 0), 0.0);
        assert!((crowded_out(Hand { queues: 1, size: 1 }, 1) - 1.0).abs() < 1e-12);
        for (queues, size, valid) in [
            (64, 10, true),
            (64, 11, false),
            (4, 5, false),
            (4, 0, false),
            (1, 1, true),
        ] {
            assert_eq!(Hand { queues, size }.is_valid(), valid, "{queues} {size}");
        }
    }
}
