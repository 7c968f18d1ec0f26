//! `--metrics`: the relay's figures in OpenMetrics, without a label that a client could choose.
//!
//! Input: what happens, as it happens, and the registry at the moment of a scrape. Must never stop the relay: an address
//! that is taken is tried again, since a predecessor may have it.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{Router, extract::State, http::header, response::IntoResponse, routing::get};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, text::encode},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
        info::Info,
    },
    registry::{Registry as Metered, Unit},
};

use super::{admission::Admission, complaints::Complaints, registry::Registry};
use crate::{
    listen,
    shim::wire::{Protocol, State as Life, Upstream},
};

/// How long before a taken address is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// The bounds of `apiserver_client_certificate_expiration_seconds`, from none to a year
/// (k8s.io/apiserver/pkg/authentication/request/x509/x509.go).
const LIFETIMES: [f64; 14] = [
    0.0,
    1_800.0,
    3_600.0,
    7_200.0,
    21_600.0,
    43_200.0,
    86_400.0,
    172_800.0,
    345_600.0,
    604_800.0,
    2_592_000.0,
    7_776_000.0,
    15_552_000.0,
    31_104_000.0,
];

/// The states of the upstream, by the label's value.
const UPSTREAM: [(Upstream, &str); 5] = [
    (Upstream::Ready, "ready"),
    (Upstream::Starting, "starting"),
    (Upstream::Overloaded, "overloaded"),
    (Upstream::Unusable, "unusable"),
    (Upstream::Unreachable, "unreachable"),
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FileLabel {
    file: &'static str,
}

/// What is counted as it happens.
#[derive(Debug)]
pub struct Metrics {
    handshakes: Family<ResultLabel, Counter>,
    connect: Histogram,
    check: Histogram,
    expiry: Family<FileLabel, Gauge<i64>>,
    front_proxy: Gauge<i64>,
    clients: Histogram,
    text: Mutex<Metered>,
}

/// What is read when somebody asks.
#[derive(Debug)]
struct Scraped {
    registry: Arc<Registry>,
    admission: Arc<Admission>,
    complaints: Arc<Complaints>,
}

impl Metrics {
    /// All at zero.
    pub fn new(registry: Arc<Registry>, admission: Arc<Admission>, complaints: Arc<Complaints>) -> Arc<Self> {
        let seconds = [0.000_5, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0];
        let metrics = Self {
            handshakes: Family::default(),
            connect: Histogram::new(seconds),
            check: Histogram::new(seconds),
            expiry: Family::default(),
            front_proxy: Gauge::default(),
            clients: Histogram::new(LIFETIMES),
            text: Mutex::default(),
        };
        let mut metered = Metered::with_prefix("rebalancer");
        metered.register(
            "build",
            "What this is",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        let relay = metered.sub_registry_with_prefix("relay");
        relay.register(
            "handshakes",
            "TLS handshakes of clients, by what came of them",
            metrics.handshakes.clone(),
        );
        relay.register_with_unit(
            "upstream_connect_duration",
            "Time to connect to the apiserver for a client, TLS included",
            Unit::Seconds,
            metrics.connect.clone(),
        );
        relay.register_with_unit(
            "upstream_check_duration",
            "Time the check of the apiserver takes",
            Unit::Seconds,
            metrics.check.clone(),
        );
        relay.register(
            "certificate_expiry_timestamp_seconds",
            "When the earliest certificate of a file expires, in seconds since 1970",
            metrics.expiry.clone(),
        );
        relay.register(
            "front_proxy_expiry_timestamp_seconds",
            "When the first of the front-proxy certificates that connections to the apiserver use expires, in seconds since 1970",
            metrics.front_proxy.clone(),
        );
        relay.register_with_unit(
            "client_certificate_expiration",
            "What is left of accepted client certificates, of each connection when it comes and once a minute",
            Unit::Seconds,
            metrics.clients.clone(),
        );
        relay.register_collector(Box::new(Scraped {
            registry,
            admission,
            complaints,
        }));
        *metrics.text.lock().unwrap_or_else(PoisonError::into_inner) = metered;
        Arc::new(metrics)
    }

    /// A client's handshake ended: `ok`, `failed` or `timeout`.
    pub fn handshake(&self, result: &'static str) {
        self.handshakes.get_or_create(&ResultLabel { result }).inc();
    }

    /// The apiserver was connected to for a client.
    pub fn connected(&self, took: Duration) {
        self.connect.observe(took.as_secs_f64());
    }

    /// A check ended.
    pub fn checked(&self, took: Duration) {
        self.check.observe(took.as_secs_f64());
    }

    /// When the certificates of a file expire.
    pub fn expires(&self, file: &'static str, at: i64) {
        self.expiry.get_or_create(&FileLabel { file }).set(at);
    }

    /// When the first of the front-proxy certificates in use expires.
    pub fn front_proxy_ends(&self, at: i64) {
        self.front_proxy.set(at);
    }

    /// When an accepted client certificate expires, and what time it is.
    pub fn client_certificate_ends(&self, at: i64, now: u64) {
        self.clients.observe(at as f64 - now as f64);
    }

    fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        let metered = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        encode(&mut text, &metered)?;
        Ok(text)
    }
}

/// One family of constants.
fn family<'l, M: prometheus_client::encoding::EncodeMetric + prometheus_client::metrics::TypedMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = (Vec<(&'static str, &'l str)>, M)>,
) -> std::fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, M::TYPE)?;
    for (labels, value) in values {
        if labels.is_empty() {
            // The only one of its family.
            return value.encode(family);
        }
        value.encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

impl Collector for Scraped {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let gauge = |value: usize| ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
        let list = self.registry.list(None, false);
        let count = |protocol, state| {
            let all = list.connections.iter();
            all.filter(|one| one.protocol == protocol && one.state == state).count()
        };
        let mut connections = Vec::new();
        for (protocol, name) in [
            (Protocol::Unknown, "unknown"),
            (Protocol::H2, "h2"),
            (Protocol::Http1, "http/1.1"),
        ] {
            for (state, life) in [(Life::Active, "active"), (Life::Draining, "draining")] {
                connections.push((vec![("protocol", name), ("state", life)], gauge(count(protocol, state))));
            }
        }
        family(&mut encoder, "connections", "Connections of clients", connections)?;
        let [unfinished, strangers, known] = self.admission.counts();
        family(
            &mut encoder,
            "places",
            "Places taken: handshakes that last, clients without an accepted certificate, clients with one",
            [
                ("unfinished", unfinished),
                ("anonymous", strangers),
                ("certificate", known),
            ]
            .map(|(kind, value)| (vec![("kind", kind)], gauge(value))),
        )?;
        family(
            &mut encoder,
            "rejections",
            "Connections refused, ended or slowed, and certificates not accepted, by cause",
            self.complaints
                .counts()
                .map(|(cause, value)| (vec![("cause", cause)], ConstCounter::new(value))),
        )?;
        let totals = self.registry.totals();
        for (name, help, value) in [
            ("requests", "Requests of clients", totals.requests),
            ("received_bytes", "Octets from clients, TLS taken off", totals.bytes_in),
            ("sent_bytes", "Octets to clients, TLS taken off", totals.bytes_out),
            (
                "overload_refusals",
                "Refusals of the apiserver for overload, each client's once in ten seconds",
                self.registry.refused(),
            ),
        ] {
            family(&mut encoder, name, help, [(vec![], ConstCounter::new(value))])?;
        }
        let (told, ended) = self.registry.drained();
        family(
            &mut encoder,
            "drains",
            "Connections told to go, and those of them that have ended",
            [("told", told), ("ended", ended)].map(|(kind, value)| (vec![("event", kind)], ConstCounter::new(value))),
        )?;
        family(
            &mut encoder,
            "upstream",
            "1 for the state the apiserver is in",
            UPSTREAM.map(|(state, name)| (vec![("state", name)], gauge(usize::from(state == list.upstream)))),
        )
    }
}

