//! Whether anybody listens behind the port, looked for when the apiserver ends connections.
//!
//! Job: close the port before a client hears that its connection ends. It connects anew at once, through a load balancer
//! that takes it elsewhere only when it is refused here.
//! Input: ends, and the kernel's list. Output: a port that is shut.
//! Must never look for each connection by itself, nor keep a client waiting while nobody else's connection breaks.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

use super::{pump::End, takeover::Listening, upstream::Target, workers::Workers};

/// What stands behind a connection to the apiserver.
pub trait Behind: Sync {
    /// The apiserver ends a connection or says that it will, and its client has not heard of it.
    fn leaves(&self);

    /// The same, of one that ended while it was asked something: ready when its client may hear of it.
    fn breaks(&self) -> impl Future<Output = ()> + Send;
}

/// Tells what stands behind how a connection ended, of which something is asked or not.
pub async fn tell(behind: &impl Behind, end: &End, asks: bool) {
    match end {
        End::ServerIo(error) if !is_end(error) => {}
        End::Server | End::ServerIo(_) if asks => behind.breaks().await,
        End::Server | End::ServerIo(_) => behind.leaves(),
        _ => {}
    }
}

/// Whether an error is what the other side's end looks like: others say nothing of who listens.
pub fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof
            | io::ErrorKind::WriteZero
    )
}

/// How often it is looked while connections break.
const LOOK: Duration = Duration::from_millis(5);

/// A process that is killed closes its connections one after the other and the socket that listens last (kernel/task_work.c
/// runs what the end of a process leaves to do from the last on): some 20 us each, 0.3 s of 15,000. When no other has
/// broken for so long, it was this one alone.
const QUIET: Duration = Duration::from_millis(50);

/// So long is looked at most, however many break.
const LONGEST: Duration = Duration::from_secs(2);

/// So much of the time may be spent on looking, as one part of so many: a look reads the kernel's list of all that listen.
const PART: u32 = 10;

#[derive(Debug)]
struct Watched {
    /// Nobody looks again until then: somebody listened a moment ago.
    rests_until: Instant,
    /// When a connection broke last.
    broke: Instant,
    /// Somebody looks again and again, for all.
    is_watching: bool,
}

/// One for all connections.
#[derive(Debug)]
pub struct Vigil {
    target: Arc<Target>,
    listening: Arc<Listening>,
    workers: Arc<Workers>,
    /// Rings when nobody listens any more: the health check finds out the rest.
    doubt: Arc<Notify>,
    watched: Mutex<Watched>,
    over: Notify,
}

impl Vigil {
    /// One for what stands there, and the port before it.
    pub fn new(target: Arc<Target>, listening: Arc<Listening>, workers: Arc<Workers>, doubt: Arc<Notify>) -> Arc<Self> {
        let now = Instant::now();
        Arc::new(Self {
            target,
            listening,
            workers,
            doubt,
            watched: Mutex::new(Watched {
                rests_until: now,
                broke: now,
                is_watching: false,
            }),
            over: Notify::new(),
        })
    }

    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shuts the port when nobody listens behind it.
    pub fn look(&self) {
        // Whoever comes while another one looks waits for what he sees: a moment, and the port may be shut after it.
        let mut watched = self.watched();
        let began = Instant::now();
        if !self.listening.is_open() || began < watched.rests_until {
            return;
        }
        if self.target.is_gone() {
            self.listening.shut();
            self.doubt.notify_one();
        }
        watched.rests_until = Instant::now() + began.elapsed() * PART;
    }

    /// Waits until the port is shut, or connections break no more while somebody listens.
    pub async fn breaks(self: &Arc<Self>) {
        let mut over = std::pin::pin!(self.over.notified());
        over.as_mut().enable();
        {
            let mut watched = self.watched();
            watched.broke = Instant::now();
            if !self.listening.is_open() {
                return;
            }
            if !std::mem::replace(&mut watched.is_watching, true) {
                let vigil = Arc::clone(self);
                self.workers.shake_hands(async move { vigil.watch().await });
            }
        }
        // The threads that shake hands may have much to do.
        let _ = timeout(LONGEST, over).await;
    }

    async fn watch(&self) {
        let since = Instant::now();
        while self.goes_on(since) {
            sleep(LOOK).await;
        }
    }

    fn goes_on(&self, since: Instant) -> bool {
        self.look();
        let mut watched = self.watched();
        let goes_on = self.listening.is_open() && watched.broke.elapsed() < QUIET && since.elapsed() < LONGEST;
        if !goes_on {
            watched.is_watching = false;
            // Before the next one may begin: who waits now has been looked for.
            self.over.notify_waiters();
        }
        goes_on
    }
}
