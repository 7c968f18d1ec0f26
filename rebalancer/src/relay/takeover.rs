//! The listening socket, lent and given away: a new relay goes on where this one stops, and the agent may look at it.
//!
//! Beside the control socket there is another one, `CONTROL.listener`, with the same mode. Whoever connects says one
//! octet and hears one: [`LOOK`] or [`TAKE`], then [`SOCKET`] with the descriptor, or [`NONE`]. A taker says [`TAKEN`]
//! when it accepts on it; from then on this relay accepts no more and drains. A relay that drains says [`GONE`] to its successor
//! when nobody listens behind both, and hears [`NONE`] when the successor has seen for itself.
//! Must never accept for a moment less than its successor has begun to: a taker that has the socket and has not said so
//! is waited for, also by a relay that is told to end.

use std::{
    ffi::OsString,
    io,
    net::Shutdown,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use socket2::SockRef;
use tokio::{
    net::{TcpListener, UnixListener, UnixStream},
    sync::Notify,
    time::timeout,
};

use crate::local::descriptor;

/// Lend me the listening socket.
pub const LOOK: u8 = b'L';
/// Give it to me: I am your successor.
const TAKE: u8 = b'T';
/// I accept on it.
const TAKEN: u8 = b'!';
/// Nobody listens behind us, says one that drains.
const GONE: u8 = b'G';
/// Here it is.
pub const SOCKET: u8 = b'S';
/// I do not listen now.
pub const NONE: u8 = b'N';

/// How long either side waits for the other's octet.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long clients of one that drains wait for the successor's look.
const WARNED: Duration = Duration::from_millis(200);

/// How long a taker has from the socket to its word: it asks the apiserver first.
const DECISION: Duration = Duration::from_secs(30);

/// How long a port that was shut while a taker had its socket is left to him: he listens as soon as he has seen the apiserver.
const DISPUTED: Duration = Duration::from_secs(2);

/// Somebody who looked within this time steers connections to the socket, and must hear that it goes.
const LOOKS_RECENTLY: Duration = Duration::from_secs(3);

/// Where a relay with that control socket lends its listening socket.
pub fn path_beside(control: &Path) -> PathBuf {
    let mut path = OsString::from(control);
    path.push(".listener");
    path.into()
}

#[derive(Debug, Default)]
struct State {
    socket: Option<Arc<TcpListener>>,
    /// The one that a taker has.
    lent: Weak<TcpListener>,
    looked: Option<Instant>,
    ending: bool,
    /// Takers that have the socket and have not said anything.
    undecided: usize,
    taken: bool,
    /// It accepts no more: whoever listens on the port is another relay.
    left: bool,
    /// The local sockets are left.
    released: bool,
    /// Waits for this relay to leave its local sockets.
    successor: Option<UnixStream>,
}

/// The listening socket of this relay, while it has one.
#[derive(Debug, Default)]
pub struct Listening {
    state: Mutex<State>,
    changed: Notify,
}

/// A taker that has the socket.
struct Undecided<'l>(&'l Listening);

impl Drop for Undecided<'_> {
    fn drop(&mut self) {
        self.0.state().undecided -= 1;
        self.0.changed.notify_waiters();
    }
}

impl Listening {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This is the socket from now on.
    pub fn set(&self, socket: Option<Arc<TcpListener>>) {
        self.state().socket = socket;
    }

    /// It accepts no more.
    pub fn leave(&self) {
        let mut state = self.state();
        state.socket = None;
        state.left = true;
    }

    /// Whether another relay may listen on the port.
    pub fn is_left(&self) -> bool {
        let state = self.state();
        state.taken || state.left
    }

    /// Whether a taker has this socket.
    pub fn is_lent(&self, socket: &Arc<TcpListener>) -> bool {
        self.state().lent.ptr_eq(&Arc::downgrade(socket))
    }

    /// Closes it at once, whoever has it besides: who connects from here on is refused. A taker that has not said anything finds
    /// that it accepts nobody, and listens anew; one that has taken it asks the apiserver itself.
    pub fn shut(&self) {
        let mut state = self.state();
        if state.taken {
            return;
        }
        let Some(socket) = &state.socket else { return };
        match SockRef::from(&**socket).shutdown(Shutdown::Read) {
            // It does not listen any more.
            Err(error) if error.kind() != io::ErrorKind::NotConnected => {
                // Then it is closed when the next check has found the same.
                tracing::debug!(%error, "the port could not be closed at once");
            }
            _ => state.socket = None,
        }
    }

