//! What BPF programs run, from the kernel's own statistics of them.
//!
//! Input: a process that holds programs. Output: counts and nanoseconds, the kernel's clock readings included.
//! Must never leave the statistics switched on.

use std::{
    fs, io,
    os::fd::{FromRawFd as _, OwnedFd, RawFd},
};

use anyhow::Context as _;

/// What a program ran so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ran {
    /// In all.
    pub ns: u64,
    /// How often.
    pub times: u64,
}

impl Ran {
    /// What it ran since then.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            ns: self.ns - earlier.ns,
            times: self.times - earlier.times,
        }
    }

    /// What it ran in two spans.
    pub fn and(self, other: Self) -> Self {
        Self {
            ns: self.ns + other.ns,
            times: self.times + other.times,
        }
    }

    /// Nanoseconds of one run.
    pub fn each(self) -> f64 {
        self.ns as f64 / self.times as f64
    }
}

/// Switches the statistics on until the descriptor goes, however this process ends.
///
/// # Errors
///
/// The kernel does not count, or not for us.
pub fn statistics() -> anyhow::Result<OwnedFd> {
    /// include/uapi/linux/bpf.h
    const BPF_ENABLE_STATS: libc::c_long = 32;
    const BPF_STATS_RUN_TIME: u32 = 0;
    let kind = BPF_STATS_RUN_TIME;
    // SAFETY: the pointer is to the four octets that this command takes, which live through the call.
    let descriptor = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_ENABLE_STATS,
            &raw const kind,
            size_of_val(&kind) as libc::c_long,
        )
    };
    if descriptor < 0 {
        return Err(io::Error::last_os_error())
            .context("the kernel does not count what its programs spend (Linux 5.8)");
    }
    // SAFETY: the call has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as RawFd) })
}

/// What a process's descriptors say of themselves, one text each.
///
/// # Errors
///
/// The process is gone, or another user's.
pub fn descriptors(process: u32) -> anyhow::Result<Vec<String>> {
    let directory = format!("/proc/{process}/fdinfo");
    Ok(fs::read_dir(&directory)
        .with_context(|| format!("cannot read {directory}"))?
        .flatten()
        // One may be closed meanwhile.
        .filter_map(|entry| fs::read_to_string(entry.path()).ok())
        .collect())
}

/// A field of such a text.
pub fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

/// What a program has run so far, which that process holds.
///
/// # Errors
///
/// The process does not hold it, or the kernel does not say.
pub fn ran(process: u32, program: &str) -> anyhow::Result<Ran> {
    let texts = descriptors(process)?;
    let number = |text: &str, name: &str| field(text, name).and_then(|number| number.parse().ok());
    texts
        .iter()
        .filter(|text| field(text, "prog_id") == Some(program))
        .find_map(|text| {
            Some(Ran {
                ns: number(text, "run_time_ns")?,
                times: number(text, "run_cnt")?,
            })
        })
        .context("the kernel does not say how long the program ran")
}
