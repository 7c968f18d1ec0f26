//! The local API on the Unix socket, and the metrics.
//!
//! Job: show everything the core knows, and pass an operator's commands on.
//! Must never answer from a copy of its own: each answer is a look at the core.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, Query, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use bytes::Bytes;
use http_body_util::channel::Channel;
use rebalancer_core::{
    agent::Agent,
    ids::Timestamp,
    table::{Connection, ConnectionTable},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{sync::broadcast::error::RecvError, time::timeout};

use super::{
    handle::{AgentHandle, Gone},
    heart::Heart,
    metrics::Metrics,
    peers::Manners,
    state::StateFile,
    wire,
};
use crate::local::Problem;

mod flows;
mod orders;
mod users;

pub use flows::FlowSource;

/// What every route needs.
#[derive(Clone)]
pub struct Context {
    /// The way to the core.
    pub agent: AgentHandle,
    /// The metrics.
    pub metrics: Arc<Mutex<Metrics>>,
    /// `ebpf` or `sockdiag`.
    pub source: &'static str,
    /// Whether the loop turns.
    pub heart: Arc<Heart>,
    /// What a restart must not forget.
    pub state: Arc<Mutex<StateFile>>,
    /// Whether connections are steered to a relay on this node.
    pub intercepts: bool,
    /// Where flows are asked for.
    pub flows: FlowSource,
    /// What peers show beside their snapshots.
    pub manners: Manners,
}

/// How long a scrape waits for the loop.
const LOOK_PATIENCE: Duration = Duration::from_secs(1);

/// How many entries a list has when nobody says.
const LIMIT: usize = 100;

impl From<Gone> for Problem {
    fn from(gone: Gone) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, gone.to_string())
    }
}

/// The local API.
pub fn router(context: Context) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/connections", get(connections))
        .route("/v1/flows", get(flows::flows))
        .route("/v1/peers", get(peers))
        .route("/v1/plan", get(plan))
        .route("/v1/decisions", get(decisions))
        .route("/v1/decisions/stream", get(stream))
        .route("/v1/decisions/{id}", get(decision))
        .route("/v1/goaway", post(orders::goaway))
        .route("/v1/approve/{id}", post(orders::approve))
        .route("/v1/pause", post(orders::pause))
        .route("/v1/resume", post(orders::resume))
        .route("/v1/evacuate", post(orders::evacuate))
        .route("/v1/return", post(orders::take_clients))
        .route("/openapi.json", get(openapi))
        .merge(observed())
        .fallback(|| async { Problem::new(StatusCode::NOT_FOUND, "no such path; /openapi.json lists them all") })
        .with_state(context)
}

/// What the metrics' port answers.
pub fn metrics_router(context: Context) -> Router {
    observed().with_state(context)
}

fn observed() -> Router<Context> {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
}

/// Answered without the loop: it tells of one that stands still.
async fn livez(State(context): State<Context>) -> Result<&'static str, Problem> {
    match context.heart.standstill() {
        None => Ok("ok\n"),
        Some(since) => Err(Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            format!(
                "the agent's loop has stood still for {} s: restart the agent",
                since.as_secs()
            ),
        )),
    }
}

async fn readyz(State(context): State<Context>) -> Result<&'static str, Problem> {
    let trusted = context.agent.read(|agent, _| agent.table().is_trusted()).await?;
    if trusted {
        Ok("ok\n")
    } else {
        Err(Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "the connections are not known yet: the source has not given its complete list",
        ))
    }
}

