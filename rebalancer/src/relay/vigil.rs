//! Whether anybody listens behind the port, looked for when the apiserver ends connections.
//!
//! Job: close the port before a client hears that its connection ends. It connects anew at once, through a load balancer
//! that takes it elsewhere only when it is refused here.
//! Input: ends, and the kernel's list. Output: a port that is shut, or, where a successor has it, that relay's own look.
//! Must never look for each connection by itself, nor keep a client waiting while nobody else's connection breaks.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, futures::Notified},
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

/// A successor that has heard that nobody listens is not told again for so long.
const HEARD: Duration = Duration::from_secs(1);

/// So long is looked at most, however many break.
const LONGEST: Duration = Duration::from_secs(2);

/// So much of the time may be spent on looks for single connections, as one part of so many: a look reads the kernel's list of
/// all that listen. The rest after each is no longer than two looks of those that go on.
const PART: u32 = 10;

#[derive(Debug)]
struct Watched {
    /// When a connection broke last.
    broke: Instant,
    /// Somebody looks again and again, for all.
    is_watching: bool,
    /// When a successor heard last that nobody listens.
    warned: Option<Instant>,
}

impl Watched {
    /// Whether that is so lately that there is nothing to look at: its port is shut.
    fn has_just_warned(&self) -> bool {
        self.warned.is_some_and(|at| at.elapsed() < HEARD)
    }
}

/// One for all connections.
#[derive(Debug)]
pub struct Vigil<T = Target> {
    target: Arc<T>,
    listening: Arc<Listening>,
    workers: Arc<Workers>,
    /// Rings when nobody listens any more: the health check finds out the rest.
    doubt: Arc<Notify>,
    /// Where a successor that has the port is told.
    successor: PathBuf,
    /// Until when nobody looks for a single connection; held while the kernel is asked.
    rests_until: Mutex<Instant>,
    /// Never held while the kernel is asked.
    watched: Mutex<Watched>,
    over: Notify,
}

/// Where somebody listens or not.
pub trait Listens: Send + Sync + 'static {
    /// Whether that can be known at all.
    fn is_known(&self) -> bool;
    /// Whether nobody listens any more.
    fn is_gone(&self) -> bool;
}

impl Listens for Target {
    fn is_known(&self) -> bool {
        self.is_listed()
    }

    fn is_gone(&self) -> bool {
        self.is_gone()
    }
}

impl<T: Listens> Vigil<T> {
    /// One for what stands there, and the port before it; `successor` is where a relay that takes it over hears.
    pub fn new(
        target: Arc<T>,
        listening: Arc<Listening>,
        workers: Arc<Workers>,
        doubt: Arc<Notify>,
        successor: PathBuf,
    ) -> Arc<Self> {
        let now = Instant::now();
        Arc::new(Self {
            target,
            listening,
            workers,
            doubt,
            successor,
            rests_until: Mutex::new(now),
            watched: Mutex::new(Watched {
                broke: now,
                is_watching: false,
                warned: None,
            }),
            over: Notify::new(),
        })
    }

    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For one connection that ends: shuts the port when nobody listens behind it. Within the rest after a look another one is
    /// on its way.
    pub fn look(self: &Arc<Self>) {
        if !self.can_tell() || self.watched().has_just_warned() {
            return;
        }
        let (is_resting, is_gone) = {
            // Whoever comes while another one looks waits for what he sees, a moment.
            let mut rests_until = self.rests_until.lock().unwrap_or_else(PoisonError::into_inner);
            let is_resting = Instant::now() < *rests_until;
            (is_resting, !is_resting && self.ask(&mut rests_until))
        };
        let mut watched = self.watched();
        // A watch tells the successor what was seen.
        if is_resting || watched.is_watching || (is_gone && self.listening.is_left()) {
            watched.broke = Instant::now();
            self.begin(&mut watched);
        }
    }

    /// Waits until the port is shut, or connections break no more while somebody listens.
    pub async fn breaks(self: &Arc<Self>) {
        let Some(over) = self.joins() else { return };
        // The threads that shake hands have too much to do.
        if timeout(LONGEST, over).await.is_err() && !self.watched().has_just_warned() && self.ask_now() {
            self.warn_successor().await;
        }
    }

