//! Which connections an operator means: by who they are, how many, what share.
//!
//! Input: the body of `POST /v1/goaway` and the core's table. Output: connections, the oldest first.
//! Must never say itself who may be told: that is the core's, which says why it leaves somebody out.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;
use rebalancer_core::{
    agent::Agent,
    ids::{ConnectionId, Timestamp},
    planner::left_out,
    table::Connection,
};
use serde::Deserialize;

use crate::shim::wire::Id;

/// What is given must all be true of a connection; `count` and `percent` say how many of those.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Selection {
    /// This connection.
    pub connection: Option<Id>,
    /// Those of a client, by ADDRESS or ADDRESS:PORT.
    pub client: Option<String>,
    /// Those of a user.
    pub user: Option<String>,
    /// Those whose user agent begins like this.
    pub user_agent: Option<String>,
    /// Those from a network.
    pub cidr: Option<String>,
    /// Those without an open stream.
    pub idle: bool,
    /// So many of these, the oldest.
    pub count: Option<usize>,
    /// This share of these, in percent, the oldest.
    pub percent: Option<f64>,
    /// Spread over so many seconds.
    pub over_s: Option<f64>,
    /// Those too whom the configuration excludes, or who are on this node.
    pub force: bool,
}

/// The longest time an order is spread over, in seconds: a day.
const LONGEST: f64 = 86_400.0;

/// A selection that was understood.
#[derive(Debug)]
struct Wanted<'a> {
    selection: &'a Selection,
    client: Option<Client>,
    network: Option<IpNet>,
}

#[derive(Clone, Copy, Debug)]
enum Client {
    Address(IpAddr),
    Port(SocketAddr),
}

impl Selection {
    /// Whether anything says who.
    fn names_somebody(&self) -> bool {
        self.connection.is_some()
            || self.client.is_some()
            || self.user.is_some()
            || self.user_agent.is_some()
            || self.cidr.is_some()
            || self.idle
    }

    /// The time it is spread over.
    ///
    /// # Errors
    ///
    /// It is out of range.
    pub fn over(&self) -> Result<Option<Duration>, String> {
        match self.over_s {
            Some(seconds) if !(seconds > 0.0 && seconds <= LONGEST) => {
                Err(format!("over_s is {seconds}: allowed is above 0, at most {LONGEST}"))
            }
            seconds => Ok(seconds.map(Duration::from_secs_f64)),
        }
    }

    fn understood(&self) -> Result<Wanted<'_>, String> {
        if !self.names_somebody() && self.count.is_none() && self.percent.is_none() {
            return Err(
                "say who: connection, client, user, user_agent, cidr or idle, or how many: count or percent".into(),
            );
        }
        if self.count.is_some() && self.percent.is_some() {
            return Err("count and percent are two ways to say how many: give one".into());
        }
        if self.count == Some(0) {
            return Err("count is 0: allowed is 1 or more".into());
        }
        if let Some(percent) = self.percent
            && !(percent > 0.0 && percent <= 100.0)
        {
            return Err(format!("percent is {percent}: allowed is above 0, at most 100"));
        }
        if self.user_agent.as_deref() == Some("") {
            return Err("user_agent is empty: every client's begins like that".into());
        }
        let client = self.client.as_deref().map(|text| {
            let address = text
                .parse()
                .map(|address: IpAddr| Client::Address(address.to_canonical()));
            let port = text.parse().map(|SocketAddrText(address)| Client::Port(address));
            address
                .or(port)
                .map_err(|()| format!("client={text} is neither ADDRESS nor ADDRESS:PORT"))
        });
        let network = self.cidr.as_deref().map(|text| {
            let network = text.parse::<IpNet>();
            network.map_err(|_| format!("cidr={text} is not ADDRESS/BITS, for example 10.0.0.0/8"))
        });
        Ok(Wanted {
            selection: self,
            client: client.transpose()?,
            network: network.transpose()?,
        })
    }

    /// The active connections it means, the oldest first.
    ///
    /// # Errors
    ///
    /// It cannot be understood, or this agent does not know what it asks for: in words.
    pub fn choose(&self, agent: &Agent) -> Result<Vec<ConnectionId>, String> {
        let wanted = self.understood()?;
        if self.idle && !agent.abilities().is_some_and(|shim| shim.sees_ends) {
            return Err("idle needs a shim that sees streams end: --shim relay".into());
        }
        let mut meant: Vec<(ConnectionId, &Connection)> = agent
            .table()
            .iter()
            .filter(|(id, connection)| wanted.means(*id, connection))
            .collect();
        // So many, or this share, are of those who may be told; when nobody may, the core says why.
        let may_be_told =
            |(_, connection): &(_, &Connection)| left_out(Some(connection), agent.policy(), self.force).is_ok();
        if (self.count.is_some() || self.percent.is_some()) && meant.iter().any(may_be_told) {
            meant.retain(may_be_told);
        }
        let mut chosen: Vec<(Timestamp, ConnectionId)> = meant
            .into_iter()
            .map(|(id, connection)| (connection.opened_at, id))
            .collect();
        chosen.sort_unstable();
        let most = match (self.count, self.percent) {
            (Some(count), _) => count,
            (_, Some(percent)) => (chosen.len() as f64 * percent / 100.0).ceil() as usize,
            _ => usize::MAX,
        };
        chosen.truncate(most);
        Ok(chosen.into_iter().map(|(_, id)| id).collect())
    }
}

