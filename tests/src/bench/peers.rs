//! The proxies that are compared, each with one thread on one processor, HTTP/2 and TLS 1.3 on both sides.
//!
//! Input: programs and certificates. Output: running proxies. Must never give one a setting that spares it work the
//! others do.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::Context as _;
use serde_json::json;

use super::machine::{Cores, pinned};
use crate::{
    pki::{Pki, SERVER_NAME},
    process::{Process, wait_for},
};

/// A proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Peer {
    /// This project's.
    Relay,
    /// TLS on both sides and bytes between.
    Floor,
    /// Bytes between two sockets, TLS and all: what the hop itself costs on this machine, mostly in wake-ups. No proxy
    /// that holds the certificates can cost less.
    Passthrough,
    /// haproxy, `mode http`.
    Haproxy,
    /// Envoy.
    Envoy,
}

impl Peer {
    /// In the order in which they take turns.
    pub const ALL: [Self; 5] = [Self::Relay, Self::Floor, Self::Passthrough, Self::Haproxy, Self::Envoy];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Relay => "relay",
            Self::Floor => "floor",
            Self::Passthrough => "passthrough",
            Self::Haproxy => "haproxy",
            Self::Envoy => "envoy",
        }
    }

    /// Its port.
    pub fn port(self) -> u16 {
        match self {
            Self::Relay => 20_001,
            Self::Floor => 20_002,
            Self::Haproxy => 20_003,
            Self::Envoy => 20_004,
            Self::Passthrough => 20_006,
        }
    }

    /// Where it listens.
    pub fn address(self) -> SocketAddr {
        local(self.port())
    }
}

/// The backend's TLS port.
pub const BACKEND: SocketAddr = local(20_000);

/// The backend's plain port.
pub const FIGURES: SocketAddr = local(20_005);

const fn local(port: u16) -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

/// Where the programs are.
#[derive(Clone, Debug, clap::Args)]
pub struct Programs {
    /// The `rebalancer` binary
    #[arg(long)]
    pub rebalancer: PathBuf,
    /// haproxy
    #[arg(long)]
    pub haproxy: PathBuf,
    /// Envoy
    #[arg(long)]
    pub envoy: PathBuf,
    /// h2load
    #[arg(long)]
    pub h2load: PathBuf,
    /// The Go backend
    #[arg(long)]
    pub backend: PathBuf,
    /// Libraries that haproxy and h2load need beside the system's
    #[arg(long)]
    pub libraries: PathBuf,
}

/// What all are started with.
pub struct Start<'a> {
    /// The programs.
    pub programs: &'a Programs,
    /// The certificates.
    pub pki: &'a Pki,
    /// Logs, sockets and configurations.
    pub directory: &'a Path,
    /// Where they run.
    pub cores: Cores,
    /// How many descriptors each may have open.
    pub open_files: u64,
}

