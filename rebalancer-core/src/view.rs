//! Snapshots of all apiservers side by side.
//!
//! Job: hold the newest snapshot of each, and say which are missing or stale.
//! Input: snapshots with the instant they came. Output: a [`View`], or the hold that forbids one.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    agent::Switch,
    hold::Hold,
    ids::{ApiserverName, Timestamp},
    membership::Roll,
    release::Release,
};

/// How an apiserver is, as its own node's agent sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ServerState {
    /// It takes connections.
    Ready,
    /// It takes connections since a moment ago: clients are still on their way.
    Starting,
    /// Nobody listens, or what is behind the shim does not answer.
    Down,
    /// Its agent does not know: not seeded yet, events were lost, or the relay before it stands still.
    Unknown,
    /// It takes connections, and is to have none: its clients are told to go, and nobody is sent there.
    Evacuating,
    /// It takes connections, and has more to do than it can: nobody is moved, neither there nor from there.
    Overloaded,
}

/// What an apiserver's agent does about skew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// It tells clients to go when its apiserver is above the target.
    Acts,
    /// It decides and sends nothing: a dry run.
    DryRun,
    /// It does nothing now: no shim, paused, not approved, or in doubt.
    Watches,
}

/// One apiserver's load at one instant.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Which apiserver.
    pub apiserver: ApiserverName,
    /// How it is.
    pub state: ServerState,
    /// Active connections.
    pub connections: u64,
    /// Their load, in the unit of the weight.
    pub load: f64,
    /// The part of it that belongs to clients which are heavier than the target: moving them helps nobody.
    pub unmovable: f64,
    /// Clients on that node: counted apart, unless they are to count.
    pub node_local: u64,
    /// Connections that heard their GOAWAY and still hold old streams.
    pub draining: u64,
    /// Streams open on those.
    pub draining_streams: u64,
    /// GOAWAYs sent since its agent started.
    pub goaways_total: u64,
    /// What those who were told weighed, since its agent started.
    pub told_load_total: f64,
    /// Clients that something else told to go since its agent started: a relay that handed over (see
    /// [`crate::table::ConnectionTable::left_total`]).
    pub left_total: u64,
    /// Requests it refused for overload a short while ago, as far as its shim sees that.
    pub refused: u64,
    /// Landings since its agent started (see [`crate::table::ConnectionTable::accepted_total`]).
    pub accepted_total: u64,
    /// Clients that left since then whom nobody had told (see [`crate::table::ConnectionTable::departed_total`]).
    pub departed_total: u64,
    /// From which age on connections should count, by how long short calls last there; the longest of all is gone by.
    pub counts_after: Duration,
    /// Clients that its agent takes to be in transit, those of all apiservers.
    pub in_transit: u64,
    /// The size of the apiserver relative to the others'.
    pub capacity: f64,
    /// What its agent does about skew.
    pub part: Part,
    /// Whether a plan of its agent is in flight or settling.
    pub plan_in_flight: bool,
    /// Whether its agent takes part in a rebalancing that has not reached the target.
    pub rebalancing: bool,
    /// Names the agent's process: another value means the totals begin anew.
    pub instance: u64,
    /// The names this agent knows, its own included, to notice peers that disagree; none where a peer's is kept.
    pub names: Vec<ApiserverName>,
    /// Which release it is, as far as its shim can tell; the last that was known while it is down.
    pub release: Option<Release>,
    /// How often its agent saw it end since that started.
    pub restarts: u64,
    /// What an operator said to all agents, as this one knows it.
    pub switch: Switch,
}

/// Why a peer's snapshot cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerFault {
    /// It does not answer.
    Unreachable(String),
    /// Its certificate, or what it answered, is wrong.
    Refused(String),
    /// It says it is another apiserver than the one configured under this name, or knows other names.
    Disagrees(String),
}

/// The newest that is known of each peer.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    own: Option<ApiserverName>,
    known: BTreeMap<ApiserverName, Peer>,
    /// Who is who by the cluster's Leases, where peers are found by them.
    roll: Option<Roll>,
    /// Peers are found by Leases, which have not been read yet.
    awaits_roll: bool,
}

