//! The faults: how each is made on a running cluster, and how it is taken away.
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
    limits::{self, Files},
};
use crate::{
    demo::cluster::Cluster,
    netns::{Namespace, Network},
    node::{Node, PORT, Shim},
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

/// How often the apiserver that flaps is killed.
const FLAPS: usize = 3;

/// Nodes of a cluster.
const NODES: u64 = super::Side::NODES as u64;

/// What a relay says when it may have no more of something.
const NO_FILES: [&str; 2] = ["may open no more files", "Too many open files"];

/// What an agent says when its disk is full.
const NO_SPACE: [&str; 2] = ["the state file cannot be written", "cannot append to the decision log"];

/// What a relay says when files have changed.
const CERTIFICATES: [&str; 2] = ["certificates have changed", "client authorities have changed"];

/// The ports that are left to a node, and those that it has.
const FEW_PORTS: &str = "40000 40015";
const PORTS: &str = "32768 60999";

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    AgentKilled,
    AgentStopped,
    AgentReplaced,
    RelayKilled,
    RelayStopped,
    RelayReplaced,
    ApiserverKilled,
    ApiserverStopped,
    ApiserverFlaps,
    EtcdKilled,
    EtcdStopped,
    EtcdMemberKilled,
    EtcdMemberStopped,
    BalancerKilled,
    BalancerStopped,
    AgentsApart,
    AgentsApartOneWay,
    NodeApart,
    NodeApartOneWay,
    NodeMute,
    BalancerLate,
    PacketsLost,
    PacketsLate,
    DiskFull,
    NoDescriptors,
    NoPorts,
    MemoryLimit,
    CertificatesRenewed,
    AuthorityAdded,
    LeasesLost,
    ClockStepped,
    Strangers,
}

/// All of them, in the order they are played in.
pub const ALL: [Fault; 32] = [
    Fault::AgentKilled,
    Fault::AgentStopped,
    Fault::AgentReplaced,
    Fault::RelayKilled,
    Fault::RelayStopped,
    Fault::RelayReplaced,
    Fault::ApiserverKilled,
    Fault::ApiserverStopped,
    Fault::ApiserverFlaps,
    Fault::EtcdKilled,
    Fault::EtcdStopped,
    Fault::EtcdMemberKilled,
    Fault::EtcdMemberStopped,
    Fault::BalancerKilled,
    Fault::BalancerStopped,
    Fault::AgentsApart,
    Fault::AgentsApartOneWay,
    Fault::NodeApart,
    Fault::NodeApartOneWay,
    Fault::NodeMute,
    Fault::BalancerLate,
    Fault::PacketsLost,
    Fault::PacketsLate,
    Fault::DiskFull,
    Fault::NoDescriptors,
    Fault::NoPorts,
    Fault::MemoryLimit,
    Fault::CertificatesRenewed,
    Fault::AuthorityAdded,
    Fault::LeasesLost,
    Fault::ClockStepped,
    Fault::Strangers,
];

/// What faults are made on.
#[derive(Clone, Copy, Debug)]
pub struct Stage {
    /// What sends the GOAWAY: there is no relay to break beside a probe, and a virtual machine has no packet filter.
    pub shim: Shim,
    /// Real apiservers, with an etcd, Leases and haproxy.
    pub is_real: bool,
}

