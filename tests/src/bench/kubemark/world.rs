//! One run's processes: etcd, and for each variant its apiservers, what stands before them, and a load balancer.
//!
//! Must never start two variants differently in anything but what they are compared by.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    num::NonZero,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::Context as _;

use super::{Effort, Programs, Variant};
use crate::{
    apiserver::{Settings, start_apiserver, start_etcd},
    balancer::{Haproxy, Policy},
    bench::{
        fronts::Front,
        machine::{cpu_ns, rss_kib},
    },
    demo::scene::check_interrupt,
    fixture::Fixture,
    kube::Admin,
    netns::Network,
    node::{APISERVER, Finding, Node, PORT, Shared, Shim},
    pki::Pki,
    process::{Process, wait_for},
};

/// How long a slow machine may take for one variant's apiservers.
const START: Duration = Duration::from_secs(300);

/// The first of the load balancers' ports.
const FRONT: u16 = 7_001;

/// A variant that runs.
pub struct Running {
    pub variant: Variant,
    /// Where its kubelets go.
    pub server: SocketAddr,
    apiservers: Vec<Process>,
    /// What stands before an apiserver and is not ours.
    fronts: Vec<Process>,
    /// Nodes of ours: apiserver, relay and agent.
    pub nodes: Vec<Node>,
    pub balancer: Haproxy,
    /// Processor time of apiservers that have ended.
    ended_ns: u64,
    settings: Vec<Place>,
}

/// Where an apiserver is.
#[derive(Clone, Copy)]
struct Place {
    node: usize,
    listen: SocketAddr,
}

/// What a variant's parts have used so far: processor time in nanoseconds, and memory in KiB.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Used {
    pub apiservers_ns: u64,
    pub front_ns: u64,
    pub agents_ns: u64,
    pub apiservers_kib: u64,
    pub front_kib: u64,
    pub agents_kib: u64,
}

/// All of a run.
pub struct World {
    pub network: Network,
    pub pki: Pki,
    pub running: Vec<Running>,
    /// Apiservers of all variants.
    count: usize,
    /// The nodes of those that have been ready.
    ready: BTreeSet<usize>,
    fixture: Fixture,
    directory: PathBuf,
    _etcd: Process,
}

impl World {
    /// Starts everything but the kubelets; `turn` says who gets which addresses and ports.
    pub fn start(
        programs: &Programs,
        fixture: &Fixture,
        effort: &Effort,
        turn: usize,
        directory: &Path,
        say: impl Fn(&str),
    ) -> anyhow::Result<Self> {
        fs::create_dir_all(directory)?;
        let (variants, count) = (effort.variants(), effort.apiservers());
        let network = Network::new(count)?;
        let mut addresses: Vec<IpAddr> = (0..count).map(Network::node_address).collect();
        addresses.extend([Network::HUB, APISERVER.ip()]);
        let pki = Pki::new(&addresses)?;
        let at = |port| SocketAddr::new(Network::HUB, port);
        let etcd = start_etcd(fixture, at(2379), at(2380), directory, Some(&network.hub))?;
        let mut world = Self {
            network,
            pki,
            running: Vec::new(),
            count,
            ready: BTreeSet::new(),
            fixture: fixture.clone(),
            directory: directory.to_owned(),
            _etcd: etcd,
        };
        // Many that start at once on one processor are too slow for each other, and give up.
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        // A handshake takes an emulated processor a twentieth of a second: one a second of each is too much for it.
        let check = match effort.shim {
            Shim::Steer => "inter 5s fall 2 rise 2",
            Shim::Relay | Shim::None => "inter 1s fall 2 rise 2",
        };
        let mut next = 0;
        for index in 0..variants.len() {
            // Who comes first changes, and who comes before whom.
            let place = (index + 2 * turn) % variants.len();
            let variant = variants[if turn.is_multiple_of(2) {
                place
            } else {
                variants.len() - 1 - place
            }];
            let nodes: Vec<usize> = (next..next + variant.apiservers()).collect();
            next += nodes.len();
            let running = world.variant(programs, variant, &nodes, FRONT + index as u16, check)?;
            world.running.push(running);
            world.wait_for_apiservers(processors)?;
            say(&format!("{} of {} are ready", world.ready.len(), world.count));
        }
        world.wait_for_apiservers(1)?;
        world.wait_for_balancers()?;
        Ok(world)
    }

