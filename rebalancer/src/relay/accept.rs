//! The front door: both handshakes, and who the client is.
//!
//! Input: accepted sockets. Output: pumps, one task each. Must never connect to the apiserver for somebody who has said nothing.

use std::{
    io,
    net::SocketAddr,
    os::fd::AsFd as _,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use ipnet::IpNet;
use rebalancer_core::wire::{
    h2::relay::{Relay, Settings},
    rewrite::IdentityNames,
};
use rustls::pki_types::CertificateDer;
use socket2::{SockRef, TcpKeepalive};
use tokio::{net::TcpStream, sync::Notify, time::timeout};

use super::{
    Limits,
    admission::{Admission, Place},
    begun::{Begun, first_octets, unserved},
    complaints::{Cause, Complaints},
    header,
    http1::{self, Renews},
    identity::Claim,
    metrics::Metrics,
    pump::{self, End},
    registry::{Connection, Registry},
    replacement::Replacements,
    stream::{self, ClientStream, ServerStream},
    takeover::Listening,
    tls::{ALPN, Reloader, Tls},
    trust::{self, Trust},
    unix_now,
    upstream::{self, Target},
    vigil::{Behind, Vigil, is_end},
    workers::Workers,
};
use crate::{random, shim::wire::Protocol, sys};

/// As Go's net package asks it of accepted connections: a vanished client is noticed after some minutes.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(15))
    .with_interval(Duration::from_secs(15))
    .with_retries(9);

/// How long a client with HTTP/2 may take for its first octet: Go's own `prefaceTimeout` (net/http/h2_bundle.go).
const PREFACE: Duration = Duration::from_secs(10);

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
    /// Who has a place.
    pub admission: Arc<Admission>,
    /// What goes wrong with single connections.
    pub complaints: Arc<Complaints>,
    /// Figures.
    pub metrics: Arc<Metrics>,
    /// Who begins with a PROXY protocol header.
    pub proxies: Vec<IpNet>,
    /// The listening socket, for a successor and for the agent.
    pub listening: Arc<Listening>,
    /// The headers that say who asks.
    pub names: Arc<IdentityNames>,
    /// Bounds.
    pub limits: Limits,
    /// Where connections are served.
    pub workers: Arc<Workers>,
    /// Rings when a connection to the apiserver failed: the health check looks soon.
    pub doubt: Arc<Notify>,
    /// Whether anybody listens behind the port.
    pub vigil: Arc<Vigil>,
    /// Connections to the apiserver with a certificate that is newer than a client.
    pub replacements: Replacements,
}

/// So long a client that finds no apiserver may take to hear it.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Takes the entry out of the registry when the task ends, however it ends.
struct Entry {
    connection: Arc<Connection>,
    reason: String,
}

impl Entry {
    fn ends(&mut self, reason: String) {
        self.reason = reason;
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let connection = &self.connection;
        let shown = connection.shown();
        // One line a connection, for whoever asks for this level.
        tracing::debug!(
            client = %shown.client,
            protocol = ?shown.protocol,
            user = shown.user,
            user_agent = shown.user_agent,
            requests = shown.counters.requests,
            bytes_in = shown.counters.bytes_in,
            bytes_out = shown.counters.bytes_out,
            age_ms = shown.age_ms,
            reason = self.reason,
            "closed"
        );
        connection.close(&self.reason);
    }
}

/// A client whose handshakes are done, and the connection to the apiserver that is its own.
struct Joined {
    client: ServerStream,
    server: ClientStream,
    claim: Claim,
    h2: bool,
    /// What it has sent.
    first: Vec<u8>,
}

