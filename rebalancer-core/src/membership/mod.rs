//! Who is an apiserver of this cluster, and who speaks for it: what Leases and answers say together.
//!
//! Job: hold what the Leases showed and who answered, and say who is a member, who is gone, whose word is refused, and
//! whether this agent may write its own Lease.
//! Input: complete sets of Leases, answers of agents and failures of the API, with the instant each came.
//! Output: a [`Roll`], and [`OwnLease`]. Must never compare clocks: a Lease is old when it has not *changed* for a while by
//! the observer's own clock, whatever time is written in it. Must never drop anybody while the API cannot be read.

mod lease;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

pub use lease::{
    AGENT_LABEL, AgentLease, ApiserverLease, Endpoint, IDENTITY_LABEL, KeyHash, Shown, can_be_reached,
    can_have_a_lease, lease_name,
};

use crate::ids::{ApiserverName, Timestamp};

/// A node whose Leases have not changed for so long, and whose agent does not answer, is gone: six renewals were due.
pub const GONE: Duration = Duration::from_secs(60);

/// Leases are read at least so often when all is well; after a longer silence nothing is known of what happened meanwhile.
pub const BLIND: Duration = Duration::from_secs(45);

/// An agent that answered within this time is there.
const ANSWERS: Duration = Duration::from_secs(10);

/// An answer that was under way when a Lease changed may come so much later.
const UNDER_WAY: Duration = Duration::from_secs(4);

/// Leases that are looked at, of each kind: whoever may write Leases cannot make this grow for ever.
const MOST: usize = 256;

/// One Lease as it was seen, with what makes a change a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen<T> {
    /// The Lease's name.
    pub name: String,
    /// Another value after each write (`resourceVersion`, which is compared and nothing else).
    pub version: String,
    /// What it says.
    pub says: Result<T, String>,
}

/// A Lease, and since when it is as it is.
#[derive(Clone, Debug)]
struct Kept<T> {
    version: String,
    says: Result<T, String>,
    changed: Timestamp,
}

/// All Leases of one kind.
#[derive(Clone, Debug)]
struct Shelf<T> {
    kept: BTreeMap<String, Kept<T>>,
    /// When they were read last.
    read: Option<Timestamp>,
    /// Why the last attempt failed, when it did.
    fault: Option<String>,
    /// Those beyond what is looked at.
    beyond: usize,
}

/// The agent that speaks for a node.
#[derive(Clone, Debug)]
struct Spokesman {
    endpoint: Endpoint,
    answered: Option<Timestamp>,
    /// It says that its apiserver takes no connections, or is overloaded.
    is_down: bool,
    /// Another endpoint that its Lease names by now, and since when.
    rival: Option<(Endpoint, Timestamp)>,
}

/// Where the set of apiservers is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// The apiservers' own identity Leases.
    Identities,
    /// The cluster has none: one without an agent would not be known.
    Agents,
}

/// One member other than this agent's own apiserver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Where its agent answers; `None` when there is none.
    pub endpoint: Option<Endpoint>,
    /// Why nothing it says may be believed.
    pub fault: Option<String>,
}

/// Who is who now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roll {
    /// The other members, by name.
    pub members: BTreeMap<ApiserverName, Member>,
    /// Nodes that have left without a word, and may come back.
    pub gone: BTreeSet<ApiserverName>,
    /// Agents to be asked: members, and those who may become members.
    pub ask: BTreeMap<ApiserverName, Endpoint>,
    /// Keys of those who may ask.
    pub may_ask: BTreeSet<KeyHash>,
    /// Where the set is from.
    pub basis: Basis,
    /// Why nothing may be done whoever answers, if so.
    pub doubt: Option<String>,
    /// Why the API cannot be read now: the set is as it was.
    pub blind: Option<String>,
    /// Leases that are refused, and why; nothing waits for them.
    pub refused: Vec<String>,
}

