//! The port a load balancer asks: HAProxy's agent check, and `GET /lb` for those that know health checks only.
//!
//! Input: connections of strangers; the core's advice. Output: one answer each.
//! Must never make the agent's loop work for a stranger, nor hold more than a few of them for more than a moment.

use std::{net::SocketAddr, time::Duration};

use anyhow::Context as _;
use axum::serve::Listener;
use prometheus_client::metrics::{counter::Counter, family::Family};
use rebalancer_core::agent::{Advice, Agent};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpListener,
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use super::{handle::AgentHandle, metrics::KindLabel, places::Places};
use crate::listen;

/// Connections at once, and those of one address. Whoever is refused takes this apiserver for dead: strangers who say
/// nothing must be many to hold all of them.
const PLACES: (usize, usize) = (512, 16);

/// A connection is over after that, whatever has become of it: a load balancer's question is one packet.
const DEADLINE: Duration = Duration::from_secs(1);

/// HAProxy says nothing unless told to (`agent-send`) and waits for the answer: who is silent for so long is one.
const SILENCE: Duration = Duration::from_millis(300);

/// A request's head has so many octets at most.
const LARGEST: usize = 2_048;

/// How often the core is asked; every answer is as of then.
const LOOK: Duration = Duration::from_millis(250);

/// Advice that is older than this is none: the loop stands still.
const STALE: Duration = Duration::from_secs(10);

/// The advice, and when it was given.
type Told = watch::Receiver<(Advice, Instant)>;

/// What is counted.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Answers, by what they were.
    pub answers: Family<KindLabel, Counter>,
}

/// Listens; nobody is served before [`LbPort::serve`].
pub struct LbPort {
    listener: TcpListener,
    counts: Counts,
}

impl LbPort {
    /// Listens.
    ///
    /// # Errors
    ///
    /// Names the address and what the system says.
    pub fn bind(address: SocketAddr, counts: Counts) -> anyhow::Result<Self> {
        let listener = listen::listen(address).map_err(|error| {
            let hint = listen::hint(address, &error);
            anyhow::Error::new(error).context(format!("--lb-agent {address}: cannot listen there; {hint}"))
        });
        Ok(Self {
            listener: listener.context("the load balancer's port")?,
            counts,
        })
    }

    /// Answers from now on, in tasks of its own.
    pub fn serve(mut self, agent: AgentHandle) {
        let (tell, told) = watch::channel((Advice::default(), Instant::now()));
        tokio::spawn(look(agent, tell));
        tokio::spawn(async move {
            let places = Places::new(PLACES.0, PLACES.1);
            loop {
                let (stream, from) = Listener::accept(&mut self.listener).await;
                let Some(place) = places.take(from.ip()) else {
                    self.counts.count("refused");
                    continue;
                };
                let (told, counts) = (told.clone(), self.counts.clone());
                tokio::spawn(async move {
                    let kind = timeout(DEADLINE, answer(stream, &told)).await;
                    counts.count(kind.unwrap_or("too_slow"));
                    drop(place);
                });
            }
        });
    }
}

impl Counts {
    fn count(&self, kind: &'static str) {
        self.answers.get_or_create(&KindLabel { kind }).inc();
    }
}

/// Asks the core now and then, for as long as somebody may ask.
async fn look(agent: AgentHandle, tell: watch::Sender<(Advice, Instant)>) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Ok(advice) = agent.read(|agent: &Agent, now| agent.advice(now)).await else {
            return;
        };
        if tell.send((advice, Instant::now())).is_err() {
            return;
        }
    }
}

/// What is advised; while the loop stands still, only that nobody is to be sent, if that was so.
fn advice(told: &Told, now: Instant) -> Advice {
    let (advice, at) = *told.borrow();
    if now.saturating_duration_since(at) <= STALE {
        return advice;
    }
    Advice {
        drains: advice.drains,
        ..Advice::default()
    }
}

/// Answers one connection, and says what kind of answer it was.
async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin, told: &Told) -> &'static str {
    let mut head = Vec::with_capacity(LARGEST);
    let mut octets = [0; LARGEST];
    loop {
        let room = LARGEST - head.len();
        match timeout(SILENCE, stream.read(&mut octets[..room])).await {
            // Silent so far, or it has said all it will.
            Err(_) if !may_be_http(&head) => break,
            Err(_) => continue,
            Ok(Ok(0)) => break,
            Ok(Ok(count)) => head.extend_from_slice(&octets[..count]),
            Ok(Err(_)) => return "broken",
        }
        let is_whole = head.windows(4).any(|four| four == b"\r\n\r\n");
        if is_whole || !may_be_http(&head) || head.len() == LARGEST {
            break;
        }
    }
    let advice = advice(told, Instant::now());
    let (text, kind) = match request(&head) {
        None => agent_check(advice),
        Some(request) => health_check(request, advice),
    };
    // Whoever does not take it has gone.
    let _ = stream.write_all(text.as_bytes()).await;
    let _ = stream.shutdown().await;
    kind
}

const METHODS: [&str; 9] = [
    "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT",
];

/// Whether it may become an HTTP request: it begins like one, as far as it goes.
fn may_be_http(head: &[u8]) -> bool {
    let begins = |method: &&str| {
        let method = method.as_bytes();
        let common = head.len().min(method.len());
        head[..common] == method[..common] && head.get(method.len()).is_none_or(|next| *next == b' ')
    };
    !head.is_empty() && METHODS.iter().any(begins)
}

