//! `--intercept`: new connections for the apiserver's port go to the relay, as long as the relay answers.
//!
//! Job: own the kernel program, ask the relay for its listening socket four times a second, and put it into or take it
//! out of the program's map. Input: the relay's word, and a connection through it. Output: the map's one entry.
//! Must never give clients to a relay that has not served one connection yet.
//! Must never keep a copy of the relay's socket: with one, connections would wait in a dead relay's queue. When this
//! process ends, however, the program goes with it.

mod others;
mod probe;

use std::{fs::File, io, net::SocketAddr, os::fd::AsFd as _, path::PathBuf, time::Duration};

use aya::{
    Ebpf, EbpfLoader,
    maps::{MapData, MapError, SockMap},
    programs::SkLookup,
};
use prometheus_client::metrics::gauge::Gauge;
use rebalancer_common::intercept::Steered;
use tokio::{
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval},
};

use crate::{listen, relay::takeover, sys};
pub use others::{Steering, steering};
pub use probe::Probe;

/// The object that `cargo xtask build-ebpf` made, or nothing.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/rebalancer-intercept.o"));

/// How often the relay is asked.
const LOOK: Duration = Duration::from_millis(250);

/// How long it may take to answer. A relay that is stopped holds the connections of this time.
const PATIENCE: Duration = Duration::from_millis(500);

/// How often a connection through the relay is tried.
const PROBE: Duration = Duration::from_secs(2);

/// So many of these must fail in a row before it is believed.
const FAILURES: u32 = 2;

/// Why connections cannot be steered.
#[derive(Debug, thiserror::Error)]
pub enum InterceptError {
    /// The binary carries no program.
    #[error("this build carries no kernel programs: run `cargo xtask build-ebpf` before `cargo build`")]
    NotBuilt,
    /// The network namespace cannot be opened, or has no loopback interface.
    #[error("cannot use this network namespace: {0}")]
    Namespace(io::Error),
    /// TLS for the relay's check cannot be configured.
    #[error("cannot use TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The kernel refused.
    #[error(
        "the kernel refuses to {what}: {why}; it takes Linux 5.17 or later, and CAP_BPF and CAP_NET_ADMIN, or root"
    )]
    Refused {
        /// What.
        what: &'static str,
        /// What it said, with every cause.
        why: String,
    },
}

fn refused<E: std::error::Error>(what: &'static str) -> impl FnOnce(E) -> InterceptError {
    move |error| {
        let mut why = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            why = format!("{why}: {inner}");
            cause = inner.source();
        }
        InterceptError::Refused { what, why }
    }
}

/// The network namespace of this process's sockets.
fn own_namespace() -> Option<u64> {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").ok()?;
    sys::namespace_cookie(socket.as_fd()).ok()
}

/// The attached program. It is detached when this goes.
pub struct Intercept {
    relay: SockMap<MapData>,
    /// The cookie of the socket in the map.
    steered_to: Option<u64>,
    intercepting: Gauge,
    /// The network namespace that is steered in, where the kernel says it (Linux 5.14).
    namespace: Option<u64>,
    probe: Probe,
    /// The probe on its way, and the cookie of the socket it came to.
    probing: Option<(u64, JoinHandle<io::Result<()>>)>,
    probed: Instant,
    /// The socket that is asked, by its cookie.
    asked: Option<u64>,
    /// Whether it has served a probe, and not failed since.
    serves: bool,
    /// Probes that failed in a row, and why the last one did.
    failures: u32,
    fault: Option<String>,
    /// Why nobody is steered, where that has been said.
    said: Option<String>,
    _program: Ebpf,
}

impl Intercept {
    /// Loads and attaches, for one port in this process's network namespace, with an empty map: nothing is steered yet.
    ///
    /// # Errors
    ///
    /// See [`InterceptError`].
    pub fn open(port: u16, intercepting: Gauge) -> Result<Self, InterceptError> {
        if OBJECT.is_empty() {
            return Err(InterceptError::NotBuilt);
        }
        let namespace = File::open("/proc/self/ns/net").map_err(InterceptError::Namespace)?;
        let steered = Steered {
            port: port.into(),
            loopback: sys::interface_index(c"lo").map_err(InterceptError::Namespace)?,
        };
        let mut ebpf = EbpfLoader::new()
            .override_global("CONFIG", &steered, true)
            .load(OBJECT)
            .map_err(refused("make the program's maps"))?;
        let map = ebpf.take_map("RELAY").ok_or(InterceptError::NotBuilt)?;
        let relay = SockMap::try_from(map).map_err(refused("use a map of sockets"))?;
        let program: &mut SkLookup = ebpf
            .program_mut("intercept")
            .ok_or(InterceptError::NotBuilt)?
            .try_into()
            .map_err(refused("take the program"))?;
        program
            .load()
            .and_then(|()| program.attach(namespace))
            .map_err(refused("steer connections (sk_lookup)"))?;
        Ok(Self {
            relay,
            steered_to: None,
            intercepting,
            namespace: own_namespace(),
            probe: Probe::new()?,
            probing: None,
            probed: Instant::now(),
            asked: None,
            serves: false,
            failures: 0,
            fault: None,
            said: None,
            _program: ebpf,
        })
    }

