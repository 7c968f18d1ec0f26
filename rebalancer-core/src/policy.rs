//! What the operator wants, once it is known to make sense.
//!
//! Input: numbers and names as configured. Output: a [`Policy`], or an error that names key, value and allowed range.
//! Must never read where the numbers come from: flags, environment and files are the shell's.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use ipnet::IpNet;

use crate::ids::{ApiserverName, ShimKind};
pub use crate::weight::Weight;

/// Milliseconds in an hour.
const HOUR_MS: u128 = 3_600_000;

/// Whether plans are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Plans are sent to the shim.
    Active,
    /// Everything is decided and recorded, nothing is sent.
    DryRun,
    /// Each rebalancing waits until an operator approves it.
    Propose,
}

/// How many GOAWAYs a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum GoawayRate {
    /// As many as tell all of an apiserver's connections in [`GoawayRate::WHOLE`], so that a rebalancing takes about a
    /// minute whatever the size of the cluster; at least [`GoawayRate::LEAST`], at most [`GoawayRate::MOST`].
    Auto,
    /// So many.
    PerSecond(f64),
}

impl GoawayRate {
    /// Telling all connections of one apiserver takes that long.
    pub const WHOLE: Duration = Duration::from_secs(20);
    /// A second at least: what a small apiserver bears without effort.
    pub const LEAST: f64 = 10.0;
    /// A second at most: each is a TLS handshake where the client lands, about half a millisecond of a processor.
    pub const MOST: f64 = 2_000.0;

    /// How many a second for an apiserver with so many active connections.
    pub fn per_second(self, active: usize) -> f64 {
        match self {
            Self::Auto => (active as f64 / Self::WHOLE.as_secs_f64()).clamp(Self::LEAST, Self::MOST),
            Self::PerSecond(rate) => rate,
        }
    }
}

/// Who is never a victim, by configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exclusions {
    /// Networks of clients.
    pub networks: Vec<IpNet>,
    /// User names.
    pub users: BTreeSet<String>,
    /// Beginnings of user agents, such as `kubelet/`.
    pub user_agents: Vec<String>,
}

impl Exclusions {
    /// Whether one of the lists names this client.
    pub fn matches(&self, client: IpAddr, user: Option<&str>, user_agent: Option<&str>) -> bool {
        self.networks.iter().any(|network| network.contains(&client))
            || user.is_some_and(|user| self.users.contains(user))
            || user_agent.is_some_and(|agent| self.user_agents.iter().any(|prefix| agent.starts_with(prefix.as_str())))
    }
}

/// The rules one agent follows. Build it with [`Policy::checked`].
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// The apiserver of this node.
    pub node: ApiserverName,
    /// The other apiservers.
    pub peers: BTreeSet<ApiserverName>,
    /// What a connection weighs.
    pub weight: Weight,
    /// Skew above which a plan is started (0.10 = 10 % above the mean).
    pub skew_threshold: f64,
    /// Skew at which it stops.
    pub skew_target: f64,
    /// Time between two decisions; the one after a plan that has settled comes earlier.
    pub interval: Duration,
    /// GOAWAYs a second on this apiserver.
    pub goaway_rate: GoawayRate,
    /// Share of the apiserver's connections in one plan, above 0, at most 1.
    pub goaway_share: f64,
    /// Time after a plan's last GOAWAY before the next plan.
    pub settle: Duration,
    /// Younger connections are not victims.
    pub min_connection_age: Duration,
    /// Time in which no client is told twice.
    pub client_cooldown: Duration,
    /// How long the next step of an upgrade is waited for; nothing is waited for with 0.
    pub upgrade_patience: Duration,
    /// Who is never a victim.
    pub exclusions: Exclusions,
    /// What sends the GOAWAY.
    pub shim: ShimKind,
    /// The size of this apiserver relative to the others': its share of the clients is in proportion.
    pub capacity: f64,
    /// Whether plans are carried out.
    pub mode: Mode,
    /// What clients on this node are.
    pub node_local: NodeLocal,
}

/// The age from which on a connection counts, in intervals.
const STAYS_AFTER: f64 = 0.3;

/// What connections from the node itself are: from one of its own addresses, loopback included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NodeLocal {
    /// Counted apart: they would come straight back, and are neither load nor landings.
    #[default]
    Exclude,
    /// Load like others, but never told to go.
    Count,
    /// Clients like others: what is on this node is a load balancer.
    Move,
}

