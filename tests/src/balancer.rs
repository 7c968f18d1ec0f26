//! A layer-4 load balancer with an HTTPS health check, as one stands before apiservers.
//!
//! Job: pass bytes between a client's socket and a backend's, chosen once per connection.
//! Must never look into the bytes, nor close a session by itself: it counts sockets, draining ones included.

mod haproxy;

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::ValueEnum;
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_rustls::TlsConnector;

use crate::pki::SERVER_NAME;
pub use haproxy::{Haproxy, program as haproxy_program};

/// How often a backend's health is asked.
const CHECK: Duration = Duration::from_millis(500);

/// How long the answer may take: a dead backend refuses at once, and a slow machine is no reason to send nowhere.
const ANSWER: Duration = Duration::from_secs(5);

/// How a backend is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// One after the other.
    Roundrobin,
    /// The one with the fewest sockets.
    Leastconn,
    /// Any.
    Random,
}

impl Policy {
    /// As the command line spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Roundrobin => "roundrobin",
            Self::Leastconn => "leastconn",
            Self::Random => "random",
        }
    }

    /// The chance that a new connection lands on the only apiserver below the mean, of `n`.
    pub fn rho(self, n: usize) -> f64 {
        match self {
            Self::Roundrobin | Self::Random => 1.0 / n as f64,
            Self::Leastconn => 1.0,
        }
    }
}

/// How one that came back is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    /// So long its checks must pass before anybody is sent there.
    pub lag: Duration,
    /// From then on its weight grows to the full one in that time.
    pub slow_start: Duration,
}

/// What stands before the apiservers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Front {
    /// The balancer of this module.
    Own(Admission),
    /// haproxy, with these options of its servers.
    Haproxy(String),
}

impl Default for Front {
    fn default() -> Self {
        Self::Own(Admission::default())
    }
}

#[derive(Debug)]
struct Backend {
    address: SocketAddr,
    healthy: AtomicBool,
    sockets: AtomicUsize,
    /// When it was admitted, if it was away before.
    admitted: Mutex<Option<Instant>>,
}

impl Backend {
    /// From above 0 to 1, while it starts slowly.
    fn weight(&self, slow_start: Duration) -> f64 {
        let admitted = *self.admitted.lock().unwrap_or_else(PoisonError::into_inner);
        match admitted {
            Some(at) if at.elapsed() < slow_start => (at.elapsed().as_secs_f64() / slow_start.as_secs_f64()).max(0.01),
            _ => 1.0,
        }
    }
}

/// A running balancer; its tasks end with its runtime.
#[derive(Clone, Debug)]
pub struct Balancer {
    backends: Arc<Vec<Backend>>,
    policy: Policy,
    admission: Admission,
    next: Arc<AtomicU64>,
}

