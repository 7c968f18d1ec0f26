//! One of the two clusters, with its clients.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use super::{clock, limits};
use crate::{
    balancer::{Front, Policy},
    binary,
    demo::{
        cluster::{Cluster, Options},
        report::Report,
        scene::{Event, Scene, check_interrupt, lower_bound},
    },
    fixture::Fixture,
    node::{Finding, Shim},
    process::wait_for,
    swarm::Driver,
};

/// What one is made of.
pub struct Make<'a> {
    /// The binaries; without them the small servers that go with the shim.
    pub fixture: Option<&'a Fixture>,
    /// How many clients.
    pub clients: usize,
    /// What sends the GOAWAY; with none, agents only look.
    pub shim: Shim,
    /// Options of haproxy's servers.
    pub lb_options: &'a str,
    /// More flags for the clients.
    pub client_flags: Vec<String>,
    /// Logs and sockets.
    pub directory: PathBuf,
}

/// A cluster and its clients.
pub struct Side {
    pub cluster: Cluster,
    pub swarm: Driver,
    clients: u64,
    told: Vec<Told>,
}

/// GOAWAYs of one node's relays by an agent's order.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    /// By the one that runs, when it was last asked.
    last: u64,
    /// By those before it.
    before: u64,
}

/// An agent looks each five seconds; at rest is who says so in so many looks, one a second.
const LOOKS: usize = 8;

/// haproxy is told to share out by this.
const POLICY: Policy = Policy::Roundrobin;

impl Side {
    /// Nodes of each cluster.
    pub const NODES: usize = 3;

