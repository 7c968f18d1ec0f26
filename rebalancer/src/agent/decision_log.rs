//! The decision log: one JSON object a line, appended by a thread of its own.
//!
//! Input: lines. Output: a file of whole lines, mode 0600 when it is made here.
//! Must never make the agent's loop wait for a disk: what finds no place in the queue is dropped and counted. Must never
//! glue a line to half of another: what a full disk cut short is completed once there is room, or begun anew.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context as _;

/// Lines that may wait for the disk: some minutes of decisions.
const QUEUE: usize = 1_024;

/// How often a line that could not be written is tried again, and how long a moved file is written to at most.
const RETRY: Duration = Duration::from_secs(1);

/// How long the end of the agent waits for the disk.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// What the thread and the loop share.
#[derive(Debug, Default)]
struct Shared {
    /// Somebody asked for the file to be opened again (SIGHUP).
    reopen: AtomicBool,
    /// The agent ends.
    ending: AtomicBool,
    written: AtomicU64,
    dropped: AtomicU64,
}

/// A way to the thread that writes.
#[derive(Debug)]
pub struct DecisionLog {
    lines: Option<SyncSender<String>>,
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
    dropping: bool,
}

impl DecisionLog {
    /// Opens the file for appending and starts the thread.
    ///
    /// # Errors
    ///
    /// Names the flag, the file and what the system says.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let place =
            Place::open(path).with_context(|| format!("--decision-log {}: cannot append to it", path.display()))?;
        let (lines, queue) = sync_channel(QUEUE);
        let shared = Arc::new(Shared::default());
        let writer = Writer {
            place,
            shared: Arc::clone(&shared),
            begun: None,
            failing: false,
        };
        let writer = thread::Builder::new()
            .name("decision-log".to_owned())
            .spawn(move || writer.run(&queue))
            .context("--decision-log: cannot start its thread")?;
        Ok(Self {
            lines: Some(lines),
            shared,
            writer: Some(writer),
            dropping: false,
        })
    }

    /// Appends a line, which has no newline in it; never waits.
    pub fn append(&mut self, line: String) {
        debug_assert!(!line.contains('\n'), "one decision is one line");
        let taken = self.lines.as_ref().is_some_and(|lines| lines.try_send(line).is_ok());
        if !taken {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            if !self.dropping {
                tracing::error!("the decision log's queue is full, since its disk does not take it: lines are dropped");
            }
        }
        self.dropping = !taken;
    }

    /// Opens the file again before the next line.
    pub fn reopen(&self) {
        self.shared.reopen.store(true, Ordering::Relaxed);
    }

    /// Lines written, and lines dropped.
    pub fn counts(&self) -> (u64, u64) {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (count(&self.shared.written), count(&self.shared.dropped))
    }
}

impl Drop for DecisionLog {
    /// Waits a moment for what is in the queue; a disk that hangs is left to itself.
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Relaxed);
        self.lines = None;
        let deadline = Instant::now() + LAST_WAIT;
        while let Some(writer) = self.writer.take_if(|writer| !writer.is_finished()) {
            if Instant::now() >= deadline {
                tracing::error!("the decision log's disk hangs: its last lines are not written");
                return;
            }
            thread::park_timeout(Duration::from_millis(10));
            self.writer = Some(writer);
        }
    }
}

/// The file, and which one it is.
struct Place {
    path: PathBuf,
    file: File,
    identity: (u64, u64),
    /// Whether the file's last line has no end yet.
    is_torn: bool,
}

impl Place {
    fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        let metadata = file.metadata()?;
        Ok(Self {
            path: path.to_owned(),
            // A process that was killed may have left half a line. A pipe or a device has no end to look at.
            is_torn: metadata.is_file() && is_torn(path),
            file,
            identity: (metadata.dev(), metadata.ino()),
        })
    }

    /// Whether the path leads to this file still.
    fn is_current(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity)
    }

    fn length(&self) -> io::Result<u64> {
        self.file.metadata().map(|metadata| metadata.len())
    }
}

/// Whether the file ends in the middle of a line; one that cannot be read is taken for whole.
fn is_torn(path: &Path) -> bool {
    let last = || -> io::Result<u8> {
        let mut file = File::open(path)?;
        let mut last = [0];
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
        Ok(last[0])
    };
    last().is_ok_and(|last| last != b'\n')
}

/// A line of which a part may be in the file.
struct Begun {
    line: Vec<u8>,
    /// Octets of it that are in the file.
    done: usize,
    /// How long the file was then: when it is not any more, somebody has cut it.
    length: u64,
}

struct Writer {
    place: Place,
    shared: Arc<Shared>,
    begun: Option<Begun>,
    failing: bool,
}

