//! Clients that mean harm, in every way that docs/relay.md names: tests hold the relay's memory against them, the benchmark
//! how long others wait meanwhile.
//!
//! Input: a way to do harm, and whom to do it to. Output: what was done. Must never read what a server answers but to throw
//! it away, nor take the processor from those who are measured.

use std::{
    io::{self, Read as _},
    net::{SocketAddr, TcpStream},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use rustls::ClientConfig;

use crate::{
    bench::machine::pin_thread,
    h2wire::{Peer, client_config},
    pki::Pki,
};

mod ways;

pub use ways::{ABUSES, bomb, made_you_reset};

/// What one of them does next.
pub enum Next {
    /// Sends that.
    Send(Vec<u8>),
    /// Holds what it has, and looks whether it still has it.
    Hold,
    /// Goes, and comes again as somebody new.
    Leave,
}

/// What one connection does, step by step; after its end, by whomever, another begins from the start.
pub type Way = Box<dyn FnMut() -> Next + Send>;

/// What they speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speech {
    /// HTTP/2, whose preface is sent for them.
    H2,
    /// HTTP/1.1.
    Http1,
    /// Octets without TLS.
    Plain,
}

/// What the relay does with such a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is served, or held back, as the server does it.
    Served,
    /// It is ended.
    Ended,
    /// It is ended, and counted by this cause.
    Rejected(&'static str),
}

/// One way to do harm.
pub struct Abuse {
    /// What it is.
    pub name: &'static str,
    /// What is spoken.
    pub speech: Speech,
    /// How many octets one connection would have a relay without bounds hold; 0 where it is not about holding.
    pub holds: u64,
    /// What becomes of such connections.
    pub fate: Fate,
    /// Begins one connection's.
    pub begin: fn() -> Way,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    /// Pieces that were sent whole.
    pub acts: u64,
    /// Their octets.
    pub octets: u64,
    /// Connections that were made.
    pub connections: u64,
    /// Those of them that the other side ended.
    pub ended: u64,
}

impl Done {
    /// Everything that was done: connections, and pieces sent over them.
    pub fn deeds(self) -> u64 {
        self.connections + self.acts
    }
}

/// So many deeds a second of all connections together, and no more.
#[derive(Debug)]
struct Pace {
    began: Instant,
    each: Duration,
    next: AtomicU64,
}

impl Pace {
    /// Waits until the next is due, or there is an end to it all.
    fn wait(&self, is_over: impl Fn() -> bool) {
        let turn = self.next.fetch_add(1, Relaxed);
        let due = self.began + self.each.mul_f64(turn as f64);
        while !is_over() {
            match due.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => thread::sleep(left.min(LOOK)),
                _ => return,
            }
        }
    }
}

#[derive(Debug, Default)]
struct Counts {
    acts: AtomicU64,
    octets: AtomicU64,
    connections: AtomicU64,
    ended: AtomicU64,
}

/// Connections at it, a thread each.
pub struct Attack {
    stop: Arc<AtomicBool>,
    counts: Arc<Counts>,
    threads: Vec<thread::JoinHandle<()>>,
}

/// One that holds looks so often whether it is still there.
const LOOK: Duration = Duration::from_millis(20);

/// How long a write waits for room before it is seen whether there is an end to it all.
const WAIT: Duration = Duration::from_millis(200);

impl Attack {
    /// Lets so many connections do that, on threads that leave the processor to others; on one processor, and only while
    /// nobody else wants it, if it is named; so many deeds a second, or as many as they can. Every second one reads what it is
    /// answered, and throws it away.
    ///
    /// # Errors
    ///
    /// There are no certificates, or no more threads.
    pub fn start(
        abuse: &Abuse,
        pki: &Pki,
        server: SocketAddr,
        connections: usize,
        core: Option<usize>,
        rate: Option<f64>,
    ) -> anyhow::Result<Self> {
        let protocol: &[u8] = if abuse.speech == Speech::H2 { b"h2" } else { b"http/1.1" };
        let config = client_config(pki, None, protocol)?;
        let stop = Arc::new(AtomicBool::new(false));
        let counts = Arc::new(Counts::default());
        let pace = rate.map(|rate| {
            Arc::new(Pace {
                began: Instant::now(),
                // One that does nothing has its connections all the same.
                each: Duration::from_secs_f64(1.0 / rate.max(1.0)),
                next: AtomicU64::new(0),
            })
        });
        let one = |index: usize| {
            let attacker = Attacker {
                speech: abuse.speech,
                begin: abuse.begin,
                server,
                config: config.clone(),
                reads: index.is_multiple_of(2),
                stop: Arc::clone(&stop),
                counts: Arc::clone(&counts),
                pace: pace.clone(),
            };
            // They need no room to speak of.
            let thread = thread::Builder::new().stack_size(256 * 1024);
            thread.spawn(move || {
                steps_back(core);
                attacker.works();
            })
        };
        let threads = (0..connections).map(one).collect::<io::Result<_>>()?;
        Ok(Self { stop, counts, threads })
    }

