//! What was said of connections that the source has not shown yet.
//!
//! Job: keep a shim's word and a ClientHello's offer until the connection is shown, for each is said once.
//! Must never grow without bound: offers come from strangers, so the oldest are forgotten, and counted.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::{
    ids::{ConnectionId, Protocol, Timestamp},
    shim::ShimConnection,
};

/// So many offers are kept; a storm of connections has fewer on their way at once.
const OFFERS: usize = 16_384;

/// Words that came too early.
#[derive(Clone, Debug, Default)]
pub(super) struct Early {
    /// The shim's, and when it said so; it says what ends as well, so these are no more than it has.
    shim: HashMap<ConnectionId, (Timestamp, ShimConnection)>,
    offers: HashMap<ConnectionId, Protocol>,
    /// The offers in the order in which they came; some are gone.
    order: VecDeque<ConnectionId>,
    forgotten: u64,
}

impl Early {
    /// The shim's whole list comes: what it said before is old.
    pub fn forget_shim(&mut self) {
        self.shim.clear();
    }

    /// A shim's word.
    pub fn say(&mut self, known: &ShimConnection, now: Timestamp) {
        self.shim.insert(known.id, (now, known.clone()));
    }

    /// The shim's connection ended.
    pub fn end(&mut self, id: ConnectionId) {
        self.shim.remove(&id);
    }

    /// A ClientHello's offer.
    pub fn offer(&mut self, id: ConnectionId, protocol: Protocol) {
        if self.offers.insert(id, protocol).is_none() {
            self.order.push_back(id);
        }
        while self.offers.len() > OFFERS {
            let Some(oldest) = self.order.pop_front() else { break };
            self.forgotten += u64::from(self.offers.remove(&oldest).is_some());
        }
        if self.order.len() > 2 * OFFERS {
            self.order.retain(|id| self.offers.contains_key(id));
        }
    }

    /// What was said of a connection that is shown now, the shim's word with when it came.
    pub fn take(&mut self, id: ConnectionId) -> (Option<Protocol>, Option<(Timestamp, ShimConnection)>) {
        (self.offers.remove(&id), self.shim.remove(&id))
    }

    /// The connection is gone: its offer is nobody's.
    pub fn closed(&mut self, id: ConnectionId) {
        self.offers.remove(&id);
    }

    /// A complete list is there: offers of others are of connections that are gone.
    pub fn keep(&mut self, listed: &HashSet<ConnectionId>) {
        self.offers.retain(|id, _| listed.contains(id));
        self.order.retain(|id| listed.contains(id));
    }

    /// Offers that found no room.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_fill_it_to_its_bound_and_the_oldest_go_first() {
        let mut early = Early::default();
        let all = 3 * OFFERS as u64;
        for id in 0..all {
            early.offer(ConnectionId(id), Protocol::H2Offered);
            if id % 3 == 0 {
                early.closed(ConnectionId(id));
            }
        }
        assert!(early.offers.len() <= OFFERS && early.order.len() <= 2 * OFFERS);
        assert_eq!(early.take(ConnectionId(all - 1)).0, Some(Protocol::H2Offered));
        assert_eq!(early.take(ConnectionId(1)).0, None);
        assert!(early.forgotten() > 0);
    }
}