impl Wanted<'_> {
    fn means(&self, id: ConnectionId, connection: &Connection) -> bool {
        let Selection {
            connection: named,
            user,
            user_agent,
            idle,
            ..
        } = self.selection;
        let at = connection.client();
        connection.can_hear()
            && named.is_none_or(|named| named.0 == id.0)
            && self.client.is_none_or(|client| match client {
                Client::Address(ip) => ip == at.ip(),
                Client::Port(address) => address == at,
            })
            && self.network.is_none_or(|network| network.contains(&at.ip()))
            && user.as_deref().is_none_or(|user| connection.user() == Some(user))
            && user_agent
                .as_deref()
                .is_none_or(|prefix| connection.user_agent().is_some_and(|agent| agent.starts_with(prefix)))
            && (!idle || connection.counters.open_streams == 0)
    }
}

/// A socket address, an IPv4 one that is written as IPv6 too.
struct SocketAddrText(SocketAddr);

impl std::str::FromStr for SocketAddrText {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let address: SocketAddr = text.parse().map_err(|_| ())?;
        Ok(Self(SocketAddr::new(address.ip().to_canonical(), address.port())))
    }
}

#[cfg(test)]
mod tests {
    use rebalancer_core::{
        agent::Input,
        ids::{ApiserverName, Protocol, ShimKind},
        observation::{Observation, Socket},
        policy::Policy,
        shim::{ConnectionState, Counters, ShimConnection, ShimReport},
    };
    use serde_json::json;

    use super::*;

    /// Six clients, as old as their number says, and one on this node.
    fn agent() -> Agent {
        let policy = Policy {
            shim: ShimKind::Relay,
            ..Policy::new(ApiserverName::new("a"), Default::default())
        };
        let mut agent = Agent::new(policy, 1, Timestamp::from_millis(0));
        let listed = Observation::Resync {
            sockets: Vec::new(),
            listener: Some(ConnectionId(99)),
        };
        agent.handle(Timestamp::from_millis(0), Input::Observations(vec![listed]));
        let local: SocketAddr = "10.0.0.1:6443".parse().expect("an address");
        for (id, client, user, user_agent, open_streams) in [
            (6, "10.0.1.1:1000", Some("admin"), "kubectl/v1.36", 0),
            (5, "10.0.1.1:1001", Some("system:node:x"), "kubelet/v1.36", 2),
            (4, "10.0.1.2:1000", Some("system:node:y"), "kubelet/v1.36", 1),
            (3, "192.0.2.7:1000", None, "Go-http-client/2.0", 0),
            (2, "192.0.2.8:1000", None, "Go-http-client/2.0", 1),
            (1, "[2001:db8::1]:1000", Some("admin"), "helm/3", 1),
            (7, "10.0.0.1:1000", Some("system:scheduler"), "kube-scheduler/v1.36", 1),
        ] {
            let now = Timestamp::from_millis(1_000 - 100 * id);
            let client: SocketAddr = client.parse().expect("an address");
            let socket = Socket {
                id: ConnectionId(id),
                local,
                remote: client,
                bytes_in: 0,
                bytes_out: 0,
                start: 0,
            };
            let known = ShimConnection {
                id: ConnectionId(id),
                client,
                local,
                protocol: Protocol::H2Selected,
                can_be_told: true,
                age: None,
                state: ConnectionState::Active,
                user: user.map(str::to_owned),
                user_agent: Some(user_agent.to_owned()),
                counters: Counters {
                    open_streams,
                    ..Counters::default()
                },
            };
            agent.handle(now, Input::Observations(vec![Observation::Opened(socket)]));
            let report = ShimReport {
                connections: vec![known],
                upstream_ready: Some(true),
                ..ShimReport::default()
            };
            agent.handle(now, Input::Shim(report));
        }
        agent
    }

