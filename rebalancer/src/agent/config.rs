//! The agent's configuration: flags over environment over file over defaults.
//!
//! Input: the command line and a versioned YAML file. Output: [`Config`], whole and checked, or an error that names key,
//! value and what is allowed. Must never leave a half-valid configuration to be found out at run time.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use rebalancer_core::{
    ids::{ApiserverName, ShimKind},
    membership::can_have_a_lease,
    policy::{Exclusions, Mode, NodeLocal, Policy},
};
use serde::{Deserialize, de::DeserializeOwned};

use crate::{
    kernel::{Classify, KernelLog, Options, SourceKind},
    kubernetes,
    local::SocketPath,
    span::Span,
    sys,
};

mod values;

pub use values::{Discovery, ModeName, Network, NodeLocalName, PeerAddress, Rate, Shim, WeightName};
use values::{parsed, parsed_list};

/// The file format's version.
const VERSION: u32 = 1;

/// What may be given, on the command line or in the file; the file's keys are the flags' names.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Raw {
    /// YAML file with `version: 1` and any of these flags as keys; flags and environment win over it
    #[arg(long, env = "REBALANCER_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
    #[arg(skip)]
    version: Option<u32>,
    /// Name of this node's apiserver, the same for all agents [default: the host name]
    #[arg(long, env = "REBALANCER_NODE_NAME", value_name = "NAME")]
    node_name: Option<String>,
    /// Port clients connect to [default: 6443]
    #[arg(long, env = "REBALANCER_APISERVER_PORT", value_name = "PORT")]
    apiserver_port: Option<u16>,
    /// The apiserver's own address, where something else listens on the same port at another one, such as a load balancer
    /// at a virtual address; may be given several times [default: all addresses]
    #[arg(long, env = "REBALANCER_APISERVER_ADDRESS", value_name = "IP", value_delimiter = ',')]
    apiserver_address: Option<Vec<IpAddr>>,
    /// Where connections are counted [default: auto]
    #[arg(long, env = "REBALANCER_SOURCE", value_enum)]
    source: Option<SourceKind>,
    /// What the kernel programs say of themselves in the log [default: off]
    #[arg(long, env = "REBALANCER_KERNEL_LOG", value_enum)]
    kernel_log: Option<KernelLog>,
    /// Whether what clients offer is read from their first packets [default: auto, which is unless a relay says it]
    #[arg(long, env = "REBALANCER_CLASSIFY", value_enum)]
    classify: Option<Classify>,
    /// Where the host's cgroup2 hierarchy is mounted [default: found]
    #[arg(long, env = "REBALANCER_CGROUP_ROOT", value_name = "PATH")]
    cgroup_root: Option<PathBuf>,
    /// What connections from this node are: exclude (counted apart), count (load, but never told to go), or move (clients
    /// like others: a load balancer is on this node) [default: exclude]
    #[arg(long, env = "REBALANCER_NODE_LOCAL", value_enum)]
    node_local: Option<NodeLocalName>,
    /// What sends the GOAWAY: relay:unix:PATH, steer:auto, steer:PATH or none [default: none]
    #[arg(long, env = "REBALANCER_SHIM", value_name = "SHIM")]
    #[serde(deserialize_with = "parsed")]
    shim: Option<Shim>,
    /// Steer new connections for the apiserver's port to the relay: no flag of the apiserver changes, and without a relay
    /// that answers they reach the apiserver. Needs --shim relay
    #[arg(long, env = "REBALANCER_INTERCEPT", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    intercept: Option<bool>,
    /// Another apiserver's agent, as NAME=https://HOST:PORT; give one for each
    #[arg(long, env = "REBALANCER_PEER", value_delimiter = ',', value_name = "NAME=URL")]
    #[serde(deserialize_with = "parsed_list")]
    peer: Vec<PeerAddress>,
    /// How peers are found [default: static]
    #[arg(long, env = "REBALANCER_PEERS", value_enum)]
    peers: Option<Discovery>,
    /// Address and port the peers ask this agent on [default: [::]:9443 when there are peers]
    #[arg(long, env = "REBALANCER_PEER_LISTEN", value_name = "ADDRESS")]
    peer_listen: Option<SocketAddr>,
    /// Certificate (PEM) of this agent, for both ends of the agents' talk
    #[arg(long, env = "REBALANCER_PEER_CERT", value_name = "FILE")]
    peer_cert: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, env = "REBALANCER_PEER_KEY", value_name = "FILE")]
    peer_key: Option<PathBuf>,
    /// CA bundle (PEM) that signs every agent's certificate
    #[arg(long, env = "REBALANCER_PEER_CA", value_name = "FILE")]
    peer_ca: Option<PathBuf>,
    /// With --peers kubernetes: the address the peers reach this node by [default: that of --peer-listen, else the one this
    /// node speaks to the cluster from]
    #[arg(long, env = "REBALANCER_PEER_ADVERTISE", value_name = "ADDRESS")]
    peer_advertise: Option<IpAddr>,
    /// With --peers kubernetes: credentials for the Kubernetes API [default: the pod's service account]
    #[arg(long, env = "REBALANCER_KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// With --peers kubernetes: where the agents' Leases are [default: kube-system]
    #[arg(long, env = "REBALANCER_LEASE_NAMESPACE", value_name = "NAMESPACE")]
    lease_namespace: Option<String>,
    /// Skew above which clients are moved, as a share of the mean [default: 0.10]
    #[arg(long, env = "REBALANCER_SKEW_THRESHOLD", value_name = "SHARE")]
    skew_threshold: Option<f64>,
    /// Skew at which moving stops [default: 0.03]
    #[arg(long, env = "REBALANCER_SKEW_TARGET", value_name = "SHARE")]
    skew_target: Option<f64>,
    /// What a connection weighs [default: connections]
    #[arg(long, env = "REBALANCER_WEIGHT", value_enum)]
    weight: Option<WeightName>,
    /// Time between two decisions [default: 5s]
    #[arg(long, env = "REBALANCER_INTERVAL", value_name = "DURATION")]
    interval: Option<Span>,
    /// GOAWAYs a second on this apiserver; `auto` tells as many as it takes for all of them in twenty seconds, 10 to 2000 [default: auto]
    #[arg(long, env = "REBALANCER_GOAWAY_RATE", value_name = "auto|RATE")]
    goaway_rate: Option<Rate>,
    /// Share of this apiserver's connections in one plan [default: 0.25]
    #[arg(long, env = "REBALANCER_GOAWAY_SHARE", value_name = "SHARE")]
    goaway_share: Option<f64>,
    /// Time after a plan's last GOAWAY before the next plan [default: 10s]
    #[arg(long, env = "REBALANCER_SETTLE", value_name = "DURATION")]
    settle: Option<Span>,
    /// Younger connections are left alone [default: 30s]
    #[arg(long, env = "REBALANCER_MIN_CONNECTION_AGE", value_name = "DURATION")]
    min_connection_age: Option<Span>,
    /// Time in which no client is told twice [default: 10m]
    #[arg(long, env = "REBALANCER_CLIENT_COOLDOWN", value_name = "DURATION")]
    client_cooldown: Option<Span>,
    /// How long the next step of an upgrade of the apiservers is waited for, so that clients are spread once after the last;
    /// 0s waits for nothing [default: 15m]
    #[arg(long, env = "REBALANCER_UPGRADE_PATIENCE", value_name = "DURATION")]
    upgrade_patience: Option<Span>,
    /// Clients of these networks are left alone
    #[arg(long, env = "REBALANCER_EXCLUDE_CIDR", value_delimiter = ',', value_name = "CIDR")]
    #[serde(deserialize_with = "parsed_list")]
    exclude_cidr: Vec<Network>,
    /// This user is left alone; may be given several times, in the environment one a line
    #[arg(long, env = "REBALANCER_EXCLUDE_USER", value_delimiter = '\n', value_name = "USER")]
    exclude_user: Vec<String>,
    /// Clients whose user agent begins like this are left alone; may be given several times, in the environment one a line
    #[arg(
        long,
        env = "REBALANCER_EXCLUDE_USER_AGENT",
        value_delimiter = '\n',
        value_name = "PREFIX"
    )]
    exclude_user_agent: Vec<String>,
    /// The size of this apiserver relative to the others': it gets clients in proportion [default: 1]
    #[arg(long, env = "REBALANCER_CAPACITY", value_name = "SIZE")]
    capacity: Option<f64>,
    /// Whether plans are carried out, or wait for `rebalancer approve` [default: active]
    #[arg(long, env = "REBALANCER_MODE", value_enum, conflicts_with = "dry_run")]
    mode: Option<ModeName>,
    /// Decide and record the same, send nothing: --mode dry-run
    #[arg(long, env = "REBALANCER_DRY_RUN", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    dry_run: Option<bool>,
    /// Local API [default: unix:/run/rebalancer/agent.sock]
    #[arg(long, env = "REBALANCER_API", value_name = "unix:PATH")]
    #[serde(deserialize_with = "parsed")]
    api: Option<SocketPath>,
    /// File in which pause, cool-downs and what was tried outlive the agent [default: beside --api, as agent.state]
    #[arg(long, env = "REBALANCER_STATE", value_name = "FILE")]
    state: Option<PathBuf>,
    /// Address and port of the metrics [default: 127.0.0.1:9470]
    #[arg(long, env = "REBALANCER_METRICS", value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,
    /// Address and port a load balancer asks: HAProxy's agent check, and GET /lb for health checks [default: none]
    #[arg(long, env = "REBALANCER_LB_AGENT", value_name = "ADDRESS")]
    lb_agent: Option<SocketAddr>,
    /// File every decision is appended to, one JSON object a line
    #[arg(long, env = "REBALANCER_DECISION_LOG", value_name = "FILE")]
    decision_log: Option<PathBuf>,
}

