//! Who asks for what: figures by user, user agent and flow, over all connections.
//!
//! Job: sum what answers named of each connection, also of those that ended. Output: the rows of `GET /v1/flows`.
//! Must never hold more than [`ENDED`] rows of connections that ended, nor name a user that no accepted certificate names.

use std::collections::HashMap;

use rebalancer_core::wire::flow::{Figures, Flow, Flows as CoreFlows};

use super::{Connection, Registry};
use crate::shim::wire::{FlowFigures, FlowRow, Flows};

/// How many rows are kept of connections that have ended, at most; when there are more, half of them stay, by each measure
/// in turn ([`leading`]), and the rest is summed without names.
const ENDED: usize = 1_024;

/// How many octets the rows of an answer take, about: some 7,000 rows of users and user agents as they are.
const SHOWN: usize = 2 << 20;

/// What a row takes beside its names, written as JSON.
const ROW: usize = 240;

/// Octets kept of a user's name.
const USER: usize = 1_024;

/// Whose requests, and of which flow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Key {
    user: Option<Box<str>>,
    user_agent: Option<Box<str>>,
    flow: Option<Flow>,
}

impl Key {
    /// What its row takes in an answer, about: a name is written twice as long at most, but for one of control characters.
    fn length(&self) -> usize {
        let names = [&self.user, &self.user_agent];
        ROW + names.into_iter().flatten().map(|name| name.len()).sum::<usize>()
    }
}

/// A sum, and of how many open connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sum {
    connections: u64,
    figures: Figures,
}

impl Sum {
    fn add(&mut self, other: &Self) {
        self.connections += other.connections;
        self.figures.add(&other.figures);
    }

    /// Without what is over when a connection is.
    fn ended(self) -> Self {
        let figures = Figures {
            open: 0,
            watches: 0,
            ..self.figures
        };
        Self {
            connections: 0,
            figures,
        }
    }
}

/// What connections came to that have ended.
#[derive(Debug, Default)]
pub(super) struct Ended {
    rows: HashMap<Key, Sum>,
    /// Of those for which there was no place.
    others: Sum,
    /// Answers of flows that a connection had no place for.
    unplaced: u64,
}

impl Ended {
    /// A connection is over.
    pub(super) fn add(&mut self, connection: &Connection) {
        self.unplaced += connection.look_at_flows(CoreFlows::unplaced).unwrap_or_default();
        for (key, sum) in rows(connection) {
            self.rows.entry(key).or_default().add(&sum.ended());
            if self.rows.len() > ENDED {
                self.make_room();
            }
        }
        debug_assert!(self.rows.len() <= ENDED);
    }

    /// Whoever comes under a new name each time has little of anything under each.
    fn make_room(&mut self) {
        let mut left = ENDED / 2;
        let (kept, rest) = leading(self.rows.drain().collect(), |_| {
            left = left.saturating_sub(1);
            left > 0
        });
        rest.iter().for_each(|(_, sum)| self.others.add(sum));
        self.rows = kept.into_iter().collect();
    }
}

/// Rows in some order.
type Rows = Vec<(Key, Sum)>;

/// Rows until there is no room for the next one, and the rest. By each measure in turn the heaviest is next: who is refused
/// everything has no octets, and a slow reader's are still to come.
fn leading(rows: Rows, mut has_room: impl FnMut(&Key) -> bool) -> (Rows, Rows) {
    let measures: [fn(&Figures) -> u64; 4] = [
        |figures| figures.octets,
        |figures| figures.refused,
        |figures| u64::from(figures.open.saturating_sub(figures.watches)),
        |figures| figures.requests,
    ];
    let orders = measures.map(|measure| {
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_unstable_by(|a, b| {
            let ((key_a, sum_a), (key_b, sum_b)) = (&rows[*a], &rows[*b]);
            let sizes = (measure(&sum_a.figures), measure(&sum_b.figures));
            sizes.1.cmp(&sizes.0).then_with(|| key_a.cmp(key_b))
        });
        order
    });
    let mut is_kept = vec![false; rows.len()];
    let turns = (0..rows.len()).flat_map(|rank| orders.iter().map(move |order| order[rank]));
    for index in turns {
        if !is_kept[index] {
            if !has_room(&rows[index].0) {
                break;
            }
            is_kept[index] = true;
        }
    }
    let mut is_kept = is_kept.into_iter();
    rows.into_iter().partition(|_| is_kept.next().unwrap_or_default())
}

