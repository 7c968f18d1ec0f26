//! The port: when it is open, who has its socket, and how it closes.
//!
//! Input: what the health check sees, and when to stop. Output: accepted sockets, to the front door. Must never keep the port open
//! while no client's request would get through, nor close it on somebody who has connected.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time::{sleep, timeout},
};

use super::{accept::Door, upstream};
use crate::{listen, shim::wire::Upstream};

/// How long to wait before an address is tried again, or an accept for which something was lacking.
const RETRY: Duration = Duration::from_secs(1);

/// How long a relay that ends still accepts when somebody steers connections to its socket.
const NOTICE: Duration = Duration::from_secs(1);

/// How long handshakes of TCP that have begun when the port closes may take.
const HANDSHAKES: Duration = Duration::from_millis(500);

/// Binds the address.
///
/// # Errors
///
/// Names the address, what the system says and what to do.
pub fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    listen::listen_for_steered(address).map_err(|error| {
        let hint = listen::hint(address, &error);
        anyhow::Error::new(error).context(format!("--listen {address}: cannot listen there; {hint}"))
    })
}

/// Why accepting ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It does not.
    Not,
    /// The relay ends.
    Ending,
    /// Another relay has the socket.
    Taken,
}

/// Accepts while a client's request gets through, until told to stop; `inherited` is a predecessor's socket.
pub async fn run(
    door: Arc<Door>,
    inherited: Option<Arc<TcpListener>>,
    upstream: watch::Receiver<Upstream>,
    stop: watch::Receiver<Stop>,
) {
    accept(&door, inherited, upstream, stop).await;
    door.listening.leave();
}

async fn accept(
    door: &Arc<Door>,
    mut inherited: Option<Arc<TcpListener>>,
    mut upstream: watch::Receiver<Upstream>,
    mut stop: watch::Receiver<Stop>,
) {
    loop {
        tokio::select! {
            seen = state(&mut upstream, |seen| *seen != Upstream::Unknown) => if !seen { return },
            _ = state(&mut stop, |stop| *stop != Stop::Not) => return,
        }
        if !upstream::is_open(*upstream.borrow()) {
            inherited = None;
            door.listening.set(None);
        }
        tokio::select! {
            seen = state(&mut upstream, |seen| upstream::is_open(*seen)) => if !seen { return },
            _ = state(&mut stop, |stop| *stop != Stop::Not) => return,
        }
        // One that was lent and shut is a taker's port now: who binds it first keeps the other out.
        if inherited.is_none() {
            tokio::select! {
                () = door.listening.undisputed() => {}
                _ = state(&mut stop, |stop| *stop != Stop::Not) => return,
            }
            if door.listening.is_taken() {
                // Which is heard in a moment.
                state(&mut stop, |stop| *stop != Stop::Not).await;
                return;
            }
            if !upstream::is_open(*upstream.borrow()) {
                continue;
            }
        }
        // Nobody is let in who would find nobody: until the next check nothing is known.
        if door.target.is_gone() {
            inherited = None;
            door.listening.set(None);
            tokio::select! {
                seen = upstream.changed() => if seen.is_err() { return },
                _ = state(&mut stop, |stop| *stop != Stop::Not) => return,
            }
            continue;
        }
        let listener = match inherited.take().map_or_else(|| bind(door.listen).map(Arc::new), Ok) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "cannot listen; trying again");
                tokio::select! {
                    () = sleep(RETRY) => {}
                    _ = state(&mut stop, |stop| *stop != Stop::Not) => return,
                }
                continue;
            }
        };
        door.listening.set(Some(Arc::clone(&listener)));
        tracing::info!(address = %door.listen, upstream = %door.target.address, "listening");
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    if accepted.as_ref().is_err_and(is_shut) {
                        door.listening.set(None);
                        break;
                    }
                    door.accepted(accepted).await;
                }
                seen = state(&mut upstream, |seen| !upstream::is_open(*seen)) => {
                    if !seen {
                        return;
                    }
                    // A taker that has it and has not said anything may have it for seconds.
                    door.listening.shut();
                    door.listening.set(None);
                    break;
                }
                _ = state(&mut stop, |stop| *stop != Stop::Not) => {
                    let why = *stop.borrow();
                    if why == Stop::Ending {
                        door.last_ones(&listener).await;
                    } else if !door.listening.is_lent(&listener) {
                        // The taker has another one: whoever waits on this would be reset.
                        door.close(&listener).await;
                    }
                    return;
                }
            }
        }
    }
}

/// Whether a socket that listened does so no more: whoever has it besides may have shut it (inet_csk_accept in
/// net/ipv4/inet_connection_sock.c).
fn is_shut(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

/// Waits for a state; `false` when nobody will report one any more.
async fn state<T>(seen: &mut watch::Receiver<T>, wanted: impl FnMut(&T) -> bool) -> bool {
    seen.wait_for(wanted).await.is_ok()
}

impl Door {
    async fn accepted(self: &Arc<Self>, accepted: io::Result<(TcpStream, SocketAddr)>) {
        match accepted {
            Ok((stream, client)) => self.admit(stream, client),
            Err(error) if self.runs_out(self.listen, &error) => sleep(RETRY).await,
            // That one connection's: the next may be well (accept(2)).
            Err(error) => tracing::debug!(%error, "a connection ended before it was accepted"),
        }
    }

    /// Accepts what came before the port closes: closing it would reset those that wait.
    async fn last_ones(self: &Arc<Self>, listener: &TcpListener) {
        if self.listening.end() {
            self.accept_for(NOTICE, listener).await;
        }
        // A successor that has the socket accepts on it, or goes away: until it says which, nobody may be kept out.
        let mut decided = std::pin::pin!(self.listening.decided());
        let taken = loop {
            tokio::select! {
                taken = &mut decided => break taken,
                accepted = listener.accept() => {
                    if accepted.as_ref().is_err_and(is_shut) {
                        return;
                    }
                    self.accepted(accepted).await;
                }
            }
        };
        if !taken {
            self.close(listener).await;
        }
    }

    /// Whoever connects between the last accept and the close would be reset: no handshake begins any more.
    async fn close(self: &Arc<Self>, listener: &TcpListener) {
        if let Err(error) = listen::begin_no_handshake(&SockRef::from(listener)) {
            tracing::warn!(%error, "clients that connect just as the port closes may be reset");
        }
        self.accept_for(HANDSHAKES, listener).await;
    }

    async fn accept_for(self: &Arc<Self>, time: Duration, listener: &TcpListener) {
        let accept = async {
            loop {
                let accepted = listener.accept().await;
                if accepted.as_ref().is_err_and(is_shut) {
                    return;
                }
                self.accepted(accepted).await;
            }
        };
        let _ = timeout(time, accept).await;
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    /// Whoever has a listening socket besides can shut it.
    #[tokio::test]
    async fn a_socket_that_another_one_shut_is_known_as_such() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let other = listener.as_fd().try_clone_to_owned().expect("a descriptor");
        SockRef::from(&other)
            .shutdown(std::net::Shutdown::Read)
            .expect("it listens");
        for _ in 0..2 {
            assert!(listener.accept().await.as_ref().is_err_and(is_shut), "each time");
        }
    }
}
