//! One of the two clusters, with its clients.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use super::{clock, limits, noticed::Noticed};
use crate::{
    balancer::{Front, Policy},
    binary,
    demo::{
        cluster::{Cluster, Options},
        report::Report,
        scene::{Event, Scene, check_interrupt, lower_bound},
    },
    fixture::Fixture,
    node::{Finding, Shim, Told},
    process::{is_emulated, wait_for},
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
    /// More flags for agents, relays and clients.
    pub agent_flags: Vec<String>,
    pub relay_flags: Vec<String>,
    pub client_flags: Vec<String>,
    /// Logs and sockets.
    pub directory: PathBuf,
}

/// A cluster and its clients.
pub struct Side {
    pub cluster: Cluster,
    swarm: Driver,
    /// Clients of Python's kind.
    python: Option<Driver>,
    clients: u64,
    told: Vec<ToldByNode>,
    /// What its clients of either kind had noticed when that was last asked for.
    counted: [Noticed; 2],
}

/// What a side's clients noticed in some time, and what the newest failures of it said.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    pub noticed: Noticed,
    pub texts: Vec<String>,
}

/// GOAWAYs of one node's relays.
#[derive(Clone, Copy, Debug, Default)]
struct ToldByNode {
    /// By the one that runs, when it was last asked.
    last: Told,
    /// By those before it.
    before: Told,
}

/// Clients of Python's kind beside the others.
pub const PYTHON: usize = 10;

/// What they are: it is told where and as whom.
const PYTHON_CLIENT: &str = include_str!("client.py");

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
            agent_flags: make.agent_flags,
            client_flags: make.client_flags,
            relay_flags: make.relay_flags,
            directory: make.directory,
            // An emulated machine has no time for more.
            etcd_members: if is_emulated() { 1 } else { Self::NODES },
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
            python: None,
            clients: make.clients as u64,
            told: vec![ToldByNode::default(); Self::NODES],
            counted: [Noticed::default(); 2],
        };
        if make.fixture.is_some() && !is_emulated() {
            side.start_python()?;
            side.until_all_watch()?;
        }
        if make.shim != Shim::None {
            ensure!(side.levels(super::PATIENCE)?, "the load is not level at the start");
        }
        // While it started there was nothing to notice yet.
        side.heard()?;
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
                let apiserver = side.cluster.nodes[index].apiserver.as_mut();
                let runs = apiserver.map_or_else(|| anyhow::bail!("it was killed"), |apiserver| apiserver.is_running());
                // As the kubelet does with one that gave up without etcd, or on a slow machine.
                if let Err(ended) = runs {
                    eprintln!("  apiserver {} is started again: {ended:#}", index + 1);
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
        self.until_all_watch()
    }

    /// Its client-go clients.
    pub fn clients(&self) -> u64 {
        self.clients
    }

    fn until_all_watch(&mut self) -> anyhow::Result<()> {
        self.until("not all clients have their watch", |side| {
            let is_ready = side.swarm.line()?.ready >= side.clients;
            let is_ready_too = match &mut side.python {
                Some(python) => python.line()?.ready >= PYTHON as u64,
                None => true,
            };
            Ok(is_ready && is_ready_too)
        })
    }

    fn start_python(&mut self) -> anyhow::Result<()> {
        let mut command = Command::new("python3");
        command.args(["-c", PYTHON_CLIENT]);
        let mut python = self
            .cluster
            .start_others("python", command, PYTHON)
            .context("clients of Python's kind need python3")?;
        python.report().context("clients of Python's kind: see python.log")?;
        self.python = Some(python);
        Ok(())
    }

    /// What its clients have noticed since that was asked for last, or since they are there.
    ///
    /// # Errors
    ///
    /// They do not answer.
    pub fn heard(&mut self) -> anyhow::Result<Heard> {
        let mut heard = Heard::default();
        let drivers = [&mut self.swarm].into_iter().chain(&mut self.python);
        for (driver, counted) in drivers.zip(&mut self.counted) {
            let line = driver.report()?;
            let all = Noticed::of(&line);
            let noticed = all.minus(std::mem::replace(counted, all));
            heard.noticed = heard.noticed.plus(noticed);
            // The newest are kept, and each failure has one.
            let texts = line.error_texts.unwrap_or_default();
            let old = texts
                .len()
                .saturating_sub((noticed.errors + noticed.watch_breaks) as usize);
            heard.texts.extend(texts.into_iter().skip(old));
        }
        Ok(heard)
    }

    /// What is not level, as the load balancer has its clients: none may have more than chance gives it.
    ///
    /// # Errors
    ///
    /// It does not answer.
    pub fn uneven(&mut self) -> anyhow::Result<Option<String>> {
        let ports = self.swarm.report()?.ports.unwrap_or_default();
        let Some(counts) = self.cluster.connected(&ports)? else {
            return Ok(None);
        };
        let found: u64 = counts.iter().sum();
        ensure!(
            found * 20 >= self.clients * 19,
            "the load balancer knows {found} of {} clients: {counts:?}",
            self.clients
        );
        let mean = found as f64 / counts.len() as f64;
        let most = counts.iter().copied().max().unwrap_or_default() as f64;
        Ok((most > mean + (0.15 * mean).max(1.5 * mean.sqrt()))
            .then(|| format!("not level by the load balancer: {counts:?}")))
    }

    /// Has all clients come anew, so that the load is level where nobody levels it: the same fault is to hit as many.
    ///
    /// # Errors
    ///
    /// They do not come.
    pub fn start_anew(&mut self) -> anyhow::Result<()> {
        self.swarm = self.cluster.start_clients()?;
        if self.python.take().is_some() {
            self.start_python()?;
        }
        self.until_all_watch()?;
        self.counted = [Noticed::default(); 2];
        // What they saw while they came is the fault before this one's.
        self.heard().map(drop)
    }

    fn until(&mut self, otherwise: &str, look: impl Fn(&mut Self) -> anyhow::Result<bool>) -> anyhow::Result<()> {
        let done = wait_for(super::PATIENCE, || match check_interrupt().and_then(|()| look(self)) {
            Ok(true) => Some(Ok(())),
            Ok(false) => None,
            Err(error) => Some(Err(error)),
        });
        done.with_context(|| otherwise.to_owned())?
    }

    /// GOAWAYs of its relays, which an agent's own count would lose with the agent. What a relay told between the last look at
    /// it and its end is not seen.
    pub fn goaways(&mut self) -> Told {
        for (told, node) in self.told.iter_mut().zip(&self.cluster.nodes) {
            // One that does not answer just now has not told fewer.
            let now = node.told().unwrap_or(told.last);
            if now.by_order < told.last.by_order || now.by_itself < told.last.by_itself {
                told.before = told.before.plus(told.last);
            }
            told.last = now;
        }
        self.told
            .iter()
            .fold(Told::default(), |sum, told| sum.plus(told.before).plus(told.last))
    }

    /// The least that levels those loads.
    ///
    /// # Errors
    ///
    /// No agent answers.
    pub fn least(&self, loads: &[u64]) -> anyhow::Result<u64> {
        let mut targets = self
            .cluster
            .nodes
            .iter()
            .filter_map(|node| node.status().ok()?["skew_target"].as_f64());
        Ok(lower_bound(loads, targets.next().context("skew_target")?, POLICY))
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
