//! Moves bytes between two TLS streams through the core's frame relay: one task a connection.
//!
//! Input: two streams whose handshakes are done, and the entry that carries figures and orders.
//! Output: how it ended.
//! Must never read a side while [`Output`] has no room for what it may bring: backpressure, not buffers. Must never sleep
//! while a side that may be read was not asked: it has no waker then.

use std::{
    cell::RefCell,
    io,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use rebalancer_core::wire::h2::{
    error::ConnectionError,
    relay::{Drain, Output, Relay},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    time::timeout,
};

use super::{
    registry::{Connection, Order},
    slowing::Slowing,
    turns::{Share, TURN},
    vigil::{Behind, tell},
};

/// How much is read at once.
const READ: usize = 32 * 1024;

/// How much of a client whose octets cost more than they are.
const LEAST_READ: usize = 512;

/// A waiting queue larger than this is given back as soon as it is empty.
const KEPT: usize = 1024;

/// How long a client may take to read its last bytes and close.
const LINGER: Duration = Duration::from_secs(10);

/// How many octets of such a client are read and thrown away.
const LINGER_OCTETS: usize = 256 * 1024;

/// How a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The client closed it.
    #[error("the client closed the connection")]
    Client,
    /// The apiserver closed it.
    #[error("the apiserver closed the connection")]
    Server,
    /// GOAWAY was said and nothing is left to do.
    #[error("drained")]
    Drained,
    /// Idle, or draining, for longer than allowed; or the relay ends.
    #[error("closed by the relay")]
    Ordered,
    /// One side broke the protocol.
    #[error("protocol: {0}")]
    Protocol(#[from] ConnectionError),
    /// The client's socket failed.
    #[error("the client's connection failed: {0}")]
    ClientIo(io::Error),
    /// The apiserver's socket failed.
    #[error("the apiserver's connection failed: {0}")]
    ServerIo(io::Error),
}

/// A side's bytes that are not written yet.
#[derive(Default)]
struct Queue {
    sent: usize,
    flushed: bool,
}

impl Queue {
    /// Writes what it can, what is before the cut by itself; ready when everything is with the kernel.
    fn poll_write<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        bytes: &mut Vec<u8>,
        cut: &mut Option<usize>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while self.sent < bytes.len() {
            let end = cut.filter(|cut| *cut > self.sent).unwrap_or(bytes.len());
            let written = ready!(Pin::new(&mut *stream).poll_write(context, &bytes[self.sent..end]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += written;
            self.flushed = false;
        }
        if self.sent > 0 {
            self.sent = 0;
            *cut = None;
            if bytes.capacity() > KEPT {
                *bytes = Vec::new();
            } else {
                bytes.clear();
            }
        }
        if !self.flushed {
            ready!(Pin::new(stream).poll_flush(context))?;
            self.flushed = true;
        }
        Poll::Ready(Ok(()))
    }
}

thread_local! {
    /// One buffer a thread: an idle connection holds none.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ].into_boxed_slice());
}

/// What one read brought.
enum Read {
    Bytes(usize),
    End,
}

/// Why nothing more is read of a side in this turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    /// It had nothing: its socket wakes the task.
    Armed,
    /// It was not asked, since there is no room for what it would bring: nothing wakes the task for its sake.
    Held,
    /// It may have more, and has had its turn: the task stands in line, and others come first.
    Enough,
    /// It sends what brings it nothing, and is read again after a while: that wakes the task.
    Slowed,
}

/// Reads once and hands the bytes over.
fn poll_read<S: AsyncRead + Unpin>(
    stream: &mut S,
    most: usize,
    context: &mut Context<'_>,
    mut take: impl FnMut(&[u8]) -> Result<(), ConnectionError>,
) -> Poll<io::Result<Result<Read, ConnectionError>>> {
    SCRATCH.with_borrow_mut(|scratch| {
        let mut buffer = ReadBuf::new(&mut scratch[..most]);
        ready!(Pin::new(stream).poll_read(context, &mut buffer))?;
        let bytes = buffer.filled();
        if bytes.is_empty() {
            return Poll::Ready(Ok(Ok(Read::End)));
        }
        Poll::Ready(Ok(take(bytes).map(|()| Read::Bytes(bytes.len()))))
    })
}

/// Relays until one side ends, the connection is drained, or it is told to close.
///
/// Both streams are shut down in order before this returns: whatever was due to a side has been written to it.
pub async fn run<C, S>(mut client: C, mut server: S, relay: Relay, connection: &Connection, behind: &impl Behind) -> End
where
    C: AsyncRead + AsyncWrite + Unpin,
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut pump = Pump::new(relay);
    let end = pump.relay(&mut client, &mut server, connection, behind).await;
    let asks = pump.relay.drain() != Drain::ByServer && pump.relay.open_streams() > 0;
    // What came with the end.
    pump.report(connection);
    if let End::Protocol(error) = &end {
        pump.relay.fail(*error, &mut pump.out);
    }
    let Pump {
        relay,
        out,
        to_client,
        to_server,
        unread,
        share,
        slowing,
        at_once: _,
    } = pump;
    // What a client sent and nobody reads any more does not stay while it is waited for: it may take its time.
    drop((relay, unread, share, slowing));
    tell(behind, &end, asks).await;
    let due = Due {
        client: &out.to_client[to_client.sent..],
        server: &out.to_server[to_server.sent..],
    };
    // On the heap for as long as it lasts: what goes before, which lasts, is small.
    Box::pin(finish(&mut client, &mut server, due, &end)).await;
    end
}