impl Roll {
    /// Nothing has been read yet.
    pub fn unread(why: &str) -> Self {
        Self {
            members: BTreeMap::new(),
            gone: BTreeSet::new(),
            ask: BTreeMap::new(),
            may_ask: BTreeSet::new(),
            basis: Basis::Agents,
            doubt: Some(why.to_owned()),
            blind: None,
            refused: Vec::new(),
        }
    }
}

/// What this agent may do with its own Lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OwnLease {
    /// There is none: make it.
    Create,
    /// It is this process's, or nobody's any more: write it over that version.
    Write(String),
    /// Somebody else holds it.
    Foreign(String),
    /// It has not been read.
    Unread,
}

/// What is known, and since when.
#[derive(Clone, Debug)]
pub struct Membership {
    own: AgentLease,
    agents: Shelf<AgentLease>,
    apiservers: Shelf<ApiserverLease>,
    spokesmen: BTreeMap<ApiserverName, Spokesman>,
    /// Nodes whose agent was matched with an identity Lease once.
    matched: BTreeSet<ApiserverName>,
    has_identities: bool,
    /// This agent was matched with an identity Lease once: without one its apiserver is down, and not misnamed.
    own_matched: bool,
    /// When this agent's Lease was written last, and why it was not since.
    renewed: Option<Timestamp>,
    unwritten: Option<String>,
    last: Option<Roll>,
}

impl<T: Clone> Shelf<T> {
    fn new() -> Self {
        Self {
            kept: BTreeMap::new(),
            read: None,
            fault: None,
            beyond: 0,
        }
    }

    /// Takes all that there are now.
    fn take(&mut self, now: Timestamp, seen: Vec<Seen<T>>) {
        // What did not happen while nobody could write says nothing: everybody has the whole time again.
        let was_blind = self.fault.take().is_some() || self.read.is_some_and(|read| now.since(read) > BLIND);
        self.beyond = seen.len().saturating_sub(MOST);
        let mut before = std::mem::take(&mut self.kept);
        for Seen { name, version, says } in seen.into_iter().take(MOST) {
            let changed = match before.remove(&name) {
                Some(kept) if kept.version == version && !was_blind => kept.changed,
                _ => now,
            };
            self.kept.insert(name, Kept { version, says, changed });
        }
        self.read = Some(now);
    }

    fn is_fresh(&self, kept: &Kept<T>) -> bool {
        self.read.is_some_and(|read| read.since(kept.changed) < GONE)
    }

    fn blind(&self, now: Timestamp, what: &str) -> Option<String> {
        match (&self.fault, self.read) {
            (Some(why), _) => Some(why.clone()),
            (None, None) => Some(format!("{what} have not been read yet")),
            (None, Some(read)) if now.since(read) > BLIND => {
                Some(format!("{what} were read {} s ago last", now.since(read).as_secs()))
            }
            _ => None,
        }
    }
}

impl Membership {
    /// Nothing is known yet; `own` is what this agent's Lease is to say.
    pub fn new(own: AgentLease) -> Self {
        Self {
            own,
            agents: Shelf::new(),
            apiservers: Shelf::new(),
            spokesmen: BTreeMap::new(),
            matched: BTreeSet::new(),
            has_identities: false,
            own_matched: false,
            renewed: None,
            unwritten: None,
            last: None,
        }
    }

    /// What this agent's Lease is to say.
    pub fn own(&self) -> &AgentLease {
        &self.own
    }

    /// All agents' Leases were read.
    pub fn agents(&mut self, now: Timestamp, seen: Vec<Seen<AgentLease>>) {
        self.agents.take(now, seen);
        let leases: Vec<(AgentLease, Timestamp)> = self
            .agents
            .kept
            .values()
            .filter_map(|kept| Some((kept.says.clone().ok()?, kept.changed)))
            .filter(|(lease, _)| lease.node != self.own.node)
            .collect();
        let known: BTreeSet<_> = leases.iter().map(|(lease, _)| &lease.node).collect();
        // Whose Lease was taken away is asked on while it answers.
        self.spokesmen
            .retain(|name, one| known.contains(name) || one.answered.is_some_and(|at| now.since(at) < ANSWERS));
        for (lease, changed) in &leases {
            let one = self.spokesmen.entry(lease.node.clone()).or_insert(Spokesman {
                endpoint: lease.endpoint,
                answered: None,
                is_down: false,
                rival: None,
            });
            one.rival = match one.rival {
                _ if one.endpoint == lease.endpoint => None,
                Some((endpoint, since)) if endpoint == lease.endpoint => Some((endpoint, since)),
                _ => Some((lease.endpoint, *changed)),
            };
        }
        self.settle(now);
    }

