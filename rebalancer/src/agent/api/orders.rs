//! What operators order by the local API: tell these, approve that, pause, resume, evacuate, return.
//!
//! Must never say that something is done before the core has done it, nor let a word that a restart would forget pass for one
//! that is kept.

use std::{sync::PoisonError, time::Duration};

use axum::{
    Json,
    extract::{Path, State, rejection::JsonRejection},
    http::StatusCode,
};
use bytes::Bytes;
use rebalancer_core::agent::{Agent, Answer, Command};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::Context;
use crate::{
    agent::{
        select::Selection,
        wire::{self, WireSwitch},
    },
    local::Problem,
};

/// How long somebody who says something to all agents waits until each peer was asked once.
const ASKING: Duration = Duration::from_secs(10);

fn wrong(what: String) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, what)
}

pub(super) async fn goaway(
    State(context): State<Context>,
    body: Result<Json<Selection>, JsonRejection>,
) -> Result<Json<Value>, Problem> {
    let Json(selection) = body.map_err(|rejection| Problem::new(rejection.status(), rejection.body_text()))?;
    let over = selection.over().map_err(wrong)?;
    let force = selection.force;
    let choose = move |agent: &Agent, _| selection.choose(agent);
    let connections = context.agent.read(choose).await?.map_err(wrong)?;
    if connections.is_empty() {
        return Err(Problem::new(
            StatusCode::NOT_FOUND,
            "no active connection is like that; /v1/connections lists them",
        ));
    }
    let named = connections.len();
    let command = Command::Goaway {
        connections,
        force,
        over,
    };
    let conflict = |why: String| Err(Problem::new(StatusCode::CONFLICT, why));
    match context.agent.command(command).await? {
        Answer::Ordered { decision, left_out } => {
            tracing::warn!(decision, named, left_out = left_out.len(), force, "an operator's order");
            let clock = context.agent.clock;
            let look = move |agent: &Agent, _| {
                let mut decisions = agent.history().rev();
                let decision = decisions.find(|one| one.id == decision);
                json!({
                    "decision": decision.map(|decision| wire::decision(decision, &clock)),
                    "left_out": wire::left_out(&left_out, agent.table()),
                })
            };
            Ok(Json(context.agent.read(look).await?))
        }
        Answer::Nobody(left_out) => conflict(format!(
            "nobody of the {named} can be told: {}",
            wire::left_out_in_words(&left_out)
        )),
        Answer::Busy { decision } => conflict(format!(
            "the plan of decision {decision} is in flight: try again when it has settled"
        )),
        Answer::Held(hold) => conflict(format!("nobody can be told: {hold}")),
        Answer::Done | Answer::TooEarly | Answer::NoSuchProposal { .. } => Err(out_of_place()),
    }
}

/// The core answers what it was asked; this is for the compiler.
fn out_of_place() -> Problem {
    Problem::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "the agent's answer is to another question",
    )
}

