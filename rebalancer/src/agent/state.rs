//! The state file: what a restart of the agent must not forget.
//!
//! Input: the core's [`Memory`] whenever it has changed. Output: a file of one JSON object, and the memory of the process
//! before this one. Must never make the agent's loop wait for a disk, nor leave half a file: it is written beside its place,
//! synced and moved there. Must never keep an agent from starting: what cannot be read is left out, with a line in the log.

mod written;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rebalancer_core::agent::Memory;
use serde::Deserialize;
use tokio::sync::watch;

use self::written::{VERSION, Written, millis, unix_ms};
use crate::sys;

/// How long a write that failed waits before it is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// How long somebody waits to hear that the file is written.
const PATIENCE: Duration = Duration::from_secs(2);

/// So many octets a second are written at most, and as many are synced: the disk may be etcd's, and in a large cluster every
/// plan changes a file of megabytes.
const PACE: f64 = 1_048_576.0;

/// How large a file may be that is read.
const LARGEST: u64 = 64 << 20;

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
