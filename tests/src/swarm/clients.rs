//! Clients with client-go's semantics over hyper: one connection each, a list, a watch that is resumed by
//! resourceVersion, and a small request every now and then.
//!
//! A request that was certainly not processed is sent again, as net/http's HTTP/2 client does after GOAWAY
//! (RFC 9113, section 6.8) and REFUSED_STREAM; anything else that fails is an error.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use bytes::{Buf as _, Bytes, BytesMut};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper::{body::Incoming, client::conn::http2::SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, stdin},
    net::TcpStream,
    sync::{Mutex as AsyncMutex, Semaphore},
    time::{interval, sleep, timeout},
};
use tokio_rustls::TlsConnector;

use super::{Latency, Line};
use crate::pki::{Pair, SERVER_NAME};

/// What the swarm is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// The load balancer.
    pub server: SocketAddr,
    /// Who signs serving certificates.
    pub ca: PathBuf,
    /// One identity a client.
    pub identities: Vec<Pair>,
    /// Mean time between two small requests of a client.
    pub period: Duration,
}

/// Handshakes at once: the clients of a cluster have processors of their own, and these share one machine's with the
/// servers. Where that is slow, hundreds at once would all time out.
const DIALS: usize = 8;

/// How long a client waits before it tries again after a failure, and at most after several.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// How long a small request may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// From when on a small request has stalled.
const STALL: Duration = Duration::from_secs(1);

/// As client-go's `ReadIdleTimeout` and `PingTimeout` (k8s.io/apimachinery/pkg/util/net/http.go).
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(15));

#[derive(Default)]
struct Stats {
    mark: AtomicU64,
    /// When all was last set to nothing.
    since: Mutex<Option<Instant>>,
    requests: AtomicU64,
    stalls: AtomicU64,
    errors: AtomicU64,
    texts: Mutex<VecDeque<String>>,
    relists: AtomicU64,
    breaks: AtomicU64,
    resumes: AtomicU64,
    events: AtomicU64,
    missed: AtomicU64,
    doubled: AtomicU64,
    dials: AtomicU64,
    watching: AtomicU64,
    latencies: Mutex<Vec<f64>>,
}

impl Stats {
    fn error(&self, what: &str) {
        self.errors.fetch_add(1, Relaxed);
        let since = *self.since.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let what = match since {
            Some(since) => format!("{what} ({:.1} s after the last reset)", since.elapsed().as_secs_f64()),
            None => what.to_owned(),
        };
        let mut texts = self.texts.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if texts.len() == 10 {
            texts.pop_front();
        }
        texts.push_back(what);
    }

    fn reset(&self) {
        for counter in [
            &self.requests,
            &self.stalls,
            &self.errors,
            &self.relists,
            &self.breaks,
            &self.resumes,
            &self.events,
            &self.missed,
            &self.doubled,
            &self.dials,
        ] {
            counter.store(0, Relaxed);
        }
        self.texts
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .clear();
        self.latencies
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .clear();
        *self.since.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(Instant::now());
        self.mark();
    }

    fn mark(&self) {
        self.mark.fetch_add(1, Relaxed);
    }

    fn line(&self, clients: usize) -> Line {
        let mut latencies = self
            .latencies
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .clone();
        latencies.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let index = ((latencies.len() as f64 * share) as usize).min(latencies.len().saturating_sub(1));
            latencies.get(index).copied().unwrap_or(0.0)
        };
        let texts = self.texts.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        Line {
            mark: self.mark.load(Relaxed),
            clients: clients as u64,
            ready: self.watching.load(Relaxed),
            requests: self.requests.load(Relaxed),
            stalls: self.stalls.load(Relaxed),
            errors: self.errors.load(Relaxed),
            error_texts: Some(texts.iter().cloned().collect()),
            relists: self.relists.load(Relaxed),
            watch_breaks: self.breaks.load(Relaxed),
            watch_resumes: self.resumes.load(Relaxed),
            events: self.events.load(Relaxed),
            missed: self.missed.load(Relaxed),
            doubled: self.doubled.load(Relaxed),
            dials: self.dials.load(Relaxed),
            latency_ms: Latency {
                p50: at(0.5),
                p90: at(0.9),
                p99: at(0.99),
                max: latencies.last().copied().unwrap_or(0.0),
                count: latencies.len() as u64,
            },
            ports: None,
        }
    }
}