/// A connection's rows; one that has asked for nothing has none.
fn rows(connection: &Connection) -> Vec<(Key, Sum)> {
    let (user, user_agent) = connection.names();
    let cut = |name: Box<str>| -> Box<str> { name[..name.floor_char_boundary(USER)].into() };
    let key = Key {
        user: user.map(cut),
        user_agent,
        flow: None,
    };
    let rows = connection.look_at_flows(|flows| {
        let asked = flows.iter().filter(|(_, figures)| **figures != Figures::default());
        asked
            .map(|(flow, figures)| {
                let sum = Sum {
                    connections: 1,
                    figures: *figures,
                };
                (Key { flow, ..key.clone() }, sum)
            })
            .collect()
    });
    rows.unwrap_or_default()
}

impl Registry {
    /// Figures by user, user agent and flow since the relay began, those with the most octets first.
    pub fn flows(&self) -> Flows {
        let (open, mut sums, mut others, mut unplaced) = {
            let inner = self.inner();
            let open: Vec<_> = inner.open.values().cloned().collect();
            let ended = &inner.ended_flows;
            (open, ended.rows.clone(), ended.others, ended.unplaced)
        };
        for connection in &open {
            unplaced += connection.look_at_flows(CoreFlows::unplaced).unwrap_or_default();
            for (key, sum) in rows(connection) {
                sums.entry(key).or_default().add(&sum);
            }
        }
        let mut room = SHOWN;
        let (mut sums, rest) = leading(sums.into_iter().collect(), |key| match room.checked_sub(key.length()) {
            Some(left) => {
                room = left;
                true
            }
            None => false,
        });
        sums.sort_unstable_by(|(a, one), (b, other)| {
            (other.figures.octets, other.figures.requests)
                .cmp(&(one.figures.octets, one.figures.requests))
                .then_with(|| a.cmp(b))
        });
        rest.iter().for_each(|(_, sum)| others.add(sum));
        Flows {
            instance: self.instance.clone(),
            rows: sums.into_iter().map(|(key, sum)| row(key, &sum)).collect(),
            cut: !rest.is_empty(),
            others: shown(&others),
            unplaced_total: unplaced,
        }
    }
}

fn row(key: Key, sum: &Sum) -> FlowRow {
    FlowRow {
        user: key.user.map(String::from),
        user_agent: key.user_agent.map(String::from),
        flow_schema: key.flow.map(|flow| flow.schema.to_string()),
        priority_level: key.flow.map(|flow| flow.level.to_string()),
        figures: shown(sum),
    }
}

