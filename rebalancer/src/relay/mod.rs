//! `rebalancer relay`: a TLS front door before the local apiserver that can say GOAWAY.
//!
//! Job: accept, prove who the client is, join it to an upstream connection of its own, and obey the control socket.
//! Must never accept while the apiserver does not: a load balancer's health check must see the apiserver's state.

mod accept;
mod control;
mod discovery;
mod handover;
mod http1;
mod identity;
mod proxy_protocol;
mod pump;
mod registry;
mod request_headers;
mod sni;
mod socket;
mod stream;
pub mod takeover;
mod tls;
pub mod trust;
mod upstream;
mod workers;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use ipnet::IpNet;
use rustls::pki_types::ServerName;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{Notify, watch},
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{
    local::{self, SocketPath},
    random,
    shim::wire::Upstream,
};
use accept::{Door, Stop};
pub use handover::WatchHandover;
use registry::Registry;
pub use request_headers::RequestHeaders;
pub use sni::SniFiles;
use takeover::{Listening, Predecessor};
pub use tls::Files;
use tls::{Changed, Reloader};
use upstream::Target;
use workers::Workers;

/// How often files, idle connections and drain deadlines are looked at.
const SWEEP: Duration = Duration::from_secs(5);

/// How often a ready apiserver is asked again.
const CHECK_READY: Duration = Duration::from_secs(2);

/// How often another one is.
const CHECK_OTHERWISE: Duration = Duration::from_millis(500);

/// Over how long a relay that ends spreads its GOAWAYs.
const FAREWELL_SECONDS: usize = 10;

/// What a relay is told at start.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where clients come in.
    pub listen: SocketAddr,
    /// Where the apiserver is.
    pub upstream: SocketAddr,
    /// The name its certificate must have.
    pub upstream_name: ServerName<'static>,
    /// Certificates and keys.
    pub files: Files,
    /// The headers that say who asks.
    pub headers: RequestHeaders,
    /// The control socket.
    pub control: SocketPath,
    /// The load balancers that begin each connection with a PROXY protocol header.
    pub proxies: Vec<IpNet>,
    /// Bounds.
    pub limits: Limits,
}

/// What one relay takes on.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time.
    pub max_connections: usize,
    /// Octets of a request's header list.
    pub max_header_bytes: usize,
    /// From accept to both handshakes done.
    pub handshake_timeout: Duration,
    /// Without a stream and without a byte.
    pub idle_timeout: Duration,
    /// From GOAWAY to close.
    pub drain_deadline: Duration,
    /// How watches of draining connections are ended; `None` leaves them.
    pub watch_handover: Option<WatchHandover>,
}

/// Runs until SIGTERM or SIGINT and the end of its connections; a second signal ends it at once.
///
/// # Errors
///
/// A file, the control socket or the address that cannot be used: the operator can mend it.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let headers = Arc::new(config.headers.clone());
    let tls = Arc::new(Reloader::new(config.files.clone(), Arc::clone(&headers))?);
    let target = Arc::new(Target {
        address: config.upstream,
        name: config.upstream_name.clone(),
        tls: Arc::clone(&tls),
    });
    let fits = discovery::check_once(&target, &headers).await?;
    let predecessor = Predecessor::find(&config.control.0).await?;
    let inherited = inherit(&config, predecessor.as_ref())?;
    let registry = Registry::new(format!("{:016x}", random::u64()));
    if let Some(predecessor) = predecessor {
        tracing::info!(control = %config.control.0.display(), "taking over from the relay that runs here; it drains");
        predecessor
            .relieve()
            .await
            .context("the relay that ran here did not leave its control socket")?;
    }
    let control = local::bind(&config.control.0)?;
    let lending = local::bind(&takeover::path_beside(&config.control.0))?;
    let files = [control.guard, lending.guard];
    let listening = Arc::new(Listening::default());
    let control = tokio::spawn({
        let routes = control::router(Arc::clone(&registry));
        async move {
            if let Err(error) = axum::serve(control.listener, routes).await {
                tracing::error!(%error, "the control socket failed");
            }
        }
    });
    let lending = tokio::spawn(takeover::serve(lending.listener, Arc::clone(&listening)));

    let (stop, stopping) = watch::channel(Stop::Not);
    let (seen, upstream) = watch::channel(Upstream::Unknown);
    let doubt = Arc::new(Notify::new());
    let door = Arc::new(Door {
        listen: config.listen,
        tls: Arc::clone(&tls),
        target: Arc::clone(&target),
        registry: Arc::clone(&registry),
        proxies: config.proxies,
        listening: Arc::clone(&listening),
        names: Arc::new(headers.names()),
        limits: config.limits,
        workers: Workers::start().context("cannot start the threads that serve connections")?,
        doubt: Arc::clone(&doubt),
    });
    let accepting = tokio::spawn(accept::run(door, inherited, upstream, stopping));
    let unfit = {
        let target = Arc::clone(&target);
        async move {
            if fits {
                std::future::pending().await
            }
            match discovery::check(&target, &headers).await {
                Ok(()) => std::future::pending().await,
                Err(error) => error,
            }
        }
    };
    tokio::spawn(watch_upstream(target, Arc::clone(&registry), seen, doubt));
    if let Some(settings) = config.limits.watch_handover {
        tokio::spawn(handover::run(Arc::clone(&registry), settings));
    }
    tokio::spawn(sweep(tls, Arc::clone(&registry), config.limits));

    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let why = tokio::select! {
        _ = terminate.recv() => Stop::Ending,
        _ = interrupt.recv() => Stop::Ending,
        () = listening.taken() => Stop::Taken,
        error = unfit => return Err(error),
    };
    tracing::info!(
        connections = registry.len(),
        taken_over = why == Stop::Taken,
        "ending: no new connections, GOAWAY to the open ones"
    );
    stop.send_replace(why);
    // Ended by its watch: the port is closed.
    let _ = accepting.await;
    if why == Stop::Taken {
        control.abort();
        lending.abort();
        // Their listeners go with the tasks.
        let _ = tokio::join!(control, lending);
        drop(files);
        listening.release();
    }
    tokio::select! {
        () = farewell(&registry) => tracing::info!("every connection is drained"),
        _ = terminate.recv() => tracing::warn!(connections = registry.len(), "told again: ending at once"),
        _ = interrupt.recv() => tracing::warn!(connections = registry.len(), "told again: ending at once"),
    }
    Ok(())
}

