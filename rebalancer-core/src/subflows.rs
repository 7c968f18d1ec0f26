//! MPTCP: a client's subflows are sockets of their own, and one connection.
//!
//! Input: sockets that opened and closed, and lists of them, with the token of the MPTCP connection each is of (RFC 8684,
//! section 3.2). Output: the same of connections, each by the name of the socket it was first seen as.
//! Must never end a connection while one of its subflows is left, whichever came first.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::{ids::ConnectionId, observation::Socket};

/// A socket, and which MPTCP connection it is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subflow {
    /// The socket itself.
    pub socket: Socket,
    /// The token of the MPTCP connection, which no two have at once; 0 where it is plain TCP.
    pub token: u32,
    /// Whether it joined others.
    pub joined: bool,
}

/// One MPTCP connection.
#[derive(Clone, Debug)]
struct Group {
    /// The socket by which the connection is known, which may be gone.
    name: ConnectionId,
    /// Whether it was told of. Where only subflows that joined are seen, the first is about to be: a list is no instant, and
    /// may lack it; and its client goes by the address that it came from.
    is_told: bool,
    subflows: BTreeSet<ConnectionId>,
}

/// The MPTCP connections; plain TCP passes through and takes no room.
#[derive(Clone, Debug, Default)]
pub struct Subflows {
    groups: BTreeMap<u32, Group>,
    /// Of which connection a subflow is.
    of: HashMap<ConnectionId, u32>,
    /// Which connection goes by that name.
    named: HashMap<ConnectionId, u32>,
}

impl Subflows {
    /// A socket opened: the connection it is, or `None` when it is one more subflow of a connection that is there, or of one
    /// whose first is not seen yet. A list that was read before this event was taken may have had it: it is told all the same.
    pub fn opened(&mut self, subflow: Subflow) -> Option<Socket> {
        let is_its_name = |group: &Group| group.is_told && group.name == subflow.socket.id;
        let is_told =
            subflow.token == 0 || self.add(&subflow) || self.groups.get(&subflow.token).is_some_and(is_its_name);
        is_told.then_some(subflow.socket)
    }

    /// A socket closed: the connection that ended with it, if one did.
    pub fn closed(&mut self, id: ConnectionId) -> Option<ConnectionId> {
        let Some(token) = self.of.remove(&id) else {
            // Its connection lives on by other subflows, unless there is none of that name.
            return (!self.named.contains_key(&id)).then_some(id);
        };
        let group = self.groups.get_mut(&token)?;
        group.subflows.remove(&id);
        if !group.subflows.is_empty() {
            return None;
        }
        let Group { name, is_told, .. } = *group;
        self.groups.remove(&token);
        self.named.remove(&name);
        is_told.then_some(name)
    }

    /// A list of sockets, as a list of connections. What a `complete` one lacks is gone; another may lack what closes
    /// meanwhile. What happened before the list was begun is told by then: a connection whose first subflow is missing here as
    /// well lives on by those that joined it.
    pub fn listed(&mut self, mut subflows: Vec<Subflow>, complete: bool) -> Vec<Socket> {
        if complete {
            let listed: HashSet<ConnectionId> = subflows.iter().map(|subflow| subflow.socket.id).collect();
            let gone: Vec<ConnectionId> = self.of.keys().filter(|id| !listed.contains(id)).copied().collect();
            for id in gone {
                self.closed(id);
            }
        }
        let waited: HashSet<u32> = self.waiting().collect();
        // A connection that is new goes by its first subflow's name.
        subflows.sort_by_key(|subflow| subflow.joined);
        let mut places: HashMap<u32, usize> = HashMap::new();
        let mut connections: Vec<Socket> = Vec::with_capacity(subflows.len());
        for subflow in subflows {
            if subflow.token == 0 {
                connections.push(subflow.socket);
                continue;
            }
            self.add(&subflow);
            let Subflow { mut socket, token, .. } = subflow;
            let Some(group) = self.groups.get_mut(&token) else {
                continue;
            };
            group.is_told |= waited.contains(&token);
            if !group.is_told {
                continue;
            }
            match places.get(&token).and_then(|place| connections.get_mut(*place)) {
                Some(connection) => {
                    connection.bytes_in += socket.bytes_in;
                    connection.bytes_out += socket.bytes_out;
                }
                None => {
                    places.insert(token, connections.len());
                    socket.id = group.name;
                    connections.push(socket);
                }
            }
        }
        connections
    }

