//! Connections to the apiserver that take the place of an older one between two requests of an HTTP/1.1 client: the front
//! proxy's certificate has changed, and kube-apiserver judges it at each request.
//!
//! Input: whose turn it is. Output: a connection with the certificate in use, or none: then the old one serves.
//! Must never keep a request waiting while the old certificate is good, nor have many handshakes at once while there is
//! time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    sync::{Semaphore, oneshot},
    time::timeout,
};

use super::{
    registry::{Connection, Registry},
    renewal::LAST,
    stream::ClientStream,
    unix_now,
    upstream::Target,
    workers::Workers,
};
use crate::shim::wire::Upstream;

/// So many handshakes at once, while there is time.
const AT_ONCE: usize = 2;

/// How long a request waits while there is time, and when there is none.
const BRIEF: Duration = Duration::from_secs(1);
const PATIENT: Duration = Duration::from_secs(10);

/// So long after a failure nobody tries while there is time.
const PAUSE: Duration = Duration::from_secs(5);

/// One for all connections.
#[derive(Debug)]
pub struct Replacements {
    target: Arc<Target>,
    registry: Arc<Registry>,
    workers: Arc<Workers>,
    permits: Arc<Semaphore>,
    /// The registry's coarse milliseconds from which on it is tried again.
    again: AtomicU64,
}

impl Replacements {
    /// For connections to that apiserver.
    pub fn new(target: Arc<Target>, registry: Arc<Registry>, workers: Arc<Workers>) -> Self {
        Self {
            target,
            registry,
            workers,
            permits: Arc::new(Semaphore::new(AT_ONCE)),
            again: AtomicU64::new(0),
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
        let now = i64::try_from(unix_now()).unwrap_or(i64::MAX);
        let is_urgent = used.until.saturating_sub(now) <= LAST;
        if !is_urgent
            && (self.registry.upstream() != Upstream::Ready || self.registry.coarse_ms() < self.again.load(Relaxed))
        {
            return None;
        }
        let permit = match Arc::clone(&self.permits).try_acquire_owned() {
            Ok(permit) => Some(permit),
            Err(_) if is_urgent => None,
            Err(_) => return None,
        };
        let (target, (done, connected)) = (Arc::clone(&self.target), oneshot::channel());
        // Handshakes keep the threads that serve from others' octets.
        self.workers.shake_hands(async move {
            let _permit = permit;
            let patience = if is_urgent { PATIENT } else { BRIEF };
            let server = timeout(patience, target.connect(&tls.front_proxy, b"http/1.1")).await;
            // The client may have gone.
            let _ = done.send(server.ok().and_then(Result::ok));
        });
        let server = connected
            .await
            .ok()
            .flatten()
            .and_then(|mut server| server.settle().is_ok().then_some(server));
        if server.is_some() {
            connection.set_front_proxy(current);
        } else {
            let pause = u64::try_from(PAUSE.as_millis()).unwrap_or(u64::MAX);
            self.again
                .store(self.registry.coarse_ms().saturating_add(pause), Relaxed);
        }
        server
    }
}