/// How agents talk to each other.
#[derive(Clone, Debug)]
pub struct PeerConfig {
    /// The others.
    pub addresses: Vec<PeerAddress>,
    /// Where this one answers.
    pub listen: SocketAddr,
    /// Certificate.
    pub certificate: PathBuf,
    /// Key.
    pub key: PathBuf,
    /// Who signs all of them.
    pub ca: PathBuf,
}

/// How agents find each other by the cluster's Leases.
#[derive(Clone, Debug)]
pub struct KubernetesConfig {
    /// Where this one answers.
    pub listen: SocketAddr,
    /// The address the others reach it by, where it is given.
    pub advertise: Option<IpAddr>,
    /// Credentials; the pod's own without.
    pub kubeconfig: Option<PathBuf>,
    /// Where the agents' Leases are.
    pub namespace: String,
}

/// How peers are found, with what that takes.
#[derive(Clone, Debug)]
pub enum Peering {
    /// By flags.
    Static(PeerConfig),
    /// By Leases.
    Kubernetes(KubernetesConfig),
}

impl Peering {
    /// Where this agent answers its peers.
    pub fn listen(&self) -> SocketAddr {
        match self {
            Self::Static(config) => config.listen,
            Self::Kubernetes(config) => config.listen,
        }
    }
}

