//! Envoy and haproxy before kube-apiservers: they end TLS, and say by the front-proxy certificate who each client is.
//!
//! Input: where they listen, and one apiserver or several. Output: a running proxy.
//! Must never be set up so that one of them looks worse than who runs it with care would have it. Both say of a client
//! without a certificate that it is anonymous: one with a token would need connections without the front-proxy certificate.

use std::{
    fs,
    net::SocketAddr,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    balancer::Haproxy,
    pki::{Pki, SERVER_NAME},
    process::Process,
};

/// Envoy's filter that says who the client is.
const WHO: &str = r#"
function envoy_on_request(handle)
  local headers = handle:headers()
  headers:remove("x-remote-user"); headers:remove("x-remote-group"); headers:remove("x-remote-uid")
  local tls = handle:streamInfo():downstreamSslConnection()
  if tls == nil or not tls:peerCertificateValidated() then
    headers:add("x-remote-user", "system:anonymous"); headers:add("x-remote-group", "system:unauthenticated")
    return
  end
  local subject = tls:subjectPeerCertificate()
  headers:add("x-remote-user", string.match(subject, "CN=([^,]+)"))
  for group in string.gmatch(subject, "O=([^,]+)") do headers:add("x-remote-group", group) end
end
"#;

/// What stands before apiservers.
pub struct Front<'a> {
    /// The certificates.
    pub pki: &'a Pki,
    /// Where clients come.
    pub listen: SocketAddr,
    /// Where requests go; to several by turns, with health checks, and to another one where one cannot be reached.
    pub apiservers: &'a [SocketAddr],
    /// Envoy tells a connection to go when it is so old.
    pub maximum_age: Option<Duration>,
}

