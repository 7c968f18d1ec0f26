//! One side of an HTTP/1.1 connection: what was read of it, and what is written to it.
//!
//! Must never hold a buffer while nothing is on its way.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    task::{Poll, ready},
};

use rebalancer_core::wire::h1::body::Body;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};

use crate::relay::turns::Share;

/// How much is read at once.
const READ: usize = 32 * 1024;

thread_local! {
    /// One buffer a thread: an idle connection holds none.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ].into_boxed_slice());
}

/// What comes from one side.
pub(super) struct Side<R> {
    reader: R,
    /// Read, and not taken yet.
    pub(super) ahead: Vec<u8>,
    share: Share,
}

impl<R: AsyncRead + Unpin> Side<R> {
    /// One of which something has been read.
    pub(super) fn new(reader: R, ahead: Vec<u8>) -> Self {
        Self {
            reader,
            ahead,
            share: Share::default(),
        }
    }

    /// Reads once; zero at the end. Dropped before it is ready, it has read nothing.
    pub(super) async fn read(&mut self) -> io::Result<usize> {
        // Whoever does not wait for it any more does not stand in line for it.
        let waiting = self.share.waits();
        std::future::poll_fn(|context| {
            let turn = ready!(waiting.share.poll_turn(context));
            let read = SCRATCH.with_borrow_mut(|scratch| {
                let most = scratch.len().min(turn);
                let mut buffer = ReadBuf::new(&mut scratch[..most]);
                ready!(Pin::new(&mut self.reader).poll_read(context, &mut buffer))?;
                self.ahead.extend_from_slice(buffer.filled());
                Poll::Ready(io::Result::Ok(buffer.filled().len()))
            });
            match read {
                Poll::Ready(Ok(count)) => waiting.share.spend(count),
                Poll::Ready(Err(_)) => {}
                Poll::Pending => waiting.share.rest(),
            }
            read
        })
        .await
    }

    /// Something else was done for it, worth so many octets that are only passed on.
    pub(super) fn spend(&mut self, octets: usize) {
        self.share.spend(octets);
    }

    /// Takes octets off its front.
    pub(super) fn take(&mut self, count: usize) -> Vec<u8> {
        if count == self.ahead.len() {
            return std::mem::take(&mut self.ahead);
        }
        self.ahead.drain(..count).collect()
    }

    /// Drops up to so many line ends at its front; how many more may still come.
    pub(super) fn skip_line_ends(&mut self, most: usize) -> usize {
        let ends = self
            .ahead
            .iter()
            .take(most)
            .take_while(|octet| b"\r\n".contains(octet))
            .count();
        self.ahead.drain(..ends);
        if self.ahead.is_empty() { most - ends } else { 0 }
    }

    /// Lets a body take what it wants, and appends what goes on.
    pub(super) fn feed(&mut self, body: &mut Body, out: &mut Vec<u8>) -> io::Result<()> {
        let taken = body.take(&self.ahead, out).map_err(invalid)?;
        self.ahead.drain(..taken);
        Ok(())
    }
}

pub(super) fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Writes and flushes.
pub(super) async fn send<W: AsyncWrite + Unpin>(writer: &mut W, octets: &[u8]) -> io::Result<()> {
    if octets.is_empty() {
        return Ok(());
    }
    writer.write_all(octets).await?;
    writer.flush().await
}

/// Which of two sides failed.
pub(super) enum Failed {
    Reading(io::Error),
    Writing(io::Error),
}

impl Failed {
    /// What that is when one side is read and the other written.
    pub(super) fn of<T>(self, read: impl FnOnce(io::Error) -> T, written: impl FnOnce(io::Error) -> T) -> T {
        match self {
            Self::Reading(error) => read(error),
            Self::Writing(error) => written(error),
        }
    }
}

/// Passes octets one way until that way ends.
pub(super) async fn copy<R, W>(from: &mut Side<R>, to: &mut W, mut passed: impl FnMut(usize)) -> Result<(), Failed>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    loop {
        send(to, &from.ahead).await.map_err(Failed::Writing)?;
        from.ahead = Vec::new();
        match from.read().await.map_err(Failed::Reading)? {
            0 => return Ok(()),
            count => passed(count),
        }
    }
}
