//! Clients that connect again and again, each with a handshake and one request, and count what failed.
//!
//! Must end when it is told to, or after its bound of connections.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
};

use anyhow::Context as _;
use rustls::ClientConfig;

use crate::{
    h2wire::{END_STREAM, Peer, client_config, kind, request},
    netns::Namespace,
    pki::Pki,
};

/// What an answer's header block holds when the request came by the relay.
pub const VIA_RELAY: &str = "by-the-relay";

/// No thread connects more often.
const MOST: u64 = 20_000;

#[derive(Default)]
struct Counts {
    stop: AtomicBool,
    served: AtomicU64,
    relayed: AtomicU64,
    failed: AtomicU64,
    errors: Mutex<Vec<String>>,
}

/// A running storm.
pub struct Storm {
    counts: Arc<Counts>,
    threads: Vec<JoinHandle<()>>,
}

/// What became of its connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Answered.
    pub served: u64,
    /// Not answered.
    pub failed: u64,
    /// The first reasons.
    pub errors: Vec<String>,
}

impl Storm {
    /// Starts so many threads in a namespace, spread over the servers.
    ///
    /// # Errors
    ///
    /// A certificate cannot be read.
    pub fn start(pki: &Pki, namespace: &Namespace, servers: &[SocketAddr], threads: usize) -> anyhow::Result<Self> {
        let counts = Arc::new(Counts::default());
        let config = client_config(pki, None, b"h2")?;
        let threads = (0..threads)
            .map(|index| {
                let (counts, config, namespace) = (Arc::clone(&counts), config.clone(), namespace.clone());
                let server = servers[index % servers.len()];
                thread::spawn(move || {
                    namespace.enter().expect("root may enter a namespace of its own");
                    for _ in 0..MOST {
                        if counts.stop.load(Relaxed) {
                            return;
                        }
                        match once(config.clone(), server) {
                            Ok(relayed) => {
                                counts.relayed.fetch_add(u64::from(relayed), Relaxed);
                                counts.served.fetch_add(1, Relaxed)
                            }
                            Err(error) => {
                                let mut errors = counts.errors.lock().unwrap_or_else(PoisonError::into_inner);
                                if errors.len() < 10 {
                                    errors.push(format!("{server}: {error:#}"));
                                }
                                counts.failed.fetch_add(1, Relaxed)
                            }
                        };
                    }
                })
            })
            .collect();
        Ok(Self { counts, threads })
    }

    /// Connections that were served so far.
    pub fn served(&self) -> u64 {
        self.counts.served.load(Relaxed)
    }

    /// Of these, by the relay.
    pub fn relayed(&self) -> u64 {
        self.counts.relayed.load(Relaxed)
    }

    /// Connections that failed so far.
    pub fn failed(&self) -> u64 {
        self.counts.failed.load(Relaxed)
    }

    /// Ends it and counts.
    pub fn end(self) -> Outcome {
        self.counts.stop.store(true, Relaxed);
        for thread in self.threads {
            thread.join().expect("a storm's thread does not panic");
        }
        Outcome {
            served: self.counts.served.load(Relaxed),
            failed: self.counts.failed.load(Relaxed),
            errors: self
                .counts
                .errors
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        }
    }
}

/// One connection: a handshake, a request, its answer, and whether that came by the relay.
fn once(config: ClientConfig, server: SocketAddr) -> anyhow::Result<bool> {
    let mut peer = Peer::connect_with(config, server)?;
    peer.try_begin_client(&[]).context("the beginning")?;
    peer.try_send(&request(1, "/version")).context("the request")?;
    loop {
        let got = peer
            .try_next()
            .context("the answer")?
            .context("the end came before the answer")?;
        if got.stream == 1 {
            anyhow::ensure!(got.kind != kind::RST_STREAM, "the stream was reset");
            if got.flags & END_STREAM != 0 {
                let by_relay = got
                    .payload
                    .windows(VIA_RELAY.len())
                    .any(|part| part == VIA_RELAY.as_bytes());
                return Ok(by_relay);
            }
        }
    }
}