impl Door {
    /// Serves a client that was accepted, on a task of its own.
    pub(super) fn admit(self: &Arc<Self>, stream: TcpStream, client: SocketAddr) {
        let prepared = || -> io::Result<_> {
            stream.set_nodelay(true)?;
            SockRef::from(&stream).set_tcp_keepalive(&KEEPALIVE)?;
            Ok((sys::socket_cookie(stream.as_fd())?, stream.local_addr()?))
        };
        let (cookie, local) = match prepared() {
            Ok(prepared) => prepared,
            Err(error) if self.runs_out(client, &error) => return,
            // Gone already.
            Err(error) => {
                return tracing::debug!(%client, %error, "a connection failed before its first byte");
            }
        };
        let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        let Some(task) = self.admission.task() else {
            let why = "others that were to give way have not gone yet";
            return self.complaints.complain(Cause::Crowded, canonical(client), &why);
        };
        let connection = self.registry.open(cookie, canonical(client), canonical(local));
        let (mut place, crowded) = self.admission.enter(client.ip(), &connection);
        if crowded {
            self.complaints
                .complain(Cause::Crowded, canonical(client), &"it is the newest");
        }
        let mut entry = Entry {
            connection,
            reason: "the relay's task ended early".to_owned(),
        };
        // Its events are of another thread from here on.
        let stream = match stream.into_std() {
            Ok(stream) => stream,
            Err(error) => {
                self.runs_out(client, &error);
                return entry.ends(error.to_string());
            }
        };
        let door = Arc::clone(self);
        self.workers.shake_hands(async move {
            let joining = async {
                let stream = TcpStream::from_std(stream).inspect_err(|error| {
                    door.runs_out(client, error);
                })?;
                tokio::select! {
                    joined = door.join(stream, &entry.connection, &mut place) => joined.map(Some),
                    () = entry.connection.closing() => Ok(None),
                }
            };
            let joined = joining.await;
            drop(task);
            match joined {
                Ok(Some(joined)) => {
                    let workers = Arc::clone(&door.workers);
                    workers.spawn(async move {
                        let _place = place;
                        match door.serve(joined, &entry.connection).await {
                            Ok(end) => entry.ends(end.to_string()),
                            Err(error) => {
                                door.runs_out(client, &error);
                                entry.ends(error.to_string());
                            }
                        }
                    });
                }
                Ok(None) => entry.ends(End::Ordered.to_string()),
                Err(error) => entry.ends(format!("{error:#}")),
            }
        });
    }

    /// Who the client is, as the apiserver's authenticators would say of the same chain.
    fn claim(&self, tls: &Tls, chain: &[CertificateDer<'_>], connection: &Connection) -> Claim {
        let judgement = tls.authorities.judge(chain, trust::now_ns());
        if let Some(error) = &judgement.why {
            self.complaints.complain(Cause::Certificate, connection.client(), error);
        } else {
            connection.set_trust(Trust::new(chain, &judgement, Arc::clone(&self.tls)));
            if let Some(ends) = connection.certificate_ends() {
                self.metrics.client_certificate_ends(ends, unix_now());
            }
            // Who vouches may have changed since this handshake began, and whoever was open then has been judged again
            // without it.
            if self.tls.current().generation != tls.generation {
                connection.review();
            }
        }
        judgement.claim
    }

    /// The load balancer's header and TLS with the client.
    async fn shake_hands(
        &self,
        mut stream: TcpStream,
        tls: &Tls,
        connection: &Connection,
    ) -> anyhow::Result<ServerStream> {
        if header::is_listed(&self.proxies, connection.peer())
            && let Some(client) = header::take(&mut stream).await.inspect_err(|error| {
                self.complaints.complain(Cause::ProxyHeader, connection.peer(), error);
            })?
        {
            connection.set_client(client);
        }
        stream::accept(tls.server(connection.local().ip()), stream, |held| {
            connection.hold(held)
        })
        .await
        .inspect_err(|error| {
            self.metrics.handshake("failed");
            if !self.runs_out(connection.client(), error) {
                self.complaints.complain(Cause::Tls, connection.client(), error);
            }
        })
        .context("the client's TLS handshake failed")
    }

    /// From accept to the apiserver: nothing is done there before the client has begun to speak HTTP.
    async fn join(&self, stream: TcpStream, connection: &Connection, place: &mut Place) -> anyhow::Result<Joined> {
        let tls = self.tls.current();
        let slow = |what: &'static str| {
            self.complaints.complain(Cause::Slow, connection.client(), &what);
            what
        };
        let limit = self.limits.handshake_timeout;
        let mut client = timeout(limit, self.shake_hands(stream, &tls, connection))
            .await
            .inspect_err(|_| self.metrics.handshake("timeout"))
            .with_context(|| slow("its TLS handshake took longer than --handshake-timeout"))??;
        self.metrics.handshake("ok");
        let h2 = client.state().alpn_protocol() == Some(ALPN[0]);
        let claim = match client.state().peer_certificates() {
            None => Claim::Absent,
            Some(chain) => {
                let claim = self.claim(&tls, chain, connection);
                // The session keeps what the client sent for as long as it lasts.
                if !claim.is_believed() && trust::is_long(chain) {
                    let why = "nobody vouches for a chain of certificates of more than 16 KiB";
                    self.complaints.complain(Cause::Certificate, connection.client(), &why);
                    anyhow::bail!(why);
                }
                claim
            }
        };
        connection.established(if h2 { Protocol::H2 } else { Protocol::Http1 }, claim.user());
        let first = timeout(if h2 { PREFACE } else { http1::HEAD }, first_octets(&mut client))
            .await
            .with_context(|| slow("it has said nothing after its TLS handshake"))??;
        anyhow::ensure!(
            !first.is_empty(),
            "the client closed the connection before it said anything"
        );
        let known = claim.is_believed();
        place.finish(known).inspect_err(|no_place| {
            self.complaints.complain(Cause::Limit, connection.client(), no_place);
        })?;
        let config = if known { &tls.front_proxy } else { &tls.anonymous };
        let began = Instant::now();
        let connecting = self.target.connect(config, ALPN[usize::from(!h2)]);
        let server = timeout(limit, connecting).await.map_err(io::Error::from).flatten();
        let server = match server {
            Ok(server) => {
                self.metrics.connected(began.elapsed());
                server
            }
            Err(error) => {
                self.unreachable(connection, &error).await;
                // Only one that is refused when it comes again: it comes at once, and without end.
                if is_end(&error) && self.target.is_gone() {
                    let _ = timeout(LAST_WORDS, pump::last_words(&mut client, unserved(h2))).await;
                }
                let address = self.target.address;
                return Err(error).with_context(|| format!("cannot reach the apiserver at {address}"));
            }
        };
        if known {
            connection.set_front_proxy(tls.front_proxy_certificate);
        }
        Ok(Joined {
            client,
            server,
            claim,
            h2,
            first,
        })
    }

