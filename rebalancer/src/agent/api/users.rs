//! Who connects, summed by user: a flood is many equal rows of one list, and one row of this one.
//!
//! Input: connections. Output: the users with the most of what is asked for.
//! Must never show a number that the connections do not add up to; those of whom no user is known are one row.

use std::{cmp::Reverse, collections::BTreeMap};

use rebalancer_core::table::Connection;
use serde_json::{Value, json};

use crate::agent::wire::rounded;

/// One user's connections together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Sum {
    connections: u64,
    requests: u64,
    open_streams: u64,
    open_watches: u64,
    bytes: u64,
    requests_per_second: f64,
    bytes_per_second: f64,
}

impl Sum {
    fn add(&mut self, connection: &Connection) {
        let counters = &connection.counters;
        self.connections += 1;
        self.requests += counters.requests;
        self.open_streams += u64::from(counters.open_streams);
        self.open_watches += u64::from(counters.open_watches);
        self.bytes += counters.bytes_in + counters.bytes_out;
        self.requests_per_second += connection.rates.requests;
        self.bytes_per_second += connection.rates.bytes;
    }

    /// What users are sorted by: by age there is no order of users, so they are by connections then.
    fn key(&self, sort: &str) -> u64 {
        match sort {
            "requests" => self.requests,
            "streams" => self.open_streams,
            "watches" => self.open_watches,
            "bytes" => self.bytes,
            _ => self.connections,
        }
    }
}

/// The first `limit` users, and how many there are.
pub(super) fn by_user<'a>(connections: impl Iterator<Item = &'a Connection>, sort: &str, limit: usize) -> Value {
    let mut sums: BTreeMap<Option<&str>, Sum> = BTreeMap::new();
    for connection in connections {
        sums.entry(connection.user()).or_default().add(connection);
    }
    let users = sums.len();
    let mut sums: Vec<_> = sums.into_iter().collect();
    sums.sort_by_key(|(user, sum)| (Reverse(sum.key(sort)), *user));
    sums.truncate(limit);
    let row = |(user, sum): &(Option<&str>, Sum)| {
        json!({
            "user": user,
            "connections": sum.connections,
            "requests": sum.requests,
            "open_streams": sum.open_streams,
            "open_watches": sum.open_watches,
            "bytes": sum.bytes,
            "requests_per_second": rounded(sum.requests_per_second),
            "bytes_per_second": rounded(sum.bytes_per_second),
        })
    };
    json!({"total": users, "users": sums.iter().map(row).collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use rebalancer_core::{
        ids::{ConnectionId, Protocol, Timestamp},
        observation::{Observation, Socket},
        shim::{ConnectionState, Counters, ShimConnection, ShimReport},
        table::ConnectionTable,
    };

    use super::*;

    /// Sixty clients of one user who LIST, among others who ask more often.
    #[test]
    fn a_flood_is_one_row() {
        let mut table = ConnectionTable::default();
        let socket = |id: u64| Socket {
            id: ConnectionId(id),
            local: "10.0.0.1:6443".parse().expect("an address"),
            remote: format!("10.1.0.1:{}", 1_000 + id).parse().expect("an address"),
            bytes_in: 0,
            bytes_out: 0,
            start: 0,
        };
        let sockets = (0..100).map(socket).collect();
        let listener = None;
        table.observe(Observation::Resync { sockets, listener }, Timestamp::default());
        let shown = |id: u64| ShimConnection {
            id: ConnectionId(id),
            client: socket(id).remote,
            local: socket(id).local,
            protocol: Protocol::H2Selected,
            can_be_told: true,
            state: ConnectionState::Active,
            age: None,
            user: (id < 90).then(|| {
                if id < 60 {
                    "lister".to_owned()
                } else {
                    format!("node-{id}")
                }
            }),
            user_agent: None,
            counters: Counters {
                requests: if id < 60 { 1 } else { 1_000 },
                open_streams: 1,
                open_watches: u32::from(id >= 60),
                bytes_in: 100,
                bytes_out: if id < 60 { 5_000_000 } else { 1_000 },
            },
        };
        let connections = (0..100).map(shown).collect();
        table.report(
            &ShimReport {
                connections,
                ..ShimReport::default()
            },
            Timestamp::default(),
        );
        for (sort, first, figure, expected) in [
            ("bytes", json!("lister"), "bytes", 60 * 5_000_100_u64),
            ("streams", json!("lister"), "open_streams", 60),
            ("age", json!("lister"), "connections", 60),
            // Of whom no user is known are ten.
            ("requests", Value::Null, "requests", 10_000),
            ("watches", Value::Null, "open_watches", 10),
        ] {
            let answer = by_user(table.scan(), sort, 3);
            assert_eq!(answer["total"], 32, "{sort}");
            assert_eq!(answer["users"].as_array().map(Vec::len), Some(3), "{sort}");
            assert_eq!(answer["users"][0]["user"], first, "{sort}");
            assert_eq!(answer["users"][0][figure], expected, "{sort}");
        }
    }
}
