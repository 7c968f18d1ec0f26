//! The listening socket, lent and given away: a new relay goes on where this one stops, and the agent may look at it.
//!
//! Beside the control socket there is another one, `CONTROL.listener`, with the same mode. Whoever connects says one
//! octet and hears one: [`LOOK`] or [`TAKE`], then [`SOCKET`] with the descriptor, or [`NONE`]. A taker says [`TAKEN`]
//! when it has it; from then on this relay accepts no more and drains.
//! Must never accept for a moment less than its successor has begun to.

use std::{
    ffi::OsString,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
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
/// I have it.
const TAKEN: u8 = b'!';
/// Here it is.
pub const SOCKET: u8 = b'S';
/// I do not listen now.
pub const NONE: u8 = b'N';

/// How long either side waits for the other's octet.
const PATIENCE: Duration = Duration::from_secs(10);

/// Somebody who looked within this time steers connections to the socket, and must hear that it goes.
const LOOKS_RECENTLY: Duration = Duration::from_secs(3);

/// Where a relay with that control socket lends its listening socket.
pub fn path_beside(control: &Path) -> PathBuf {
    let mut path = OsString::from(control);
    path.push(".listener");
    path.into()
}

/// The listening socket of this relay, while it has one.
#[derive(Debug, Default)]
pub struct Listening {
    socket: Mutex<Option<Arc<TcpListener>>>,
    looked: Mutex<Option<Instant>>,
    ending: AtomicBool,
    taken: Notify,
    /// Waits for this relay to leave its local sockets.
    successor: Mutex<Option<UnixStream>>,
}

impl Listening {
    /// This is the socket from now on.
    pub fn set(&self, socket: Option<Arc<TcpListener>>) {
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = socket;
    }

    /// Lends it no more; `true` when somebody has looked lately and must be given time to notice.
    pub fn end(&self) -> bool {
        self.ending.store(true, Relaxed);
        let looked = *self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        looked.is_some_and(|at| at.elapsed() < LOOKS_RECENTLY)
    }

    /// Waits until a successor has it.
    pub async fn taken(&self) {
        self.taken.notified().await;
    }

    /// The local sockets are left: the successor may have them.
    pub fn release(&self) {
        self.successor.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn lent(&self) -> Option<Arc<TcpListener>> {
        if self.ending.load(Relaxed) {
            return None;
        }
        self.socket.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn answer(&self, stream: UnixStream) -> io::Result<()> {
        let (asked, _) = descriptor::receive(&stream).await?;
        let socket = self.lent();
        match &socket {
            Some(socket) => descriptor::send(&stream, SOCKET, Some(socket.as_fd())).await?,
            None => descriptor::send(&stream, NONE, None).await?,
        }
        match asked {
            LOOK => *self.looked.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now()),
            TAKE if descriptor::receive(&stream).await?.0 == TAKEN => {
                *self.successor.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
                self.taken.notify_one();
            }
            _ => {}
        }
        Ok(())
    }
}

/// Answers everybody who connects.
pub async fn serve(listener: UnixListener, listening: Arc<Listening>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let listening = Arc::clone(&listening);
                tokio::spawn(async move {
                    // Who asks nothing, or goes away, is told nothing.
                    let _ = timeout(PATIENCE, listening.answer(stream)).await;
                });
            }
            Err(error) => {
                tracing::error!(%error, "the listener's socket failed");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// What a predecessor left.
pub struct Predecessor {
    /// Its listening socket; `None` when it did not listen.
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
        let unclear = || {
            format!(
                "a relay runs on {}, and does not hand its listening socket over; end it, or give this one another --control",
                control.display()
            )
        };
        let (_, socket) = timeout(PATIENCE, asked)
            .await
            .map_err(io::Error::from)
            .flatten()
            .with_context(unclear)?;
        Ok(Some(Self {
            socket: socket.map(std::net::TcpListener::from),
            stream,
        }))
    }

    /// Tells it to accept no more, and to leave its control socket.
    ///
    /// # Errors
    ///
    /// It has gone meanwhile.
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
