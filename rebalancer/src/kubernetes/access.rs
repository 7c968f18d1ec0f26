//! The way to the Kubernetes API: the local apiserver first, then the address the credentials name.
//!
//! Input: a kubeconfig, or what a pod is given. Output: clients, and each failure as one sentence that says what to do.
//! Must never ask for ever: each attempt has its time, and an apiserver that failed is left alone for a while.

use std::{
    env, fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use http::Uri;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::time::timeout;

use super::parts::{RequestLabels, Requests};

/// How long one attempt may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(3);

/// An apiserver that failed is not asked for so long while there is another.
const AVOIDED: Duration = Duration::from_secs(30);

/// Credentials that were refused are read again, at most so often.
const REREAD: Duration = Duration::from_secs(5);

/// Where a pod finds who it is.
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// One apiserver, or the load balancer before all of them.
struct Way {
    /// How it is named in messages.
    name: String,
    client: Client,
    avoided_until: Mutex<Option<Instant>>,
}

/// The ways to the API. Cheap to clone.
#[derive(Clone)]
pub struct Access {
    shared: Arc<Shared>,
}

struct Shared {
    kubeconfig: Option<PathBuf>,
    /// Addresses of the local apiserver, with its port.
    local: Vec<(IpAddr, u16)>,
    ways: RwLock<Arc<Vec<Way>>>,
    read: Mutex<Instant>,
    requests: Requests,
}

/// Why a request came to nothing.
#[derive(Debug)]
pub enum Failed {
    /// Somebody else wrote it meanwhile, or it is there already, or what is asked for is too old: read again.
    Outdated,
    /// In words, with what to do.
    Because(String),
}

impl Access {
    /// Reads the credentials; nobody is asked yet.
    ///
    /// # Errors
    ///
    /// There are none, or they cannot be used.
    pub async fn open(
        kubeconfig: Option<PathBuf>,
        local: Vec<(IpAddr, u16)>,
        requests: Requests,
    ) -> anyhow::Result<Self> {
        let ways = ways(kubeconfig.as_deref(), &local).await?;
        Ok(Self {
            shared: Arc::new(Shared {
                kubeconfig,
                local,
                ways: RwLock::new(Arc::new(ways)),
                read: Mutex::new(Instant::now()),
                requests,
            }),
        })
    }

    /// Asks one after the other until one answers what was asked.
    ///
    /// # Errors
    ///
    /// None does: the last one's words.
    pub async fn ask<T, F>(&self, what: Asked<'_>, ask: impl Fn(Client) -> F) -> Result<T, Failed>
    where
        F: Future<Output = Result<T, kube::Error>>,
    {
        let ways = Arc::clone(&self.shared.ways.read().unwrap_or_else(PoisonError::into_inner));
        let now = Instant::now();
        let is_avoided = |way: &&Way| {
            let until = way.avoided_until.lock().unwrap_or_else(PoisonError::into_inner);
            until.is_some_and(|until| until > now)
        };
        let (later, first): (Vec<&Way>, Vec<&Way>) = ways.iter().partition(is_avoided);
        let mut said = Failed::Because("there is no way to the Kubernetes API".to_owned());
        for way in first.into_iter().chain(later) {
            let (result, failed, is_final) = match timeout(PATIENCE, ask(way.client.clone())).await {
                Ok(Ok(answer)) => {
                    self.count(what.verb, "ok");
                    *way.avoided_until.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    return Ok(answer);
                }
                Ok(Err(error)) => self.explain(&way.name, what, &error),
                Err(_) => {
                    let why = format!(
                        "the Kubernetes API at {} gave no answer to {} within {} s: see whether it is overloaded, or \
                         whether a firewall drops what it says",
                        way.name,
                        what.verb,
                        PATIENCE.as_secs()
                    );
                    ("slow", Failed::Because(why), false)
                }
            };
            self.count(what.verb, result);
            said = failed;
            if result == "unauthorized" {
                self.reread().await;
            }
            if is_final {
                break;
            }
            let until = Some(Instant::now() + AVOIDED);
            *way.avoided_until.lock().unwrap_or_else(PoisonError::into_inner) = until;
        }
        Err(said)
    }

    fn count(&self, verb: &'static str, result: &'static str) {
        self.shared
            .requests
            .get_or_create(&RequestLabels { verb, result })
            .inc();
    }

    /// The result for the metric, the words, and whether another apiserver would say the same.
    fn explain(&self, at: &str, what: Asked<'_>, error: &kube::Error) -> (&'static str, Failed, bool) {
        let Asked { verb, of, namespace } = what;
        let place = if namespace.is_empty() {
            "in the whole cluster".to_owned()
        } else {
            format!("in the namespace {namespace}")
        };
        let kube::Error::Api(status) = error else {
            let why = root_cause(error);
            return match error {
                kube::Error::SerdeError(_) | kube::Error::FromUtf8(_) => (
                    "garbled",
                    Failed::Because(format!(
                        "{at} answered {verb} of {of} with what cannot be read ({why}): is it a kube-apiserver, and is nothing \
                         before it that cuts answers short?"
                    )),
                    false,
                ),
                kube::Error::Auth(_) => (
                    "unauthorized",
                    Failed::Because(format!("the credentials cannot be used ({why}): see {}", self.source())),
                    true,
                ),
                _ => (
                    "unreachable",
                    Failed::Because(format!(
                        "the Kubernetes API cannot be reached at {at} ({why}): start it, or see whether its address and \
                         certificate are those of {}",
                        self.source()
                    )),
                    false,
                ),
            };
        };
        let message = &status.message;
        match status.code {
            401 => (
                "unauthorized",
                Failed::Because(format!(
                    "{at} does not know this agent (401): its token or certificate has expired, or is of another \
                     cluster; renew {}",
                    self.source()
                )),
                false,
            ),
            403 => (
                "forbidden",
                Failed::Because(format!(
                    "{at} forbids it: grant this agent {verb} on {of} {place} ({message})"
                )),
                true,
            ),
            404 if verb == "create" => (
                "not_found",
                Failed::Because(format!(
                    "the namespace {namespace} does not exist: make it, or give --lease-namespace one that does"
                )),
                true,
            ),
            404 | 409 | 410 => ("outdated", Failed::Outdated, true),
            code @ (429 | 500..) => (
                "overloaded",
                Failed::Because(format!(
                    "{at} answers {verb} of {of} with {code} ({message}): see its log, and whether its etcd answers"
                )),
                false,
            ),
            code => (
                "refused",
                Failed::Because(format!("{at} refuses {verb} of {of} {place} ({code}): {message}")),
                true,
            ),
        }
    }

    /// Where the credentials are from.
    fn source(&self) -> String {
        match &self.shared.kubeconfig {
            Some(path) => format!("--kubeconfig {}", path.display()),
            None => format!("the pod's service account ({TOKEN})"),
        }
    }

    /// Takes what has been renewed: tokens are read by each client, certificates are not.
    async fn reread(&self) {
        {
            let mut read = self.shared.read.lock().unwrap_or_else(PoisonError::into_inner);
            if read.elapsed() < REREAD {
                return;
            }
            *read = Instant::now();
        }
        match ways(self.shared.kubeconfig.as_deref(), &self.shared.local).await {
            Ok(ways) => *self.shared.ways.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(ways),
            Err(error) => tracing::warn!(error = format!("{error:#}"), "the credentials cannot be read again"),
        }
    }
}

/// Leases, as RBAC names them.
pub const LEASES: &str = "leases.coordination.k8s.io";

/// Events, as RBAC names them.
pub const EVENTS: &str = "events.events.k8s.io";

/// FlowSchemas, as RBAC names them.
pub const FLOW_SCHEMAS: &str = "flowschemas.flowcontrol.apiserver.k8s.io";

/// PriorityLevelConfigurations, as RBAC names them.
pub const PRIORITY_LEVELS: &str = "prioritylevelconfigurations.flowcontrol.apiserver.k8s.io";

/// What is asked, for messages and figures.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The verb, as RBAC spells it.
    pub verb: &'static str,
    /// What it is asked of.
    pub of: &'static str,
    /// Where; empty for what is in no namespace.
    pub namespace: &'a str,
}

/// The URL the credentials name.
///
/// # Errors
///
/// There are none, or they cannot be used.
pub async fn cluster_url(kubeconfig: Option<&Path>) -> anyhow::Result<Uri> {
    Ok(credentials(kubeconfig).await?.cluster_url)
}

async fn credentials(kubeconfig: Option<&Path>) -> anyhow::Result<Config> {
    let mut config = match kubeconfig {
        Some(path) => {
            // Read here, so that a missing file is told as one.
            let text = fs::read_to_string(path)
                .with_context(|| format!("--kubeconfig {}: cannot read it", path.display()))?;
            drop(text);
            let file = Kubeconfig::read_from(path)
                .with_context(|| format!("--kubeconfig {}: it is no kubeconfig", path.display()))?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .with_context(|| format!("--kubeconfig {}", path.display()))?
        }
        None if env::var_os("KUBERNETES_SERVICE_HOST").is_some() => Config::incluster().context(
            "--peers kubernetes: the pod has no service account (automountServiceAccountToken), and --kubeconfig is not \
             given",
        )?,
        None => bail!(
            "--peers kubernetes needs credentials: give --kubeconfig FILE, or run in a pod with a service account"
        ),
    };
    config.connect_timeout = Some(CONNECT);
    // Attempts are this module's.
    config.default_retry = false;
    Ok(config)
}

async fn ways(kubeconfig: Option<&Path>, local: &[(IpAddr, u16)]) -> anyhow::Result<Vec<Way>> {
    let config = credentials(kubeconfig).await?;
    let way = |name: String, config: Config| -> anyhow::Result<Way> {
        let client = Client::try_from(config).with_context(|| match kubeconfig {
            Some(path) => format!(
                "--kubeconfig {}: its certificate, key or CA cannot be used",
                path.display()
            ),
            None => "the pod's service account cannot be used".to_owned(),
        })?;
        Ok(Way {
            name,
            client,
            avoided_until: Mutex::new(None),
        })
    };
    let mut ways = Vec::new();
    let host = config
        .cluster_url
        .host()
        .unwrap_or_default()
        .trim_matches(['[', ']'])
        .to_owned();
    let port = config.cluster_url.port_u16().unwrap_or(443);
    for (address, at) in local {
        let authority = std::net::SocketAddr::new(*address, *at);
        if host == address.to_string() && port == *at {
            continue;
        }
        let uri: Uri = format!("https://{authority}").parse().context("an address is no URL")?;
        let mut near = config.clone();
        near.cluster_url = uri;
        // Each apiserver's certificate is for what the load balancer, or the cluster's service, is reached by.
        near.tls_server_name = Some(config.tls_server_name.clone().unwrap_or_else(|| host.clone()));
        ways.push(way(format!("the local apiserver {authority}"), near)?);
    }
    ways.push(way(config.cluster_url.to_string(), config)?);
    Ok(ways)
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}
