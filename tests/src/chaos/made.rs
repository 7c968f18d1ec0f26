//! How each fault is made on a running cluster, by what it is seen, and how it is taken away.
//!
//! Input: a cluster and the node that is hit. Must never touch a process, a route or a file that is not the cluster's own.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::{
    clock, evidence,
    fault::{FLAPS, Fault},
    limits::{self, Files},
};
use crate::{
    demo::cluster::Cluster,
    netns::{Namespace, Network},
    node::{Node, PORT},
    process::Process,
};

/// How long a process that is asked to end may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a relay may have more than it uses, in octets.
const MEMORY: u64 = 64 << 20;

/// Connections of the flood, none of which says a word.
const STRANGERS: usize = 600;

/// How far a clock jumps: further than any Lease, token or cool-down lasts.
const A_DAY_S: i64 = 86_400;

/// What a relay says when it may have no more of something.
const NO_FILES: [&str; 2] = ["may open no more files", "Too many open files"];

/// What an agent says when its disk is full.
const NO_SPACE: [&str; 2] = ["the state file cannot be written", "cannot append to the decision log"];

/// What a relay says when files have changed.
const CERTIFICATES: [&str; 2] = ["certificates have changed", "client authorities have changed"];

/// The ports that are left to a node, and those that it has.
const FEW_PORTS: &str = "40000 40015";
const PORTS: &str = "32768 60999";

impl Fault {
    /// Makes it, on the node of that index; what is given back takes it away.
    ///
    /// # Errors
    ///
    /// It cannot be made here.
    pub fn make(self, cluster: &mut Cluster, index: usize) -> anyhow::Result<Made> {
        let node = &cluster.nodes[index];
        let mut made = Made {
            fault: self,
            index,
            files: None,
            strangers: Vec::new(),
            group: None,
            kills: 0,
            is_out: false,
            count: 0,
            agent: node.agent_id(),
            relay: node.relay_id(),
            balancer: cluster.balancer_id().ok(),
            said: cluster.nodes.iter().map(|node| self.words(node)).collect(),
        };
        let others: Vec<usize> = (0..cluster.nodes.len()).filter(|other| *other != index).collect();
        match self {
            Self::AgentKilled => cluster.nodes[index].kill_agent(),
            Self::AgentStopped => cluster.nodes[index].signal_agent(libc::SIGSTOP),
            Self::AgentReplaced => cluster.nodes[index].end_agent(PATIENCE),
            Self::RelayKilled => cluster.nodes[index].kill_relay(),
            Self::RelayStopped => cluster.nodes[index].signal_relay(libc::SIGSTOP),
            Self::RelayReplaced => cluster.nodes[index].start_relay()?,
            Self::ApiserverKilled => cluster.kill_apiserver(index),
            Self::ApiserverStopped => signal_apiserver(cluster, index, libc::SIGSTOP),
            Self::ApiserverFlaps => {
                cluster.kill_apiserver(index);
                cluster.restart_apiserver(index)?;
                made.kills = 1;
            }
            Self::EtcdKilled => cluster.etcd.iter_mut().for_each(Process::kill),
            Self::EtcdStopped => cluster.etcd.iter().for_each(|member| member.signal(libc::SIGSTOP)),
            Self::EtcdMemberKilled => cluster.etcd[index].kill(),
            Self::EtcdMemberStopped => cluster.etcd[index].signal(libc::SIGSTOP),
            // It is there again at once: nothing else serves clients.
            Self::BalancerKilled => cluster.restart_balancer()?,
            Self::BalancerStopped => cluster.signal_balancer(libc::SIGSTOP)?,
            Self::BalancerLate => {
                cluster.admit(index, false)?;
                cluster.kill_apiserver(index);
                cluster.restart_apiserver(index)?;
            }
            Self::AgentsApart => {
                for other in others {
                    deaf(cluster.namespace(index), &from(other))?;
                    deaf(cluster.namespace(other), &from(index))?;
                }
            }
            Self::AgentsApartOneWay => {
                for other in others {
                    deaf(cluster.namespace(index), &from(other))?;
                }
            }
            Self::NodeApart => {
                deaf(cluster.namespace(index), "! -i lo")?;
                mute(cluster.namespace(index))?;
            }
            Self::NodeApartOneWay => deaf(cluster.namespace(index), &format!("-s {}", Network::HUB))?,
            Self::NodeMute => mute(cluster.namespace(index))?,
            Self::PacketsLost => deaf(
                cluster.namespace(index),
                "! -i lo -m statistic --mode random --probability 0.05",
            )?,
            Self::PacketsLate => queue(cluster.namespace(index), "add", LATE)?,
            Self::DiskFull => fill(&disk(cluster, index))?,
            Self::NoDescriptors => {
                // What stands at the front door.
                let apiserver = cluster.nodes[index].apiserver.as_ref().map(Process::id);
                made.files = Some(Files::no_more(made.relay.or(apiserver).context("an apiserver")?)?);
            }
            Self::NoPorts => ports(cluster.namespace(index), FEW_PORTS)?,
            Self::MemoryLimit => {
                made.group = Some(limits::Group::new(made.relay.context("a relay")?, MEMORY)?);
                made.strangers = strangers(cluster, index)?;
            }
            Self::CertificatesRenewed => cluster.pki().renew()?,
            Self::AuthorityAdded => cluster.pki().add_authority()?,
            Self::LeasesLost => made.count = lose_leases(cluster, index)?,
            Self::ClockStepped => clock::step(cluster, index, A_DAY_S)?,
            Self::Strangers => made.strangers = strangers(cluster, index)?,
        }
        Ok(made)
    }