/// What is known of one peer.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    /// Its newest snapshot, and when it came.
    pub snapshot: Option<(Timestamp, Snapshot)>,
    /// Why the last attempt failed.
    pub fault: Option<PeerFault>,
    /// When it was first heard to be down after it had been up.
    down_since: Option<Timestamp>,
    /// Why nothing it says may be believed, by the cluster's Leases.
    member_fault: Option<String>,
}

impl Peer {
    /// What stands against it: what its Lease says before what became of the last attempt.
    pub fn trouble(&self) -> Option<String> {
        let fault = self.fault.as_ref().map(PeerFault::to_string);
        self.member_fault.clone().or(fault)
    }
}

/// How the set of apiservers changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// These have left without a word.
    pub gone: Vec<ApiserverName>,
    /// These have come back.
    pub back: Vec<ApiserverName>,
}

/// One apiserver in a view.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its snapshot.
    pub snapshot: Snapshot,
    /// How old that is.
    pub age: Duration,
}

/// The snapshots of all apiservers, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// One entry an apiserver.
    pub entries: BTreeMap<ApiserverName, Entry>,
}

impl Peers {
    /// Expects these peers of `own` and no others.
    pub fn new(own: ApiserverName, names: impl IntoIterator<Item = ApiserverName>) -> Self {
        Self {
            own: Some(own),
            known: names.into_iter().map(|name| (name, Peer::default())).collect(),
            roll: None,
            awaits_roll: false,
        }
    }

    /// Expects nobody yet: who is who comes with the first [`Self::call`], and until then this roll says why.
    pub fn await_roll(&mut self, unread: Roll) {
        self.call(unread);
        self.awaits_roll = true;
    }

    /// Whether who is who is still to be read.
    pub fn awaits_roll(&self) -> bool {
        self.awaits_roll
    }

    /// Whether each has been asked at least once: what an earlier process was told is not the newest before that.
    pub fn were_asked(&self) -> bool {
        let was_asked = |peer: &Peer| peer.snapshot.is_some() || peer.fault.is_some() || peer.member_fault.is_some();
        !self.awaits_roll && self.known.values().all(was_asked)
    }

    /// Whether there is a peer of that name, against whose Lease nothing stands.
    pub fn may_speak(&self, name: &ApiserverName) -> bool {
        self.known.get(name).is_some_and(|peer| peer.member_fault.is_none())
    }

    /// Expects the members of that roll from now on and no others, and says who has gone and who has come back.
    pub fn call(&mut self, roll: Roll) -> Changes {
        let before = |roll: &Option<Roll>| roll.as_ref().map(|roll| roll.gone.clone()).unwrap_or_default();
        let gone_before = before(&self.roll);
        self.known.retain(|name, _| roll.members.contains_key(name));
        for (name, member) in &roll.members {
            let peer = self.known.entry(name.clone()).or_default();
            peer.member_fault.clone_from(&member.fault);
        }
        let changes = Changes {
            gone: roll.gone.difference(&gone_before).cloned().collect(),
            back: gone_before
                .iter()
                .filter(|name| roll.members.contains_key(*name))
                .cloned()
                .collect(),
        };
        self.roll = Some(roll);
        self.awaits_roll = false;
        changes
    }

    /// Who is who by the cluster's Leases; `None` where peers are named by flags.
    pub fn roll(&self) -> Option<&Roll> {
        self.roll.as_ref()
    }

    /// Why nothing may be done whoever answers, by the cluster's Leases.
    pub fn doubt(&self) -> Option<&str> {
        self.roll.as_ref()?.doubt.as_deref()
    }

    /// The names of all apiservers, the own included.
    pub fn names(&self) -> BTreeSet<ApiserverName> {
        self.known.keys().chain(&self.own).cloned().collect()
    }