    fn variant(
        &self,
        programs: &Programs,
        variant: Variant,
        nodes: &[usize],
        port: u16,
        check: &str,
    ) -> anyhow::Result<Running> {
        let directory = self.directory.join(variant.key());
        fs::create_dir_all(&directory)?;
        let backends: Vec<SocketAddr> = nodes
            .iter()
            .map(|node| SocketAddr::new(Network::node_address(*node), PORT))
            .collect();
        let server = SocketAddr::new(Network::HUB, port);
        let balancer = Haproxy::start(
            server,
            "node",
            &backends,
            Policy::Roundrobin,
            check,
            self.network.hub.fd(),
            &directory,
        )?;
        let mut running = Running {
            variant,
            server,
            apiservers: Vec::new(),
            fronts: Vec::new(),
            nodes: Vec::new(),
            balancer,
            ended_ns: 0,
            settings: Vec::new(),
        };
        let names: Vec<(String, IpAddr)> = nodes
            .iter()
            .enumerate()
            .map(|(index, node)| (format!("node-{}", index + 1), Network::node_address(*node)))
            .collect();
        for (index, node) in nodes.iter().enumerate() {
            let listen = if variant.has_front() {
                APISERVER
            } else {
                backends[index]
            };
            let place = Place { node: *node, listen };
            running.settings.push(place);
            let apiserver = self.apiserver(variant, place)?;
            let namespace = &self.network.nodes[*node];
            match variant {
                Variant::Rebalancer | Variant::Steer => {
                    let shared = Shared {
                        rebalancer: &programs.rebalancer,
                        shim: if variant.has_front() { Shim::Relay } else { Shim::Steer },
                        peers: Finding::Static,
                        pki: &self.pki,
                        nodes: &names,
                        directory: &directory,
                        own_disk: false,
                        agent_flags: &[],
                        relay_flags: &["--watch-handover=5s".to_owned()],
                    };
                    running.nodes.push(Node::start(&shared, index, namespace, apiserver)?);
                    continue;
                }
                Variant::Hop => {
                    let mut command = Command::new(std::env::current_exe()?);
                    command
                        .args(["floor", "--as-clients", "--certificates"])
                        .arg(self.pki.path())
                        .arg(format!("--listen={}", backends[index]))
                        .arg(format!("--upstream={APISERVER}"));
                    let hop = Process::start("hop", command, Some(namespace.fd()), &directory)?;
                    running.fronts.push(hop);
                }
                Variant::Envoy => {
                    let front = Front {
                        pki: &self.pki,
                        listen: backends[index],
                        apiservers: &[APISERVER],
                        maximum_age: None,
                    };
                    let envoy = front.envoy(programs.envoy()?, "envoy", namespace.fd(), &directory)?;
                    running.fronts.push(envoy);
                }
                Variant::None | Variant::NoneAgain | Variant::Low | Variant::High | Variant::Restart => {}
            }
            running.apiservers.push(apiserver);
        }
        Ok(running)
    }

    fn apiserver(&self, variant: Variant, place: Place) -> anyhow::Result<Process> {
        let settings = Settings {
            fixture: &self.fixture,
            pki: &self.pki,
            etcd: SocketAddr::new(Network::HUB, 2379),
            listen: place.listen,
            advertise: Network::node_address(place.node),
            count: self.count,
            directory: &self.directory,
            name: &format!("apiserver-{}", place.node + 1),
            goaway_chance: variant.goaway_chance(),
            host: Some(&format!("node-{}", place.node + 1)),
            extra: &[],
        };
        start_apiserver(&settings, Some(self.network.nodes[place.node].fd()))
    }

    /// Waits until fewer than `most` of the apiservers that were started are not ready.
    fn wait_for_apiservers(&mut self, most: usize) -> anyhow::Result<()> {
        let mut waited_for = Vec::new();
        for running in &self.running {
            for place in running
                .settings
                .iter()
                .filter(|place| !self.ready.contains(&place.node))
            {
                let admin = Admin::new(&self.pki, &self.network.nodes[place.node], place.listen)?;
                waited_for.push((place.node, running.variant.name(), admin));
            }
        }
        let enough = wait_for(START * self.running.len() as u32, || {
            if let Err(error) = check_interrupt().and_then(|()| self.revive()) {
                return Some(Err(error));
            }
            waited_for.retain(|(node, _, admin)| {
                let is_ready = matches!(admin.ask_text("GET", "/readyz", None), Ok((200, _)));
                !(is_ready && self.ready.insert(*node))
            });
            (waited_for.len() < most).then_some(Ok(()))
        });
        enough.with_context(|| {
            let names = waited_for.iter().map(|(_, name, _)| *name);
            format!("not ready: an apiserver of {}", names.collect::<Vec<_>>().join(", "))
        })?
    }

    fn wait_for_balancers(&self) -> anyhow::Result<()> {
        wait_for(START, || self.is_healthy().then_some(()))
            .context("a load balancer does not send to all its apiservers")
    }