impl Balancer {
    /// Listens, and checks each backend's `/readyz`.
    ///
    /// # Errors
    ///
    /// The address or the CA's file cannot be used.
    pub async fn start(
        listen: SocketAddr,
        backends: Vec<SocketAddr>,
        policy: Policy,
        admission: Admission,
        ca: &Path,
    ) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(ca)? {
            roots.add(certificate?)?;
        }
        let mut tls = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        let tls = TlsConnector::from(Arc::new(tls));
        let listener = TcpListener::bind(listen)
            .await
            .with_context(|| format!("the load balancer cannot listen on {listen}"))?;
        let backend = |address| Backend {
            address,
            healthy: AtomicBool::new(false),
            sockets: AtomicUsize::new(0),
            admitted: Mutex::new(None),
        };
        let balancer = Self {
            backends: Arc::new(backends.into_iter().map(backend).collect()),
            policy,
            admission,
            next: Arc::default(),
        };
        for index in 0..balancer.backends.len() {
            tokio::spawn(balancer.clone().watch(index, tls.clone()));
        }
        tokio::spawn(balancer.clone().accept(listener));
        Ok(balancer)
    }

    /// Sockets per backend.
    pub fn sockets(&self) -> Vec<usize> {
        self.backends
            .iter()
            .map(|backend| backend.sockets.load(Relaxed))
            .collect()
    }

    /// Which backends are healthy.
    pub fn healthy(&self) -> Vec<bool> {
        self.backends
            .iter()
            .map(|backend| backend.healthy.load(Relaxed))
            .collect()
    }

    async fn watch(self, index: usize, tls: TlsConnector) {
        let mut ticks = interval(CHECK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // At the start nothing is late.
        let (mut was_there, mut passes_since) = (false, None);
        loop {
            ticks.tick().await;
            let backend = &self.backends[index];
            let passes = matches!(timeout(ANSWER, readyz(backend.address, &tls)).await, Ok(Ok(true)));
            passes_since = passes.then(|| passes_since.unwrap_or_else(Instant::now));
            let is_admitted =
                passes_since.is_some_and(|since: Instant| !was_there || since.elapsed() >= self.admission.lag);
            let before = backend.healthy.swap(is_admitted, Relaxed);
            if is_admitted && !before {
                let at = was_there.then(Instant::now);
                *backend.admitted.lock().unwrap_or_else(PoisonError::into_inner) = at;
                was_there = true;
            }
        }
    }

    async fn accept(self, listener: TcpListener) {
        loop {
            let Ok((client, _)) = listener.accept().await else {
                continue;
            };
            let balancer = self.clone();
            tokio::spawn(async move { balancer.serve(client).await });
        }
    }

    async fn serve(self, mut client: TcpStream) {
        let mut tried = Vec::new();
        while let Some(index) = self.choose(&tried) {
            let backend = &self.backends[index];
            let _counted = Counted::new(&backend.sockets);
            match TcpStream::connect(backend.address).await {
                Ok(mut server) => {
                    // Latency is measured through here.
                    let _ = (client.set_nodelay(true), server.set_nodelay(true));
                    // However it ends, it is over.
                    let _ = copy_bidirectional(&mut client, &mut server).await;
                    return;
                }
                // As haproxy does with `option redispatch`.
                Err(_) => tried.push(index),
            }
        }
    }

    fn choose(&self, tried: &[usize]) -> Option<usize> {
        let able: Vec<usize> = (0..self.backends.len())
            .filter(|index| self.backends[*index].healthy.load(Relaxed) && !tried.contains(index))
            .collect();
        if able.is_empty() {
            return None;
        }
        let turn = self.next.fetch_add(1, Relaxed);
        let weight = |index: usize| self.backends[index].weight(self.admission.slow_start);
        // One that starts slowly is passed over in proportion by those that do not count.
        let dice = (scramble(turn ^ 0x51) >> 11) as f64 / (1_u64 << 53) as f64;
        let full: Vec<usize> = able.iter().copied().filter(|index| dice < weight(*index)).collect();
        let able = if self.policy == Policy::Leastconn || full.is_empty() {
            able
        } else {
            full
        };
        Some(match self.policy {
            Policy::Roundrobin => able[turn as usize % able.len()],
            Policy::Random => able[scramble(turn) as usize % able.len()],
            Policy::Leastconn => {
                let weighed = |index: usize| match weight(index) {
                    weight if weight < 1.0 => (self.backends[index].sockets.load(Relaxed) as f64 + 1.0) / weight,
                    _ => self.backends[index].sockets.load(Relaxed) as f64,
                };
                able.into_iter().min_by(|a, b| weighed(*a).total_cmp(&weighed(*b)))?
            }
        })
    }
}

/// Holds one socket's place in the count.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(sockets: &'a AtomicUsize) -> Self {
        sockets.fetch_add(1, Relaxed);
        Self(sockets)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// A well-mixed number of the turn (SplitMix64): the same row of choices every time, so that runs can be compared.
fn scramble(turn: u64) -> u64 {
    let mut z = turn.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

async fn readyz(address: SocketAddr, tls: &TlsConnector) -> anyhow::Result<bool> {
    let stream = TcpStream::connect(address).await?;
    let stream = tls.connect(ServerName::try_from(SERVER_NAME)?, stream).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = http::Request::get("/readyz")
        .header(http::header::HOST, SERVER_NAME)
        .header(http::header::CONNECTION, "close")
        .body(Empty::<bytes::Bytes>::new())?;
    let (answer, _) = tokio::join!(sender.send_request(request), connection);
    Ok(answer?.status().is_success())
}