/// The first line of a whole head: method and target.
fn request(head: &[u8]) -> Option<(&str, &str)> {
    let line = std::str::from_utf8(head.split(|octet| *octet == b'\n').next()?).ok()?;
    let mut words = line.trim_end().split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    (METHODS.contains(&method) && version.starts_with("HTTP/1.") && words.next().is_none()).then_some((method, target))
}

/// HAProxy's agent check: words with spaces between them and a line feed (configuration manual, `agent-check`). `up` is said
/// whatever the apiserver does, which HAProxy's own checks find out: a `down` would outlive this agent. `ready` ends an
/// earlier `drain`.
fn agent_check(advice: Advice) -> (String, &'static str) {
    match advice {
        Advice { drains: true, .. } => ("drain\n".to_owned(), "drain"),
        Advice {
            returns: true, percent, ..
        } => (format!("ready up {percent}%\n"), "share"),
        Advice { percent, .. } => (format!("up {percent}%\n"), "share"),
    }
}

fn health_check((method, target): (&str, &str), advice: Advice) -> (String, &'static str) {
    let path = target.split('?').next().unwrap_or_default();
    let (status, body, kind) = match (method, path) {
        ("GET" | "HEAD", "/lb") if advice.drains => ("503 Service Unavailable", "evacuating\n", "http_503"),
        ("GET" | "HEAD", "/lb") if advice.is_down => ("503 Service Unavailable", "down\n", "http_503"),
        ("GET" | "HEAD", "/lb") => ("200 OK", "ok\n", "http_200"),
        (_, "/lb") => ("405 Method Not Allowed", "GET /lb\n", "http_other"),
        _ => ("404 Not Found", "GET /lb\n", "http_other"),
    };
    let allow = if status.starts_with("405") {
        "Allow: GET, HEAD\r\n"
    } else {
        ""
    };
    let length = body.len();
    let body = if method == "HEAD" { "" } else { body };
    let text = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n{allow}Cache-Control: \
         no-store\r\nConnection: close\r\n\r\n{body}"
    );
    (text, kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(advice: Advice) -> Told {
        watch::channel((advice, Instant::now())).1
    }

    const SHARE: Advice = Advice {
        drains: false,
        returns: false,
        is_down: false,
        percent: 37,
    };

    /// What somebody is answered who writes these, one after the other.
    async fn asked(parts: &[&str], advice: Advice) -> (String, &'static str) {
        let (mut near, far) = tokio::io::duplex(64 * 1024);
        let told = told(advice);
        let write = async {
            for part in parts {
                near.write_all(part.as_bytes()).await.expect("it is read");
                tokio::task::yield_now().await;
            }
            let mut answer = String::new();
            near.read_to_string(&mut answer).await.expect("an answer");
            answer
        };
        tokio::join!(write, answer(far, &told))
    }

    #[tokio::test]
    async fn haproxy_is_told_a_share_or_to_send_nobody() {
        let evacuated = Advice { drains: true, ..SHARE };
        let returned = Advice { returns: true, ..SHARE };
        let down = Advice { is_down: true, ..SHARE };
        for (advice, expected) in [
            (SHARE, "up 37%\n"),
            (evacuated, "drain\n"),
            (returned, "ready up 37%\n"),
            (down, "up 37%\n"),
        ] {
            for said in [&[][..], &["apiserver\n"], &["x"], &["GETAWAY\n"], &["\0\0\r\n\r\n"]] {
                assert_eq!(asked(said, advice).await.0, expected, "{said:?}");
            }
        }
    }

    #[tokio::test]
    async fn health_checks_are_answered_by_http() {
        let evacuated = Advice { drains: true, ..SHARE };
        let down = Advice { is_down: true, ..SHARE };
        for (said, advice, status, body) in [
            (&["GET /lb HTTP/1.1\r\nHost: a\r\n\r\n"][..], SHARE, "200", "ok\n"),
            (&["G", "ET /lb HT", "TP/1.0\r\n", "\r\n"], SHARE, "200", "ok\n"),
            (&["GET /lb?x=1 HTTP/1.1\r\n\r\n"], evacuated, "503", "evacuating\n"),
            (&["HEAD /lb HTTP/1.1\r\n\r\n"], evacuated, "503", ""),
            (&["GET /lb HTTP/1.1\r\n\r\n"], down, "503", "down\n"),
            (&["GET / HTTP/1.1\r\n\r\n"], SHARE, "404", "GET /lb\n"),
            (&["POST /lb HTTP/1.1\r\n\r\n"], SHARE, "405", "GET /lb\n"),
        ] {
            let (text, _) = asked(said, advice).await;
            let (head, tail) = text.split_once("\r\n\r\n").expect("a head");
            assert_eq!((&head[9..12], tail), (status, body), "{said:?}: {text}");
        }
    }

    #[tokio::test]
    async fn a_head_without_an_end_is_cut_at_its_limit() {
        let long = format!("GET /lb HTTP/1.1\r\nX: {}", "x".repeat(2 * LARGEST));
        assert_eq!(asked(&[&long], SHARE).await.1, "http_200");
    }

    #[test]
    fn while_the_loop_stands_still_only_an_evacuation_is_remembered() {
        for (advice, expected) in [(SHARE, "up 100%\n"), (Advice { drains: true, ..SHARE }, "drain\n")] {
            let told = told(advice);
            let later = Instant::now() + STALE * 2;
            assert_eq!(agent_check(super::advice(&told, later)).0, expected);
        }
    }
}
