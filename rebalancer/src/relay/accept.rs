//! The front door: accepting, both handshakes, and who the client is.
//!
//! Input: sockets. Output: pumps, one task each. Must never keep the port open while the apiserver is unreachable.

use std::{io, net::SocketAddr, os::fd::AsFd as _, sync::Arc, time::Duration};

use anyhow::Context as _;
use ipnet::IpNet;
use rebalancer_core::h2::{
    policy::IdentityNames,
    relay::{Relay, Settings},
};
use rustls::pki_types::CertificateDer;
use socket2::{Domain, Protocol as SocketProtocol, SockFilter, SockRef, Socket, TcpKeepalive, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, watch},
    time::{sleep, timeout},
};

use super::{
    Limits, http1,
    identity::Claim,
    proxy_protocol,
    pump::{self, End},
    registry::{Connection, Registry},
    stream,
    takeover::Listening,
    tls::{ALPN, Reloader, Tls},
    trust::{self, Trust},
    upstream::Target,
    workers::Workers,
};
use crate::{
    random,
    shim::wire::{Protocol, Upstream},
    sys,
};

/// As Go's net package asks it of accepted connections: a vanished client is noticed after some minutes.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(15))
    .with_interval(Duration::from_secs(15))
    .with_retries(9);

/// How long to wait before an address or an accept is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What every accepted connection needs.
pub struct Door {
    /// Where clients come in.
    pub listen: SocketAddr,
    /// Certificates.
    pub tls: Arc<Reloader>,
    /// The apiserver.
    pub target: Arc<Target>,
    /// Every connection.
    pub registry: Arc<Registry>,
    /// Who begins with a PROXY protocol header.
    pub proxies: Vec<IpNet>,
    /// The listening socket, for a successor and for the agent.
    pub listening: Arc<Listening>,
    /// The headers that say who asks.
    pub names: Arc<IdentityNames>,
    /// Bounds.
    pub limits: Limits,
    /// Where connections are served.
    pub workers: Workers,
    /// Rings when a connection to the apiserver failed: the health check looks at once.
    pub doubt: Arc<Notify>,
}

/// Binds the address.
///
/// # Errors
///
/// Names the address and what the system says.
pub fn bind(listen: SocketAddr) -> anyhow::Result<TcpListener> {
    let bound = || {
        let socket = Socket::new(Domain::for_address(listen), Type::STREAM, Some(SocketProtocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&listen.into())?;
        socket.listen(4096)?;
        TcpListener::from_std(socket.into())
    };
    bound().with_context(|| {
        format!("--listen {listen}: cannot listen there; is the address this node's, and the port free?")
    })
}

/// Why accepting ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It does not.
    Not,
    /// The relay ends.
    Ending,
    /// Another relay has the socket.
    Taken,
}

/// How long a relay that ends still accepts when somebody steers connections to its socket.
const NOTICE: Duration = Duration::from_secs(1);

/// How long handshakes of TCP that have begun when the port closes may take.
const HANDSHAKES: Duration = Duration::from_millis(500);

