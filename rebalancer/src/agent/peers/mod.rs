//! Agents talk to each other: `GET /v1/snapshot` over HTTP/1.1 with mutual TLS.
//!
//! Job: answer with this apiserver's snapshot, and ask each peer for its own once a second.
//! Must never answer or believe anyone who is not known by the peers' CA for one of the peers' hosts, or by a key that an
//! agent's Lease names.

mod dial;
mod listen;
mod manners;
pub mod pin;
pub mod tls;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    Json, Router,
    extract::{ConnectInfo, State},
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::get,
};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use rebalancer_core::{
    agent::{Input, Switch},
    membership::KeyHash,
    policy::Policy,
    view::{PeerFault, Snapshot},
};
use serde_json::Value;
use tokio::{
    net::TcpStream,
    sync::mpsc,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_rustls::TlsConnector;

pub use listen::{Asker, TlsListener};
pub use manners::{Manner, Manners};
use tls::PeerTls;

use super::{config::PeerAddress, handle::AgentHandle, wire::WireSnapshot};
use crate::local::Problem;

/// How often a peer is asked: how soon it is seen where clients land decides how long a rebalancing takes.
const POLL: Duration = Duration::from_millis(500);

/// How long a connection may take, with its handshake, and how long an answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// How large an answer may be.
const LARGEST: usize = 64 * 1024;

/// Answers who asks on the peers' port, for as long as the agent runs.
pub async fn serve(listener: TlsListener, agent: AgentHandle, tls: Arc<PeerTls>) {
    let routes = Router::new()
        .route("/v1/snapshot", get(snapshot))
        .with_state((agent, tls))
        .into_make_service_with_connect_info::<Asker>();
    if let Err(error) = axum::serve(listener, routes).await {
        tracing::error!(%error, "the peers' port failed");
    }
}

async fn snapshot(
    ConnectInfo(asker): ConnectInfo<Asker>,
    State((agent, tls)): State<(AgentHandle, Arc<PeerTls>)>,
) -> Result<Response, Problem> {
    // With each request: who has left since the handshake may not read any more.
    if let Err(why) = tls.admits(asker.certificate.as_ref()) {
        return Err(Problem::new(StatusCode::FORBIDDEN, why));
    }
    agent
        .read(|agent, now| WireSnapshot::of(&agent.snapshot(now), agent.policy()))
        .await
        .map(|snapshot| ([(header::SERVER, manners::SERVER)], Json(snapshot)).into_response())
        .map_err(|gone| Problem::new(StatusCode::SERVICE_UNAVAILABLE, gone.to_string()))
}

/// A connection to a peer, and what it was made with.
struct Link {
    sender: SendRequest<Empty<Bytes>>,
    /// Where it leads, for messages.
    at: String,
    generation: u64,
}

/// A peer to be asked.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its name and where it answers.
    pub at: PeerAddress,
    /// The key it is known by; by its certificate without.
    pub pin: Option<KeyHash>,
}

/// What a peer answered, or why it did not.
#[derive(Debug)]
pub struct Answer {
    /// Who was asked.
    pub target: Target,
    /// The answer.
    pub said: Result<Snapshot, PeerFault>,
    /// What was said to all agents, where the answer is not understood otherwise.
    pub word: Option<Switch>,
}

impl Answer {
    /// As the core is told it.
    pub fn inputs(self) -> impl Iterator<Item = Input> {
        let name = self.target.at.name;
        let word = self.word.map(|word| Input::Word(name.clone(), word));
        word.into_iter().chain([Input::Peer(name, self.said)])
    }
}

