//! The clients: those who LIST and read slowly, and bystanders who wait.
//!
//! Input: an address. Output: what was answered, and how long bystanders waited, each request from when it was due.
//! Must never read faster than it says, nor let a bystander's slow answer keep its next request back.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderValue, Request, header};
use rustls_pki_types::ServerName;
use tokio::{
    net::TcpStream,
    time::{Instant, interval, sleep, timeout_at},
};
use tokio_rustls::TlsConnector;

use super::{
    Effort,
    world::{LIST, World},
};
use crate::{
    h2wire::client_config,
    pki::{Pair, SERVER_NAME},
};

/// Windows of who floods: small, so that what is not read stays with the apiserver.
const STREAM_WINDOW: u32 = 128 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;

/// How often each bystander asks.
const EACH: Duration = Duration::from_millis(100);

/// How many bystanders there are.
const BYSTANDERS: usize = 2;

/// What who floods calls itself, as Cilium's agent does.
const USER_AGENT: &str = "cilium-agent/1.13";

/// What bystanders ask for: one small object, which is not there.
const ASKED: &str = "/api/v1/nodes/bystander";

/// For so long bystanders ask before the flood.
const CALM: Duration = Duration::from_secs(3);

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Flood {
    /// Answers to who floods, by status; `cut` are those that the end of the flood cut off.
    pub statuses: BTreeMap<String, u64>,
    /// Whole LISTs.
    pub lists: u64,
    /// How long bystanders waited, in milliseconds, from the shortest on.
    pub waits: Vec<f64>,
    /// The same before the flood.
    pub calm: Vec<f64>,
    /// Bystanders' requests that were refused or failed.
    pub failed: u64,
}

impl Flood {
    /// What 99 of 100 bystanders' requests took at most.
    pub fn p99_ms(&self) -> f64 {
        at(&self.waits, 0.99)
    }

    /// The same before the flood.
    pub fn calm_p99_ms(&self) -> f64 {
        at(&self.calm, 0.99)
    }

    /// The median.
    pub fn p50_ms(&self) -> f64 {
        at(&self.waits, 0.5)
    }

    /// The longest.
    pub fn max_ms(&self) -> f64 {
        self.waits.last().copied().unwrap_or(f64::NAN)
    }
}

fn at(sorted: &[f64], part: f64) -> f64 {
    let index = (sorted.len() as f64 * part) as usize;
    sorted
        .get(index.min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or(f64::NAN)
}

/// Connects everybody, says so to `begins`, and floods for so long.
///
/// # Errors
///
/// Somebody cannot connect.
pub fn flood(
    world: &World,
    address: SocketAddr,
    effort: &Effort,
    duration: Duration,
    begins: impl FnOnce() -> anyhow::Result<()> + Send,
) -> anyhow::Result<Flood> {
    // A thread of its own, and a runtime whose threads are that one's: a namespace is entered for good.
    std::thread::scope(|scope| {
        let run = scope.spawn(|| -> anyhow::Result<Flood> {
            world.namespace.enter()?;
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()?;
            runtime.block_on(all(world, address, effort, duration, begins))
        });
        run.join()
            .map_err(|_| anyhow::anyhow!("the clients' thread panicked"))?
    })
}

async fn all(
    world: &World,
    address: SocketAddr,
    effort: &Effort,
    duration: Duration,
    begins: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Flood> {
    let seen = Arc::new(Mutex::new(Flood::default()));
    let mut flooders = Vec::new();
    for _ in 0..effort.clients {
        flooders.push(Client::connect(world, None, address).await?);
    }
    let mut bystanders = Vec::new();
    for _ in 0..BYSTANDERS {
        bystanders.push(Client::connect(world, Some(&world.bystander), address).await?);
    }
    let calm_until = Instant::now() + CALM;
    let calm: Vec<_> = bystanders
        .iter()
        .map(|one| tokio::spawn(ask_on(one.clone(), calm_until, Arc::clone(&seen))))
        .collect();
    for one in calm {
        one.await?;
    }
    {
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.calm = std::mem::take(&mut seen.waits);
        seen.calm.sort_by(f64::total_cmp);
        anyhow::ensure!(
            seen.failed == 0 && !seen.calm.is_empty(),
            "bystanders are refused without a flood"
        );
    }
    begins()?;
    let until = Instant::now() + duration;
    let mut running = Vec::new();
    for one in flooders {
        running.push(tokio::spawn(list_on(one, effort.pace, until, Arc::clone(&seen))));
    }
    for one in bystanders {
        running.push(tokio::spawn(ask_on(one, until, Arc::clone(&seen))));
    }
    for one in running {
        one.await?;
    }
    let mut seen = std::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner));
    seen.waits.sort_by(f64::total_cmp);
    Ok(seen)
}

