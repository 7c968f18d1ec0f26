//! The state file: what a restart of the agent must not forget.
//!
//! Input: the core's [`Memory`] whenever it has changed. Output: a file of one JSON object, and the memory of the process
//! before this one. Must never make the agent's loop wait for a disk, nor leave half a file: it is written beside its place,
//! synced and moved there. Must never keep an agent from starting: what cannot be read is left out, with a line in the log.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use rebalancer_core::{
    agent::{
        Memory, RememberedEvacuation, RememberedPause, RememberedStrangers, RememberedTransit, RememberedTries, Totals,
    },
    ids::{ApiserverName, ConnectionId},
    planner::Resting,
    table::ClientKey,
};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::wire::WireSwitch;
use crate::sys;

/// The format's version.
const VERSION: u32 = 1;

/// How long a write that failed waits before it is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// How long somebody waits to hear that the file is written.
const PATIENCE: Duration = Duration::from_secs(2);

/// So many octets a second are written at most, and as many are synced: the disk may be etcd's, and in a large cluster every
/// plan changes a file of megabytes.
const PACE: f64 = 1_048_576.0;

/// How large a file may be that is read.
const LARGEST: u64 = 64 << 20;

/// The file's content.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    version: u32,
    /// Whose: a file that was copied from another node says nothing here.
    node: String,
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
    admitted_ms: Option<u64>,
    #[serde(default)]
    takes_all: bool,
    #[serde(default)]
    is_slow: bool,
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

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Written {
    /// Of a memory as it was then; the machine had been up for so long.
    fn of(node: &str, at_unix_ms: u64, up_ms: u64, memory: &Memory) -> Self {
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
                admitted_ms: memory.tries.admitted.map(millis),
                takes_all: memory.tries.takes_all,
                is_slow: memory.tries.is_slow,
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
    fn ago(&self) -> Duration {
        let ago = match self.up_since() {
            Some(up) if self.up_ms > 0 => up - self.up_ms,
            // One that was set back makes it a moment ago.
            _ => unix_ms().saturating_sub(self.at_unix_ms),
        };
        Duration::from_millis(ago)
    }

    fn memory(self) -> Memory {
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
                admitted: self.tries.admitted_ms.map(Duration::from_millis),
                takes_all: self.tries.takes_all,
                is_slow: self.tries.is_slow,
            },
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

/// What the process before this one left, and how long ago; nothing when there is no file or it is of no use, which is said.
pub fn read(path: &Path, node: &str) -> Option<(Memory, Duration)> {
    match try_read(path, node) {
        Ok(found) => found,
        Err(error) => {
            let path = path.display();
            tracing::warn!(
                %path,
                error = format!("{error:#}"),
                "the state file is ignored: pause, cool-downs and what was tried begin anew"
            );
            None
        }
    }
}

fn try_read(path: &Path, node: &str) -> anyhow::Result<Option<(Memory, Duration)>> {
    let length = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        found => found?.len(),
    };
    anyhow::ensure!(length <= LARGEST, "it has {length} octets, {LARGEST} are taken at most");
    let text = fs::read(path)?;
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let Versioned { version } = serde_json::from_slice(&text)?;
    anyhow::ensure!(
        version == VERSION,
        "it has version {version}, this program reads version {VERSION}"
    );
    let written: Written = serde_json::from_slice(&text)?;
    anyhow::ensure!(
        written.node == node,
        "it is of the node {}, this one is {node}",
        written.node
    );
    let ago = written.ago();
    Ok(Some((written.memory(), ago)))
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis)
}

/// A content that is to be written.
#[derive(Debug)]
struct Given {
    node: String,
    at_unix_ms: u64,
    up_ms: u64,
    memory: Memory,
    number: u64,
}

impl Given {
    /// As it is written: no longer than what is read. Where it would be, the cool-downs that end first are left out.
    fn text(&mut self) -> io::Result<Vec<u8>> {
        loop {
            let text = serde_json::to_vec(&Written::of(&self.node, self.at_unix_ms, self.up_ms, &self.memory))?;
            let cooldowns = &mut self.memory.cooldowns;
            if text.len() as u64 <= LARGEST || cooldowns.is_empty() {
                return Ok(text);
            }
            cooldowns.sort_by_key(|resting| std::cmp::Reverse(resting.left));
            cooldowns.truncate(cooldowns.len() / 2);
            tracing::warn!(
                octets = text.len(),
                largest = LARGEST,
                kept = cooldowns.len(),
                "the state file would be too large to be read: cool-downs that end first are left out of it"
            );
        }
    }
}

/// Writes the file, by a thread of its own; of several contents that wait, the newest.
#[derive(Debug)]
pub struct StateFile {
    slot: Arc<Slot>,
    given: u64,
    written: watch::Receiver<u64>,
}

