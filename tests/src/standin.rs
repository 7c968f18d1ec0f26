//! A small apiserver: TLS, HTTP/2, list, watch and the goaway lottery, so that a demo needs no Go and no cluster.
//!
//! There is no store. One object changes once a period, and its resourceVersion is the number of periods since an
//! instant that all stand-ins are told: each of them serves the same history, and a watch can be resumed on any.

use std::{
    convert::Infallible,
    net::SocketAddr,
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, channel::Channel, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
    time::{Instant, sleep_until},
};
use tokio_rustls::TlsAcceptor;

use crate::{demo_binary, pki::Pki};

/// The version it says it has.
pub const VERSION: &str = "standin-v1";

/// The command of one that listens there, counts from that instant on, and has a cluster's certificates.
pub fn command(listen: SocketAddr, origin_ms: u128, pki: &Pki) -> Command {
    let mut command = Command::new(demo_binary());
    command
        .arg("standin")
        .arg(format!("--listen={listen}"))
        .arg(format!("--origin-ms={origin_ms}"))
        .arg("--certificate")
        .arg(pki.file("apiserver.crt"))
        .arg("--key")
        .arg(pki.file("apiserver.key"))
        .arg("--client-ca")
        .arg(pki.file("ca.crt"))
        .arg("--client-ca")
        .arg(pki.file("front-proxy-ca.crt"));
    command
}

/// What a stand-in is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Serving certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Who signs client certificates and the front proxy's.
    pub client_cas: Vec<PathBuf>,
    /// Milliseconds since 1970 of the first resourceVersion.
    pub origin_ms: u64,
    /// Time between two changes.
    pub period: Duration,
    /// `--goaway-chance`: the share of requests answered by closing their connection in order.
    pub goaway_chance: f64,
}

type Body = BoxBody<Bytes, Infallible>;

/// How long a watch lasts at least; each lasts up to twice that, as `--min-request-timeout` has it.
const WATCH: Duration = Duration::from_secs(1800);

/// Serves for ever.
///
/// # Errors
///
/// A file or the address cannot be used.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let mut roots = RootCertStore::empty();
    for path in &options.client_cas {
        for certificate in CertificateDer::pem_file_iter(path)? {
            roots.add(certificate?)?;
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()?;
    let mut tls = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            CertificateDer::pem_file_iter(&options.certificate)?.collect::<Result<Vec<_>, _>>()?,
            PrivateKeyDer::from_pem_file(&options.key)?,
        )?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind(options.listen)
        .await
        .with_context(|| format!("cannot listen on {}", options.listen))?;
    let server = Arc::new(Server {
        options,
        drawn: AtomicU64::new(0),
    });
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(Arc::clone(&server).serve(stream, acceptor.clone()));
    }
}

struct Server {
    options: Options,
    drawn: AtomicU64,
}

impl Server {
    async fn serve(self: Arc<Self>, stream: TcpStream, acceptor: TlsAcceptor) {
        let Ok(stream) = acceptor.accept(stream).await else {
            return;
        };
        let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let lost = Arc::new(Notify::new());
        let service = service_fn({
            let lost = Arc::clone(&lost);
            move |request| {
                let server = Arc::clone(&self);
                let lost = Arc::clone(&lost);
                async move {
                    if h2 && server.draws_goaway() {
                        lost.notify_one();
                    }
                    Ok::<_, Infallible>(server.answer(&request))
                }
            }
        });
        // How a connection ends is the client's business.
        if h2 {
            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .max_concurrent_streams(250)
                .serve_connection(TokioIo::new(stream), service);
            let mut connection = std::pin::pin!(connection);
            tokio::select! {
                _ = connection.as_mut() => return,
                () = lost.notified() => connection.as_mut().graceful_shutdown(),
            }
            let _ = connection.await;
        } else {
            let _ = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        }
    }

    /// Every so-many-th request loses: the same share as a lottery, without its noise.
    fn draws_goaway(&self) -> bool {
        if self.options.goaway_chance <= 0.0 {
            return false;
        }
        let drawn = self.drawn.fetch_add(1, Relaxed) as f64;
        (drawn * self.options.goaway_chance).floor() < ((drawn + 1.0) * self.options.goaway_chance).floor()
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Body> {
        let path = request.uri().path();
        let query = request.uri().query().unwrap_or_default();
        let parameter = |name: &str| {
            query
                .split('&')
                .filter_map(|pair| pair.split_once('='))
                .find_map(|(key, value)| (key == name).then_some(value))
        };
        match path {
            "/readyz" | "/livez" | "/healthz" => text(StatusCode::OK, "ok"),
            "/version" => json_answer(&json!({"gitVersion": VERSION})),
            "/api/v1/namespaces/swarm/configmaps" if parameter("watch") == Some("true") => {
                match parameter("resourceVersion").and_then(|version| version.parse().ok()) {
                    Some(from) => self.watch(from),
                    None => text(StatusCode::BAD_REQUEST, "a watch names its resourceVersion"),
                }
            }
            "/api/v1/namespaces/swarm/configmaps" => json_answer(&json!({
                "kind": "ConfigMapList",
                "apiVersion": "v1",
                "metadata": {"resourceVersion": self.version().to_string()},
                "items": [object(self.version())],
            })),
            "/api/v1/namespaces/swarm/configmaps/shared" => json_answer(&object(self.version())),
            _ => text(StatusCode::NOT_FOUND, "not found"),
        }
    }

    fn version(&self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let since = (now.as_millis() as u64).saturating_sub(self.options.origin_ms);
        1 + since / self.options.period.as_millis() as u64
    }

    /// The instant a version begins.
    fn begins(&self, version: u64) -> Instant {
        let at = self.options.origin_ms + (version - 1) * self.options.period.as_millis() as u64;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Instant::now() + Duration::from_millis(at).saturating_sub(now)
    }

    /// Every change after `from`, until the watch's time is over.
    fn watch(&self, from: u64) -> Response<Body> {
        let (mut sender, body) = Channel::<Bytes, Infallible>::new(16);
        let server = Self {
            options: self.options.clone(),
            drawn: AtomicU64::new(0),
        };
        // Spread by the version, as the apiserver spreads by chance.
        let ends = Instant::now() + WATCH + Duration::from_secs(from % WATCH.as_secs());
        tokio::spawn(async move {
            let mut next = from + 1;
            loop {
                let due = server.begins(next);
                if due > ends {
                    return;
                }
                sleep_until(due).await;
                let mut line = json!({"type": "MODIFIED", "object": object(next)}).to_string();
                line.push('\n');
                if sender.send_data(line.into()).await.is_err() {
                    return;
                }
                next += 1;
            }
        });
        let mut answer = Response::new(body.boxed());
        answer.headers_mut().insert(
            header::CONTENT_TYPE,
            header::HeaderValue::from_static("application/json"),
        );
        answer
    }
}

fn object(version: u64) -> serde_json::Value {
    json!({
        "kind": "ConfigMap",
        "apiVersion": "v1",
        "metadata": {"name": "shared", "namespace": "swarm", "resourceVersion": version.to_string()},
        "data": {"counter": version.to_string()},
    })
}

fn json_answer(value: &serde_json::Value) -> Response<Body> {
    let mut answer = text(StatusCode::OK, &value.to_string());
    answer.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static("application/json"),
    );
    answer
}

fn text(status: StatusCode, body: &str) -> Response<Body> {
    let mut answer = Response::new(Full::new(Bytes::from(body.to_owned())).boxed());
    *answer.status_mut() = status;
    answer
}
