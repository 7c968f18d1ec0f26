//! The floor: a relay that ends TLS on both sides and copies bytes without reading them; or leaves TLS alone too.
//!
//! Job: what any proxy that holds the certificates must spend, and what any hop must. Must never look at what it copies,
//! nor end for what somebody else does.

use std::{fs, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::{pki::SERVER_NAME, process::open_files};

/// Copies for as long as the process lives, on one thread; without certificates, what passes is TLS still. With the name of
/// one of them, the server is shown that one, whoever the client is.
///
/// # Errors
///
/// The certificates or the address cannot be used.
pub fn run(
    listen: SocketAddr,
    upstream: SocketAddr,
    certificates: Option<&Path>,
    identity: Option<&str>,
) -> anyhow::Result<()> {
    // More than its fair share of descriptors is not needed: what may be had is had.
    open_files()?;
    let ends = certificates
        .map(|directory| Ends::read(directory, identity))
        .transpose()?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(accept(listen, upstream, ends))
}

/// What both ends speak, best first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Both ends of TLS.
#[derive(Clone)]
struct Ends {
    acceptor: TlsAcceptor,
    /// One for each of [`PROTOCOLS`].
    connectors: [TlsConnector; 2],
}

impl Ends {
    fn read(directory: &Path, identity: Option<&str>) -> anyhow::Result<Self> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let chain = CertificateDer::pem_file_iter(directory.join("apiserver.crt"))?.collect::<Result<Vec<_>, _>>()?;
        let key = PrivateKeyDer::from_pem_file(directory.join("apiserver.key"))?;
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        server.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&fs::read(directory.join("ca.crt"))?)?)?;
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
        let client = match identity {
            None => client.with_no_client_auth(),
            Some(stem) => {
                let file = |kind: &str| directory.join(format!("{stem}.{kind}"));
                let chain = CertificateDer::pem_file_iter(file("crt"))?.collect::<Result<Vec<_>, _>>()?;
                client.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(file("key"))?)?
            }
        };
        let connectors = PROTOCOLS.map(|protocol| {
            let mut client = client.clone();
            client.alpn_protocols = vec![protocol.to_vec()];
            TlsConnector::from(Arc::new(client))
        });
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(server)),
            connectors,
        })
    }
}

async fn accept(listen: SocketAddr, upstream: SocketAddr, ends: Option<Ends>) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("cannot listen on {listen}"))?;
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
    let Some(Ends { acceptor, connectors }) = ends else {
        let mut server = TcpStream::connect(upstream).await?;
        server.set_nodelay(true)?;
        tokio::io::copy_bidirectional(&mut stream, &mut server).await?;
        return Ok(());
    };
    let mut client = acceptor.accept(stream).await?;
    let is_h2 = client.get_ref().1.alpn_protocol() == Some(PROTOCOLS[0]);
    let connector = &connectors[usize::from(!is_h2)];
    let stream = TcpStream::connect(upstream).await?;
    stream.set_nodelay(true)?;
    let mut server = connector.connect(ServerName::try_from(SERVER_NAME)?, stream).await?;
    tokio::io::copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}
