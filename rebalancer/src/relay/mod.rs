//! `rebalancer relay`: a TLS front door before the local apiserver that can say GOAWAY.
//!
//! Job: accept, prove who the client is, join it to an upstream connection of its own, and obey the control socket.
//! Must never accept while no request would get through: a load balancer's health check must see the apiserver's state.
//! Must never leave the port to nobody: a successor does all that may fail before this relay stops accepting.

mod accept;
mod admission;
mod begun;
mod complaints;
mod control;
mod discovery;
mod expiry;
mod header;
mod http1;
mod identity;
mod metrics;
mod pacing;
mod port;
mod pump;
mod registry;
mod renewal;
mod replacement;
mod request_headers;
mod slowing;
mod sni;
mod socket;
mod stream;
pub mod takeover;
mod tls;
pub mod trust;
mod turns;
mod upstream;
mod vigil;
mod workers;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use ipnet::IpNet;
use rustls::pki_types::ServerName;
use socket2::SockRef;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{Notify, watch},
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};

use crate::{
    listen,
    local::{self, SocketPath},
    random, service,
    shim::wire::Upstream,
};
use accept::Door;
use admission::{Admission, Bounds};
use complaints::{Cause, Complaints};
pub use discovery::{believes, compare_files};
pub(crate) use expiry::earliest as earliest_end;
use metrics::Metrics;
pub use pacing::WatchHandover;
use port::Stop;
use registry::Registry;
use renewal::{Renewal, Waiting};
use replacement::Replacements;
pub use request_headers::RequestHeaders;
pub use sni::SniFiles;
use takeover::{Listening, Predecessor};
pub use tls::Files;
use tls::{Changed, Loaded, Reloader};
use upstream::{Checks, Target};
use vigil::Vigil;
use workers::Workers;

/// How often files, idle connections and drain deadlines are looked at.
const SWEEP: Duration = Duration::from_secs(5);