/// The socket of a predecessor, or none; and whether the address can be bound, which is said at once and not when the
/// apiserver comes up.
fn inherit(config: &Config, predecessor: Option<&Predecessor>) -> anyhow::Result<Option<Arc<TcpListener>>> {
    let Some(socket) = predecessor.and_then(|predecessor| predecessor.socket.as_ref()) else {
        drop(accept::bind(config.listen)?);
        return Ok(None);
    };
    let address = socket.local_addr()?;
    anyhow::ensure!(
        address == config.listen,
        "--listen {}: the relay that runs on {} listens on {address}; end it first, or give this one another --control",
        config.listen,
        config.control.0.display()
    );
    let socket = socket.try_clone()?;
    socket.set_nonblocking(true)?;
    Ok(Some(Arc::new(TcpListener::from_std(socket)?)))
}

/// Follows the apiserver's state.
async fn watch_upstream(
    target: Arc<Target>,
    registry: Arc<Registry>,
    seen: watch::Sender<Upstream>,
    doubt: Arc<Notify>,
) {
    loop {
        let state = target.check().await;
        registry.set_upstream(state);
        let changed = seen.send_if_modified(|last| std::mem::replace(last, state) != state);
        if changed {
            tracing::info!(upstream = %target.address, ?state, "the apiserver's state");
        }
        let pause = if state == Upstream::Ready {
            CHECK_READY
        } else {
            CHECK_OTHERWISE
        };
        // Whichever comes first.
        let _ = timeout(pause, doubt.notified()).await;
    }
}

/// Looks at files, idle connections and drain deadlines.
async fn sweep(tls: Arc<Reloader>, registry: Arc<Registry>, limits: Limits) {
    let mut ticks = interval(SWEEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failing = false;
    loop {
        ticks.tick().await;
        registry.sweep(limits.idle_timeout, limits.drain_deadline);
        registry.tell_distrusted();
        match tls.reload() {
            Ok(Changed::Nothing) => {}
            Ok(Changed::Certificates) => tracing::info!("certificates have changed: new connections use them"),
            Ok(Changed::Authorities) => {
                tracing::info!("client authorities have changed: open connections are judged again");
                let registry = Arc::clone(&registry);
                // Twenty thousand signatures take a second or two.
                let reviewed = tokio::task::spawn_blocking(move || registry.review());
                match reviewed.await {
                    Ok(withdrawn) => tracing::info!(withdrawn, "open connections are judged"),
                    Err(error) => tracing::error!(%error, "open connections could not all be judged again"),
                }
            }
            Err(error) if failing => {
                tracing::debug!(error = format!("{error:#}"), "certificates still cannot be loaded")
            }
            Err(error) => {
                tracing::error!(
                    error = format!("{error:#}"),
                    "changed certificates cannot be loaded: the ones in use stay"
                );
                failing = true;
                continue;
            }
        }
        failing = false;
    }
}

/// Tells every connection to go, spread over some seconds, and waits until all are gone.
async fn farewell(registry: &Registry) {
    let mut ticks = interval(Duration::from_secs(1));
    let share = registry.len().div_ceil(FAREWELL_SECONDS).max(10);
    while !registry.is_empty() {
        ticks.tick().await;
        registry.go_away_some(share);
    }
}
