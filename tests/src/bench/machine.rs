//! Processors and processes: where they may run, what they spent, what they hold.
//!
//! Input: /proc. Output: figures in nanoseconds and KiB.

use std::{
    ffi::OsStr,
    fs, io, mem,
    num::NonZero,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

/// The two processors of a run: the measured process has one to itself, its peers share the other.
#[derive(Clone, Copy, Debug)]
pub struct Cores {
    /// The measured process's.
    pub measured: usize,
    /// Backend's and clients'.
    pub others: usize,
}

impl Cores {
    /// The last two this process may use: the first serve most interrupts.
    ///
    /// # Errors
    ///
    /// There are fewer than two.
    pub fn pick() -> anyhow::Result<Self> {
        // SAFETY: an all-zero cpu_set_t is the empty set.
        let mut allowed: libc::cpu_set_t = unsafe { mem::zeroed() };
        // SAFETY: the pointer is to a set of the given size, which lives through the call.
        if unsafe { libc::sched_getaffinity(0, mem::size_of_val(&allowed), &raw mut allowed) } != 0 {
            return Err(io::Error::last_os_error()).context("cannot ask which processors may be used");
        }
        // SAFETY: the index is below the set's size, and the set is initialised.
        let usable = |core: &usize| unsafe { libc::CPU_ISSET(*core, &allowed) };
        let mut cores = (0..libc::CPU_SETSIZE as usize).rev().filter(usable);
        match (cores.next(), cores.next()) {
            (Some(measured), Some(others)) => Ok(Self { measured, others }),
            _ => bail!("the benchmark needs two processors: one for the proxy, one for backend and client"),
        }
    }
}

/// Has the calling thread run on one processor only, if it may run there.
pub fn pin_thread(core: usize) {
    // SAFETY: an all-zero cpu_set_t is the empty set, the index is below its size, and it lives through the call.
    unsafe {
        let mut set = mem::zeroed::<libc::cpu_set_t>();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, mem::size_of_val(&set), &raw const set);
    }
}

/// A command that runs on one processor only.
pub fn pinned(core: usize, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("taskset");
    command.arg("-c").arg(core.to_string()).arg(program);
    command
}

/// Nanoseconds all threads of a process have run (Documentation/scheduler/sched-stats.rst).
///
/// # Errors
///
/// The process is gone.
pub fn cpu_ns(process: u32) -> anyhow::Result<u64> {
    let tasks = PathBuf::from(format!("/proc/{process}/task"));
    let mut sum = 0;
    for task in fs::read_dir(&tasks).with_context(|| format!("cannot read {}", tasks.display()))? {
        // A thread that has just ended is left out.
        if let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) {
            sum += first_number(&text).context("schedstat is not a number")?;
        }
    }
    Ok(sum)
}

/// How often the threads of a process went to sleep, and so were woken (`voluntary_ctxt_switches`, proc_pid_status(5)).
///
/// # Errors
///
/// The process is gone.
pub fn sleeps(process: u32) -> anyhow::Result<u64> {
    let tasks = PathBuf::from(format!("/proc/{process}/task"));
    let mut sum = 0;
    for task in fs::read_dir(&tasks).with_context(|| format!("cannot read {}", tasks.display()))? {
        // A thread that has just ended is left out.
        if let Ok(text) = fs::read_to_string(task?.path().join("status")) {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            sum += line
                .and_then(first_number)
                .context("a thread has no voluntary_ctxt_switches")?;
        }
    }
    Ok(sum)
}

/// KiB of memory that count for a process: its own, and its share of what it shares (proc_pid_smaps_rollup(5)).
///
/// # Errors
///
/// The process is gone.
pub fn pss_kib(process: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{process}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    text.lines()
        .find_map(|line| first_number(line.strip_prefix("Pss:")?))
        .with_context(|| format!("{path} has no Pss"))
}

/// KiB of memory that a process has in RAM (proc_pid_status(5), `VmRSS`); `None` when it is gone.
pub fn rss_kib(process: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    text.lines().find_map(|line| first_number(line.strip_prefix("VmRSS:")?))
}

/// A process's memory at its highest while it is watched.
#[derive(Debug)]
pub struct Highest {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<u64>,
}

impl Highest {
    /// Looks every 20 ms from now on.
    pub fn of(process: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut highest = 0;
            while !over.load(Relaxed) {
                highest = rss_kib(process).unwrap_or(0).max(highest);
                thread::sleep(Duration::from_millis(20));
            }
            highest
        });
        Self { stop, thread }
    }

    /// The most there was, in KiB.
    ///
    /// # Panics
    ///
    /// When its thread has.
    pub fn kib(self) -> u64 {
        self.stop.store(true, Relaxed);
        self.thread.join().expect("it only reads")
    }
}

