//! Who may come in: bounds for strangers, and a part of the room kept for those who are known.
//!
//! Input: connections as they are accepted, and what is known of them when their handshakes are done. Output: a place, or
//! a refusal. Must never let those who prove nothing keep out those who can: unfinished connections give way to newer
//! ones, the oldest of the address with the most of them first, and clients without a certificate get a part only.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::registry::{Connection, Order};
use crate::listen::counted_as;

/// How many connections may be unfinished at a time: handshakes that last, and clients that have not said anything.
const UNFINISHED: usize = 2_048;

/// Those that were told to give way and whose task has not come to it yet: beyond that whoever is newest is let go, since
/// each holds a file and a task.
const LEAVING: usize = UNFINISHED / 4;

/// One part in so many of `--max-connections` is for clients with a certificate.
const KEPT_PART: usize = 5;

/// The bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Connections at a time.
    pub connections: usize,
    /// Of these, those of clients without a certificate that is accepted.
    pub strangers: usize,
    /// Of these, those from one address (IPv6: one /64).
    pub strangers_per_address: usize,
    /// Connections that are not finished, besides.
    pub unfinished: usize,
}

impl Bounds {
    /// From `--max-connections` and `--max-connections-per-address`.
    pub fn new(connections: usize, per_address: Option<usize>) -> Self {
        let strangers = connections - connections / KEPT_PART;
        Self {
            connections,
            strangers,
            strangers_per_address: per_address.unwrap_or((strangers * 3).div_ceil(4)).min(strangers),
            unfinished: UNFINISHED.min(connections.max(16)),
        }
    }
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoPlace {
    /// All are taken.
    #[error("--max-connections is reached")]
    Connections,
    /// Those for clients without a certificate are.
    #[error("--max-connections is reached, but for the part kept for clients with a certificate")]
    Strangers,
    /// One address has its share.
    #[error("--max-connections-per-address is reached for clients without a certificate")]
    Address,
}

/// Where somebody comes from, as bounds count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Source(IpAddr);

impl Source {
    fn of(address: IpAddr) -> Self {
        Self(counted_as(address))
    }
}

#[derive(Debug, Default)]
struct Count {
    unfinished: usize,
    strangers: usize,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    /// In the order in which they came.
    unfinished: BTreeMap<u64, (Source, Arc<Connection>)>,
    strangers: usize,
    known: usize,
    by_source: HashMap<Source, Count>,
}

/// All places.
#[derive(Debug)]
pub struct Admission {
    bounds: Bounds,
    inner: Mutex<Inner>,
    /// One for each task whose handshakes are not done, those included that gave way.
    tasks: Arc<Semaphore>,
}

/// How far a guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Unfinished(u64),
    Stranger,
    Known,
}

/// One connection's place; it is free again when this goes.
#[derive(Debug)]
pub struct Place {
    admission: Arc<Admission>,
    source: Source,
    stage: Stage,
}

impl Admission {
    /// All free.
    pub fn new(bounds: Bounds) -> Arc<Self> {
        Arc::new(Self {
            bounds,
            inner: Mutex::default(),
            tasks: Arc::new(Semaphore::new(bounds.unfinished + LEAVING)),
        })
    }

    /// Leave to begin handshakes, kept until they are done or given up; `None` when those that gave way are still too many.
    pub fn task(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.tasks).try_acquire_owned().ok()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a connection that has proved nothing, and whether another one had to give way: it is told to close.
    pub fn enter(self: &Arc<Self>, address: IpAddr, connection: &Arc<Connection>) -> (Place, bool) {
        let source = Source::of(address);
        let mut inner = self.inner();
        let crowded = inner.unfinished.len() >= self.bounds.unfinished;
        if crowded {
            inner.make_room();
        }
        let number = inner.next;
        inner.next += 1;
        inner.unfinished.insert(number, (source, Arc::clone(connection)));
        inner.by_source.entry(source).or_default().unfinished += 1;
        debug_assert!(inner.unfinished.len() <= self.bounds.unfinished);
        drop(inner);
        let place = Place {
            admission: Arc::clone(self),
            source,
            stage: Stage::Unfinished(number),
        };
        (place, crowded)
    }

    /// Connections that are not finished, of clients without a certificate, and of those with one.
    pub fn counts(&self) -> [usize; 3] {
        let inner = self.inner();
        [inner.unfinished.len(), inner.strangers, inner.known]
    }
}

impl Inner {
    /// The oldest of the address with the most unfinished connections gives way.
    fn make_room(&mut self) {
        let most = self.by_source.iter().max_by_key(|(_, count)| count.unfinished);
        let Some(most) = most.map(|(source, _)| *source) else {
            return;
        };
        let oldest = self.unfinished.iter().find(|(_, (source, _))| *source == most);
        if let Some(number) = oldest.map(|(number, _)| *number)
            && let Some((_, connection)) = self.leave_unfinished(number)
        {
            connection.order(Order::Close);
        }
    }

    fn leave_unfinished(&mut self, number: u64) -> Option<(Source, Arc<Connection>)> {
        let left = self.unfinished.remove(&number)?;
        self.count(left.0, |count| count.unfinished -= 1);
        Some(left)
    }

    fn count(&mut self, source: Source, change: impl FnOnce(&mut Count)) {
        if let Some(count) = self.by_source.get_mut(&source) {
            change(count);
            if count.unfinished == 0 && count.strangers == 0 {
                self.by_source.remove(&source);
            }
        }
    }
}