/// A number outside its range.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum PolicyError {
    /// One value is out of range.
    #[error("{key} is {value}: allowed is {allowed}")]
    OutOfRange {
        /// The configuration key, spelled as the flag.
        key: &'static str,
        /// The value as given.
        value: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// The band is upside down.
    #[error(
        "--skew-target {target} is not below --skew-threshold {threshold}: plans would never stop; choose a target below the threshold"
    )]
    TargetAboveThreshold {
        /// The target.
        target: f64,
        /// The threshold.
        threshold: f64,
    },
    /// A prefix that every user agent has.
    #[error("{0} is empty: it would exclude every client; leave it out")]
    EmptyExclusion(&'static str),
    /// A peer has this node's own name.
    #[error("--peer {0} has the name of this node (--node-name): each apiserver is named once")]
    PeerIsSelf(ApiserverName),
}

impl Policy {
    /// Defaults of the contract for one node.
    pub fn new(node: ApiserverName, peers: BTreeSet<ApiserverName>) -> Self {
        Self {
            node,
            peers,
            weight: Weight::Connections,
            skew_threshold: 0.10,
            skew_target: 0.03,
            interval: Duration::from_secs(5),
            goaway_rate: GoawayRate::Auto,
            goaway_share: 0.25,
            settle: Duration::from_secs(10),
            min_connection_age: Duration::from_secs(30),
            client_cooldown: Duration::from_secs(600),
            upgrade_patience: Duration::from_secs(900),
            exclusions: Exclusions::default(),
            shim: ShimKind::None,
            capacity: 1.0,
            mode: Mode::Active,
            node_local: NodeLocal::default(),
        }
    }

    /// A connection counts, as load and as a landing, from that age on: health checks and short calls are over by then. From a
    /// third of it where there are none, and from an interval on where calls are seen to last longer (`table/young.rs`).
    ///
    /// One age for both, or a client that has landed would be load and still on its way; by age and not by sample, so that
    /// all agents begin to count what came at once at once; and no longer than clients may take to land, or the plan would
    /// be over before its landings are seen.
    pub fn stays_after(&self) -> Duration {
        self.interval.mul_f64(STAYS_AFTER)
    }

    /// Checks every value against its range.
    ///
    /// # Errors
    ///
    /// The first value out of range, with its flag and what is allowed.
    pub fn checked(self) -> Result<Self, PolicyError> {
        fn within(key: &'static str, value: f64, ok: bool, allowed: &'static str) -> Result<(), PolicyError> {
            if ok && value.is_finite() {
                return Ok(());
            }
            Err(PolicyError::OutOfRange {
                key,
                value: value.to_string(),
                allowed,
            })
        }
        let Self {
            skew_threshold,
            skew_target,
            goaway_rate,
            goaway_share,
            interval,
            settle,
            min_connection_age,
            client_cooldown,
            upgrade_patience,
            exclusions,
            capacity,
            ..
        } = &self;
        within(
            "--skew-threshold",
            *skew_threshold,
            *skew_threshold > 0.0 && *skew_threshold <= 10.0,
            "above 0, at most 10",
        )?;
        within(
            "--skew-target",
            *skew_target,
            *skew_target >= 0.0 && *skew_target <= 10.0,
            "0 to 10, below --skew-threshold",
        )?;
        if let GoawayRate::PerSecond(rate) = *goaway_rate {
            within(
                "--goaway-rate",
                rate,
                (0.01..=10_000.0).contains(&rate),
                "auto, or 0.01 to 10000 per second",
            )?;
        }
        within(
            "--capacity",
            *capacity,
            (0.01..=1_000.0).contains(capacity),
            "0.01 to 1000, the size of this apiserver relative to the others'",
        )?;
        within(
            "--goaway-share",
            *goaway_share,
            *goaway_share > 0.0 && *goaway_share <= 1.0,
            "above 0, at most 1",
        )?;
        for (key, value, least, most, allowed) in [
            ("--interval", *interval, 100, HOUR_MS, "100ms to 1h"),
            (
                "--settle",
                *settle,
                1_000,
                HOUR_MS,
                "1s to 1h: in that time clients that were told look for another apiserver, and are nowhere to be seen",
            ),
            (
                "--min-connection-age",
                *min_connection_age,
                0,
                24 * HOUR_MS,
                "0s to 24h",
            ),
            (
                "--client-cooldown",
                *client_cooldown,
                1_000,
                7 * 24 * HOUR_MS,
                "1s to 168h: in that time no client is told twice",
            ),
            (
                "--upgrade-patience",
                *upgrade_patience,
                0,
                24 * HOUR_MS,
                "0s to 24h: for so long the next step of an upgrade is waited for",
            ),
        ] {
            if !(least..=most).contains(&value.as_millis()) {
                let value = if value.is_zero() {
                    "0s".to_owned()
                } else {
                    format!("{value:?}")
                };
                return Err(PolicyError::OutOfRange { key, value, allowed });
            }
        }
        if exclusions.users.contains("") {
            return Err(PolicyError::EmptyExclusion("--exclude-user"));
        }
        if exclusions.user_agents.iter().any(String::is_empty) {
            return Err(PolicyError::EmptyExclusion("--exclude-user-agent"));
        }
        if skew_target >= skew_threshold {
            return Err(PolicyError::TargetAboveThreshold {
                target: *skew_target,
                threshold: *skew_threshold,
            });
        }
        if self.peers.contains(&self.node) {
            return Err(PolicyError::PeerIsSelf(self.node));
        }
        Ok(self)
    }