/// How long a relay that ends may take to leave its address, and its successor to find an apiserver.
const PATIENCE: Duration = Duration::from_secs(10);

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
    /// Where the metrics are, if anywhere.
    pub metrics: Option<SocketAddr>,
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
    /// Of these, without an accepted certificate, from one address; by default three quarters of what is theirs.
    pub max_per_address: Option<usize>,
    /// Octets of a request's header list over HTTP/2.
    pub max_header_bytes: usize,
    /// Octets of a head over HTTP/1.1, either way.
    pub max_head_bytes: usize,
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
    crate::heap::give_back();
    // Everything that may fail comes first: until the predecessor is relieved, it goes on as if nobody had asked.
    let headers = Arc::new(config.headers.clone());
    let tls = Arc::new(Reloader::new(config.files.clone(), Arc::clone(&headers))?);
    let target = Arc::new(Target::new(
        config.upstream,
        config.upstream_name.clone(),
        Arc::clone(&tls),
    ));
    let mut forbidden = None;
    let fits = discovery::check_once(&target, &headers, &mut forbidden).await?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let workers = Arc::new(Workers::start().context("cannot start the threads that serve connections")?);
    let registry = Registry::new(format!("{:016x}", random::u64()));
    let admission = Admission::new(Bounds::new(
        config.limits.max_connections,
        config.limits.max_per_address,
    ));
    let complaints = Arc::new(Complaints::default());
    let metrics = Metrics::new(Arc::clone(&registry), Arc::clone(&admission), Arc::clone(&complaints));
    let predecessor = Predecessor::find(&config.control.0).await?;
    let inherited = inherit(&config, predecessor.as_ref()).await?;
    let lender = takeover::path_beside(&config.control.0);
    let (control, lending) = if predecessor.is_some() {
        (local::replace(&config.control.0)?, local::replace(&lender)?)
    } else {
        (local::prepare(&config.control.0)?, local::prepare(&lender)?)
    };

    let (stop, stopping) = watch::channel(Stop::Not);
    let (seen, mut upstream) = watch::channel(Upstream::Unknown);
    let doubt = Arc::new(Notify::new());
    tokio::spawn(upstream::watch(
        Checks::new(Arc::clone(&target), &headers),
        Arc::clone(&workers),
        Arc::clone(&registry),
        Arc::clone(&metrics),
        seen,
        Arc::clone(&doubt),
    ));
    if inherited.is_some() {
        let open = timeout(PATIENCE, upstream.wait_for(|state| upstream::is_open(*state))).await;
        anyhow::ensure!(
            matches!(open, Ok(Ok(_))),
            "--upstream {}: {} after {PATIENCE:?}, while the relay that runs here listens; it goes on, and this one ends",
            config.upstream,
            registry.list(None, false).upstream.in_words()
        );
    }
    let listening = Arc::new(Listening::default());
    let vigil = Vigil::new(
        Arc::clone(&target),
        Arc::clone(&listening),
        Arc::clone(&workers),
        Arc::clone(&doubt),
        takeover::path_beside(&config.control.0),
    );
    let replacements = Replacements::new(
        Arc::clone(&target),
        Arc::clone(&registry),
        Arc::clone(&workers),
        Arc::clone(&complaints),
        Arc::clone(&metrics),
    );
    let accepting = tokio::spawn(port::run(
        Arc::new(Door {
            listen: config.listen,
            tls: Arc::clone(&tls),
            target: Arc::clone(&target),
            registry: Arc::clone(&registry),
            admission,
            complaints: Arc::clone(&complaints),
            metrics: Arc::clone(&metrics),
            proxies: config.proxies,
            listening: Arc::clone(&listening),
            names: Arc::new(headers.names()),
            limits: config.limits,
            workers,
            doubt,
            vigil: Arc::clone(&vigil),
            replacements,
        }),
        inherited.clone(),
        upstream,
        stopping,
    ));
    let (control, lending) = (control.commit()?, lending.commit()?);
    service::ready();
    let files = [control.guard, lending.guard];
    let control = tokio::spawn({
        let routes = control::router(Arc::clone(&registry));
        async move {
            if let Err(error) = axum::serve(control.listener, routes).await {
                tracing::error!(%error, "the control socket failed");
            }
        }
    });
    let lending = tokio::spawn(takeover::serve(lending.listener, Arc::clone(&listening), move || {
        vigil.ask_now();
    }));
    if let Some(predecessor) = predecessor {
        tracing::info!(control = %config.control.0.display(), "taking over from the relay that runs here; it drains");
        // Whatever has become of it, this relay accepts.
        if let Err(error) = predecessor.relieve().await {
            tracing::warn!(%error, "the relay that ran here does not say that it has stopped accepting");
        }
    }
    if let Some(inherited) = inherited {
        // It may have put one on before it heard.
        listen::unfilter(&SockRef::from(&*inherited));
    }
    let scraped = config
        .metrics
        .map(|address| tokio::spawn(metrics::serve(address, Arc::clone(&metrics))));
    if let Some(settings) = config.limits.watch_handover {
        tokio::spawn(pacing::run(Arc::clone(&registry), settings));
    }
    tokio::spawn(expiry::run(config.files, Arc::clone(&registry), Arc::clone(&metrics)));
    tokio::spawn(sweep(
        Arc::clone(&target),
        Arc::clone(&headers),
        Arc::clone(&registry),
        complaints,
        metrics,
        config.limits,
    ));

    let unfit = async {
        if fits {
            std::future::pending().await
        }
        match discovery::check(&target, &headers, forbidden).await {
            Ok(()) => std::future::pending().await,
            Err(error) => error,
        }
    };
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
    service::stopping();
    stop.send_replace(why);
    if why == Stop::Ending {
        // Who takes over from now on finds nobody, and listens as soon as the port is closed.
        control.abort();
        lending.abort();
    }
    // Ended by its watch: the port is closed, or a successor's.
    let _ = accepting.await;
    control.abort();
    lending.abort();
    if let Some(scraped) = scraped {
        scraped.abort();
        let _ = scraped.await;
    }
    // Their listeners go with the tasks.
    let _ = tokio::join!(control, lending);
    drop(files);
    listening.release();
    tokio::select! {
        () = farewell(&registry, config.limits.drain_deadline) => tracing::info!("every connection is drained"),
        _ = terminate.recv() => tracing::warn!(connections = registry.len(), "told again: ending at once"),
        _ = interrupt.recv() => tracing::warn!(connections = registry.len(), "told again: ending at once"),
    }
    Ok(())
}

