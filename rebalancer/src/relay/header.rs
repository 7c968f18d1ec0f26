//! Reading a load balancer's PROXY protocol header off the front of a connection, and not an octet more.
//!
//! Must never believe a header from an address that is not listed.

use std::{io, net::SocketAddr};

use ipnet::IpNet;
use rebalancer_core::wire::proxy_protocol::{self, MAX_HEADER, ProxyError};
use tokio::{io::AsyncReadExt as _, net::TcpStream};

/// Why a connection from a listed address is refused.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// It does not begin as `--proxy-protocol` promises.
    #[error(transparent)]
    Malformed(#[from] ProxyError),
    /// It cannot be read.
    #[error("the PROXY protocol header cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// Whether connections from that address begin with a header: `--proxy-protocol` lists it.
pub fn is_listed(listed: &[IpNet], load_balancer: SocketAddr) -> bool {
    let address = load_balancer.ip().to_canonical();
    listed.iter().any(|net| net.contains(&address))
}

/// Takes the header: the client's address, where it names one.
///
/// # Errors
///
/// See [`HeaderError`].
pub async fn take(stream: &mut TcpStream) -> Result<Option<SocketAddr>, HeaderError> {
    let mut seen = Vec::new();
    let mut peeked = [0; 256];
    loop {
        // What is behind the header belongs to TLS: it is looked at, and left where it is.
        let count = stream.peek(&mut peeked[..(MAX_HEADER - seen.len()).min(256)]).await?;
        if count == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let taken = seen.len();
        seen.extend_from_slice(&peeked[..count]);
        let header = proxy_protocol::parse(&seen)?;
        let wanted = header.map_or(count, |header| header.length - taken);
        stream.read_exact(&mut peeked[..wanted]).await?;
        if let Some(header) = header {
            return Ok(header.client);
        }
    }
}