impl Start<'_> {
    /// Starts the backend, beside the clients.
    ///
    /// # Errors
    ///
    /// It cannot be started, or does not listen.
    pub fn backend(&self) -> anyhow::Result<Process> {
        let serving = self.pki.pair("apiserver");
        let mut command = pinned(self.cores.others, &self.programs.backend);
        command
            .arg(format!("-listen={BACKEND}"))
            .arg(format!("-figures={FIGURES}"))
            .arg("-cert")
            .arg(serving.certificate)
            .arg("-key")
            .arg(serving.key);
        let mut backend = Process::start("backend", command, None, self.directory)?;
        for address in [BACKEND, FIGURES] {
            listens(&mut backend, address)?;
        }
        Ok(backend)
    }

    /// Starts a proxy on the processor of its own.
    ///
    /// # Errors
    ///
    /// It cannot be started, or does not listen.
    pub fn peer(&self, peer: Peer) -> anyhow::Result<Process> {
        let command = match peer {
            Peer::Relay => self.relay(),
            Peer::Floor => self.copier(peer, Some(self.pki.path()))?,
            Peer::Passthrough => self.copier(peer, None)?,
            Peer::Haproxy => self.haproxy()?,
            Peer::Envoy => self.envoy()?,
        };
        let mut process = Process::start(peer.name(), command, None, self.directory)?;
        listens(&mut process, local(peer.port()))?;
        Ok(process)
    }

    fn relay(&self) -> Command {
        let mut command = pinned(self.cores.measured, &self.programs.rebalancer);
        command
            .arg("relay")
            .arg(format!("--listen={}", local(Peer::Relay.port())))
            .arg(format!("--upstream={BACKEND}"))
            // All of a benchmark's clients have one address, and no certificate.
            .arg("--max-connections-per-address=1000000")
            .args(self.pki.relay_flags())
            .arg(format!(
                "--control=unix:{}",
                self.directory.join("relay.sock").display()
            ));
        command
    }

    fn copier(&self, peer: Peer, certificates: Option<&Path>) -> anyhow::Result<Command> {
        let own = std::env::current_exe().context("a process knows its own binary on Linux")?;
        let mut command = pinned(self.cores.measured, own);
        command
            .arg("floor")
            .arg(format!("--listen={}", local(peer.port())))
            .arg(format!("--upstream={BACKEND}"));
        if let Some(certificates) = certificates {
            command.arg("--certificates").arg(certificates);
        }
        Ok(command)
    }

    fn haproxy(&self) -> anyhow::Result<Command> {
        let serving = self.pki.pair("apiserver");
        let bundle = self.directory.join("haproxy.pem");
        let text = fs::read_to_string(serving.certificate)? + &fs::read_to_string(serving.key)?;
        fs::write(&bundle, text)?;
        let configuration = self.directory.join("haproxy.cfg");
        let text = format!(
            "global\n  nbthread 1\n  maxconn {connections}\n\
             defaults\n  mode http\n  timeout connect 10s\n  timeout client 1h\n  timeout server 1h\n  \
             http-reuse safe\n  option forwardfor\n\
             frontend clients\n  \
             bind 127.0.0.1:{port} backlog 4096 ssl crt {bundle} alpn h2 ssl-min-ver TLSv1.3\n  \
             default_backend apiserver\n\
             backend apiserver\n  \
             server local {BACKEND} ssl verify required ca-file {ca} verifyhost {SERVER_NAME} sni str({SERVER_NAME}) \
             alpn h2 ssl-min-ver TLSv1.3\n",
            connections = (self.open_files.saturating_sub(1000) / 2).min(40_000),
            port = Peer::Haproxy.port(),
            bundle = bundle.display(),
            ca = self.pki.file("ca.crt").display(),
        );
        fs::write(&configuration, text)?;
        let mut command = pinned(self.cores.measured, &self.programs.haproxy);
        command
            .env("LD_LIBRARY_PATH", &self.programs.libraries)
            .arg("-db")
            .arg("-f")
            .arg(configuration);
        Ok(command)
    }

    fn envoy(&self) -> anyhow::Result<Command> {
        let configuration = self.directory.join("envoy.json");
        fs::write(&configuration, serde_json::to_vec_pretty(&self.envoy_configuration())?)?;
        let mut command = pinned(self.cores.measured, &self.programs.envoy);
        command.arg("-c").arg(configuration).args([
            "--concurrency",
            "1",
            "--disable-hot-restart",
            "--log-level",
            "warn",
        ]);
        Ok(command)
    }

    fn envoy_configuration(&self) -> serde_json::Value {
        let file = |name: &str| json!({"filename": self.pki.file(name)});
        let version = json!({"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"});
        let address = |address: SocketAddr| json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}});
        let unbounded = u32::MAX;
        json!({"static_resources": {
            "listeners": [{
                "name": "clients",
                "address": address(local(Peer::Envoy.port())),
                "tcp_backlog_size": 4096,
                "filter_chains": [{
                    "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                        "common_tls_context": {
                            "tls_params": version,
                            "alpn_protocols": ["h2"],
                            "tls_certificates": [{
                                "certificate_chain": file("apiserver.crt"),
                                "private_key": file("apiserver.key"),
                            }],
                        },
                    }},
                    "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.\
                                  HttpConnectionManager",
                        "codec_type": "HTTP2",
                        "stat_prefix": "clients",
                        "stream_idle_timeout": "0s",
                        "use_remote_address": true,
                        "route_config": {"virtual_hosts": [{
                            "name": "all",
                            "domains": ["*"],
                            "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "apiserver", "timeout": "0s"}}],
                        }]},
                        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {
                            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
                        }}],
                    }}],
                }],
            }],
            "clusters": [{
                "name": "apiserver",
                "type": "STATIC",
                "connect_timeout": "10s",
                "circuit_breakers": {"thresholds": [{
                    "max_connections": unbounded,
                    "max_pending_requests": unbounded,
                    "max_requests": unbounded,
                }]},
                "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    // Envoy sends before it knows the server's own bound (Go's is 250), and what is beyond it waits for ever
                    // behind watches. 100 is haproxy's bound too.
                    "explicit_http_config": {"http2_protocol_options": {"max_concurrent_streams": 100}},
                }},
                "load_assignment": {"cluster_name": "apiserver", "endpoints": [{"lb_endpoints": [{
                    "endpoint": {"address": address(BACKEND)},
                }]}]},
                "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                    "sni": SERVER_NAME,
                    "common_tls_context": {
                        "tls_params": version,
                        "validation_context": {
                            "trusted_ca": file("ca.crt"),
                            "match_typed_subject_alt_names": [
                                {"san_type": "DNS", "matcher": {"exact": SERVER_NAME}},
                            ],
                        },
                    },
                }},
            }],
        }})
    }
}

/// Waits until a process listens.
fn listens(process: &mut Process, address: SocketAddr) -> anyhow::Result<()> {
    let mut trouble = None;
    let seen = wait_for(Duration::from_secs(20), || {
        if let Err(error) = process.is_running() {
            trouble = Some(error);
            return Some(());
        }
        TcpStream::connect(address).ok().map(|_| ())
    });
    match (seen, trouble) {
        (_, Some(error)) => Err(error),
        (None, None) => anyhow::bail!("nothing listens on {address}:\n{}", process.log()),
        (Some(()), None) => Ok(()),
    }
}
