//! One control-plane node: apiserver, relay and agent, in a namespace of its own.
//!
//! Output: running processes and what their sockets say. Must never start one without the kernel's word to end it.

use std::{
    ffi::OsString,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use clap::ValueEnum;
use serde_json::Value;

use crate::{
    kube::kubeconfig,
    netns::{Namespace, Network},
    pki::Pki,
    process::{Process, on_host},
};

/// Where the apiserver listens, behind the relay.
pub const APISERVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 6444);

/// The port clients connect to.
pub const PORT: u16 = 6443;

/// The port agents ask each other on.
const PEER_PORT: u16 = 9443;

/// A node's processes.
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: IpAddr,
    /// The apiserver, while it runs.
    pub apiserver: Option<Process>,
    relay: Option<Process>,
    /// Relays that were taken over: each ends by itself with its last connection.
    drained: Vec<Process>,
    agent: Process,
    /// How the agent is started.
    agent_flags: Vec<OsString>,
    /// How the relay is started, where there is one.
    relay_flags: Vec<OsString>,
    rebalancer: PathBuf,
    namespace: Arc<OwnedFd>,
    directory: PathBuf,
}

/// What sends the GOAWAY on the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shim {
    /// A relay before each apiserver
    Relay,
    /// A probe on each apiserver
    Steer,
    /// Nothing: agents count and compare, and nobody is told
    None,
}

impl Shim {
    /// As the command line spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Relay => "relay",
            Self::Steer => "steer",
            Self::None => "none",
        }
    }

    /// Where the apiserver of that address listens: behind the relay, or where clients connect to.
    pub fn apiserver(self, address: IpAddr) -> SocketAddr {
        match self {
            Self::Relay => APISERVER,
            Self::Steer | Self::None => SocketAddr::new(address, PORT),
        }
    }
}

/// How agents find each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Finding {
    /// By a flag for each, with certificates
    Static,
    /// By Leases: real apiservers only
    Kubernetes,
}

/// What all nodes share.
pub struct Shared<'a> {
    /// The binary.
    pub rebalancer: &'a Path,
    /// What sends the GOAWAY.
    pub shim: Shim,
    /// How agents find each other.
    pub peers: Finding,
    /// The certificates.
    pub pki: &'a Pki,
    /// Names and addresses of all nodes.
    pub nodes: &'a [(String, IpAddr)],
    /// Logs and sockets.
    pub directory: &'a Path,
    /// State file and decision log are in `disk` in the node's directory, which may be a file system of its own.
    pub own_disk: bool,
    /// More flags for the agents.
    pub agent_flags: &'a [String],
    /// More flags for the relays.
    pub relay_flags: &'a [String],
}

