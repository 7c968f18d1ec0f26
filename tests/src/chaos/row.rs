//! One fault, or several at once, and what was found of it.

use std::{collections::BTreeMap, fmt::Write as _};

use serde::Serialize;

use super::noticed::Noticed;

/// One fault, or several at once.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Row {
    pub faults: Vec<String>,
    /// The index of the node that the first one hit.
    pub node: usize,
    /// By what it was seen that it was there.
    pub seen: Vec<String>,
    /// How often: the counts below are of all plays together.
    pub plays: u32,
    /// Nothing of it is there without us.
    pub is_ours: bool,
    /// So many clients it parts from what served them.
    pub cut: u64,
    /// Until it was over and everybody was back.
    pub during: Noticed,
    /// The same without us.
    pub control: Option<Noticed>,
    /// From then on.
    pub after: Noticed,
    pub error_texts: Vec<String>,
    pub loads_after_fault: Vec<u64>,
    /// E/rho then.
    pub lower_bound: u64,
    pub goaways_during: u64,
    /// All, until level.
    pub goaways: u64,
    /// Without an agent's order.
    pub goaways_by_itself: u64,
    /// More than these are too many.
    pub bound: Bound,
    pub goaways_after: u64,
    pub seconds_to_level: Option<f64>,
    /// Loads that the load balancer does not find level.
    pub uneven: Vec<String>,
    pub wrong_connections: Vec<String>,
    pub leaks: Vec<String>,
    /// What each of our processes has in RAM at the end.
    pub memory_mib: BTreeMap<String, i64>,
}

/// How many GOAWAYs there may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Bound {
    /// By agents' orders.
    pub by_order: u64,
    /// By a relay itself, where that is bounded.
    pub by_itself: Option<u64>,
}

impl Row {
    /// What clients noticed that they would not have noticed without us: all of it when nothing of the fault is there without
    /// us. When it was not compared, that of the fault's own time is not judged, but for events.
    pub fn ours(&self) -> Noticed {
        let during = match self.control {
            _ if self.is_ours => self.during,
            Some(control) => self.during.beyond(control, self.cut, self.plays),
            None => Noticed {
                missed: self.during.missed,
                doubled: self.during.doubled,
                ..Noticed::default()
            },
        };
        during.plus(self.after)
    }

    /// Whether what clients noticed of the fault is judged whole.
    pub fn is_judged(&self) -> bool {
        self.is_ours || self.control.is_some()
    }

    /// GOAWAYs beyond the bound.
    pub fn too_many(&self) -> u64 {
        let by_itself = self
            .bound
            .by_itself
            .map_or(0, |most| self.goaways_by_itself.saturating_sub(most));
        self.goaways.saturating_sub(self.bound.by_order) + by_itself
    }

    /// Whether nothing is wrong but that more of what the fault breaks without us, too, was counted with us.
    pub fn may_be_chance(&self) -> bool {
        let Some(control) = self.control.filter(|_| !self.is_ours && !self.is_clean()) else {
            return false;
        };
        let (ours, without) = (self.during, control);
        // Of requests a fault may hit one more or none at all.
        let happens_too = [
            (ours.relists, without.relists),
            (ours.watch_breaks, without.watch_breaks),
            (ours.missed, without.missed),
            (ours.doubled, without.doubled),
        ];
        let as_without = Self {
            control: Some(ours),
            ..self.clone()
        };
        happens_too.iter().all(|(ours, without)| *ours == 0 || *without > 0) && as_without.is_clean()
    }

    /// Both plays of it.
    #[must_use]
    pub fn and(self, again: Self) -> Self {
        debug_assert_eq!(self.faults, again.faults);
        let both = |one: Vec<String>, other: Vec<String>| [one, other].concat();
        Self {
            faults: self.faults,
            node: self.node,
            seen: both(self.seen, again.seen),
            plays: self.plays + again.plays,
            is_ours: self.is_ours,
            cut: self.cut + again.cut,
            during: self.during.plus(again.during),
            control: self.control.zip(again.control).map(|(one, other)| one.plus(other)),
            after: self.after.plus(again.after),
            error_texts: both(self.error_texts, again.error_texts),
            loads_after_fault: again.loads_after_fault,
            lower_bound: self.lower_bound + again.lower_bound,
            goaways_during: self.goaways_during + again.goaways_during,
            goaways: self.goaways + again.goaways,
            goaways_by_itself: self.goaways_by_itself + again.goaways_by_itself,
            bound: Bound {
                by_order: self.bound.by_order + again.bound.by_order,
                by_itself: self
                    .bound
                    .by_itself
                    .zip(again.bound.by_itself)
                    .map(|(one, other)| one + other),
            },
            goaways_after: self.goaways_after + again.goaways_after,
            seconds_to_level: self
                .seconds_to_level
                .zip(again.seconds_to_level)
                .map(|(one, other)| one.max(other)),
            uneven: both(self.uneven, again.uneven),
            wrong_connections: both(self.wrong_connections, again.wrong_connections),
            leaks: both(self.leaks, again.leaks),
            memory_mib: again.memory_mib,
        }
    }

