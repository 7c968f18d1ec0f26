//! A socket whose events are those of arriving data alone, until a send finds no room.
//!
//! A server that answers in two sends wakes its reader twice, and the second time there is nothing left to read. A
//! poller that asks for room as well hears of that wake-up, since there is always room; one that does not sleeps on.
//! Must never wait for room without watching for data too.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    task::{Context, Poll, ready},
};

use tokio::io::{Interest, unix::AsyncFd};

use crate::sys;

/// A connected socket, registered with the thread's event loop.
#[derive(Debug)]
pub struct Socket {
    /// `None` only while it is registered anew.
    registered: Option<AsyncFd<TcpStream>>,
    /// A send found no room, and what it left is not sent yet.
    crowded: bool,
}

impl Socket {
    /// Registers a socket that does not block.
    ///
    /// # Errors
    ///
    /// What epoll_ctl(2) says.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        Ok(Self {
            registered: Some(sys::watched(stream, Interest::READABLE)?),
            crowded: false,
        })
    }

    /// Registers with the event loop of the thread that calls, and no longer with that of the one before.
    ///
    /// # Errors
    ///
    /// What epoll_ctl(2) says.
    pub fn settle(&mut self) -> io::Result<()> {
        let Some(registered) = self.registered.take() else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let interest = interest(self.crowded);
        self.registered = Some(sys::watched(registered.into_inner(), interest)?);
        Ok(())
    }

    fn registered(&self) -> io::Result<&AsyncFd<TcpStream>> {
        self.registered
            .as_ref()
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Reads what is there.
    pub fn poll_read(&self, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let registered = self.registered()?;
        loop {
            let mut ready = ready!(registered.poll_read_ready(context))?;
            match registered.get_ref().read(buffer) {
                Ok(count) => {
                    // All that was there: more makes a new event, and the end stays one.
                    if 0 < count && count < buffer.len() {
                        ready.clear_ready();
                    }
                    return Poll::Ready(Ok(count));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Sends what there is room for.
    pub fn poll_write(&mut self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let registered = self.registered()?;
            let mut ready = if self.crowded {
                Some(ready!(registered.poll_write_ready(context))?)
            } else {
                None
            };
            match registered.get_ref().write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match &mut ready {
                    Some(ready) => ready.clear_ready(),
                    None => self.register(true, context)?,
                },
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                sent => return Poll::Ready(sent),
            }
        }
    }

    /// Everything is sent: room is of no interest any more.
    pub fn all_sent(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if self.crowded {
            self.register(false, context)?;
        }
        Ok(())
    }

    /// Sends the end.
    pub fn shutdown(&self) -> io::Result<()> {
        self.registered()?.get_ref().shutdown(Shutdown::Write)
    }

    fn register(&mut self, crowded: bool, context: &mut Context<'_>) -> io::Result<()> {
        let Some(registered) = self.registered.take() else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let registered = sys::watched(registered.into_inner(), interest(crowded))?;
        // Whoever waited for data waited on the registration that is gone.
        if registered.poll_read_ready(context).is_ready() {
            context.waker().wake_by_ref();
        }
        self.registered = Some(registered);
        self.crowded = crowded;
        Ok(())
    }
}

fn interest(crowded: bool) -> Interest {
    if crowded {
        Interest::READABLE.add(Interest::WRITABLE)
    } else {
        Interest::READABLE
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, net::TcpListener};

    use super::*;

    fn pair() -> (Socket, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let stream = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
        stream.set_nonblocking(true).expect("an option");
        let (peer, _) = listener.accept().expect("the other end");
        (Socket::new(stream).expect("a registration"), peer)
    }

    #[tokio::test]
    async fn data_is_seen_while_there_is_no_room() {
        let (mut socket, mut peer) = pair();
        let chunk = vec![7; 1 << 16];
        let mut sent = 0_usize;
        // Until a send is pending: the kernel's buffers of both ends are full.
        poll_fn(|context| {
            while let Poll::Ready(count) = socket.poll_write(context, &chunk) {
                sent += count.expect("a send");
            }
            Poll::Ready(())
        })
        .await;
        assert!(socket.crowded);
        peer.write_all(b"ping").expect("the other direction has room");
        let mut buffer = [0; 16];
        let count = poll_fn(|context| socket.poll_read(context, &mut buffer))
            .await
            .expect("data");
        assert_eq!(&buffer[..count], b"ping");

        let reader = std::thread::spawn(move || {
            let mut left = sent + 1;
            let mut sink = vec![0; 1 << 16];
            while left > 0 {
                left -= peer.read(&mut sink).expect("data");
            }
            peer
        });
        poll_fn(|context| socket.poll_write(context, &[8]))
            .await
            .expect("room again");
        let mut peer = reader.join().expect("all arrived");
        poll_fn(|context| Poll::Ready(socket.all_sent(context)))
            .await
            .expect("a registration");
        assert!(!socket.crowded);
        peer.write_all(b"pong").expect("a send");
        let count = poll_fn(|context| socket.poll_read(context, &mut buffer))
            .await
            .expect("data");
        assert_eq!(&buffer[..count], b"pong");
        drop(peer);
        let count = poll_fn(|context| socket.poll_read(context, &mut buffer))
            .await
            .expect("the end");
        assert_eq!(count, 0);
    }
}