pub(super) async fn approve(State(context): State<Context>, Path(proposal): Path<u64>) -> Result<Json<Value>, Problem> {
    match context.agent.command(Command::Approve(proposal)).await? {
        Answer::Done => {
            tracing::warn!(proposal, "approved by an operator");
            Ok(Json(json!({"approved": proposal})))
        }
        Answer::NoSuchProposal { waiting } => {
            let waits = waiting.map_or_else(
                || "nothing waits for approval".to_owned(),
                |id| format!("{id} waits for it"),
            );
            Err(Problem::new(
                StatusCode::NOT_FOUND,
                format!("there is no proposal {proposal}: {waits}"),
            ))
        }
        _ => Err(out_of_place()),
    }
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct PauseBody {
    reason: String,
    for_s: Option<f64>,
    cluster: bool,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ResumeBody {
    cluster: bool,
}

/// The longest pause that ends by itself, in seconds.
const LONGEST_PAUSE: f64 = (wire::LONGEST_PAUSE_MS / 1_000) as f64;

pub(super) async fn pause(State(context): State<Context>, body: Bytes) -> Result<Json<Value>, Problem> {
    let PauseBody { reason, for_s, cluster } = if body.is_empty() {
        PauseBody::default()
    } else {
        serde_json::from_slice(&body).map_err(|error| wrong(error.to_string()))?
    };
    if reason.len() > wire::LONGEST_REASON {
        return Err(wrong(format!(
            "reason has {} octets: {} are taken at most",
            reason.len(),
            wire::LONGEST_REASON
        )));
    }
    if let Some(seconds) = for_s
        && !(seconds > 0.0 && seconds <= LONGEST_PAUSE)
    {
        return Err(wrong(format!(
            "for_s is {seconds}: allowed is above 0, at most {LONGEST_PAUSE}"
        )));
    }
    let length = for_s.map(Duration::from_secs_f64);
    tracing::warn!(reason, length = ?length, cluster, "paused by an operator");
    let command = if cluster {
        Command::PauseAll { reason, length }
    } else {
        Command::Pause { reason, length }
    };
    say(&context, command).await?;
    let kept = kept(&context).await;
    let switch = said_to_all(&context).await?;
    Ok(Json(json!({
        "paused": true,
        "cluster": cluster,
        "left_s": length.map(|length| length.as_secs()),
        "kept": kept,
        "switch": switch,
    })))
}

/// Has the core take a pause or its end; while peers have not been asked yet, which takes a moment after the start, it waits.
async fn say(context: &Context, command: Command) -> Result<(), Problem> {
    let deadline = Instant::now() + ASKING;
    loop {
        match context.agent.command(command.clone()).await? {
            Answer::Done => return Ok(()),
            Answer::TooEarly if Instant::now() < deadline => sleep(ASKING / 50).await,
            Answer::TooEarly => {
                return Err(Problem::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    format!(
                        "this agent has not asked all its peers yet, who may have heard something newer, nor has it within \
                         {} s: ask another agent, or mend what `rebalancer status` holds for",
                        ASKING.as_secs()
                    ),
                ));
            }
            _ => return Err(out_of_place()),
        }
    }
}

/// What was said to all agents, as this one has it.
async fn said_to_all(context: &Context) -> Result<WireSwitch, Problem> {
    let look = |agent: &Agent, now| WireSwitch::from(&agent.switch(now));
    Ok(context.agent.read(look).await?)
}

pub(super) async fn resume(State(context): State<Context>, body: Bytes) -> Result<Json<Value>, Problem> {
    let ResumeBody { cluster } = if body.is_empty() {
        ResumeBody::default()
    } else {
        serde_json::from_slice(&body).map_err(|error| wrong(error.to_string()))?
    };
    let command = if cluster { Command::ResumeAll } else { Command::Resume };
    say(&context, command).await?;
    tracing::warn!(cluster, "resumed by an operator");
    // The other of the two switches may still be off.
    let paused = context.agent.read(|agent, _| agent.is_paused()).await?;
    let kept = kept(&context).await;
    let switch = said_to_all(&context).await?;
    Ok(Json(
        json!({"paused": paused, "cluster": cluster, "kept": kept, "switch": switch}),
    ))
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct EvacuateBody {
    over_s: Option<f64>,
}

/// In so many seconds all clients are told when nobody says.
const OVER: f64 = 60.0;

/// The longest time they may be told in, in seconds.
const LONGEST_EVACUATION: f64 = 86_400.0;

pub(super) async fn evacuate(State(context): State<Context>, body: Bytes) -> Result<Json<Value>, Problem> {
    let EvacuateBody { over_s } = if body.is_empty() {
        EvacuateBody::default()
    } else {
        serde_json::from_slice(&body).map_err(|error| wrong(error.to_string()))?
    };
    let seconds = over_s.unwrap_or(OVER);
    if !(0.0..=LONGEST_EVACUATION).contains(&seconds) {
        return Err(wrong(format!(
            "over_s is {seconds}: allowed is 0 to {LONGEST_EVACUATION}"
        )));
    }
    match context
        .agent
        .command(Command::Evacuate(Duration::from_secs_f64(seconds)))
        .await?
    {
        Answer::Done => {}
        Answer::Held(hold) => {
            let why = format!("nobody can be told to go: {hold}");
            return Err(Problem::new(StatusCode::CONFLICT, why));
        }
        _ => return Err(out_of_place()),
    }
    tracing::warn!(over_s = seconds, "evacuated by an operator: clients are told to go");
    let kept = kept(&context).await;
    let look = |agent: &Agent, now| {
        agent
            .evacuation(now)
            .map(|progress| wire::evacuation(&progress, agent.table()))
    };
    let evacuation = context.agent.read(look).await?;
    Ok(Json(json!({"evacuation": evacuation, "kept": kept})))
}

pub(super) async fn take_clients(State(context): State<Context>) -> Result<Json<Value>, Problem> {
    let was_evacuated = context.agent.read(|agent, _| agent.is_evacuating()).await?;
    context.agent.command(Command::Return).await?;
    tracing::warn!(was_evacuated, "returned by an operator: clients are welcome");
    let kept = kept(&context).await;
    Ok(Json(json!({"was_evacuated": was_evacuated, "kept": kept})))
}

/// Whether the state file has what the loop gave it last.
async fn kept(context: &Context) -> bool {
    let ticket = context.state.lock().unwrap_or_else(PoisonError::into_inner).ticket();
    ticket.is_written().await
}
