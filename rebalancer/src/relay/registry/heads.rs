//! Octets of heads and of handshakes' messages that are not whole yet, of all connections together.
//!
//! Job: bound them. Whoever means well is done with a head in an instant, so the one that has lasted longest gives way.
//! Input: what each connection holds. Output: orders to close, and how many were given.
//! Must never make a newcomer wait, nor count what is small: usual heads never come here.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{MutexGuard, PoisonError, atomic::Ordering::Relaxed},
    time::Duration,
};

use super::{Connection, Registry, mailbox::Order};

/// A head of up to so many octets is not counted: all that are open may have one.
pub(super) const SMALL_HEAD: usize = 4096;

/// How many octets the others may have in all: with what grows by doubling and what each connection has beside, a quarter
/// of what strangers may cost.
const BOUND: usize = 8 * 1024 * 1024;

/// How long one may last, over HTTP/2 as over HTTP/1.1: kube-apiserver's own `ReadHeaderTimeout`
/// (k8s.io/apiserver/pkg/server/secure_serving.go).
const LONGEST: Duration = Duration::from_secs(32);

#[derive(Debug)]
struct Held {
    connection: u64,
    client: SocketAddr,
    octets: usize,
    /// Coarse milliseconds.
    since: u64,
}

/// Those that are large, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Heads {
    last: u64,
    held: BTreeMap<u64, Held>,
    octets: usize,
    /// How many have given way and were not told of yet, and the last one's client.
    gone: (u64, Option<SocketAddr>),
}

impl Heads {
    fn enter(&mut self, held: Held) -> u64 {
        self.last += 1;
        self.octets += held.octets;
        self.held.insert(self.last, held);
        self.last
    }

    fn change(&mut self, number: u64, octets: usize) {
        // One that has given way is not there any more.
        if let Some(held) = self.held.get_mut(&number) {
            self.octets = self.octets - held.octets + octets;
            held.octets = octets;
        }
    }

    fn leave(&mut self, number: u64) {
        if let Some(held) = self.held.remove(&number) {
            self.octets -= held.octets;
        }
    }

    /// The oldest, when there is too much, or when it has begun before `older`.
    fn gives_way(&mut self, older: u64) -> Option<u64> {
        let first = self.held.first_entry()?;
        if self.octets <= BOUND && first.get().since >= older {
            return None;
        }
        let held = first.remove();
        self.octets -= held.octets;
        self.gone = (self.gone.0 + 1, Some(held.client));
        debug_assert_eq!(self.octets, self.held.values().map(|held| held.octets).sum::<usize>());
        Some(held.connection)
    }
}

impl Registry {
    fn heads(&self) -> MutexGuard<'_, Heads> {
        self.heads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn hold(&self, connection: &Connection, octets: usize) {
        let mut heads = self.heads();
        match connection.head.load(Relaxed) {
            0 => {
                let number = heads.enter(Held {
                    connection: connection.id().0,
                    client: connection.client(),
                    octets,
                    since: self.coarse_ms(),
                });
                connection.head.store(number, Relaxed);
            }
            number if octets <= SMALL_HEAD => {
                heads.leave(number);
                connection.head.store(0, Relaxed);
            }
            number => heads.change(number, octets),
        }
        let over = std::iter::from_fn(|| heads.gives_way(0)).collect();
        drop(heads);
        self.close_all(over);
    }

    /// Ends those that have lasted too long.
    pub(super) fn end_slow_heads(&self, now: u64) {
        let limit = u64::try_from(LONGEST.as_millis()).unwrap_or(u64::MAX);
        let mut heads = self.heads();
        let over = std::iter::from_fn(|| heads.gives_way(now.saturating_sub(limit))).collect();
        drop(heads);
        self.close_all(over);
    }

    fn close_all(&self, ids: Vec<u64>) {
        for id in ids {
            if let Some(connection) = self.inner().open.get(&id) {
                connection.order(Order::Close);
            }
        }
    }

    /// How many had to give way since this was asked last, and the client of one.
    pub fn take_ended_heads(&self) -> (u64, Option<SocketAddr>) {
        std::mem::take(&mut self.heads().gone)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn open(registry: &Arc<Registry>, id: u64) -> Arc<Connection> {
        let address = SocketAddr::from(([192, 0, 2, 7], 1));
        registry.open(id, address, address)
    }

    fn is_to_close(connection: &Connection) -> bool {
        let mut closing = std::pin::pin!(connection.closing());
        let waker = std::task::Waker::noop();
        closing
            .as_mut()
            .poll(&mut std::task::Context::from_waker(waker))
            .is_ready()
    }

    #[test]
    fn the_head_that_has_lasted_longest_gives_way_and_nothing_is_kept_of_it() {
        let registry = Registry::new("i".to_owned());
        let part = BOUND / 8;
        let all: Vec<_> = (0..9).map(|id| open(&registry, id)).collect();
        all[0].hold(SMALL_HEAD);
        for connection in &all[1..] {
            connection.hold(SMALL_HEAD + 1);
            connection.hold(part);
        }
        assert!(
            !all.iter().any(|connection| is_to_close(connection)),
            "it is as much as may be"
        );
        all[3].hold(0);
        all[4].hold(2 * part);
        assert!(!is_to_close(&all[1]));
        all[3].hold(part);
        assert_eq!(
            all.iter().map(|connection| is_to_close(connection)).collect::<Vec<_>>(),
            [false, true, false, false, false, false, false, false, false]
        );
        // Whatever it still says of itself counts no more.
        all[1].hold(100 * part);
        all[1].hold(0);
        assert_eq!(registry.take_ended_heads().0, 1);
        for connection in &all {
            connection.close("over");
        }
        let heads = registry.heads();
        assert_eq!((heads.octets, heads.held.len()), (0, 0));
    }

    #[test]
    fn one_that_lasts_is_ended_whatever_it_holds() {
        let registry = Registry::new("i".to_owned());
        let (slow, quick) = (open(&registry, 1), open(&registry, 2));
        slow.hold(SMALL_HEAD + 1);
        registry.coarse_ms.store(30_000, Relaxed);
        quick.hold(SMALL_HEAD + 1);
        registry.end_slow_heads(32_001);
        assert!(is_to_close(&slow) && !is_to_close(&quick));
        assert_eq!(registry.take_ended_heads(), (1, Some(slow.client())));
    }
}
