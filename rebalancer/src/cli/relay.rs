//! `rebalancer relay`: the front door's flags.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;
use ipnet::IpNet;
use rustls::pki_types::ServerName;

use super::Failure;
use crate::{
    local::SocketPath,
    manifest::is_itself,
    relay::{self, Config, Files, Limits, RequestHeaders, SniFiles, WatchHandover},
    span::Span,
    sys,
};

/// Stand before the local apiserver, relay its HTTP/2 frames, and say GOAWAY when the agent orders it
#[derive(Debug, Args)]
pub struct Arguments {
    /// Address and port clients connect to
    #[arg(long, env = "REBALANCER_LISTEN", default_value = "[::]:6443", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Address and port of the local apiserver
    #[arg(long, env = "REBALANCER_UPSTREAM", value_name = "ADDRESS")]
    upstream: SocketAddr,
    /// CA bundle (PEM) that the apiserver's serving certificate is verified against
    #[arg(long, env = "REBALANCER_UPSTREAM_CA", value_name = "FILE")]
    upstream_ca: PathBuf,
    /// Name that certificate must have [default: the upstream's address]
    #[arg(long, env = "REBALANCER_UPSTREAM_SERVER_NAME", value_name = "NAME")]
    upstream_server_name: Option<String>,
    /// Serving certificate with its chain (PEM): the apiserver's own
    #[arg(long, env = "REBALANCER_TLS_CERT", value_name = "FILE")]
    tls_cert: PathBuf,
    /// Its private key (PEM)
    #[arg(long, env = "REBALANCER_TLS_KEY", value_name = "FILE")]
    tls_key: PathBuf,
    /// Another serving certificate and its key for clients that ask for one of its names, as the apiserver's flag of the
    /// same name; may be given several times
    #[arg(long, env = "REBALANCER_TLS_SNI_CERT_KEY", value_name = "CERT,KEY[:NAME,...]")]
    tls_sni_cert_key: Vec<SniFiles>,
    /// CA bundle (PEM) of client certificates: the apiserver's --client-ca-file
    #[arg(long, env = "REBALANCER_CLIENT_CA", value_name = "FILE")]
    client_ca: PathBuf,
    /// Headers that name a user, the first one written: the apiserver's flag of the same name
    #[arg(
        long,
        env = "REBALANCER_REQUESTHEADER_USERNAME_HEADERS",
        value_delimiter = ',',
        default_value = "X-Remote-User",
        value_name = "NAME,..."
    )]
    requestheader_username_headers: Vec<String>,
    /// Headers that name a user's groups, the first one written: the apiserver's flag of the same name
    #[arg(
        long,
        env = "REBALANCER_REQUESTHEADER_GROUP_HEADERS",
        value_delimiter = ',',
        default_value = "X-Remote-Group",
        value_name = "NAME,..."
    )]
    requestheader_group_headers: Vec<String>,
    /// Headers that name a user's UID, the first one written: the apiserver's flag of the same name
    #[arg(
        long,
        env = "REBALANCER_REQUESTHEADER_UID_HEADERS",
        value_delimiter = ',',
        default_value = "X-Remote-Uid",
        value_name = "NAME,..."
    )]
    requestheader_uid_headers: Vec<String>,
    /// Beginnings of headers that say more of a user, the first one written: the apiserver's flag of the same name
    #[arg(
        long,
        env = "REBALANCER_REQUESTHEADER_EXTRA_HEADERS_PREFIX",
        value_delimiter = ',',
        default_value = "X-Remote-Extra-",
        value_name = "NAME,..."
    )]
    requestheader_extra_headers_prefix: Vec<String>,
    /// CA bundle (PEM) of other front proxies, which name users themselves: the apiserver's flag of the same name
    /// [default: none is believed]
    #[arg(long, env = "REBALANCER_REQUESTHEADER_CLIENT_CA_FILE", value_name = "FILE")]
    requestheader_client_ca_file: Option<PathBuf>,
    /// Common names such proxies may have: the apiserver's flag of the same name [default: any]
    #[arg(
        long,
        env = "REBALANCER_REQUESTHEADER_ALLOWED_NAMES",
        value_delimiter = ',',
        value_name = "NAME,..."
    )]
    requestheader_allowed_names: Vec<String>,
    /// Front-proxy client certificate (PEM), signed by the apiserver's --requestheader-client-ca-file
    #[arg(long, env = "REBALANCER_PROXY_CLIENT_CERT", value_name = "FILE")]
    proxy_client_cert: PathBuf,
    /// Its private key (PEM)
    #[arg(long, env = "REBALANCER_PROXY_CLIENT_KEY", value_name = "FILE")]
    proxy_client_key: PathBuf,
    /// Control socket, where the agent gives its orders
    #[arg(long, env = "REBALANCER_CONTROL", default_value = "unix:/run/rebalancer/relay.sock", value_parser = clap::value_parser!(SocketPath), value_name = "unix:PATH")]
    control: SocketPath,
    /// Address and port of the relay's own metrics [default: none]
    #[arg(long, env = "REBALANCER_RELAY_METRICS", value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,
    /// Load balancers that begin each connection with a PROXY protocol header (version 1 or 2): a connection from these
    /// networks without a well-formed one is refused
    #[arg(
        long,
        env = "REBALANCER_PROXY_PROTOCOL",
        value_delimiter = ',',
        value_name = "CIDR,..."
    )]
    proxy_protocol: Vec<IpNet>,
    /// Connections at a time; more are refused
    #[arg(long, env = "REBALANCER_MAX_CONNECTIONS", default_value_t = 50_000, value_parser = clap::value_parser!(u32).range(1..), value_name = "COUNT")]
    max_connections: u32,
    /// Of these, those of clients without an accepted certificate from one address (IPv6: one /64); a fifth of all is kept
    /// for clients with a certificate [default: three quarters of the rest]
    #[arg(long, env = "REBALANCER_MAX_CONNECTIONS_PER_ADDRESS", value_parser = clap::value_parser!(u32).range(1..), value_name = "COUNT")]
    max_connections_per_address: Option<u32>,
    /// Octets the head of a request, and of an HTTP/1.1 answer, may have, 32 for each field included [default: 128 KiB over
    /// HTTP/2, where a few octets may stand for many; over HTTP/1.1 the apiserver's 1 MiB]
    #[arg(long, env = "REBALANCER_MAX_HEADER_BYTES", value_parser = clap::value_parser!(u32).range(4096..=16 << 20), value_name = "OCTETS")]
    max_header_bytes: Option<u32>,
    /// From accept until both TLS handshakes are done
    #[arg(
        long,
        env = "REBALANCER_HANDSHAKE_TIMEOUT",
        default_value = "10s",
        value_name = "DURATION"
    )]
    handshake_timeout: Span,
    /// A connection without a stream and without a byte for so long is closed
    #[arg(
        long,
        env = "REBALANCER_IDLE_TIMEOUT",
        default_value = "10m",
        value_name = "DURATION"
    )]
    idle_timeout: Span,
    /// A connection that was told to go is closed after so long, whatever is open on it, and so is every connection after
    /// SIGTERM: exec, port-forward, logs -f and proxied streams may last longer; watches last an hour at most
    #[arg(
        long,
        env = "REBALANCER_DRAIN_DEADLINE",
        default_value = "70m",
        value_name = "DURATION"
    )]
    drain_deadline: Span,
    /// End the watches of a connection that was told to go, each between two events, spread over so long from two
    /// seconds after its GOAWAY on; clients resume them on their new connection [default: leave them]
    #[arg(long, env = "REBALANCER_WATCH_HANDOVER", value_name = "DURATION")]
    watch_handover: Option<Span>,
    /// How many watches are ended so in a second, of all connections
    #[arg(long, env = "REBALANCER_WATCH_HANDOVER_RATE", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000), requires = "watch_handover", value_name = "COUNT")]
    watch_handover_rate: u32,
}

