//! The local apiserver behind the relay: connecting to it, and asking whether a client's request would get through.
//!
//! Output: TLS streams, and the state that the listener and the control socket follow.
//! Must never send a client's bytes anywhere else.

mod judge;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use rebalancer_core::release::Release;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    net::{TcpSocket, TcpStream},
    sync::{Notify, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};

use judge::{Found, Judge, Readiness, failed, judged};
pub use judge::{RULES, is_open};

use super::{
    metrics::Metrics,
    registry::Registry,
    request_headers::RequestHeaders,
    stream::{self, ClientStream},
    tls::{Reloader, Tls},
    workers::Workers,
};
use crate::{kernel::sockdiag, shim::wire::Upstream, sys};

/// How long each step of a check may take.
const CHECK: Duration = Duration::from_secs(3);

/// How often a ready apiserver is asked again.
const CHECK_READY: Duration = Duration::from_secs(2);

/// How often another one is.
const CHECK_OTHERWISE: Duration = Duration::from_millis(500);

/// Whatever rings, there is so much time between two checks: clients can make the apiserver close their connections.
const PAUSE: Duration = Duration::from_millis(250);

/// A check's connection is kept for so long, and asked on again: a new one is a handshake, as a client's is.
const RENEW: Duration = Duration::from_secs(30);

/// A thread that has not moved for so long serves nobody.
const STANDSTILL: Duration = Duration::from_secs(10);

/// Whom a check asks as: a user of no rights.
const CHECK_USER: &str = "system:rebalancer:relay-check";

/// How many addresses of its own the relay connects from, over loopback: each has a range of ports of its own.
const SOURCES: u8 = 16;

/// Where the apiserver is.
#[derive(Debug)]
pub struct Target {
    /// Its address on this node.
    pub address: SocketAddr,
    /// The name its certificate must have.
    pub name: ServerName<'static>,
    /// The certificates.
    pub tls: Arc<Reloader>,
    /// Which of the addresses of its own was used last: 0 leaves it to the kernel.
    source: AtomicU8,
    /// Whether the kernel's list named somebody who listens there when it was connected to last: an address that is
    /// translated on the way is in nobody's list.
    is_listed: AtomicBool,
}

/// Whether an error is this process's or this node's own want of something, and none of the other side's.
pub fn is_ours(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EADDRNOTAVAIL
                | libc::EAGAIN
                | libc::EMFILE
                | libc::ENFILE
                | libc::ENOMEM
                | libc::ENOBUFS
                | libc::EADDRINUSE
                | libc::ENOSPC
        )
    )
}

/// What it is that has run out.
pub fn what_ran_out(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EADDRNOTAVAIL | libc::EAGAIN | libc::EADDRINUSE) => {
            "no local port is left (net.ipv4.ip_local_port_range) for connections to the apiserver"
        }
        Some(libc::EMFILE) => "this process may open no more files (RLIMIT_NOFILE)",
        Some(libc::ENFILE) => "this node may open no more files (fs.file-max)",
        // epoll_ctl(2)
        Some(libc::ENOSPC) => "this user may have no more sockets watched (fs.epoll.max_user_watches)",
        _ => "the kernel has no memory for another socket",
    }
}

impl Target {
    /// An apiserver that nobody has connected to.
    pub fn new(address: SocketAddr, name: ServerName<'static>, tls: Arc<Reloader>) -> Self {
        Self {
            address: SocketAddr::new(address.ip().to_canonical(), address.port()),
            name,
            tls,
            source: AtomicU8::new(0),
            is_listed: AtomicBool::new(false),
        }
    }

    fn listeners(&self) -> Result<Vec<u64>, sockdiag::SockdiagError> {
        let all = sockdiag::listening(self.address.port())?;
        let there = |address: IpAddr| address.is_unspecified() || address.to_canonical() == self.address.ip();
        Ok(all
            .into_iter()
            .filter(|one| there(one.address))
            .map(|one| one.id.0)
            .collect())
    }

    /// Whether the kernel's list names who listens there.
    pub fn is_listed(&self) -> bool {
        self.is_listed.load(Relaxed)
    }

    /// Whether nobody listens there any more, by the kernel's list, which has named somebody before.
    pub fn is_gone(&self) -> bool {
        self.is_listed() && self.listeners().is_ok_and(|listeners| listeners.is_empty())
    }

    /// Connects with a configuration of this target's [`Reloader`] and offers exactly one protocol.
    ///
    /// # Errors
    ///
    /// What the socket or TLS says; [`io::ErrorKind::InvalidData`] when the apiserver selects another protocol.
    pub async fn connect(&self, config: &Arc<ClientConfig>, protocol: &[u8]) -> io::Result<ClientStream> {
        let socket = self.socket().await?;
        self.handshake(socket, config, protocol).await
    }