/// A classic BPF filter that drops segments with SYN and without ACK, and passes all others: on a listening socket the
/// kernel looks at it before a handshake begins (net/ipv4/tcp_ipv4.c, `tcp_v4_rcv`), and the segment begins with TCP's
/// header. The client sends its SYN again, and by then the port is closed.
const NO_SYN: [SockFilter; 5] = {
    const FLAGS_AT: u32 = 13;
    const SYN: u32 = 0x02;
    const ACK: u32 = 0x10;
    [
        SockFilter::new((libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16, 0, 0, FLAGS_AT),
        SockFilter::new((libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16, 0, 0, SYN | ACK),
        SockFilter::new((libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, 0, 1, SYN),
        SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0),
        SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, u32::MAX),
    ]
};

/// Accepts while the apiserver does, until told to stop; `inherited` is a predecessor's socket.
pub async fn run(
    door: Arc<Door>,
    mut inherited: Option<Arc<TcpListener>>,
    mut upstream: watch::Receiver<Upstream>,
    mut stop: watch::Receiver<Stop>,
) {
    loop {
        tokio::select! {
            seen = state(&mut upstream, |seen| *seen != Upstream::Unknown) => if !seen { return },
            _ = state(&mut stop, |stop| *stop != Stop::Not) => return,
        }
        if !is_reachable(&upstream.borrow()) {
            inherited = None;
            door.listening.set(None);
        }
        tokio::select! {
            seen = state(&mut upstream, is_reachable) => if !seen { return },
            _ = state(&mut stop, |stop| *stop != Stop::Not) => return,
        }
        let listener = match inherited.take().map_or_else(|| bind(door.listen).map(Arc::new), Ok) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "cannot listen; trying again");
                sleep(RETRY).await;
                continue;
            }
        };
        door.listening.set(Some(Arc::clone(&listener)));
        tracing::info!(address = %door.listen, upstream = %door.target.address, "listening");
        loop {
            tokio::select! {
                accepted = listener.accept() => door.accepted(accepted).await,
                seen = state(&mut upstream, |seen| !is_reachable(seen)) => {
                    if !seen {
                        return;
                    }
                    tracing::warn!(upstream = %door.target.address, "the apiserver is unreachable: closing the port");
                    door.listening.set(None);
                    break;
                }
                _ = state(&mut stop, |stop| *stop != Stop::Not) => {
                    if *stop.borrow() == Stop::Ending {
                        door.last_ones(&listener).await;
                    }
                    door.listening.set(None);
                    return;
                }
            }
        }
    }
}

fn is_reachable(state: &Upstream) -> bool {
    matches!(state, Upstream::Ready | Upstream::Starting)
}

/// Waits for a state; `false` when nobody will report one any more.
async fn state<T>(seen: &mut watch::Receiver<T>, wanted: impl FnMut(&T) -> bool) -> bool {
    seen.wait_for(wanted).await.is_ok()
}

/// Takes the entry out of the registry when the task ends, however it ends.
struct Entry {
    connection: Arc<Connection>,
    reason: String,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.connection.close(&self.reason);
    }
}

impl Door {
    async fn accepted(self: &Arc<Self>, accepted: io::Result<(TcpStream, SocketAddr)>) {
        match accepted {
            Ok((stream, client)) => self.admit(stream, client),
            Err(error) => {
                tracing::error!(%error, "cannot accept; trying again");
                sleep(RETRY).await;
            }
        }
    }

    /// Accepts what came before the port closes: closing it would reset those that wait.
    async fn last_ones(self: &Arc<Self>, listener: &TcpListener) {
        if self.listening.end() {
            self.accept_for(NOTICE, listener).await;
        }
        // Whoever connects between the last accept and the close would be reset: no handshake begins any more.
        if let Err(error) = SockRef::from(listener).attach_filter(&NO_SYN) {
            tracing::warn!(%error, "clients that connect just as the port closes may be reset");
        }
        self.accept_for(HANDSHAKES, listener).await;
    }

    async fn accept_for(self: &Arc<Self>, time: Duration, listener: &TcpListener) {
        let accept = async {
            loop {
                self.accepted(listener.accept().await).await;
            }
        };
        // It ends by its time only.
        let _: Result<(), _> = timeout(time, accept).await;
    }