    /// Why another set of names is not this one's, in words; `None` when it is the same.
    fn differs(&self, names: &[ApiserverName]) -> Option<String> {
        // They come in order, and nearly always are the same: that is seen without making sets of them.
        let is_here = |name: &ApiserverName| self.known.contains_key(name) || self.own.as_ref() == Some(name);
        let are_in_order = names.windows(2).all(|pair| pair[0] < pair[1]);
        let all = self.known.keys().chain(&self.own).count();
        if are_in_order && names.len() == all && names.iter().all(is_here) {
            return None;
        }
        let (here, there) = (self.names(), names.iter().cloned().collect::<BTreeSet<_>>());
        let by_leases = self.roll.is_some();
        if let Some(name) = here.difference(&there).next() {
            let why = if by_leases {
                "its agent sees other Leases, or has just seen them change"
            } else {
                "its --peer flags lack it, or it has another --node-name"
            };
            let there: Vec<_> = there.iter().map(ApiserverName::as_str).collect();
            return Some(format!(
                "it does not know the apiserver {name}, but {}: {why}",
                there.join(", ")
            ));
        }
        let name = there.difference(&here).next()?;
        let what = if by_leases {
            "its agent sees other Leases, or has just seen them change".to_owned()
        } else {
            format!("give this one --peer {name}=URL, or take it from the others")
        };
        Some(format!(
            "it knows an apiserver {name}, which this agent does not: {what}"
        ))
    }

    /// Takes what one peer answered, or why it did not.
    pub fn hear(&mut self, name: &ApiserverName, answer: Result<Snapshot, PeerFault>, now: Timestamp) {
        let differs = answer.as_ref().ok().and_then(|snapshot| self.differs(&snapshot.names));
        let Some(peer) = self.known.get_mut(name) else {
            return;
        };
        match answer {
            Ok(snapshot) if snapshot.apiserver != *name => {
                let said = format!("it calls itself {}", snapshot.apiserver);
                peer.fault = Some(PeerFault::Disagrees(said));
            }
            Ok(_) if differs.is_some() => peer.fault = differs.map(PeerFault::Disagrees),
            Ok(mut snapshot) => {
                // They are this agent's own, as was just seen: kept, every look would copy them once for each peer.
                snapshot.names = Vec::new();
                let is_down = |snapshot: &Snapshot| snapshot.state == ServerState::Down;
                let was_up = peer.snapshot.as_ref().is_some_and(|(_, before)| !is_down(before));
                let down_since = if !is_down(&snapshot) {
                    None
                } else if was_up {
                    Some(now)
                } else {
                    peer.down_since
                };
                *peer = Peer {
                    snapshot: Some((now, snapshot)),
                    fault: None,
                    down_since,
                    member_fault: peer.member_fault.take(),
                }
            }
            Err(fault) => peer.fault = Some(fault),
        }
    }

    /// Whether each has answered since.
    pub fn were_heard_since(&self, since: Timestamp) -> bool {
        let was_heard = |peer: &Peer| peer.snapshot.as_ref().is_some_and(|(at, _)| *at >= since);
        self.known.values().all(was_heard)
    }

    /// How it is by the newest that is known of it.
    pub fn state(&self, name: &ApiserverName) -> Option<ServerState> {
        let (_, snapshot) = self.known.get(name)?.snapshot.as_ref()?;
        Some(snapshot.state)
    }

    /// Each peer with what is known of it.
    pub fn iter(&self) -> impl Iterator<Item = (&ApiserverName, &Peer)> {
        self.known.iter()
    }

    /// What can be shown of all apiservers now, whatever is missing.
    pub fn view(&self, own: Snapshot, now: Timestamp) -> View {
        let mut entries: BTreeMap<_, _> = self
            .known
            .iter()
            .filter_map(|(name, peer)| {
                let (at, snapshot) = peer.snapshot.clone()?;
                Some((
                    name.clone(),
                    Entry {
                        snapshot,
                        age: now.since(at),
                    },
                ))
            })
            .collect();
        entries.insert(
            own.apiserver.clone(),
            Entry {
                snapshot: own,
                age: Duration::ZERO,
            },
        );
        View { entries }
    }

    /// The first reason not to act on what is known, if there is one.
    ///
    /// While the clients of an apiserver that just went down look for another, loads say nothing: that takes `settle`.
    pub fn hold(&self, stale_after: Duration, settle: Duration, now: Timestamp) -> Option<Hold> {
        if let Some(why) = self.doubt() {
            return Some(Hold::MembershipUnknown { why: why.to_owned() });
        }
        let hold = self.peers_hold(stale_after, settle, now);
        // Who does not answer may be gone, which only the API can say.
        match (&hold, self.roll.as_ref().and_then(|roll| roll.blind.as_ref())) {
            (Some(Hold::PeerUnknown { .. } | Hold::SnapshotStale { .. }), Some(blind)) => {
                Some(Hold::MembershipUnknown {
                    why: format!(
                        "{blind}; the set of apiservers is as it was, and not all answer: {}",
                        hold.as_ref().map(Hold::to_string).unwrap_or_default()
                    ),
                })
            }
            _ => hold,
        }
    }