#[derive(Debug, Default)]
struct Slot {
    next: Mutex<Next>,
    filled: Condvar,
}

#[derive(Debug, Default)]
struct Next {
    /// What is to be written.
    given: Option<Given>,
    /// Something is being written.
    is_busy: bool,
    /// Until then nothing is written again that is not pressing.
    rests_until: Option<Instant>,
    /// The agent ends.
    is_ending: bool,
}

impl StateFile {
    /// Starts the thread that writes to `path`.
    ///
    /// # Errors
    ///
    /// The thread cannot be started.
    pub fn start(path: PathBuf) -> anyhow::Result<Self> {
        let slot = Arc::new(Slot::default());
        let (done, written) = watch::channel(0);
        let shared = Arc::clone(&slot);
        thread::Builder::new()
            .name("state-file".to_owned())
            .spawn(move || write_on(&path, &shared, &done))
            .context("--state: cannot start its thread")?;
        Ok(Self {
            slot,
            given: 0,
            written,
        })
    }

    /// Whether it is time for another content: the last one is on the disk, and the longer that was the longer ago.
    pub fn is_ready(&self) -> bool {
        let next = self.slot.next.lock().unwrap_or_else(PoisonError::into_inner);
        let rests = next.rests_until.is_some_and(|until| Instant::now() < until);
        next.given.is_none() && !next.is_busy && !rests
    }

    /// Has the memory written soon; never waits.
    pub fn write(&mut self, node: &str, memory: Memory) {
        self.given += 1;
        let mut next = self.slot.next.lock().unwrap_or_else(PoisonError::into_inner);
        next.given = Some(Given {
            node: node.to_owned(),
            at_unix_ms: unix_ms(),
            up_ms: millis(sys::since_boot()),
            memory,
            number: self.given,
        });
        self.slot.filled.notify_one();
    }

    /// A ticket for what was given last.
    pub fn ticket(&self) -> Ticket {
        Ticket {
            number: self.given,
            written: self.written.clone(),
        }
    }
}

impl Drop for StateFile {
    fn drop(&mut self) {
        self.slot.next.lock().unwrap_or_else(PoisonError::into_inner).is_ending = true;
        self.slot.filled.notify_one();
        // The end of the agent waits a moment for what was given last; a disk that hangs is left to itself.
        let deadline = Instant::now() + PATIENCE;
        while *self.written.borrow() < self.given && Instant::now() < deadline {
            thread::park_timeout(Duration::from_millis(10));
        }
    }
}

/// Waits for one content to be on the disk.
#[derive(Clone, Debug)]
pub struct Ticket {
    number: u64,
    written: watch::Receiver<u64>,
}

impl Ticket {
    /// Whether it is, after a moment at most.
    pub async fn is_written(mut self) -> bool {
        let number = self.number;
        let written = self.written.wait_for(|written| *written >= number);
        matches!(tokio::time::timeout(PATIENCE, written).await, Ok(Ok(_)))
    }
}

fn write_on(path: &Path, slot: &Slot, done: &watch::Sender<u64>) {
    let mut said = String::new();
    loop {
        let mut given = {
            let mut next = slot.next.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                if let Some(given) = next.given.take() {
                    next.is_busy = true;
                    break given;
                }
                if next.is_ending {
                    return;
                }
                next = slot.filled.wait(next).unwrap_or_else(PoisonError::into_inner);
            }
        };
        let replaced = given.text().and_then(|text| {
            replace(path, &text)?;
            Ok(text.len())
        });
        match replaced {
            Ok(octets) => {
                if !said.is_empty() {
                    tracing::info!(path = %path.display(), "the state file is written again");
                }
                said.clear();
                let mut next = slot.next.lock().unwrap_or_else(PoisonError::into_inner);
                next.is_busy = false;
                next.rests_until = Some(Instant::now() + Duration::from_secs_f64(octets as f64 / PACE));
                drop(next);
                // Nobody may wait for it.
                let _ = done.send(given.number);
            }
            Err(error) => {
                let error = error.to_string();
                if error != said {
                    let path = path.display();
                    tracing::error!(%path, error, "the state file cannot be written: a restart would forget what is newer");
                    said = error;
                }
                let mut next = slot.next.lock().unwrap_or_else(PoisonError::into_inner);
                next.is_busy = false;
                if next.is_ending {
                    return;
                }
                if next.given.is_none() {
                    // Nothing newer is there: this one is tried again.
                    next.given = Some(given);
                    let waited = slot.filled.wait_timeout(next, RETRY);
                    drop(waited.unwrap_or_else(PoisonError::into_inner));
                }
            }
        }
    }
}

/// Puts a new content in the file's place, whole or not at all.
fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let mut file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests;
