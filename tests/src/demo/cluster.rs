//! The demo's control plane: namespaces, certificates, apiservers, relays, agents, load balancer, clients.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use clap::ValueEnum;
use tokio::runtime::Runtime;

use crate::{
    apiserver::{Member, Settings, member_listens, start_apiserver, start_member},
    balancer::{Balancer, Front, Haproxy, Policy},
    demo_binary,
    fixture::{Fixture, goaway_server},
    kube::Admin,
    netns::{Namespace, Network},
    node::{APISERVER, Finding, Node, PORT, Shared, Shim},
    pki::Pki,
    process::{Process, is_emulated, wait_for},
    standin,
    swarm::Driver,
};

/// How long apiservers may take to become ready.
pub const START: Duration = Duration::from_secs(180);

/// Which apiserver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// The real one when it is at hand, else the stand-in
    Auto,
    /// kube-apiserver and etcd; built when they must be
    Real,
    /// A small apiserver of this project's tests
    Standin,
}

/// What the cluster is made of.
pub struct Options {
    /// How many nodes.
    pub nodes: usize,
    /// How many clients.
    pub clients: usize,
    /// How the load balancer chooses.
    pub policy: Policy,
    /// Which load balancer.
    pub front: Front,
    /// The real thing, or the stand-in.
    pub fixture: Option<Fixture>,
    /// What sends the GOAWAY.
    pub shim: Shim,
    /// How agents find each other.
    pub peers: Finding,
    /// The product.
    pub rebalancer: PathBuf,
    /// More flags for the agents.
    pub agent_flags: Vec<String>,
    /// More flags for the relays.
    pub relay_flags: Vec<String>,
    /// More flags for the client-go clients.
    pub client_flags: Vec<String>,
    /// Logs and sockets.
    pub directory: PathBuf,
    /// Members of etcd.
    pub etcd_members: usize,
    /// Agents write their state file and decision log into `NODE/disk` there, which may be a file system of its own.
    pub own_disk: bool,
}

/// The load balancer that runs.
enum Running {
    Own(Balancer),
    Haproxy(Haproxy),
}

/// A running control plane.
pub struct Cluster {
    options: Options,
    origin_ms: u64,
    network: Network,
    pki: Pki,
    /// The nodes.
    pub nodes: Vec<Node>,
    balancer: Running,
    _runtime: Runtime,
    /// The members of its etcd; none with the stand-in.
    pub etcd: Vec<Process>,
}

/// Where the members of an etcd are.
fn members(count: usize) -> Vec<Member> {
    let at = |port: usize| SocketAddr::new(Network::HUB, port as u16);
    (0..count)
        .map(|index| Member {
            client: at(2379 + 10 * index),
            peer: at(2380 + 10 * index),
        })
        .collect()
}