    /// All identity Leases were read.
    pub fn apiservers(&mut self, now: Timestamp, seen: Vec<Seen<ApiserverLease>>) {
        self.has_identities |= !seen.is_empty();
        self.apiservers.take(now, seen);
    }

    /// This agent's Lease was written, or why it was not.
    pub fn renewed(&mut self, now: Timestamp, written: Result<(), String>) {
        match written {
            Ok(()) => (self.renewed, self.unwritten) = (Some(now), None),
            Err(why) => self.unwritten = Some(why),
        }
    }

    /// The own Lease has that version now, whether or not a reading has shown it yet.
    pub fn wrote(&mut self, now: Timestamp, version: String) {
        let kept = Kept {
            version,
            says: Ok(self.own.clone()),
            changed: now,
        };
        self.agents.kept.insert(lease_name(&self.own.node), kept);
    }

    /// Agents' Leases cannot be read.
    pub fn agents_failed(&mut self, why: String) {
        self.agents.fault = Some(why);
    }

    /// Identity Leases cannot be read.
    pub fn apiservers_failed(&mut self, why: String) {
        self.apiservers.fault = Some(why);
    }

    /// An agent answered at that endpoint.
    pub fn answered(&mut self, now: Timestamp, name: &ApiserverName, at: Endpoint, is_down: bool) {
        if let Some(one) = self.spokesmen.get_mut(name).filter(|one| one.endpoint == at) {
            one.answered = Some(now);
            one.is_down = is_down;
        }
    }

    /// Whoever's Lease names another endpoint is asked there as soon as nobody answers at the old one: an agent ends before
    /// the next one on its node begins, and one that goes on answering has been robbed of its Lease.
    fn settle(&mut self, now: Timestamp) {
        for one in self.spokesmen.values_mut() {
            let Some((endpoint, since)) = one.rival else { continue };
            let is_silent = one.answered.is_none_or(|at| now.since(at) >= UNDER_WAY);
            // Its port cannot be bound twice.
            let took_its_place = endpoint.address == one.endpoint.address;
            if is_silent && (took_its_place || now.since(since) >= UNDER_WAY) {
                *one = Spokesman {
                    endpoint,
                    answered: None,
                    is_down: false,
                    rival: None,
                };
            }
        }
    }

    /// Whether this agent may write its Lease: another's is left to it for as long as it is renewed, and wherever it is
    /// said to be but here.
    pub fn own_lease(&self) -> OwnLease {
        if self.agents.read.is_none() {
            return OwnLease::Unread;
        }
        let Some(kept) = self.agents.kept.get(&lease_name(&self.own.node)) else {
            return OwnLease::Create;
        };
        let write = || OwnLease::Write(kept.version.clone());
        match &kept.says {
            Ok(lease) if lease.holder == self.own.holder && lease.endpoint == self.own.endpoint => write(),
            // Nobody else can listen there: it is of the process before this one.
            Ok(lease) if lease.endpoint.address == self.own.endpoint.address && lease.holder != self.own.holder => {
                write()
            }
            _ if !self.agents.is_fresh(kept) => write(),
            Ok(lease) => OwnLease::Foreign(format!(
                "the Lease {} is held by an agent at {} and renewed: two agents have the name {}, or somebody else wrote \
                 it; give each its own --node-name, and the right to write Leases to agents only",
                lease_name(&self.own.node),
                lease.endpoint.address,
                self.own.node,
            )),
            Err(why) => OwnLease::Foreign(format!(
                "the Lease {} is not this agent's: {why}; delete it, and see who may write it",
                lease_name(&self.own.node)
            )),
        }
    }