    fn joins(self: &Arc<Self>) -> Option<Notified<'_>> {
        if !self.can_tell() {
            return None;
        }
        let mut watched = self.watched();
        if watched.has_just_warned() {
            return None;
        }
        watched.broke = Instant::now();
        self.begin(&mut watched);
        // It hears whoever says that it is over from here on: a watch that has ended said so before this lock was had.
        Some(self.over.notified())
    }

    fn begin(self: &Arc<Self>, watched: &mut Watched) {
        if !std::mem::replace(&mut watched.is_watching, true) {
            let vigil = Arc::clone(self);
            self.workers.shake_hands(async move { vigil.watch().await });
        }
    }

    async fn watch(&self) {
        let since = Instant::now();
        loop {
            let began = Instant::now();
            let is_gone = self.ask_now();
            if is_gone {
                self.warn_successor().await;
            }
            if self.is_over(is_gone, began, since) {
                return;
            }
            sleep(LOOK).await;
        }
    }

    /// Nobody listens any more: whoever listens on the port in this relay's place hears it.
    async fn warn_successor(&self) {
        if !self.listening.is_left() {
            return;
        }
        // One for all who come meanwhile.
        self.watched().warned = Some(Instant::now());
        if !self.listening.warn_successor(&self.successor).await {
            self.watched().warned = None;
        }
    }

    /// Whether the watch is over, after a look that began then.
    fn is_over(&self, is_gone: bool, looked: Instant, since: Instant) -> bool {
        let mut watched = self.watched();
        let is_over = is_gone || !self.can_tell() || looked >= watched.broke + QUIET || since.elapsed() >= LONGEST;
        if is_over {
            watched.is_watching = false;
            self.over.notify_waiters();
        }
        is_over
    }

    /// Whether there is a port to shut, this relay's or a successor's, and a list to look at.
    fn can_tell(&self) -> bool {
        (self.listening.is_open() || self.listening.is_left()) && self.target.is_known()
    }

    /// Looks, whether or not somebody has a moment ago, and shuts the port when nobody listens; says whether that is so.
    pub fn ask_now(&self) -> bool {
        self.ask(&mut self.rests_until.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether nobody listens any more; then the port is shut.
    fn ask(&self, rests_until: &mut Instant) -> bool {
        if !self.can_tell() {
            return false;
        }
        let began = Instant::now();
        let is_gone = self.target.is_gone();
        if is_gone {
            self.listening.shut();
            self.doubt.notify_one();
        }
        *rests_until = Instant::now() + (began.elapsed() * PART).min(2 * LOOK);
        is_gone
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

    use tokio::net::TcpListener;

    use super::*;

    /// Somebody listens for so many looks, each of which takes a while.
    struct Leaves {
        left: AtomicU32,
        is_known: bool,
        takes: Duration,
    }

    impl Listens for Leaves {
        fn is_known(&self) -> bool {
            self.is_known
        }

        fn is_gone(&self) -> bool {
            std::thread::sleep(self.takes);
            self.left
                .fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1))
                .is_err()
        }
    }

    async fn vigil(left: u32, is_known: bool, takes: Duration) -> Arc<Vigil<Leaves>> {
        let listening = Arc::new(Listening::default());
        let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        listening.set(Some(Arc::new(socket)));
        let target = Leaves {
            left: AtomicU32::new(left),
            is_known,
            takes,
        };
        let workers = Arc::new(Workers::start().expect("threads"));
        Vigil::new(
            Arc::new(target),
            listening,
            workers,
            Arc::default(),
            PathBuf::from("/nowhere/relay.sock"),
        )
    }

    #[tokio::test]
    async fn looks_that_take_long_end_no_watch_before_one_was_late_enough() {
        let vigil = vigil(1, true, Duration::from_millis(10)).await;
        vigil.breaks().await;
        assert!(!vigil.listening.is_open());
    }

    #[tokio::test]
    async fn a_look_within_the_rest_of_another_is_made_up_for() {
        let vigil = vigil(1, true, Duration::from_millis(10)).await;
        vigil.look();
        assert!(vigil.listening.is_open(), "somebody listens");
        vigil.look();
        while vigil.listening.is_open() {
            sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn somebody_who_stays_keeps_no_port_shut_and_nobody_for_ever() {
        let vigil = vigil(u32::MAX, true, Duration::ZERO).await;
        tokio::join!(vigil.breaks(), vigil.breaks());
        assert!(vigil.listening.is_open());
        assert!(!vigil.watched().is_watching);
        let looks = u32::MAX - vigil.target.left.load(SeqCst);
        assert!((2..100).contains(&looks), "{looks} looks for both together");
    }

    /// Whoever drains closes no port of its own: thousands of ends are no more than a look and a word in a while.
    #[tokio::test]
    async fn a_relay_that_drains_does_not_look_again_and_again_for_one_that_is_gone() {
        let vigil = vigil(0, true, Duration::ZERO).await;
        vigil.listening.leave();
        vigil.breaks().await;
        assert!(vigil.watched().warned.is_some(), "whoever listens has been told");
        for _ in 0..1_000 {
            vigil.look();
            assert!(vigil.joins().is_none(), "nobody waits for another watch");
        }
        assert!(!vigil.watched().is_watching);
    }

    #[tokio::test]
    async fn where_nothing_can_be_known_nobody_waits() {
        let vigil = vigil(0, false, Duration::ZERO).await;
        let mut breaks = std::pin::pin!(vigil.breaks());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(breaks.as_mut().poll(&mut context).is_ready());
        vigil.look();
        assert!(vigil.listening.is_open());
    }

    #[tokio::test]
    async fn whoever_waits_is_not_let_go_by_a_watch_that_ended_before() {
        let vigil = vigil(u32::MAX, true, Duration::ZERO).await;
        vigil.over.notify_waiters();
        let mut breaks = std::pin::pin!(vigil.breaks());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(breaks.as_mut().poll(&mut context).is_pending());
    }
}
