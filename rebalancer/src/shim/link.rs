//! The agent's end of a shim's control socket.
//!
//! Job: ask once a second what changed, carry orders over, and follow what was answered `pending`.
//! Output: the core's inputs; every victim of an order gets exactly one final result.
//! Must never send an order twice by itself: an order whose answer was lost is reported as failed. Must never believe a
//! result for a connection that was not named, nor keep more of a client's words than it needs.

use std::{collections::BTreeMap, io, path::PathBuf, time::Duration};

use rebalancer_core::{
    agent::Input,
    ids::{ConnectionId, Protocol},
    release::Release,
    shim::{Abilities, ConnectionState, Counters, GoawayOrder, GoawayResult, ShimConnection, ShimReport},
};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, error::Elapsed, interval},
};

use super::wire;
use crate::local::client;

/// How often the shim is asked.
const POLL: Duration = Duration::from_secs(1);

/// How long after an order's expiry a result may still come.
const GRACE: Duration = Duration::from_secs(5);

/// Octets kept of a user agent: enough to tell programs apart; a client may send a megabyte.
const USER_AGENT: usize = 256;

/// Octets kept of a user name.
const USER: usize = 1_024;

/// Follows one shim until nobody listens to what it says. It is the front door where all clients come through it, also when it
/// does not answer.
pub async fn run(
    socket: PathBuf,
    is_front_door: bool,
    mut orders: mpsc::Receiver<GoawayOrder>,
    inputs: mpsc::Sender<Input>,
) {
    let mut ticks = interval(POLL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut link = Link::new(socket, is_front_door);
    loop {
        let said = tokio::select! {
            _ = ticks.tick() => link.look().await,
            order = orders.recv() => match order {
                None => return,
                Some(order) => vec![link.carry_out(order).await],
            },
        };
        for input in said {
            if inputs.send(input).await.is_err() {
                return;
            }
        }
    }
}

/// Whether somebody listens there and does not get to it: the kernel takes connections for it until its queue is full. One that
/// is not there, or answers what cannot be read, does not stand still.
fn stands_still(error: &anyhow::Error) -> bool {
    let is_full = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
    error.is::<Elapsed>() || error.downcast_ref().is_some_and(is_full)
}

/// A victim whose GOAWAY goes out at its next request.
struct Pending {
    generation: u64,
    /// When it is given up.
    until: Instant,
}

struct Link {
    socket: PathBuf,
    is_front_door: bool,
    since: String,
    pending: BTreeMap<ConnectionId, Pending>,
    /// Where in the shim's outcomes to go on, and of which process that is.
    next_outcome: (String, u64),
}

impl Link {
    fn new(socket: PathBuf, is_front_door: bool) -> Self {
        Self {
            socket,
            is_front_door,
            since: String::new(),
            pending: BTreeMap::new(),
            next_outcome: (String::new(), 0),
        }
    }

    /// What became of those who are pending, and what changed.
    async fn look(&mut self) -> Vec<Input> {
        let mut said = Vec::new();
        if !self.pending.is_empty() {
            let results = self.follow().await;
            if !results.is_empty() {
                said.push(Input::GoawayAnswered(results));
            }
        }
        said.push(self.ask().await);
        said
    }

    /// Figures are always asked for: the open watches tell who is cheap to move, and only those that changed come.
    async fn ask(&mut self) -> Input {
        let mut path = "/v1/connections?counters=true".to_owned();
        if !self.since.is_empty() {
            path.push_str("&since=");
            path.push_str(&self.since);
        }
        match client::get::<wire::Connections>(&self.socket, &path).await {
            Ok(answer) => {
                self.since = format!("{}:{}", answer.instance, answer.cursor);
                Input::Shim(report(answer))
            }
            Err(error) => {
                self.since.clear();
                self.failed(&error)
            }
        }
    }

    fn failed(&self, error: &anyhow::Error) -> Input {
        let why = format!("{error:#}");
        if self.is_front_door && stands_still(error) {
            Input::ShimStalled(why)
        } else {
            Input::ShimFailed(why)
        }
    }

    async fn carry_out(&mut self, order: GoawayOrder) -> Input {
        let request = wire::GoawayRequest {
            generation: order.generation,
            expires_in_ms: u64::try_from(order.expires_in.as_millis()).unwrap_or(u64::MAX),
            victims: order.victims.iter().map(|id| wire::Id(id.0)).collect(),
        };
        let answer = client::post::<wire::GoawayAnswer>(&self.socket, "/v1/goaway", &request).await;
        match answer {
            Ok(answer) => {
                let results = of_the_victims(&order.victims, answer.results);
                let until = Instant::now() + order.expires_in + GRACE;
                for (id, result) in &results {
                    if *result == GoawayResult::Pending {
                        let generation = order.generation;
                        self.pending.insert(*id, Pending { generation, until });
                    }
                }
                Input::GoawayAnswered(results)
            }
            Err(error) => Input::GoawayFailed(order.victims, format!("{error:#}")),
        }
    }

    /// Final results of those who were pending: told, gone with the shim's process, or expired.
    async fn follow(&mut self) -> Vec<(ConnectionId, GoawayResult)> {
        let mut results = Vec::new();
        let path = format!("/v1/outcomes?since={}", self.next_outcome.1);
        // A shim that does not answer is reported by the other question; here only time goes on.
        if let Ok(answer) = client::get::<wire::Outcomes>(&self.socket, &path).await {
            let is_another = !self.next_outcome.0.is_empty() && self.next_outcome.0 != answer.instance;
            if is_another {
                let forgotten = std::mem::take(&mut self.pending).into_keys();
                results.extend(forgotten.map(|id| (id, GoawayResult::Unknown)));
            }
            for entry in answer.outcomes {
                let id = ConnectionId(entry.id.0);
                let Some(pending) = self.pending.get(&id) else {
                    continue;
                };
                let result = if entry.outcome == wire::Outcome::Expired {
                    if entry.generation < pending.generation {
                        // Of an order before this one.
                        continue;
                    }
                    GoawayResult::Expired
                } else if entry.generation >= pending.generation {
                    GoawayResult::Sent
                } else if entry.outcome == wire::Outcome::Draining {
                    // It was told for another reason, such as the shim's own end.
                    GoawayResult::AlreadyDraining
                } else {
                    GoawayResult::Unknown
                };
                self.pending.remove(&id);
                results.push((id, result));
            }
            self.next_outcome = (answer.instance, answer.next);
        }
        let now = Instant::now();
        let expired: Vec<_> = self.pending.extract_if(.., |_, pending| pending.until <= now).collect();
        results.extend(expired.into_iter().map(|(id, _)| (id, GoawayResult::Expired)));
        results
    }
}

/// One result for each victim, whatever the shim answered: who is left out is taken for unknown, and others are left out.
fn of_the_victims(victims: &[ConnectionId], answered: Vec<wire::Answered>) -> Vec<(ConnectionId, GoawayResult)> {
    let mut said: BTreeMap<ConnectionId, GoawayResult> = BTreeMap::new();
    let count = answered.len();
    for wire::Answered { id, result } in answered {
        // The first word counts.
        said.entry(ConnectionId(id.0)).or_insert(of_the_wire(result));
    }
    let results: Vec<_> = victims
        .iter()
        .map(|id| (*id, said.remove(id).unwrap_or(GoawayResult::Unknown)))
        .collect();
    if count != victims.len() || !said.is_empty() {
        tracing::warn!(
            victims = victims.len(),
            results = count,
            strangers = said.len(),
            "the shim's answer does not name each victim once: who is not in it is taken for unknown"
        );
    }
    results
}

fn of_the_wire(result: wire::GoawayResult) -> GoawayResult {
    match result {
        wire::GoawayResult::Sent => GoawayResult::Sent,
        wire::GoawayResult::Pending => GoawayResult::Pending,
        wire::GoawayResult::AlreadyDraining => GoawayResult::AlreadyDraining,
        wire::GoawayResult::Unknown => GoawayResult::Unknown,
        wire::GoawayResult::Expired => GoawayResult::Expired,
        wire::GoawayResult::NotH2 => GoawayResult::NotH2,
    }
}

/// The beginning of a client's words, at most so many octets.
fn cut(text: Option<String>, octets: usize) -> Option<String> {
    text.map(|mut text| {
        text.truncate(text.floor_char_boundary(octets));
        text.shrink_to_fit();
        text
    })
}

fn report(answer: wire::Connections) -> ShimReport {
    let counters = |counters: wire::Counters| Counters {
        requests: counters.requests,
        open_streams: counters.open_streams,
        open_watches: counters.open_watches,
        bytes_in: counters.bytes_in,
        bytes_out: counters.bytes_out,
    };
    ShimReport {
        instance: answer.instance,
        generation: answer.generation,
        refused_total: answer.refused_total,
        upstream_listener: answer.upstream_listener.map(|id| id.0),
        release: answer.upstream_version.as_deref().and_then(Release::new),
        // The relay holds its connections itself, and carries an order out at once.
        abilities: Abilities::default(),
        full: answer.full,
        closed: answer.closed.iter().map(|id| ConnectionId(id.0)).collect(),
        connections: answer
            .connections
            .into_iter()
            .map(|connection| ShimConnection {
                id: ConnectionId(connection.id.0),
                client: connection.client,
                local: connection.local,
                protocol: match connection.protocol {
                    wire::Protocol::Unknown => Protocol::Unknown,
                    wire::Protocol::H2 => Protocol::H2Selected,
                    wire::Protocol::Http1 => Protocol::Http1,
                },
                can_be_told: connection.can_be_told(),
                state: match connection.state {
                    wire::State::Active => ConnectionState::Active,
                    wire::State::Draining => ConnectionState::Draining,
                },
                age: Some(Duration::from_millis(connection.age_ms)),
                user: cut(connection.user, USER),
                user_agent: cut(connection.user_agent, USER_AGENT),
                counters: counters(connection.counters),
            })
            .collect(),
        counters: answer
            .counters
            .into_iter()
            .map(|counted| (ConnectionId(counted.id.0), counters(counted.counters)))
            .collect(),
        upstream_gone: answer.upstream == wire::Upstream::Unreachable,
        upstream_overloaded: answer.upstream == wire::Upstream::Overloaded,
        upstream_ready: match answer.upstream {
            wire::Upstream::Unknown => None,
            wire::Upstream::Ready => Some(true),
            // One that answers too late is up, but nobody should be sent there.
            wire::Upstream::Starting
            | wire::Upstream::Overloaded
            | wire::Upstream::Unusable
            | wire::Upstream::Unreachable => Some(false),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use anyhow::Context as _;
    use axum::{
        Json, Router,
        routing::{get, post},
    };
    use serde_json::{Value, json};
    use tempfile::TempDir;
    use tokio::time::timeout;

    use super::*;
    use crate::local;

    /// A shim that answers what it is told to, right or wrong.
    struct Shim {
        directory: TempDir,
        goaway: Arc<Mutex<Value>>,
        outcomes: Arc<Mutex<Value>>,
    }

    fn said(answer: &Arc<Mutex<Value>>) -> Json<Value> {
        Json(answer.lock().expect("nobody panics").clone())
    }

    impl Shim {
        fn start(connections: Value) -> Self {
            let directory = tempfile::tempdir().expect("a directory");
            let goaway = Arc::new(Mutex::new(Value::Null));
            let outcomes = Arc::new(Mutex::new(Value::Null));
            let (orders, told) = (Arc::clone(&goaway), Arc::clone(&outcomes));
            let routes = Router::new()
                .route("/v1/connections", get(move || async move { Json(connections) }))
                .route("/v1/goaway", post(move || async move { said(&orders) }))
                .route("/v1/outcomes", get(move || async move { said(&told) }));
            let socket = local::bind(&directory.path().join("shim.sock")).expect("a socket");
            tokio::spawn(async move {
                let _file = socket.guard;
                axum::serve(socket.listener, routes).await
            });
            Self {
                directory,
                goaway,
                outcomes,
            }
        }

        fn link(&self) -> Link {
            Link::new(self.directory.path().join("shim.sock"), true)
        }

        fn answers(&self, results: &[(u64, &str)]) {
            let results: Vec<Value> = results
                .iter()
                .map(|(id, result)| json!({"id": format!("{id:x}"), "result": result}))
                .collect();
            *self.goaway.lock().expect("nobody panics") = json!({"generation": 7, "results": results});
        }

        fn tells(&self, instance: &str, next: u64, outcomes: &[(u64, u64, &str)]) {
            let outcomes: Vec<Value> = outcomes
                .iter()
                .enumerate()
                .map(|(seq, (id, generation, outcome))| {
                    json!({"seq": seq, "id": format!("{id:x}"), "generation": generation, "outcome": outcome})
                })
                .collect();
            *self.outcomes.lock().expect("nobody panics") =
                json!({"instance": instance, "next": next, "outcomes": outcomes});
        }
    }

    fn order(victims: &[u64], expires_in: Duration) -> GoawayOrder {
        GoawayOrder {
            generation: 7,
            expires_in,
            victims: victims.iter().map(|id| ConnectionId(*id)).collect(),
        }
    }

    fn results(input: Input) -> Vec<(u64, GoawayResult)> {
        match input {
            Input::GoawayAnswered(results) => results.into_iter().map(|(id, result)| (id.0, result)).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn each_victim_gets_one_result_and_nobody_else_does() {
        use GoawayResult::{Sent, Unknown};
        let shim = Shim::start(Value::Null);
        let minute = Duration::from_secs(60);
        for (answered, expected) in [
            (vec![(1, "sent"), (2, "sent")], [(1, Sent), (2, Sent)]),
            (vec![(2, "sent"), (1, "sent")], [(1, Sent), (2, Sent)]),
            (vec![(1, "sent")], [(1, Sent), (2, Unknown)]),
            (vec![], [(1, Unknown), (2, Unknown)]),
            (vec![(1, "sent"), (9, "sent")], [(1, Sent), (2, Unknown)]),
            (vec![(1, "sent"), (1, "unknown"), (2, "sent")], [(1, Sent), (2, Sent)]),
        ] {
            shim.answers(&answered);
            let input = shim.link().carry_out(order(&[1, 2], minute)).await;
            assert_eq!(results(input), expected, "{answered:?}");
        }
        // What is no answer at all is a failed order.
        *shim.goaway.lock().expect("nobody panics") = json!({"results": [{"id": "1", "result": "done"}]});
        let input = shim.link().carry_out(order(&[1], minute)).await;
        assert!(matches!(input, Input::GoawayFailed(victims, _) if victims == [ConnectionId(1)]));
    }

    #[tokio::test]
    async fn who_is_pending_is_followed_to_a_final_result() {
        use GoawayResult::{AlreadyDraining, Pending, Sent};
        let shim = Shim::start(Value::Null);
        let mut link = shim.link();
        shim.answers(&[(1, "pending"), (2, "pending"), (3, "pending"), (4, "pending")]);
        let input = link.carry_out(order(&[1, 2, 3, 4], Duration::from_secs(60))).await;
        assert_eq!(results(input), [1, 2, 3, 4].map(|id| (id, Pending)));
        // An outcome of an earlier order, of nobody who was asked, and of this one.
        shim.tells("a", 3, &[(1, 7, "draining"), (9, 7, "draining"), (2, 0, "draining")]);
        let told: BTreeMap<u64, GoawayResult> = link.follow().await.into_iter().map(|(id, r)| (id.0, r)).collect();
        assert_eq!(told, BTreeMap::from([(1, Sent), (2, AlreadyDraining)]));
        shim.tells("a", 4, &[(3, 7, "closed")]);
        assert_eq!(link.follow().await, [(ConnectionId(3), Sent)]);
        // Another process knows nothing of it.
        shim.tells("b", 0, &[]);
        assert_eq!(link.follow().await, [(ConnectionId(4), GoawayResult::Unknown)]);
        assert!(link.pending.is_empty());
    }

    #[tokio::test]
    async fn who_stays_pending_expires() {
        let shim = Shim::start(Value::Null);
        let mut link = shim.link();
        shim.answers(&[(1, "pending")]);
        let began = Instant::now();
        let _ = link.carry_out(order(&[1], Duration::from_secs(3_600))).await;
        assert_eq!(link.follow().await, []);
        let pending = link.pending.values_mut().next().expect("it is followed");
        assert!(pending.until >= began + Duration::from_secs(3_600) + GRACE);
        pending.until = began;
        assert_eq!(link.follow().await, [(ConnectionId(1), GoawayResult::Expired)]);
        assert_eq!(link.follow().await, []);
    }

    /// The path is another one, the process has ended, or its answer is another release's: none of that stops its clients.
    #[tokio::test]
    async fn one_that_listens_and_does_not_answer_stands_still_and_one_that_is_not_there_does_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("shim.sock");
        let mut link = Link::new(path.clone(), true);
        assert!(matches!(link.ask().await, Input::ShimFailed(_)), "nobody is there");
        let socket = local::bind(&path).expect("a socket");
        let instant = Duration::from_millis(1);
        let silent = timeout(instant, client::get::<wire::Connections>(&path, "/v1/connections")).await;
        let silent = silent
            .map(drop)
            .context("it did not answer")
            .expect_err("nobody accepts");
        assert!(matches!(link.failed(&silent), Input::ShimStalled(_)));
        let behind = Link::new(path.clone(), false);
        assert!(
            matches!(behind.failed(&silent), Input::ShimFailed(_)),
            "clients reach the apiserver itself"
        );
        drop(socket);
        assert!(matches!(link.ask().await, Input::ShimFailed(_)), "it has ended");
        let unreadable = Shim::start(json!({"another": "release"}));
        assert!(matches!(unreadable.link().ask().await, Input::ShimFailed(_)));
    }

    #[tokio::test]
    async fn a_clients_words_are_kept_short() {
        let connection = json!({
            "id": "1", "client": "192.0.2.1:1", "local": "192.0.2.2:6443", "protocol": "h2", "state": "active",
            "age_ms": 0, "user": "ü".repeat(4_000), "user_agent": "\u{fffd}".repeat(1 << 20),
            "requests": 0, "open_streams": 0, "open_watches": 0, "bytes_in": 0, "bytes_out": 0,
        });
        let listing = json!({
            "shim": "relay", "instance": "a", "cursor": 1, "full": true, "generation": 0, "upstream": "ready",
            "connections": [connection], "closed": [], "counters": [],
        });
        let shim = Shim::start(listing);
        let Input::Shim(report) = shim.link().ask().await else {
            panic!("it answers");
        };
        let known = &report.connections[0];
        assert_eq!(known.user_agent.as_ref().map(String::len), Some(255));
        assert_eq!(known.user.as_ref().map(String::len), Some(USER));
    }
}