    /// Follows the relay that lends its socket at `path`, for ever.
    pub async fn run(mut self, path: PathBuf) {
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.look(&path).await;
        }
    }

    async fn look(&mut self, path: &std::path::Path) {
        let socket = match takeover::look(path, PATIENCE).await {
            Ok(Some(socket)) => socket,
            Ok(None) => return self.clear("the relay does not listen"),
            Err(error) => return self.clear(&format!("the relay does not answer: {error}")),
        };
        let cookie = match sys::socket_cookie(socket.as_fd()) {
            Ok(cookie) => cookie,
            Err(error) => return self.clear(&format!("the relay's socket cannot be used: {error}")),
        };
        // The kernel would take it, and no connection of this namespace would ever reach it.
        if self.namespace.is_some() && sys::namespace_cookie(socket.as_fd()).ok() != self.namespace {
            return self.clear("the relay listens in another network namespace than the agent's");
        }
        // The same for all clients of IPv4.
        if listen::is_only_v6(socket.as_fd()) {
            return self
                .clear("the relay's socket takes clients of IPv6 alone: have it --listen on 127.0.0.1 or on [::]");
        }
        let Some(address) = probe::address_of(socket.as_fd()) else {
            return self.clear("the relay's socket has no address");
        };
        self.follow_probe(cookie, address).await;
        if !self.serves {
            drop(socket);
            return match &self.fault {
                Some(fault) => {
                    let why = format!("the relay serves nobody: {fault}");
                    self.clear(&why);
                }
                // It has just come: its answer is on its way.
                None if self.steered_to.is_none() => {}
                None => self.clear("another relay has come, which is tried first"),
            };
        }
        if self.steered_to == Some(cookie) {
            return;
        }
        let set = self.relay.set(0, &socket, 0);
        // Closed before anything else is done: it must not outlive the relay's own by a moment more.
        drop(socket);
        match set {
            Ok(()) => {
                self.steered_to = Some(cookie);
                self.said = None;
                self.intercepting.set(1);
                tracing::info!("new connections go to the relay");
            }
            Err(error) => self.clear(&format!("the relay's socket is not taken: {error}")),
        }
    }

    /// Takes in what the last probe says, and starts the next when it is time.
    async fn follow_probe(&mut self, cookie: u64, address: SocketAddr) {
        if self.asked != Some(cookie) {
            self.asked = Some(cookie);
            (self.serves, self.failures, self.fault) = (false, 0, None);
        }
        if let Some((of, mut probing)) = self.probing.take() {
            if !probing.is_finished() {
                self.probing = Some((of, probing));
            } else if of == cookie {
                match (&mut probing).await.map_err(io::Error::other).flatten() {
                    Ok(()) => (self.serves, self.failures, self.fault) = (true, 0, None),
                    Err(error) => {
                        self.failures += 1;
                        self.serves &= self.failures < FAILURES;
                        self.fault = Some(error.to_string());
                    }
                }
            }
        }
        // Who waits to be given clients is asked at each look until it has said something.
        let is_new = !self.serves && self.fault.is_none();
        if self.probing.is_none() && (is_new || self.probed.elapsed() >= PROBE) {
            self.probed = Instant::now();
            let probe = self.probe.clone();
            self.probing = Some((cookie, tokio::spawn(async move { probe.ask(address).await })));
        }
    }

    fn clear(&mut self, why: &str) {
        let known = self.steered_to.take().is_some();
        self.intercepting.set(0);
        match self.relay.clear_index(&0) {
            Ok(()) => {}
            // It left by itself.
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => tracing::error!(%error, "the relay's socket cannot be taken out of the map"),
        }
        if known || self.said.as_deref() != Some(why) {
            tracing::warn!(why, "new connections go to the apiserver");
        }
        self.said = Some(why.to_owned());
    }
}
