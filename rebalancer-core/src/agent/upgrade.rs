//! An upgrade that is under way: apiservers of different releases, evacuated ones, or one restart after the other.
//!
//! Job: tell a single restart, whose clients are spread at once, from several that follow each other, whose clients are
//! spread once, after the last.
//! Input: the view of each look. Output: [`Hold::UpgradeInProgress`] while one is under way.
//! Must never wait for ever: each apiserver's signs are steps once, without another step the patience ends, and what was
//! waited for in vain is not believed again for as long.
//!
//! Releases that differ, and an apiserver that is evacuated now, are certain: `--upgrade-patience` from the last step. That
//! two apiservers were restarted, or that one was evacuated, only makes the next one likely: a third of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    hold::Hold,
    ids::{ApiserverName, Timestamp},
    release::Release,
    view::{ServerState, Snapshot, View},
};

/// What is only likely is waited for so many times shorter than what is certain.
const LIKELY: u32 = 3;

/// What is seen of one apiserver's turn; each is a step once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Sign {
    Evacuating,
    Ended,
    Release,
}

/// One apiserver as it was seen last.
#[derive(Clone, Debug)]
struct Known {
    state: ServerState,
    /// It took clients once: until then it begins for the first time.
    was_up: bool,
    instance: u64,
    restarts: u64,
    /// Kept while it is down.
    release: Option<Release>,
}

/// An apiserver and its release.
type Released<'a> = (&'a ApiserverName, &'a Release);

/// What is known of an upgrade.
#[derive(Clone, Debug, Default)]
pub(super) struct Upgrade {
    known: BTreeMap<ApiserverName, Known>,
    turns: BTreeMap<ApiserverName, BTreeSet<Sign>>,
    /// Releases differed at the last look.
    differed: bool,
    last_step: Option<Timestamp>,
    /// One restart after the other was waited for in vain: the same again is not believed until then.
    doubted_until: Option<Timestamp>,
}

impl Upgrade {
    /// Takes what all apiservers show now.
    pub fn look(&mut self, view: &View, patience: Duration, now: Timestamp) {
        self.known.retain(|name, _| view.entries.contains_key(name));
        self.turns.retain(|name, _| view.entries.contains_key(name));
        let is_late = self.last_step.is_some_and(|at| now.since(at) >= self.allowed(patience));
        // Where it is certain, each sign stays a step once until all are alike.
        if is_late && !self.is_certain() && !self.turns.is_empty() {
            if self.why().is_some() {
                self.doubted_until = Some(now + patience);
            }
            self.turns.clear();
        }
        for (name, entry) in &view.entries {
            self.saw(name, &entry.snapshot, now);
        }
        let differ = self.differing().is_some();
        if differ && !self.differed && self.turns.is_empty() {
            // It was so before anybody looked, or came with an apiserver that is new.
            self.last_step = Some(now);
        }
        let had_all = self.known.keys().all(|name| self.is_over_at(name));
        if !differ && (self.differed || had_all) && self.known.values().all(Known::is_up) {
            self.turns.clear();
        }
        self.differed = differ;
    }

    fn saw(&mut self, name: &ApiserverName, snapshot: &Snapshot, now: Timestamp) {
        let before = self.known.get(name);
        let known = Known::of(snapshot, before);
        let returned = known.is_up() && before.is_some_and(|before| before.state == ServerState::Evacuating);
        for sign in known.signs(before) {
            if self.turns.entry(name.clone()).or_default().insert(sign) {
                self.last_step = Some(now);
            }
        }
        if returned && !self.is_over_at(name) {
            // An operator changed his mind: nothing was restarted.
            self.turns.remove(name);
        }
        self.known.insert(name.clone(), known);
    }

    /// Why nothing is done yet, and for how long at most.
    pub fn hold(&self, patience: Duration, now: Timestamp) -> Option<Hold> {
        let left = self.allowed(patience).checked_sub(now.since(self.last_step?))?;
        let is_doubted = !self.is_certain() && self.doubted_until.is_some_and(|until| now < until);
        let why = self.why().filter(|_| !is_doubted)?;
        (!left.is_zero()).then_some(Hold::UpgradeInProgress { why, left })
    }