    /// Who is who now.
    pub fn roll(&mut self, now: Timestamp) -> Roll {
        self.settle(now);
        let blind = self
            .agents
            .blind(now, "the agents' Leases")
            .or_else(|| self.apiservers.blind(now, "the apiservers' identity Leases"));
        let roll = match (&self.last, blind) {
            (None, Some(why)) => Roll::unread(&why),
            // Nobody leaves and nobody comes while nothing can be read; who answers is still asked.
            (Some(last), Some(why)) => Roll {
                blind: Some(why),
                ..last.clone()
            },
            (_, None) => self.called(now),
        };
        if roll.blind.is_none() && self.agents.read.is_some() && self.apiservers.read.is_some() {
            self.last = Some(roll.clone());
        }
        roll
    }

    fn called(&mut self, now: Timestamp) -> Roll {
        let mut roll = Roll {
            doubt: None,
            basis: if self.has_identities {
                Basis::Identities
            } else {
                Basis::Agents
            },
            ..Roll::unread("")
        };
        roll.doubt = match self.own_lease() {
            OwnLease::Foreign(why) => Some(why),
            // While Leases are read all the same: an API that does neither is another trouble, and everybody's.
            _ if self
                .renewed
                .is_none_or(|at| self.agents.read.is_some_and(|read| read.since(at) > BLIND)) =>
            {
                Some(match &self.unwritten {
                    Some(why) => {
                        format!("this agent's Lease cannot be written, and the others take it for gone: {why}")
                    }
                    None => "this agent's Lease has not been written yet".to_owned(),
                })
            }
            _ => None,
        };
        self.refuse(&mut roll);
        let hosts: BTreeMap<&str, bool> = self
            .apiservers
            .kept
            .values()
            .filter_map(|kept| Some((kept.says.as_ref().ok()?.host.as_str(), self.apiservers.is_fresh(kept))))
            .fold(BTreeMap::new(), |mut hosts, (host, is_fresh)| {
                *hosts.entry(host).or_default() |= is_fresh;
                hosts
            });
        let claims = self.claims(&hosts, &mut roll);
        let own_host = claims
            .iter()
            .find(|(_, node)| **node == self.own.node)
            .map(|(host, _)| *host);
        self.own_matched |= own_host.is_some();
        if roll.basis == Basis::Identities && !self.own_matched && roll.doubt.is_none() {
            roll.doubt = Some(format!(
                "none of the apiservers' identity Leases ({}) is of this node, {} on the host {}: give --node-name the \
                 name of the apiserver's host, or wait until its apiserver has started",
                listed(hosts.keys().copied()),
                self.own.node,
                self.own.host
            ));
        }

        // Every node that a Lease of either kind speaks of.
        let mut nodes: BTreeMap<ApiserverName, Option<&str>> = BTreeMap::new();
        for host in hosts.keys() {
            let node = claims.get(host).cloned().unwrap_or_else(|| ApiserverName::new(*host));
            nodes.insert(node, Some(host));
        }
        for name in self.spokesmen.keys() {
            nodes.entry(name.clone()).or_default();
        }
        nodes.remove(&self.own.node);
        let mut newly_matched = Vec::new();
        for (name, host) in nodes {
            let lease = self.agents.kept.get(&lease_name(&name));
            let is_renewed = lease.is_some_and(|kept| self.agents.is_fresh(kept));
            let is_serving = host.is_some_and(|host| hosts[host]);
            let one = self.spokesmen.get(&name);
            let answers = one.is_some_and(|one| one.answered.is_some_and(|at| now.since(at) < ANSWERS));
            if let Some(one) = one {
                roll.ask.insert(name.clone(), one.endpoint);
            }
            let is_known = roll.basis == Basis::Agents || host.is_some() || self.matched.contains(&name);
            if !is_known && !one.is_some_and(|one| answers && one.is_down) {
                let lease = lease_name(&name);
                if answers {
                    roll.doubt.get_or_insert_with(|| {
                        format!(
                            "the agent {name} answers for an apiserver that has no identity Lease ({} have one): give it \
                             the --node-name of its apiserver's host",
                            listed(hosts.keys().copied())
                        )
                    });
                } else {
                    roll.refused.push(format!(
                        "the Lease {lease} is of no apiserver that has an identity Lease, and no agent answers there"
                    ));
                }
                continue;
            }
            if let Some(one) = one {
                roll.may_ask.insert(one.endpoint.key);
            }
            if !is_renewed && !is_serving && !answers {
                roll.gone.insert(name);
                continue;
            }
            if host.is_some() && one.is_some() {
                newly_matched.push(name.clone());
            }
            let fault = match (lease.map(|kept| &kept.says), one) {
                (Some(Err(why)), _) => Some(format!("its Lease {} is refused: {why}", lease_name(&name))),
                (_, None) => Some(format!(
                    "an apiserver runs on {}, and no agent speaks for it: start one there, with a Lease in the same \
                     --lease-namespace",
                    host.unwrap_or(name.as_str())
                )),
                (
                    _,
                    Some(Spokesman {
                        endpoint,
                        rival: Some((rival, _)),
                        ..
                    }),
                ) => Some(format!(
                    "its Lease names a key {:.8} at {}, and the agent at {} with the key {:.8} still answers: two agents \
                     have its name, or somebody else wrote its Lease",
                    rival.key, rival.address, endpoint.address, endpoint.key
                )),
                (_, Some(_)) => None,
            };
            let endpoint = one.map(|one| one.endpoint);
            roll.members.insert(name, Member { endpoint, fault });
        }
        self.matched.extend(newly_matched);
        self.matched.retain(|name| roll.members.contains_key(name));
        roll
    }

