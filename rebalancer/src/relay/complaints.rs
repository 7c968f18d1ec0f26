//! What goes wrong with single connections, said once and then counted: a stranger must not fill the log.
//!
//! Input: causes as they happen. Output: a line for the first of a cause, one for all that follow within some seconds,
//! and counts. Must never drop a count.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// After a line about a cause the next is this long in coming.
const QUIET: Duration = Duration::from_secs(10);

/// Why a connection is refused, ended, slowed, or taken for nobody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    Limit,
    Crowded,
    Heads,
    Slow,
    Tls,
    ProxyHeader,
    Certificate,
    Upstream,
    Resources,
    Glitches,
}

/// All of them, with the value of the metric's label and what the log says.
pub const CAUSES: [(Cause, &str, &str); 10] = [
    (Cause::Limit, "limit", "refused: there is no place"),
    (
        Cause::Crowded,
        "crowded",
        "too many unfinished connections: the oldest of the address with the most is closed",
    ),
    (
        Cause::Heads,
        "heads",
        "heads or handshakes last too long, or hold too much together: the oldest is closed",
    ),
    (
        Cause::Slow,
        "slow",
        "closed: its handshake or its first request took too long",
    ),
    (Cause::Tls, "tls", "the client's TLS handshake failed"),
    (
        Cause::ProxyHeader,
        "proxy_header",
        "refused: no PROXY protocol header as promised",
    ),
    (
        Cause::Certificate,
        "certificate",
        "a client certificate is not accepted",
    ),
    (
        Cause::Upstream,
        "upstream",
        "the apiserver cannot be reached for a client",
    ),
    (
        Cause::Resources,
        "resources",
        "this process or node runs out of something: the client is refused, nothing else is closed",
    ),
    (
        Cause::Glitches,
        "glitches",
        "slowed: it sends what costs the apiserver work and brings it nothing",
    ),
];

#[derive(Debug, Default)]
struct Kept {
    count: AtomicU64,
    /// Not said yet, and when something was said last.
    unsaid: Mutex<(u64, Option<Instant>)>,
}

/// What was complained of.
#[derive(Debug, Default)]
pub struct Complaints([Kept; CAUSES.len()]);

impl Complaints {
    /// One more.
    pub fn complain(&self, cause: Cause, client: SocketAddr, why: &dyn fmt::Display) {
        self.complain_of(1, cause, client, why);
    }

    /// So many more, one of them of that client.
    pub fn complain_of(&self, count: u64, cause: Cause, client: SocketAddr, why: &dyn fmt::Display) {
        let kept = &self.0[cause as usize];
        kept.count.fetch_add(count, Relaxed);
        if !kept.is_due(count) {
            return;
        }
        let (_, _, what) = CAUSES[cause as usize];
        match cause {
            Cause::Resources => tracing::error!(%client, %why, "{what}"),
            Cause::Limit | Cause::Crowded | Cause::Heads | Cause::Glitches | Cause::Upstream => {
                tracing::warn!(%client, %why, "{what}")
            }
            // A load balancer's check connects and goes.
            Cause::Tls => tracing::debug!(%client, %why, "{what}"),
            Cause::Slow | Cause::ProxyHeader | Cause::Certificate => tracing::info!(%client, %why, "{what}"),
        }
    }

    /// Says how many followed, of each cause about which nothing was said for a while.
    pub fn summarise(&self) {
        for (kept, (cause, _, what)) in self.0.iter().zip(CAUSES) {
            let more = kept.due_summary();
            match cause {
                _ if more == 0 => {}
                Cause::Tls => tracing::debug!(more, "{what}"),
                _ => tracing::info!(more, "{what}"),
            }
        }
    }

    /// How many there were, by the label's value.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let kept = self.0.iter().map(|kept| kept.count.load(Relaxed));
        CAUSES.iter().map(|(_, label, _)| *label).zip(kept)
    }
}

impl Kept {
    /// Whether the first of so many is said now; what is not said is kept for the summary.
    fn is_due(&self, count: u64) -> bool {
        let mut unsaid = self.unsaid.lock().unwrap_or_else(PoisonError::into_inner);
        let due = unsaid.0 == 0 && unsaid.1.is_none_or(|at| at.elapsed() >= QUIET);
        if due {
            unsaid.1 = Some(Instant::now());
        }
        unsaid.0 += count - u64::from(due);
        due
    }

    fn due_summary(&self) -> u64 {
        let mut unsaid = self.unsaid.lock().unwrap_or_else(PoisonError::into_inner);
        if unsaid.0 == 0 || unsaid.1.is_some_and(|at| at.elapsed() < QUIET) {
            return 0;
        }
        unsaid.1 = Some(Instant::now());
        std::mem::take(&mut unsaid.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_said_and_the_others_are_counted() {
        for (index, (cause, label, _)) in CAUSES.iter().enumerate() {
            assert_eq!(*cause as usize, index, "{label}");
        }
        let kept = Kept::default();
        assert!(kept.is_due(1));
        assert!((0..100).all(|_| !kept.is_due(1)));
        assert_eq!(kept.due_summary(), 0, "it is too early");
        kept.unsaid.lock().expect("nobody panics").1 = None;
        assert_eq!(kept.due_summary(), 100);
        let complaints = Complaints::default();
        for _ in 0..3 {
            complaints.complain(Cause::Limit, SocketAddr::from(([192, 0, 2, 7], 1)), &"full");
        }
        assert_eq!(complaints.counts().next(), Some(("limit", 3)));
    }
}