fn first_number(text: &str) -> Option<u64> {
    text.split_whitespace().next()?.parse().ok()
}

/// What the whole machine did, so far.
#[derive(Clone, Copy, Debug)]
pub struct Busy {
    at: Instant,
    busy_ns: u64,
    stolen_ns: u64,
}

impl Busy {
    /// Reads it for the two processors.
    ///
    /// # Errors
    ///
    /// /proc/stat cannot be read.
    pub fn now(cores: Cores) -> anyhow::Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        // SAFETY: sysconf takes an integer.
        let ticks_per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
        let tick_ns = 1_000_000_000 / u64::try_from(ticks_per_second).unwrap_or(100).max(1);
        let mut now = Self {
            at: Instant::now(),
            busy_ns: 0,
            stolen_ns: 0,
        };
        for core in [cores.measured, cores.others] {
            let name = format!("cpu{core} ");
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(&name))
                .with_context(|| format!("/proc/stat has no cpu{core}"))?;
            let fields: Vec<u64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
            // user nice system idle iowait irq softirq steal (proc_stat(5))
            let [user, nice, system, _, _, irq, softirq, steal, ..] = fields[..] else {
                bail!("/proc/stat has fewer fields than Linux 2.6.11 wrote");
            };
            now.busy_ns += (user + nice + system + irq + softirq) * tick_ns;
            now.stolen_ns += steal * tick_ns;
        }
        Ok(now)
    }

    /// The share of the two processors' time since `earlier` that neither was idle nor ours.
    pub fn others_share(self, earlier: Self, ours_ns: u64) -> f64 {
        let both = 2.0 * (self.at - earlier.at).as_nanos() as f64;
        let busy = (self.busy_ns - earlier.busy_ns + self.stolen_ns - earlier.stolen_ns) as f64;
        ((busy - ours_ns as f64) / both).max(0.0)
    }
}

/// What all processors of the machine have had to do so far, in ticks.
#[derive(Clone, Copy, Debug)]
pub struct Idle {
    idle: u64,
    all: u64,
}

impl Idle {
    /// Reads it.
    ///
    /// # Errors
    ///
    /// /proc/stat cannot be read.
    pub fn now() -> anyhow::Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        Self::parsed(&text).context("/proc/stat has no line of all processors")
    }

    fn parsed(text: &str) -> Option<Self> {
        let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let fields: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
        // user nice system idle iowait irq softirq steal guest guest_nice; the last two are in user and nice as well
        // (proc_stat(5)).
        let idle = fields.get(3)? + fields.get(4)?;
        Some(Self {
            idle,
            all: fields.iter().take(8).sum(),
        })
    }

    /// The share of the processors' time since `earlier` in which they had nothing to do.
    pub fn share(self, earlier: Self) -> f64 {
        self.idle.saturating_sub(earlier.idle) as f64 / self.all.saturating_sub(earlier.all).max(1) as f64
    }
}

/// How many processors this process may use, as the subject of a sentence with its verb.
pub fn processors_are() -> String {
    match thread::available_parallelism().map_or(1, NonZero::get) {
        1 => "processor is".to_owned(),
        many => format!("{many} processors are"),
    }
}

/// The processor's name.
pub fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| "unknown processor".to_owned(), |(_, name)| name.trim().to_owned())
}

/// The kernel's release.
pub fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").map_or_else(|_| "unknown".into(), |text| text.trim().to_owned())
}

/// The first number with a dot that a program says of its version.
pub fn version_of(program: &Path, flag: &str, libraries: Option<&Path>) -> String {
    let mut command = Command::new(program);
    command.arg(flag);
    if let Some(libraries) = libraries {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    let text = command.output().map(|output| output.stdout).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let is_version = |word: &&str| word.contains('.') && word.starts_with(|first: char| first.is_ascii_digit());
    text.split([' ', '/', '\n'])
        .find(is_version)
        .unwrap_or("of an unknown version")
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::Idle;

    #[test]
    fn what_guests_use_is_counted_once_and_waiting_for_a_disk_is_idle() {
        let earlier = Idle::parsed("cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n").expect("a line");
        let later = Idle::parsed("cpu  10 20 30 25 15 0 0 0 9 9\n").expect("a line");
        assert_eq!(later.share(earlier), 0.4);
        assert!(Idle::parsed("cpu0 1 2 3 4 5\n").is_none());
    }
}