    fn peers_hold(&self, stale_after: Duration, settle: Duration, now: Timestamp) -> Option<Hold> {
        if self.known.is_empty() {
            return Some(Hold::FewerThanTwoApiservers { apiservers: 1 });
        }
        for (name, peer) in &self.known {
            if let Some(why) = peer.member_fault.clone() {
                return Some(Hold::PeerUnknown {
                    peer: name.clone(),
                    why,
                });
            }
            if let Some(fault @ PeerFault::Disagrees(_)) = &peer.fault {
                return Some(Hold::PeerUnknown {
                    peer: name.clone(),
                    why: fault.to_string(),
                });
            }
            match &peer.snapshot {
                None => {
                    let why = peer
                        .fault
                        .as_ref()
                        .map_or("it has not answered yet".to_owned(), PeerFault::to_string);
                    return Some(Hold::PeerUnknown {
                        peer: name.clone(),
                        why,
                    });
                }
                Some((at, _)) if now.since(*at) > stale_after => {
                    return Some(Hold::SnapshotStale {
                        peer: name.clone(),
                        age: now.since(*at),
                        limit: stale_after,
                    });
                }
                Some((_, snapshot)) if snapshot.state == ServerState::Unknown => {
                    let why = "its agent does not know its connections, or its relay stands still: `rebalancer status` there says which".to_owned();
                    return Some(Hold::PeerUnknown {
                        peer: name.clone(),
                        why,
                    });
                }
                Some((_, snapshot)) if snapshot.state == ServerState::Overloaded => {
                    return Some(Hold::ApiserverOverloaded {
                        apiserver: name.clone(),
                        connections: snapshot.connections,
                    });
                }
                Some(_) => {}
            }
            // Its clients are on their way: what the others hold is not theirs to share yet. Nobody waits for a plan for ever.
            if let Some((_, snapshot)) = &peer.snapshot
                && snapshot.state == ServerState::Evacuating
                && snapshot.plan_in_flight
            {
                return Some(Hold::Evacuating {
                    apiserver: name.clone(),
                });
            }
            if peer.down_since.is_some_and(|since| now.since(since) < settle) {
                let snapshot = peer.snapshot.as_ref();
                return Some(Hold::ApiserverStarting {
                    apiserver: name.clone(),
                    up: None,
                    connections: snapshot.map_or(0, |(_, snapshot)| snapshot.connections),
                });
            }
        }
        None
    }
}

