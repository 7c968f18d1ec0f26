//! What a client says first, before the apiserver is connected to, and what it hears when that fails.
//!
//! Must never hold a buffer for a client that says nothing.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::stream::ServerStream;

/// How much is read before the apiserver is connected to.
const FIRST: usize = 16 * 1024;

/// Waits for the first octets: nothing is held for a client that says nothing.
pub async fn first_octets(client: &mut ServerStream) -> io::Result<Vec<u8>> {
    std::future::poll_fn(|context| {
        let mut octets = [0; FIRST];
        let mut buffer = ReadBuf::new(&mut octets);
        ready!(Pin::new(&mut *client).poll_read(context, &mut buffer))?;
        Poll::Ready(Ok(buffer.filled().to_vec()))
    })
    .await
}

/// A stream of which something has been read.
pub struct Begun<S> {
    first: Vec<u8>,
    rest: S,
}

impl<S> Begun<S> {
    /// Of what was read, and what the rest comes from.
    pub fn new(rest: S, first: Vec<u8>) -> Self {
        Self { first, rest }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Begun<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.rest).poll_read(context, buffer);
        }
        let count = self.first.len().min(buffer.remaining());
        buffer.put_slice(&self.first[..count]);
        self.first.drain(..count);
        if self.first.is_empty() {
            self.first = Vec::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Begun<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, octets: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.rest).poll_write(context, octets)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.rest).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.rest).poll_shutdown(context)
    }
}

/// What a client hears none of whose requests has reached the apiserver: it may send them again, elsewhere.
pub fn unserved(h2: bool) -> &'static [u8] {
    /// Empty SETTINGS, which a server begins with (RFC 9113, section 3.4), and GOAWAY: none was processed, no error
    /// (section 6.8).
    const H2: &[u8] = b"\0\0\0\x04\0\0\0\0\0\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\0";
    const HTTP1: &[u8] =
        b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    if h2 { H2 } else { HTTP1 }
}
