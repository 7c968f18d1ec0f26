//! The planner: how many GOAWAYs this apiserver should send, and to whom.
//!
//! Input: a view, what is in transit, what was learned, the policy, and the table. Output: a [`Balance`] and victims.
//! Must never do anything: each donor computes its own part of one common plan, and its agent carries it out.

use std::collections::BTreeSet;

use crate::{
    ids::ConnectionId,
    policy::Weight,
    table::{Connection, ConnectionTable},
};

mod balance;
mod choose;
mod cooldown;
pub mod noise;
mod spread;

pub use balance::{Balance, Need, Server, Transit, balance, below, donors, full_ceiling, need};
pub use choose::{LeftOut, Request, choose, heavy, left_out};
pub use cooldown::{Cooldowns, Resting};
pub use spread::Spread;

/// Who was heavier than the target counts as that until it is this much of it: a client at the edge does not change sides.
const LEAVES: f64 = 0.9;

/// Those who are heavier than the target: wherever they go, that apiserver is above it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Unmovable {
    who: BTreeSet<ConnectionId>,
    load: f64,
}

impl Unmovable {
    /// Who it is now.
    pub fn look(&mut self, table: &ConnectionTable, weight: Weight, ceiling: f64) {
        self.load = 0.0;
        if weight.is_counted() {
            return;
        }
        let mut now = BTreeSet::new();
        for connection in table.scan().filter(|connection| connection.is_active()) {
            let load = weight.of(connection);
            if load > ceiling || load > LEAVES * ceiling && self.who.contains(&connection.id) {
                now.insert(connection.id);
                self.load += load;
            }
        }
        self.who = now;
    }

    /// What they weigh together.
    pub fn load(&self) -> f64 {
        self.load
    }
}

/// A token of the budget pays for one reconnect, or for the start of so many watches where the client lands.
const WATCHES_PER_TOKEN: u32 = 10;

/// What telling a connection costs, in tokens: one, and one more for each ten watches that start anew elsewhere.
///
/// A watch takes a seat of the recipient's flow control until its first events are sent; a client with a thousand watches
/// is not moved at the pace of a thousand clients with one.
pub fn cost_of(connection: &Connection) -> f64 {
    f64::from(1 + connection.counters.open_watches / WATCHES_PER_TOKEN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::Timestamp,
        observation::{Observation, Socket},
        shim::{Counters, ShimReport},
    };

    /// A client at the edge does not make donors and recipients change places from look to look.
    #[test]
    fn who_was_too_heavy_counts_as_that_until_it_is_clearly_lighter() {
        let mut table = ConnectionTable::default();
        let id = ConnectionId(1);
        let socket = Socket {
            id,
            local: "10.0.0.1:6443".parse().expect("an address"),
            remote: "10.1.0.1:1000".parse().expect("an address"),
            bytes_in: 0,
            bytes_out: 0,
            start: 0,
        };
        let list = Observation::Resync {
            sockets: vec![socket],
            listener: None,
        };
        table.observe(list, Timestamp::default());
        let mut unmovable = Unmovable::default();
        for (weighs, counts) in [
            (138, 0.0),
            (142, 142.0),
            (138, 138.0),
            (127, 127.0),
            (125, 0.0),
            (138, 0.0),
        ] {
            let counters = Counters {
                open_streams: weighs,
                ..Counters::default()
            };
            let report = ShimReport {
                counters: vec![(id, counters)],
                ..ShimReport::default()
            };
            table.report(&report, Timestamp::default());
            unmovable.look(&table, Weight::Streams, 140.0);
            assert_eq!(unmovable.load(), counts, "{weighs}");
        }
    }
}
