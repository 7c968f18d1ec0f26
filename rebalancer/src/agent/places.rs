//! How many connections strangers may hold on a port, in all and from one address.
//!
//! Must never keep anything of who has gone.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use crate::listen::counted_as;

/// How many connections each address has (IPv6: each /64).
#[derive(Debug)]
pub struct Places {
    all: usize,
    of_one: usize,
    taken: Mutex<BTreeMap<IpAddr, usize>>,
}

/// One of them; it is free again when this goes.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    address: IpAddr,
}

impl Places {
    /// So many in all, and so many of them from one address.
    pub fn new(all: usize, of_one: usize) -> Arc<Self> {
        Arc::new(Self {
            all,
            of_one,
            taken: Mutex::default(),
        })
    }

    /// A place, if there is one left.
    pub fn take(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let address = counted_as(address);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.values().sum::<usize>() >= self.all {
            return None;
        }
        let count = taken.entry(address).or_default();
        if *count >= self.of_one {
            return None;
        }
        *count += 1;
        Some(Place {
            places: Arc::clone(self),
            address,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_has_a_few_places_and_gets_them_back() {
        let places = Places::new(256, 8);
        let address = |last: u8| IpAddr::from([192, 0, 2, last]);
        let mut held: Vec<_> = (0..8).map(|_| places.take(address(1)).expect("a place")).collect();
        assert!(places.take(address(1)).is_none());
        for last in 2..=32 {
            held.extend((0..8).map(|_| places.take(address(last)).expect("a place")));
        }
        assert!(places.take(address(33)).is_none(), "all together have a limit too");
        let v6 = |last: u16| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, last]);
        let of_network = Places::new(256, 8);
        let held_there: Vec<_> = (0..20).filter_map(|last| of_network.take(v6(last))).collect();
        assert_eq!(held_there.len(), 8, "a network of IPv6 is one address");
        held.remove(0);
        assert!(places.take(address(33)).is_some());
        held.clear();
        assert!(
            places.taken.lock().expect("nobody panics").is_empty(),
            "nothing is kept of who has gone"
        );
    }
}