    /// Whether there is one.
    pub fn is_open(&self) -> bool {
        self.state().socket.is_some()
    }

    /// Lends it no more; `true` when somebody has looked lately and must be given time to notice.
    pub fn end(&self) -> bool {
        let mut state = self.state();
        state.ending = true;
        state.looked.is_some_and(|at| at.elapsed() < LOOKS_RECENTLY)
    }

    /// Waits until a successor accepts on it.
    pub async fn taken(&self) {
        self.until(|state| state.taken).await;
    }

    /// Waits until nobody has it who has not said whether it is taken, and says whether it is. To be asked after
    /// [`Self::end`].
    pub async fn decided(&self) -> bool {
        self.until(|state| state.taken || state.undecided == 0).await;
        self.is_taken()
    }

    /// Waits until nobody has it who has not said anything, and not for long: whoever is about to take the port listens on it.
    pub async fn undisputed(&self) {
        let _ = timeout(DISPUTED, self.decided()).await;
    }

    /// Tells the successor that nobody listens behind both, and waits a moment until it has looked; `false` when it may not have.
    pub async fn warn_successor(&self, path: &Path) -> bool {
        let told = async {
            let stream = UnixStream::connect(path).await?;
            descriptor::send(&stream, GONE, None).await?;
            descriptor::receive(&stream).await
        };
        match timeout(WARNED, told).await.map_err(io::Error::from).flatten() {
            Ok(_) => true,
            // Nobody is there.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => true,
            Err(error) => {
                // Its own check finds out, or whoever warns it next.
                tracing::debug!(%error, "the successor does not hear that the apiserver is gone");
                false
            }
        }
    }

    /// Whether a successor accepts on it.
    pub fn is_taken(&self) -> bool {
        self.state().taken
    }

    async fn until(&self, is_so: impl Fn(&State) -> bool) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if is_so(&self.state()) {
                return;
            }
            changed.await;
        }
    }

    /// The local sockets are left: the successor may have them.
    pub fn release(&self) {
        let mut state = self.state();
        state.released = true;
        state.successor = None;
    }

    fn lend(&self, asked: u8) -> (Option<Arc<TcpListener>>, Option<Undecided<'_>>) {
        let mut state = self.state();
        if state.ending || state.taken {
            return (None, None);
        }
        let socket = state.socket.clone();
        let taker = socket.as_ref().filter(|_| asked == TAKE).map(|socket| {
            state.lent = Arc::downgrade(socket);
            state.undecided += 1;
            Undecided(self)
        });
        if asked == LOOK {
            state.looked = Some(Instant::now());
        }
        (socket, taker)
    }

    async fn answer(&self, stream: UnixStream, look: impl FnOnce()) -> io::Result<()> {
        let (asked, _) = timeout(PATIENCE, descriptor::receive(&stream)).await??;
        if asked == GONE {
            look();
            return descriptor::send(&stream, NONE, None).await;
        }
        let (socket, taker) = self.lend(asked);
        match socket {
            Some(socket) => descriptor::send(&stream, SOCKET, Some(socket.as_fd())).await?,
            None => descriptor::send(&stream, NONE, None).await?,
        }
        if asked == TAKE && timeout(DECISION, descriptor::receive(&stream)).await??.0 == TAKEN {
            let mut state = self.state();
            state.taken = true;
            state.successor = (!state.released).then_some(stream);
            drop(state);
            self.changed.notify_waiters();
        }
        drop(taker);
        Ok(())
    }
}