/// The socket of a predecessor, or none; and whether the address can be bound, which is said at once and not when the
/// apiserver comes up. A relay that is ending leaves it soon.
async fn inherit(config: &Config, predecessor: Option<&Predecessor>) -> anyhow::Result<Option<Arc<TcpListener>>> {
    let Some(socket) = predecessor.and_then(|predecessor| predecessor.socket.as_ref()) else {
        let leaves = Instant::now() + PATIENCE;
        loop {
            match port::bind(config.listen) {
                Ok(_) => return Ok(None),
                Err(error) => {
                    let is_taken = error
                        .downcast_ref::<std::io::Error>()
                        .is_some_and(|error| error.raw_os_error() == Some(libc::EADDRINUSE));
                    if !is_taken || Instant::now() >= leaves {
                        return Err(error);
                    }
                }
            }
            sleep(Duration::from_millis(100)).await;
        }
    };
    let address = listen::plain(socket.local_addr()?);
    anyhow::ensure!(
        listen::is_same(config.listen, address),
        "--listen {}: the relay that runs on {} listens on {address}; end it first, or give this one another --control",
        config.listen,
        config.control.0.display()
    );
    Ok(Some(Arc::new(listen::inherit(socket.try_clone()?)?)))
}

/// Seconds since 1970.
fn unix_now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}

/// Uses changed files; but a front proxy's certificate that the apiserver does not take would close a port that works, so the last
/// one is used for as long as it is good.
async fn adopt(
    target: &Target,
    headers: &RequestHeaders,
    registry: &Registry,
    loaded: Loaded,
    now: i64,
    waiting: &mut Option<(u64, Waiting)>,
) -> Changed {
    let tls = &target.tls;
    let until = tls.current().front_proxy_certificate.until;
    let issue = loaded.issue();
    let taken = match loaded.renewed() {
        Some(new) => Some(upstream::takes(target, headers, new).await),
        None => None,
    };
    // What was said of one is said of no other.
    let before = waiting.filter(|(of, _)| *of == issue).map(|(_, why)| why);
    let waits = taken.and_then(|taken| Waiting::after(before, taken, now < until));
    *waiting = waits.map(|why| (issue, why));
    match waits {
        Some(Waiting::Refused) if waits != before => tracing::error!(
            seconds = until - now,
            "the apiserver does not take the new --proxy-client-cert: the last one is used; is the new one signed by the \
             apiserver's --requestheader-client-ca-file, valid already, and its name allowed?"
        ),
        Some(Waiting::Unanswered) if waits != before => tracing::info!(
            seconds = until - now,
            "the apiserver does not say yet whether it takes the new --proxy-client-cert: the last one is used until it does, or \
             this one ends"
        ),
        _ => {}
    }
    if waiting.is_some() {
        return tls.adopt_others(loaded);
    }
    let changed = tls.adopt(loaded);
    if taken == Some(Some(true)) {
        // A relay that drains checks no more.
        registry.set_taken(issue, true);
    }
    changed
}

/// Looks at files, idle connections and drain deadlines.
async fn sweep(
    target: Arc<Target>,
    headers: Arc<RequestHeaders>,
    registry: Arc<Registry>,
    complaints: Arc<Complaints>,
    metrics: Arc<Metrics>,
    limits: Limits,
) {
    let tls = Arc::clone(&target.tls);
    let mut renewal = Renewal::default();
    let mut ticks = interval(SWEEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut failing, mut waiting) = (false, None);
    loop {
        ticks.tick().await;
        service::alive();
        registry.sweep(limits.idle_timeout, limits.drain_deadline);
        if let (count, Some(client)) = registry.take_ended_heads() {
            complaints.complain_of(
                count,
                Cause::Heads,
                client,
                &"its head or handshake has been unfinished for longest",
            );
        }
        if let (count, Some(client)) = registry.take_slowed() {
            complaints.complain_of(
                count,
                Cause::Glitches,
                client,
                &"it floods: SETTINGS, PING, resets, empty DATA or requests that come to nothing",
            );
        }
        complaints.summarise();
        registry.tell_distrusted();
        let front_proxy = tls.current().front_proxy_certificate;
        let now = i64::try_from(unix_now()).unwrap_or(i64::MAX);
        metrics.front_proxy_ends(renewal.turn(&registry, front_proxy, now, SWEEP));
        let changed = match tls.look() {
            Ok(None) => {
                // One that waited has been taken away.
                waiting = None;
                Ok(Changed::Nothing)
            }
            Ok(Some(loaded)) => Ok(adopt(&target, &headers, &registry, loaded, now, &mut waiting).await),
            Err(error) => Err(error),
        };
        match changed {
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
async fn farewell(registry: &Registry, deadline: Duration) {
    let mut ticks = interval(Duration::from_secs(1));
    let share = registry.len().div_ceil(FAREWELL_SECONDS).max(10);
    while !registry.is_empty() {
        ticks.tick().await;
        registry.go_away_some(share, deadline);
    }
}
