//! Whether a connection that is steered to the relay would be served: asked through the relay's own door.
//!
//! Input: the relay's listening socket, for its address. Output: whether TLS and an answer came of it.
//! Must never be believed of more than that: it asks as nobody, and looks at no certificate.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::BorrowedFd,
    sync::Arc,
    time::Duration,
};

use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;

/// How long the answer may take: an apiserver that is slow is slow for those it gets directly too.
const PATIENCE: Duration = Duration::from_secs(5);

/// The request: any answer will do, since an apiserver that is not ready says so to everybody.
const REQUEST: &[u8] =
    b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nUser-Agent: rebalancer-agent\r\nConnection: close\r\n\r\n";

/// Asks a relay over its own port.
#[derive(Clone)]
pub struct Probe(TlsConnector);

impl Probe {
    /// Asks nobody yet.
    ///
    /// # Errors
    ///
    /// TLS cannot be configured.
    pub fn new() -> Result<Self, rustls::Error> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(TlsConnector::from(Arc::new(config))))
    }

    /// The certificate that is shown there to who asks for no name.
    ///
    /// # Errors
    ///
    /// There is none, in time.
    pub async fn shown(&self, address: SocketAddr) -> io::Result<CertificateDer<'static>> {
        let asked = async {
            let stream = TcpStream::connect(address).await?;
            let stream = self.0.connect(ServerName::from(address.ip()), stream).await?;
            let (_, tls) = stream.get_ref();
            let first = tls.peer_certificates().and_then(<[_]>::first);
            first.cloned().ok_or_else(|| io::ErrorKind::InvalidData.into())
        };
        timeout(PATIENCE, asked).await.map_err(io::Error::from)?
    }

    /// One connection and one request.
    ///
    /// # Errors
    ///
    /// Nothing came of it, in time.
    pub async fn ask(&self, address: SocketAddr) -> io::Result<()> {
        let asked = async {
            let stream = TcpStream::connect(address).await?;
            let mut stream = self.0.connect(ServerName::from(address.ip()), stream).await?;
            stream.write_all(REQUEST).await?;
            stream.flush().await?;
            let mut begin = [0; 9];
            stream.read_exact(&mut begin).await?;
            if begin.starts_with(b"HTTP/1.") {
                Ok(())
            } else {
                Err(io::ErrorKind::InvalidData.into())
            }
        };
        timeout(PATIENCE, asked).await.map_err(io::Error::from)?
    }
}

/// Where a listening socket can be reached from its own host.
pub fn address_of(socket: BorrowedFd<'_>) -> Option<SocketAddr> {
    let address = SockRef::from(&socket).local_addr().ok()?.as_socket()?;
    Some(match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), address.port()),
        IpAddr::V6(ip) if ip.is_unspecified() => SocketAddr::new(Ipv6Addr::LOCALHOST.into(), address.port()),
        _ => address,
    })
}

/// Takes any certificate: who answers on this host's port is not the question.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
