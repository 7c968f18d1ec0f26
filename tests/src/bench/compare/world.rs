//! One contender's processes: etcd, three apiservers, what stands before and beside them, a load balancer.
//!
//! Must never start two contenders differently in anything but what they are compared by.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;

use super::{Contender, Programs, audit::Audit};
use crate::{
    apiserver::{Settings, start_apiserver, start_etcd},
    balancer::{Haproxy, Policy},
    bench::{
        fronts::Front,
        machine::{cpu_ns, rss_kib},
    },
    fixture::Fixture,
    kube::Admin,
    netns::Network,
    node::{APISERVER, Finding, Node, PORT, Shared, Shim},
    pki::Pki,
    process::{Process, wait_for},
};

/// How many apiservers there are.
pub const APISERVERS: usize = 3;

/// How long three apiservers and their load balancer may take to be ready.
const START: Duration = Duration::from_secs(180);

/// How old a connection may be where that is the contender.
pub const MAXIMUM_AGE: Duration = Duration::from_secs(60);

/// What some processes have used so far, and the memory they have.
#[derive(Clone, Copy, Debug, Default)]
pub struct Used {
    pub ns: u64,
    pub kib: u64,
}

impl Used {
    fn of(processes: impl IntoIterator<Item = u32>) -> anyhow::Result<Self> {
        let mut used = Self::default();
        for process in processes {
            used.ns += cpu_ns(process)?;
            used.kib += rss_kib(process).unwrap_or_default();
        }
        Ok(used)
    }

    /// Processor time since `earlier`, and the memory of now.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            ns: self.ns.saturating_sub(earlier.ns),
            kib: self.kib,
        }
    }
}

/// What all have used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent {
    pub apiservers: Used,
    /// Load balancer, proxies and relays.
    pub front: Used,
    pub agents: Used,
}

/// All of a run but the kubelets.
pub struct World {
    /// Where kubelets go.
    pub server: SocketAddr,
    pub network: Network,
    pub pki: Pki,
    pub audit: Audit,
    contender: Contender,
    fixture: Fixture,
    directory: PathBuf,
    apiservers: Vec<Option<Process>>,
    /// Whether the killed one was started and has not been ready yet.
    is_starting: bool,
    /// Ours: relay and agent.
    nodes: Vec<Node>,
    /// Layer 4, or layer 7 where that is the contender; none where Envoy stands in its place.
    balancer: Option<Haproxy>,
    envoys: Vec<Process>,
    _etcd: Process,
}

impl World {
    /// Starts everything but the kubelets.
    pub fn start(
        contender: Contender,
        programs: &Programs,
        fixture: &Fixture,
        directory: &Path,
    ) -> anyhow::Result<Self> {
        fs::create_dir_all(directory)?;
        let network = Network::new(APISERVERS)?;
        let mut addresses: Vec<IpAddr> = (0..APISERVERS).map(Network::node_address).collect();
        addresses.extend([Network::HUB, APISERVER.ip()]);
        let pki = Pki::new(&addresses)?;
        let at = |port| SocketAddr::new(Network::HUB, port);
        let etcd = start_etcd(fixture, at(2379), at(2380), directory, Some(&network.hub))?;
        let mut world = Self {
            server: at(PORT),
            network,
            pki,
            audit: Audit::new(APISERVERS, directory),
            contender,
            fixture: fixture.clone(),
            directory: directory.to_owned(),
            apiservers: Vec::new(),
            is_starting: false,
            nodes: Vec::new(),
            balancer: None,
            envoys: Vec::new(),
            _etcd: etcd,
        };
        for index in 0..APISERVERS {
            let apiserver = world.apiserver(index)?;
            world.apiservers.push(Some(apiserver));
        }
        world.fronts(programs)?;
        world.balance(programs)?;
        world.wait()?;
        Ok(world)
    }

    /// Where an apiserver's clients, or the load balancer, come to.
    fn door(index: usize) -> SocketAddr {
        SocketAddr::new(Network::node_address(index), PORT)
    }

    fn listen(&self, index: usize) -> SocketAddr {
        if self.contender.has_front() {
            APISERVER
        } else {
            Self::door(index)
        }
    }

    fn apiserver(&mut self, index: usize) -> anyhow::Result<Process> {
        let audit = self.audit.flags(index)?;
        let settings = Settings {
            fixture: &self.fixture,
            pki: &self.pki,
            etcd: SocketAddr::new(Network::HUB, 2379),
            listen: self.listen(index),
            advertise: Network::node_address(index),
            count: APISERVERS,
            directory: &self.directory,
            name: &format!("apiserver-{}", index + 1),
            goaway_chance: self.contender.goaway_chance(),
            host: Some(&format!("node-{}", index + 1)),
            extra: &audit,
        };
        start_apiserver(&settings, Some(self.network.nodes[index].fd()))
    }

