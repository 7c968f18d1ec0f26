//! What the state file holds, as it is written.
//!
//! Input: the core's [`Memory`], and when it was so. Output: one JSON object, and the memory again with what has passed since.
//! Must never refuse what an earlier program wrote: what came later may be absent.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rebalancer_core::{
    agent::{
        Memory, RememberedEvacuation, RememberedPause, RememberedStrangers, RememberedTransit, RememberedTries, Totals,
    },
    ids::{ApiserverName, ConnectionId},
    planner::Resting,
    table::ClientKey,
};
use serde::{Deserialize, Serialize};

use crate::{agent::wire::WireSwitch, sys};

/// The format's version.
pub(super) const VERSION: u32 = 1;

/// The file's content.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Written {
    version: u32,
    /// Whose: a file that was copied from another node says nothing here.
    pub node: String,
    /// When, by the wall clock, in milliseconds since 1970: how long ago that was, where the machine was started again since.
    at_unix_ms: u64,
    /// How long the machine was up then, by a clock that nobody sets. Files of before lack it.
    #[serde(default)]
    up_ms: u64,
    /// Which boot of the machine that was. Files of before lack it.
    #[serde(default)]
    boot: String,
    pause: Option<Pause>,
    /// The evacuation that was on; files of before lack it.
    #[serde(default)]
    evacuation: Option<Evacuation>,
    /// What was said to all agents; files of before lack it.
    #[serde(default)]
    switch: WireSwitch,
    cooldowns: Vec<Cooldown>,
    tries: Tries,
    next_decision: u64,
    transit: Transit,
    /// Cookies of connections that drain with a relay which handed over; files of before lack them.
    #[serde(default)]
    draining: Vec<u64>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Pause {
    reason: String,
    left_ms: Option<u64>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Evacuation {
    lasts_ms: u64,
    over_ms: u64,
    listener: Option<u64>,
    /// Files of before lack it.
    #[serde(default)]
    upstream: Option<u64>,
    was_gone: bool,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Cooldown {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    user: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    address: Option<SocketAddr>,
    left_ms: u64,
    told: usize,
    allowed: usize,
}

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Tries {
    wait_ms: u64,
    left_ms: u64,
    in_vain: u64,
    /// From here on files of before lack it.
    #[serde(default)]
    limit: usize,
    #[serde(default)]
    changed_ms: Option<u64>,
    #[serde(default)]
    admitted_ms: Option<u64>,
    #[serde(default)]
    takes_all: bool,
    #[serde(default)]
    is_slow: bool,
    /// On which apiservers; here, where programs of before read over it.
    #[serde(default)]
    ready: Vec<String>,
}

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Transit {
    told: u64,
    landed: u64,
    told_load: f64,
    /// Files of before lack it.
    #[serde(default)]
    seen: BTreeMap<String, Seen>,
    /// How many clients left and came a second, by apiserver, in the last windows; files of before lack both.
    #[serde(default)]
    leave_untold: Vec<BTreeMap<String, f64>>,
    #[serde(default)]
    come_untold: Vec<BTreeMap<String, f64>>,
}

/// The totals of an apiserver's agent, as they were seen last.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Seen {
    instance: u64,
    goaways: u64,
    left: u64,
    accepted: u64,
    told_load: f64,
    each: f64,
    connections: u64,
    /// Files of before lack it.
    #[serde(default)]
    departed: u64,
}

impl From<Totals> for Seen {
    fn from(totals: Totals) -> Self {
        Self {
            instance: totals.instance,
            goaways: totals.goaways,
            left: totals.left,
            accepted: totals.accepted,
            told_load: totals.told_load,
            each: totals.each,
            connections: totals.connections,
            departed: totals.departed,
        }
    }
}

impl From<Seen> for Totals {
    fn from(seen: Seen) -> Self {
        Self {
            instance: seen.instance,
            goaways: seen.goaways,
            left: seen.left,
            accepted: seen.accepted,
            told_load: seen.told_load,
            each: seen.each,
            connections: seen.connections,
            departed: seen.departed,
        }
    }
}

impl Transit {
    fn of(transit: &RememberedTransit, strangers: &RememberedStrangers) -> Self {
        let window = |window: &BTreeMap<ApiserverName, f64>| {
            let rates = window.iter();
            rates.map(|(name, rate)| (name.as_str().to_owned(), *rate)).collect()
        };
        let seen = transit.seen.iter();
        Self {
            told: transit.told,
            landed: transit.landed,
            told_load: transit.told_load,
            leave_untold: strangers.departures.iter().map(window).collect(),
            come_untold: strangers.landings.iter().map(window).collect(),
            seen: seen
                .map(|(name, totals)| (name.as_str().to_owned(), (*totals).into()))
                .collect(),
        }
    }

    fn remembered(self) -> (RememberedTransit, RememberedStrangers) {
        let window = |window: BTreeMap<String, f64>| {
            let rates = window.into_iter();
            rates.map(|(name, rate)| (ApiserverName::new(name), rate)).collect()
        };
        let strangers = RememberedStrangers {
            departures: self.leave_untold.into_iter().map(window).collect(),
            landings: self.come_untold.into_iter().map(window).collect(),
        };
        let seen = self.seen.into_iter();
        let transit = RememberedTransit {
            told: self.told,
            landed: self.landed,
            told_load: self.told_load,
            seen: seen
                .map(|(name, seen)| (ApiserverName::new(name), seen.into()))
                .collect(),
        };
        (transit, strangers)
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Written {
    /// Of a memory as it was then; the machine had been up for so long.
    pub fn of(node: &str, at_unix_ms: u64, up_ms: u64, memory: &Memory) -> Self {
        let cooldown = |resting: &Resting| {
            let (user, address) = match &resting.client {
                ClientKey::User(user) => (Some(user.to_string()), None),
                ClientKey::Address(address) => (None, Some(*address)),
            };
            Cooldown {
                user,
                address,
                left_ms: millis(resting.left),
                told: resting.told,
                allowed: resting.allowed,
            }
        };
        Self {
            version: VERSION,
            node: node.to_owned(),
            at_unix_ms,
            up_ms,
            boot: sys::boot_id(),
            evacuation: memory.evacuation.as_ref().map(|evacuation| Evacuation {
                lasts_ms: millis(evacuation.lasts),
                over_ms: millis(evacuation.over),
                listener: evacuation.listener,
                upstream: evacuation.upstream,
                was_gone: evacuation.was_gone,
            }),
            pause: memory.pause.as_ref().map(|pause| Pause {
                reason: pause.reason.clone(),
                left_ms: pause.left.map(millis),
            }),
            switch: (&memory.switch).into(),
            cooldowns: memory.cooldowns.iter().map(cooldown).collect(),
            tries: Tries {
                wait_ms: millis(memory.tries.wait),
                left_ms: millis(memory.tries.left),
                in_vain: memory.tries.in_vain,
                limit: memory.tries.limit,
                changed_ms: memory.tries.changed.map(millis),
                admitted_ms: memory.tries.admitted.map(millis),
                takes_all: memory.tries.takes_all,
                is_slow: memory.tries.is_slow,
                ready: memory.ready.iter().map(|name| name.as_str().to_owned()).collect(),
            },
            next_decision: memory.next_decision,
            transit: Transit::of(&memory.transit, &memory.strangers),
            draining: memory.draining.iter().map(|id| id.0).collect(),
        }
    }

    /// How long the machine is up by now, unless it was started again since.
    fn up_since(&self) -> Option<u64> {
        let (up, boot) = (millis(sys::since_boot()), sys::boot_id());
        let is_known = !self.boot.is_empty() && !boot.is_empty();
        (up >= self.up_ms && (!is_known || self.boot == boot)).then_some(up)
    }

    /// How long ago that was. A wall clock may have been set since, so it counts only where no other clock went on.
    pub fn ago(&self) -> Duration {
        let ago = match self.up_since() {
            Some(up) if self.up_ms > 0 => up - self.up_ms,
            // One that was set back makes it a moment ago.
            _ => unix_ms().saturating_sub(self.at_unix_ms),
        };
        Duration::from_millis(ago)
    }

    /// What it says, for the next process.
    pub fn memory(self) -> Memory {
        let cooldown = |cooldown: Cooldown| {
            let client = match (cooldown.address, cooldown.user) {
                (Some(address), _) => ClientKey::Address(address),
                (None, user) => ClientKey::User(user.unwrap_or_default().into()),
            };
            Resting {
                client,
                left: Duration::from_millis(cooldown.left_ms),
                told: cooldown.told,
                allowed: cooldown.allowed,
            }
        };
        let is_rebooted = self.up_since().is_none();
        let (transit, strangers) = self.transit.remembered();
        Memory {
            pause: self.pause.map(|pause| RememberedPause {
                reason: pause.reason,
                left: pause.left_ms.map(Duration::from_millis),
            }),
            switch: self.switch.into(),
            evacuation: self.evacuation.map(|evacuation| RememberedEvacuation {
                lasts: Duration::from_millis(evacuation.lasts_ms),
                over: Duration::from_millis(evacuation.over_ms),
                listener: evacuation.listener,
                upstream: evacuation.upstream,
                was_gone: evacuation.was_gone,
                // With the machine the apiserver was started again, which ends it.
                is_over: is_rebooted,
            }),
            cooldowns: self.cooldowns.into_iter().map(cooldown).collect(),
            tries: RememberedTries {
                wait: Duration::from_millis(self.tries.wait_ms),
                left: Duration::from_millis(self.tries.left_ms),
                in_vain: self.tries.in_vain,
                limit: self.tries.limit,
                changed: self.tries.changed_ms.map(Duration::from_millis),
                admitted: self.tries.admitted_ms.map(Duration::from_millis),
                takes_all: self.tries.takes_all,
                is_slow: self.tries.is_slow,
            },
            ready: self.tries.ready.into_iter().map(ApiserverName::new).collect(),
            next_decision: self.next_decision,
            transit,
            strangers,
            // Cookies begin anew with the machine, which has closed them all.
            draining: if is_rebooted {
                Vec::new()
            } else {
                self.draining.into_iter().map(ConnectionId).collect()
            },
        }
    }
}

/// By the wall clock, in milliseconds since 1970.
pub(super) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis)
}