    /// Whether it is as it must be.
    pub fn is_clean(&self) -> bool {
        self.ours().any() == 0
            && self.uneven.is_empty()
            && self.wrong_connections.is_empty()
            && self.leaks.is_empty()
            && self.seconds_to_level.is_some()
            && self.too_many() == 0
            && self.goaways_after == 0
    }

    /// In a line.
    pub fn sentence(&self) -> String {
        let ours = self.ours();
        let mut text = format!(
            "{}: {} errors, {} relists, {} broken watches, {} missed and {} doubled events of ours; ",
            if self.is_clean() { "clean" } else { "NOT CLEAN" },
            ours.errors,
            ours.relists,
            ours.watch_breaks,
            ours.missed,
            ours.doubled
        );
        let level = match self.seconds_to_level {
            Some(seconds) => format!("level after {seconds:.0} s"),
            None => "NOT level".to_owned(),
        };
        let _ = write!(
            text,
            "{level} with {} GOAWAYs ({} while it lasted; {} are the least, {} allowed; {} by relays themselves), {} after; seen: {}",
            self.goaways,
            self.goaways_during,
            self.lower_bound,
            self.bound.by_order,
            self.goaways_by_itself,
            self.goaways_after,
            self.seen.join(", ")
        );
        if let Some(control) = self.control {
            let _ = write!(
                text,
                "; during, with and without us: errors {} {}, breaks {} {}, relists {} {}, stalls {} {}",
                self.during.errors,
                control.errors,
                self.during.watch_breaks,
                control.watch_breaks,
                self.during.relists,
                control.relists,
                self.during.stalls,
                control.stalls
            );
        }
        let found = self.uneven.iter().chain(&self.wrong_connections).chain(&self.leaks);
        for what in found.take(4) {
            let _ = write!(text, "; {what}");
        }
        if !self.is_clean() {
            for what in self.error_texts.iter().take(4) {
                let _ = write!(text, "; a client saw: {what}");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(during: [u64; 2], control: Option<[u64; 2]>) -> Row {
        let noticed = |[errors, missed]: [u64; 2]| Noticed {
            errors,
            missed,
            ..Noticed::default()
        };
        Row {
            faults: vec!["apiserver-flaps".to_owned()],
            plays: 1,
            is_ours: control.is_none(),
            during: noticed(during),
            control: control.map(noticed),
            seconds_to_level: Some(7.0),
            ..Row::default()
        }
    }

    #[test]
    fn only_how_many_of_a_fault_is_played_again_and_counted_together() {
        let unlucky = row([28, 0], Some([3, 0]));
        assert!(!unlucky.is_clean() && unlucky.may_be_chance());
        let both = unlucky.clone().and(row([25, 0], Some([40, 0])));
        assert!(both.is_clean() && both.plays == 2, "{both:?}");
        let ours = unlucky.clone().and(unlucky.clone()).and(unlucky.clone());
        assert!(!ours.is_clean(), "each time more is no chance");
        assert!(!row([28, 0], Some([25, 0])).may_be_chance(), "it is clean");
        let never = row([1, 0], Some([0, 0]));
        assert!(never.may_be_chance());
        let never = never.clone().and(never.clone()).and(never);
        assert!(!never.is_clean(), "it does not happen without us");
        assert!(
            !row([28, 1], Some([3, 0])).may_be_chance(),
            "an event is missed with us alone"
        );
        assert!(!row([1, 0], None).may_be_chance());
        let mut later = unlucky;
        later.after.errors = 1;
        assert!(!later.may_be_chance(), "the fault is over");
    }

    #[test]
    fn goaways_beyond_the_bound_are_found() {
        let of = |goaways, goaways_by_itself, by_itself| Row {
            goaways,
            goaways_by_itself,
            bound: Bound {
                by_order: 10,
                by_itself,
            },
            ..row([0, 0], None)
        };
        assert!(of(10, 5, None).is_clean());
        assert_eq!(of(11, 5, None).too_many(), 1);
        assert_eq!(of(3, 5, Some(4)).too_many(), 1);
        assert!(!of(3, 5, Some(0)).is_clean());
    }

    #[test]
    fn without_a_control_events_are_judged_all_the_same() {
        let mut alone = row([5, 1], Some([0, 0]));
        alone.control = None;
        assert!(!alone.is_judged() && !alone.is_clean());
        alone.during.missed = 0;
        assert!(alone.is_clean(), "what the fault breaks by itself is not judged");
    }
}
