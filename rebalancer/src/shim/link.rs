//! The agent's end of a shim's control socket.
//!
//! Job: ask once a second what changed, and carry orders over. Output: the core's inputs.
//! Must never send an order twice by itself: an order whose answer was lost is reported as failed.

use std::{path::PathBuf, time::Duration};

use rebalancer_core::{
    agent::Input,
    ids::{ConnectionId, Protocol},
    shim::{ConnectionState, Counters, GoawayOrder, GoawayResult, ShimConnection, ShimReport},
};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};

use super::wire;
use crate::local::client;

/// How often the shim is asked.
const POLL: Duration = Duration::from_secs(1);

/// Follows one shim until nobody listens to what it says.
pub async fn run(socket: PathBuf, mut orders: mpsc::Receiver<GoawayOrder>, inputs: mpsc::Sender<Input>) {
    let mut ticks = interval(POLL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut since = String::new();
    loop {
        let input = tokio::select! {
            _ = ticks.tick() => ask(&socket, &mut since).await,
            order = orders.recv() => match order {
                None => return,
                Some(order) => carry_out(&socket, order).await,
            },
        };
        if inputs.send(input).await.is_err() {
            return;
        }
    }
}

/// Figures are always asked for: the open watches tell who is cheap to move, and only those that changed come.
async fn ask(socket: &std::path::Path, since: &mut String) -> Input {
    let mut path = "/v1/connections?counters=true".to_owned();
    if !since.is_empty() {
        path.push_str("&since=");
        path.push_str(since);
    }
    match client::get::<wire::Connections>(socket, &path).await {
        Ok(answer) => {
            *since = format!("{}:{}", answer.instance, answer.cursor);
            Input::Shim(report(answer))
        }
        Err(error) => {
            since.clear();
            Input::ShimFailed(format!("{error:#}"))
        }
    }
}

async fn carry_out(socket: &std::path::Path, order: GoawayOrder) -> Input {
    let request = wire::GoawayRequest {
        generation: order.generation,
        expires_in_ms: u64::try_from(order.expires_in.as_millis()).unwrap_or(u64::MAX),
        victims: order.victims.iter().map(|id| wire::Id(id.0)).collect(),
    };
    match client::post::<wire::GoawayAnswer>(socket, "/v1/goaway", &request).await {
        Ok(answer) => Input::GoawayAnswered(answer.results.into_iter().map(answered).collect()),
        Err(error) => Input::GoawayFailed(order.victims, format!("{error:#}")),
    }
}

fn answered(answered: wire::Answered) -> (ConnectionId, GoawayResult) {
    let result = match answered.result {
        wire::GoawayResult::Sent => GoawayResult::Sent,
        wire::GoawayResult::Pending => GoawayResult::Pending,
        wire::GoawayResult::AlreadyDraining => GoawayResult::AlreadyDraining,
        wire::GoawayResult::Unknown => GoawayResult::Unknown,
        wire::GoawayResult::NotH2 => GoawayResult::NotH2,
    };
    (ConnectionId(answered.id.0), result)
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
                user: connection.user,
                user_agent: connection.user_agent,
                counters: counters(connection.counters),
            })
            .collect(),
        counters: answer
            .counters
            .into_iter()
            .map(|counted| (ConnectionId(counted.id.0), counters(counted.counters)))
            .collect(),
        upstream_ready: match answer.upstream {
            wire::Upstream::Unknown => None,
            wire::Upstream::Ready => Some(true),
            wire::Upstream::Starting | wire::Upstream::Unreachable => Some(false),
        },
    }
}
