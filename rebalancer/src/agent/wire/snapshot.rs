//! Snapshots as agents tell them to each other, and what agents must be told alike.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use rebalancer_core::{
    agent::{Switch, SwitchPause},
    ids::ApiserverName,
    policy::{Policy, Weight},
    release::Release,
    view::{Part, PeerFault, ServerState, Snapshot},
};
use serde::{Deserialize, Serialize};

use super::millis;

/// A snapshot between agents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WireSnapshot {
    /// The format's version.
    pub version: u32,
    /// Which apiserver.
    pub apiserver: String,
    /// `ready`, `starting`, `down`, `unknown`, `evacuating` or `overloaded`.
    pub state: WireState,
    /// Active connections.
    pub connections: u64,
    /// Their load.
    pub load: f64,
    /// The part of it that no move can place.
    pub unmovable: f64,
    /// Clients on that node; 0 from agents that do not tell.
    #[serde(default)]
    pub node_local: u64,
    /// Connections that heard their GOAWAY.
    pub draining: u64,
    /// Streams open on those.
    pub draining_streams: u64,
    /// What those who were told weighed.
    pub told_load_total: f64,
    /// Clients that a relay told to go when it handed over.
    pub left_total: u64,
    /// Requests refused for overload a short while ago.
    pub refused: u64,
    /// GOAWAYs since the agent started.
    pub goaways_total: u64,
    /// Connections accepted since then.
    pub accepted_total: u64,
    /// Clients that left since then and were told by nobody; 0 from agents that do not tell.
    #[serde(default)]
    pub departed_total: u64,
    /// From which age on connections should count there, in milliseconds; 0 from agents that do not tell.
    #[serde(default)]
    pub counts_after_ms: u64,
    /// Clients that its agent takes to be on their way, those of all apiservers.
    pub in_transit: u64,
    /// Its size relative to the others'.
    pub capacity: f64,
    /// What its agent does about skew.
    pub part: WirePart,
    /// Whether a plan is in flight.
    pub plan_in_flight: bool,
    /// Whether it takes part in a rebalancing.
    pub rebalancing: bool,
    /// Names the process.
    pub instance: u64,
    /// The apiservers it knows, its own included.
    pub names: Vec<String>,
    /// Which release it is, where that is known.
    pub release: Option<String>,
    /// How often it was seen to end since its agent started.
    pub restarts: u64,
    /// The flags all agents must be given alike, with its values.
    pub policy: BTreeMap<String, String>,
    /// What an operator said to all agents.
    pub switch: WireSwitch,
}

/// [`Switch`] as JSON has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireSwitch {
    /// Counts up with each word.
    pub stamp: u64,
    /// On which node it was said.
    pub by: Option<String>,
    /// The pause, if it is one.
    pub pause: Option<WirePause>,
}

/// [`SwitchPause`] as JSON has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WirePause {
    /// What for.
    pub reason: String,
    /// How long yet.
    pub left_ms: Option<u64>,
}

impl WireSwitch {
    /// Whether an operator can have said it.
    fn is_fit(&self) -> bool {
        let is_long = |pause: &WirePause| {
            pause.reason.len() > LONGEST_REASON || pause.left_ms.is_some_and(|left| left > LONGEST_PAUSE_MS)
        };
        self.stamp <= MOST_WORDS && !self.pause.as_ref().is_some_and(is_long)
    }
}

impl From<&Switch> for WireSwitch {
    fn from(switch: &Switch) -> Self {
        Self {
            stamp: switch.stamp,
            by: switch.by.as_ref().map(ToString::to_string),
            pause: switch.pause.as_ref().map(|pause| WirePause {
                reason: pause.reason.clone(),
                left_ms: pause.left.map(millis),
            }),
        }
    }
}

impl From<WireSwitch> for Switch {
    fn from(switch: WireSwitch) -> Self {
        Self {
            stamp: switch.stamp,
            by: switch.by.map(ApiserverName::new),
            pause: switch.pause.map(|pause| SwitchPause {
                reason: pause.reason,
                left: pause.left_ms.map(Duration::from_millis),
            }),
        }
    }
}

/// The longest reason of a pause, in octets.
pub const LONGEST_REASON: usize = 1_024;

/// The longest pause that ends by itself: a year.
pub const LONGEST_PAUSE_MS: u64 = 31_536_000_000;

/// So many words to all are more than anybody says; above it, JSON's readers lose count.
const MOST_WORDS: u64 = 1 << 52;