/// Asks one peer, for as long as somebody listens.
pub async fn follow(
    target: Target,
    tls: Arc<PeerTls>,
    policy: Arc<Policy>,
    manners: Manners,
    answers: mpsc::Sender<Answer>,
) {
    let mut ticks = interval(POLL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut link: Option<Link> = None;
    loop {
        ticks.tick().await;
        let generation = tls.generation();
        // A renewed certificate is shown at once, or the peer would see the old one until it has expired.
        let usable = link
            .take()
            .filter(|link| !link.sender.is_closed() && link.generation == generation);
        let mut word = None;
        let said = async {
            let mut connected = match usable {
                Some(link) => link,
                None => connect(&target, &tls).await?,
            };
            let asked = timeout(PATIENCE, ask(&target.at, &mut connected, &policy, &manners, &mut word)).await;
            let snapshot = asked.unwrap_or_else(|_| {
                let why = format!("{} gave no answer within {} s", connected.at, PATIENCE.as_secs());
                Err(PeerFault::Unreachable(why))
            })?;
            link = Some(connected);
            Ok(snapshot)
        }
        .await;
        let target = target.clone();
        if answers.send(Answer { target, said, word }).await.is_err() {
            return;
        }
    }
}

/// Asks the peers that flags name, and tells the loop what they answer.
pub fn ask_all(
    addresses: &[PeerAddress],
    tls: &Arc<PeerTls>,
    policy: &Arc<Policy>,
    manners: &Manners,
    inputs: &mpsc::Sender<Input>,
) {
    let (answers, mut answered) = mpsc::channel::<Answer>(64);
    for at in addresses {
        let target = Target {
            at: at.clone(),
            pin: None,
        };
        tokio::spawn(follow(
            target,
            Arc::clone(tls),
            Arc::clone(policy),
            manners.clone(),
            answers.clone(),
        ));
    }
    let inputs = inputs.clone();
    tokio::spawn(async move {
        while let Some(answer) = answered.recv().await {
            for input in answer.inputs() {
                if inputs.send(input).await.is_err() {
                    return;
                }
            }
        }
    });
}

async fn connect(target: &Target, tls: &PeerTls) -> Result<Link, PeerFault> {
    let address = &target.at;
    let (client, generation) = tls
        .client(target.pin)
        .map_err(|error| PeerFault::Refused(format!("{error:#}")))?;
    let attempt = |to: SocketAddr| {
        let connector = TlsConnector::from(Arc::clone(&client));
        let name = address.server_name.clone();
        async move {
            let stream = TcpStream::connect(to)
                .await
                .map_err(|error| PeerFault::Unreachable(error.to_string()))?;
            connector
                .connect(name, stream)
                .await
                .map_err(|error| PeerFault::Refused(error.to_string()))
        }
    };
    let (to, stream) = dial::dial(&address.host, address.port, PATIENCE, attempt).await?;
    let at = if address.host == to.ip().to_string() {
        to.to_string()
    } else {
        format!("{} ({to})", address.host)
    };
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| PeerFault::Refused(format!("{at}: {error}")))?;
    tokio::spawn(connection);
    Ok(Link { sender, at, generation })
}

async fn ask(
    address: &PeerAddress,
    link: &mut Link,
    policy: &Policy,
    manners: &Manners,
    word: &mut Option<Switch>,
) -> Result<Snapshot, PeerFault> {
    let at = link.at.clone();
    let refused = |why: &dyn std::fmt::Display| PeerFault::Refused(format!("{at}: {why}"));
    let request = http::Request::get("/v1/snapshot")
        .header(http::header::HOST, format!("{}:{}", address.host, address.port))
        .body(Empty::new())
        .map_err(|error| refused(&error))?;
    let asked = SystemTime::now();
    let answer = link
        .sender
        .send_request(request)
        .await
        // A server that refuses this agent's certificate says so only now (TLS 1.3).
        .map_err(|error| refused(&root_cause(&error)))?;
    manners.note(&address.name, Manner::of(answer.headers(), asked, SystemTime::now()));
    let status = answer.status();
    let body = Limited::new(answer.into_body(), LARGEST)
        .collect()
        .await
        .map_err(|error| refused(&error))?
        .to_bytes();
    if status != http::StatusCode::OK {
        let problem: Value = serde_json::from_slice(&body).unwrap_or_default();
        return Err(refused(&problem["detail"].as_str().unwrap_or(status.as_str())));
    }
    let said = WireSnapshot::read(&body, policy);
    if matches!(said, Err(PeerFault::Disagrees(_))) {
        *word = WireSnapshot::word_of(&address.name, &body);
    }
    said
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}