    /// How often a node's processes have said what they say of it.
    fn words(self, node: &Node) -> usize {
        match self {
            Self::NoDescriptors => evidence::said(&node.relay_log(), &NO_FILES),
            Self::DiskFull => evidence::said(&node.agent_log(), &NO_SPACE),
            Self::CertificatesRenewed | Self::AuthorityAdded => evidence::said(&node.relay_log(), &CERTIFICATES),
            _ => 0,
        }
    }
}

/// A fault that is there.
pub struct Made {
    fault: Fault,
    index: usize,
    files: Option<Files>,
    strangers: Vec<TcpStream>,
    group: Option<limits::Group>,
    /// How often the apiserver that flaps was killed, and whether the load balancer has noticed the last time.
    kills: usize,
    is_out: bool,
    /// What was taken away.
    count: usize,
    /// The processes that were there.
    agent: u32,
    relay: Option<u32>,
    balancer: Option<u32>,
    /// How often each node had said what it says of this.
    said: Vec<usize>,
}

impl Made {
    /// Goes on with one that takes several steps; whether it has done them all.
    ///
    /// # Errors
    ///
    /// An apiserver cannot be started.
    pub fn goes_on(&mut self, cluster: &mut Cluster) -> anyhow::Result<bool> {
        if self.fault != Fault::ApiserverFlaps {
            return Ok(true);
        }
        let index = self.index;
        let is_admitted = cluster.admitted()[index];
        if !self.is_out {
            self.is_out = !is_admitted;
        } else if is_admitted {
            ensure!(
                self.kills < FLAPS,
                "the load balancer sends clients to one that was killed"
            );
            cluster.kill_apiserver(index);
            (self.kills, self.is_out) = (self.kills + 1, false);
            if self.kills < FLAPS {
                cluster.restart_apiserver(index)?;
            }
        }
        // The load balancer has noticed the last time as well.
        Ok(self.kills == FLAPS && self.is_out)
    }