    async fn unreachable(&self, connection: &Connection, error: &io::Error) {
        if !self.runs_out(connection.client(), error) {
            self.complaints.complain(Cause::Upstream, connection.client(), error);
            self.doubt.notify_one();
            if is_end(error) {
                self.breaks().await;
            }
        }
    }

    /// Says so when it is this process or node that lacks something, and nobody's fault.
    pub(super) fn runs_out(&self, client: SocketAddr, error: &io::Error) -> bool {
        let ours = upstream::is_ours(error);
        if ours {
            let why = upstream::what_ran_out(error);
            self.complaints.complain(Cause::Resources, client, &why);
        }
        ours
    }

    /// What follows the handshakes, on a thread that serves.
    async fn serve(&self, joined: Joined, connection: &Arc<Connection>) -> io::Result<End> {
        let Joined {
            mut client,
            mut server,
            claim,
            h2,
            first,
        } = joined;
        client.settle()?;
        server.settle()?;
        let policy = claim.policy(Arc::clone(&self.names), connection.client().ip());
        let end = if h2 {
            let relay = Relay::new(Settings {
                policy,
                max_header_bytes: self.limits.max_header_bytes,
                ping: random::u64().to_be_bytes(),
                watch_handover: self.limits.watch_handover.is_some(),
            });
            pump::run(Begun::new(client, first), server, relay, connection, self).await
        } else {
            let settings = http1::Settings {
                policy,
                connection,
                max_header_bytes: self.limits.max_head_bytes,
                idle: self.limits.idle_timeout,
            };
            Box::pin(http1::run(client, first, server, settings, self)).await
        };
        match &end {
            // What is lacking here says nothing of the apiserver.
            End::ClientIo(error) | End::ServerIo(error) if self.runs_out(connection.client(), error) => {}
            End::Server | End::ServerIo(_) => self.doubt.notify_one(),
            _ => {}
        }
        Ok(end)
    }
}

impl Renews<ClientStream> for Door {
    async fn renewed(&self, connection: &Connection) -> Option<ClientStream> {
        self.replacements.take(connection).await
    }
}

impl Behind for Door {
    fn leaves(&self) {
        self.vigil.look();
    }

    async fn breaks(&self) {
        self.vigil.breaks().await;
    }
}