    /// Names the Leases that say nothing, and those there is no room for.
    fn refuse(&self, roll: &mut Roll) {
        let own = lease_name(&self.own.node);
        let mut refuse = |name: &str, why: &String| roll.refused.push(format!("the Lease {name} is refused: {why}"));
        for (name, kept) in &self.agents.kept {
            if let Err(why) = &kept.says
                && *name != own
            {
                refuse(name, why);
            }
        }
        for (name, kept) in &self.apiservers.kept {
            if let Err(why) = &kept.says {
                refuse(name, why);
            }
        }
        let beyond = self.agents.beyond + self.apiservers.beyond;
        if beyond > 0 {
            let why = format!("there are {beyond} Leases more than the {MOST} of each kind that are read");
            roll.doubt.get_or_insert(why);
        }
    }

    /// Which node speaks for which host: the one of that name, else the one that says it is on that host.
    fn claims<'a>(&self, hosts: &BTreeMap<&'a str, bool>, roll: &mut Roll) -> BTreeMap<&'a str, ApiserverName> {
        let own = [&self.own];
        let others = self.agents.kept.values().filter_map(|kept| kept.says.as_ref().ok());
        let leases: Vec<&AgentLease> = own
            .into_iter()
            .chain(others.filter(|lease| lease.node != self.own.node))
            .collect();
        let mut claims = BTreeMap::new();
        for host in hosts.keys().copied() {
            let mut claimants: Vec<_> = leases.iter().filter(|lease| lease.host == host).collect();
            match leases.iter().find(|lease| lease.node.as_str() == host) {
                Some(named) => {
                    claimants.retain(|lease| lease.node != named.node);
                    for other in claimants {
                        roll.refused.push(format!(
                            "the Lease {} says it is of the host {host}, whose agent is {}",
                            lease_name(&other.node),
                            named.node
                        ));
                    }
                    claims.insert(host, named.node.clone());
                }
                None => {
                    match claimants.as_slice() {
                        [] => {}
                        [one] => {
                            claims.insert(host, one.node.clone());
                        }
                        [first, ..] => {
                            let names = listed(claimants.iter().map(|lease| lease.node.as_str()));
                            roll.doubt.get_or_insert_with(|| {
                            format!("the agents {names} all say they are on the host {host}: one --node-name for each node")
                        });
                            claims.insert(host, first.node.clone());
                        }
                    }
                }
            }
        }
        claims
    }
}

fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}