impl Node {
    /// Starts relay, where there is one, and agent; the apiserver is the caller's.
    ///
    /// # Errors
    ///
    /// A process cannot be started.
    pub fn start(shared: &Shared<'_>, index: usize, namespace: &Namespace, apiserver: Process) -> anyhow::Result<Self> {
        let (name, address) = &shared.nodes[index];
        let directory = shared.directory.join(name);
        std::fs::create_dir_all(&directory)?;
        let control = directory.join("relay.sock");
        let relay_flags = relay_flags(shared, *address, &control);
        let (relay, shim) = match shared.shim {
            Shim::Relay => {
                let relay = start_relay(shared.rebalancer, &relay_flags, namespace.fd(), &directory)?;
                (Some(relay), format!("relay:unix:{}", control.display()))
            }
            Shim::Steer => (None, "steer:auto".to_owned()),
            Shim::None => (None, "none".to_owned()),
        };

        let mut agent = Command::new(shared.rebalancer);
        let disk = if shared.own_disk {
            directory.join("disk")
        } else {
            directory.clone()
        };
        agent
            .arg("agent")
            .arg(format!("--node-name={name}"))
            .arg(format!("--apiserver-port={PORT}"))
            .arg(format!("--shim={shim}"))
            .arg(format!("--api=unix:{}", directory.join("agent.sock").display()))
            .arg(format!("--decision-log={}", disk.join("decisions.jsonl").display()))
            .arg(format!("--peer-listen={address}:{PEER_PORT}"))
            .args(shared.agent_flags);
        if shared.own_disk {
            agent.arg("--state").arg(disk.join("agent.state"));
        }
        match shared.peers {
            Finding::Static => {
                let identity = shared.pki.peer(&format!("agent-{name}"), *address)?;
                agent
                    .arg("--peer-cert")
                    .arg(&identity.certificate)
                    .arg("--peer-key")
                    .arg(&identity.key)
                    .arg("--peer-ca")
                    .arg(shared.pki.file("ca.crt"));
                for (peer, at) in shared.nodes {
                    if peer != name {
                        agent.arg(format!("--peer={peer}=https://{at}:{PEER_PORT}"));
                    }
                }
            }
            Finding::Kubernetes => {
                let credentials = kubeconfig(shared.pki, name, SocketAddr::new(Network::HUB, PORT))?;
                agent.arg("--peers=kubernetes").arg("--kubeconfig").arg(credentials);
            }
        }
        let agent_flags = agent.get_args().map(OsString::from).collect();
        on_host(&mut agent, name);
        let agent = Process::start("agent", agent, Some(namespace.fd()), &directory)?;
        Ok(Self {
            name: name.clone(),
            address: *address,
            apiserver: Some(apiserver),
            relay,
            drained: Vec::new(),
            agent,
            agent_flags,
            relay_flags,
            rebalancer: shared.rebalancer.to_owned(),
            namespace: Arc::clone(namespace.fd()),
            directory,
        })
    }

    /// Kills the agent the hard way.
    pub fn kill_agent(&mut self) {
        self.agent.kill();
    }

