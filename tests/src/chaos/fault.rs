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
    clock,
    limits::{self, Files},
};
use crate::{
    demo::cluster::Cluster,
    netns::{Namespace, Network},
    node::{PORT, Shim},
};

/// How long a process that is asked to end may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Connections of the flood, none of which says a word.
const STRANGERS: usize = 600;

/// How far a clock jumps: further than any Lease, token or cool-down lasts.
const A_DAY_S: i64 = 86_400;

/// Restarts of the apiserver that flaps.
const FLAPS: usize = 3;

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
    BalancerKilled,
    BalancerStopped,
    AgentsApart,
    AgentsApartOneWay,
    NodeApart,
    NodeApartOneWay,
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
pub const ALL: [Fault; 28] = [
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
    Fault::BalancerKilled,
    Fault::BalancerStopped,
    Fault::AgentsApart,
    Fault::AgentsApartOneWay,
    Fault::NodeApart,
    Fault::NodeApartOneWay,
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
            Self::BalancerKilled => "balancer-killed",
            Self::BalancerStopped => "balancer-stopped",
            Self::AgentsApart => "agents-apart",
            Self::AgentsApartOneWay => "agents-apart-one-way",
            Self::NodeApart => "node-apart",
            Self::NodeApartOneWay => "node-apart-one-way",
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
            Self::AgentStopped => "an agent stands still (SIGSTOP)",
            Self::AgentReplaced => "an agent is ended and started, as an upgrade does",
            Self::RelayKilled => "a relay is killed, and starts again",
            Self::RelayStopped => "a relay stands still (SIGSTOP)",
            Self::RelayReplaced => "a relay is taken over by the next one",
            Self::ApiserverKilled => "an apiserver is killed, and starts again",
            Self::ApiserverStopped => "an apiserver stands still (SIGSTOP)",
            Self::ApiserverFlaps => "an apiserver is killed and started three times",
            Self::EtcdKilled => "etcd is killed, and starts again",
            Self::EtcdStopped => "etcd stands still (SIGSTOP)",
            Self::BalancerKilled => "the load balancer is killed, and starts again",
            Self::BalancerStopped => "the load balancer stands still (SIGSTOP)",
            Self::AgentsApart => "a node and the other nodes do not reach each other",
            Self::AgentsApartOneWay => "a node does not hear the other nodes",
            Self::NodeApart => "a node reaches nobody, and nobody reaches it",
            Self::NodeApartOneWay => "a node does not hear load balancer and etcd",
            Self::PacketsLost => "a node loses one packet of twenty",
            Self::PacketsLate => "what a node sends waits for up to a second and a half",
            Self::DiskFull => "the disk of state file and decision log is full",
            Self::NoDescriptors => "a relay may open no more files",
            Self::NoPorts => "a node has sixteen ports for connections of its own",
            Self::MemoryLimit => "a relay has 64 MiB more than it uses, under a flood of strangers",
            Self::CertificatesRenewed => "all certificates are renewed with new keys",
            Self::AuthorityAdded => "another authority comes into the clients' bundle",
            Self::LeasesLost => "all Leases of agents and apiservers are deleted",
            Self::ClockStepped => "the wall clock of a node's agent and relay jumps a day ahead, and back",
            Self::Strangers => "six hundred strangers connect and say nothing",
        }
    }

    /// For how long it lasts.
    pub fn lasts(self) -> Duration {
        Duration::from_secs(match self {
            Self::NodeApart | Self::NodeApartOneWay | Self::AgentsApart | Self::AgentsApartOneWay => 15,
            Self::AgentStopped | Self::EtcdStopped => 12,
            Self::CertificatesRenewed | Self::AuthorityAdded | Self::DiskFull | Self::ClockStepped => 12,
            _ => 6,
        })
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
            | Self::NoDescriptors
            | Self::MemoryLimit
            | Self::CertificatesRenewed
            | Self::AuthorityAdded
            | Self::LeasesLost
            | Self::ClockStepped
            | Self::Strangers
            | Self::NoPorts => true,
            Self::RelayKilled
            | Self::RelayStopped
            | Self::ApiserverKilled
            | Self::ApiserverStopped
            | Self::ApiserverFlaps
            | Self::EtcdKilled
            | Self::EtcdStopped
            | Self::BalancerKilled
            | Self::NodeApart
            | Self::NodeApartOneWay
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
        let mut made = Made {
            fault: self,
            index,
            files: None,
            strangers: Vec::new(),
            group: None,
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
                for _ in 0..FLAPS {
                    cluster.kill_apiserver(index);
                    cluster.restart_apiserver(index)?;
                    // Long enough to be admitted by a load balancer that asks twice a second.
                    thread::park_timeout(Duration::from_secs(4));
                }
                cluster.kill_apiserver(index);
            }
            Self::EtcdKilled => cluster.etcd().context("etcd")?.kill(),
            Self::EtcdStopped => cluster.etcd().context("etcd")?.signal(libc::SIGSTOP),
            // It is there again at once: nothing else serves clients.
            Self::BalancerKilled => cluster.restart_balancer()?,
            Self::BalancerStopped => cluster.signal_balancer(libc::SIGSTOP)?,
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
            Self::NodeApart => deaf(cluster.namespace(index), "! -i lo")?,
            Self::NodeApartOneWay => deaf(cluster.namespace(index), &format!("-s {}", Network::HUB))?,
            Self::PacketsLost => deaf(
                cluster.namespace(index),
                "! -i lo -m statistic --mode random --probability 0.05",
            )?,
            Self::PacketsLate => queue(cluster.namespace(index), "add", LATE)?,
            Self::DiskFull => fill(&disk(cluster, index))?,
            Self::NoDescriptors => {
                let id = cluster.nodes[index].relay_id().context("a relay")?;
                made.files = Some(Files::no_more(id)?);
            }
            Self::NoPorts => ports(cluster.namespace(index), "40000 40015")?,
            Self::MemoryLimit => {
                let id = cluster.nodes[index].relay_id().context("a relay")?;
                made.group = Some(limits::Group::new(id, 64 << 20)?);
                made.strangers = strangers(cluster, index)?;
            }
            Self::CertificatesRenewed => cluster.pki().renew()?,
            Self::AuthorityAdded => cluster.pki().add_authority()?,
            Self::LeasesLost => lose_leases(cluster, index)?,
            Self::ClockStepped => clock::step(cluster, index, A_DAY_S)?,
            Self::Strangers => made.strangers = strangers(cluster, index)?,
        }
        Ok(made)
    }
}