/// Files for everything but connections that are served: those that are not finished, those that give way, and the rest.
const OTHER_FILES: u64 = 2_048 + 512 + 64;

/// Runs the relay until it is told to end.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let upstream_name = match arguments.upstream_server_name {
        Some(name) => ServerName::try_from(name.clone()).map_err(|_| {
            Failure::Configuration(anyhow::anyhow!(
                "--upstream-server-name {name}: not a DNS name or an IP address"
            ))
        })?,
        None => ServerName::from(arguments.upstream.ip()),
    };
    if is_itself(arguments.listen, arguments.upstream) {
        return Err(Failure::Configuration(anyhow::anyhow!(
            "--listen {} and --upstream {}: the relay would talk to itself; give it another port, or have the agent \
             --intercept",
            arguments.listen,
            arguments.upstream
        )));
    }
    let headers = RequestHeaders {
        username: arguments.requestheader_username_headers,
        group: arguments.requestheader_group_headers,
        uid: arguments.requestheader_uid_headers,
        extra_prefix: arguments.requestheader_extra_headers_prefix,
        allowed_names: arguments.requestheader_allowed_names,
    };
    let headers = headers
        .checked()
        .map_err(|error| Failure::Configuration(error.into()))?;
    // Two sockets a connection, and some for everything else.
    let max_connections = match sys::raise_open_files() {
        Ok(files) => {
            let room = usize::try_from(files.saturating_sub(OTHER_FILES) / 2)
                .unwrap_or(usize::MAX)
                .max(1);
            let wanted = arguments.max_connections as usize;
            if room < wanted {
                tracing::warn!(
                    wanted,
                    room,
                    "the limit of open files (RLIMIT_NOFILE) allows fewer connections than --max-connections"
                );
            }
            wanted.min(room)
        }
        Err(error) => {
            tracing::warn!(%error, "cannot raise the limit of open files");
            arguments.max_connections as usize
        }
    };
    let config = Config {
        listen: arguments.listen,
        upstream: arguments.upstream,
        upstream_name,
        files: Files {
            certificate: arguments.tls_cert,
            key: arguments.tls_key,
            sni: arguments.tls_sni_cert_key,
            client_ca: arguments.client_ca,
            proxy_ca: arguments.requestheader_client_ca_file,
            proxy_certificate: arguments.proxy_client_cert,
            proxy_key: arguments.proxy_client_key,
            upstream_ca: arguments.upstream_ca,
        },
        headers,
        control: arguments.control,
        metrics: arguments.metrics,
        proxies: arguments.proxy_protocol,
        limits: Limits {
            max_connections,
            max_per_address: arguments.max_connections_per_address.map(|count| count as usize),
            max_header_bytes: arguments.max_header_bytes.unwrap_or(128 << 10) as usize,
            max_head_bytes: arguments.max_header_bytes.unwrap_or(1 << 20) as usize,
            handshake_timeout: arguments.handshake_timeout.0,
            idle_timeout: arguments.idle_timeout.0,
            drain_deadline: arguments.drain_deadline.0,
            watch_handover: arguments.watch_handover.map(|over| WatchHandover {
                over: over.0,
                per_second: arguments.watch_handover_rate,
            }),
        },
    };
    main_runtime()?.block_on(relay::run(config)).map_err(Failure::to_start)
}

/// Runs all but the connections, which have threads of their own.
fn main_runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Job(anyhow::Error::new(error).context("cannot start the async runtime")))
}