fn shown(sum: &Sum) -> FlowFigures {
    let Figures {
        requests,
        octets,
        refused,
        open,
        watches,
    } = sum.figures;
    FlowFigures {
        connections: sum.connections,
        requests,
        bytes: octets,
        refused,
        open_streams: u64::from(open),
        open_watches: u64::from(watches),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rebalancer_core::wire::flow::Uid;

    use super::*;
    use crate::shim::wire::Protocol;

    fn flow(number: u32) -> Flow {
        let uid = |begin: u32| Uid::parse(format!("{begin:08x}-0000-0000-0000-{number:012x}").as_bytes());
        Flow {
            schema: uid(1).expect("a UUID"),
            level: uid(2).expect("a UUID"),
        }
    }

    fn open(registry: &Arc<Registry>, id: u64, user: Option<&str>) -> Arc<Connection> {
        let address = "192.0.2.1:1".parse().expect("an address");
        let connection = registry.open(id, address, address);
        connection.established(Protocol::Http1, user);
        connection
    }

    fn ask(connection: &Connection, flow: Option<Flow>, refused: bool, octets: u64) {
        connection.begin_request(false);
        let slot = connection.begin_answer(flow, refused);
        connection.with_flows(|flows| flows.add_octets(slot, octets));
        connection.end_request();
    }

    #[test]
    fn figures_are_by_user_and_flow_and_outlive_connections() {
        let registry = Registry::new("x".into());
        let (one, two) = (open(&registry, 1, Some("flood")), open(&registry, 2, Some("flood")));
        ask(&one, Some(flow(1)), false, 100);
        ask(&two, Some(flow(1)), true, 10);
        ask(&two, Some(flow(2)), false, 1);
        let nobody = open(&registry, 3, None);
        nobody.set_user_agent("kubectl/v1.36");
        ask(&nobody, Some(flow(1)), false, 50);
        let rows = |registry: &Registry| -> Vec<_> {
            let flows = registry.flows();
            let row = |row: FlowRow| (row.user, row.user_agent, row.flow_schema, row.figures);
            flows.rows.into_iter().map(row).collect()
        };
        let figures = |connections, requests, bytes, refused| FlowFigures {
            connections,
            requests,
            bytes,
            refused,
            open_streams: 0,
            open_watches: 0,
        };
        let schema = |number| Some(flow(number).schema.to_string());
        let kubectl = Some("kubectl/v1.36".to_owned());
        let user = Some("flood".to_owned());
        assert_eq!(
            rows(&registry),
            [
                (user.clone(), None, schema(1), figures(2, 2, 110, 1)),
                (None, kubectl.clone(), schema(1), figures(1, 1, 50, 0)),
                (user.clone(), None, schema(2), figures(1, 1, 1, 0)),
            ]
        );
        one.close("test");
        two.close("test");
        assert_eq!(
            rows(&registry),
            [
                (user.clone(), None, schema(1), figures(0, 2, 110, 1)),
                (None, kubectl, schema(1), figures(1, 1, 50, 0)),
                (user, None, schema(2), figures(0, 1, 1, 0)),
            ]
        );
    }

    #[test]
    fn strangers_who_call_themselves_something_else_each_time_take_a_bounded_place() {
        let registry = Registry::new("x".into());
        let flood = open(&registry, 9_000, Some("flood"));
        ask(&flood, Some(flow(1)), false, 1_000);
        flood.close("test");
        for id in 0..3_000 {
            let connection = open(&registry, id, None);
            connection.set_user_agent(&format!("agent-{id}"));
            ask(&connection, Some(flow(1)), false, 1);
            connection.close("test");
        }
        let flows = registry.flows();
        assert!(flows.rows.len() <= ENDED);
        assert_eq!(flows.others.requests + flows.rows.len() as u64, 3_001);
        assert_eq!(flows.others.bytes, flows.others.requests);
        assert_eq!(
            flows.rows[0].user.as_deref(),
            Some("flood"),
            "who had most is named still"
        );
    }

    #[test]
    fn who_is_refused_everything_is_named_whoever_else_there_is_and_so_is_who_reads_nothing() {
        for ends in [true, false] {
            let registry = Registry::new("x".into());
            let long = "x".repeat(USER - 5);
            for id in 0..4_000 {
                let connection = open(&registry, id, Some(&format!("{long}{id:05}")));
                ask(&connection, Some(flow(1)), false, 1_000_000);
                if ends {
                    connection.close("test");
                }
            }
            let refused = open(&registry, 9_000, Some("refused"));
            (0..50).for_each(|_| ask(&refused, Some(flow(1)), true, 10));
            let slow = open(&registry, 9_001, Some("slow"));
            slow.begin_request(false);
            slow.begin_answer(Some(flow(1)), false);
            if ends {
                refused.close("test");
                for id in 10_000..12_000 {
                    let connection = open(&registry, id, Some(&format!("{long}{id:05}")));
                    ask(&connection, Some(flow(1)), false, 1_000_000);
                    connection.close("test");
                }
            }
            let flows = registry.flows();
            for user in ["refused", "slow"] {
                assert!(
                    flows.rows.iter().any(|row| row.user.as_deref() == Some(user)),
                    "{user} {ends}"
                );
            }
            assert_eq!(flows.cut, !ends, "{}", flows.rows.len());
            let written = serde_json::to_string(&flows).expect("JSON").len();
            assert!(written < SHOWN + SHOWN / 4, "{written}");
        }
    }

    #[test]
    fn watches_are_counted_apart() {
        let registry = Registry::new("x".into());
        let connection = open(&registry, 1, Some("a"));
        connection.begin_request(true);
        let open = || {
            let rows = registry.flows().rows;
            rows.iter()
                .map(|row| (row.figures.open_streams, row.figures.open_watches))
                .collect::<Vec<_>>()
        };
        assert_eq!(open(), [(1, 1)]);
        connection.begin_answer(Some(flow(1)), false);
        assert_eq!(open(), [(1, 1)]);
        connection.end_request();
        assert_eq!(open(), [(0, 0)]);
    }
}