    async fn handshake(
        &self,
        socket: TcpStream,
        config: &Arc<ClientConfig>,
        protocol: &[u8],
    ) -> io::Result<ClientStream> {
        socket.set_nodelay(true)?;
        let stream = stream::connect(Arc::clone(config), self.name.clone(), protocol, socket).await?;
        let selected = stream.state().alpn_protocol();
        // A server without ALPN speaks HTTP/1.1.
        if selected.unwrap_or(b"http/1.1") != protocol {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "the apiserver at {} does not speak {}",
                    self.address,
                    String::from_utf8_lossy(protocol)
                ),
            ));
        }
        Ok(stream)
    }

    /// Connects from an address that has a port left: the kernel's choice has some 28,000 for one destination. All of
    /// 127.0.0.0/8 is this host's.
    async fn socket(&self) -> io::Result<TcpStream> {
        let sources = match self.address.ip() {
            IpAddr::V4(address) if address.is_loopback() => SOURCES,
            _ => 1,
        };
        let first = self.source.load(Relaxed);
        let mut last = None;
        for source in (0..sources).map(|more| (first + more) % sources) {
            match self.socket_from(source).await {
                Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => last = Some(error),
                connected => {
                    self.source.store(source, Relaxed);
                    return connected;
                }
            }
        }
        Err(last.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into()))
    }

    async fn socket_from(&self, source: u8) -> io::Result<TcpStream> {
        if source == 0 {
            return TcpStream::connect(self.address).await;
        }
        let socket = TcpSocket::new_v4()?;
        // The port is chosen when it connects, and may be one that is in use towards another destination.
        sys::bind_without_port(socket.as_fd())?;
        socket.bind(SocketAddr::new(Ipv4Addr::new(127, 0, 0, 1 + source).into(), 0))?;
        socket.connect(self.address).await
    }
}

/// A connection of the checks' own.
struct Kept {
    sender: SendRequest<Empty<bytes::Bytes>>,
    task: JoinHandle<()>,
    tls: Arc<Tls>,
    since: Instant,
}