impl Cluster {
    /// Starts everything but the clients; `say` hears each step.
    ///
    /// # Errors
    ///
    /// Not root, or something cannot be started.
    pub fn start(options: Options, say: &dyn Fn(&str)) -> anyhow::Result<Self> {
        let count = options.nodes;
        say(&format!("making {count} network namespaces and the certificates"));
        let network = Network::new(count)?;
        let addresses: Vec<IpAddr> = (0..count).map(Network::node_address).collect();
        let loopback = APISERVER.ip();
        let pki = Pki::new(&[&addresses[..], &[Network::HUB, loopback]].concat())?;
        let names: Vec<(String, IpAddr)> = addresses
            .iter()
            .enumerate()
            .map(|(index, address)| (format!("node-{}", index + 1), *address))
            .collect();
        let mut etcd = Vec::new();
        if let Some(fixture) = &options.fixture {
            say("starting etcd");
            let members = members(options.etcd_members);
            for index in 0..members.len() {
                etcd.push(start_member(
                    fixture,
                    &members,
                    index,
                    &options.directory,
                    Some(&network.hub),
                )?);
            }
            for (process, member) in etcd.iter_mut().zip(&members) {
                member_listens(process, member.client, Some(&network.hub))?;
            }
        }
        let origin_ms = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64;
        let hub = network.hub.clone();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .on_thread_start(move || hub.enter().expect("root may enter a namespace of its own"))
            .enable_all()
            .build()?;
        let backends: Vec<SocketAddr> = addresses
            .iter()
            .map(|address| SocketAddr::new(*address, PORT))
            .collect();
        let listen = SocketAddr::new(Network::HUB, PORT);
        let policy = options.policy;
        let balancer = match &options.front {
            Front::Own(admission) => {
                let (admission, ca) = (*admission, pki.file("ca.crt"));
                let starting =
                    runtime.spawn(async move { Balancer::start(listen, backends, policy, admission, &ca).await });
                Running::Own(runtime.block_on(starting)??)
            }
            Front::Haproxy(servers) => {
                say("starting haproxy");
                let namespace = network.hub.fd();
                let haproxy = Haproxy::start(
                    listen,
                    "node",
                    &backends,
                    policy,
                    servers,
                    namespace,
                    &options.directory,
                )?;
                Running::Haproxy(haproxy)
            }
        };

        say(&match options.shim {
            Shim::Relay => format!("starting {count} apiservers, relays and agents"),
            Shim::Steer | Shim::None => format!("starting {count} apiservers and agents"),
        });
        let mut cluster = Self {
            options,
            origin_ms,
            network,
            pki,
            nodes: Vec::new(),
            balancer,
            _runtime: runtime,
            etcd,
        };
        let mut apiservers = Vec::new();
        for index in 0..count {
            let mut apiserver = cluster.start_apiserver(index)?;
            // An emulated processor has no time for several that start: each gives up what takes it a minute.
            if is_emulated() && cluster.options.fixture.is_some() {
                cluster.wait_until_ready(index, &mut apiserver)?;
            }
            apiservers.push(apiserver);
        }
        if cluster.options.peers == Finding::Kubernetes {
            let names: Vec<&str> = names.iter().map(|(name, _)| name.as_str()).collect();
            cluster.let_agents(&names, &mut apiservers[0])?;
        }
        for (index, mut apiserver) in apiservers.into_iter().enumerate() {
            if cluster.options.shim == Shim::Steer {
                // The agent puts its probe on a process that listens.
                cluster.wait_until_it_listens(index, &mut apiserver)?;
            }
            let shared = Shared {
                rebalancer: &cluster.options.rebalancer,
                shim: cluster.options.shim,
                peers: cluster.options.peers,
                pki: &cluster.pki,
                nodes: &names,
                directory: &cluster.options.directory,
                own_disk: cluster.options.own_disk,
                agent_flags: &cluster.options.agent_flags,
                relay_flags: &cluster.options.relay_flags,
            };
            let node = Node::start(&shared, index, &cluster.network.nodes[index], apiserver)?;
            cluster.nodes.push(node);
        }
        Ok(cluster)
    }