    /// Starts each apiserver again that has ended by itself before it was ready, as the kubelet does: on a slow machine one
    /// may give up at its start.
    pub fn revive(&mut self) -> anyhow::Result<()> {
        for index in 0..self.running.len() {
            let variant = self.running[index].variant;
            for (at, place) in self.running[index].settings.clone().into_iter().enumerate() {
                if self.ready.contains(&place.node) {
                    continue;
                }
                let has_ended = self.running[index]
                    .apiserver(at)
                    .is_some_and(|apiserver| apiserver.is_running().is_err());
                if has_ended {
                    let again = self.apiserver(variant, place)?;
                    if let Some(apiserver) = self.running[index].apiserver(at) {
                        *apiserver = again;
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether each load balancer sends to all of its apiservers.
    pub fn is_healthy(&self) -> bool {
        let all_up = |running: &Running| running.balancer.healthy().iter().all(|up| *up);
        self.running.iter().all(all_up)
    }

    /// Kills the first apiserver of whoever has a restart, all at once.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        let has_restart = |running: &&mut Running| running.variant.has_restart();
        for running in self.running.iter_mut().filter(has_restart) {
            let apiserver = running.apiserver(0).context("it has an apiserver")?;
            let used = cpu_ns(apiserver.id())?;
            apiserver.signal(libc::SIGKILL);
            running.ended_ns += used;
        }
        for running in self.running.iter_mut().filter(has_restart) {
            running.apiserver(0).context("it has an apiserver")?.kill();
        }
        Ok(())
    }

    /// Whether no apiserver has ended.
    ///
    /// # Errors
    ///
    /// Its name and how it ended: what was measured of it says nothing.
    pub fn is_whole(&mut self) -> anyhow::Result<()> {
        for running in &mut self.running {
            for at in 0..running.settings.len() {
                let apiserver = running.apiserver(at).context("it has an apiserver")?;
                apiserver.is_running()?;
            }
        }
        Ok(())
    }

    /// Starts them again.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        for index in 0..self.running.len() {
            let (variant, place) = (self.running[index].variant, self.running[index].settings[0]);
            if variant.has_restart() {
                let again = self.apiserver(variant, place)?;
                *self.running[index].apiserver(0).context("it has an apiserver")? = again;
                self.ready.remove(&place.node);
            }
        }
        Ok(())
    }

    /// The variant that is ours.
    pub fn ours(&mut self) -> anyhow::Result<&mut Running> {
        let mut all = self.running.iter_mut();
        all.find(|running| running.variant.is_ours()).context("rebalancer runs")
    }

    /// Ends everything, agents first.
    pub fn end(&mut self) {
        for running in &mut self.running {
            running.nodes.iter_mut().for_each(Node::end);
        }
    }
}

impl Running {
    /// Its apiserver at that place, which may have been killed.
    fn apiserver(&mut self, at: usize) -> Option<&mut Process> {
        if self.nodes.is_empty() {
            self.apiservers.get_mut(at)
        } else {
            self.nodes.get_mut(at)?.apiserver.as_mut()
        }
    }

    /// What its parts have used so far.
    pub fn used(&self) -> anyhow::Result<Used> {
        let mut used = Used {
            apiservers_ns: self.ended_ns,
            ..Used::default()
        };
        let of_nodes = self.nodes.iter().filter_map(|node| node.apiserver.as_ref());
        for apiserver in self.apiservers.iter().chain(of_nodes) {
            used.apiservers_ns += cpu_ns(apiserver.id())?;
            used.apiservers_kib += rss_kib(apiserver.id()).unwrap_or_default();
        }
        let relays = self.nodes.iter().filter_map(Node::relay_id);
        for front in self.fronts.iter().map(Process::id).chain(relays) {
            used.front_ns += cpu_ns(front)?;
            used.front_kib += rss_kib(front).unwrap_or_default();
        }
        for node in &self.nodes {
            used.agents_ns += cpu_ns(node.agent_id())?;
            used.agents_kib += rss_kib(node.agent_id()).unwrap_or_default();
        }
        Ok(used)
    }

    /// GOAWAYs its agents have had told so far.
    ///
    /// # Errors
    ///
    /// One does not say how many.
    pub fn goaways(&self) -> anyhow::Result<u64> {
        self.nodes.iter().map(|node| Ok(node.told()?.by_order)).sum()
    }

    /// What is between it and rest, for people.
    pub fn says(&self) -> String {
        let agents = self.nodes.iter().map(|node| match node.status() {
            Ok(status) => format!(
                "{}: {}",
                node.name,
                status["hold"]["message"].as_str().unwrap_or("tells clients to go")
            ),
            Err(error) => format!("{}: {error:#}", node.name),
        });
        format!(
            "connections {:?}, up {:?}; {}",
            self.balancer.sockets(),
            self.balancer.healthy(),
            agents.collect::<Vec<_>>().join("; ")
        )
    }

    /// Whether none of its agents would do anything.
    pub fn is_at_rest(&self) -> bool {
        self.nodes.iter().all(|node| {
            node.status().is_ok_and(|status| {
                let reason = &status["hold"]["reason"];
                reason == "below_threshold" || reason == "noise"
            })
        })
    }
}