    /// Starts it; every client has its watch, and the load is level.
    ///
    /// # Errors
    ///
    /// Something does not start.
    pub fn start(make: Make<'_>, say: &dyn Fn(&str)) -> anyhow::Result<Self> {
        for index in 0..Self::NODES {
            limits::small_disk(&make.directory.join(format!("node-{}/disk", index + 1)))?;
        }
        let options = Options {
            nodes: Self::NODES,
            clients: make.clients,
            policy: POLICY,
            front: if make.fixture.is_some() {
                Front::Haproxy(make.lb_options.to_owned())
            } else {
                Front::default()
            },
            fixture: make.fixture.cloned(),
            shim: make.shim,
            peers: if make.fixture.is_some() {
                Finding::Kubernetes
            } else {
                Finding::Static
            },
            // The clock of a process is another one by a library that a machine without the real thing does not carry.
            rebalancer: if make.fixture.is_some() {
                clock::started_with(binary(), &make.directory)?
            } else {
                binary()
            },
            // Years of faults come within half an hour: by the usual cool-down nobody would be left who may be told.
            agent_flags: vec!["--client-cooldown=30s".to_owned()],
            client_flags: make.client_flags,
            relay_flags: vec!["--watch-handover=5s".to_owned()],
            directory: make.directory,
            own_disk: true,
        };
        let mut cluster = Cluster::start(options, say)?;
        let mut report = Report {
            clients: make.clients,
            ..Report::default()
        };
        let mut tell = |event: Event<'_>| {
            if let Event::Step(step) = event {
                say(step);
            }
        };
        let swarm = Scene::new(&mut cluster, POLICY, Duration::ZERO, &mut tell).begin(&mut report)?;
        let mut side = Self {
            cluster,
            swarm,
            clients: make.clients as u64,
            told: vec![Told::default(); Self::NODES],
        };
        if make.shim != Shim::None {
            ensure!(side.levels(super::PATIENCE)?, "the load is not level at the start");
        }
        Ok(side)
    }

    /// Starts what a supervisor would start again, and waits until every client has its watch.
    ///
    /// # Errors
    ///
    /// Somebody does not come back.
    pub fn revive(&mut self) -> anyhow::Result<()> {
        self.until("the load balancer does not send to all apiservers", |side| {
            for index in 0..Self::NODES {
                let ended = side.cluster.nodes[index]
                    .apiserver
                    .as_mut()
                    .is_none_or(|apiserver| apiserver.is_running().is_err());
                // As the kubelet does with one that gave up without etcd, or on a slow machine.
                if ended {
                    side.cluster.restart_apiserver(index)?;
                }
            }
            side.cluster.check()?;
            Ok(side.cluster.admitted().iter().all(|admitted| *admitted))
        })?;
        self.until("an agent does not answer", |side| {
            side.cluster.check()?;
            Ok(side.cluster.nodes.iter().all(|node| node.status().is_ok()))
        })?;
        let all = self.clients;
        self.until("not all clients have their watch again", move |side| {
            Ok(side.swarm.line()?.ready >= all)
        })
    }

    /// Has all clients come anew, so that the load is level where nobody levels it: the same fault is to hit as many.
    ///
    /// # Errors
    ///
    /// They do not come.
    pub fn start_anew(&mut self) -> anyhow::Result<()> {
        self.swarm = self.cluster.start_clients()?;
        let all = self.clients;
        self.until("not all clients have their watch", move |side| {
            Ok(side.swarm.line()?.ready >= all)
        })
    }

    fn until(&mut self, otherwise: &str, look: impl Fn(&mut Self) -> anyhow::Result<bool>) -> anyhow::Result<()> {
        let done = wait_for(super::PATIENCE, || match check_interrupt().and_then(|()| look(self)) {
            Ok(true) => Some(Ok(())),
            Ok(false) => None,
            Err(error) => Some(Err(error)),
        });
        done.with_context(|| otherwise.to_owned())?
    }

    /// GOAWAYs of its relays by an agent's order, which an agent's own count would lose with the agent. What a relay told
    /// between the last look at it and its end is not seen.
    pub fn goaways(&mut self) -> u64 {
        for (told, node) in self.told.iter_mut().zip(&self.cluster.nodes) {
            // One that does not answer just now has not told fewer.
            let now = node.told().unwrap_or(told.last);
            if now < told.last {
                told.before += told.last;
            }
            told.last = now;
        }
        self.told.iter().map(|told| told.before + told.last).sum()
    }

    /// The loads, and the least that levels them.
    ///
    /// # Errors
    ///
    /// A relay does not answer.
    pub fn least(&self) -> anyhow::Result<(Vec<u64>, u64)> {
        let loads = self.cluster.loads()?;
        let target = self.cluster.nodes[0].status()?["skew_target"]
            .as_f64()
            .context("skew_target")?;
        let least = lower_bound(&loads, target, POLICY);
        Ok((loads, least))
    }

    /// Whether in that time the load is level, and no agent would do more.
    ///
    /// # Errors
    ///
    /// A process ended.
    pub fn levels(&mut self, patience: Duration) -> anyhow::Result<bool> {
        let since = Instant::now();
        let mut rested = 0;
        while since.elapsed() < patience {
            check_interrupt()?;
            self.cluster.check()?;
            self.goaways();
            // What chance makes with so few clients is no skew to mend, and the agents' word for it is theirs: it is taken
            // from all of them, and more than once.
            let at_rest = self.cluster.nodes.iter().all(|node| {
                node.status().is_ok_and(|status| {
                    ["below_threshold", "noise"]
                        .iter()
                        .any(|hold| status["hold"]["reason"] == *hold)
                })
            });
            rested = if at_rest { rested + 1 } else { 0 };
            if rested == LOOKS {
                return Ok(true);
            }
            std::thread::park_timeout(Duration::from_secs(1));
        }
        Ok(false)
    }

    /// Copies what is on the small disks, which go with this process, beside the logs.
    pub fn keep(&self) {
        for node in &self.cluster.nodes {
            for name in ["decisions.jsonl", "agent.state"] {
                // There may be none.
                let _ = fs::copy(node.directory().join("disk").join(name), node.directory().join(name));
            }
        }
    }
}