/// Runs until stdin ends or says `quit`; one line a second on stdout.
///
/// # Errors
///
/// An identity cannot be read, or stdout is closed.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let stats = Arc::new(Stats::default());
    let clients = options.identities.len();
    let dialing = Arc::new(Semaphore::new(DIALS));
    for (index, identity) in options.identities.iter().enumerate() {
        let (stats, dialing) = (Arc::clone(&stats), Arc::clone(&dialing));
        let client = Arc::new(Client::new(&options, identity, index, stats, dialing)?);
        // Spread over a second, as clients do not begin all at once.
        let offset = Duration::from_millis(index as u64 * 1000 / clients as u64);
        tokio::spawn(Arc::clone(&client).watch(offset));
        tokio::spawn(client.small_requests(offset, options.period));
    }
    let mut ticks = interval(Duration::from_secs(1));
    let mut commands = BufReader::new(stdin()).lines();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            command = commands.next_line() => match command?.as_deref() {
                Some("report") => stats.mark(),
                Some("reset") => stats.reset(),
                Some("quit") | None => return Ok(()),
                Some(other) => bail!("`{other}` is not a command: there is report, reset and quit"),
            },
        }
        use std::io::Write as _;
        let line = serde_json::to_string(&stats.line(clients))?;
        writeln!(std::io::stdout().lock(), "{line}").context("stdout is closed")?;
    }
}

type Sender = SendRequest<Empty<Bytes>>;

struct Client {
    server: SocketAddr,
    tls: TlsConnector,
    agent: String,
    stats: Arc<Stats>,
    dialing: Arc<Semaphore>,
    /// The connection that new requests use, and which one of this client's it is.
    sender: AsyncMutex<(u64, Option<Sender>)>,
}