    /// Starts the agent again, as it was started, with more flags.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn start_agent(&mut self, more: &[&str]) -> anyhow::Result<()> {
        let mut agent = Command::new(&self.rebalancer);
        agent.args(&self.agent_flags).args(more);
        on_host(&mut agent, &self.name);
        self.agent = Process::start("agent", agent, Some(&self.namespace), &self.directory)?;
        Ok(())
    }

    /// Sends the agent a signal.
    pub fn signal_agent(&self, signal: i32) {
        self.agent.signal(signal);
    }

    /// Ends the agent as a service manager does.
    pub fn end_agent(&mut self, patience: Duration) {
        self.agent.terminate(patience);
    }

    /// The agent's process.
    pub fn agent_id(&self) -> u32 {
        self.agent.id()
    }

    /// The relay's process, where there is one.
    pub fn relay_id(&self) -> Option<u32> {
        self.relay.as_ref().map(Process::id)
    }

    /// Kills the relay the hard way, where there is one.
    pub fn kill_relay(&mut self) {
        self.relay = None;
    }

    /// Starts a relay as the first one was started; one that runs is left to drain.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn start_relay(&mut self) -> anyhow::Result<()> {
        let next = start_relay(&self.rebalancer, &self.relay_flags, &self.namespace, &self.directory)?;
        self.drained.extend(self.relay.replace(next));
        Ok(())
    }

    /// Sends the relay a signal, where there is one.
    pub fn signal_relay(&self, signal: i32) {
        if let Some(relay) = &self.relay {
            relay.signal(signal);
        }
    }

    /// Where its logs and sockets are: `relay.sock`, `agent.sock`, `decisions.jsonl`.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The agent's log, of all its processes.
    pub fn agent_log(&self) -> String {
        self.agent.log()
    }

    /// The relay's log, of all its processes; nothing where there is none.
    pub fn relay_log(&self) -> String {
        self.relay.as_ref().map(Process::log).unwrap_or_default()
    }

    /// Whether everything that should run does.
    ///
    /// # Errors
    ///
    /// A process has ended: its last lines.
    pub fn check(&mut self) -> anyhow::Result<()> {
        for process in [&mut self.agent]
            .into_iter()
            .chain(self.relay.as_mut())
            .chain(self.apiserver.as_mut())
        {
            process.is_running().with_context(|| format!("on {}", self.name))?;
        }
        Ok(())
    }

    /// Active HTTP/2 client connections, as the relay counts them: another view than the agent's own, where there is one.
    ///
    /// # Errors
    ///
    /// The relay, or the agent, does not answer.
    pub fn active(&self) -> anyhow::Result<u64> {
        let active = |connection: &&Value| {
            let protocol = &connection["protocol"];
            // An agent that came later than its connections has not seen what they offered, and counts them all the same.
            let unseen = protocol == "unknown" && self.relay.is_none();
            (protocol == "h2" || protocol == "offered" || unseen)
                && connection["state"] == "active"
                && connection["node_local"] != true
        };
        Ok(self.connections()?.iter().filter(active).count() as u64)
    }

    /// Open watches of each connection, draining ones included, and its requests so far, by its id; a probe sees no
    /// watches.
    ///
    /// # Errors
    ///
    /// The relay, or the agent, does not answer.
    pub fn work(&self) -> anyhow::Result<Vec<(String, Work)>> {
        let number = |entry: &Value, name: &str| entry[name].as_u64().unwrap_or_default();
        let of = |entry: &Value| {
            let work = Work {
                watches: number(entry, "open_watches"),
                requests: number(entry, "requests"),
            };
            // The relay's list and the agent's name it differently.
            let id = entry["id"].as_str().or_else(|| entry["connection"].as_str());
            (id.unwrap_or_default().to_owned(), work)
        };
        Ok(self.connections()?.iter().map(of).collect())
    }

    /// Whether nine of ten of its connections are old enough for its agent to tell them to go.
    ///
    /// # Errors
    ///
    /// The relay, or the agent, does not answer.
    pub fn has_old_connections(&self) -> anyhow::Result<bool> {
        let needed = self.status()?["min_connection_age_s"]
            .as_f64()
            .context("no least age")?;
        let age = |entry: &Value| match entry["age_ms"].as_f64() {
            Some(ms) => ms / 1000.0,
            None => entry["age_s"].as_f64().unwrap_or_default(),
        };
        let ages: Vec<f64> = self.connections()?.iter().map(age).collect();
        let old = ages.iter().filter(|age| **age >= needed).count();
        Ok(old * 10 >= ages.len() * 9)
    }

    /// GOAWAYs that its relay has sent since it started; where there is none, those of the agent's own count.
    ///
    /// # Errors
    ///
    /// It does not answer.
    pub fn told(&self) -> anyhow::Result<Told> {
        if self.relay.is_none() {
            let by_order = self.status()?["goaways_total"].as_u64().context("goaways_total")?;
            return Ok(Told { by_order, by_itself: 0 });
        }
        let answer = ask(&self.directory.join("relay.sock"), "/v1/outcomes?since=0")?;
        let outcomes = answer["outcomes"].as_array().context("outcomes")?;
        let told = outcomes.iter().filter(|entry| entry["outcome"] == "draining");
        let (by_order, by_itself): (Vec<_>, Vec<_>) = told.partition(|entry| entry["generation"].as_u64() > Some(0));
        Ok(Told {
            by_order: by_order.len() as u64,
            by_itself: by_itself.len() as u64,
        })
    }

    /// Relays that were taken over and still run.
    pub fn draining(&mut self) -> Vec<u32> {
        self.drained.retain_mut(|relay| relay.is_running().is_ok());
        self.drained.iter().map(Process::id).collect()
    }

    /// Whether its shim sees watches.
    pub fn sees_watches(&self) -> bool {
        self.relay.is_some()
    }

    fn connections(&self) -> anyhow::Result<Vec<Value>> {
        let mut answer = match &self.relay {
            Some(_) => ask(&self.directory.join("relay.sock"), "/v1/connections")?,
            None => ask(&self.api(), "/v1/connections?limit=100000")?,
        };
        match answer["connections"].take() {
            Value::Array(list) => Ok(list),
            other => anyhow::bail!("connections are {other}"),
        }
    }

    /// What the agent says of itself.
    ///
    /// # Errors
    ///
    /// It does not answer.
    pub fn status(&self) -> anyhow::Result<Value> {
        ask(&self.directory.join("agent.sock"), "/v1/status")
    }

    /// The agent's decisions with a higher id.
    ///
    /// # Errors
    ///
    /// It does not answer.
    pub fn decisions(&self, since: u64) -> anyhow::Result<Vec<Value>> {
        let mut answer = ask(
            &self.directory.join("agent.sock"),
            &format!("/v1/decisions?limit=1000&since={since}"),
        )?;
        match answer["decisions"].take() {
            Value::Array(list) => Ok(list),
            other => anyhow::bail!("decisions are {other}"),
        }
    }

    /// Where the agent answers.
    pub fn api(&self) -> PathBuf {
        self.directory.join("agent.sock")
    }

    /// Ends agent, relay and apiserver, in that order.
    pub fn end(&mut self) {
        let patience = Duration::from_secs(3);
        self.agent.terminate(patience);
        // Its connections are the demo's own: nobody waits for them to drain.
        for relay in self.relay.iter_mut().chain(&mut self.drained) {
            relay.kill();
        }
        if let Some(mut apiserver) = self.apiserver.take() {
            apiserver.kill();
        }
    }
}

