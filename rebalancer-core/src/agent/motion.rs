//! Who is on the way: clients that were told to go and have not landed anywhere yet.
//!
//! Job: follow every apiserver's totals from one look to the next, and count GOAWAYs against landings.
//! Input: views. Output: what happened since the last look, and how many clients are in transit.
//! Must never take a restarted agent's totals for movements: they begin anew.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use crate::{
    ids::{ApiserverName, Timestamp},
    planner::Transit,
    policy::Weight,
    view::{Snapshot, View},
};

/// Totals of one apiserver at an instant; another instance starts anew.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Totals {
    instance: u64,
    goaways: u64,
    accepted: u64,
    load: f64,
}

/// What happened on one apiserver since the last look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Moves {
    /// Which.
    pub apiserver: ApiserverName,
    /// GOAWAYs sent there.
    pub goaways: u64,
    /// Connections accepted there.
    pub landings: u64,
}

/// Clients in transit, all apiservers together.
#[derive(Clone, Debug, Default)]
pub(super) struct Motion {
    last: BTreeMap<ApiserverName, Totals>,
    told: u64,
    landed: u64,
    draining: u64,
    draining_streams: u64,
    /// What those who were told weighed.
    told_load: f64,
    /// GOAWAYs of the last settle time.
    recent: VecDeque<(Timestamp, u64)>,
}

impl Motion {
    /// Looks at a view.
    ///
    /// Landings count from the first GOAWAY on, until all who were told have landed. Whoever was told and has not landed
    /// still holds the old connection, or was told within the settle time: a client without streams closes its connection
    /// at once and opens the next with its next request.
    pub fn look(&mut self, view: &View, settle: Duration, now: Timestamp) -> Vec<Moves> {
        let mut moves = Vec::new();
        for (name, entry) in &view.entries {
            let Snapshot {
                instance,
                goaways_total,
                accepted_total,
                told_load_total,
                ..
            } = entry.snapshot;
            let new = Totals {
                instance,
                goaways: goaways_total,
                accepted: accepted_total,
                load: told_load_total,
            };
            let old = self
                .last
                .insert(name.clone(), new)
                .filter(|old| old.instance == instance);
            let old = old.unwrap_or(new);
            self.told_load += (new.load - old.load).max(0.0);
            moves.push(Moves {
                apiserver: name.clone(),
                goaways: new.goaways.saturating_sub(old.goaways),
                landings: new.accepted.saturating_sub(old.accepted),
            });
        }
        self.draining = view.entries.values().map(|entry| entry.snapshot.draining).sum();
        self.draining_streams = view.entries.values().map(|entry| entry.snapshot.draining_streams).sum();
        let told = moves.iter().map(|moved| moved.goaways).sum::<u64>();
        self.told += told;
        if told > 0 {
            self.recent.push_back((now, told));
        }
        while self.recent.front().is_some_and(|(at, _)| now.since(*at) >= settle) {
            self.recent.pop_front();
        }
        if self.told > 0 {
            self.landed += moves.iter().map(|moved| moved.landings).sum::<u64>();
        }
        if self.in_transit() == 0 && !view.entries.values().any(|entry| entry.snapshot.plan_in_flight) {
            (self.told, self.landed, self.told_load) = (0, 0, 0.0);
        }
        moves
    }

    /// Clients that were told and have not landed.
    pub fn in_transit(&self) -> u64 {
        self.told.saturating_sub(self.landed).min(self.draining + self.recent())
    }

    /// Those of them that are about to land: they were told within the settle time. The others may keep their old
    /// connection for minutes, while nobody waits for them.
    pub fn landing(&self) -> u64 {
        self.in_transit().min(self.recent())
    }

    fn recent(&self) -> u64 {
        self.recent.iter().map(|(_, told)| told).sum()
    }

    /// Those clients with what they weigh. Streams are known exactly: they are on draining connections until they end and
    /// are opened anew. Requests and bytes are taken for what those who were told weighed on average.
    pub fn transit(&self, weight: Weight) -> Transit {
        let clients = self.in_transit() as f64;
        let load = match weight {
            Weight::Connections => clients,
            Weight::Requests | Weight::Bytes => clients * self.told_load / self.told.max(1) as f64,
            Weight::Streams => self.draining_streams as f64,
        };
        Transit { clients, load }
    }
}