    /// Lets the agents use Leases, as an administrator does once for a cluster, when its first apiserver is ready.
    fn let_agents(&self, names: &[&str], apiserver: &mut Process) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.options.fixture.is_some(),
            "--peers kubernetes needs Leases, which the stand-in does not have: give --apiserver real"
        );
        self.wait_until_ready(0, apiserver)?;
        self.admin(0)?.let_agents(names)
    }

    fn wait_until_ready(&self, index: usize, apiserver: &mut Process) -> anyhow::Result<()> {
        let admin = self.admin(index)?;
        let ready = wait_for(START, || {
            if let Err(ended) = apiserver.is_running() {
                return Some(Err(ended));
            }
            let (status, _) = admin.ask_text("GET", "/readyz", None).ok()?;
            (status == 200).then_some(Ok(()))
        });
        ready.with_context(|| format!("apiserver {} does not become ready", index + 1))?
    }

    fn wait_until_it_listens(&self, index: usize, apiserver: &mut Process) -> anyhow::Result<()> {
        let address = self.options.shim.apiserver(Network::node_address(index));
        let hub = &self.network.hub;
        let connected = wait_for(START, || {
            if let Err(ended) = apiserver.is_running() {
                return Some(Err(ended));
            }
            hub.reaches(address).then_some(Ok(()))
        });
        connected.with_context(|| format!("nobody listens on {address}"))?
    }

    fn start_apiserver(&self, index: usize) -> anyhow::Result<Process> {
        let namespace = &self.network.nodes[index];
        let name = format!("apiserver-{}", index + 1);
        let listen = self.options.shim.apiserver(Network::node_address(index));
        let members = members(self.options.etcd_members);
        // The flag adds to what it was given before.
        let others: Vec<String> = members[1..]
            .iter()
            .map(|member| format!("--etcd-servers=http://{}", member.client))
            .collect();
        match &self.options.fixture {
            Some(fixture) => start_apiserver(
                &Settings {
                    fixture,
                    pki: &self.pki,
                    etcd: members[0].client,
                    listen,
                    advertise: Network::node_address(index),
                    count: self.options.nodes,
                    directory: &self.options.directory,
                    name: &name,
                    goaway_chance: match self.options.shim {
                        Shim::Relay | Shim::None => 0.0,
                        // Enough to be asked, and a lottery nobody wins.
                        Shim::Steer => 0.000_001,
                    },
                    host: Some(&format!("node-{}", index + 1)),
                    extra: &others,
                },
                Some(namespace.fd()),
            ),
            None if self.options.shim == Shim::Steer => {
                let pem = |name: &str| self.pki.file(name).display().to_string();
                let mut command = Command::new(goaway_server()?);
                command
                    .arg(format!("--listen={listen}"))
                    .arg(format!("--origin-ms={}", self.origin_ms))
                    .arg(format!("--tls-cert-file={}", pem("apiserver.crt")))
                    .arg(format!("--tls-private-key-file={}", pem("apiserver.key")))
                    .arg(format!("--client-ca-file={}", pem("ca.crt")))
                    .arg("--goaway-chance=0.000001");
                Process::start(&name, command, Some(namespace.fd()), &self.options.directory)
            }
            None => {
                let command = standin::command(listen, self.origin_ms.into(), &self.pki);
                Process::start(&name, command, Some(namespace.fd()), &self.options.directory)
            }
        }
    }

    /// Starts the clients.
    ///
    /// # Errors
    ///
    /// They cannot be started.
    pub fn start_clients(&self) -> anyhow::Result<Driver> {
        let identities = self.identities();
        std::fs::create_dir_all(&identities)?;
        for index in 0..self.options.clients {
            self.pki.client(
                &format!("clients/client-{index}"),
                &format!("client-{index}"),
                &["swarm-clients"],
            )?;
        }
        let server = SocketAddr::new(Network::HUB, PORT);
        let mut command = match &self.options.fixture {
            Some(fixture) => {
                let admin = self.pki.pair("admin");
                let mut command = Command::new(&fixture.swarm);
                command
                    .arg(format!("--server=https://{server}"))
                    .arg(format!("--admin-cert={}", admin.certificate.display()))
                    .arg(format!("--admin-key={}", admin.key.display()))
                    .args(&self.options.client_flags);
                command
            }
            None => {
                let mut command = Command::new(demo_binary());
                command.arg("swarm").arg(format!("--server={server}"));
                command
            }
        };
        command
            .arg(format!("--ca={}", self.pki.file("ca.crt").display()))
            .arg(format!("--identities={}", identities.display()))
            .arg(format!("--clients={}", self.options.clients));
        Driver::start("swarm", command, Some(self.network.hub.fd()), &self.options.directory)
    }

    /// Starts other clients beside them, of a program that speaks the swarm's lines: what it is told is the address, the port,
    /// the authority's file, the directory of the clients' identities, and how many are to be.
    ///
    /// # Errors
    ///
    /// They cannot be started.
    pub fn start_others(&self, name: &str, mut command: Command, count: usize) -> anyhow::Result<Driver> {
        command
            .arg(Network::HUB.to_string())
            .arg(PORT.to_string())
            .arg(self.pki.file("ca.crt"))
            .arg(self.identities())
            .arg(count.to_string());
        Driver::start(name, command, Some(self.network.hub.fd()), &self.options.directory)
    }

    fn identities(&self) -> PathBuf {
        self.pki.path().join("clients")
    }

    /// The version the first apiserver says it has.
    pub fn version(&self) -> String {
        match &self.options.fixture {
            None if self.options.shim == Shim::Steer => "standin-go".to_owned(),
            None => standin::VERSION.to_owned(),
            Some(fixture) => Command::new(&fixture.apiserver)
                .arg("--version")
                .output()
                .ok()
                .and_then(|output| String::from_utf8(output.stdout).ok())
                .map(|text| text.trim().trim_start_matches("Kubernetes ").to_owned())
                .unwrap_or_default(),
        }
    }

    /// Kills an apiserver the hard way.
    pub fn kill_apiserver(&mut self, index: usize) {
        if let Some(mut apiserver) = self.nodes[index].apiserver.take() {
            apiserver.kill();
        }
    }

    /// Ends an apiserver as a service manager does.
    pub fn end_apiserver(&mut self, index: usize, patience: Duration) {
        if let Some(mut apiserver) = self.nodes[index].apiserver.take() {
            apiserver.terminate(patience);
        }
    }

    /// Starts it again.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn restart_apiserver(&mut self, index: usize) -> anyhow::Result<()> {
        self.nodes[index].apiserver = Some(self.start_apiserver(index)?);
        Ok(())
    }

    /// Active connections per apiserver.
    ///
    /// # Errors
    ///
    /// A relay does not answer.
    pub fn loads(&self) -> anyhow::Result<Vec<u64>> {
        self.nodes.iter().map(Node::active).collect()
    }

    /// Whether every process still runs.
    ///
    /// # Errors
    ///
    /// One does not.
    pub fn check(&mut self) -> anyhow::Result<()> {
        self.nodes.iter_mut().try_for_each(Node::check)
    }

    /// GOAWAYs sent by all agents since they started.
    ///
    /// # Errors
    ///
    /// An agent does not answer.
    pub fn goaways(&self) -> anyhow::Result<u64> {
        let total = |node: &Node| {
            node.status()?["goaways_total"]
                .as_u64()
                .with_context(|| format!("the status of {}", node.name))
        };
        self.nodes.iter().map(total).sum()
    }

    /// Which apiservers the load balancer sends to.
    pub fn admitted(&self) -> Vec<bool> {
        match &self.balancer {
            Running::Own(balancer) => balancer.healthy(),
            Running::Haproxy(haproxy) => haproxy.healthy(),
        }
    }

    /// Its sockets per apiserver, draining ones included.
    pub fn sockets(&self) -> Vec<usize> {
        match &self.balancer {
            Running::Own(balancer) => balancer.sockets(),
            Running::Haproxy(haproxy) => haproxy.sockets(),
        }
    }

    /// Of clients with those ports, how many haproxy has connected to each apiserver; nothing for the demo's own load balancer.
    ///
    /// # Errors
    ///
    /// haproxy does not answer.
    pub fn connected(&self, ports: &[u16]) -> anyhow::Result<Option<Vec<u64>>> {
        let Running::Haproxy(haproxy) = &self.balancer else {
            return Ok(None);
        };
        let mut counts = vec![0; self.nodes.len()];
        for (port, index) in haproxy.sessions()? {
            if let Some(count) = counts.get_mut(index).filter(|_| ports.contains(&port)) {
                *count += 1;
            }
        }
        Ok(Some(counts))
    }

    /// Whether haproxy sends new clients to an apiserver, whatever its health.
    ///
    /// # Errors
    ///
    /// It is the demo's own load balancer, or haproxy does not answer.
    pub fn admit(&self, index: usize, admits: bool) -> anyhow::Result<()> {
        self.haproxy()?.admit(index, admits)
    }

    /// haproxy's process.
    ///
    /// # Errors
    ///
    /// It is the demo's own load balancer.
    pub fn balancer_id(&self) -> anyhow::Result<u32> {
        Ok(self.haproxy()?.id())
    }

    fn haproxy(&self) -> anyhow::Result<&Haproxy> {
        match &self.balancer {
            Running::Own(_) => anyhow::bail!("the demo's own load balancer is a part of this process"),
            Running::Haproxy(haproxy) => Ok(haproxy),
        }
    }

    /// Whether an apiserver takes clients, as its own agent sees it: the load balancer may know later.
    pub fn is_ready(&self, index: usize) -> bool {
        let node = &self.nodes[index];
        let Ok(status) = node.status() else { return false };
        let own = |entry: &&serde_json::Value| entry["apiserver"] == node.name;
        let view = status["view"].as_array();
        let state = view.and_then(|view| view.iter().find(own)).map(|entry| &entry["state"]);
        state.is_some_and(|state| state == "ready" || state == "starting")
    }

    /// The namespace of a node.
    pub fn namespace(&self, index: usize) -> &Namespace {
        &self.network.nodes[index]
    }

    /// Logs and sockets.
    pub fn directory(&self) -> &Path {
        &self.options.directory
    }

    /// Starts members of etcd again that have ended.
    ///
    /// # Errors
    ///
    /// One cannot be started.
    pub fn restart_etcd(&mut self, which: &[usize]) -> anyhow::Result<()> {
        let Some(fixture) = &self.options.fixture else {
            return Ok(());
        };
        let members = members(self.options.etcd_members);
        let hub = Some(&self.network.hub);
        for index in which {
            self.etcd[*index] = start_member(fixture, &members, *index, &self.options.directory, hub)?;
        }
        for index in which {
            member_listens(&mut self.etcd[*index], members[*index].client, hub)?;
        }
        Ok(())
    }

    /// Kills haproxy and starts it again; the demo's own load balancer is part of this process.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn restart_balancer(&mut self) -> anyhow::Result<()> {
        match &mut self.balancer {
            Running::Own(_) => anyhow::bail!("the demo's own load balancer cannot be killed"),
            Running::Haproxy(haproxy) => haproxy.restart(),
        }
    }

    /// Sends haproxy a signal; the demo's own load balancer is part of this process.
    ///
    /// # Errors
    ///
    /// It is the demo's own.
    pub fn signal_balancer(&self, signal: i32) -> anyhow::Result<()> {
        self.haproxy()?.signal(signal);
        Ok(())
    }

    /// An administrator of that node's apiserver, past load balancer and relay.
    ///
    /// # Errors
    ///
    /// The certificates cannot be read.
    pub fn admin(&self, index: usize) -> anyhow::Result<Admin> {
        let address = self.options.shim.apiserver(Network::node_address(index));
        Admin::new(&self.pki, self.namespace(index), address)
    }

    /// The certificates.
    pub fn pki(&self) -> &Pki {
        &self.pki
    }

    /// Where load balancer, clients and etcd are.
    pub fn hub(&self) -> &Namespace {
        &self.network.hub
    }

    /// What it is made of.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Ends everything, agents first.
    pub fn end(&mut self) {
        self.nodes.iter_mut().for_each(Node::end);
    }
}