    fn why(&self) -> Option<String> {
        if let Some([(one, its), (other, others)]) = self.differing() {
            return Some(format!("{one} is {its}, {other} is {others}"));
        }
        let evacuating = |(name, known): (&ApiserverName, &Known)| {
            (known.state == ServerState::Evacuating).then(|| format!("{name} is evacuated"))
        };
        if let Some(why) = self.known.iter().find_map(evacuating) {
            return Some(why);
        }
        let was_evacuated = self.turns.values().any(|signs| signs.contains(&Sign::Evacuating));
        let names = |wanted: bool| {
            let of = |name: &&ApiserverName| self.turns.contains_key(*name) == wanted;
            let names: Vec<_> = self.known.keys().filter(of).map(ApiserverName::as_str).collect();
            names.join(", ")
        };
        (was_evacuated || self.turns.len() > 1).then(|| {
            let next = names(false);
            let next = if next.is_empty() { "none" } else { &next };
            format!("{} restarted one after the other, {next} not yet", names(true))
        })
    }

    /// Two apiservers that are known to be of different releases.
    fn differing(&self) -> Option<[Released<'_>; 2]> {
        let mut all = self
            .known
            .iter()
            .filter_map(|(name, known)| Some((name, known.release.as_ref()?)));
        let mut first: Vec<Released<'_>> = Vec::new();
        all.find_map(|(name, release)| {
            let other = first.iter().find(|(_, other)| other.differs(release));
            let found = other.map(|other| [*other, (name, release)]);
            first.push((name, release));
            found
        })
    }

    /// How long after the last step the next one is waited for.
    fn allowed(&self, patience: Duration) -> Duration {
        if self.is_certain() { patience } else { patience / LIKELY }
    }

    fn is_certain(&self) -> bool {
        self.differing().is_some() || self.known.values().any(|known| known.state == ServerState::Evacuating)
    }

    /// Whether it had its turn.
    fn is_over_at(&self, name: &ApiserverName) -> bool {
        let ends = [Sign::Ended, Sign::Release];
        self.turns
            .get(name)
            .is_some_and(|signs| ends.iter().any(|sign| signs.contains(sign)))
    }
}

impl Known {
    fn of(snapshot: &Snapshot, before: Option<&Self>) -> Self {
        // One that is not known for a moment is still what it was.
        let state = match (snapshot.state, before) {
            (ServerState::Unknown, Some(before)) => before.state,
            (state, _) => state,
        };
        Self {
            state,
            was_up: takes_clients(state) || before.is_some_and(|before| before.was_up),
            instance: snapshot.instance,
            restarts: snapshot.restarts,
            release: snapshot.release.clone().or_else(|| before?.release.clone()),
        }
    }

    fn is_up(&self) -> bool {
        takes_clients(self.state)
    }

    /// What happened since it was seen before; at first sight nothing did but what still goes on.
    fn signs(&self, before: Option<&Self>) -> Vec<Sign> {
        let mut signs = Vec::new();
        let was = |state: ServerState| before.is_some_and(|before| before.state == state);
        if self.state == ServerState::Evacuating && !was(ServerState::Evacuating) {
            signs.push(Sign::Evacuating);
        }
        let Some(before) = before else { return signs };
        // Another agent's process counts from 0: what it has counted happened since.
        let counted_before = if self.instance == before.instance {
            before.restarts
        } else {
            0
        };
        if before.was_up && self.restarts > counted_before {
            signs.push(Sign::Ended);
        }
        let differs = |release: &Release| self.release.as_ref().is_some_and(|now| now.differs(release));
        if before.release.as_ref().is_some_and(differs) {
            signs.push(Sign::Release);
        }
        signs
    }
}

fn takes_clients(state: ServerState) -> bool {
    matches!(
        state,
        ServerState::Ready | ServerState::Starting | ServerState::Overloaded
    )
}

#[cfg(test)]
mod tests;
