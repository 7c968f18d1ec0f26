//! The local apiserver behind the relay: connecting to it, and asking whether it is ready.
//!
//! Output: TLS streams, and the state that the listener and the control socket follow.
//! Must never send a client's bytes anywhere else.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{net::TcpStream, time::timeout};

use super::{
    stream::{self, ClientStream},
    tls::Reloader,
};
use crate::shim::wire::Upstream;

/// How long a check may take.
const CHECK: Duration = Duration::from_secs(3);

/// Where the apiserver is.
#[derive(Debug)]
pub struct Target {
    /// Its address on this node.
    pub address: SocketAddr,
    /// The name its certificate must have.
    pub name: ServerName<'static>,
    /// The certificates.
    pub tls: Arc<Reloader>,
}

impl Target {
    /// Connects with a configuration of this target's [`Reloader`] and offers exactly one protocol.
    ///
    /// # Errors
    ///
    /// What the socket or TLS says; [`io::ErrorKind::InvalidData`] when the apiserver selects another protocol.
    pub async fn connect(&self, config: &Arc<ClientConfig>, protocol: &[u8]) -> io::Result<ClientStream> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let stream = stream::connect(Arc::clone(config), self.name.clone(), protocol, stream).await?;
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

    /// Asks `/readyz`, as nobody in particular.
    pub async fn check(&self) -> Upstream {
        match timeout(CHECK, TcpStream::connect(self.address)).await {
            Ok(Ok(_)) => {}
            _ => return Upstream::Unreachable,
        }
        match timeout(CHECK, self.readyz()).await {
            // Not allowed to ask is an answer too: something authenticates and authorises already.
            Ok(Ok(status)) if status.is_success() || status.is_client_error() => Upstream::Ready,
            Ok(Ok(_)) => Upstream::Starting,
            Ok(Err(error)) => {
                tracing::debug!(%error, "the readiness check failed");
                Upstream::Starting
            }
            Err(_) => Upstream::Starting,
        }
    }

    async fn readyz(&self) -> anyhow::Result<http::StatusCode> {
        let stream = self.connect(&self.tls.current().anonymous, b"http/1.1").await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let request = http::Request::get("/readyz")
            .header(http::header::HOST, self.name.to_str().as_ref())
            .header(
                http::header::USER_AGENT,
                concat!("rebalancer/", env!("CARGO_PKG_VERSION")),
            )
            .body(Empty::<bytes::Bytes>::new())?;
        // The sender goes with the answer, and the connection with the sender.
        let asked = async move {
            let answer = sender.send_request(request).await?;
            let status = answer.status();
            answer.into_body().collect().await?;
            anyhow::Ok(status)
        };
        let (status, _) = tokio::join!(asked, connection);
        status
    }
}