/// A fault that is there.
pub struct Made {
    fault: Fault,
    index: usize,
    files: Option<Files>,
    strangers: Vec<TcpStream>,
    group: Option<limits::Group>,
}

impl Made {
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
            Fault::EtcdKilled => cluster.restart_etcd()?,
            Fault::EtcdStopped => cluster.etcd().context("etcd")?.signal(libc::SIGCONT),
            Fault::AgentsApart
            | Fault::AgentsApartOneWay
            | Fault::NodeApart
            | Fault::NodeApartOneWay
            | Fault::PacketsLost => {
                for node in 0..cluster.nodes.len() {
                    iptables(cluster.namespace(node), "-F INPUT")?;
                }
            }
            Fault::BalancerStopped => cluster.signal_balancer(libc::SIGCONT)?,
            Fault::PacketsLate => queue(cluster.namespace(index), "del", "")?,
            Fault::DiskFull => fs::remove_file(disk(cluster, index).join("filling")).context("the filling")?,
            Fault::NoPorts => ports(cluster.namespace(index), "32768 60999")?,
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

/// A line so narrow that packets wait in its queue (tc-tbf(8)): not every kernel can be told to delay each of them.
const LATE: &str = "tbf rate 2mbit burst 8kb latency 1500ms";

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
        ensure!(!open.is_empty(), "nobody is let in at all");
        Ok(open)
    })
}

fn lose_leases(cluster: &Cluster, index: usize) -> anyhow::Result<()> {
    let admin = cluster.admin(index)?;
    let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases";
    let (status, list) = admin.ask("GET", leases, None)?;
    ensure!(status == 200, "{leases}: {status}");
    let names = list["items"].as_array().context("Leases")?.iter();
    for name in names.filter_map(|item| item["metadata"]["name"].as_str()) {
        if name.starts_with("rebalancer-") || name.starts_with("apiserver-") {
            let (status, answer): (u16, Value) = admin.ask("DELETE", &format!("{leases}/{name}"), None)?;
            ensure!(matches!(status, 200 | 404), "{name}: {status}: {answer}");
        }
    }
    Ok(())
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
