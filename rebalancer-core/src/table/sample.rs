//! Samples of what connections do, from which their smoothed rates follow.
//!
//! Job: rates, and who is heaviest. Input: the table and `now`. Output: rates in the table.
//! Must never keep the agent's loop waiting for a large table where nothing rests on it: where each connection counts as
//! one, rates are for people, and a look goes through a part of the table only.

use std::cmp::Reverse;

use super::{Connection, ConnectionTable, Rates, Totals, connection::Sampled, order::Key, slab::CHUNK};
use crate::{
    ids::{ConnectionId, Timestamp},
    policy::Weight,
    weight::SMOOTHING,
};

/// How fast smoothed rates follow.
const SMOOTHING_SECONDS: f64 = SMOOTHING.as_secs() as f64;

/// So many of the heaviest connections are noted.
const HEAVIEST: usize = 5;

/// So many chunks are sampled in one look where each connection counts as one: a table of up to 65,536 connections whole.
const PART: usize = 65_536 / CHUNK;

/// How far the samples are.
#[derive(Clone, Debug, Default)]
pub(super) struct Samples {
    at: Option<Timestamp>,
    since: Option<Timestamp>,
    /// The chunk that is next.
    next: usize,
    /// The heaviest when all were seen last, the heaviest first.
    heaviest: Vec<ConnectionId>,
    /// The heaviest of those that were seen since.
    rising: Vec<(u64, Reverse<ConnectionId>)>,
}

impl ConnectionTable {
    /// Takes a sample of the connections' figures, from which the smoothed rates follow: of all, or where each counts as one
    /// of the next part of a large table, so that a few looks go through it.
    ///
    /// An exponential mean with a time constant of 30 s, divided by the weight that its samples have together: so a young
    /// connection's rate is the plain mean since it was opened, and what a moved client weighs is known at once.
    /// Of a connection whose age is not known, for it is older than the agent or its opening was missed, the first sample sets
    /// the base only.
    /// The heaviest are noted on the way (see [`Self::heaviest`]).
    pub fn sample(&mut self, now: Timestamp, weight: Weight) {
        if self.samples.at.is_some_and(|at| at >= now) {
            return;
        }
        self.samples.at = Some(now);
        if self.trusted {
            self.samples.since.get_or_insert(now);
        }
        let chunks = self.connections.chunks();
        let first = if self.samples.next < chunks {
            self.samples.next
        } else {
            0
        };
        let end = if weight.is_counted() {
            chunks.min(first + PART)
        } else {
            chunks
        };
        let is_whole = first == 0 && end == chunks;
        // Sums of rounded numbers drift: they begin anew where all are gone through.
        let mut totals = if is_whole { Totals::default() } else { self.totals };
        for at in first..end {
            let chunk = self.connections.chunk_mut(at);
            let interval = chunk.sampled_at.map_or(0.0, |at| now.since(at).as_secs_f64());
            chunk.sampled_at = Some(now);
            let keep_interval = (-interval / SMOOTHING_SECONDS).exp();
            for (connection, key) in chunk.scan_mut() {
                if !is_whole {
                    totals.uncount(connection);
                }
                let before = connection.rates;
                take(connection, (interval, keep_interval), now);
                totals.count(connection);
                if before != connection.rates {
                    *key = Key::of(connection, self.node_local);
                }
                self.samples.notice(connection, weight);
            }
        }
        self.totals = totals;
        self.samples.next = end;
        if end == chunks {
            self.samples.next = 0;
            let rising = self.samples.rising.drain(..);
            self.samples.heaviest = rising.map(|(_, Reverse(id))| id).collect();
        }
    }

    /// The heaviest active connections as of the last sample of all, the heaviest first; where all weigh the same, those with
    /// the most requests a second.
    pub fn heaviest(&self) -> impl Iterator<Item = &Connection> {
        let known = self.samples.heaviest.iter().filter_map(|id| self.connections.get(*id));
        known.filter(|connection| connection.is_active())
    }

    /// When the first sample was taken.
    pub fn sampled_since(&self) -> Option<Timestamp> {
        self.samples.since
    }
}

/// Takes a sample of one connection; `interval` is the time since its neighbours' last, and what that leaves of old rates.
fn take(connection: &mut Connection, (interval, keep_interval): (f64, f64), now: Timestamp) {
    let requests = connection.counters.requests;
    let bytes = connection.counters.bytes_in + connection.counters.bytes_out;
    let before = connection.sampled;
    let age = now.since(connection.opened_at).as_secs_f64();
    let (seconds, keep) = if age < interval || before.is_from_birth {
        (age, (-age / SMOOTHING_SECONDS).exp())
    } else {
        (interval, keep_interval)
    };
    let mut share = before.share;
    if before.is_set && seconds > 0.0 {
        let old = f64::from(share) * keep;
        let new = 1.0 - keep;
        let smooth = |rate: f64, total: u64, before: u64| {
            if rate == 0.0 && total == before {
                return 0.0;
            }
            (old * rate + new * total.saturating_sub(before) as f64 / seconds) / (old + new)
        };
        connection.rates = Rates {
            requests: smooth(connection.rates.requests, requests, before.requests),
            bytes: smooth(connection.rates.bytes, bytes, before.bytes),
        };
        share = (old + new) as f32;
    }
    connection.sampled = Sampled {
        is_set: true,
        is_from_birth: before.is_from_birth && share == 0.0,
        share,
        requests,
        bytes,
    };
}

impl Samples {
    /// Whether it is one of the heaviest of those that were seen.
    fn notice(&mut self, connection: &Connection, weight: Weight) {
        let load = match weight {
            Weight::Connections => connection.rates.requests,
            weight => connection.load(weight),
        };
        // The bits of positive numbers are in their order.
        let rank = (load.to_bits(), Reverse(connection.id));
        let rising = &mut self.rising;
        if connection.is_active() && (rising.len() < HEAVIEST || rising.last().is_some_and(|last| rank > *last)) {
            let place = rising.partition_point(|other| *other > rank);
            rising.insert(place, rank);
            rising.truncate(HEAVIEST);
        }
    }
}
