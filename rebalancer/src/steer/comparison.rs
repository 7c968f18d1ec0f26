//! The agent's table beside the probe's counts: what one has that the other does not.
//!
//! Input: the table, between two turns of the agent's loop. Output: values; nothing is copied but what differs.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::SocketAddr,
};

use rebalancer_core::{
    ids::{ConnectionId, Protocol},
    shim::{ConnectionState, Counters, ShimConnection},
    table::ConnectionTable,
};

/// A handshake and what keeps a connection alive is not more, in octets from the client.
const HANDSHAKE: u64 = 16 * 1024;

/// What an order needs to know of one of its connections.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    pub client: SocketAddr,
    pub state: ConnectionState,
    /// Another connection has the address too: a client may use one for two addresses of this node, or in two zones.
    pub is_ambiguous: bool,
}

/// What a comparison of the probe's counts with the agent's table finds.
#[derive(Debug, Default)]
pub struct Seen {
    pub connections: Vec<ShimConnection>,
    pub counters: Vec<(ConnectionId, Counters)>,
    /// Counted addresses that no connection of the table has.
    pub strangers: Vec<SocketAddr>,
    /// Marked connections whose address another one has as well by now.
    pub shared: Vec<ConnectionId>,
    /// Octets from clients beyond a handshake, of all connections that are not known to be HTTP/1.1.
    pub octets: u64,
}

/// What an order needs to know of its connections.
pub fn candidates(table: &ConnectionTable, ids: &[ConnectionId]) -> BTreeMap<ConnectionId, Candidate> {
    let mut found = BTreeMap::new();
    let mut addresses: HashMap<SocketAddr, usize> = HashMap::new();
    for id in ids {
        if let Some(connection) = table.connection(*id) {
            let victim = Candidate {
                client: connection.client(),
                state: connection.state,
                is_ambiguous: false,
            };
            found.insert(*id, victim);
            addresses.insert(victim.client, 0);
        }
    }
    for connection in table.scan() {
        if let Some(count) = addresses.get_mut(&connection.client()) {
            *count += 1;
        }
    }
    for victim in found.values_mut() {
        victim.is_ambiguous = addresses.get(&victim.client).is_some_and(|count| *count > 1);
    }
    found
}

/// What the table does not know yet, or not any more: it may have been made anew.
pub fn compared(
    table: &ConnectionTable,
    counted: &HashMap<SocketAddr, u64>,
    marked: &HashMap<SocketAddr, ConnectionId>,
    told: &BTreeSet<ConnectionId>,
) -> Seen {
    let mut seen = Seen::default();
    let mut known = HashSet::with_capacity(counted.len());
    for (id, connection) in table.iter() {
        let client = connection.client();
        if let Some(other) = marked.get(&client)
            && *other != id
        {
            seen.shared.push(*other);
        }
        if connection.protocol != Protocol::Http1 {
            seen.octets += connection.counters.bytes_in.saturating_sub(HANDSHAKE);
        }
        let requests = counted.get(&client).copied().unwrap_or_default();
        if requests > 0 {
            known.insert(client);
        }
        let told = told.contains(&id);
        let counters = Counters {
            requests,
            ..connection.counters
        };
        let is_news = (requests > 0 && connection.protocol != Protocol::H2Selected)
            || (told && connection.state != ConnectionState::Draining);
        if is_news {
            seen.connections.push(ShimConnection {
                id,
                client,
                local: connection.local(),
                // The apiserver asks for HTTP/2 only.
                protocol: if requests > 0 {
                    Protocol::H2Selected
                } else {
                    connection.protocol
                },
                age: None,
                can_be_told: requests > 0 || connection.protocol != Protocol::Http1,
                state: if told {
                    ConnectionState::Draining
                } else {
                    connection.state
                },
                user: None,
                user_agent: None,
                counters,
            });
        } else if requests != connection.counters.requests {
            seen.counters.push((id, counters));
        }
    }
    let strangers = counted.keys().filter(|client| !known.contains(*client));
    seen.strangers = strangers.copied().collect();
    seen
}

#[cfg(test)]
mod tests {
    use rebalancer_core::{
        ids::Timestamp,
        observation::{Observation, Socket},
        shim::ShimReport,
    };

    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    /// Connections by number, with a client's address and octets each.
    fn table(connections: &[(u64, &str, u64)]) -> ConnectionTable {
        let mut table = ConnectionTable::default();
        let socket = |(id, client, bytes_in): &(u64, &str, u64)| Socket {
            id: ConnectionId(*id),
            // A node may have several addresses.
            local: at(&format!("10.0.1.{id}:6443")),
            remote: at(client),
            bytes_in: *bytes_in,
            bytes_out: 0,
            start: 0,
        };
        let resync = Observation::Resync {
            sockets: connections.iter().map(socket).collect(),
            listener: Some(ConnectionId(99)),
        };
        table.observe(resync, Timestamp::from_millis(0));
        table
    }

    #[test]
    fn an_address_of_two_connections_is_ambiguous() {
        let table = table(&[
            (1, "10.0.0.1:5000", 0),
            (2, "10.0.0.1:5001", 0),
            (3, "10.0.0.1:5000", 0),
        ]);
        let found = candidates(&table, &[1, 2, 4].map(ConnectionId));
        let ambiguous: Vec<_> = found.iter().map(|(id, victim)| (id.0, victim.is_ambiguous)).collect();
        assert_eq!(ambiguous, [(1, true), (2, false)]);
    }

    #[test]
    fn what_the_table_does_not_know_is_told_once() {
        let mut table = table(&[
            (1, "10.0.0.1:5000", 20_000),
            (2, "10.0.0.2:5000", 100),
            (3, "10.0.0.3:5000", 0),
        ]);
        let counted = HashMap::from([
            (at("10.0.0.1:5000"), 7),
            (at("10.0.0.2:5000"), 1),
            (at("10.0.0.9:1"), 4),
        ]);
        let told = BTreeSet::from([ConnectionId(2)]);
        // The mark of a connection whose address has gone to another one.
        let marked = HashMap::from([
            (at("10.0.0.3:5000"), ConnectionId(8)),
            (at("10.0.0.2:5000"), ConnectionId(2)),
        ]);
        let seen = compared(&table, &counted, &marked, &told);
        let news: Vec<_> = seen
            .connections
            .iter()
            .map(|news| (news.id.0, news.counters.requests, news.state))
            .collect();
        assert_eq!(
            news,
            [(1, 7, ConnectionState::Active), (2, 1, ConnectionState::Draining)]
        );
        assert!(
            seen.connections
                .iter()
                .all(|news| news.protocol == Protocol::H2Selected)
        );
        assert!(seen.counters.is_empty());
        assert_eq!(seen.strangers, [at("10.0.0.9:1")]);
        assert_eq!(seen.shared, [ConnectionId(8)]);
        // What is beyond a handshake.
        assert_eq!(seen.octets, 20_000 - HANDSHAKE);

        let report = ShimReport {
            instance: "steer-1".to_owned(),
            connections: seen.connections,
            ..ShimReport::default()
        };
        table.report(&report, rebalancer_core::ids::Timestamp::default());
        let mut counted = counted;
        let again = compared(&table, &counted, &marked, &told);
        assert!(again.connections.is_empty() && again.counters.is_empty(), "{again:?}");
        counted.insert(at("10.0.0.1:5000"), 9);
        let more = compared(&table, &counted, &marked, &told);
        assert_eq!(
            more.counters
                .iter()
                .map(|(id, counters)| (id.0, counters.requests))
                .collect::<Vec<_>>(),
            [(1, 9)]
        );
    }
}
