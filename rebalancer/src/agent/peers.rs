//! Agents talk to each other: `GET /v1/snapshot` over HTTP/1.1 with mutual TLS.
//!
//! Job: answer with this apiserver's snapshot, and ask each peer for its own once a second.
//! Must never answer or believe anyone whose certificate the peers' CA did not sign.

use std::{io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use axum::{Json, Router, extract::State, http::StatusCode, routing::get, serve::Listener};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use rebalancer_core::{agent::Input, policy::Weight, view::PeerFault};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, server::TlsStream};

use super::{
    config::{PeerAddress, PeerConfig},
    handle::AgentHandle,
    wire::WireSnapshot,
};
use crate::local::Problem;

/// How often a peer is asked.
const POLL: Duration = Duration::from_secs(1);

/// How long its answer may take.
const PATIENCE: Duration = Duration::from_secs(3);

/// How large its answer may be.
const LARGEST: usize = 64 * 1024;

/// Both ends' TLS.
pub struct PeerTls {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl PeerTls {
    /// Loads certificate, key and CA.
    ///
    /// # Errors
    ///
    /// Names the flag, the file and what is wrong.
    pub fn load(config: &PeerConfig) -> anyhow::Result<Self> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let chain = || certificates(&config.certificate, "--peer-cert");
        let key = || {
            PrivateKeyDer::from_pem_file(&config.key)
                .with_context(|| format!("--peer-key {}: cannot read a private key (PEM)", config.key.display()))
        };
        let mismatch = || {
            format!(
                "--peer-cert {} and --peer-key {} do not belong together",
                config.certificate.display(),
                config.key.display()
            )
        };
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&config.ca, "--peer-ca")? {
            roots
                .add(certificate)
                .with_context(|| format!("--peer-ca {}: not a CA certificate", config.ca.display()))?;
        }
        let roots = Arc::new(roots);
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .with_context(|| format!("--peer-ca {}: not usable", config.ca.display()))?;
        Ok(Self {
            server: Arc::new(
                ServerConfig::builder_with_provider(Arc::clone(&provider))
                    .with_safe_default_protocol_versions()?
                    .with_client_cert_verifier(verifier)
                    .with_single_cert(chain()?, key()?)
                    .with_context(mismatch)?,
            ),
            client: Arc::new(
                ClientConfig::builder_with_provider(provider)
                    .with_safe_default_protocol_versions()?
                    .with_root_certificates(roots)
                    .with_client_auth_cert(chain()?, key()?)
                    .with_context(mismatch)?,
            ),
        })
    }
}

fn certificates(path: &Path, flag: &str) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .with_context(|| format!("{flag} {}: cannot read certificates (PEM)", path.display()))?;
    anyhow::ensure!(
        !found.is_empty(),
        "{flag} {}: there is no certificate in it",
        path.display()
    );
    Ok(found)
}

/// Accepts and shakes hands, each connection in a task of its own: a silent one holds up nobody.
pub struct TlsListener {
    address: SocketAddr,
    ready: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
}

impl TlsListener {
    /// Listens.
    ///
    /// # Errors
    ///
    /// Names the address and what the system says.
    pub async fn bind(address: SocketAddr, tls: &PeerTls) -> anyhow::Result<Self> {
        let mut listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("--peer-listen {address}: cannot listen there"))?;
        let acceptor = TlsAcceptor::from(Arc::clone(&tls.server));
        let (accepted, ready) = mpsc::channel(16);
        tokio::spawn(async move {
            loop {
                let (stream, from) = Listener::accept(&mut listener).await;
                let (acceptor, accepted) = (acceptor.clone(), accepted.clone());
                tokio::spawn(async move {
                    match timeout(PATIENCE, acceptor.accept(stream)).await {
                        // Nobody takes it any more when the agent ends.
                        Ok(Ok(stream)) => drop(accepted.send((stream, from)).await),
                        Ok(Err(error)) => tracing::warn!(%from, %error, "refused a peer"),
                        Err(_) => tracing::warn!(%from, "a peer did not finish its TLS handshake"),
                    }
                });
            }
        });
        Ok(Self { address, ready })
    }
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(accepted) => accepted,
            // The accepting task never ends by itself.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(self.address)
    }
}