async fn metrics(State(context): State<Context>) -> Response {
    let lock = || context.metrics.lock().unwrap_or_else(PoisonError::into_inner);
    let is_stale = lock().is_stale();
    if is_stale {
        let shared = Arc::clone(&context.metrics);
        let look = move |agent: &Agent, now: Timestamp| {
            let mut metrics = shared.lock().unwrap_or_else(PoisonError::into_inner);
            // Several who scrape at once need one look.
            if metrics.is_stale() {
                metrics.look(agent, now);
            }
        };
        // A loop that stands still, or has ended, is scraped as it was last.
        let _ = timeout(LOOK_PATIENCE, context.agent.read(look)).await;
    }
    let text = lock().text();
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

async fn status(State(context): State<Context>) -> Result<Json<Value>, Problem> {
    let clock = context.agent.clock;
    let (source, intercepts) = (context.source, context.intercepts);
    let handle = context.agent.clone();
    let look = move |agent: &Agent, now: Timestamp| {
        let (policy, table) = (agent.policy(), agent.table());
        let preview = agent.preview(now);
        let reason = preview.hold.as_ref().map(|hold| hold.reason());
        let held_since = reason.and_then(|reason| handle.held_since(reason));
        let decision = wire::decision(&preview, &clock);
        let mut shown = json!({
            "node": policy.node.as_str(),
            "version": env!("CARGO_PKG_VERSION"),
            "uptime_s": now.since(agent.started()).as_secs(),
            "mode": wire::mode_name(policy.mode),
            "paused": agent.is_paused(),
            "pause": agent.pause().map(|pause| json!({
                "reason": pause.reason,
                "left_s": pause.until.map(|until| until.since(now).as_secs()),
            })),
            "source": source,
            "shim": wire::shim_name(policy.shim),
            "weight": wire::weight_name(policy.weight),
            "skew_threshold": policy.skew_threshold,
            "skew_target": policy.skew_target,
            "interval_s": policy.interval.as_secs_f64(),
            "goaway_rate": agent.goaway_rate(),
            "capacity": policy.capacity,
            "proposal": agent.proposal(),
            "goaway_share": policy.goaway_share,
            "settle_s": policy.settle.as_secs_f64(),
            "min_connection_age_s": policy.min_connection_age.as_secs_f64(),
            "client_cooldown_s": policy.client_cooldown.as_secs_f64(),
            "upgrade_patience_s": policy.upgrade_patience.as_secs_f64(),
            "view": decision["view"],
            "mean": decision["mean"],
            "skew": decision["skew"],
            "trigger": decision["threshold"],
            "noise_floor": decision["noise_floor"],
            "rho": decision["rho"],
            "hold": decision["hold"],
            "hold_since_s": held_since.map(|since| now.since(since).as_secs()),
            "goaways_total": agent.goaways_total(),
            "budget_tokens": agent.budget_tokens(now),
            "outcomes": wire::outcomes(agent.outcomes_total()),
            "lost_events_total": table.lost_events_total(),
            "landings_total": table.accepted_total(),
            "unknown": table.unknown(),
            "node_local": table.node_local(),
            "table_repairs": {
                "opened": table.repairs().opened,
                "closed": table.repairs().closed,
                "listener": table.repairs().listener,
            },
            "warnings": warnings(table, intercepts),
        });
        let evacuation = agent.evacuation(now);
        shown["evacuation"] = json!(evacuation.map(|progress| wire::evacuation(&progress, table)));
        // Peers, membership and what was said to all: as /v1/peers has them.
        if let (Value::Object(shown), Value::Object(peers)) = (&mut shown, wire::peers(agent, now)) {
            shown.extend(peers);
        }
        shown
    };
    let shown = context.agent.read(look).await?;
    Ok(Json(with_manners(shown, &context.manners)))
}

/// Adds to each peer what it shows beside its snapshot.
fn with_manners(mut shown: Value, manners: &Manners) -> Value {
    for peer in shown["peers"].as_array_mut().into_iter().flatten() {
        let manner = manners.of(peer["apiserver"].as_str().unwrap_or_default());
        peer["release"] = json!(manner.release);
        peer["clock_ahead_s"] = json!(manner.clock_ahead_s);
    }
    shown
}

/// What an operator should know of the count.
fn warnings(table: &ConnectionTable, intercepts: bool) -> Vec<String> {
    let blind = table
        .blind()
        .map(|why| format!("which connections speak HTTP/2 is not seen: {why}"));
    let node_local = (table.is_mostly_node_local() && !intercepts).then(|| wire::node_local_warning(table));
    blind.into_iter().chain(node_local).collect()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ConnectionsQuery {
    state: Option<String>,
    protocol: Option<String>,
    sort: Option<String>,
    by: Option<String>,
    limit: Option<usize>,
}

/// What connections can be sorted by; each puts the largest first.
const SORTS: [&str; 5] = ["age", "requests", "streams", "watches", "bytes"];

fn one_of(value: Option<&str>, allowed: &[&str], name: &str) -> Result<(), Problem> {
    match value {
        Some(value) if !allowed.contains(&value) => Err(Problem::new(
            StatusCode::BAD_REQUEST,
            format!("{name}={value}: allowed is {}", allowed.join(", ")),
        )),
        _ => Ok(()),
    }
}

async fn connections(
    State(context): State<Context>,
    Query(query): Query<ConnectionsQuery>,
) -> Result<Json<Value>, Problem> {
    one_of(query.state.as_deref(), &["active", "draining"], "state")?;
    one_of(
        query.protocol.as_deref(),
        &["h2", "offered", "http/1.1", "unknown"],
        "protocol",
    )?;
    one_of(query.sort.as_deref(), &SORTS, "sort")?;
    one_of(query.by.as_deref(), &["user"], "by")?;
    let look = move |agent: &Agent, now: Timestamp| {
        let wanted = |connection: &Connection| {
            query
                .state
                .as_deref()
                .is_none_or(|state| state == wire::state_name(connection))
                && query
                    .protocol
                    .as_deref()
                    .is_none_or(|protocol| protocol == wire::protocol_name(connection.protocol))
        };
        let limit = query.limit.unwrap_or(LIMIT);
        if query.by.is_some() {
            let found = agent.table().scan().filter(|connection| wanted(connection));
            return users::by_user(found, query.sort.as_deref().unwrap_or_default(), limit);
        }
        let mut found: Vec<_> = agent
            .table()
            .iter()
            .filter(|(_, connection)| wanted(connection))
            .collect();
        let key = |connection: &Connection| match query.sort.as_deref() {
            Some("requests") => connection.counters.requests,
            Some("streams") => u64::from(connection.counters.open_streams),
            Some("watches") => u64::from(connection.counters.open_watches),
            Some("bytes") => connection.counters.bytes_in + connection.counters.bytes_out,
            _ => u64::try_from(now.since(connection.opened_at).as_millis()).unwrap_or(u64::MAX),
        };
        found.sort_by_key(|(id, connection)| (std::cmp::Reverse(key(connection)), *id));
        let total = found.len();
        found.truncate(limit);
        let list: Vec<Value> = found
            .into_iter()
            .map(|(id, connection)| wire::connection(id, connection, now))
            .collect();
        json!({"total": total, "connections": list})
    };
    Ok(Json(context.agent.read(look).await?))
}

async fn peers(State(context): State<Context>) -> Result<Json<Value>, Problem> {
    let shown = context.agent.read(wire::peers).await?;
    Ok(Json(with_manners(shown, &context.manners)))
}

async fn plan(State(context): State<Context>) -> Result<Json<Value>, Problem> {
    let clock = context.agent.clock;
    let look = move |agent: &Agent, now| wire::decision(&agent.preview(now), &clock);
    Ok(Json(context.agent.read(look).await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DecisionsQuery {
    limit: Option<usize>,
    since: Option<u64>,
}

async fn decisions(
    State(context): State<Context>,
    Query(query): Query<DecisionsQuery>,
) -> Result<Json<Value>, Problem> {
    let clock = context.agent.clock;
    let look = move |agent: &Agent, _| {
        let mut newest: Vec<Value> = agent
            .history()
            .rev()
            .take_while(|decision| query.since.is_none_or(|since| decision.id > since))
            .take(query.limit.unwrap_or(LIMIT))
            .map(|decision| wire::decision(decision, &clock))
            .collect();
        newest.reverse();
        json!({"decisions": newest})
    };
    Ok(Json(context.agent.read(look).await?))
}

async fn decision(State(context): State<Context>, Path(id): Path<u64>) -> Result<Json<Value>, Problem> {
    let clock = context.agent.clock;
    let look = move |agent: &Agent, _| {
        let mut history = agent.history().rev();
        history
            .find(|decision| decision.id == id)
            .map(|decision| wire::decision(decision, &clock))
    };
    context.agent.read(look).await?.map(Json).ok_or_else(|| {
        Problem::new(
            StatusCode::NOT_FOUND,
            format!("decision {id} is not among those kept; the decision log has them all"),
        )
    })
}

/// Decisions as they are made (server-sent events).
async fn stream(State(context): State<Context>) -> Response {
    let mut decisions = context.agent.decisions();
    let clock = context.agent.clock;
    let (mut sender, body) = Channel::<Bytes>::new(16);
    tokio::spawn(async move {
        loop {
            let event = match decisions.recv().await {
                Ok(decision) => {
                    let id = decision.id;
                    format!(
                        "id: {id}\nevent: decision\ndata: {}\n\n",
                        wire::decision(&decision, &clock)
                    )
                }
                Err(RecvError::Lagged(missed)) => format!("event: missed\ndata: {missed}\n\n"),
                Err(RecvError::Closed) => return,
            };
            if sender.send_data(event.into()).await.is_err() {
                return;
            }
        }
    });
    let mut response = Response::new(Body::new(body));
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    response
}

async fn openapi() -> Response {
    let text = include_str!("openapi.json");
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn document() -> Value {
        serde_json::from_str(include_str!("openapi.json")).expect("JSON")
    }

    #[test]
    fn every_route_is_documented_and_nothing_else() {
        let document = document();
        let mut documented = BTreeSet::new();
        for (path, methods) in document["paths"].as_object().expect("paths") {
            for method in methods.as_object().expect("methods").keys() {
                documented.insert((path.as_str(), method.as_str()));
            }
        }
        // axum does not tell its routes: they are read where they are made.
        let (source, _) = include_str!("api.rs").split_once("#[cfg(test)]").expect("these tests");
        let made: BTreeSet<(&str, &str)> = source
            .split(".route(\"")
            .skip(1)
            .filter_map(|rest| {
                let (path, rest) = rest.split_once("\", ")?;
                Some((path, rest.split_once('(')?.0))
            })
            .collect();
        assert!(made.len() > 12, "{made:?}");
        assert_eq!(made, documented);
    }

    #[test]
    fn the_documented_parameters_are_those_that_are_read() {
        let document = document();
        let documented = |path: &str| -> BTreeSet<String> {
            let parameters = document["paths"][path]["get"]["parameters"]
                .as_array()
                .expect("parameters");
            parameters
                .iter()
                .map(|one| one["name"].as_str().expect("a name").to_owned())
                .collect()
        };
        // serde names all it would have read.
        let read = |refusal: serde_json::Error| -> BTreeSet<String> {
            let said = refusal.to_string();
            said.split('`').skip(3).step_by(2).map(str::to_owned).collect()
        };
        let unknown = || json!({"?": 1});
        let refusal = serde_json::from_value::<ConnectionsQuery>(unknown())
            .err()
            .expect("a refusal");
        assert_eq!(read(refusal), documented("/v1/connections"));
        let refusal = serde_json::from_value::<DecisionsQuery>(unknown())
            .err()
            .expect("a refusal");
        assert_eq!(read(refusal), documented("/v1/decisions"));
        let parameters = document["paths"]["/v1/connections"]["get"]["parameters"]
            .as_array()
            .expect("parameters");
        let sort = parameters
            .iter()
            .find(|one| one["name"] == "sort")
            .expect("it is there");
        assert_eq!(sort["schema"]["enum"], json!(SORTS));
    }
}