/// What the agent runs with.
#[derive(Clone, Debug)]
pub struct Config {
    /// What is decided by.
    pub policy: Policy,
    /// The watched port.
    pub apiserver_port: u16,
    /// Where connections are counted, and how.
    pub watch: Options,
    /// What sends the GOAWAY.
    pub shim: Shim,
    /// Whether new connections are steered to the relay.
    pub intercept: bool,
    /// The other agents; `None` when there are none.
    pub peers: Option<Peering>,
    /// The local API.
    pub api: SocketPath,
    /// The state file.
    pub state: PathBuf,
    /// The metrics.
    pub metrics: SocketAddr,
    /// Where load balancers ask.
    pub lb_agent: Option<SocketAddr>,
    /// The decision log.
    pub decision_log: Option<PathBuf>,
}

impl Raw {
    /// Reads the file, if one is named, and checks everything.
    ///
    /// # Errors
    ///
    /// The first thing wrong: which key, which value, what is allowed.
    pub fn complete(self) -> anyhow::Result<Config> {
        let file = match &self.config {
            None => Self::default(),
            Some(path) => {
                let text = fs::read_to_string(path).with_context(|| format!("--config {}", path.display()))?;
                let raw: Self = from_yaml(&text).with_context(|| format!("--config {}", path.display()))?;
                let version = raw
                    .version
                    .with_context(|| format!("--config {}: `version: {VERSION}` is missing", path.display()))?;
                ensure!(
                    version == VERSION,
                    "--config {}: version {version} is not known; this program reads version {VERSION}",
                    path.display()
                );
                raw
            }
        };
        self.over(file).checked()
    }