/// GOAWAYs of one relay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// On an agent's order.
    pub by_order: u64,
    /// Without one: it ends, a certificate is renewed or no longer believed, a client is idle.
    pub by_itself: u64,
}

impl Told {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            by_order: self.by_order + other.by_order,
            by_itself: self.by_itself + other.by_itself,
        }
    }

    /// Those that came since then.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            by_order: self.by_order.saturating_sub(before.by_order),
            by_itself: self.by_itself.saturating_sub(before.by_itself),
        }
    }
}

/// What one connection asks of its apiserver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Open now.
    pub watches: u64,
    /// So far.
    pub requests: u64,
}

/// What the relay of the node with that address is started with.
fn relay_flags(shared: &Shared<'_>, address: IpAddr, control: &Path) -> Vec<OsString> {
    let mut relay = Command::new(shared.rebalancer);
    relay
        .arg("relay")
        .arg(format!("--listen={address}:{PORT}"))
        .arg(format!("--upstream={APISERVER}"))
        .args(shared.pki.relay_flags())
        .arg(format!("--control=unix:{}", control.display()))
        .args(shared.relay_flags);
    relay.get_args().map(OsString::from).collect()
}

fn start_relay(
    rebalancer: &Path,
    flags: &[OsString],
    namespace: &Arc<OwnedFd>,
    directory: &Path,
) -> anyhow::Result<Process> {
    let mut relay = Command::new(rebalancer);
    relay.args(flags);
    Process::start("relay", relay, Some(namespace), directory)
}

/// `GET PATH` on a local socket.
///
/// # Errors
///
/// Nobody answers, or not with JSON.
pub fn ask(socket: &Path, path: &str) -> anyhow::Result<Value> {
    serde_json::from_str(&ask_text(socket, path)?).with_context(|| format!("the answer to {path}"))
}

/// `GET PATH` on a local socket, as text.
///
/// # Errors
///
/// Nobody answers, or not with 200.
pub fn ask_text(socket: &Path, path: &str) -> anyhow::Result<String> {
    let mut stream = UnixStream::connect(socket).with_context(|| format!("cannot reach {}", socket.display()))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an HTTP answer")?;
    anyhow::ensure!(head.contains(" 200 "), "{path}: {head}\n{body}");
    Ok(body.to_owned())
}