impl Client {
    fn new(
        options: &Options,
        identity: &Pair,
        index: usize,
        stats: Arc<Stats>,
        dialing: Arc<Semaphore>,
    ) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(&options.ca)? {
            roots.add(certificate?)?;
        }
        let chain = CertificateDer::pem_file_iter(&identity.certificate)?.collect::<Result<Vec<_>, _>>()?;
        let mut tls = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(&identity.key)?)?;
        tls.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self {
            server: options.server,
            tls: TlsConnector::from(Arc::new(tls)),
            agent: format!("swarm/{index}"),
            stats,
            dialing,
            sender: AsyncMutex::default(),
        })
    }

    async fn connect(&self) -> anyhow::Result<Sender> {
        let _turn = self.dialing.acquire().await?;
        let stream = TcpStream::connect(self.server).await?;
        stream.set_nodelay(true)?;
        let stream = self.tls.connect(ServerName::try_from(SERVER_NAME)?, stream).await?;
        let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(KEEPALIVE.0)
            .keep_alive_timeout(KEEPALIVE.1)
            .handshake(TokioIo::new(stream))
            .await?;
        tokio::spawn(connection);
        self.stats.dials.fetch_add(1, Relaxed);
        Ok(sender)
    }

    fn request(&self, path: &str) -> anyhow::Result<Request<Empty<Bytes>>> {
        Ok(Request::get(format!("https://{SERVER_NAME}{path}"))
            .header(http::header::USER_AGENT, &self.agent)
            .body(Empty::new())?)
    }

    /// Sends on the current connection, or a new one when that takes no more.
    async fn send(&self, path: &str) -> anyhow::Result<Response<Incoming>> {
        const ATTEMPTS: usize = 6;
        for _ in 0..ATTEMPTS {
            let (which, mut sender) = {
                let mut current = self.sender.lock().await;
                let sender = match current.1.take().filter(|sender| !sender.is_closed()) {
                    Some(sender) => sender,
                    None => {
                        current.0 += 1;
                        self.connect().await?
                    }
                };
                (current.0, current.1.insert(sender).clone())
            };
            match sender.try_send_request(self.request(path)?).await {
                Ok(answer) => return Ok(answer),
                Err(mut error) => {
                    let never_sent = error.take_message().is_some();
                    let error = error.into_error();
                    let mut current = self.sender.lock().await;
                    // The other task may have a new connection already.
                    if current.0 == which {
                        current.1 = None;
                    }
                    if !never_sent && !is_unprocessed(&error) {
                        let on = format!("on the client's connection {which}");
                        return Err(anyhow::Error::new(error).context(on));
                    }
                }
            }
        }
        bail!("no connection took the request in {ATTEMPTS} attempts")
    }

    async fn small_requests(self: Arc<Self>, offset: Duration, period: Duration) {
        sleep(offset).await;
        let mut ticks = interval(period);
        loop {
            ticks.tick().await;
            let began = Instant::now();
            let asked = async {
                let answer = self.send("/api/v1/namespaces/swarm/configmaps/shared").await?;
                let status = answer.status();
                answer.into_body().collect().await?;
                anyhow::Ok(status)
            };
            match timeout(PATIENCE, asked).await {
                Ok(Ok(StatusCode::OK)) => {
                    self.stats.requests.fetch_add(1, Relaxed);
                    let took = began.elapsed();
                    self.stats.stalls.fetch_add((took > STALL).into(), Relaxed);
                    let mut latencies = self
                        .stats
                        .latencies
                        .lock()
                        .unwrap_or_else(|poisoned| poisoned.into_inner());
                    latencies.push(took.as_secs_f64() * 1000.0);
                }
                Ok(Ok(status)) => self.stats.error(&format!("get: {status}")),
                Ok(Err(error)) => self.stats.error(&format!("get: {error:#}")),
                Err(_) => self.stats.error("get: timed out"),
            }
        }
    }

    async fn watch(self: Arc<Self>, offset: Duration) {
        sleep(offset).await;
        let mut backoff = BACKOFF.0;
        let mut version: Option<u64> = None;
        let mut lists = 0;
        loop {
            let outcome = match version {
                None => {
                    lists += 1;
                    if lists > 1 {
                        self.stats.relists.fetch_add(1, Relaxed);
                    }
                    self.list().await.map(|listed| version = Some(listed))
                }
                Some(from) => {
                    let mut at = from;
                    let followed = self.follow(&mut at).await;
                    version = Some(at);
                    followed
                }
            };
            match outcome {
                Ok(()) => backoff = BACKOFF.0,
                Err(error) => {
                    self.stats.error(&format!(
                        "{}: {error:#}",
                        if version.is_none() { "list" } else { "watch" }
                    ));
                    sleep(backoff).await;
                    backoff = (backoff * 2).min(BACKOFF.1);
                }
            }
        }
    }

    async fn list(&self) -> anyhow::Result<u64> {
        let answer = timeout(PATIENCE, self.send("/api/v1/namespaces/swarm/configmaps")).await??;
        anyhow::ensure!(answer.status() == StatusCode::OK, "{}", answer.status());
        let body = answer.into_body().collect().await?.to_bytes();
        let list: serde_json::Value = serde_json::from_slice(&body)?;
        version_of(&list)
    }

    /// One watch, from its request to its end; `Ok` when it ended cleanly.
    async fn follow(&self, version: &mut u64) -> anyhow::Result<()> {
        let path = format!("/api/v1/namespaces/swarm/configmaps?watch=true&resourceVersion={version}");
        let answer = timeout(PATIENCE, self.send(&path)).await??;
        anyhow::ensure!(answer.status() == StatusCode::OK, "{}", answer.status());
        self.stats.resumes.fetch_add(1, Relaxed);
        self.stats.watching.fetch_add(1, Relaxed);
        let ended = self.events(answer.into_body(), version).await;
        self.stats.watching.fetch_sub(1, Relaxed);
        if let Err(error) = ended {
            self.stats.breaks.fetch_add(1, Relaxed);
            tracing::debug!("a watch broke: {error:#}");
        }
        Ok(())
    }

    async fn events(&self, mut body: Incoming, version: &mut u64) -> anyhow::Result<()> {
        let mut buffer = BytesMut::new();
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame?.into_data() {
                buffer.extend_from_slice(&data);
            }
            while let Some(end) = buffer.iter().position(|octet| *octet == b'\n') {
                let event: serde_json::Value = serde_json::from_slice(&buffer[..end])?;
                buffer.advance(end + 1);
                anyhow::ensure!(event["type"] == "MODIFIED", "an event is {event}");
                let seen = version_of(&event["object"])?;
                self.stats.events.fetch_add(1, Relaxed);
                if seen <= *version {
                    self.stats.doubled.fetch_add(1, Relaxed);
                } else {
                    self.stats.missed.fetch_add(seen - *version - 1, Relaxed);
                    *version = seen;
                }
            }
        }
        anyhow::ensure!(buffer.is_empty(), "the watch ended in the middle of an event");
        Ok(())
    }
}

fn version_of(object: &serde_json::Value) -> anyhow::Result<u64> {
    let text = object["metadata"]["resourceVersion"]
        .as_str()
        .with_context(|| format!("no resourceVersion in {object}"))?;
    Ok(text.parse()?)
}

/// Whether the server says that it did not process the request: REFUSED_STREAM, or a GOAWAY without error whose last
/// stream is lower.
fn is_unprocessed(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(h2) = cause.downcast_ref::<h2::Error>() {
            return match h2.reason() {
                Some(h2::Reason::REFUSED_STREAM) => true,
                Some(h2::Reason::NO_ERROR) => h2.is_go_away(),
                _ => false,
            };
        }
        source = cause.source();
    }
    false
}