    /// Takes from `file` what was not given.
    fn over(self, file: Self) -> Self {
        fn list<T>(given: Vec<T>, file: Vec<T>) -> Vec<T> {
            if given.is_empty() { file } else { given }
        }
        Self {
            config: self.config,
            version: file.version,
            node_name: self.node_name.or(file.node_name),
            apiserver_port: self.apiserver_port.or(file.apiserver_port),
            apiserver_address: self.apiserver_address.or(file.apiserver_address),
            source: self.source.or(file.source),
            kernel_log: self.kernel_log.or(file.kernel_log),
            classify: self.classify.or(file.classify),
            cgroup_root: self.cgroup_root.or(file.cgroup_root),
            node_local: self.node_local.or(file.node_local),
            shim: self.shim.or(file.shim),
            intercept: self.intercept.or(file.intercept),
            peer: list(self.peer, file.peer),
            peers: self.peers.or(file.peers),
            peer_listen: self.peer_listen.or(file.peer_listen),
            peer_cert: self.peer_cert.or(file.peer_cert),
            peer_key: self.peer_key.or(file.peer_key),
            peer_ca: self.peer_ca.or(file.peer_ca),
            peer_advertise: self.peer_advertise.or(file.peer_advertise),
            kubeconfig: self.kubeconfig.or(file.kubeconfig),
            lease_namespace: self.lease_namespace.or(file.lease_namespace),
            skew_threshold: self.skew_threshold.or(file.skew_threshold),
            skew_target: self.skew_target.or(file.skew_target),
            weight: self.weight.or(file.weight),
            interval: self.interval.or(file.interval),
            goaway_rate: self.goaway_rate.or(file.goaway_rate),
            goaway_share: self.goaway_share.or(file.goaway_share),
            settle: self.settle.or(file.settle),
            min_connection_age: self.min_connection_age.or(file.min_connection_age),
            client_cooldown: self.client_cooldown.or(file.client_cooldown),
            upgrade_patience: self.upgrade_patience.or(file.upgrade_patience),
            exclude_cidr: list(self.exclude_cidr, file.exclude_cidr),
            exclude_user: list(self.exclude_user, file.exclude_user),
            exclude_user_agent: list(self.exclude_user_agent, file.exclude_user_agent),
            capacity: self.capacity.or(file.capacity),
            mode: self.mode.or(file.mode),
            dry_run: self.dry_run.or(file.dry_run),
            api: self.api.or(file.api),
            state: self.state.or(file.state),
            metrics: self.metrics.or(file.metrics),
            lb_agent: self.lb_agent.or(file.lb_agent),
            decision_log: self.decision_log.or(file.decision_log),
        }
    }