impl Writer {
    fn run(mut self, queue: &Receiver<String>) {
        loop {
            if self.begun.is_none() {
                match queue.recv_timeout(RETRY) {
                    Ok(mut line) => {
                        line.push('\n');
                        let (line, done, length) = (line.into_bytes(), 0, 0);
                        self.begun = Some(Begun { line, done, length });
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
            self.follow_the_path();
            match self.write() {
                Ok(()) => {
                    if self.failing {
                        tracing::info!(path = %self.place.path.display(), "the decision log is written again");
                    }
                    self.failing = false;
                }
                Err(error) => {
                    if !self.failing {
                        let path = self.place.path.display();
                        tracing::error!(%path, %error, "cannot append to the decision log: lines wait, then are dropped");
                    }
                    self.failing = true;
                    if self.shared.ending.load(Ordering::Relaxed) {
                        return;
                    }
                    thread::park_timeout(RETRY);
                }
            }
        }
    }

    /// Goes on in a new file when this one was moved or removed, or somebody asks.
    fn follow_the_path(&mut self) {
        let asked = self.shared.reopen.swap(false, Ordering::Relaxed);
        if !asked && self.place.is_current() {
            return;
        }
        let path = self.place.path.clone();
        match Place::open(&path) {
            Ok(place) => {
                if place.identity != self.place.identity
                    && let Some(begun) = &mut self.begun
                {
                    // The whole line is in the new file, and nothing before it needs an end.
                    begun.done = 0;
                    if begun.line.first() == Some(&b'\n') {
                        begun.line.remove(0);
                    }
                }
                self.place = place;
            }
            // The old one is better than none; it is tried again before the next line.
            Err(error) if !self.failing => {
                tracing::error!(path = %path.display(), %error, "cannot open the decision log anew: going on in the old file");
            }
            Err(_) => {}
        }
    }

    /// Writes what is begun, as far as it goes.
    fn write(&mut self) -> io::Result<()> {
        let Some(begun) = &mut self.begun else {
            return Ok(());
        };
        if begun.done > 0 && self.place.length()? != begun.length {
            // Somebody has cut the file (copytruncate), or writes to it too: the rest would be no line.
            begun.done = 0;
            self.place.is_torn = is_torn(&self.place.path);
        }
        if begun.done == 0 && self.place.is_torn && begun.line.first() != Some(&b'\n') {
            begun.line.insert(0, b'\n');
        }
        while begun.done < begun.line.len() {
            match self.place.file.write(&begun.line[begun.done..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    begun.done += written;
                    begun.length = self.place.length()?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.begun = None;
        self.place.is_torn = false;
        self.shared.written.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// Waits for a state, for as long as a busy machine may take.
    fn until(what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_so() {
            assert!(Instant::now() < deadline, "{what}");
            thread::park_timeout(Duration::from_millis(5));
        }
    }

    fn text(path: &Path) -> String {
        fs::read_to_string(path).unwrap_or_default()
    }

    fn log(directory: &tempfile::TempDir) -> (PathBuf, DecisionLog) {
        let path = directory.path().join("decisions.jsonl");
        let log = DecisionLog::open(&path).expect("a file");
        (path, log)
    }

    #[test]
    fn lines_are_appended_to_a_file_only_its_owner_reads() {
        let directory = tempfile::tempdir().expect("a directory");
        let (path, mut log) = log(&directory);
        for line in ["{\"id\":1}", "{\"id\":2}"] {
            log.append(line.to_owned());
        }
        drop(log);
        assert_eq!(text(&path), "{\"id\":1}\n{\"id\":2}\n", "the end waits for the queue");
        let mode = fs::metadata(&path).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn half_a_line_of_a_process_that_was_killed_is_ended_first() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("decisions.jsonl");
        fs::write(&path, "{\"id\":1}\n{\"id").expect("a file");
        let mut log = DecisionLog::open(&path).expect("a file");
        log.append("{\"id\":3}".to_owned());
        log.append("{\"id\":4}".to_owned());
        drop(log);
        assert_eq!(text(&path), "{\"id\":1}\n{\"id\n{\"id\":3}\n{\"id\":4}\n");
    }

    #[test]
    fn a_file_that_was_moved_or_cut_is_followed() {
        let directory = tempfile::tempdir().expect("a directory");
        let (path, mut log) = log(&directory);
        let moved = directory.path().join("decisions.jsonl.1");
        log.append("one".to_owned());
        until("the first line", || text(&path) == "one\n");
        fs::rename(&path, &moved).expect("a file");
        log.append("two".to_owned());
        until("a new file", || text(&path) == "two\n");
        fs::write(&path, "").expect("it is cut");
        log.append("three".to_owned());
        until("the same file", || text(&path) == "three\n");
        fs::remove_file(&path).expect("a file");
        until("a new file, with nothing to write", || path.exists());
        drop(log);
        assert_eq!(text(&moved), "one\n");
    }

    #[test]
    fn a_disk_that_takes_nothing_stops_nobody_and_what_is_dropped_is_counted() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("decisions.jsonl");
        // Every write to this device fails with ENOSPC (full(4)).
        std::os::unix::fs::symlink("/dev/full", &path).expect("a link");
        let mut log = DecisionLog::open(&path).expect("a device");
        let lines = QUEUE as u64 + 100;
        for id in 0..lines {
            log.append(id.to_string());
        }
        let (written, dropped) = log.counts();
        assert!(
            dropped >= 99 && written + dropped <= lines,
            "{written} written, {dropped} dropped"
        );
        // With room again, what waited is written, each line whole.
        fs::remove_file(&path).expect("a link");
        until("everything that waited", || {
            let (written, dropped) = log.counts();
            written + dropped == lines
        });
        let (written, dropped) = log.counts();
        drop(log);
        let ids: Vec<u64> = text(&path)
            .lines()
            .map(|line| line.parse().expect("a whole line"))
            .collect();
        let expected: Vec<u64> = (0..lines - dropped).collect();
        assert!(expected.ends_with(&ids) && ids.len() as u64 <= written, "{ids:?}");
    }
}