impl Kept {
    /// Which certificate it shows, and whether that answer believes it.
    fn verdict(&self, readiness: &Readiness) -> (u64, bool) {
        (self.tls.front_proxy_certificate.issue, readiness.believes())
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Asks what a client's request needs: the connection, its TLS under `--upstream-ca`, the front proxy's certificate
/// believed, and threads that serve.
pub struct Checks {
    target: Arc<Target>,
    /// The header that says who asks, as for clients.
    username: String,
    kept: Option<Kept>,
    /// The issue of the front proxy's certificate of which it has said something, and whether it believed it.
    verdict: Option<(u64, bool)>,
    /// What it called its version last.
    version: Option<String>,
    /// Which socket it listened on then, where that is on this host.
    listener: Option<u64>,
}

impl Checks {
    /// Of one apiserver, which believes those headers.
    pub fn new(target: Arc<Target>, headers: &RequestHeaders) -> Self {
        let [username, ..] = headers.written();
        Self {
            target,
            username,
            kept: None,
            verdict: None,
            version: None,
            listener: None,
        }
    }

    /// Asks once, in four times [`CHECK`] at most.
    async fn check(&mut self) -> Found {
        match self.ask().await {
            // A connection that ends may be a packet that was lost. That nobody listens is no guess.
            Found::State(Upstream::Unreachable, why) | Found::Broken(why) if self.target.is_gone() => {
                Found::Gone(format!("nobody listens there: {why}"))
            }
            found => found,
        }
    }

    async fn ask(&mut self) -> Found {
        let current = self.target.tls.current();
        self.kept = self.kept.take().filter(|kept| {
            kept.since.elapsed() < RENEW && Arc::ptr_eq(&kept.tls, &current) && !kept.sender.is_closed()
        });
        if let Some(mut kept) = self.kept.take()
            && let Ok(Ok(readiness)) = timeout(CHECK, ask(&mut kept.sender, self.request("/readyz"))).await
        {
            self.verdict = Some(kept.verdict(&readiness));
            self.kept = Some(kept);
            return judged(&readiness);
        }
        // The server may have closed it: a new one tells.
        let mut kept = match self.open(current).await {
            Ok(kept) => kept,
            Err(found) => return found,
        };
        match timeout(CHECK, ask(&mut kept.sender, self.request("/readyz"))).await {
            Ok(Ok(readiness)) => {
                // Another process has another listening socket, and every connection with it is new.
                let listeners = self.target.listeners();
                // Of several the newest.
                self.listener = listeners.as_ref().ok().and_then(|all| all.iter().max().copied());
                if let Ok(all) = listeners {
                    self.target.is_listed.store(!all.is_empty(), Relaxed);
                }
                if let Ok(Some(version)) = timeout(CHECK, ask_version(&mut kept.sender, self.request("/version"))).await
                {
                    self.version = Some(version);
                }
                self.verdict = Some(kept.verdict(&readiness));
                self.kept = Some(kept);
                judged(&readiness)
            }
            Ok(Err(error)) => failed(&error, "it closes the connection instead of answering"),
            Err(_) => Found::State(Upstream::Overloaded, format!("/readyz takes longer than {CHECK:?}")),
        }
    }

    fn request(&self, path: &'static str) -> http::Request<Empty<bytes::Bytes>> {
        request(&self.target, &self.username, path)
    }

    async fn open(&self, tls: Arc<Tls>) -> Result<Kept, Found> {
        let target = &self.target;
        let socket = match timeout(CHECK, target.socket()).await {
            Ok(Ok(socket)) => socket,
            Ok(Err(error)) if is_ours(&error) => {
                return Err(Found::Ours(format!("{}: {error}", what_ran_out(&error))));
            }
            Ok(Err(error)) => return Err(Found::State(Upstream::Unreachable, error.to_string())),
            // On this host somebody listens, and does not get to accepting.
            Err(_) if target.address.ip().is_loopback() => {
                let why = format!("it accepts no connection within {CHECK:?}");
                return Err(Found::State(Upstream::Overloaded, why));
            }
            Err(_) => {
                return Err(Found::State(
                    Upstream::Unreachable,
                    format!("no answer within {CHECK:?}"),
                ));
            }
        };
        let stream = match timeout(CHECK, target.handshake(socket, &tls.front_proxy, b"http/1.1")).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(failed(&error, "TLS with it fails")),
            Err(_) => {
                let why = format!("its TLS handshake takes longer than {CHECK:?}");
                return Err(Found::State(Upstream::Overloaded, why));
            }
        };
        match hyper::client::conn::http1::handshake(TokioIo::new(stream)).await {
            Ok((sender, connection)) => Ok(Kept {
                sender,
                task: tokio::spawn(async move {
                    // The sender hears how it ends.
                    let _ = connection.await;
                }),
                tls,
                since: Instant::now(),
            }),
            Err(error) => Err(failed(&error, "it closes the connection")),
        }
    }
}

/// So many octets of an answer to `/readyz` are read: it has a line for each of some fifty checks.
const LONGEST_READINESS: usize = 64 * 1024;

/// So many octets of an answer to `/version` are read.
const LONGEST_VERSION: usize = 16 * 1024;

/// What the server calls its version (`gitVersion`, k8s.io/apimachinery/pkg/version, Info); `None` when it does not say, or
/// not to a user of no rights.
async fn ask_version(
    sender: &mut SendRequest<Empty<bytes::Bytes>>,
    request: http::Request<Empty<bytes::Bytes>>,
) -> Option<String> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Info {
        git_version: String,
    }
    sender.ready().await.ok()?;
    let answer = sender.send_request(request).await.ok()?;
    let is_said = answer.status().is_success();
    let body = Limited::new(answer.into_body(), LONGEST_VERSION)
        .collect()
        .await
        .ok()?
        .to_bytes();
    let info: Info = serde_json::from_slice(&body).ok().filter(|_| is_said)?;
    Some(Release::new(&info.git_version)?.to_string())
}

async fn ask(
    sender: &mut SendRequest<Empty<bytes::Bytes>>,
    request: http::Request<Empty<bytes::Bytes>>,
) -> Result<Readiness, hyper::Error> {
    sender.ready().await?;
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    // Read to its end, so that the connection can be asked on again; one that is closed behind it is not.
    let body = Limited::new(answer.into_body(), LONGEST_READINESS).collect().await;
    let text = body.map_or_else(|_| bytes::Bytes::new(), http_body_util::Collected::to_bytes);
    Ok(Readiness::new(status, &text))
}

