//! The floor: a relay that ends TLS on both sides and copies bytes without reading them.
//!
//! Job: what any proxy that holds the certificates must spend. Must never look at what it copies.

use std::{fs, net::SocketAddr, path::Path, sync::Arc};

use anyhow::Context as _;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::pki::SERVER_NAME;

/// Copies for as long as the process lives, on one thread.
///
/// # Errors
///
/// The certificates or the address cannot be used.
pub fn run(listen: SocketAddr, upstream: SocketAddr, directory: &Path) -> anyhow::Result<()> {
    // More than its fair share of descriptors is not needed: what may be had is had.
    super::machine::open_files()?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let chain = CertificateDer::pem_file_iter(directory.join("apiserver.crt"))?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(directory.join("apiserver.key"))?;
    let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    server.alpn_protocols = vec![b"h2".to_vec()];
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&fs::read(directory.join("ca.crt"))?)?)?;
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(server));
    let connector = TlsConnector::from(Arc::new(client));
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(accept(listen, upstream, acceptor, connector))
}

async fn accept(
    listen: SocketAddr,
    upstream: SocketAddr,
    acceptor: TlsAcceptor,
    connector: TlsConnector,
) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("cannot listen on {listen}"))?;
    loop {
        let (stream, _) = listener.accept().await?;
        let (acceptor, connector) = (acceptor.clone(), connector.clone());
        tokio::spawn(async move {
            if let Err(error) = copy(stream, upstream, acceptor, connector).await {
                eprintln!("{error:#}");
            }
        });
    }
}

async fn copy(
    stream: TcpStream,
    upstream: SocketAddr,
    acceptor: TlsAcceptor,
    connector: TlsConnector,
) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let mut client = acceptor.accept(stream).await?;
    let stream = TcpStream::connect(upstream).await?;
    stream.set_nodelay(true)?;
    let mut server = connector.connect(ServerName::try_from(SERVER_NAME)?, stream).await?;
    tokio::io::copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}