/// A connection, and whose requests go over it.
#[derive(Clone)]
struct Client {
    sender: SendRequest<Bytes>,
    user_agent: &'static str,
    /// Of who has no certificate.
    authorization: Option<HeaderValue>,
}

impl Client {
    /// A node's with its certificate, or one with the token of who floods.
    async fn connect(world: &World, certificate: Option<&Pair>, address: SocketAddr) -> anyhow::Result<Self> {
        let config = client_config(&world.pki, certificate, b"h2")?;
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let tls = TlsConnector::from(Arc::new(config))
            .connect(ServerName::try_from(SERVER_NAME)?, stream)
            .await?;
        let (sender, connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .enable_push(false)
            .handshake(tls)
            .await?;
        tokio::spawn(async move {
            // How it ends, its requests say.
            let _ = connection.await;
        });
        let (user_agent, authorization) = match certificate {
            Some(_) => ("kubelet/v1.36", None),
            None => (
                USER_AGENT,
                Some(HeaderValue::try_from(format!("Bearer {}", world.token))?),
            ),
        };
        let client = Self {
            sender,
            user_agent,
            authorization,
        };
        // It is known before the flood.
        let answer = client.ask("/version").await.context("a client's first request")?;
        anyhow::ensure!(answer == 200, "/version is answered with {answer}");
        Ok(client)
    }

    fn request(&self, path: &str) -> Request<()> {
        let mut request = Request::get(format!("https://{SERVER_NAME}{path}"))
            .header(header::USER_AGENT, self.user_agent)
            .header(header::ACCEPT, "application/json")
            .body(())
            .expect("a request");
        if let Some(authorization) = &self.authorization {
            request
                .headers_mut()
                .insert(header::AUTHORIZATION, authorization.clone());
        }
        request
    }

    /// One request, its body thrown away; the status.
    async fn ask(&self, path: &str) -> anyhow::Result<u16> {
        let mut ready = self.sender.clone().ready().await?;
        let (answer, _) = ready.send_request(self.request(path), true)?;
        let answer = answer.await?;
        let status = answer.status().as_u16();
        let mut body = answer.into_body();
        while let Some(chunk) = body.data().await {
            body.flow_control().release_capacity(chunk?.len())?;
        }
        Ok(status)
    }

    /// A LIST, read at that pace; the status.
    async fn list(&self, pace: usize) -> anyhow::Result<u16> {
        let mut ready = self.sender.clone().ready().await?;
        let (answer, _) = ready.send_request(self.request(LIST), true)?;
        let answer = answer.await?;
        let status = answer.status().as_u16();
        let mut body = answer.into_body();
        while let Some(chunk) = body.data().await {
            let length = chunk?.len();
            sleep(Duration::from_secs_f64(length as f64 / pace as f64)).await;
            body.flow_control().release_capacity(length)?;
        }
        Ok(status)
    }
}

/// A bystander: one request each [`EACH`], whatever became of the ones before.
async fn ask_on(client: Client, until: Instant, seen: Arc<Mutex<Flood>>) {
    let mut due = interval(EACH);
    let mut asked = Vec::new();
    while Instant::now() < until {
        let began = due.tick().await;
        let (client, seen) = (client.clone(), Arc::clone(&seen));
        asked.push(tokio::spawn(async move {
            // What has no answer at the end has waited until then, at least.
            let answer = timeout_at(until, client.ask(ASKED)).await;
            let waited = began.elapsed().as_secs_f64() * 1e3;
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.waits.push(waited);
            seen.failed += u64::from(matches!(answer, Ok(Err(_))) || matches!(answer, Ok(Ok(status)) if status != 404));
        }));
    }
    for one in asked {
        // A panic is the test's own.
        let _ = one.await;
    }
}

/// One who floods: a LIST after the other, each read slowly; after 429 it comes again when it is told to.
async fn list_on(client: Client, pace: usize, until: Instant, seen: Arc<Mutex<Flood>>) {
    while Instant::now() < until {
        let outcome = match timeout_at(until, client.list(pace)).await {
            Err(_) => "cut".to_owned(),
            Ok(Ok(status)) => status.to_string(),
            Ok(Err(_)) => "failed".to_owned(),
        };
        {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.lists += u64::from(outcome == "200");
            *seen.statuses.entry(outcome.clone()).or_default() += 1;
        }
        if outcome != "200" {
            sleep(Duration::from_secs(1)).await;
        }
    }
}
