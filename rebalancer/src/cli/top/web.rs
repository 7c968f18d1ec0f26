//! `top --web`: the same for browsers, by a process of its own, so that the agent opens no port for it.
//!
//! Input: the agent's local API. Output: one page, its figures as JSON, and a stream of them. Must never take a request that
//! changes anything, say who a client is unless it was allowed, or answer a name that another site could give itself.

use std::{
    collections::VecDeque,
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    path::Path,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicUsize, atomic::Ordering::Relaxed},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use axum::{
    Json, Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderValue, StatusCode, header},
    middleware::{Next, from_fn},
    response::{IntoResponse as _, Response},
    routing::get,
};
use bytes::Bytes;
use http_body_util::channel::Channel;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use serde_json::{Map, Value, json};
use socket2::SockRef;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, watch},
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use super::{ask, model::Answers};
use crate::cli::show;

/// How often the agent is asked, and readers hear of it.
const LOOK: Duration = Duration::from_secs(2);

/// An hour of looks.
const POINTS: usize = 1_800;

/// Readers at a time; each costs a task and a buffer.
const READERS: usize = 64;

/// Connections at a time, those of readers included: one more is closed as it comes.
const PLACES: usize = 128;

/// How long the head of a request may take, and the pause before the next one.
const HEAD: Duration = Duration::from_secs(10);

/// How long a browser may take nothing of what is sent to it.
const SILENCE: Duration = Duration::from_secs(30);

/// The pause after a connection that cannot be accepted: mostly there is no descriptor left.
const RETRY: Duration = Duration::from_millis(100);

/// Decisions that are shown.
const DECISIONS: usize = 40;

/// Connections that are shown where they may be.
const CONNECTIONS: usize = 50;

/// An address, or a port of 127.0.0.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(pub SocketAddr);

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let here = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let port = text.parse().map(here);
        port.or_else(|_| text.parse())
            .map(Self)
            .map_err(|_| format!("{text}: a port of 127.0.0.1 is wanted, or ADDRESS:PORT"))
    }
}

/// What is served.
#[derive(Clone)]
struct Shown {
    history: Arc<Mutex<VecDeque<Value>>>,
    newest: watch::Receiver<Value>,
    readers: Arc<AtomicUsize>,
}

/// Serves until it is told to end.
///
/// # Errors
///
/// It cannot listen there, or the agent does not answer at the start.
pub async fn run(socket: &Path, address: SocketAddr, names: bool) -> anyhow::Result<()> {
    let first = ask(socket, "age").await?;
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("--web {address}: cannot listen there"))?;
    let local = listener.local_addr()?;
    let (figures, newest) = watch::channel(figures(Ok(&first), names));
    let history = Arc::new(Mutex::new(VecDeque::new()));
    keep(&history, &first);
    let shown = Shown {
        history: Arc::clone(&history),
        newest,
        readers: Arc::default(),
    };
    eprintln!("http://{local}/ shows what `rebalancer top` does");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let served = serve(listener, router(shown, SILENCE), SILENCE);
    tokio::pin!(served);
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            never = &mut served => match never {},
            _ = ticks.tick() => {
                let answer = ask(socket, "age").await;
                if let Ok(answers) = &answer {
                    keep(&history, answers);
                }
                let answer = answer.map_err(|error| format!("{error:#}"));
                figures.send_modify(|last| match &answer {
                    Ok(answers) => *last = self::figures(Ok(answers), names),
                    // The last ones stay, and say that they are old.
                    Err(fault) => last["fault"] = Value::from(fault.as_str()),
                });
            }
        }
    }
}

/// Answers whoever connects, within [`PLACES`]; who takes nothing for `silence` is gone.
async fn serve(listener: TcpListener, router: Router, silence: Duration) -> Infallible {
    let places = Arc::new(Semaphore::new(PLACES));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            sleep(RETRY).await;
            continue;
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            continue;
        };
        // Of a peer that is there and has its window shut, too (tcp(7)).
        if SockRef::from(&stream).set_tcp_user_timeout(Some(silence)).is_err() {
            continue;
        }
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let _place = place;
            let mut server = http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(HEAD);
            // How a browser leaves is its own affair.
            let _ = server.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// What is served; a reader that takes no figures for `silence` is one no more.
fn router(shown: Shown, silence: Duration) -> Router {
    let text =
        |kind: &'static str, text: &'static str| get(move || async move { ([(header::CONTENT_TYPE, kind)], text) });
    Router::new()
        .route("/", text("text/html; charset=utf-8", include_str!("page/page.html")))
        .route(
            "/page.css",
            text("text/css; charset=utf-8", include_str!("page/page.css")),
        )
        .route(
            "/page.js",
            text("text/javascript; charset=utf-8", include_str!("page/page.js")),
        )
        .route("/figures.json", get(now))
        .route("/events", get(move |shown| events(shown, silence)))
        .with_state(shown)
        .layer(from_fn(guarded))
}

/// What every answer carries: nothing is loaded from elsewhere, shown within another page, or kept.
const HEADERS: [(header::HeaderName, &str); 5] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-store"),
    (
        header::HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
];