    /// By what it is seen that it is there.
    ///
    /// # Errors
    ///
    /// It is not.
    pub fn seen(&self, cluster: &mut Cluster) -> anyhow::Result<String> {
        let index = self.index;
        let is_out = |cluster: &Cluster| {
            evidence::eventually("the load balancer still sends clients there", || {
                Ok((!cluster.admitted()[index]).then(|| "out of the load balancer".to_owned()))
            })
        };
        match self.fault {
            Fault::AgentKilled | Fault::AgentReplaced => evidence::has_ended(self.agent),
            Fault::AgentStopped => evidence::stands_still(self.agent),
            Fault::RelayKilled => {
                evidence::has_ended(self.relay.context("a relay")?)?;
                is_out(cluster)
            }
            Fault::RelayStopped => {
                evidence::stands_still(self.relay.context("a relay")?)?;
                is_out(cluster)
            }
            Fault::RelayReplaced => evidence::eventually("its successor does not serve", || {
                let node = &cluster.nodes[index];
                let served = node.work()?.len();
                Ok((node.relay_id() != self.relay && served > 0).then(|| format!("its successor serves {served}")))
            }),
            Fault::ApiserverKilled | Fault::ApiserverStopped => is_out(cluster),
            Fault::ApiserverFlaps => {
                ensure!(
                    self.kills == FLAPS && self.is_out,
                    "it was killed {} times, out of the load balancer: {}",
                    self.kills,
                    self.is_out
                );
                Ok(format!("killed {} times, admitted in between", self.kills))
            }
            Fault::EtcdKilled | Fault::EtcdMemberKilled => self.of_each_member(cluster, evidence::has_ended),
            Fault::EtcdStopped | Fault::EtcdMemberStopped => self.of_each_member(cluster, evidence::stands_still),
            Fault::BalancerKilled => {
                let id = cluster.balancer_id()?;
                ensure!(Some(id) != self.balancer, "it is the same process");
                Ok("another process".to_owned())
            }
            Fault::BalancerStopped => evidence::stands_still(cluster.balancer_id()?),
            Fault::BalancerLate => {
                ensure!(cluster.is_ready(index), "the apiserver is not ready");
                let out = is_out(cluster)?;
                Ok(format!("ready, and {out}"))
            }
            Fault::AgentsApart => evidence::dropped(cluster, &(0..cluster.nodes.len()).collect::<Vec<_>>()),
            Fault::AgentsApartOneWay | Fault::PacketsLost => evidence::dropped(cluster, &[index]),
            Fault::NodeApart | Fault::NodeApartOneWay | Fault::NodeMute => {
                let dropped = evidence::dropped(cluster, &[index])?;
                Ok(format!("{dropped}, {}", is_out(cluster)?))
            }
            Fault::PacketsLate => evidence::waited(cluster.namespace(index)),
            Fault::DiskFull => {
                let said = self.has_said(cluster, &[index], Node::agent_log, &NO_SPACE)?;
                Ok(said.unwrap_or_else(|| "full; nothing was to be written".to_owned()))
            }
            Fault::NoDescriptors if self.relay.is_none() => Ok("no number is free".to_owned()),
            Fault::NoDescriptors => evidence::eventually("the relay opened no file", || {
                self.has_said(cluster, &[index], Node::relay_log, &NO_FILES)
            }),
            Fault::NoPorts => {
                let range = evidence::range_of_ports(cluster.namespace(index))?;
                ensure!(
                    range.split_whitespace().eq(FEW_PORTS.split(' ')),
                    "the range is {range}"
                );
                evidence::eventually("nobody connected from these ports", || {
                    evidence::ports_in(cluster.namespace(index), 40_000..=40_015).map(Some)
                })
            }
            Fault::MemoryLimit => {
                let used = self.group.as_ref().context("a limit")?.used()?;
                ensure!(used > 0, "nothing was counted");
                let (used, all) = (used as f64 / f64::from(1 << 20), MEMORY >> 20);
                Ok(format!(
                    "{used:.1} of {all} MiB used, {} strangers",
                    self.strangers.len()
                ))
            }
            Fault::CertificatesRenewed | Fault::AuthorityAdded if self.relay.is_some() => {
                let all: Vec<usize> = (0..cluster.nodes.len()).collect();
                evidence::eventually("not every relay has noticed", || {
                    self.has_said(cluster, &all, Node::relay_log, &CERTIFICATES)
                })
            }
            Fault::CertificatesRenewed | Fault::AuthorityAdded => Ok("new files".to_owned()),
            Fault::LeasesLost => Ok(format!("{} deleted", self.count)),
            Fault::ClockStepped => Ok("both processes have asked".to_owned()),
            Fault::Strangers => Ok(format!("{} connected", self.strangers.len())),
        }
    }

