//! Clients of other kinds than client-go: HTTP/1.1 as kube-rs speaks it, and HTTP/2 with windows as large as OkHttp's.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode, header::HOST};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use rebalancer_tests::pki::{Pair, Pki, SERVER_NAME};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use tokio::{net::TcpStream, sync::watch, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};

const PATIENCE: Duration = Duration::from_secs(60);

/// OkHttp's (okhttp3.internal.http2.Http2Connection.OKHTTP_CLIENT_WINDOW_SIZE), for streams and connection.
const WINDOW: u32 = 16 << 20;

/// Where to, and as whom.
#[derive(Clone)]
struct Dial {
    server: SocketAddr,
    connector: TlsConnector,
}

impl Dial {
    fn new(pki: &Pki, server: SocketAddr, who: &Pair, protocol: &[u8]) -> Self {
        let mut roots = RootCertStore::empty();
        for authority in CertificateDer::pem_file_iter(pki.file("ca.crt")).expect("the authorities") {
            roots.add(authority.expect("a certificate")).expect("an authority");
        }
        let chain = CertificateDer::pem_file_iter(&who.certificate).expect("a certificate");
        let chain = chain.collect::<Result<_, _>>().expect("a certificate");
        let key = PrivateKeyDer::from_pem_file(&who.key).expect("a key");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .expect("a pair");
        config.alpn_protocols = vec![protocol.to_vec()];
        Self {
            server,
            connector: TlsConnector::from(Arc::new(config)),
        }
    }

    async fn connect(&self) -> TlsStream<TcpStream> {
        let socket = TcpStream::connect(self.server).await.expect("the relay listens");
        let name = ServerName::try_from(SERVER_NAME).expect("a name");
        self.connector.connect(name, socket).await.expect("a handshake")
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

/// Asks over one HTTP/1.1 connection, and over a new one when an answer said that it ends.
pub struct Hyper {
    thread: JoinHandle<(u64, u64)>,
}

impl Hyper {
    /// Asks until the file is there.
    pub fn start(pki: &Pki, server: SocketAddr, who: &Pair, stop: PathBuf) -> Self {
        let dial = Dial::new(pki, server, who, b"http/1.1");
        let thread = thread::spawn(move || {
            runtime().block_on(async {
                let (mut asked, mut opened) = (0, 0);
                while !stop.exists() {
                    let stream = TokioIo::new(dial.connect().await);
                    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.expect("HTTP");
                    let connection = tokio::spawn(connection);
                    opened += 1;
                    while sender.ready().await.is_ok() && !stop.exists() {
                        let request = Request::get("/api/v1/namespaces/default/configmaps?limit=1")
                            .header(HOST, SERVER_NAME)
                            .body(Empty::<Bytes>::new())
                            .expect("a request");
                        let answer = sender.send_request(request).await.expect("an answer");
                        assert_eq!(answer.status(), StatusCode::OK);
                        answer.into_body().collect().await.expect("a body");
                        asked += 1;
                    }
                    drop(sender);
                    connection.await.expect("the task ends well").expect("a clean end");
                }
                (asked, opened)
            })
        });
        Self { thread }
    }

    /// How much it asked, and over how many connections.
    pub fn ends(self) -> (u64, u64) {
        self.thread.join().expect("nothing failed")
    }
}

/// Reads lists that are larger than its windows, and stands still in each of the first two until it is let on.
pub struct LargeWindows {
    thread: JoinHandle<()>,
    waiting: watch::Receiver<usize>,
    let_on: watch::Sender<usize>,
}

impl LargeWindows {
    /// Reads three lists of so many objects, over three connections.
    pub fn start(pki: &Pki, server: SocketAddr, who: &Pair, objects: usize) -> Self {
        let dial = Dial::new(pki, server, who, b"h2");
        let (waits, waiting) = watch::channel(0);
        let (let_on, mut may) = watch::channel(0);
        let thread = thread::spawn(move || {
            runtime().block_on(async {
                for round in 1..=3 {
                    let (sender, connection) = h2::client::Builder::new()
                        .initial_window_size(WINDOW)
                        .initial_connection_window_size(WINDOW)
                        .handshake::<_, Bytes>(dial.connect().await)
                        .await
                        .expect("HTTP/2");
                    let connection = tokio::spawn(connection);
                    let mut sender = sender.ready().await.expect("room for a stream");
                    let uri = format!("https://{SERVER_NAME}/api/v1/namespaces/streams/configmaps");
                    let request = Request::get(uri).body(()).expect("a request");
                    let (answer, _) = sender.send_request(request, true).expect("a new connection");
                    let answer = answer.await.expect("an answer");
                    assert_eq!(answer.status(), StatusCode::OK);
                    let mut body = answer.into_body();
                    let mut text = Vec::new();
                    while let Some(piece) = body.data().await {
                        let piece = piece.expect("a piece of the list");
                        body.flow_control()
                            .release_capacity(piece.len())
                            .expect("no more than was taken");
                        text.extend(piece);
                        if round < 3 && *waits.borrow() < round {
                            waits.send(round).expect("the test runs");
                            may.wait_for(|allowed| *allowed >= round).await.expect("the test runs");
                        }
                    }
                    let list: serde_json::Value = serde_json::from_slice(&text).expect("a whole list");
                    let items = list["items"].as_array().expect("items");
                    assert!(items.len() >= objects, "{} objects", items.len());
                    if round < 3 {
                        let refused = match sender.ready().await {
                            Ok(mut sender) => {
                                let request = Request::get("https://a/").body(()).expect("a request");
                                sender.send_request(request, true).is_err()
                            }
                            Err(error) => error.is_go_away(),
                        };
                        assert!(refused, "the connection was told to go");
                    }
                    // Drained: the relay ends it by itself.
                    if round < 3 {
                        let end = timeout(PATIENCE, connection).await.expect("it ends in time");
                        end.expect("the task ends well").expect("a clean end");
                    }
                }
            });
        });
        Self {
            thread,
            waiting,
            let_on,
        }
    }

    /// Waits until it stands still in the list of that round.
    pub fn waits_in_list(&self, round: usize) {
        let mut waiting = self.waiting.clone();
        let reached = runtime().block_on(async {
            timeout(PATIENCE, waiting.wait_for(|reached| *reached >= round))
                .await
                .is_ok_and(|waited| waited.is_ok())
        });
        assert!(reached, "the list of round {round} has not begun");
    }

    /// Lets it on.
    pub fn goes_on(&self, round: usize) {
        self.let_on.send(round).expect("it runs");
    }

    /// It read everything.
    pub fn ends(self) {
        self.thread.join().expect("nothing failed");
    }
}