/// The format's version: agents of different ones do not understand each other.
///
/// It goes up with every member that is new, gone, or means something else.
pub const SNAPSHOT_VERSION: u32 = 6;

/// What is read of an answer that is not understood otherwise: which agents are paused does not depend on what they agree on.
#[derive(Deserialize)]
struct Worded {
    apiserver: String,
    switch: WireSwitch,
}

/// What is read of an answer first: all versions have it.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// `connections`, `requests`, `bytes` or `streams`.
pub fn weight_name(weight: Weight) -> &'static str {
    match weight {
        Weight::Connections => "connections",
        Weight::Requests => "requests",
        Weight::Bytes => "bytes",
        Weight::Streams => "streams",
    }
}

/// The flags all agents must be given alike: a plan is each donor's part of what all of them reckon alike.
pub fn agreement(policy: &Policy) -> BTreeMap<String, String> {
    [
        ("--weight", weight_name(policy.weight).to_owned()),
        ("--skew-threshold", policy.skew_threshold.to_string()),
        ("--skew-target", policy.skew_target.to_string()),
        ("--client-cooldown", format!("{:?}", policy.client_cooldown)),
        // Landings are counted from an age that follows from it, here and there from the same.
        ("--interval", format!("{:?}", policy.interval)),
    ]
    .map(|(flag, value)| (flag.to_owned(), value))
    .into()
}

/// [`ServerState`] as JSON has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WireState {
    /// It takes connections.
    Ready,
    /// Since a moment ago.
    Starting,
    /// Nobody listens.
    Down,
    /// Its agent does not know.
    Unknown,
    /// It is to have no clients.
    Evacuating,
    /// It has more to do than it can.
    Overloaded,
}

/// [`Part`] as JSON has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WirePart {
    /// It tells clients to go.
    Acts,
    /// It only says what it would do.
    DryRun,
    /// It does nothing now.
    Watches,
}

impl From<Part> for WirePart {
    fn from(part: Part) -> Self {
        match part {
            Part::Acts => Self::Acts,
            Part::DryRun => Self::DryRun,
            Part::Watches => Self::Watches,
        }
    }
}

impl From<WirePart> for Part {
    fn from(part: WirePart) -> Self {
        match part {
            WirePart::Acts => Self::Acts,
            WirePart::DryRun => Self::DryRun,
            WirePart::Watches => Self::Watches,
        }
    }
}

impl From<ServerState> for WireState {
    fn from(state: ServerState) -> Self {
        match state {
            ServerState::Ready => Self::Ready,
            ServerState::Starting => Self::Starting,
            ServerState::Down => Self::Down,
            ServerState::Unknown => Self::Unknown,
            ServerState::Evacuating => Self::Evacuating,
            ServerState::Overloaded => Self::Overloaded,
        }
    }
}

impl From<WireState> for ServerState {
    fn from(state: WireState) -> Self {
        match state {
            WireState::Ready => Self::Ready,
            WireState::Starting => Self::Starting,
            WireState::Down => Self::Down,
            WireState::Unknown => Self::Unknown,
            WireState::Evacuating => Self::Evacuating,
            WireState::Overloaded => Self::Overloaded,
        }
    }
}

impl WireSnapshot {
    /// What a peer is told.
    pub fn of(snapshot: &Snapshot, policy: &Policy) -> Self {
        Self {
            version: SNAPSHOT_VERSION,
            apiserver: snapshot.apiserver.to_string(),
            state: snapshot.state.into(),
            connections: snapshot.connections,
            load: snapshot.load,
            unmovable: snapshot.unmovable,
            draining: snapshot.draining,
            draining_streams: snapshot.draining_streams,
            told_load_total: snapshot.told_load_total,
            left_total: snapshot.left_total,
            refused: snapshot.refused,
            goaways_total: snapshot.goaways_total,
            node_local: snapshot.node_local,
            accepted_total: snapshot.accepted_total,
            departed_total: snapshot.departed_total,
            counts_after_ms: millis(snapshot.counts_after),
            in_transit: snapshot.in_transit,
            capacity: snapshot.capacity,
            part: snapshot.part.into(),
            plan_in_flight: snapshot.plan_in_flight,
            rebalancing: snapshot.rebalancing,
            instance: snapshot.instance,
            names: snapshot.names.iter().map(ToString::to_string).collect(),
            release: snapshot.release.as_ref().map(ToString::to_string),
            restarts: snapshot.restarts,
            policy: agreement(policy),
            switch: (&snapshot.switch).into(),
        }
    }