    /// What has been done so far.
    pub fn done(&self) -> Done {
        let Counts {
            acts,
            octets,
            connections,
            ended,
        } = &*self.counts;
        Done {
            acts: acts.load(Relaxed),
            octets: octets.load(Relaxed),
            connections: connections.load(Relaxed),
            ended: ended.load(Relaxed),
        }
    }

    /// Ends it; what was done in all.
    pub fn stop(mut self) -> Done {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("an attacker does not panic");
        }
        self.done()
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

struct Attacker {
    speech: Speech,
    begin: fn() -> Way,
    server: SocketAddr,
    config: ClientConfig,
    reads: bool,
    stop: Arc<AtomicBool>,
    counts: Arc<Counts>,
    pace: Option<Arc<Pace>>,
}

impl Attacker {
    fn works(&self) {
        // The first connections are what there is to begin with.
        let mut is_first = true;
        while !self.is_over() {
            if !std::mem::take(&mut is_first) {
                self.waits();
            }
            let Ok(mut peer) = self.connects() else {
                thread::sleep(Duration::from_millis(1));
                continue;
            };
            self.counts.connections.fetch_add(1, Relaxed);
            if self.acts(&mut peer).is_err() {
                self.counts.ended.fetch_add(1, Relaxed);
            }
        }
    }

    fn waits(&self) {
        if let Some(pace) = &self.pace {
            pace.wait(|| self.is_over());
        }
    }

    fn is_over(&self) -> bool {
        self.stop.load(Relaxed)
    }

    fn connects(&self) -> anyhow::Result<Peer> {
        if self.speech == Speech::Plain {
            let peer = Peer::plain(TcpStream::connect(self.server)?)?;
            peer.impatient(WAIT);
            return Ok(peer);
        }
        let mut peer = Peer::connect_with(self.config.clone(), self.server)?;
        peer.impatient(WAIT);
        if self.speech == Speech::H2 {
            peer.try_begin_client(&[])?;
        }
        Ok(peer)
    }

    /// Acts until it is to go, or the other side has ended it, which is an error.
    fn acts(&self, peer: &mut Peer) -> io::Result<()> {
        let mut way = (self.begin)();
        while !self.is_over() {
            match way() {
                Next::Leave => return Ok(()),
                Next::Send(octets) => {
                    self.waits();
                    if !self.sends(peer, &octets)? {
                        return Ok(());
                    }
                    self.counts.acts.fetch_add(1, Relaxed);
                    self.counts.octets.fetch_add(octets.len() as u64, Relaxed);
                }
                Next::Hold => {
                    thread::sleep(LOOK);
                    if has_ended(peer.socket()) {
                        return Err(io::ErrorKind::ConnectionReset.into());
                    }
                }
            }
            if self.reads {
                throws_away(peer.socket());
            }
        }
        Ok(())
    }

    /// Sends all of it, however long that takes; `false` when it is over before.
    fn sends(&self, peer: &mut Peer, mut octets: &[u8]) -> io::Result<bool> {
        while !octets.is_empty() {
            if self.is_over() {
                return Ok(false);
            }
            match peer.try_write(octets) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => octets = &octets[count..],
                // It is held back; an end is something else.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if has_ended(peer.socket()) {
                        return Err(io::ErrorKind::ConnectionReset.into());
                    }
                }
                Err(error) => return Err(error),
            }
            if self.reads {
                throws_away(peer.socket());
            }
        }
        Ok(true)
    }
}

/// Whether the other side has closed its end, whatever waits to be read before that.
fn has_ended(socket: &TcpStream) -> bool {
    let mut asked = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one structure, which lives through the call, and no time to wait.
    let ready = unsafe { libc::poll(&raw mut asked, 1, 0) };
    ready > 0 && asked.revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0
}

/// Takes what is there off the socket, without looking at it: TLS's state of that direction is of no use to anybody.
fn throws_away(mut socket: &TcpStream) {
    let mut octets = [0; 16_384];
    if socket.set_nonblocking(true).is_err() {
        return;
    }
    while let Ok(1..) = socket.read(&mut octets) {}
    // Writes wait again.
    let _ = socket.set_nonblocking(false);
}

/// Has the calling thread leave the processor to others: as much as may be where times are measured, on that processor
/// (sched(7), `SCHED_IDLE`), else so that it still gets on.
fn steps_back(core: Option<usize>) {
    let Some(core) = core else {
        // SAFETY: a number is set for the calling thread; no memory is read or written.
        unsafe { libc::setpriority(libc::PRIO_PROCESS as _, 0, 19) };
        return;
    };
    // SAFETY: the structure is whole and lives through the call; no memory is read or written but it.
    unsafe {
        let parameters = std::mem::zeroed::<libc::sched_param>();
        libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters);
    }
    pin_thread(core);
}