impl Place {
    /// Its handshakes are done, and it has begun to speak: `known` by a certificate, or a stranger.
    ///
    /// # Errors
    ///
    /// [`NoPlace`], and what is unfinished stays so until it goes.
    pub fn finish(&mut self, known: bool) -> Result<(), NoPlace> {
        let Stage::Unfinished(number) = self.stage else {
            return Ok(());
        };
        let bounds = self.admission.bounds;
        let mut inner = self.admission.inner();
        if inner.strangers + inner.known >= bounds.connections {
            return Err(NoPlace::Connections);
        }
        if !known {
            if inner.strangers >= bounds.strangers {
                return Err(NoPlace::Strangers);
            }
            let of_source = inner.by_source.get(&self.source).map_or(0, |count| count.strangers);
            if of_source >= bounds.strangers_per_address {
                return Err(NoPlace::Address);
            }
        }
        inner.leave_unfinished(number);
        self.stage = if known {
            inner.known += 1;
            Stage::Known
        } else {
            inner.strangers += 1;
            inner.by_source.entry(self.source).or_default().strangers += 1;
            Stage::Stranger
        };
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inner = self.admission.inner();
        match self.stage {
            // It may have given way before.
            Stage::Unfinished(number) => drop(inner.leave_unfinished(number)),
            Stage::Known => inner.known -= 1,
            Stage::Stranger => {
                inner.strangers -= 1;
                inner.count(self.source, |count| count.strangers -= 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::relay::registry::Registry;

    struct Hall {
        registry: Arc<Registry>,
        admission: Arc<Admission>,
        next: u64,
    }

    impl Hall {
        fn new(bounds: Bounds) -> Self {
            Self {
                registry: Registry::new("i".to_owned()),
                admission: Admission::new(bounds),
                next: 0,
            }
        }

        fn enter(&mut self, address: &str) -> (Place, Arc<Connection>) {
            self.next += 1;
            let address: IpAddr = address.parse().expect("an address");
            let socket = SocketAddr::new(address, 1);
            let connection = self.registry.open(self.next, socket, socket);
            (self.admission.enter(address, &connection).0, connection)
        }
    }

    const BOUNDS: Bounds = Bounds {
        connections: 10,
        strangers: 8,
        strangers_per_address: 4,
        unfinished: 6,
    };

    #[test]
    fn those_that_gave_way_and_are_not_gone_are_bounded_too() {
        let hall = Hall::new(BOUNDS);
        let mut tasks: Vec<_> = std::iter::from_fn(|| hall.admission.task()).collect();
        assert_eq!(tasks.len(), BOUNDS.unfinished + LEAVING);
        tasks.pop();
        assert!(hall.admission.task().is_some(), "one has gone");
    }

    #[test]
    fn strangers_leave_room_for_those_who_are_known() {
        let mut hall = Hall::new(BOUNDS);
        let mut places = Vec::new();
        for (address, count) in [("192.0.2.1", 4), ("192.0.2.2", 4)] {
            for _ in 0..count {
                let (mut place, _) = hall.enter(address);
                assert_eq!(place.finish(false), Ok(()));
                places.push(place);
            }
            assert!(hall.enter(address).0.finish(false).is_err(), "its share is taken");
        }
        assert_eq!(hall.enter("192.0.2.3").0.finish(false), Err(NoPlace::Strangers));
        for _ in 0..2 {
            let (mut place, _) = hall.enter("192.0.2.1");
            assert_eq!(place.finish(true), Ok(()));
            places.push(place);
        }
        assert_eq!(hall.enter("192.0.2.3").0.finish(true), Err(NoPlace::Connections));
        assert_eq!(hall.admission.counts(), [0, 8, 2]);
        places.clear();
        assert_eq!(hall.admission.counts(), [0, 0, 0]);
        assert!(hall.admission.inner().by_source.is_empty(), "nothing is kept of them");
    }

    #[tokio::test]
    async fn the_oldest_of_the_crowd_gives_way_and_nobody_else() {
        let mut hall = Hall::new(BOUNDS);
        let alone = hall.enter("198.51.100.1");
        let mut crowd: Vec<_> = (0..5).map(|_| hall.enter("2001:db8::1")).collect();
        for round in 0..3 {
            // Another address of the same network.
            crowd.push(hall.enter(&format!("2001:db8::{}", round + 2)));
            assert_eq!(crowd[round].1.ordered().await, Order::Close);
            assert_eq!(hall.admission.counts()[0], 6);
        }
        let (mut place, _) = alone;
        assert_eq!(place.finish(false), Ok(()), "it was not the one to give way");
        drop(crowd);
        assert_eq!(hall.admission.counts(), [0, 1, 0]);
    }

    #[test]
    fn bounds_of_any_size_leave_room_for_everybody() {
        for connections in 1..100 {
            let bounds = Bounds::new(connections, None);
            assert!(bounds.strangers >= 1 && bounds.strangers_per_address >= 1, "{bounds:?}");
            assert!(bounds.strangers <= connections, "{bounds:?}");
        }
        let bounds = Bounds::new(50_000, None);
        assert_eq!((bounds.strangers, bounds.strangers_per_address), (40_000, 30_000));
    }
}
