//! What is worth an Event: a change that somebody who looks at the Node should read.
//!
//! Input: decisions as they are made and as they have settled. Output: what has changed, in words, each change once.
//! Must never repeat what stands: a hold that lasts is said when it begins.

use crate::{decision::Decision, hold::Hold};

/// What has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// The agent has started.
    Started,
    /// A rebalancing has ended, and the load is level.
    Balanced,
    /// Moved clients come back.
    Futile,
    /// Whoever could be moved is too heavy.
    Unmovable,
    /// An apiserver has left without a word.
    Gone,
    /// An operator has paused the agent, or all.
    Paused,
    /// The apiserver is to have no clients.
    Evacuated,
}

impl Change {
    /// As an Event's reason.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Started => "RebalancerStarted",
            Self::Balanced => "ApiserverBalanced",
            Self::Futile => "RebalancingFutile",
            Self::Unmovable => "ClientUnmovable",
            Self::Gone => "ApiserverGone",
            Self::Paused => "RebalancerPaused",
            Self::Evacuated => "ApiserverEvacuated",
        }
    }

    /// Whether somebody should do something about it.
    pub fn is_warning(self) -> bool {
        matches!(self, Self::Futile | Self::Unmovable | Self::Gone)
    }
}

/// Follows decisions.
#[derive(Clone, Debug, Default)]
pub struct News {
    /// The reason of the last hold.
    last: Option<&'static str>,
    /// Clients told since the load was level.
    told: u64,
}

impl News {
    /// What a decision changes, if anything.
    pub fn of(&mut self, decision: &Decision) -> Option<(Change, String)> {
        let Some(hold) = &decision.hold else {
            let outcomes = decision.outcomes;
            if outcomes.pending == 0 {
                self.told += outcomes.moved + outcomes.returned + outcomes.draining;
            }
            return None;
        };
        if let Hold::ApiserverGone { .. } = hold {
            // It stands beside what lasts.
            return Some((Change::Gone, hold.to_string()));
        }
        let before = self.last.replace(hold.reason());
        if hold.is_level() {
            let told = std::mem::take(&mut self.told);
            return (told > 0).then(|| (Change::Balanced, format!("{told} clients were told; {hold}")));
        }
        if before == Some(hold.reason()) {
            return None;
        }
        let change = match hold {
            Hold::Futile { .. } => Change::Futile,
            Hold::Unmovable { .. } => Change::Unmovable,
            Hold::Paused { .. } => Change::Paused,
            Hold::Evacuating { apiserver } if *apiserver == decision.node => Change::Evacuated,
            _ => return None,
        };
        // Whoever may look at the cluster reads it: no client is named, and nothing a client chose is repeated.
        let text = match hold {
            Hold::Unmovable { .. } => "whoever could be moved is heavier than what there is to move".to_owned(),
            _ => hold.to_string(),
        };
        Some((change, text))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{
        agent::Agent,
        decision::Outcomes,
        ids::{ApiserverName, Timestamp},
        policy::Policy,
    };

    #[test]
    fn each_change_is_news_once() {
        let own = ApiserverName::new("a");
        let agent = Agent::new(Policy::new(own.clone(), BTreeSet::new()), 1, Timestamp::default());
        let mut base = agent.preview(Timestamp::default());
        let mut news = News::default();
        let mut held = |hold: Hold| {
            base.hold = Some(hold);
            news.of(&base).map(|(change, _)| change)
        };
        let paused = || Hold::Paused {
            by: None,
            reason: String::new(),
            left: None,
        };
        let level = || Hold::BelowThreshold {
            skew: 0.0,
            threshold: 0.1,
        };
        let evacuating = |apiserver: &str| Hold::Evacuating {
            apiserver: ApiserverName::new(apiserver),
        };
        let gone = || Hold::ApiserverGone {
            apiserver: ApiserverName::new("b"),
        };
        let futile = || Hold::Futile {
            told: 9,
            left: std::time::Duration::ZERO,
        };
        for (hold, expected) in [
            (level(), None),
            (paused(), Some(Change::Paused)),
            (paused(), None),
            (gone(), Some(Change::Gone)),
            (paused(), None),
            (evacuating("b"), None),
            (level(), None),
            (evacuating("a"), Some(Change::Evacuated)),
            (evacuating("a"), None),
            (futile(), Some(Change::Futile)),
            (futile(), None),
            (level(), None),
        ] {
            let words = hold.to_string();
            assert_eq!(held(hold), expected, "{words}");
        }

        // Told, settled, level: once.
        let mut decision = base.clone();
        decision.hold = None;
        decision.outcomes = Outcomes {
            pending: 5,
            ..Outcomes::default()
        };
        assert_eq!(news.of(&decision), None);
        decision.outcomes = Outcomes {
            moved: 4,
            returned: 1,
            ..Outcomes::default()
        };
        assert_eq!(news.of(&decision), None);
        base.hold = Some(level());
        let (change, text) = news.of(&base).expect("news");
        assert!(change == Change::Balanced && text.starts_with("5 clients"), "{text}");
        assert_eq!(news.of(&base), None);
    }
}
