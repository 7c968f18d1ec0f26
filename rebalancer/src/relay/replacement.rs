//! Connections to the apiserver that take the place of an older one between two requests of an HTTP/1.1 client: the front
//! proxy's certificate has changed, and kube-apiserver judges it at each request.
//!
//! Input: whose turn it is. Output: a connection with the certificate in use, or none: then the old one serves.
//! Must never keep a request waiting while the old certificate is good, nor have many handshakes at once while there is
//! time.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::{Semaphore, oneshot},
    time::{sleep, timeout},
};

use super::{
    complaints::{Cause, Complaints},
    metrics::Metrics,
    registry::{Connection, Registry},
    renewal::{LAST, may_serve},
    stream::ClientStream,
    tls::Tls,
    unix_now,
    upstream::Target,
    workers::Workers,
};

/// So many handshakes at once, while there is time, and when there is none.
const AT_ONCE: [usize; 2] = [2, 32];

/// How long a request waits while the last certificate is good, and when it is over.
const BRIEF: Duration = Duration::from_secs(1);
const PATIENT: Duration = Duration::from_secs(10);

/// So long after a failure nobody tries while there is time, and when there is none.
const PAUSE: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(1)];

/// One for all connections.
pub struct Replacements {
    target: Arc<Target>,
    registry: Arc<Registry>,
    workers: Arc<Workers>,
    complaints: Arc<Complaints>,
    metrics: Arc<Metrics>,
    permits: [Arc<Semaphore>; 2],
    /// Nobody tries again before, while there is time and when there is none.
    again: [Arc<Mutex<Instant>>; 2],
}

impl Replacements {
    /// For connections to that apiserver.
    pub fn new(
        target: Arc<Target>,
        registry: Arc<Registry>,
        workers: Arc<Workers>,
        complaints: Arc<Complaints>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            target,
            registry,
            workers,
            complaints,
            metrics,
            permits: AT_ONCE.map(|count| Arc::new(Semaphore::new(count))),
            again: [(); 2].map(|()| Arc::new(Mutex::new(Instant::now()))),
        }
    }

    /// Another connection for a request that has come, if the one that serves its client is of an older certificate and this
    /// is the moment to change it.
    pub async fn take(&self, connection: &Connection) -> Option<ClientStream> {
        let tls = self.target.tls.current();
        let used = connection.front_proxy()?;
        let current = tls.front_proxy_certificate;
        if used.issue == current.issue {
            return None;
        }
        let left = used.until.saturating_sub(i64::try_from(unix_now()).unwrap_or(i64::MAX));
        let is_urgent = left <= LAST;
        let may_serve = may_serve(&self.registry, current.issue, left);
        if !(is_urgent || may_serve) || (left > 0 && !self.rest(is_urgent).is_zero()) {
            return None;
        }
        let patience = if left > 0 { BRIEF } else { PATIENT };
        let connecting = self.connect(connection, tls, is_urgent, patience);
        let mut server = timeout(patience, connecting).await.ok()??;
        server.settle().ok()?;
        connection.set_front_proxy(current);
        Some(server)
    }

    /// How long nobody tries yet.
    fn rest(&self, is_urgent: bool) -> Duration {
        let again = self.again[usize::from(is_urgent)].lock();
        again
            .unwrap_or_else(PoisonError::into_inner)
            .saturating_duration_since(Instant::now())
    }

    /// One when its turn has come; a handshake that has begun goes on when nobody waits for it any more.
    async fn connect(
        &self,
        connection: &Connection,
        tls: Arc<Tls>,
        is_urgent: bool,
        patience: Duration,
    ) -> Option<ClientStream> {
        let permits = &self.permits[usize::from(is_urgent)];
        let permit = loop {
            sleep(self.rest(is_urgent)).await;
            let permit = if is_urgent {
                Arc::clone(permits).acquire_owned().await.ok()?
            } else {
                Arc::clone(permits).try_acquire_owned().ok()?
            };
            // The one before may have failed meanwhile; nobody rests with a permit.
            if self.rest(is_urgent).is_zero() {
                break permit;
            }
        };
        let (done, connected) = oneshot::channel();
        let (target, again) = (
            Arc::clone(&self.target),
            Arc::clone(&self.again[usize::from(is_urgent)]),
        );
        let (complaints, metrics) = (Arc::clone(&self.complaints), Arc::clone(&self.metrics));
        let client = connection.client();
        // Handshakes keep the threads that serve from others' octets.
        self.workers.shake_hands(async move {
            let _permit = permit;
            let began = Instant::now();
            let connecting = timeout(patience, target.connect(&tls.front_proxy, b"http/1.1")).await;
            match connecting.map_err(io::Error::from).flatten() {
                Ok(server) => {
                    metrics.connected(began.elapsed());
                    // The client may have gone.
                    let _ = done.send(server);
                }
                Err(error) => {
                    complaints.complain(Cause::Upstream, client, &error);
                    let pause = PAUSE[usize::from(is_urgent)];
                    *again.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now() + pause;
                }
            }
        });
        connected.await.ok()
    }
}
