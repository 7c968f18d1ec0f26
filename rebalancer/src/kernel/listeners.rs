//! Whose connections on the watched port are the apiserver's.
//!
//! Input: what a source tells, the addresses that were named, and who listens. Output: the same without what is somebody
//! else's; and why it is not known, where nobody said which of several listeners is the apiserver.
//! Must never count the clients of a load balancer that has the port at an address of its own.

use std::{net::IpAddr, sync::Arc};

use rebalancer_core::{
    observation::{Observation, Socket},
    sock_diag::{Listening, shared_port},
};

use super::sockdiag;

/// The look at listeners beside each list.
pub struct Listeners {
    port: u16,
    /// The apiserver's addresses; none where all are.
    only: Vec<IpAddr>,
    /// What was told last.
    told: Option<Arc<str>>,
}

impl Listeners {
    /// For a port, and the addresses that were named.
    pub fn new(port: u16, only: &[IpAddr]) -> Self {
        Self {
            port,
            only: only.iter().map(IpAddr::to_canonical).collect(),
            told: None,
        }
    }

    /// Leaves out what is not the apiserver's.
    pub fn pass(&mut self, observations: Vec<Observation>) -> Vec<Observation> {
        let lists = |told: &Observation| matches!(told, Observation::Listed { .. } | Observation::Resync { .. });
        if !observations.iter().any(lists) {
            return self.passed(observations, &[]);
        }
        // What cannot be read now is read with the next list.
        let Ok(listening) = sockdiag::listening(self.port) else {
            return self.passed(observations, &[]);
        };
        let mut passed = self.passed(observations, &listening);
        passed.extend(self.doubt(&listening));
        passed
    }

    fn passed(&self, mut observations: Vec<Observation>, listening: &[Listening]) -> Vec<Observation> {
        if self.only.is_empty() {
            return observations;
        }
        let is_ours = |socket: &Socket| self.only.contains(&socket.local.ip().to_canonical());
        observations.retain(|told| !matches!(told, Observation::Opened(socket) if !is_ours(socket)));
        for told in &mut observations {
            if let Observation::Listed { sockets, listener } | Observation::Resync { sockets, listener } = told {
                sockets.retain(is_ours);
                let named = listening.iter().filter(|one| self.is_named(one.address));
                *listener = named.map(|one| one.id).max();
            }
        }
        observations
    }

    /// Whether an address is among those that were named, or is all of them.
    fn is_named(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_unspecified() || self.only.contains(&address)
    }

    fn doubt(&mut self, listening: &[Listening]) -> Option<Observation> {
        let doubt = if self.only.is_empty() {
            shared_port(listening).map(Arc::from)
        } else {
            None
        };
        if doubt == self.told {
            return None;
        }
        self.told.clone_from(&doubt);
        Some(Observation::SharedPort(doubt))
    }
}

#[cfg(test)]
mod tests {
    use rebalancer_core::ids::ConnectionId;

    use super::*;

    fn socket(id: u64, local: &str) -> Socket {
        Socket {
            id: ConnectionId(id),
            local: local.parse().expect("an address"),
            remote: "192.0.2.9:40000".parse().expect("an address"),
            bytes_in: 0,
            bytes_out: 0,
            start: 0,
        }
    }

    fn listening(id: u64, address: &str, cgroup: u64) -> Listening {
        Listening {
            id: ConnectionId(id),
            address: address.parse().expect("an address"),
            cgroup,
        }
    }

    #[test]
    fn what_a_load_balancer_has_at_another_address_is_left_out() {
        let listeners = Listeners::new(6443, &["10.0.0.1".parse().expect("an address")]);
        let all = [listening(7, "10.0.0.1", 1), listening(9, "10.0.0.100", 2)];
        let told = vec![
            Observation::Opened(socket(1, "10.0.0.100:6443")),
            Observation::Opened(socket(2, "[::ffff:10.0.0.1]:6443")),
            Observation::Listed {
                sockets: vec![socket(1, "10.0.0.100:6443"), socket(2, "10.0.0.1:6443")],
                listener: Some(ConnectionId(9)),
            },
        ];
        let passed = listeners.passed(told, &all);
        let [Observation::Opened(opened), Observation::Listed { sockets, listener }] = &passed[..] else {
            panic!("{passed:?}");
        };
        assert_eq!(opened.id, ConnectionId(2));
        assert_eq!(sockets.iter().map(|socket| socket.id.0).collect::<Vec<_>>(), [2]);
        assert_eq!(
            *listener,
            Some(ConnectionId(7)),
            "a reload of the load balancer is no restart"
        );
    }

    #[test]
    fn a_doubt_is_told_once_and_its_end_too() {
        let mut listeners = Listeners::new(6443, &[]);
        let shared = [listening(7, "10.0.0.1", 1), listening(9, "10.0.0.100", 2)];
        assert!(matches!(
            listeners.doubt(&shared),
            Some(Observation::SharedPort(Some(_)))
        ));
        assert!(listeners.doubt(&shared).is_none());
        assert!(matches!(
            listeners.doubt(&shared[..1]),
            Some(Observation::SharedPort(None))
        ));
        let mut named = Listeners::new(6443, &["10.0.0.1".parse().expect("an address")]);
        assert!(named.doubt(&shared).is_none());
    }
}