    /// What stands before each apiserver, or beside it.
    fn fronts(&mut self, programs: &Programs) -> anyhow::Result<()> {
        let names: Vec<(String, IpAddr)> = (0..APISERVERS)
            .map(|index| (format!("node-{}", index + 1), Network::node_address(index)))
            .collect();
        for index in 0..APISERVERS {
            let namespace = &self.network.nodes[index];
            let shim = match self.contender {
                Contender::Relay => Shim::Relay,
                Contender::Steer => Shim::Steer,
                Contender::Age => {
                    let front = Front {
                        pki: &self.pki,
                        listen: Self::door(index),
                        apiservers: &[APISERVER],
                        maximum_age: Some(MAXIMUM_AGE),
                    };
                    let name = format!("envoy-{}", index + 1);
                    self.envoys
                        .push(front.envoy(programs.envoy()?, &name, namespace.fd(), &self.directory)?);
                    continue;
                }
                _ => continue,
            };
            let shared = Shared {
                rebalancer: &programs.rebalancer,
                shim,
                peers: Finding::Static,
                pki: &self.pki,
                nodes: &names,
                directory: &self.directory,
                own_disk: false,
                agent_flags: &[],
                relay_flags: &["--watch-handover=5s".to_owned()],
            };
            let apiserver = self.apiservers[index].take().context("it was started")?;
            let mut node = Node::start(&shared, index, namespace, apiserver)?;
            // All contenders' apiservers are killed and started in one place.
            self.apiservers[index] = node.apiserver.take();
            self.nodes.push(node);
        }
        Ok(())
    }

    /// What kubelets come to.
    fn balance(&mut self, programs: &Programs) -> anyhow::Result<()> {
        let doors: Vec<SocketAddr> = (0..APISERVERS).map(Self::door).collect();
        let namespace = self.network.hub.fd();
        let front = Front {
            pki: &self.pki,
            listen: self.server,
            apiservers: &doors,
            maximum_age: None,
        };
        match self.contender {
            Contender::Envoy => {
                self.envoys
                    .push(front.envoy(programs.envoy()?, "envoy", namespace, &self.directory)?)
            }
            Contender::Haproxy => self.balancer = Some(front.haproxy(namespace, &self.directory)?),
            contender => {
                let options = if contender == Contender::Age {
                    // Envoy holds its clients while the apiserver behind it is gone, and answers 503.
                    "inter 1s fall 2 rise 2 on-marked-down shutdown-sessions"
                } else {
                    "inter 1s fall 2 rise 2"
                };
                self.balancer = Some(Haproxy::start(
                    self.server,
                    "node",
                    &doors,
                    Policy::Roundrobin,
                    options,
                    namespace,
                    &self.directory,
                )?);
            }
        }
        Ok(())
    }

    /// Waits until each apiserver is ready, and kubelets would reach all of them.
    fn wait(&mut self) -> anyhow::Result<()> {
        for index in 0..APISERVERS {
            wait_for(START, || match self.revive() {
                Ok(()) => self.is_ready(index).then_some(Ok(())),
                Err(error) => Some(Err(error)),
            })
            .with_context(|| format!("apiserver {} is not ready", index + 1))??;
        }
        if let Some(balancer) = &self.balancer {
            wait_for(START, || balancer.healthy().iter().all(|up| *up).then_some(()))
                .context("the load balancer does not send to all")?;
        }
        Ok(())
    }

    /// Starts each apiserver again that has ended by itself, as the kubelet does: on a slow machine one may give up at its
    /// start.
    fn revive(&mut self) -> anyhow::Result<()> {
        for index in 0..APISERVERS {
            let apiserver = self.apiservers[index].as_mut();
            if apiserver.is_some_and(|apiserver| apiserver.is_running().is_err()) {
                self.audit.ended(index);
                self.apiservers[index] = Some(self.apiserver(index)?);
            }
        }
        Ok(())
    }

    /// Whether that apiserver says so itself.
    pub fn is_ready(&self, index: usize) -> bool {
        let ready = || -> anyhow::Result<bool> {
            let admin = Admin::new(&self.pki, &self.network.nodes[index], self.listen(index))?;
            Ok(admin.ask_text("GET", "/readyz", None)?.0 == 200)
        };
        ready().unwrap_or(false)
    }

    /// Whether none of the agents, where there are any, would do anything.
    pub fn is_at_rest(&self) -> bool {
        self.nodes.iter().all(|node| {
            node.status().is_ok_and(|status| {
                let reason = &status["hold"]["reason"];
                reason == "below_threshold" || reason == "noise"
            })
        })
    }

    /// Whether everything runs that should.
    pub fn check(&mut self) -> anyhow::Result<()> {
        if self.is_starting && !self.is_ready(0) {
            self.revive()?;
        } else {
            self.is_starting = false;
        }
        self.nodes.iter_mut().try_for_each(Node::check)?;
        let apiservers = self.apiservers.iter_mut().flatten();
        apiservers.chain(&mut self.envoys).try_for_each(Process::is_running)
    }

    /// Kills the first apiserver.
    pub fn kill(&mut self) {
        if let Some(mut apiserver) = self.apiservers[0].take() {
            apiserver.kill();
        }
        self.audit.ended(0);
    }

    /// Starts it again.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        let apiserver = self.apiserver(0)?;
        self.apiservers[0] = Some(apiserver);
        self.is_starting = true;
        Ok(())
    }

    /// What all that runs has used so far.
    pub fn spent(&self) -> anyhow::Result<Spent> {
        let balancer = self.balancer.iter().map(Haproxy::id);
        let relays = self.nodes.iter().filter_map(Node::relay_id);
        let envoys = self.envoys.iter().map(Process::id);
        Ok(Spent {
            apiservers: Used::of(self.apiservers.iter().flatten().map(Process::id))?,
            front: Used::of(balancer.chain(relays).chain(envoys))?,
            agents: Used::of(self.nodes.iter().map(Node::agent_id))?,
        })
    }

    /// Ends everything, agents first.
    pub fn end(&mut self) {
        self.nodes.iter_mut().for_each(Node::end);
        self.apiservers.clear();
    }
}