/// Answers everybody who connects; `look` looks whether somebody listens behind the port, and shuts it if not.
pub async fn serve(listener: UnixListener, listening: Arc<Listening>, look: impl Fn() + Clone + Send + 'static) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (listening, look) = (Arc::clone(&listening), look.clone());
                tokio::spawn(async move {
                    // Who asks nothing, or goes away, is told nothing.
                    let _ = listening.answer(stream, look).await;
                });
            }
            Err(error) => {
                tracing::error!(%error, "the listener's socket failed");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// A relay that runs with the same control socket.
pub struct Predecessor {
    /// Its listening socket; `None` when it does not listen.
    pub socket: Option<std::net::TcpListener>,
    stream: UnixStream,
}

impl Predecessor {
    /// Asks the relay that runs with this control socket, if one does.
    ///
    /// # Errors
    ///
    /// One runs, and does not answer as it should.
    pub async fn find(control: &Path) -> anyhow::Result<Option<Self>> {
        let path = path_beside(control);
        let Ok(stream) = UnixStream::connect(&path).await else {
            return Ok(None);
        };
        let asked = async {
            descriptor::send(&stream, TAKE, None).await?;
            descriptor::receive(&stream).await
        };
        match timeout(PATIENCE, asked).await.map_err(io::Error::from).flatten() {
            Ok((_, socket)) => Ok(Some(Self {
                socket: socket.map(std::net::TcpListener::from),
                stream,
            })),
            // It ended in this moment.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error).with_context(|| {
                format!(
                    "a relay runs on {}, and does not hand its listening socket over; end it, or give this one another --control",
                    control.display()
                )
            }),
        }
    }

    /// Tells it to accept no more, and waits until it has left its local sockets.
    ///
    /// # Errors
    ///
    /// It has gone meanwhile, or does not leave them.
    pub async fn relieve(&self) -> io::Result<()> {
        descriptor::send(&self.stream, TAKEN, None).await?;
        // It closes its local sockets, and this one with them, when it has heard.
        let mut rest = [0; 1];
        let closed = async {
            loop {
                self.stream.readable().await?;
                match self.stream.try_read(&mut rest) {
                    Ok(_) => return Ok(()),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
        };
        timeout(PATIENCE, closed).await.map_err(io::Error::from)?
    }
}

/// Asks a relay for a look at its listening socket: `None` when it does not listen now.
///
/// # Errors
///
/// It does not answer in time, or nobody is there.
pub async fn look(path: &Path, patience: Duration) -> io::Result<Option<OwnedFd>> {
    let asked = async {
        let stream = UnixStream::connect(path).await?;
        descriptor::send(&stream, LOOK, None).await?;
        descriptor::receive(&stream).await
    };
    let (said, socket) = timeout(patience, asked).await.map_err(io::Error::from)??;
    Ok(socket.filter(|_| said == SOCKET))
}

#[cfg(test)]
mod tests {
    use std::future::Future as _;

    use super::*;

    /// One that listens, and a taker that has asked for its socket and has it.
    async fn lent() -> (Arc<Listening>, Arc<TcpListener>, UnixStream) {
        let listening = Arc::new(Listening::default());
        let socket = Arc::new(TcpListener::bind("127.0.0.1:0").await.expect("a port"));
        listening.set(Some(Arc::clone(&socket)));
        let (taker, asked) = UnixStream::pair().expect("sockets");
        let answering = Arc::clone(&listening);
        tokio::spawn(async move { answering.answer(asked, || {}).await });
        descriptor::send(&taker, TAKE, None).await.expect("asked");
        let (said, given) = descriptor::receive(&taker).await.expect("answered");
        assert!(said == SOCKET && given.is_some());
        (listening, socket, taker)
    }

    /// The apiserver restarts in the moment of a takeover: whoever binds the shut port first keeps the taker out.
    #[tokio::test]
    async fn a_port_that_is_shut_while_a_taker_has_its_socket_is_left_to_him() {
        let (listening, socket, taker) = lent().await;
        assert!(listening.is_lent(&socket));
        listening.shut();
        assert!(!listening.is_open());
        let mut undisputed = std::pin::pin!(listening.undisputed());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(
            undisputed.as_mut().poll(&mut context).is_pending(),
            "he has not said anything"
        );
        descriptor::send(&taker, TAKEN, None).await.expect("said");
        undisputed.await;
        assert!(listening.is_taken());
        let another = Arc::new(TcpListener::bind("127.0.0.1:0").await.expect("a port"));
        assert!(!listening.is_lent(&another));
    }

    #[tokio::test]
    async fn nobody_waits_for_a_taker_that_has_gone_or_where_there_is_none() {
        let (listening, _socket, taker) = lent().await;
        listening.shut();
        drop(taker);
        listening.undisputed().await;
        assert!(!listening.is_taken());
        Listening::default().undisputed().await;
    }

    #[tokio::test]
    async fn a_taker_that_decides_when_the_local_sockets_are_left_waits_for_nothing() {
        let (listening, _socket, taker) = lent().await;
        listening.release();
        let predecessor = Predecessor {
            socket: None,
            stream: taker,
        };
        predecessor.relieve().await.expect("they are left");
        assert!(listening.is_taken());
    }

    #[tokio::test]
    async fn whoever_accepts_no_more_may_have_left_the_port_to_another() {
        let listening = Listening::default();
        assert!(!listening.is_left());
        listening.leave();
        assert!(listening.is_left() && !listening.is_open());
    }
}
