//! Who asks for what: figures of the shim, with the cluster's names for what answers named.
//!
//! Must never be on a port: whose requests they are is for whoever owns the socket.

use std::path::PathBuf;

use axum::{Json, extract::State, http::StatusCode};
use serde_json::{Value, json};

use super::Context;
use crate::{
    kubernetes::FlowControlReader,
    local::{Problem, client},
    shim::wire::{FlowRow, Flows},
};

/// Where flows are asked for.
#[derive(Clone, Default)]
pub struct FlowSource {
    /// The relay's control socket, where the shim is one.
    pub relay: Option<PathBuf>,
    /// What the names of FlowSchemas and levels are, and who has how many seats.
    pub names: FlowControlReader,
}

/// `GET /v1/flows`.
pub(super) async fn flows(State(context): State<Context>) -> Result<Json<Value>, Problem> {
    let Some(relay) = &context.flows.relay else {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            "which flows requests belong to stands in answers, which only a relay sees: --shim relay:unix:PATH",
        ));
    };
    let flows: Flows = client::get(relay, "/v1/flows")
        .await
        .map_err(|error| Problem::new(StatusCode::BAD_GATEWAY, format!("the shim: {error:#}")))?;
    let (names, fault) = match context.flows.names.read().await {
        Ok(names) => (Some(names), None),
        Err(why) => (None, Some(why)),
    };
    let row = |row: FlowRow| {
        let name_of = |uid: &Option<String>, schemas: bool| {
            let names = names.as_ref()?;
            let names = if schemas {
                &names.schema_names
            } else {
                &names.level_names
            };
            names.get(uid.as_ref()?).cloned()
        };
        json!({
            "user": row.user,
            "user_agent": row.user_agent,
            "flow_schema": name_of(&row.flow_schema, true),
            "flow_schema_uid": row.flow_schema,
            "priority_level": name_of(&row.priority_level, false),
            "priority_level_uid": row.priority_level,
            "connections": row.figures.connections,
            "requests": row.figures.requests,
            "bytes": row.figures.bytes,
            "refused": row.figures.refused,
            "open_streams": row.figures.open_streams,
            "open_watches": row.figures.open_watches,
        })
    };
    let rows: Vec<Value> = flows.rows.into_iter().map(row).collect();
    Ok(Json(json!({
        "instance": flows.instance,
        "flows": rows,
        "cut": flows.cut,
        "others": flows.others,
        "unplaced_total": flows.unplaced_total,
        "flow_control": names.as_ref().map(|names| names.shown()),
        "names_fault": fault,
    })))
}