    fn admit(self: &Arc<Self>, stream: TcpStream, client: SocketAddr) {
        if self.registry.len() >= self.limits.max_connections {
            tracing::warn!(%client, limit = self.limits.max_connections, "refused: --max-connections is reached");
            return;
        }
        let prepared = || -> io::Result<_> {
            stream.set_nodelay(true)?;
            SockRef::from(&stream).set_tcp_keepalive(&KEEPALIVE)?;
            Ok((sys::socket_cookie(stream.as_fd())?, stream.local_addr()?))
        };
        let (cookie, local) = match prepared() {
            Ok(prepared) => prepared,
            // Gone already.
            Err(error) => {
                return tracing::debug!(%client, %error, "a connection failed before its first byte");
            }
        };
        let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        let mut entry = Entry {
            connection: self.registry.open(cookie, canonical(client), canonical(local)),
            reason: "the relay's task ended early".to_owned(),
        };
        // Its events are of another thread from here on.
        let stream = match stream.into_std() {
            Ok(stream) => stream,
            Err(error) => {
                entry.reason = error.to_string();
                return;
            }
        };
        let door = Arc::clone(self);
        self.workers.spawn(async move {
            let served = match TcpStream::from_std(stream) {
                Ok(stream) => door.serve(stream, &entry.connection).await,
                Err(error) => Err(error.into()),
            };
            entry.reason = match served {
                Ok(end) => end.to_string(),
                Err(error) => format!("{error:#}"),
            };
            tracing::debug!(%client, reason = entry.reason, "closed");
        });
    }

    /// Who the client is, as the apiserver's authenticators would say of the same chain.
    fn claim(&self, tls: &Tls, chain: &[CertificateDer<'_>], connection: &Connection) -> Claim {
        let judgement = tls.authorities.judge(chain, trust::now_ns());
        if let Some(error) = &judgement.why {
            tracing::info!(client = %connection.client(), error, "a client certificate is not accepted");
        } else {
            connection.set_trust(Trust::new(chain, &judgement, Arc::clone(&self.tls)));
        }
        judgement.claim
    }

    async fn serve(&self, mut stream: TcpStream, connection: &Arc<Connection>) -> anyhow::Result<End> {
        let tls = self.tls.current();
        let handshakes = async {
            if proxy_protocol::is_listed(&self.proxies, connection.client())
                && let Some(client) = proxy_protocol::take(&mut stream)
                    .await
                    .inspect_err(|error| tracing::info!(load_balancer = %connection.client(), %error, "refused"))?
            {
                connection.set_client(client);
            }
            let client = stream::accept(tls.server(connection.local().ip()), stream)
                .await
                .context("the client's TLS handshake failed")?;
            let session = client.state();
            let h2 = session.alpn_protocol() == Some(ALPN[0]);
            let claim = match session.peer_certificates() {
                None => Claim::Absent,
                Some(chain) => self.claim(&tls, chain, connection),
            };
            let config = if claim.is_believed() {
                &tls.front_proxy
            } else {
                &tls.anonymous
            };
            let server = self
                .target
                .connect(config, ALPN[usize::from(!h2)])
                .await
                .inspect_err(|_| self.doubt.notify_one())
                .with_context(|| format!("cannot reach the apiserver at {}", self.target.address))?;
            anyhow::Ok((client, server, claim, h2))
        };
        // On the heap for as long as they last: what follows, which lasts, is small.
        let (client, server, claim, h2) = timeout(self.limits.handshake_timeout, Box::pin(handshakes))
            .await
            .context("the handshakes took too long")??;

        let end = if h2 {
            connection.established(Protocol::H2, claim.user());
            let relay = Relay::new(Settings {
                policy: claim.policy(Arc::clone(&self.names), connection.client().ip()),
                max_header_bytes: self.limits.max_header_bytes,
                ping: random::u64().to_be_bytes(),
                watch_handover: self.limits.watch_handover.is_some(),
            });
            pump::run(client, server, relay, connection).await
        } else {
            connection.established(Protocol::Http1, claim.user());
            Box::pin(http1::run(
                client,
                server,
                claim.policy(Arc::clone(&self.names), connection.client().ip()),
                connection,
            ))
            .await
        };
        if matches!(end, End::Server | End::ServerIo(_)) {
            self.doubt.notify_one();
        }
        Ok(end)
    }
}