    /// What a peer answered, for the core.
    ///
    /// # Errors
    ///
    /// It is no snapshot, or one that this agent cannot reckon with: in words.
    pub fn read(body: &[u8], policy: &Policy) -> Result<Snapshot, PeerFault> {
        let garbled = |error: serde_json::Error| PeerFault::Refused(format!("its answer is no snapshot: {error}"));
        let Versioned { version } = serde_json::from_slice(body).map_err(garbled)?;
        if version != SNAPSHOT_VERSION {
            return Err(PeerFault::Disagrees(format!(
                "its snapshots have version {version}, this agent's have {SNAPSHOT_VERSION}: they are of different \
                 releases, and go on when all agents are of one"
            )));
        }
        let snapshot: Self = serde_json::from_slice(body).map_err(garbled)?;
        snapshot.checked(policy).map_err(PeerFault::Disagrees)
    }

    /// What the agent of that apiserver says was said to all, whatever else it says.
    pub fn word_of(apiserver: &ApiserverName, body: &[u8]) -> Option<Switch> {
        let said: Worded = serde_json::from_slice(body).ok()?;
        let is_fit = said.apiserver == apiserver.as_str() && said.switch.is_fit();
        is_fit.then(|| said.switch.into())
    }

    fn checked(self, policy: &Policy) -> Result<Snapshot, String> {
        let ours = agreement(policy);
        let flags: BTreeSet<&String> = ours.keys().chain(self.policy.keys()).collect();
        for flag in flags {
            let (here, there) = (ours.get(flag), self.policy.get(flag));
            if here != there {
                let said = |value: Option<&String>| value.map_or("unknown", String::as_str).to_owned();
                return Err(format!(
                    "its {flag} is {}, this agent's is {}: give all agents the same",
                    said(there),
                    said(here)
                ));
            }
        }
        for (what, value) in [
            ("load", self.load),
            ("unmovable load", self.unmovable),
            ("told load", self.told_load_total),
        ] {
            if !value.is_finite() || value < 0.0 {
                return Err(format!("its {what} is {value}"));
            }
        }
        if !self.switch.is_fit() {
            return Err("its pause of all agents is none that an operator can have said".to_owned());
        }
        let release = self.release.as_deref().and_then(Release::new);
        if release.is_none() && self.release.is_some() {
            return Err("its release is none".to_owned());
        }
        if !(0.01..=1_000.0).contains(&self.capacity) {
            return Err(format!("its capacity is {}", self.capacity));
        }
        Ok(Snapshot {
            apiserver: ApiserverName::new(self.apiserver),
            state: self.state.into(),
            connections: self.connections,
            load: self.load,
            unmovable: self.unmovable,
            draining: self.draining,
            draining_streams: self.draining_streams,
            told_load_total: self.told_load_total,
            left_total: self.left_total,
            refused: self.refused,
            goaways_total: self.goaways_total,
            node_local: self.node_local,
            accepted_total: self.accepted_total,
            departed_total: self.departed_total,
            counts_after: Duration::from_millis(self.counts_after_ms),
            in_transit: self.in_transit,
            capacity: self.capacity,
            part: self.part.into(),
            plan_in_flight: self.plan_in_flight,
            rebalancing: self.rebalancing,
            instance: self.instance,
            names: self.names.into_iter().map(ApiserverName::new).collect(),
            release,
            restarts: self.restarts,
            switch: self.switch.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rebalancer_core::{
        agent::Agent,
        ids::Timestamp,
        policy::{Mode, Weight},
    };
    use serde_json::{Value, json};

    use super::*;

    fn policy(node: &str, peers: &[&str]) -> Policy {
        let peers = peers.iter().map(|name| ApiserverName::new(*name)).collect();
        Policy::new(ApiserverName::new(node), peers)
    }

    /// What the agent of `policy` answers.
    fn answer(policy: &Policy) -> Value {
        let agent = Agent::new(policy.clone(), 1, Timestamp::from_millis(0));
        let snapshot = agent.snapshot(Timestamp::from_millis(0));
        serde_json::to_value(WireSnapshot::of(&snapshot, policy)).expect("JSON")
    }

    fn read(answer: &Value) -> Result<Snapshot, PeerFault> {
        WireSnapshot::read(answer.to_string().as_bytes(), &policy("a", &["b", "c"]))
    }

    fn disagrees(answer: &Value) -> String {
        match read(answer) {
            Err(PeerFault::Disagrees(said)) => said,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn agents_that_agree_understand_each_other() {
        let b = policy("b", &["a", "c"]);
        assert!(read(&answer(&b)).is_ok());
    }

    #[test]
    fn a_flag_that_differs_is_named_with_both_values() {
        let b = || policy("b", &["a", "c"]);
        for (theirs, parts) in [
            (
                Policy {
                    skew_target: 0.05,
                    ..b()
                },
                ["--skew-target", "0.05", "0.03"],
            ),
            (
                Policy {
                    skew_threshold: 0.2,
                    ..b()
                },
                ["--skew-threshold", "0.2", "0.1"],
            ),
            (
                Policy {
                    weight: Weight::Bytes,
                    ..b()
                },
                ["--weight", "bytes", "connections"],
            ),
            (
                Policy {
                    client_cooldown: Duration::from_secs(60),
                    ..b()
                },
                ["--client-cooldown", "60s", "600s"],
            ),
            (
                Policy {
                    interval: Duration::from_secs(1),
                    ..b()
                },
                ["--interval", "1s", "5s"],
            ),
        ] {
            let said = disagrees(&answer(&theirs));
            for part in parts {
                assert!(said.contains(part), "{said}");
            }
        }
        // What may differ: how fast, whether anything is sent, who is left alone.
        let theirs = Policy {
            mode: Mode::DryRun,
            goaway_rate: rebalancer_core::policy::GoawayRate::PerSecond(1.0),
            ..b()
        };
        assert!(read(&answer(&theirs)).is_ok());
    }

    #[test]
    fn a_word_to_all_travels_whole_and_within_bounds() {
        let b = policy("b", &["a", "c"]);
        let mut said = answer(&b);
        said["switch"] = json!({"stamp": 7, "by": "b", "pause": {"reason": "upgrade", "left_ms": 60_000}});
        let switch = read(&said).expect("a snapshot").switch;
        assert_eq!(
            serde_json::to_value(WireSwitch::from(&switch)).expect("JSON"),
            said["switch"]
        );
        for (field, wrong) in [
            ("stamp", json!(u64::MAX)),
            (
                "pause",
                json!({"reason": "x".repeat(LONGEST_REASON + 1), "left_ms": null}),
            ),
            ("pause", json!({"reason": "", "left_ms": LONGEST_PAUSE_MS + 1})),
        ] {
            let mut said = said.clone();
            said["switch"][field] = wrong;
            assert!(disagrees(&said).contains("pause of all agents"), "{field}");
        }
    }

    #[test]
    fn a_word_to_all_is_heard_of_whoever_disagrees() {
        let b = ApiserverName::new("b");
        let mut said = answer(&policy("b", &["a", "c"]));
        said["switch"] = json!({"stamp": 7, "by": "b", "pause": {"reason": "upgrade", "left_ms": null}});
        said["policy"]["--skew-target"] = json!("0.07");
        said["version"] = json!(SNAPSHOT_VERSION + 1);
        said.as_object_mut().expect("an object").remove("load");
        assert!(disagrees(&said).contains("version"));
        let word = |said: &Value, of: &str| WireSnapshot::word_of(&ApiserverName::new(of), said.to_string().as_bytes());
        assert_eq!(word(&said, "b").map(|word| word.stamp), Some(7));
        assert_eq!(word(&said, "a"), None, "it calls itself b");
        said["switch"]["stamp"] = json!(u64::MAX);
        assert_eq!(word(&said, "b"), None);
        assert_eq!(WireSnapshot::word_of(&b, b"{}"), None);
    }

    #[test]
    fn another_release_is_told_as_one() {
        let mut other = answer(&policy("b", &["a", "c"]));
        other["version"] = json!(1);
        other.as_object_mut().expect("an object").remove("policy");
        assert!(disagrees(&other).contains("version 1"), "before what is missing");
        for garbled in [json!({}), json!("ok"), json!({"version": SNAPSHOT_VERSION})] {
            assert!(matches!(read(&garbled), Err(PeerFault::Refused(_))), "{garbled}");
        }
        let mut wrong = answer(&policy("b", &["a", "c"]));
        wrong["load"] = json!(-1.0);
        assert!(disagrees(&wrong).contains("load"));
    }
}