impl Fault {
    /// As flags and tables name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::AgentKilled => "agent-killed",
            Self::AgentStopped => "agent-stopped",
            Self::AgentReplaced => "agent-replaced",
            Self::RelayKilled => "relay-killed",
            Self::RelayStopped => "relay-stopped",
            Self::RelayReplaced => "relay-replaced",
            Self::ApiserverKilled => "apiserver-killed",
            Self::ApiserverStopped => "apiserver-stopped",
            Self::ApiserverFlaps => "apiserver-flaps",
            Self::EtcdKilled => "etcd-killed",
            Self::EtcdStopped => "etcd-stopped",
            Self::EtcdMemberKilled => "etcd-member-killed",
            Self::EtcdMemberStopped => "etcd-member-stopped",
            Self::BalancerKilled => "balancer-killed",
            Self::BalancerStopped => "balancer-stopped",
            Self::AgentsApart => "agents-apart",
            Self::AgentsApartOneWay => "agents-apart-one-way",
            Self::NodeApart => "node-apart",
            Self::NodeApartOneWay => "node-apart-one-way",
            Self::NodeMute => "node-mute",
            Self::BalancerLate => "balancer-late",
            Self::PacketsLost => "packets-lost",
            Self::PacketsLate => "packets-late",
            Self::DiskFull => "disk-full",
            Self::NoDescriptors => "no-descriptors",
            Self::NoPorts => "no-ports",
            Self::MemoryLimit => "memory-limit",
            Self::CertificatesRenewed => "certificates-renewed",
            Self::AuthorityAdded => "authority-added",
            Self::LeasesLost => "leases-lost",
            Self::ClockStepped => "clock-stepped",
            Self::Strangers => "strangers",
        }
    }

    /// In a sentence's words.
    pub fn what(self) -> &'static str {
        match self {
            Self::AgentKilled => "an agent is killed, and starts again",
            Self::AgentStopped => "an agent stands still for 75 s (SIGSTOP)",
            Self::AgentReplaced => "an agent is ended and started, as an upgrade does",
            Self::RelayKilled => "a relay is killed, and starts again",
            Self::RelayStopped => "a relay stands still for 75 s (SIGSTOP)",
            Self::RelayReplaced => "a relay is taken over by the next one",
            Self::ApiserverKilled => "an apiserver is killed, and starts again",
            Self::ApiserverStopped => "an apiserver stands still for 75 s (SIGSTOP)",
            Self::ApiserverFlaps => "an apiserver is killed three times, each time the load balancer has taken it back",
            Self::EtcdKilled => "all of etcd is killed, and starts again",
            Self::EtcdStopped => "all of etcd stands still for 12 s (SIGSTOP)",
            Self::EtcdMemberKilled => "one of three members of etcd is killed, and starts again",
            Self::EtcdMemberStopped => "one of three members of etcd stands still for 75 s (SIGSTOP)",
            Self::BalancerKilled => "the load balancer is killed, and starts again",
            Self::BalancerStopped => "the load balancer stands still for 75 s (SIGSTOP)",
            Self::AgentsApart => "a node and the other nodes do not reach each other for 75 s",
            Self::AgentsApartOneWay => "a node does not hear the other nodes for 75 s",
            Self::NodeApart => "a node reaches nobody, and nobody reaches it, for 75 s",
            Self::NodeApartOneWay => "a node does not hear load balancer and etcd for 75 s",
            Self::NodeMute => "nobody hears a node for 75 s, and it hears all",
            Self::BalancerLate => "an apiserver is killed, and the load balancer sends nobody there for 75 s",
            Self::PacketsLost => "a node loses one packet of twenty",
            Self::PacketsLate => "a node sends through a line of 1 Mbit/s, in whose queue packets wait for up to 1.5 s",
            Self::DiskFull => "the disk of state file and decision log is full",
            Self::NoDescriptors => "a relay may open no more files for 12 s",
            Self::NoPorts => "a node has sixteen ports for connections of its own",
            Self::MemoryLimit => "a relay has 64 MiB more than it uses, under a flood of strangers",
            Self::CertificatesRenewed => "all certificates are renewed with new keys",
            Self::AuthorityAdded => "another authority comes into the clients' bundle",
            Self::LeasesLost => "all Leases of agents and apiservers are deleted",
            Self::ClockStepped => "the wall clock of a node's agent and relay jumps a day ahead, and back",
            Self::Strangers => "six hundred strangers connect and say nothing",
        }
    }

    /// For how long it lasts: those that something waits out, for longer than a Lease of an agent lasts (60 s), a request of these
    /// clients (30 s), or a connection that does not answer client-go's PING (45 s).
    pub fn lasts(self) -> Duration {
        Duration::from_secs(match self {
            Self::AgentStopped
            | Self::RelayStopped
            | Self::ApiserverStopped
            | Self::EtcdMemberStopped
            | Self::BalancerStopped
            | Self::BalancerLate
            | Self::NodeApart
            | Self::NodeApartOneWay
            | Self::NodeMute
            | Self::AgentsApart
            | Self::AgentsApartOneWay => 75,
            Self::PacketsLost | Self::PacketsLate => 20,
            Self::EtcdStopped | Self::NoDescriptors | Self::NoPorts | Self::MemoryLimit => 12,
            Self::CertificatesRenewed | Self::AuthorityAdded | Self::DiskFull | Self::ClockStepped => 12,
            _ => 6,
        })
    }

    /// Whether the clients of its node are parted from it, and go to others.
    pub fn empties(self) -> bool {
        matches!(
            self,
            Self::RelayKilled
                | Self::RelayStopped
                | Self::RelayReplaced
                | Self::ApiserverKilled
                | Self::ApiserverStopped
                | Self::ApiserverFlaps
                | Self::BalancerLate
                | Self::NodeApart
                | Self::NodeApartOneWay
                | Self::NodeMute
        )
    }

    /// Whether they notice: their watches break.
    pub fn parts(self) -> bool {
        self.empties() && self != Self::RelayReplaced
    }

    /// Whether it parts all clients from what serves them, whichever node it is on.
    pub fn parts_all(self) -> bool {
        matches!(self, Self::BalancerKilled | Self::BalancerStopped)
    }

    /// How often it does what it does.
    pub fn times(self) -> u64 {
        if self == Self::ApiserverFlaps { FLAPS as u64 } else { 1 }
    }

    /// How many clients relays tell in that time after a renewal, until none is left who is served with the last certificate: one in
    /// each of a relay's turns, since that is good for years.
    pub fn renewal(took: Duration) -> u64 {
        NODES * (took.as_secs() / 5 + 2)
    }

    /// Whether it hits nothing that is there without rebalancer: then clients may notice nothing at all.
    pub fn is_ours(self) -> bool {
        match self {
            Self::AgentKilled
            | Self::AgentStopped
            | Self::AgentReplaced
            | Self::RelayReplaced
            | Self::AgentsApart
            | Self::AgentsApartOneWay
            | Self::DiskFull
            | Self::MemoryLimit
            | Self::CertificatesRenewed
            | Self::AuthorityAdded
            | Self::LeasesLost
            | Self::ClockStepped
            | Self::Strangers
            | Self::NoPorts => true,
            Self::RelayKilled
            | Self::NoDescriptors
            | Self::RelayStopped
            | Self::ApiserverKilled
            | Self::ApiserverStopped
            | Self::ApiserverFlaps
            | Self::EtcdKilled
            | Self::EtcdStopped
            | Self::EtcdMemberKilled
            | Self::EtcdMemberStopped
            | Self::BalancerKilled
            | Self::NodeApart
            | Self::NodeApartOneWay
            | Self::NodeMute
            | Self::BalancerLate
            | Self::BalancerStopped
            | Self::PacketsLost
            | Self::PacketsLate => false,
        }
    }

    /// Whether it can be made there.
    pub fn is_of(self, stage: Stage) -> bool {
        match self {
            Self::AgentKilled
            | Self::AgentStopped
            | Self::AgentReplaced
            | Self::ApiserverKilled
            | Self::ApiserverStopped
            | Self::ApiserverFlaps
            | Self::DiskFull
            | Self::Strangers => true,
            Self::EtcdKilled
            | Self::EtcdStopped
            | Self::BalancerKilled
            | Self::BalancerStopped
            | Self::BalancerLate
            | Self::CertificatesRenewed
            | Self::LeasesLost => stage.is_real,
            _ => stage.is_real && stage.shim != Shim::Steer,
        }
    }

    /// Whether it ends an agent or a relay of ours.
    pub fn ends_ours(self) -> bool {
        matches!(
            self,
            Self::AgentKilled | Self::AgentReplaced | Self::RelayKilled | Self::RelayReplaced
        )
    }

    /// The same fault where there is no relay: what stands at the front door is the apiserver itself. `None` where nothing
    /// of it is there.
    pub fn without_us(self) -> Option<Self> {
        match self {
            Self::RelayKilled => Some(Self::ApiserverKilled),
            Self::RelayStopped => Some(Self::ApiserverStopped),
            other => (!other.is_ours()).then_some(other),
        }
    }

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
            Fault::EtcdKilled | Fault::EtcdMemberKilled => {
                let ids = self
                    .members(cluster)
                    .into_iter()
                    .map(|member| cluster.etcd[member].id());
                ids.map(evidence::has_ended).next_back().context("etcd")?
            }
            Fault::EtcdStopped | Fault::EtcdMemberStopped => {
                let ids = self
                    .members(cluster)
                    .into_iter()
                    .map(|member| cluster.etcd[member].id());
                ids.map(evidence::stands_still).next_back().context("etcd")?
            }
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_fault_has_a_name_of_its_own_and_one_without_us_is_no_fault_of_ours() {
        let names: BTreeSet<_> = ALL.iter().map(|fault| fault.name()).collect();
        assert_eq!(names.len(), ALL.len());
        for fault in ALL {
            assert!(fault.without_us().is_none_or(|other| !other.is_ours()), "{fault:?}");
            assert_eq!(fault.without_us().is_none(), fault.is_ours(), "{fault:?}");
        }
    }
}