/// A request of the check's own user, whom that header names.
fn request(target: &Target, username: &str, path: &'static str) -> http::Request<Empty<bytes::Bytes>> {
    let mut request = http::Request::new(Empty::new());
    *request.uri_mut() = http::Uri::from_static(path);
    let headers = request.headers_mut();
    if let Ok(host) = http::HeaderValue::from_str(&target.name.to_str()) {
        headers.insert(http::header::HOST, host);
    }
    let agent = concat!("rebalancer/", env!("CARGO_PKG_VERSION"));
    headers.insert(http::header::USER_AGENT, http::HeaderValue::from_static(agent));
    if let Ok(username) = http::HeaderName::try_from(username) {
        headers.insert(username, http::HeaderValue::from_static(CHECK_USER));
    }
    request
}

/// Whether the apiserver believes a front proxy with that certificate; `None` where it does not say.
pub async fn takes(target: &Target, headers: &RequestHeaders, front_proxy: &Arc<ClientConfig>) -> Option<bool> {
    let [username, ..] = headers.written();
    let asked = async {
        let stream = target.connect(front_proxy, b"http/1.1").await;
        let stream = stream.map_err(|error| failed(&error, "TLS with it fails"))?;
        let closes = |error: hyper::Error| failed(&error, "it closes the connection");
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(closes)?;
        let answer = ask(&mut sender, request(target, &username, "/readyz"));
        tokio::select! {
            answer = answer => Ok(answer.map_err(closes)?),
            Err(error) = connection => Err(closes(error)),
        }
    };
    match timeout(CHECK, asked).await {
        Ok(Ok(readiness)) => Some(readiness.believes()),
        Ok(Err(Found::State(Upstream::Unusable, _))) => Some(false),
        Ok(Err(_)) => None,
        Err(_) => None,
    }
}

/// Follows the apiserver's state until nobody is interested.
pub async fn watch(
    mut checks: Checks,
    workers: Arc<Workers>,
    registry: Arc<Registry>,
    metrics: Arc<Metrics>,
    seen: watch::Sender<Upstream>,
    doubt: Arc<Notify>,
) {
    let mut judge = Judge::new();
    let mut said = None;
    while !seen.is_closed() {
        let began = Instant::now();
        let mut found = checks.check().await;
        metrics.checked(began.elapsed());
        if let Some(name) = workers.standing_still(STANDSTILL) {
            found = Found::State(
                Upstream::Unusable,
                format!("the relay's own thread {name} stands still"),
            );
        }
        let before = judge.state;
        let state = judge.take(&found, checks.listener, Instant::now());
        // Before the state: who hears that it is ready hears which process it is.
        registry.set_upstream_process(checks.version.clone(), checks.listener);
        // Of a certificate that was in use when it was asked, it says nothing any more.
        let in_use = checks.target.tls.current().front_proxy_certificate.issue;
        if let Some((issue, is_taken)) = checks.verdict.take().filter(|(issue, _)| *issue == in_use) {
            registry.set_taken(issue, is_taken);
        }
        registry.set_upstream(state);
        seen.send_replace(state);
        let address = checks.target.address;
        match &found {
            Found::Ours(why) if said.as_ref() != Some(&found) => {
                tracing::error!(why, "the apiserver cannot be asked; everything stays as it is");
            }
            Found::State(_, why)
            | Found::NotReady(why)
            | Found::Broken(why)
            | Found::Gone(why)
            | Found::Forbidden(why)
                if state != before =>
            {
                match state {
                    Upstream::Unusable => tracing::error!(
                        upstream = %address,
                        why,
                        "no client's request would get through: the port is closed, and --intercept lets go"
                    ),
                    Upstream::Unreachable => {
                        tracing::warn!(upstream = %address, why, "the apiserver is unreachable: the port is closed")
                    }
                    _ => tracing::info!(upstream = %address, ?state, why, "the apiserver's state"),
                }
            }
            _ => {}
        }
        said = Some(found);
        // Each failure of TLS is counted by the apiserver; each of a connection costs nobody anything.
        let pause = if matches!(state, Upstream::Ready | Upstream::Unusable) && judge.failures != 1 {
            CHECK_READY
        } else {
            CHECK_OTHERWISE
        };
        sleep(PAUSE).await;
        // Whichever comes first.
        let _ = timeout(pause - PAUSE, doubt.notified()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_out_here_is_not_the_apiservers_doing() {
        for errno in [
            libc::EADDRNOTAVAIL,
            libc::EMFILE,
            libc::ENFILE,
            libc::ENOMEM,
            libc::ENOBUFS,
        ] {
            assert!(is_ours(&io::Error::from_raw_os_error(errno)));
        }
        for errno in [
            libc::ECONNREFUSED,
            libc::ECONNRESET,
            libc::ETIMEDOUT,
            libc::EHOSTUNREACH,
        ] {
            assert!(!is_ours(&io::Error::from_raw_os_error(errno)));
        }
    }
}