impl std::fmt::Display for PeerFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unreachable(why) => write!(f, "unreachable: {why}"),
            Self::Refused(why) => write!(f, "refused: {why}"),
            Self::Disagrees(why) => write!(f, "disagrees: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        agent::Agent,
        membership::{Basis, Member},
        policy::Policy,
    };

    const NOW: Timestamp = Timestamp::from_millis(1_000);

    fn name(name: &str) -> ApiserverName {
        ApiserverName::new(name)
    }

    fn names(names: &[&str]) -> Vec<ApiserverName> {
        names.iter().copied().map(name).collect()
    }

    /// What the agent of `of` says, who knows those names.
    fn snapshot(of: &str, known: &[&str]) -> Snapshot {
        let policy = Policy::new(name(of), BTreeSet::new());
        Snapshot {
            names: names(known),
            state: ServerState::Ready,
            ..Agent::new(policy, 1, NOW).snapshot(NOW)
        }
    }

    fn roll(members: &[&str], gone: &[&str]) -> Roll {
        let member = |of: &&str| {
            let fault = None;
            (name(of), Member { endpoint: None, fault })
        };
        Roll {
            members: members.iter().map(member).collect(),
            gone: gone.iter().copied().map(name).collect(),
            basis: Basis::Identities,
            doubt: None,
            ..Roll::unread("")
        }
    }

    fn hold(peers: &Peers) -> Option<Hold> {
        peers.hold(Duration::from_secs(5), Duration::from_secs(10), NOW)
    }

    fn said(peers: &mut Peers, known: &[&str]) -> String {
        peers.hear(&name("b"), Ok(snapshot("b", known)), NOW);
        hold(peers).map(|hold| hold.to_string()).unwrap_or_default()
    }

    #[test]
    fn agents_know_the_same_apiservers_or_hold() {
        let mut by_flags = Peers::new(name("a"), names(&["b", "c"]));
        by_flags.hear(&name("c"), Ok(snapshot("c", &["a", "b", "c"])), NOW);
        for (known, part) in [
            (&["a", "b"][..], "does not know the apiserver c"),
            (&["a", "b", "c", "d"], "--peer d=URL"),
            // One that has another name than the others call it.
            (&["a", "c", "cp-2"], "does not know the apiserver b"),
        ] {
            let said = said(&mut by_flags, known);
            assert!(said.contains(part), "{said}");
        }
        assert_eq!(said(&mut by_flags, &["a", "b", "c"]), "");
        let mut by_leases = Peers::new(name("a"), []);
        by_leases.call(roll(&["b"], &[]));
        let said = said(&mut by_leases, &["a", "b", "c"]);
        assert!(said.contains("other Leases") && !said.contains("--peer"), "{said}");
    }

    #[test]
    fn a_look_copies_no_peers_list_of_names() {
        let mut peers = Peers::new(name("a"), names(&["b", "c"]));
        for peer in ["b", "c"] {
            peers.hear(&name(peer), Ok(snapshot(peer, &["a", "b", "c"])), NOW);
        }
        let view = peers.view(snapshot("a", &["a", "b", "c"]), NOW);
        let listed = view.entries.values().map(|entry| entry.snapshot.names.len());
        assert_eq!(
            listed.collect::<Vec<_>>(),
            [3, 0, 0],
            "only what is told to the peers is listed"
        );
    }

    #[test]
    fn the_roll_says_who_is_expected_and_who_has_left_and_come_back() {
        let mut peers = Peers::new(name("a"), []);
        assert_eq!(peers.call(Roll::unread("not read yet")), Changes::default());
        assert!(matches!(hold(&peers), Some(Hold::MembershipUnknown { .. })));
        assert_eq!(peers.call(roll(&["b", "c"], &[])), Changes::default());
        for peer in ["b", "c"] {
            peers.hear(&name(peer), Ok(snapshot(peer, &["a", "b", "c"])), NOW);
        }
        assert_eq!(hold(&peers), None);
        let changes = peers.call(roll(&["b"], &["c"]));
        assert_eq!((changes.gone, changes.back), (names(&["c"]), vec![]));
        assert_eq!(peers.names(), BTreeSet::from([name("a"), name("b")]));
        assert_eq!(hold(&peers), None, "what b said stays");
        let changes = peers.call(roll(&["b", "c"], &[]));
        assert_eq!((changes.gone, changes.back), (vec![], names(&["c"])));
        assert!(
            matches!(hold(&peers), Some(Hold::PeerUnknown { .. })),
            "it is asked anew"
        );
    }

    #[test]
    fn a_fault_of_a_lease_counts_more_than_an_answer() {
        let mut peers = Peers::new(name("a"), []);
        let mut doubted = roll(&["b"], &[]);
        peers.call(doubted.clone());
        peers.hear(&name("b"), Ok(snapshot("b", &["a", "b"])), NOW);
        assert_eq!(hold(&peers), None);
        let fault = Some("its Lease names another key".to_owned());
        doubted.members.insert(name("b"), Member { endpoint: None, fault });
        peers.call(doubted);
        peers.hear(&name("b"), Ok(snapshot("b", &["a", "b"])), NOW);
        assert!(hold(&peers).is_some_and(|hold| hold.to_string().contains("another key")));
    }

    #[test]
    fn without_the_api_the_last_roll_is_good_while_all_answer() {
        let mut peers = Peers::new(name("a"), []);
        peers.call(Roll {
            blind: Some("forbidden: grant list".to_owned()),
            ..roll(&["b"], &[])
        });
        peers.hear(&name("b"), Ok(snapshot("b", &["a", "b"])), NOW);
        assert_eq!(hold(&peers), None);
        let later = NOW + Duration::from_secs(6);
        let said = peers
            .hold(Duration::from_secs(5), Duration::ZERO, later)
            .expect("a hold");
        assert_eq!(said.reason(), "membership_unknown");
        assert!(said.to_string().contains("grant list") && said.to_string().contains("peer b"));
    }
}
