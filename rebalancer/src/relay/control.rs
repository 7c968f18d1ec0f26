//! The control socket: `GET /v1/connections`, `POST /v1/goaway`, `GET /v1/outcomes`, `GET /v1/flows`, `/livez`.
//!
//! Input: the registry. Must never answer anyone but the socket's owner (mode 0600).

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{Query, State, rejection::JsonRejection},
    http::StatusCode,
    routing::{get, post},
};
use serde::Deserialize;

use super::registry::Registry;
use crate::{local::Problem, shim::wire};

/// The routes.
pub fn router(registry: Arc<Registry>) -> Router {
    Router::new()
        .route("/v1/connections", get(connections))
        .route("/v1/goaway", post(goaway))
        .route("/v1/outcomes", get(outcomes))
        .route("/v1/flows", get(flows))
        .route("/livez", get(|| async { "ok\n" }))
        .fallback(|| async {
            Problem::new(
                StatusCode::NOT_FOUND,
                "there is /v1/connections, /v1/goaway, /v1/outcomes, /v1/flows and /livez",
            )
        })
        .with_state(registry)
}

#[derive(Deserialize)]
struct ConnectionsQuery {
    since: Option<String>,
    #[serde(default)]
    counters: bool,
}

async fn connections(
    State(registry): State<Arc<Registry>>,
    Query(query): Query<ConnectionsQuery>,
) -> Result<Json<wire::Connections>, Problem> {
    let since = match &query.since {
        None => None,
        Some(text) => Some(
            text.rsplit_once(':')
                .and_then(|(instance, cursor)| Some((instance, cursor.parse().ok()?)))
                .ok_or_else(|| {
                    Problem::new(
                        StatusCode::BAD_REQUEST,
                        format!("since={text} is not INSTANCE:CURSOR, as an earlier answer gave them"),
                    )
                })?,
        ),
    };
    Ok(Json(registry.list(since, query.counters)))
}

async fn goaway(
    State(registry): State<Arc<Registry>>,
    order: Result<Json<wire::GoawayRequest>, JsonRejection>,
) -> Result<Json<wire::GoawayAnswer>, Problem> {
    let Json(order) = order.map_err(|rejection| Problem::new(rejection.status(), rejection.body_text()))?;
    let results = registry
        .go_away(
            order.generation,
            Duration::from_millis(order.expires_in_ms),
            &order.victims,
        )
        .map_err(|overtaken| Problem::new(StatusCode::CONFLICT, overtaken.to_string()))?;
    Ok(Json(wire::GoawayAnswer {
        generation: order.generation,
        results,
    }))
}

async fn flows(State(registry): State<Arc<Registry>>) -> Json<wire::Flows> {
    Json(registry.flows())
}

#[derive(Deserialize)]
struct OutcomesQuery {
    #[serde(default)]
    since: u64,
}

async fn outcomes(State(registry): State<Arc<Registry>>, Query(query): Query<OutcomesQuery>) -> Json<wire::Outcomes> {
    Json(registry.outcomes(query.since))
}