/// Throws away what has come, in turns as well; how many octets, 0 at the end.
fn poll_discard<C: AsyncRead + Unpin>(
    client: &mut C,
    share: &mut Share,
    context: &mut Context<'_>,
) -> Poll<io::Result<usize>> {
    let turn = ready!(share.poll_turn(context));
    let mut count = 0;
    let read = poll_read(client, READ.min(turn), context, |bytes| {
        count = bytes.len();
        Ok(())
    });
    share.spend(count);
    if read.is_pending() {
        share.rest();
    }
    // What a reader that only counts says of the octets is nothing.
    read.map_ok(|_| count)
}

/// What is still to be written to each side.
struct Due<'a> {
    client: &'a [u8],
    server: &'a [u8],
}

/// Writes what is due to each side, and ends both in order.
async fn finish<C, S>(client: &mut C, server: &mut S, due: Due<'_>, end: &End)
where
    C: AsyncRead + AsyncWrite + Unpin,
    S: AsyncRead + AsyncWrite + Unpin,
{
    // A server that ends or a failure of ours: what the client can still get, it gets.
    let last_words = last_words(client, due.client);
    // What the client had sent by then is the server's, as it is without a relay.
    let last_requests = async {
        server.write_all(due.server).await?;
        server.shutdown().await
    };
    // However it goes, the connection is over.
    let last_words = async {
        if !matches!(end, End::Client | End::ClientIo(_)) {
            last_words.await;
        }
    };
    let _ = tokio::join!(last_words, timeout(LINGER, last_requests));
}

/// Writes that to a client whose connection is over, and ends it so that it is read.
pub async fn last_words<C: AsyncRead + AsyncWrite + Unpin>(client: &mut C, words: &[u8]) {
    let said = async {
        client.write_all(words).await?;
        client.shutdown().await?;
        // Closing with unread bytes would reset the connection, and the reset could overtake the last words.
        let mut left = LINGER_OCTETS;
        let mut share = Share::default();
        while left > 0 {
            match std::future::poll_fn(|context| poll_discard(client, &mut share, context)).await? {
                0 => break,
                count => left = left.saturating_sub(count),
            }
        }
        io::Result::Ok(())
    };
    // Nobody else is to be told when it fails.
    let _ = timeout(LINGER, said).await;
}

struct Pump {
    relay: Relay,
    out: Output,
    to_client: Queue,
    to_server: Queue,
    /// What was read of the client, and stands for more than there was room for.
    unread: Vec<u8>,
    /// How much is read of the client at once.
    at_once: usize,
    /// What it has had, and its place in line.
    share: Share,
    slowing: Slowing,
}

impl Pump {
    fn new(relay: Relay) -> Self {
        Self {
            relay,
            out: Output::default(),
            to_client: Queue::default(),
            to_server: Queue::default(),
            unread: Vec::new(),
            at_once: READ / 8,
            share: Share::default(),
            slowing: Slowing::default(),
        }
    }

    async fn relay<C, S>(
        &mut self,
        client: &mut C,
        server: &mut S,
        connection: &Connection,
        behind: &impl Behind,
    ) -> End
    where
        C: AsyncRead + AsyncWrite + Unpin,
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut ordered = pin!(connection.ordered());
        std::future::poll_fn(|context| {
            while let Poll::Ready(order) = ordered.as_mut().poll(context) {
                match order {
                    Order::Close => return Poll::Ready(End::Ordered),
                    Order::GoAway => {
                        self.relay.go_away(&mut self.out);
                    }
                    Order::Conclude => self.relay.conclude(&mut self.out),
                    Order::HandOver(total) => self.relay.hand_over(total, &mut self.out),
                }
                ordered.set(connection.ordered());
            }
            self.poll(client, server, connection, behind, context)
        })
        .await
    }

    fn poll<C, S>(
        &mut self,
        client: &mut C,
        server: &mut S,
        connection: &Connection,
        behind: &impl Behind,
        context: &mut Context<'_>,
    ) -> Poll<End>
    where
        C: AsyncRead + AsyncWrite + Unpin,
        S: AsyncRead + AsyncWrite + Unpin,
    {
        loop {
            // In line nothing is done at all: what is to be written is work too.
            let turn = ready!(self.share.poll_turn(context));
            let mut left = [turn; 2];
            if !connection.is_believed() {
                self.relay.withdraw();
            }
            let client_is = match self.read_client(client, connection, &mut left[0], context) {
                Ok(reading) => reading,
                Err(end) => return Poll::Ready(end),
            };
            let was_active = self.relay.drain() == Drain::Active;
            let server_is = match self.read_server(server, connection, &mut left[1], context) {
                Ok(reading) => reading,
                Err(end) => return Poll::Ready(end),
            };
            if was_active && self.relay.drain() == Drain::ByServer {
                behind.leaves();
            }
            self.share.spend(turn - left[0].min(left[1]));
            self.report(connection);
            let mut written = true;
            match self
                .to_server
                .poll_write(server, &mut self.out.to_server, &mut None, context)
            {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(End::ServerIo(error)),
                Poll::Pending => written = false,
            }
            match self
                .to_client
                .poll_write(client, &mut self.out.to_client, &mut self.out.cut, context)
            {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(End::ClientIo(error)),
                Poll::Pending => written = false,
            }
            if written && self.relay.is_finished() {
                return Poll::Ready(End::Drained);
            }
            if [client_is, server_is].contains(&Reading::Enough) {
                continue;
            }
            // What was written made room: a side that was held has no waker, and is asked before the task sleeps. One that
            // stays held waits for a queue whose write is pending, and that write wakes the task.
            let forgotten = client_is == Reading::Held && self.out.has_room_for_client()
                || server_is == Reading::Held && self.out.has_room_for_server();
            if !forgotten {
                debug_assert!(
                    client_is != Reading::Held || !written,
                    "the client is held by a queue that is empty"
                );
                debug_assert!(
                    server_is != Reading::Held || !self.out.to_client.is_empty(),
                    "the server is held by a queue that is empty"
                );
                if written {
                    self.share.rest();
                }
                return Poll::Pending;
            }
        }
    }

    fn read_client<C: AsyncRead + Unpin>(
        &mut self,
        client: &mut C,
        connection: &Connection,
        turn: &mut usize,
        context: &mut Context<'_>,
    ) -> Result<Reading, End> {
        while self.out.has_room_for_client() {
            if *turn == 0 {
                return Ok(Reading::Enough);
            }
            if self
                .slowing
                .poll(self.relay.take_glitches(), connection, context)
                .is_pending()
            {
                // And then in small pieces, of which each is waited for.
                self.at_once = LEAST_READ;
                return Ok(Reading::Slowed);
            }
            let before = self.out.waiting();
            if !self.unread.is_empty() {
                let taken = self.relay.client_bytes(&self.unread, &mut self.out)?;
                self.unread.drain(..taken);
                if self.unread.is_empty() {
                    self.unread = Vec::new();
                }
                *turn = turn.saturating_sub(self.spent(0, before));
                continue;
            }
            let most = self.at_once.min((*turn).max(LEAST_READ));
            let read = poll_read(client, most, context, |bytes| {
                let taken = self.relay.client_bytes(bytes, &mut self.out)?;
                self.unread.extend_from_slice(&bytes[taken..]);
                Ok(())
            });
            match read {
                Poll::Pending => return Ok(Reading::Armed),
                Poll::Ready(read) => match read.map_err(End::ClientIo)?? {
                    Read::Bytes(count) => {
                        let spent = self.spent(count, before);
                        *turn = turn.saturating_sub(spent);
                        // No read may cost much more than a turn.
                        self.at_once = if spent > TURN {
                            (self.at_once / 2).max(LEAST_READ)
                        } else {
                            (self.at_once * 2).min(READ)
                        };
                        connection.add_bytes(count, 0);
                    }
                    Read::End => return Err(End::Client),
                },
            }
        }
        Ok(Reading::Held)
    }

    /// What so many octets have cost since so many waited: a few may stand for many.
    fn spent(&mut self, came: usize, before: usize) -> usize {
        let octets = came + self.relay.take_work();
        // Reading takes nothing from what waits; should it ever, those octets have cost nothing.
        octets.max(self.out.waiting().saturating_sub(before))
    }

    fn read_server<S: AsyncRead + Unpin>(
        &mut self,
        server: &mut S,
        connection: &Connection,
        turn: &mut usize,
        context: &mut Context<'_>,
    ) -> Result<Reading, End> {
        while self.out.has_room_for_server() {
            if *turn == 0 {
                return Ok(Reading::Enough);
            }
            let before = self.out.waiting();
            let most = READ.min((*turn).max(LEAST_READ));
            match poll_read(server, most, context, |bytes| {
                self.relay.server_bytes(bytes, &mut self.out)
            }) {
                Poll::Pending => return Ok(Reading::Armed),
                Poll::Ready(read) => match read.map_err(End::ServerIo)?? {
                    Read::Bytes(count) => {
                        *turn = turn.saturating_sub(self.spent(count, before));
                        connection.add_bytes(0, count);
                    }
                    Read::End => return Err(End::Server),
                },
            }
        }
        Ok(Reading::Held)
    }

    fn report(&mut self, connection: &Connection) {
        connection.set_streams(
            self.relay.requests(),
            self.relay.open_streams(),
            self.relay.open_watches(),
        );
        connection.hold(self.relay.unfinished());
        if self.relay.take_refused() > 0 {
            connection.refused();
        }
        if let Some(flows) = self.relay.take_flows() {
            connection.set_flows(flows);
        }
        if self.relay.drain() != Drain::Active {
            connection.set_draining();
        }
        if matches!(self.relay.drain(), Drain::Final { .. }) {
            connection.set_final();
        }
        if let Some(user_agent) = self.relay.take_user_agent() {
            connection.set_user_agent(&user_agent);
        }
    }
}

#[cfg(test)]
mod tests;