/// Answers `GET /metrics` until it is stopped.
pub async fn serve(address: SocketAddr, metrics: Arc<Metrics>) {
    let mut said = false;
    let listener = loop {
        match listen::listen(address) {
            Ok(listener) => break listener,
            Err(error) => {
                if !std::mem::replace(&mut said, true) {
                    let hint = listen::hint(address, &error);
                    tracing::warn!(%address, %error, hint, "--metrics: cannot listen there; trying again");
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    };
    let routes = Router::new()
        .route("/metrics", get(scrape))
        .route("/livez", get(|| async { "ok\n" }))
        .with_state(metrics);
    if let Err(error) = axum::serve(listener, routes).await {
        tracing::error!(%error, "the metrics cannot be served any more");
    }
}

async fn scrape(State(metrics): State<Arc<Metrics>>) -> impl IntoResponse {
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    match metrics.text() {
        Ok(text) => Ok(([(header::CONTENT_TYPE, content_type)], text)),
        Err(error) => Err((axum::http::StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::admission::Bounds, *};

    #[test]
    fn every_figure_is_there_from_the_start_and_counts() {
        let registry = Registry::new("i".to_owned());
        let metrics = Metrics::new(
            Arc::clone(&registry),
            Admission::new(Bounds::new(10, None)),
            Arc::default(),
        );
        registry.set_upstream(Upstream::Unusable);
        metrics.handshake("ok");
        metrics.expires("--tls-cert", 1_800_000_000);
        metrics.client_certificate_ends(1_800_500_000, 1_800_000_000);
        let address = SocketAddr::from(([192, 0, 2, 7], 1));
        let connection = registry.open(1, address, address);
        connection.established(Protocol::H2, None);
        connection.set_streams(3, 1, 0);
        connection.add_bytes(10, 20);
        connection.set_draining();
        connection.close("gone");
        let text = metrics.text().expect("it is encoded");
        for line in [
            "rebalancer_build_info{version=",
            "rebalancer_relay_handshakes_total{result=\"ok\"} 1",
            "rebalancer_relay_requests_total 3",
            "rebalancer_relay_received_bytes_total 10",
            "rebalancer_relay_sent_bytes_total 20",
            "rebalancer_relay_connections{protocol=\"h2\",state=\"active\"} 0",
            "rebalancer_relay_drains_total{event=\"told\"} 1",
            "rebalancer_relay_drains_total{event=\"ended\"} 1",
            "rebalancer_relay_rejections_total{cause=\"limit\"} 0",
            "rebalancer_relay_upstream{state=\"unusable\"} 1",
            "rebalancer_relay_upstream{state=\"ready\"} 0",
            "rebalancer_relay_certificate_expiry_timestamp_seconds{file=\"--tls-cert\"} 1800000000",
            "rebalancer_relay_upstream_check_duration_seconds_count 0",
            "rebalancer_relay_front_proxy_expiry_timestamp_seconds 0",
            "rebalancer_relay_client_certificate_expiration_seconds_bucket{le=\"604800.0\"} 1",
            "rebalancer_relay_client_certificate_expiration_seconds_bucket{le=\"345600.0\"} 0",
        ] {
            assert!(text.contains(line), "{line}:\n{text}");
        }
    }

    #[test]
    fn the_page_of_metrics_has_every_metric_of_the_relay() {
        let metrics = Metrics::new(
            Registry::new("i".to_owned()),
            Admission::new(Bounds::new(10, None)),
            Arc::default(),
        );
        metrics.handshake("ok");
        metrics.expires("--tls-cert", 1_800_000_000);
        let (table, _) = crate::reference::metrics(&metrics.text().expect("it is encoded"));
        crate::reference::check("docs/metrics.md", "relay", &table);
    }
}