    /// The members of etcd that it hits.
    fn members(&self, cluster: &Cluster) -> Vec<usize> {
        match self.fault {
            Fault::EtcdMemberKilled | Fault::EtcdMemberStopped => vec![self.index],
            _ => (0..cluster.etcd.len()).collect(),
        }
    }

    /// What is seen of each of those members alike.
    fn of_each_member(
        &self,
        cluster: &Cluster,
        look: impl Fn(u32) -> anyhow::Result<String>,
    ) -> anyhow::Result<String> {
        let seen = self
            .members(cluster)
            .into_iter()
            .map(|member| look(cluster.etcd[member].id()));
        let seen = seen.collect::<anyhow::Result<Vec<_>>>()?;
        seen.into_iter().next().context("there is no etcd")
    }

    fn has_said(
        &self,
        cluster: &Cluster,
        nodes: &[usize],
        log: impl Fn(&Node) -> String,
        phrases: &[&str],
    ) -> anyhow::Result<Option<String>> {
        let before: Vec<usize> = nodes.iter().map(|node| self.said[*node]).collect();
        let nodes: Vec<&Node> = nodes.iter().map(|node| &cluster.nodes[*node]).collect();
        Ok(evidence::said_since(&nodes, &before, log, phrases))
    }

    /// Takes it away, as far as that is somebody's to do: a process that ended is started again, as its supervisor does.
    ///
    /// # Errors
    ///
    /// It stays.
    pub fn end(self, cluster: &mut Cluster) -> anyhow::Result<()> {
        let index = self.index;
        match self.fault {
            Fault::AgentKilled | Fault::AgentReplaced => cluster.nodes[index].start_agent(&[])?,
            Fault::AgentStopped => cluster.nodes[index].signal_agent(libc::SIGCONT),
            Fault::RelayKilled => cluster.nodes[index].start_relay()?,
            Fault::RelayStopped => cluster.nodes[index].signal_relay(libc::SIGCONT),
            Fault::ApiserverKilled | Fault::ApiserverFlaps => cluster.restart_apiserver(index)?,
            Fault::ApiserverStopped => signal_apiserver(cluster, index, libc::SIGCONT),
            Fault::EtcdKilled | Fault::EtcdMemberKilled => cluster.restart_etcd(&self.members(cluster))?,
            Fault::EtcdStopped | Fault::EtcdMemberStopped => {
                for member in self.members(cluster) {
                    cluster.etcd[member].signal(libc::SIGCONT);
                }
            }
            Fault::AgentsApart
            | Fault::AgentsApartOneWay
            | Fault::NodeApart
            | Fault::NodeApartOneWay
            | Fault::NodeMute
            | Fault::PacketsLost => {
                for node in 0..cluster.nodes.len() {
                    for chain in ["INPUT", "OUTPUT"] {
                        iptables(cluster.namespace(node), &format!("-F {chain}"))?;
                    }
                }
            }
            Fault::BalancerStopped => cluster.signal_balancer(libc::SIGCONT)?,
            Fault::BalancerLate => cluster.admit(index, true)?,
            Fault::PacketsLate => queue(cluster.namespace(index), "del", "")?,
            Fault::DiskFull => fs::remove_file(disk(cluster, index).join("filling")).context("the filling")?,
            Fault::NoPorts => ports(cluster.namespace(index), PORTS)?,
            Fault::ClockStepped => clock::step(cluster, index, 0)?,
            Fault::RelayReplaced
            | Fault::BalancerKilled
            | Fault::NoDescriptors
            | Fault::MemoryLimit
            | Fault::CertificatesRenewed
            | Fault::AuthorityAdded
            | Fault::LeasesLost
            | Fault::Strangers => {}
        }
        if let Some(files) = self.files {
            files.as_before()?;
        }
        drop((self.strangers, self.group));
        Ok(())
    }
}

