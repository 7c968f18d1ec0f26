//! Who is told to go, and when: by plans, by time, and because the process ends.
//!
//! Input: plans, and the clock. Output: notes in mailboxes. Must never end a connection on which a request may be lost by
//! it, before its deadline.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use super::{
    Connection, Registry,
    entry::{Outdated, Telling},
    mailbox::Order,
};
use crate::shim::wire::{self, GoawayResult, Id, Outcome, Protocol};

/// How long a client may take to answer the PING between the two GOAWAYs.
const ANSWER: Duration = Duration::from_secs(10);

/// An order of a plan that has been overtaken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("generation {asked} is lower than {seen}, which was carried out before")]
pub struct Overtaken {
    asked: u64,
    seen: u64,
}

impl Registry {
    /// Gives the order of a plan to its victims.
    ///
    /// # Errors
    ///
    /// [`Overtaken`] when a later plan's order came before.
    pub fn go_away(
        &self,
        generation: u64,
        expires_in: Duration,
        victims: &[Id],
    ) -> Result<Vec<wire::Answered>, Overtaken> {
        let mut inner = self.inner();
        if generation < inner.generation {
            return Err(Overtaken {
                asked: generation,
                seen: inner.generation,
            });
        }
        inner.generation = generation;
        let answer = |id: &Id| {
            let result = match inner.open.get(&id.0) {
                None => GoawayResult::Unknown,
                Some(_) if expires_in.is_zero() => GoawayResult::Expired,
                Some(connection) => connection.order_goaway(generation, Some(expires_in)),
            };
            wire::Answered { id: *id, result }
        };
        Ok(victims.iter().map(answer).collect())
    }

    /// Tells up to `count` HTTP/2 connections to go, and every HTTP/1.1 connection, because this process is going; what
    /// is left of each after `deadline` ends.
    pub fn go_away_some(&self, count: usize, deadline: Duration) {
        let mut told = 0;
        let by = self
            .now_ms()
            .saturating_add(u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX));
        for connection in self.inner().open.values() {
            let protocol = connection.protocol();
            if protocol == Protocol::H2 && told == count {
                continue;
            }
            let result = connection.order_goaway(0, None);
            told += usize::from(result == GoawayResult::Sent);
            let mut known = connection.known();
            if protocol != Protocol::Unknown && known.leaves_by.is_none() {
                known.leaves_by = Some(by);
                drop(known);
                if protocol == Protocol::Http1 {
                    connection.order(Order::GoAway);
                }
            }
        }
    }

    /// The connections that take no new streams, with their open watches.
    pub fn handing_over(&self) -> Vec<(u64, u32)> {
        let inner = self.inner();
        let told = inner
            .open
            .values()
            .filter(|connection| connection.known().telling == Telling::Final);
        told.map(|connection| (connection.id().0, connection.open_watches()))
            .collect()
    }

    /// Lets a connection end so many watches, those that were ended before included.
    pub fn hand_over(&self, id: u64, total: u32) {
        if let Some(connection) = self.inner().open.get(&id) {
            connection.order(Order::HandOver(total));
        }
    }

    /// Moves the coarse clock on, tells those to go that have been idle for too long, and closes what has been draining
    /// for too long.
    pub fn sweep(&self, idle: Duration, drain: Duration) {
        let now = self.now_ms();
        self.coarse_ms.store(now, Relaxed);
        self.end_slow_heads(now);
        let older = |at: u64, limit: Duration| u128::from(now.saturating_sub(at)) > limit.as_millis();
        let mut expired = Vec::new();
        for connection in self.inner().open.values() {
            if connection.expire(now) {
                expired.push(Arc::clone(connection));
            }
            let (telling, told_at, leaves_by) = {
                let known = connection.known();
                (known.telling, known.told_at, known.leaves_by)
            };
            if telling == Telling::Told && older(told_at, ANSWER) {
                connection.order(Order::Conclude);
            }
            let over = telling >= Telling::Told && older(told_at, drain);
            if over || leaves_by.is_some_and(|by| now >= by) {
                connection.order(Order::Close);
            }
            // HTTP/1.1 looks after its own time between two requests.
            let silent = connection.protocol() == Protocol::H2
                && connection.open_streams() == 0
                && older(connection.active_at(), idle);
            if silent {
                // A request that crosses on the wire is served.
                connection.order_goaway(0, None);
            }
        }
        for connection in expired {
            self.outcome(&connection, Outcome::Expired, None);
        }
    }

    /// Judges every connection's certificate again, because those who vouch have changed; how many are over.
    pub fn review(&self) -> usize {
        let over: Vec<_> = self
            .all()
            .into_iter()
            .filter(|connection| connection.review())
            .collect();
        for connection in &over {
            connection.order_goaway(0, None);
        }
        over.len()
    }

    /// Tells clients to go whose certificate is over. Their requests are refused since then; they come back, and are asked
    /// again.
    pub fn tell_distrusted(&self) {
        for connection in self.all().iter().filter(|connection| !connection.is_believed()) {
            connection.order_goaway(0, None);
        }
    }

    /// The connections that are served with another front-proxy certificate than that issue, and will be; those whose own ends
    /// first come first.
    pub fn outdated(&self, issue: u64) -> Vec<(Outdated, Arc<Connection>)> {
        let mut outdated: Vec<_> = self
            .all()
            .into_iter()
            .filter_map(|connection| Some((connection.outdated(issue)?, connection)))
            .collect();
        outdated.sort_by_key(|(outdated, connection)| (outdated.until, connection.id().0));
        outdated
    }

    /// When the certificates of those clients end that are believed to be who they say, in seconds since 1970.
    pub fn certificate_ends(&self) -> Vec<i64> {
        self.all()
            .iter()
            .filter_map(|connection| connection.certificate_ends())
            .collect()
    }

    fn all(&self) -> Vec<Arc<Connection>> {
        self.inner().open.values().cloned().collect()
    }
}
