//! The peers' port: handshakes, each in a task of its own, and who may read.
//!
//! Output: connections that proved who they are as TLS checks it, and whether they are one of the peers'.
//! Must never let strangers hold more than a few places, nor fill the log: a refusal is counted, and said every ten seconds.
//! Who has shown that it is a peer has a place of its own: a region's agents may all come from one address.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{
    extract::connect_info::Connected,
    serve::{IncomingStream, Listener},
};
use prometheus_client::metrics::counter::Counter;
use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{PATIENCE, tls::PeerTls};
use crate::{
    agent::places::{Place, Places},
    listen,
};

/// Connections at once of strangers, which everybody is while it shakes hands.
const PLACES: usize = 256;

/// Of these, from one address.
const PLACES_OF_ONE: usize = 8;

/// Connections at once of peers, wherever they come from: behind a gateway, or in one network of IPv6, many have one address.
const PLACES_OF_PEERS: usize = 4_096;

/// After a line about a refusal the next is so long in coming.
const QUIET: Duration = Duration::from_secs(10);

/// Who asks, and whether they may read.
#[derive(Clone, Debug)]
pub struct Asker {
    /// Where from.
    pub address: SocketAddr,
    /// What it showed, and proved to have the key of.
    pub certificate: Option<CertificateDer<'static>>,
}

impl Connected<IncomingStream<'_, TlsListener>> for Asker {
    fn connect_info(stream: IncomingStream<'_, TlsListener>) -> Self {
        stream.remote_addr().clone()
    }
}

/// Accepts and shakes hands: a silent client holds up nobody.
pub struct TlsListener {
    address: SocketAddr,
    ready: mpsc::Receiver<(Admitted, Asker)>,
}

impl TlsListener {
    /// Listens.
    ///
    /// # Errors
    ///
    /// Names the address and what the system says.
    pub async fn bind(address: SocketAddr, tls: Arc<PeerTls>, refused: Counter) -> anyhow::Result<Self> {
        let mut listener = listen::listen(address).map_err(|error| {
            let hint = listen::hint(address, &error);
            anyhow::Error::new(error).context(format!("--peer-listen {address}: cannot listen there; {hint}"))
        })?;
        let (accepted, ready) = mpsc::channel(16);
        let refusals = Arc::new(Refusals {
            counter: refused,
            unsaid: Mutex::default(),
        });
        tokio::spawn(async move {
            let places = Places::new(PLACES, PLACES_OF_ONE);
            let of_peers = Places::new(PLACES_OF_PEERS, PLACES_OF_PEERS);
            loop {
                let (stream, from) = Listener::accept(&mut listener).await;
                let Some(place) = places.take(from.ip()) else {
                    refusals.refuse(from, &"there is no place: too many connections at once");
                    continue;
                };
                let acceptor = TlsAcceptor::from(tls.server());
                let (accepted, refusals, tls) = (accepted.clone(), Arc::clone(&refusals), Arc::clone(&tls));
                let of_peers = Arc::clone(&of_peers);
                tokio::spawn(async move {
                    match timeout(PATIENCE, acceptor.accept(stream)).await {
                        Ok(Ok(stream)) => {
                            let certificates = stream.get_ref().1.peer_certificates();
                            let certificate = certificates.and_then(<[_]>::first).cloned();
                            let place = match tls.admits(certificate.as_ref()) {
                                // Without a place among the peers it keeps the one it has.
                                Ok(()) => of_peers.take(from.ip()).unwrap_or(place),
                                Err(why) => {
                                    refusals.refuse(from, &why);
                                    place
                                }
                            };
                            let asker = Asker {
                                address: from,
                                certificate: certificate.map(CertificateDer::into_owned),
                            };
                            let admitted = Admitted { stream, _place: place };
                            // Nobody takes it any more when the agent ends.
                            drop(accepted.send((admitted, asker)).await);
                        }
                        Ok(Err(error)) => refusals.refuse(from, &error),
                        Err(_) => refusals.refuse(from, &"it did not finish its TLS handshake"),
                    }
                });
            }
        });
        Ok(Self { address, ready })
    }
}

impl Listener for TlsListener {
    type Io = Admitted;
    type Addr = Asker;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(accepted) => accepted,
            // The accepting task never ends by itself.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(Asker {
            address: self.address,
            certificate: None,
        })
    }
}

/// Refusals: counted, and said now and then.
struct Refusals {
    counter: Counter,
    unsaid: Mutex<(Option<Instant>, u64)>,
}

impl Refusals {
    fn refuse(&self, from: SocketAddr, why: &dyn std::fmt::Display) {
        self.counter.inc();
        let mut unsaid = self.unsaid.lock().unwrap_or_else(PoisonError::into_inner);
        if unsaid.0.is_some_and(|at| at.elapsed() < QUIET) {
            unsaid.1 += 1;
            return;
        }
        let more = std::mem::take(&mut unsaid.1);
        unsaid.0 = Some(Instant::now());
        tracing::warn!(%from, %why, unsaid = more, "refused on the peers' port");
    }
}

/// A connection with its place.
#[derive(Debug)]
pub struct Admitted {
    stream: TlsStream<TcpStream>,
    _place: Place,
}

impl AsyncRead for Admitted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Admitted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, octets: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, octets)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, net::Ipv4Addr};

    use rustls::pki_types::ServerName;
    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpListener;
    use tokio_rustls::TlsConnector;

    use super::*;
    use crate::agent::peers::pin::{Identity, PinnedTls};

    #[tokio::test]
    async fn peers_of_one_address_have_each_a_place_and_strangers_a_few() {
        let [here, there] = [(); 2].map(|()| Identity::make().expect("a key"));
        let (pin, known) = (here.hash, there.hash);
        let [here, there] = [here, there].map(|identity| PinnedTls::new(identity).expect("TLS"));
        here.know(BTreeSet::from([known]));
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let address = port.local_addr().expect("its address");
        drop(port);
        let here = Arc::new(PeerTls::Pinned(here));
        let mut listener = TlsListener::bind(address, here, Counter::default())
            .await
            .expect("a listener");
        let connector = TlsConnector::from(there.client(pin).expect("TLS"));
        let name = ServerName::from(address.ip());
        let mut held = Vec::new();
        for _ in 0..2 * PLACES_OF_ONE {
            let stream = TcpStream::connect(address).await.expect("a connection");
            let client = connector.connect(name.clone(), stream).await.expect("a handshake");
            held.push((client, listener.accept().await));
        }
        // Those who say nothing are strangers.
        let mut silent = Vec::new();
        for _ in 0..PLACES_OF_ONE {
            silent.push(TcpStream::connect(address).await.expect("a connection"));
        }
        let mut refused = TcpStream::connect(address).await.expect("a connection");
        let read = timeout(PATIENCE / 2, refused.read(&mut [0])).await;
        assert!(matches!(read, Ok(Ok(0) | Err(_))), "it is closed at once: {read:?}");
    }
}