    fn chosen(body: serde_json::Value) -> Result<Vec<u64>, String> {
        let selection: Selection = serde_json::from_value(body).map_err(|error| error.to_string())?;
        let chosen = selection.choose(&agent())?;
        Ok(chosen.into_iter().map(|id| id.0).collect())
    }

    #[test]
    fn everything_that_is_given_is_true_of_who_is_chosen() {
        for (body, expected) in [
            (json!({"connection": "4"}), vec![4]),
            (json!({"client": "10.0.1.1"}), vec![6, 5]),
            (json!({"client": "::ffff:10.0.1.1"}), vec![6, 5]),
            (json!({"client": "10.0.1.1:1001"}), vec![5]),
            (json!({"client": "2001:db8:0::1"}), vec![1]),
            (json!({"user": "admin"}), vec![6, 1]),
            (json!({"user_agent": "kubelet/"}), vec![5, 4]),
            (json!({"user_agent": "kubelet/", "client": "10.0.1.2"}), vec![4]),
            (json!({"cidr": "192.0.2.0/24"}), vec![3, 2]),
            (json!({"idle": true}), vec![6, 3]),
            // Of those who may be told: who is on this node may not, unless it is forced.
            (json!({"cidr": "10.0.0.0/8", "count": 2}), vec![6, 5]),
            (json!({"cidr": "10.0.0.0/8", "count": 2, "force": true}), vec![7, 6]),
            (json!({"cidr": "10.0.0.1/32", "count": 2}), vec![7]),
            (json!({"cidr": "10.0.0.1/32"}), vec![7]),
            (json!({"count": 2}), vec![6, 5]),
            (json!({"percent": 50}), vec![6, 5, 4]),
            (json!({"percent": 0.1}), vec![6]),
            (json!({"user": "nobody"}), vec![]),
        ] {
            assert_eq!(chosen(body.clone()), Ok(expected), "{body}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        for (body, part) in [
            (json!({}), "say who"),
            (json!({"count": 1, "percent": 1}), "give one"),
            (json!({"count": 0}), "count is 0"),
            (json!({"percent": 101}), "percent is 101"),
            (json!({"client": "cp-1"}), "client=cp-1"),
            (json!({"cidr": "10.0.0.0/99"}), "cidr=10.0.0.0/99"),
            (json!({"user_agent": ""}), "user_agent is empty"),
            (json!({"usr": "admin"}), "usr"),
        ] {
            let said = chosen(body.clone()).expect_err("a refusal");
            assert!(said.contains(part), "{body}: {said}");
        }
    }

    #[test]
    fn the_documented_members_are_those_that_are_read() {
        let document: serde_json::Value = serde_json::from_str(include_str!("openapi.json")).expect("JSON");
        let body = &document["paths"]["/v1/goaway"]["post"]["requestBody"]["content"]["application/json"]["schema"];
        let mut documented: Vec<&str> = body["properties"]
            .as_object()
            .expect("members")
            .keys()
            .map(String::as_str)
            .collect();
        // serde names all it would have read.
        let said = chosen(json!({"?": 1})).expect_err("a refusal");
        let mut read: Vec<&str> = said.split('`').skip(3).step_by(2).collect();
        documented.sort_unstable();
        read.sort_unstable();
        assert_eq!(documented, read);
        let over = |over_s: f64| {
            Selection {
                over_s: Some(over_s),
                ..Selection::default()
            }
            .over()
        };
        assert_eq!(over(300.0), Ok(Some(Duration::from_secs(300))));
        for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY, 86_401.0] {
            assert!(over(wrong).is_err_and(|said| said.contains("over_s")), "{wrong}");
        }
    }
}
