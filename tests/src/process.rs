//! Child processes that never outlive their starter, with their output in files one can read afterwards.
//!
//! Must never signal a process it did not start.

use std::{
    env,
    fs::{self, File},
    io::{self, Read as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, LazyLock,
        mpsc::{self, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

/// How often a state is looked at.
const POLL: Duration = Duration::from_millis(50);

/// Two a client of the largest run, and room.
const WANTED_FILES: u64 = 24_000;

/// Has this process end without what libraries do then, from the first call on.
///
/// Scripted servers have threads that outlive a test, and one that begins a handshake while aws-lc takes its state down is
/// ended by abort(3), with the process (crypto/fipsmodule/rand/rand.c, `rand_thread_local_state_clear_all`).
pub fn end_at_once() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    unsafe extern "C" {
        /// on_exit(3) of glibc: atexit(3) does not tell the status.
        fn on_exit(run: extern "C" fn(libc::c_int, *mut libc::c_void), argument: *mut libc::c_void) -> libc::c_int;
    }
    extern "C" fn end(status: libc::c_int, _: *mut libc::c_void) {
        // SAFETY: it takes a number and does not return.
        unsafe { libc::_exit(status) }
    }
    ONCE.call_once(|| {
        // SAFETY: the function lives as long as the process, and its argument is not looked at.
        let registered = unsafe { on_exit(end, std::ptr::null_mut()) };
        assert_eq!(registered, 0, "there is room for one function more");
    });
}

/// A child process; it is killed when this goes, and by the kernel when the starter's thread dies.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, in a network namespace when one is given; its output goes to `NAME.log` in `logs`.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn start(
        name: &str,
        mut command: Command,
        namespace: Option<&Arc<OwnedFd>>,
        logs: &Path,
    ) -> anyhow::Result<Self> {
        let log = logs.join(format!("{name}.log"));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        command.stdout(file.try_clone()?).stderr(file);
        let child = spawn(name, command, namespace)?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    /// Starts `command` with stdin and stdout as pipes, which the caller takes; stderr goes to the log.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn piped(
        name: &str,
        mut command: Command,
        namespace: Option<&Arc<OwnedFd>>,
        logs: &Path,
    ) -> anyhow::Result<(Self, std::process::ChildStdin, std::process::ChildStdout)> {
        let log = logs.join(format!("{name}.log"));
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(file);
        let mut child = spawn(name, command, namespace)?;
        let stdin = child.stdin.take().context("stdin is piped")?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        let process = Self {
            name: name.to_owned(),
            child,
            log,
        };
        Ok((process, stdin, stdout))
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// All it has printed so far.
    pub fn log(&self) -> String {
        let mut text = Vec::new();
        // What cannot be read is shown as nothing: this is for messages.
        let _ = File::open(&self.log).and_then(|mut file| file.read_to_end(&mut text));
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Whether it is still running.
    ///
    /// # Errors
    ///
    /// It has ended: how, and its last lines.
    pub fn is_running(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended ({status}):\n{}", self.name, tail(&self.log())),
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: kill takes two integers; the id is of a child that has not been waited for, so it is still ours.
        unsafe {
            libc::kill(self.child.id() as libc::pid_t, signal);
        }
    }

    /// Kills it with SIGKILL and waits for it.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends SIGTERM and waits; after `patience`, SIGKILL.
    pub fn terminate(&mut self, patience: Duration) -> Option<ExitStatus> {
        if let Ok(Some(status)) = self.child.try_wait() {
            return Some(status);
        }
        self.signal(libc::SIGTERM);
        let ended = wait_for(patience, || self.child.try_wait().ok().flatten());
        if ended.is_none() {
            self.kill();
        }
        ended
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Something to be done on the starting thread.
type Job = Box<dyn FnOnce() + Send>;

/// The thread that starts every child: the kernel kills a child when the very thread that started it ends.
static STARTER: LazyLock<Sender<Job>> = LazyLock::new(|| {
    let (jobs, queue) = mpsc::channel::<Job>();
    thread::spawn(move || queue.into_iter().for_each(|job| job()));
    jobs
});

fn spawn(name: &str, mut command: Command, namespace: Option<&Arc<OwnedFd>>) -> anyhow::Result<Child> {
    let held = namespace.cloned();
    let namespace = namespace.map(|namespace| namespace.as_raw_fd());
    let parent = std::process::id();
    let prepare = move || {
        // SAFETY: prctl, getppid and setns take integers; the namespace's descriptor is open in the forked child.
        unsafe {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            if libc::getppid() as u32 != parent {
                return Err(io::Error::other("the starter died before its child began"));
            }
            if let Some(namespace) = namespace
                && libc::setns(namespace, libc::CLONE_NEWNET) != 0
            {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // A group of its own: Ctrl-C on the terminal reaches the starter alone, which ends its children in order.
    command.process_group(0);
    // SAFETY: the closure makes system calls only; it does not allocate but for an error's message when all is lost.
    unsafe {
        command.pre_exec(prepare);
    }
    let program = command.get_program().to_string_lossy().into_owned();
    let (started, child) = mpsc::channel();
    let job = move || {
        // Nobody waits any more when the asker has panicked.
        let _ = started.send(command.spawn());
        drop(held);
    };
    STARTER
        .send(Box::new(job))
        .ok()
        .context("the starting thread is gone")?;
    child
        .recv()
        .context("the starting thread is gone")?
        .with_context(|| format!("cannot start {name} ({program})"))
}

/// Has the command run on a host of that name: in a UTS namespace of its own.
pub fn on_host(command: &mut Command, name: &str) {
    let name = name.to_owned().into_bytes();
    // SAFETY: the closure makes two system calls, with integers and with octets that live in it; it does not allocate but
    // for an error's message when all is lost.
    unsafe {
        command.pre_exec(move || {
            if libc::unshare(libc::CLONE_NEWUTS) == 0 && libc::sethostname(name.as_ptr().cast(), name.len()) == 0 {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        });
    }
}

/// Whether this runs in a virtual machine of ours, whose processor is emulated.
pub fn is_emulated() -> bool {
    env::var_os("REBALANCER_VM").is_some()
}

/// How much longer an emulated processor may take.
const SLOWNESS: u32 = 4;

/// Looks until something is there, or `patience` is over; an emulated machine has several times that.
pub fn wait_for<T>(patience: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let slowness = if is_emulated() { SLOWNESS } else { 1 };
    let deadline = Instant::now() + patience * slowness;
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() >= deadline {
            return None;
        }
        thread::park_timeout(POLL);
    }
}

/// The last lines of a log.
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// A directory for logs that stays when it is told to.
///
/// # Errors
///
/// It cannot be made.
pub fn log_directory(prefix: &str) -> anyhow::Result<PathBuf> {
    let directory = tempfile::Builder::new().prefix(prefix).tempdir()?.keep();
    fs::create_dir_all(&directory)?;
    Ok(directory)
}

/// How many descriptors a process may have open, after asking for all that may be had.
///
/// # Errors
///
/// What getrlimit(2) says.
pub fn open_files() -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to an rlimit that lives through the call.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let wanted = libc::rlimit {
        rlim_cur: limit.rlim_max.max(WANTED_FILES),
        rlim_max: limit.rlim_max.max(WANTED_FILES),
    };
    let all = libc::rlimit {
        rlim_cur: limit.rlim_max,
        rlim_max: limit.rlim_max,
    };
    for attempt in [wanted, all] {
        // SAFETY: the pointer is to an rlimit that lives through the call.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const attempt) } == 0 {
            return Ok(attempt.rlim_cur);
        }
    }
    Ok(limit.rlim_cur)
}