/// The routes peers may ask.
pub fn router(agent: AgentHandle) -> Router {
    Router::new().route("/v1/snapshot", get(snapshot)).with_state(agent)
}

async fn snapshot(State(agent): State<AgentHandle>) -> Result<Json<WireSnapshot>, Problem> {
    agent
        .read(|agent, now| WireSnapshot::of(&agent.snapshot(now), agent.policy().weight))
        .await
        .map(Json)
        .map_err(|gone| Problem::new(StatusCode::SERVICE_UNAVAILABLE, gone.to_string()))
}

/// Asks one peer, for as long as somebody listens.
pub async fn follow(address: PeerAddress, tls: Arc<PeerTls>, weight: Weight, inputs: mpsc::Sender<Input>) {
    let mut ticks = interval(POLL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut link: Option<SendRequest<Empty<Bytes>>> = None;
    loop {
        ticks.tick().await;
        let asked = async {
            let mut sender = match link.take().filter(|sender| !sender.is_closed()) {
                Some(sender) => sender,
                None => connect(&address, &tls).await?,
            };
            let snapshot = ask(&address, &mut sender, weight).await?;
            Ok((sender, snapshot))
        };
        let answer = match timeout(PATIENCE, asked).await {
            Ok(Ok((sender, snapshot))) => {
                link = Some(sender);
                Ok(snapshot)
            }
            Ok(Err(fault)) => Err(fault),
            Err(_) => Err(PeerFault::Unreachable(format!(
                "{}:{} did not answer within {PATIENCE:?}",
                address.host, address.port
            ))),
        };
        if inputs.send(Input::Peer(address.name.clone(), answer)).await.is_err() {
            return;
        }
    }
}

async fn connect(address: &PeerAddress, tls: &PeerTls) -> Result<SendRequest<Empty<Bytes>>, PeerFault> {
    let at = format!("{}:{}", address.host, address.port);
    let stream = TcpStream::connect((address.host.as_str(), address.port))
        .await
        .map_err(|error| PeerFault::Unreachable(format!("{at}: {error}")))?;
    let stream = TlsConnector::from(Arc::clone(&tls.client))
        .connect(address.server_name.clone(), stream)
        .await
        .map_err(|error| PeerFault::Refused(format!("{at}: {error}")))?;
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| PeerFault::Refused(format!("{at}: {error}")))?;
    tokio::spawn(connection);
    Ok(sender)
}

async fn ask(
    address: &PeerAddress,
    sender: &mut SendRequest<Empty<Bytes>>,
    weight: Weight,
) -> Result<rebalancer_core::view::Snapshot, PeerFault> {
    let at = format!("{}:{}", address.host, address.port);
    let refused = |why: &dyn std::fmt::Display| PeerFault::Refused(format!("{at}: {why}"));
    let request = http::Request::get("/v1/snapshot")
        .header(http::header::HOST, &at)
        .body(Empty::new())
        .map_err(|error| refused(&error))?;
    let answer = sender
        .send_request(request)
        .await
        // A server that refuses this agent's certificate says so only now (TLS 1.3).
        .map_err(|error| refused(&root_cause(&error)))?;
    if answer.status() != http::StatusCode::OK {
        return Err(refused(&answer.status()));
    }
    let body = Limited::new(answer.into_body(), LARGEST)
        .collect()
        .await
        .map_err(|error| refused(&error))?
        .to_bytes();
    let snapshot: WireSnapshot = serde_json::from_slice(&body).map_err(|error| refused(&error))?;
    snapshot.into_core(weight).map_err(PeerFault::Disagrees)
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}
