//! The floor: a relay that ends TLS on both sides and copies bytes without reading them; or leaves TLS alone too.
//!
//! Job: what any proxy that holds the certificates must spend, and what any hop must. Must never look at what it copies,
//! nor end for what somebody else does.

use std::{fs, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, ServerConnection,
    client::Resumption,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    server::WebPkiClientVerifier,
    sign::{CertifiedKey, SingleCertAndKey},
};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::{
    pki::{SERVER_NAME, Signer},
    process::open_files,
};

/// Copies for as long as the process lives, on one thread; without certificates, what passes is TLS still. With
/// `as_clients` the server is shown a certificate for whom the client's is for, which the directory's `ca.key` signs.
///
/// # Errors
///
/// The certificates or the address cannot be used.
pub fn run(
    listen: SocketAddr,
    upstream: SocketAddr,
    certificates: Option<&Path>,
    as_clients: bool,
) -> anyhow::Result<()> {
    // More than its fair share of descriptors is not needed: what may be had is had.
    open_files()?;
    let ends = certificates
        .map(|directory| Ends::read(directory, as_clients))
        .transpose()?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async {
            let listener = TcpListener::bind(listen)
                .await
                .with_context(|| format!("cannot listen on {listen}"))?;
            accept(&listener, upstream, ends).await
        })
}

/// What both ends speak, best first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Both ends of TLS.
#[derive(Clone)]
struct Ends {
    acceptor: TlsAcceptor,
    /// To the server, for a client without a name.
    nobody: Arc<ClientConfig>,
    /// What the server is shown of clients is signed by, where it is to know them.
    signer: Option<Arc<Signer>>,
}

impl Ends {
    fn read(directory: &Path, as_clients: bool) -> anyhow::Result<Self> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let chain = CertificateDer::pem_file_iter(directory.join("apiserver.crt"))?.collect::<Result<Vec<_>, _>>()?;
        let key = PrivateKeyDer::from_pem_file(directory.join("apiserver.key"))?;
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&fs::read(directory.join("ca.crt"))?)?)?;
        let server =
            ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
        let server = if as_clients {
            let judge = WebPkiClientVerifier::builder_with_provider(Arc::new(roots.clone()), Arc::clone(&provider));
            // A load balancer that asks for its health has none.
            server.with_client_cert_verifier(judge.allow_unauthenticated().build()?)
        } else {
            server.with_no_client_auth()
        };
        let mut server = server.with_single_cert(chain, key)?;
        server.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(server)),
            nobody: Arc::new(client),
            signer: as_clients.then(|| Signer::read(directory)).transpose()?.map(Arc::new),
        })
    }

    /// To the server, for that client: with its protocol, and in its name where it has to have one.
    fn connector(&self, client: &ServerConnection) -> anyhow::Result<TlsConnector> {
        let mut config = ClientConfig::clone(&self.nobody);
        let shown = client.peer_certificates().and_then(<[_]>::first);
        if let Some((signer, shown)) = self.signer.as_ref().zip(shown) {
            let (certificate, key) = signer.like(shown)?;
            let key = PrivateKeyDer::Pkcs8(key.into());
            let signing = config.crypto_provider().key_provider.load_private_key(key)?;
            let pair = CertifiedKey::new(vec![certificate.into()], signing);
            config.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(pair));
            // What was kept of another client's handshake would be in that one's name.
            config.resumption = Resumption::disabled();
        }
        config.alpn_protocols = client.alpn_protocol().map(<[u8]>::to_vec).into_iter().collect();
        Ok(TlsConnector::from(Arc::new(config)))
    }
}

async fn accept(listener: &TcpListener, upstream: SocketAddr, ends: Option<Ends>) -> anyhow::Result<()> {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // It had gone, or there is no descriptor for it.
            tokio::time::sleep(Duration::from_millis(1)).await;
            continue;
        };
        let ends = ends.clone();
        tokio::spawn(async move {
            if let Err(error) = copy(stream, upstream, ends).await {
                eprintln!("{error:#}");
            }
        });
    }
}

async fn copy(mut stream: TcpStream, upstream: SocketAddr, ends: Option<Ends>) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let Some(ends) = ends else {
        let mut server = TcpStream::connect(upstream).await?;
        server.set_nodelay(true)?;
        tokio::io::copy_bidirectional(&mut stream, &mut server).await?;
        return Ok(());
    };
    let mut client = ends.acceptor.accept(stream).await?;
    let connector = ends.connector(client.get_ref().1)?;
    let stream = TcpStream::connect(upstream).await?;
    stream.set_nodelay(true)?;
    let mut server = connector.connect(ServerName::try_from(SERVER_NAME)?, stream).await?;
    tokio::io::copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use x509_parser::prelude::{FromDer as _, X509Certificate};

    use super::*;
    use crate::{h2wire::client_config, pki::Pki};

    /// Tells whoever comes who it is.
    async fn tells_who(listener: TcpListener, acceptor: TlsAcceptor) -> anyhow::Result<()> {
        loop {
            let (stream, _) = listener.accept().await?;
            let mut stream = acceptor.accept(stream).await?;
            let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
            let who = match shown {
                None => "nobody".to_owned(),
                Some(shown) => X509Certificate::from_der(shown)?.1.subject().to_string(),
            };
            stream.write_all(who.as_bytes()).await?;
            stream.shutdown().await?;
        }
    }

    /// A load balancer that asks for its health has no certificate, and must find the port open.
    #[test]
    fn the_server_sees_each_client_as_itself_and_nobody_as_nobody() -> anyhow::Result<()> {
        let pki = Pki::new(&[Ipv4Addr::LOCALHOST.into()])?;
        let alice = pki.client("alice", "system:node:alice", &["system:nodes", "others"])?;
        let bob = pki.client("bob", "bob", &["system:masters"])?;
        let stranger = pki.stranger("mallory", |_| ())?;
        let server = Ends::read(pki.path(), true)?.acceptor;
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(async {
                let any = (Ipv4Addr::LOCALHOST, 0);
                let (upstream, listener) = (TcpListener::bind(any).await?, TcpListener::bind(any).await?);
                let (behind, address) = (upstream.local_addr()?, listener.local_addr()?);
                tokio::spawn(tells_who(upstream, server));
                let ends = Ends::read(pki.path(), true)?;
                tokio::spawn(async move { accept(&listener, behind, Some(ends)).await });
                for (identity, expected) in [
                    (Some(&alice), Some("O=system:nodes, O=others, CN=system:node:alice")),
                    (Some(&bob), Some("O=system:masters, CN=bob")),
                    (None, Some("nobody")),
                    (Some(&stranger), None),
                    (Some(&alice), Some("O=system:nodes, O=others, CN=system:node:alice")),
                ] {
                    let connector = TlsConnector::from(Arc::new(client_config(&pki, identity, b"h2")?));
                    let stream = TcpStream::connect(address).await?;
                    let mut stream = connector.connect(ServerName::try_from(SERVER_NAME)?, stream).await?;
                    let mut who = String::new();
                    let read = stream.read_to_string(&mut who).await.map(|_| who.as_str());
                    assert_eq!(read.ok(), expected);
                }
                Ok(())
            })
    }
}