    fn checked(self) -> anyhow::Result<Config> {
        let node = match self.node_name {
            Some(name) => name,
            None => sys::host_name(),
        };
        ensure!(
            !node.is_empty(),
            "--node-name is empty: give the name the peers know this node by"
        );
        let mut names = BTreeSet::new();
        for peer in &self.peer {
            ensure!(
                names.insert(peer.name.clone()),
                "--peer names {} twice: each apiserver is named once",
                peer.name
            );
        }
        let listen = self.peer_listen.unwrap_or(SocketAddr::new([0_u16; 8].into(), 9443));
        let peers = if self.peers == Some(Discovery::Kubernetes) {
            can_ask_kubernetes(kubernetes::IS_BUILT_IN)?;
            for (flag, is_given) in [
                ("--peer", !self.peer.is_empty()),
                ("--peer-cert", self.peer_cert.is_some()),
                ("--peer-key", self.peer_key.is_some()),
                ("--peer-ca", self.peer_ca.is_some()),
            ] {
                ensure!(
                    !is_given,
                    "{flag} is given with --peers kubernetes: peers and their keys are found by Leases; leave it away, or \
                     give --peers static"
                );
            }
            let name = ApiserverName::new(node.as_str());
            ensure!(
                can_have_a_lease(&name),
                "--node-name {node}: with --peers kubernetes it is part of a Lease's name, in lower-case letters, digits, \
                 `-` and `.`; give the name `kubectl get nodes` shows"
            );
            let namespace = self.lease_namespace.unwrap_or_else(|| "kube-system".to_owned());
            ensure!(
                can_have_a_lease(&ApiserverName::new(namespace.as_str())) && !namespace.contains('.'),
                "--lease-namespace {namespace}: it is not the name of a namespace"
            );
            ensure!(
                listen.port() != 0,
                "--peer-listen {listen}: the peers need to know its port; allowed is 1 to 65535"
            );
            Some(Peering::Kubernetes(KubernetesConfig {
                listen,
                advertise: self.peer_advertise,
                kubeconfig: self.kubeconfig,
                namespace,
            }))
        } else {
            for (flag, is_given) in [
                ("--peer-advertise", self.peer_advertise.is_some()),
                ("--kubeconfig", self.kubeconfig.is_some()),
                ("--lease-namespace", self.lease_namespace.is_some()),
            ] {
                ensure!(!is_given, "{flag} is given without --peers kubernetes, which it is for");
            }
            let needed = |value: Option<PathBuf>, flag: &str| {
                value.with_context(|| format!("{flag} is missing: agents talk to their peers over mutual TLS"))
            };
            if self.peer.is_empty() {
                None
            } else {
                Some(Peering::Static(PeerConfig {
                    addresses: self.peer,
                    listen,
                    certificate: needed(self.peer_cert, "--peer-cert")?,
                    key: needed(self.peer_key, "--peer-key")?,
                    ca: needed(self.peer_ca, "--peer-ca")?,
                }))
            }
        };
        let apiserver_port = self.apiserver_port.unwrap_or(6443);
        ensure!(apiserver_port != 0, "--apiserver-port is 0: allowed is 1 to 65535");
        let shim = self.shim.unwrap_or(Shim::None);
        let intercept = self.intercept.unwrap_or(false);
        ensure!(
            !intercept || matches!(shim, Shim::Relay(_)),
            "--intercept steers connections to a relay: it needs --shim relay:unix:PATH"
        );
        let weight = self.weight.unwrap_or(WeightName::Connections);
        if matches!(weight, WeightName::Requests | WeightName::Streams) && shim == Shim::None {
            bail!("--weight requests and --weight streams need a shim that sees requests: --shim is none");
        }
        if weight == WeightName::Streams && matches!(shim, Shim::Steer(_)) {
            bail!(
                "--weight streams needs a shim that sees streams end, which --shim steer does not: use requests or bytes"
            );
        }

        let defaults = Policy::new(ApiserverName::new(node), names);
        let or = |given: Option<Span>, default: Duration| given.map_or(default, |span| span.0);
        let policy = Policy {
            weight: weight.into(),
            skew_threshold: self.skew_threshold.unwrap_or(defaults.skew_threshold),
            skew_target: self.skew_target.unwrap_or(defaults.skew_target),
            interval: or(self.interval, defaults.interval),
            goaway_rate: self.goaway_rate.map_or(defaults.goaway_rate, |rate| rate.0),
            capacity: self.capacity.unwrap_or(defaults.capacity),
            goaway_share: self.goaway_share.unwrap_or(defaults.goaway_share),
            settle: or(self.settle, defaults.settle),
            min_connection_age: or(self.min_connection_age, defaults.min_connection_age),
            client_cooldown: or(self.client_cooldown, defaults.client_cooldown),
            upgrade_patience: or(self.upgrade_patience, defaults.upgrade_patience),
            exclusions: Exclusions {
                networks: self.exclude_cidr.into_iter().map(|network| network.0).collect(),
                users: self.exclude_user.into_iter().collect(),
                user_agents: self.exclude_user_agent,
            },
            shim: match shim {
                Shim::Relay(_) => ShimKind::Relay,
                Shim::Steer(_) => ShimKind::Steer,
                Shim::None => ShimKind::None,
            },
            mode: match self.mode {
                _ if self.dry_run.unwrap_or(false) => Mode::DryRun,
                Some(ModeName::DryRun) => Mode::DryRun,
                Some(ModeName::Propose) => Mode::Propose,
                Some(ModeName::Active) | None => Mode::Active,
            },
            node_local: self.node_local.map_or(NodeLocal::default(), NodeLocal::from),
            ..defaults
        };
        let api = self.api.unwrap_or_else(default_api);
        Ok(Config {
            state: self.state.unwrap_or_else(|| api.0.with_extension("state")),
            policy: policy.checked()?,
            apiserver_port,
            watch: Options {
                source: self.source.unwrap_or_default(),
                port: apiserver_port,
                addresses: self.apiserver_address.unwrap_or_default(),
                kernel_log: self.kernel_log.unwrap_or_default(),
                // A relay names the protocol of each connection; the probe hears of HTTP/2 only.
                classify: self.classify.unwrap_or_default() == Classify::Auto && !matches!(shim, Shim::Relay(_)),
                cgroup_root: self.cgroup_root,
            },
            shim,
            intercept,
            peers,
            api,
            metrics: self.metrics.unwrap_or(SocketAddr::new([127, 0, 0, 1].into(), 9470)),
            lb_agent: self.lb_agent,
            decision_log: self.decision_log,
        })
    }
}

/// Where the local API is unless said otherwise.
pub fn default_api() -> SocketPath {
    SocketPath("/run/rebalancer/agent.sock".into())
}

/// What is built in is taken by argument, so that both are tried.
fn can_ask_kubernetes(is_built_in: bool) -> anyhow::Result<()> {
    ensure!(
        is_built_in,
        "--peers kubernetes: {}, or name the peers by --peer",
        kubernetes::ABSENT
    );
    Ok(())
}

fn from_yaml<T: DeserializeOwned>(text: &str) -> anyhow::Result<T> {
    Ok(serde_yaml_ng::from_str(text)?)
}

#[cfg(test)]
mod tests;
