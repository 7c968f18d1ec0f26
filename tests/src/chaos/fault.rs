//! The faults: what there is, what each hits, and what it may cost.
//!
//! Must never call one ours that is there without us, nor the other way round.

use std::time::Duration;

use crate::node::Shim;

/// How often the apiserver that flaps is killed.
pub const FLAPS: usize = 3;

/// Nodes of a cluster.
const NODES: u64 = super::Side::NODES as u64;

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