/// Answers only who calls this server by an address: a name could be another site's, which makes it lead here to read the
/// page (DNS rebinding).
async fn guarded(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let mut response = if host.is_some_and(is_address) {
        next.run(request).await
    } else {
        let why = "call this server by its address, or by localhost: a name could be another site's\n";
        (StatusCode::MISDIRECTED_REQUEST, why).into_response()
    };
    for (name, value) in HEADERS {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

fn is_address(host: &str) -> bool {
    let is_port = |port: &str| port.parse::<u16>().is_ok();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if is_port(port) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

/// The newest figures, with the last hour.
async fn now(State(shown): State<Shown>) -> Json<Value> {
    let mut figures = shown.newest.borrow().clone();
    let history = shown.history.lock().unwrap_or_else(PoisonError::into_inner);
    figures["history"] = history.iter().cloned().collect();
    Json(figures)
}

/// One reader less, however it goes.
struct Reader(Arc<AtomicUsize>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Figures as they come (server-sent events).
async fn events(State(shown): State<Shown>, silence: Duration) -> Response {
    let reader = Reader(Arc::clone(&shown.readers));
    if shown.readers.fetch_add(1, Relaxed) >= READERS {
        let why = format!("{READERS} readers are there already\n");
        return (StatusCode::SERVICE_UNAVAILABLE, why).into_response();
    }
    let mut newest = shown.newest;
    let (mut sender, body) = Channel::<Bytes, Infallible>::new(4);
    tokio::spawn(async move {
        let _reader = reader;
        while newest.changed().await.is_ok() {
            let event = format!("data: {}\n\n", *newest.borrow_and_update());
            if !matches!(timeout(silence, sender.send_data(event.into())).await, Ok(Ok(()))) {
                return;
            }
        }
    });
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::new(body)).into_response()
}

fn keep(history: &Mutex<VecDeque<Value>>, answers: &Answers) {
    let mut history = history.lock().unwrap_or_else(PoisonError::into_inner);
    history.push_back(point(answers));
    if history.len() > POINTS {
        history.pop_front();
    }
}

/// What is drawn of a moment: each apiserver's load.
fn point(answers: &Answers) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let loads: Map<String, Value> = show::list(&answers.status["view"])
        .iter()
        .map(|entry| (show::text(&entry["apiserver"]), entry["load"].clone()))
        .collect();
    json!({"t": now.map_or(0, |now| now.as_secs()), "loads": loads})
}

/// Members of a status that say nothing of any client.
const OF_STATUS: [&str; 19] = [
    "node",
    "version",
    "uptime_s",
    "mode",
    "paused",
    "pause",
    "source",
    "shim",
    "weight",
    "skew",
    "trigger",
    "skew_target",
    "hold_since_s",
    "mean",
    "rho",
    "view",
    "goaways_total",
    "outcomes",
    "warnings",
];

/// The hold whose sentence names a client.
const NAMES_A_CLIENT: &str = "unmovable";

/// What a page is given: chosen, not filtered, so that what is added to the API later does not show by itself.
fn figures(answers: Result<&Answers, &str>, names: bool) -> Value {
    let answers = match answers {
        Ok(answers) => answers,
        Err(fault) => return json!({"fault": fault}),
    };
    let status = &answers.status;
    let mut chosen: Map<String, Value> = OF_STATUS
        .iter()
        .map(|name| ((*name).to_owned(), status[*name].clone()))
        .collect();
    chosen.insert("hold".to_owned(), hold(&status["hold"], names));
    let peers = show::list(&status["peers"]).iter();
    chosen.insert(
        "peers".to_owned(),
        peers
            .map(|peer| json!({"apiserver": peer["apiserver"], "fault": peer["fault"]}))
            .collect(),
    );
    let decisions = show::list(&answers.decisions["decisions"]);
    let newest = &decisions[decisions.len().saturating_sub(DECISIONS)..];
    let mut figures = json!({
        "fault": null,
        "status": chosen,
        "point": point(answers),
        "decisions": newest.iter().map(|one| decision(one, names)).collect::<Vec<_>>(),
    });
    if names {
        let connections = show::list(&answers.connections["connections"]);
        let part = connections.iter().take(CONNECTIONS).cloned();
        figures["connections"] = part.collect();
    }
    figures
}

fn hold(hold: &Value, names: bool) -> Value {
    if hold["reason"] == NAMES_A_CLIENT && !names {
        let message = "whoever could be moved is too heavy (--names says who)";
        return json!({"reason": NAMES_A_CLIENT, "message": message});
    }
    match hold["reason"].as_str() {
        Some(reason) => json!({"reason": reason, "message": hold["message"]}),
        None => Value::Null,
    }
}

/// A decision with the numbers it follows from.
fn decision(decision: &Value, names: bool) -> Value {
    let mut numbers = Map::new();
    for field in ["mean", "skew", "threshold", "noise_floor", "rho", "quota"] {
        numbers.insert(field.replace('_', " "), show::text(&decision[field]).into());
    }
    for (field, value) in decision["derivation"].as_object().into_iter().flatten() {
        let shown = match value {
            Value::Array(names) => names.iter().map(show::text).collect::<Vec<_>>().join(", "),
            value => show::text(value),
        };
        numbers.insert(field.replace('_', " "), shown.into());
    }
    for outcome in ["pending", "draining", "moved", "returned", "lost"] {
        numbers.insert(outcome.to_owned(), show::text(&decision["outcomes"][outcome]).into());
    }
    json!({
        "id": decision["id"],
        "at": decision["at"],
        "mode": decision["mode"],
        "skew": decision["skew"],
        "hold": hold(&decision["hold"], names),
        "victims": show::list(&decision["victims"]).len(),
        "numbers": numbers,
    })
}

#[cfg(test)]
mod tests;
