//! A skew that opens because clients came here whom nobody told to: their apiserver may have just broken down.
//!
//! Job: say whether to look once more before a rebalancing begins. Input: this apiserver's load and the trigger, look by look.
//! Output: since when it is above the trigger by its own growth.
//! Must never delay what an apiserver that came back makes: there the mean fell, and nobody grew.
//!
//! An apiserver that breaks down says that it is ready until its own agent has found out: a check of the server behind the
//! port, and a word to the peers. Its clients are faster. Whoever they come to looks too full then, and an apiserver that is
//! gone too empty.

use std::time::Duration;

use crate::ids::Timestamp;

/// This apiserver's load from one decision to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Growth {
    /// At the last decision.
    before: Option<f64>,
    /// When a decision first saw that it had grown above the trigger.
    opened: Option<Timestamp>,
}

impl Growth {
    /// After a decision that saw this load; above `line` a rebalancing begins.
    pub fn after(self, load: f64, line: f64, now: Timestamp) -> Self {
        let has_grown = self.before.is_some_and(|before| before <= line);
        let opened = self.opened.or(has_grown.then_some(now));
        Self {
            before: Some(load),
            opened: opened.filter(|_| load > line),
        }
    }

    /// Whether it grew so lately that the others may not know yet what became of it: an interval, and until each was heard.
    pub fn is_news(self, interval: Duration, heard: impl Fn(Timestamp) -> bool, now: Timestamp) -> bool {
        self.opened
            .is_some_and(|opened| now.since(opened) < interval || !heard(opened))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(5);

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_millis(1_000 * seconds)
    }

    /// Looks five seconds apart, each with load and line; whether the last one is news, everybody having been heard.
    fn is_news(looks: &[(f64, f64)]) -> bool {
        let mut growth = Growth::default();
        let mut now = at(0);
        for (load, line) in looks {
            now = now + INTERVAL;
            growth = growth.after(*load, *line, now);
        }
        growth.is_news(INTERVAL, |_| true, now)
    }

    #[test]
    fn it_is_news_for_one_look_when_this_one_grew_and_never_when_the_mean_fell() {
        for (looks, expected) in [
            // A broken apiserver's clients come, at once and bit by bit.
            (&[(100.0, 146.0), (150.0, 146.0)][..], true),
            (&[(100.0, 146.0), (130.0, 146.0), (150.0, 146.0)], true),
            (&[(100.0, 146.0), (150.0, 146.0), (150.0, 146.0)], false),
            // An apiserver comes back: the mean falls.
            (&[(150.0, 165.0), (150.0, 110.0)], false),
            (&[(149.0, 165.0), (150.0, 110.0)], false),
            // It was so at the first look.
            (&[(150.0, 110.0)], false),
            // It went below, and grows again.
            (&[(150.0, 110.0), (100.0, 110.0), (150.0, 110.0)], true),
        ] {
            assert_eq!(is_news(looks), expected, "{looks:?}");
        }
    }

    #[test]
    fn it_is_news_until_everybody_was_heard() {
        let growth = Growth::default().after(100.0, 146.0, at(0)).after(150.0, 146.0, at(5));
        for (now, heard, expected) in [(5, true, true), (9, true, true), (10, true, false), (60, false, true)] {
            let heard = |since| {
                assert_eq!(since, at(5), "what counts is when it grew");
                heard
            };
            assert_eq!(growth.is_news(INTERVAL, heard, at(now)), expected, "after {now} s");
        }
        let first = Growth::default().after(150.0, 146.0, at(10));
        let is_news = first.is_news(INTERVAL, |_| true, at(10));
        assert!(!is_news, "what it was before is not known");
    }
}