    /// Age from which a peer's snapshot is too old to act on: three intervals, at least 10 s.
    pub fn stale_after(&self) -> Duration {
        (self.interval * 3).max(Duration::from_secs(10))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> Policy {
        Policy::new(ApiserverName::new("a"), BTreeSet::from([ApiserverName::new("b")]))
    }

    #[test]
    fn the_defaults_are_in_range() {
        assert_eq!(policy().checked(), Ok(policy()));
    }

    #[test]
    fn a_value_out_of_range_is_named() {
        for (key, wrong) in [
            (
                "--skew-threshold",
                Policy {
                    skew_threshold: 0.0,
                    ..policy()
                },
            ),
            (
                "--skew-threshold",
                Policy {
                    skew_threshold: f64::NAN,
                    ..policy()
                },
            ),
            (
                "--skew-target",
                Policy {
                    skew_target: -0.1,
                    ..policy()
                },
            ),
            (
                "--goaway-rate",
                Policy {
                    goaway_rate: GoawayRate::PerSecond(0.0),
                    ..policy()
                },
            ),
            (
                "--capacity",
                Policy {
                    capacity: 0.0,
                    ..policy()
                },
            ),
            (
                "--goaway-share",
                Policy {
                    goaway_share: 1.5,
                    ..policy()
                },
            ),
            (
                "--interval",
                Policy {
                    interval: Duration::ZERO,
                    ..policy()
                },
            ),
            (
                "--skew-target",
                Policy {
                    skew_target: 0.2,
                    ..policy()
                },
            ),
            (
                "--goaway-rate",
                Policy {
                    goaway_rate: GoawayRate::PerSecond(1e-20),
                    ..policy()
                },
            ),
            (
                "--settle is 0s",
                Policy {
                    settle: Duration::ZERO,
                    ..policy()
                },
            ),
            (
                "--settle is 999ms: allowed is 1s to 1h",
                Policy {
                    settle: Duration::from_millis(999),
                    ..policy()
                },
            ),
            (
                "--min-connection-age",
                Policy {
                    min_connection_age: Duration::from_secs(86_401),
                    ..policy()
                },
            ),
            (
                "--client-cooldown",
                Policy {
                    client_cooldown: Duration::MAX,
                    ..policy()
                },
            ),
            (
                "--client-cooldown is 0s",
                Policy {
                    client_cooldown: Duration::ZERO,
                    ..policy()
                },
            ),
            (
                "--upgrade-patience",
                Policy {
                    upgrade_patience: Duration::from_secs(86_401),
                    ..policy()
                },
            ),
            (
                "--exclude-user-agent is empty",
                Policy {
                    exclusions: Exclusions {
                        user_agents: vec!["kubelet/".to_owned(), String::new()],
                        ..Exclusions::default()
                    },
                    ..policy()
                },
            ),
            (
                "--node-name",
                Policy {
                    node: ApiserverName::new("b"),
                    ..policy()
                },
            ),
        ] {
            let message = wrong.checked().expect_err("out of range").to_string();
            assert!(message.contains(key), "{message} does not name {key}");
        }
    }

    #[test]
    fn exclusions_match_network_user_and_agent() {
        let exclusions = Exclusions {
            networks: vec!["10.0.0.0/8".parse().expect("a network")],
            users: BTreeSet::from(["admin".to_owned()]),
            user_agents: vec!["kubelet/".to_owned()],
        };
        let elsewhere: IpAddr = "192.0.2.1".parse().expect("an address");
        assert!(exclusions.matches("10.1.2.3".parse().expect("an address"), None, None));
        assert!(exclusions.matches(elsewhere, Some("admin"), None));
        assert!(exclusions.matches(elsewhere, None, Some("kubelet/v1.36")));
        assert!(!exclusions.matches(elsewhere, Some("other"), Some("kubectl/v1")));
    }
}
