//! The state file: what a restart of the agent must not forget.
//!
//! Input: the core's [`Memory`] whenever it has changed. Output: a file of one JSON object, and the memory of the process
//! before this one. Must never make the agent's loop wait for a disk, nor leave half a file: it is written beside its place,
//! synced and moved there. Must never keep an agent from starting: what cannot be read is left out, with a line in the log.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use rebalancer_core::{
    agent::{Memory, RememberedEvacuation, RememberedPause, RememberedTransit, RememberedTries},
    ids::ConnectionId,
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

/// How large a file may be that is read.
const LARGEST: u64 = 64 << 20;

/// The file's content.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    version: u32,
    /// Whose: a file that was copied from another node says nothing here.
    node: String,
    /// When, by the wall clock, in milliseconds since 1970: how long ago that was is all it is used for.
    at_unix_ms: u64,
    /// How long the machine was up then: it was started again when it is not up for as long now. Files of before lack it.
    #[serde(default)]
    up_ms: u64,
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
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Written {
    fn of(node: &str, at_unix_ms: u64, memory: &Memory) -> Self {
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
            up_ms: millis(sys::since_boot()),
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
            transit: Transit {
                told: memory.transit.told,
                landed: memory.transit.landed,
                told_load: memory.transit.told_load,
            },
            draining: memory.draining.iter().map(|id| id.0).collect(),
        }
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
        let is_rebooted = self.up_ms > millis(sys::since_boot());
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
            transit: RememberedTransit {
                told: self.transit.told,
                landed: self.transit.landed,
                told_load: self.transit.told_load,
            },
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
    // A clock that was set back since makes it a moment ago.
    let ago = Duration::from_millis(unix_ms().saturating_sub(written.at_unix_ms));
    Ok(Some((written.memory(), ago)))
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis)
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
    /// What is to be written, and its number.
    next: Mutex<(Option<Vec<u8>>, u64, bool)>,
    filled: Condvar,
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

    /// Has the memory written soon; never waits.
    pub fn write(&mut self, node: &str, memory: &Memory) {
        let text = serde_json::to_vec(&Written::of(node, unix_ms(), memory));
        debug_assert!(text.is_ok(), "numbers and strings are JSON");
        let Ok(text) = text else { return };
        self.given += 1;
        let mut next = self.slot.next.lock().unwrap_or_else(PoisonError::into_inner);
        *next = (Some(text), self.given, false);
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
        self.slot.next.lock().unwrap_or_else(PoisonError::into_inner).2 = true;
        self.slot.filled.notify_one();
        // The end of the agent waits a moment for what was given last; a disk that hangs is left to itself.
        let deadline = std::time::Instant::now() + PATIENCE;
        while *self.written.borrow() < self.given && std::time::Instant::now() < deadline {
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
        let (text, number) = {
            let mut next = slot.next.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                if let Some(text) = next.0.take() {
                    break (text, next.1);
                }
                if next.2 {
                    return;
                }
                next = slot.filled.wait(next).unwrap_or_else(PoisonError::into_inner);
            }
        };
        match replace(path, &text) {
            Ok(()) => {
                if !said.is_empty() {
                    tracing::info!(path = %path.display(), "the state file is written again");
                }
                said.clear();
                // Nobody may wait for it.
                let _ = done.send(number);
            }
            Err(error) => {
                let error = error.to_string();
                if error != said {
                    let path = path.display();
                    tracing::error!(%path, error, "the state file cannot be written: a restart would forget what is newer");
                    said = error;
                }
                let mut next = slot.next.lock().unwrap_or_else(PoisonError::into_inner);
                if next.2 {
                    return;
                }
                if next.0.is_none() {
                    // Nothing newer is there: this one is tried again.
                    next.0 = Some(text);
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
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use rebalancer_core::{
        agent::{Switch, SwitchPause},
        ids::ApiserverName,
    };

    use super::*;

    fn memory() -> Memory {
        let resting = |client| Resting {
            client,
            left: Duration::from_secs(599),
            told: 1,
            allowed: 2,
        };
        Memory {
            pause: Some(RememberedPause {
                reason: "upgrade of cp-2, \"by hand\"".to_owned(),
                left: Some(Duration::from_secs(7_200)),
            }),
            switch: Switch {
                stamp: 3,
                by: Some(ApiserverName::new("b")),
                pause: Some(SwitchPause {
                    reason: "all of them".to_owned(),
                    left: None,
                }),
            },
            evacuation: Some(RememberedEvacuation {
                lasts: Duration::from_secs(90),
                over: Duration::from_secs(60),
                listener: Some(7),
                upstream: Some(8),
                was_gone: true,
                is_over: false,
            }),
            cooldowns: vec![
                resting(ClientKey::User("system:node:a".into())),
                resting(ClientKey::Address("[2001:db8::1]:5".parse().expect("an address"))),
            ],
            tries: RememberedTries {
                wait: Duration::from_secs(60),
                left: Duration::from_secs(30),
                in_vain: 20,
                limit: 48,
                admitted: Some(Duration::from_secs(12)),
                takes_all: true,
                is_slow: true,
            },
            draining: vec![ConnectionId(7), ConnectionId(1 << 40)],
            next_decision: 1_001,
            transit: RememberedTransit {
                told: 50,
                landed: 12,
                told_load: 50.5,
            },
        }
    }

    #[tokio::test]
    async fn what_is_written_is_read_by_the_next_process() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("agent.state");
        assert_eq!(read(&path, "a"), None, "there is none at the first start");
        let mut file = StateFile::start(path.clone()).expect("a thread");
        for next_decision in [1, 1_001] {
            file.write(
                "a",
                &Memory {
                    next_decision,
                    ..memory()
                },
            );
        }
        assert!(file.ticket().is_written().await);
        let (remembered, _) = read(&path, "a").expect("a memory");
        assert_eq!(remembered, memory());
        assert_eq!(fs::metadata(&path).expect("a file").permissions().mode() & 0o777, 0o600);
        // What is given last is written although the agent ends at once.
        file.write("a", &Memory::default());
        drop(file);
        assert_eq!(read(&path, "a").expect("a memory").0, Memory::default());
    }

    #[test]
    fn what_cannot_be_read_is_left_out() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("agent.state");
        let whole = serde_json::to_string(&Written::of("a", 1, &memory())).expect("JSON");
        let another = serde_json::to_string(&Written::of("b", 1, &memory())).expect("JSON");
        let newer = whole.replacen("\"version\":1", "\"version\":2", 1);
        for useless in [
            "",
            "{}",
            "[]",
            &whole[..whole.len() / 2],
            &newer,
            &another,
            "\u{0}\u{0}",
        ] {
            fs::write(&path, useless).expect("a file");
            assert_eq!(read(&path, "a"), None, "{useless}");
        }
        fs::write(&path, &whole).expect("a file");
        let (_, ago) = read(&path, "a").expect("a memory");
        assert!(
            ago > Duration::from_secs(50 * 365 * 86_400),
            "it was written in 1970: {ago:?}"
        );
        // The machine was started again since.
        let mut rebooted: serde_json::Value = serde_json::from_str(&whole).expect("JSON");
        rebooted["up_ms"] = u64::MAX.into();
        fs::write(&path, rebooted.to_string()).expect("a file");
        let remembered = read(&path, "a").expect("a memory").0;
        let is_over = remembered.evacuation.expect("it was on").is_over;
        assert_eq!((is_over, remembered.switch.stamp), (true, 3));
        assert_eq!(remembered.draining, [], "cookies begin anew with the machine");
        // The clock was set back since.
        let later = serde_json::to_string(&Written::of("a", u64::MAX, &memory())).expect("JSON");
        fs::write(&path, later).expect("a file");
        assert_eq!(read(&path, "a").expect("a memory").1, Duration::ZERO);
    }

    #[tokio::test]
    async fn a_disk_that_takes_nothing_stops_nobody() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("no/such/directory/agent.state");
        let mut file = StateFile::start(path.clone()).expect("a thread");
        file.write("a", &memory());
        assert!(!file.ticket().is_written().await, "and whoever asks is told");
        fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
        file.write("a", &memory());
        assert!(file.ticket().is_written().await);
    }
}