/// Where a node's agent keeps its state file and its decision log: a disk of its own.
pub fn disk(cluster: &Cluster, index: usize) -> PathBuf {
    cluster.nodes[index].directory().join("disk")
}

fn from(index: usize) -> String {
    format!("-s {}", Network::node_address(index))
}

fn signal_apiserver(cluster: &Cluster, index: usize, signal: i32) {
    if let Some(apiserver) = &cluster.nodes[index].apiserver {
        apiserver.signal(signal);
    }
}

/// Packets that match never arrive there: nobody is told, as where a cable is cut.
fn deaf(namespace: &Namespace, to: &str) -> anyhow::Result<()> {
    iptables(namespace, &format!("-A INPUT {to} -j DROP"))
}

/// Nothing that it sends arrives.
fn mute(namespace: &Namespace) -> anyhow::Result<()> {
    iptables(namespace, "-A OUTPUT ! -o lo -j DROP")
}

/// A line so narrow that packets wait in its queue (tc-tbf(8)): not every kernel can be told to delay each of them.
const LATE: &str = "tbf rate 1mbit burst 8kb latency 1500ms";

/// Changes the queue of what the node sends.
fn queue(namespace: &Namespace, verb: &str, what: &str) -> anyhow::Result<()> {
    namespace.run("tc", format!("qdisc {verb} dev eth0 root {what}").trim_end())
}

fn iptables(namespace: &Namespace, arguments: &str) -> anyhow::Result<()> {
    namespace.run("iptables", &format!("-w {arguments}"))
}

/// Ports that the kernel chooses from (ip-sysctl.rst, `ip_local_port_range`), which each network namespace has its own of.
fn ports(namespace: &Namespace, range: &'static str) -> anyhow::Result<()> {
    inside(namespace, move || {
        fs::write("/proc/sys/net/ipv4/ip_local_port_range", range).context("the range of ports")
    })
}

fn fill(disk: &std::path::Path) -> anyhow::Result<()> {
    let filling = disk.join("filling");
    // More than the disk has.
    let octets = vec![0; 16 << 20];
    let full = fs::write(&filling, octets);
    ensure!(
        full.as_ref()
            .is_err_and(|error| error.raw_os_error() == Some(libc::ENOSPC)),
        "{} is not full: {full:?}",
        disk.display()
    );
    Ok(())
}

fn strangers(cluster: &Cluster, index: usize) -> anyhow::Result<Vec<TcpStream>> {
    let to = SocketAddr::new(Network::node_address(index), PORT);
    inside(cluster.hub(), move || {
        let mut open = Vec::new();
        for _ in 0..STRANGERS {
            // One that is refused is one less: the relay may do so.
            open.extend(TcpStream::connect_timeout(&to, Duration::from_secs(2)).ok());
        }
        ensure!(
            open.len() * 10 >= STRANGERS * 9,
            "{} of {STRANGERS} are let in",
            open.len()
        );
        Ok(open)
    })
}

/// How many were lost.
fn lose_leases(cluster: &Cluster, index: usize) -> anyhow::Result<usize> {
    let admin = cluster.admin(index)?;
    let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases";
    let (status, list) = admin.ask("GET", leases, None)?;
    ensure!(status == 200, "{leases}: {status}");
    let names = list["items"].as_array().context("Leases")?.iter();
    let mut lost = 0;
    for name in names.filter_map(|item| item["metadata"]["name"].as_str()) {
        if name.starts_with("rebalancer-") || name.starts_with("apiserver-") {
            let (status, answer): (u16, Value) = admin.ask("DELETE", &format!("{leases}/{name}"), None)?;
            ensure!(matches!(status, 200 | 404), "{name}: {status}: {answer}");
            lost += usize::from(status == 200);
        }
    }
    ensure!(lost >= cluster.nodes.len(), "{lost} Leases are not those of all agents");
    Ok(lost)
}

/// Runs something on a thread inside a namespace.
pub fn inside<T: Send>(namespace: &Namespace, job: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    thread::scope(|scope| {
        let ran = scope.spawn(|| {
            namespace.enter()?;
            job()
        });
        ran.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?
    })
}