    /// The connections that are not told of: no first subflow of theirs was seen.
    fn waiting(&self) -> impl Iterator<Item = u32> {
        self.groups
            .iter()
            .filter(|(_, group)| !group.is_told)
            .map(|(token, _)| *token)
    }

    /// One more subflow: whether the connection is to be told of now, by this one.
    fn add(&mut self, subflow: &Subflow) -> bool {
        let id = subflow.socket.id;
        let token = subflow.token;
        let group = self.groups.entry(token).or_insert_with(|| {
            self.named.insert(id, token);
            Group {
                name: id,
                is_told: false,
                subflows: BTreeSet::new(),
            }
        });
        group.subflows.insert(id);
        self.of.insert(id, token);
        let is_first = !group.is_told && !subflow.joined;
        if is_first {
            self.named.remove(&group.name);
            self.named.insert(id, token);
            (group.name, group.is_told) = (id, true);
        }
        debug_assert!(self.of.len() >= self.groups.len() && self.named.len() == self.groups.len());
        is_first
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn subflow(id: u64, token: u32, joined: bool) -> Subflow {
        Subflow {
            socket: Socket {
                id: ConnectionId(id),
                local: "10.0.0.1:6443".parse().expect("an address"),
                remote: format!("10.1.0.1:{}", 1_000 + id).parse().expect("an address"),
                bytes_in: 10,
                bytes_out: 20,
                start: 0,
            },
            token,
            joined,
        }
    }

    fn ids(sockets: &[Socket]) -> Vec<u64> {
        sockets.iter().map(|socket| socket.id.0).collect()
    }

    #[test]
    fn a_connection_ends_with_its_last_subflow() {
        let mut subflows = Subflows::default();
        assert!(subflows.opened(subflow(1, 7, false)).is_some());
        assert!(subflows.opened(subflow(2, 7, true)).is_none());
        assert!(subflows.opened(subflow(3, 0, false)).is_some());
        assert_eq!(subflows.closed(ConnectionId(1)), None, "the second is left");
        assert_eq!(subflows.closed(ConnectionId(1)), None, "told twice");
        assert!(subflows.opened(subflow(4, 7, true)).is_none());
        assert_eq!(subflows.closed(ConnectionId(2)), None);
        let listed = subflows.listed(vec![subflow(4, 7, true), subflow(3, 0, false)], false);
        assert_eq!(ids(&listed), [3, 1], "it keeps its name");
        assert_eq!(subflows.closed(ConnectionId(4)), Some(ConnectionId(1)));
        assert_eq!(subflows.closed(ConnectionId(3)), Some(ConnectionId(3)));
        assert!(subflows.groups.is_empty() && subflows.of.is_empty() && subflows.named.is_empty());
    }

    #[test]
    fn a_list_names_by_the_first_and_adds_up() {
        let mut subflows = Subflows::default();
        let listed = subflows.listed(
            vec![subflow(2, 7, true), subflow(1, 7, false), subflow(9, 8, false)],
            true,
        );
        assert_eq!(ids(&listed), [1, 9]);
        assert_eq!((listed[0].bytes_in, listed[0].bytes_out), (20, 40));
        // A list beside events may lack what is closing; a complete one is the truth.
        assert_eq!(ids(&subflows.listed(vec![subflow(2, 7, true)], false)), [1]);
        assert_eq!(subflows.of.len(), 3);
        assert_eq!(ids(&subflows.listed(vec![subflow(2, 7, true)], true)), [1]);
        assert_eq!((subflows.of.len(), subflows.groups.len()), (1, 1));
        assert_eq!(
            subflows.closed(ConnectionId(1)),
            None,
            "known as that, and alive by another"
        );
        assert_eq!(subflows.closed(ConnectionId(2)), Some(ConnectionId(1)));
    }

    #[test]
    fn a_connection_that_a_list_had_before_its_event_is_told_by_the_event() {
        let mut subflows = Subflows::default();
        assert_eq!(ids(&subflows.listed(vec![subflow(1, 7, false)], false)), [1]);
        assert!(
            subflows.opened(subflow(1, 7, false)).is_some(),
            "the list was only a look beside the events"
        );
        assert!(subflows.opened(subflow(2, 7, true)).is_none());
    }

    /// The list is read bucket by bucket: it may have a subflow that joined while it was read and not the first.
    #[test]
    fn a_subflow_that_joined_waits_for_its_first() {
        for complete in [false, true] {
            // The event of the first comes after the list.
            let mut subflows = Subflows::default();
            assert_eq!(ids(&subflows.listed(vec![subflow(2, 7, true)], complete)), []);
            let first = subflows.opened(subflow(1, 7, false)).expect("it is told now");
            assert_eq!(first.remote.port(), 1_001);
            assert!(subflows.opened(subflow(2, 7, true)).is_none());
            let both = vec![subflow(2, 7, true), subflow(1, 7, false)];
            assert_eq!(ids(&subflows.listed(both.clone(), complete)), [1]);
            assert_eq!(subflows.closed(ConnectionId(1)), None);
            assert_eq!(subflows.closed(ConnectionId(2)), Some(ConnectionId(1)));
            // It was there before events were told, and the next list has it.
            assert!(subflows.opened(subflow(2, 7, true)).is_none());
            assert_eq!(ids(&subflows.listed(both, complete)), [1]);
            // It is gone for good: the connection lives by the one that joined.
            let mut subflows = Subflows::default();
            assert!(subflows.opened(subflow(3, 7, true)).is_none());
            let listed = subflows.listed(vec![subflow(3, 7, true), subflow(4, 7, true)], complete);
            assert_eq!(ids(&listed), [3]);
            assert_eq!(listed[0].bytes_in, 20);
            assert_eq!(subflows.closed(ConnectionId(3)), None);
            assert_eq!(subflows.closed(ConnectionId(4)), Some(ConnectionId(3)));
            // It came and went before anybody knew whose it was.
            assert!(subflows.opened(subflow(5, 7, true)).is_none());
            assert_eq!(subflows.closed(ConnectionId(5)), None);
            assert!(subflows.groups.is_empty() && subflows.of.is_empty() && subflows.named.is_empty());
        }
    }

    proptest! {
        /// Whatever order they come and go in: there is a connection as long as one of its sockets is open.
        #[test]
        fn connections_are_there_while_a_subflow_is(steps in prop::collection::vec((0_u32..4, any::<bool>(), 0_usize..8), 0..80)) {
            let mut subflows = Subflows::default();
            let mut open: Vec<(u64, u32)> = Vec::new();
            let mut told: BTreeSet<u64> = BTreeSet::new();
            for (next, (token, opens, which)) in steps.into_iter().enumerate() {
                let next = next as u64 + 1;
                if opens {
                    let joined = open.iter().any(|(_, other)| *other == token);
                    open.push((next, token));
                    if let Some(socket) = subflows.opened(subflow(next, token, joined)) {
                        prop_assert!(told.insert(socket.id.0));
                    }
                } else if !open.is_empty() {
                    let (id, _) = open.swap_remove(which % open.len());
                    if let Some(ended) = subflows.closed(ConnectionId(id)) {
                        prop_assert!(told.remove(&ended.0));
                    }
                }
                let tokens: BTreeSet<u32> = open.iter().map(|(_, token)| *token).filter(|token| *token != 0).collect();
                let plain = open.iter().filter(|(_, token)| *token == 0).count();
                prop_assert_eq!(told.len(), plain + tokens.len());
                let list = open.iter().map(|(id, token)| subflow(*id, *token, false)).collect();
                let listed: BTreeSet<u64> = subflows.listed(list, next.is_multiple_of(2)).iter().map(|socket| socket.id.0).collect();
                prop_assert_eq!(&listed, &told);
            }
        }
    }
}