impl Front<'_> {
    /// Starts Envoy, with one thread for requests.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn envoy(
        &self,
        program: &Path,
        name: &str,
        namespace: &Arc<OwnedFd>,
        directory: &Path,
    ) -> anyhow::Result<Process> {
        let file = directory.join(format!("{name}.json"));
        fs::write(&file, serde_json::to_vec_pretty(&self.envoy_configuration())?)?;
        let mut command = Command::new(program);
        command
            .arg("-c")
            .arg(file)
            .args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "warn"]);
        Process::start(name, command, Some(namespace), directory)
    }

    /// Starts haproxy in HTTP mode.
    ///
    /// # Errors
    ///
    /// There is no haproxy, or it refuses its configuration.
    pub fn haproxy(&self, namespace: &Arc<OwnedFd>, directory: &Path) -> anyhow::Result<Haproxy> {
        let bundle = |stem: &str| -> anyhow::Result<PathBuf> {
            let pair = self.pki.pair(stem);
            let path = directory.join(format!("{stem}.pem"));
            fs::write(
                &path,
                fs::read_to_string(pair.certificate)? + &fs::read_to_string(pair.key)?,
            )?;
            Ok(path)
        };
        let (serving, front_proxy) = (bundle("apiserver")?, bundle("front-proxy-client")?);
        let mut text = format!(
            "global\n  stats socket {socket} level admin\n\
             defaults\n  mode http\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n  retries 3\n  \
             option redispatch 1\n\
             frontend clients\n  bind {listen} ssl crt {serving} ca-file {ca} verify optional alpn h2,http/1.1\n  \
             option forwardfor\n  \
             http-request del-header X-Remote- -m beg\n  \
             acl known ssl_c_used\n  \
             http-request set-header X-Remote-User %[ssl_c_s_dn(CN)] if known\n  \
             http-request set-header X-Remote-Group %[ssl_c_s_dn(O)] if known\n  \
             http-request set-header X-Remote-User system:anonymous if !known\n  \
             http-request set-header X-Remote-Group system:unauthenticated if !known\n  \
             default_backend apiservers\n\
             backend apiservers\n  balance roundrobin\n  option httpchk\n  \
             http-check send meth GET uri /readyz ver HTTP/1.1 hdr Host {SERVER_NAME} \
             hdr X-Remote-User system:anonymous hdr X-Remote-Group system:unauthenticated\n  \
             http-check expect status 200\n",
            socket = Haproxy::socket_in(directory).display(),
            listen = self.listen,
            serving = serving.display(),
            ca = self.pki.file("ca.crt").display(),
        );
        for (index, apiserver) in self.apiservers.iter().enumerate() {
            text += &format!(
                "  server node-{} {apiserver} ssl crt {} ca-file {} verify required verifyhost {SERVER_NAME} \
                 sni str({SERVER_NAME}) alpn h2 check check-alpn http/1.1 check-sni {SERVER_NAME} inter 1s fall 2 rise 2\n",
                index + 1,
                front_proxy.display(),
                self.pki.file("ca.crt").display(),
            );
        }
        Haproxy::configured(&text, self.apiservers.len(), namespace, directory)
    }

    fn envoy_configuration(&self) -> Value {
        let file = |name: &str| json!({"filename": self.pki.file(name)});
        let mut manager = json!({
            "@type": typed("filters.network.http_connection_manager.v3.HttpConnectionManager"),
            "stat_prefix": "clients",
            "stream_idle_timeout": "0s",
            // haproxy's health checks are HTTP/1.0, which knows no Host.
            "http_protocol_options": {"accept_http_10": true, "default_host_for_http_10": SERVER_NAME},
            "use_remote_address": true,
            "route_config": {"virtual_hosts": [{
                "name": "all",
                "domains": ["*"],
                "routes": [{"match": {"prefix": "/"}, "route": self.route()}],
            }]},
            "http_filters": [
                {"name": "who", "typed_config": {
                    "@type": typed("filters.http.lua.v3.Lua"),
                    "default_source_code": {"inline_string": WHO},
                }},
                {"name": "envoy.filters.http.router", "typed_config": {"@type": typed("filters.http.router.v3.Router")}},
            ],
        });
        if let Some(age) = self.maximum_age {
            manager["common_http_protocol_options"] = json!({"max_connection_duration": format!("{}s", age.as_secs())});
        }
        json!({"static_resources": {
            "listeners": [{
                "name": "clients",
                "address": address(self.listen),
                "filter_chains": [{
                    "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": {
                        "@type": typed("transport_sockets.tls.v3.DownstreamTlsContext"),
                        "require_client_certificate": false,
                        "common_tls_context": {
                            "alpn_protocols": ["h2", "http/1.1"],
                            "tls_certificates": [{
                                "certificate_chain": file("apiserver.crt"), "private_key": file("apiserver.key"),
                            }],
                            "validation_context": {"trusted_ca": file("ca.crt")},
                        },
                    }},
                    "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}],
                }],
            }],
            "clusters": [self.cluster()],
        }})
    }

    fn has_choice(&self) -> bool {
        self.apiservers.len() > 1
    }

    fn route(&self) -> Value {
        let mut route = json!({"cluster": "apiserver", "timeout": "0s"});
        if self.has_choice() {
            // A request that the apiserver cannot have seen is sent to another one, whatever it asks.
            route["retry_policy"] = json!({
                "retry_on": "connect-failure,refused-stream",
                "num_retries": 3,
                "retry_host_predicate": [{"name": "envoy.retry_host_predicates.previous_hosts", "typed_config": {
                    "@type": typed("retry.host.previous_hosts.v3.PreviousHostsPredicate"),
                }}],
                "host_selection_retry_max_attempts": 3,
            });
        }
        route
    }

    fn cluster(&self) -> Value {
        let file = |name: &str| json!({"filename": self.pki.file(name)});
        let unbounded = u32::MAX;
        let endpoints: Vec<Value> = self
            .apiservers
            .iter()
            .map(|apiserver| json!({"endpoint": {"address": address(*apiserver)}}))
            .collect();
        let mut cluster = json!({
            "name": "apiserver",
            "type": "STATIC",
            "connect_timeout": "10s",
            "circuit_breakers": {"thresholds": [{
                "max_connections": unbounded, "max_pending_requests": unbounded, "max_requests": unbounded,
                "max_retries": unbounded,
            }]},
            "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": typed("upstreams.http.v3.HttpProtocolOptions"),
                // Fewer than Go's own bound of 250: what Envoy sends beyond it waits behind watches.
                "explicit_http_config": {"http2_protocol_options": {"max_concurrent_streams": 100}},
            }},
            "load_assignment": {"cluster_name": "apiserver", "endpoints": [{"lb_endpoints": endpoints}]},
            "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": {
                "@type": typed("transport_sockets.tls.v3.UpstreamTlsContext"),
                "sni": SERVER_NAME,
                "common_tls_context": {
                    "tls_certificates": [{
                        "certificate_chain": file("front-proxy-client.crt"),
                        "private_key": file("front-proxy-client.key"),
                    }],
                    "validation_context": {
                        "trusted_ca": file("ca.crt"),
                        "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": SERVER_NAME}}],
                    },
                },
            }},
        });
        if self.has_choice() {
            let header = |name: &str, value: &str| json!({"header": {"key": name, "value": value}});
            cluster["health_checks"] = json!([{
                "timeout": "5s",
                "interval": "1s",
                // One that nobody asks is looked at no less often.
                "no_traffic_interval": "1s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 2,
                "http_health_check": {
                    "path": "/readyz",
                    "host": SERVER_NAME,
                    "codec_client_type": "HTTP2",
                    "request_headers_to_add": [
                        header("x-remote-user", "system:anonymous"), header("x-remote-group", "system:unauthenticated"),
                    ],
                },
            }]);
        }
        cluster
    }
}

fn typed(name: &str) -> String {
    format!("type.googleapis.com/envoy.extensions.{name}")
}

fn address(at: SocketAddr) -> Value {
    json!({"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}})
}
