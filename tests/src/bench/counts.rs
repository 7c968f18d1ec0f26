//! How often a process does what costs a machine-dependent time: system calls, and timers of the kernel it sets.
//!
//! Input: a process. Output: counts, by the kernel's tracepoints (perf_event_open(2)). Must never count while processor time
//! is measured: each system call of the machine then costs a little more.

use std::{
    fs,
    io::{self, Read as _},
    os::fd::{FromRawFd as _, RawFd},
    path::Path,
};

use anyhow::Context as _;

/// What is counted, in the order of [`Counts`].
const TRACEPOINTS: [&str; 2] = ["raw_syscalls/sys_enter", "timer/hrtimer_start"];

/// How often each happened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// System calls begun.
    pub calls: u64,
    /// Timers set (kernel/time/hrtimer.c): a wait with a limit sets one.
    pub timers: u64,
}

/// The numbers by which this kernel knows the tracepoints.
#[derive(Clone, Copy, Debug)]
pub struct Tracepoints([u64; 2]);

impl Tracepoints {
    /// Asks the kernel.
    ///
    /// # Errors
    ///
    /// There is no tracefs, or it is not for us.
    pub fn find() -> anyhow::Result<Self> {
        let usual = Path::new("/sys/kernel/tracing");
        if usual.join("events").is_dir() {
            return Self::read(usual);
        }
        let directory = tempfile::tempdir()?;
        let target = std::ffi::CString::new(directory.path().as_os_str().as_encoded_bytes())?;
        let kind = c"tracefs".as_ptr();
        // SAFETY: three strings that end with a zero and live through the call; tracefs takes no data.
        if unsafe { libc::mount(kind, target.as_ptr(), kind, 0, std::ptr::null()) } != 0 {
            return Err(io::Error::last_os_error()).context("cannot mount tracefs");
        }
        let found = Self::read(directory.path());
        // SAFETY: a string that ends with a zero and lives through the call.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        found
    }

    fn read(tracefs: &Path) -> anyhow::Result<Self> {
        let mut ids = [0; TRACEPOINTS.len()];
        for (id, name) in ids.iter_mut().zip(TRACEPOINTS) {
            let path = tracefs.join("events").join(name).join("id");
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            *id = text.trim().parse().context("a tracepoint's id is no number")?;
        }
        Ok(Self(ids))
    }
}

/// Counters on every thread that a process has now.
#[derive(Debug)]
pub struct Counters {
    files: Vec<[fs::File; 2]>,
}

impl Counters {
    /// Begins to count.
    ///
    /// # Errors
    ///
    /// The kernel does not count for us, or the process is gone.
    pub fn start(process: u32, tracepoints: Tracepoints) -> anyhow::Result<Self> {
        let tasks = fs::read_dir(format!("/proc/{process}/task")).context("the process is gone")?;
        let mut files = Vec::new();
        for task in tasks {
            let name = task?.file_name();
            let thread: libc::pid_t = name
                .to_str()
                .and_then(|name| name.parse().ok())
                .context("no thread's number")?;
            let [calls, timers] = tracepoints.0;
            files.push([open(thread, calls)?, open(thread, timers)?]);
        }
        Ok(Self { files })
    }

    /// What was counted so far.
    ///
    /// # Errors
    ///
    /// A counter cannot be read.
    pub fn read(&mut self) -> io::Result<Counts> {
        let mut counts = Counts::default();
        for [calls, timers] in &mut self.files {
            let value = |file: &mut fs::File| {
                let mut octets = [0; 8];
                file.read_exact(&mut octets).map(|()| u64::from_ne_bytes(octets))
            };
            counts.calls += value(calls)?;
            counts.timers += value(timers)?;
        }
        Ok(counts)
    }
}

/// A counter of one tracepoint on one thread.
fn open(thread: libc::pid_t, tracepoint: u64) -> anyhow::Result<fs::File> {
    /// include/uapi/linux/perf_event.h: `struct perf_event_attr` as far as `PERF_ATTR_SIZE_VER0`.
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        kind: u32,
        size: u32,
        config: u64,
        rest: [u64; 6],
    }
    const PERF_TYPE_TRACEPOINT: u32 = 2;
    let attributes = Attributes {
        kind: PERF_TYPE_TRACEPOINT,
        size: size_of::<Attributes>() as u32,
        config: tracepoint,
        ..Attributes::default()
    };
    // SAFETY: the pointer is to a structure of the size it names, which lives through the call; no group, no flags.
    let descriptor = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            thread,
            -1 as libc::c_int,
            -1 as libc::c_int,
            0 as libc::c_ulong,
        )
    };
    if descriptor < 0 {
        return Err(io::Error::last_os_error()).context("the kernel counts no tracepoints for us");
    }
    // SAFETY: the call has just made it, and nobody else knows it.
    Ok(unsafe { fs::File::from_raw_fd(descriptor as RawFd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_attributes_have_the_size_of_their_first_version() {
        let Ok(tracepoints) = Tracepoints::find() else {
            return crate::skip("tracefs is not for this user");
        };
        let Ok(mut counters) = Counters::start(std::process::id(), tracepoints) else {
            return crate::skip("perf_event_open is not for this user");
        };
        let before = counters.read().expect("a counter").calls;
        for _ in 0..1000 {
            // SAFETY: it takes nothing and cannot fail.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
        let calls = counters.read().expect("a counter").calls - before;
        assert!(calls >= 1000, "{calls} of 1000 calls were counted");
    }
}
