//! A wall clock that is stepped for one process, as an administrator or NTP steps a node's: `LD_PRELOAD` (ld.so(8)) puts it
//! before the C library's, by which programs ask.
//!
//! Job: say what the kernel says, and so many seconds more as a file holds. Input: `REBALANCER_CLOCK`, a directory; there each
//! process has `clock.PID`: the step in seconds, and how often the time was asked since the file was made, eight octets each
//! in the machine's own order. Must never step what a step of the clock leaves alone: the monotonic clocks.

use std::{
    env,
    ffi::c_int,
    fs::File,
    os::fd::AsRawFd as _,
    path::Path,
    process,
    ptr::{self, NonNull},
    sync::{
        OnceLock,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
};

/// The file.
#[repr(C)]
struct Clock {
    step_s: AtomicI64,
    asked: AtomicU64,
}

/// `None` where nobody may step it.
static CLOCK: OnceLock<Option<&'static Clock>> = OnceLock::new();

fn open() -> Option<&'static Clock> {
    let name = format!("clock.{}", process::id());
    let path = Path::new(&env::var_os("REBALANCER_CLOCK")?).join(name);
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .ok()?;
    file.set_len(size_of::<Clock>() as u64).ok()?;
    // SAFETY: a new mapping of a file that is that long; nothing else is where the kernel puts it.
    let at = unsafe {
        libc::mmap(
            ptr::null_mut(),
            size_of::<Clock>(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: the mapping stays to the process's end, begins at a page, is as long as a `Clock`, and every pattern of bits is
    // one. Others change it by whole aligned words alone.
    NonNull::new(at.cast::<Clock>()).map(|clock| unsafe { clock.as_ref() })
}

/// clock_gettime(2).
///
/// # Safety
///
/// As the C library's: `time` is to a timespec that may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> c_int {
    // SAFETY: the caller's pointer goes to the kernel as it came, which refuses one that is not to be written.
    let result = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) };
    if result == 0
        && matches!(clock, libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE)
        && let Some(stepped) = CLOCK.get_or_init(open)
    {
        stepped.asked.fetch_add(1, Relaxed);
        // SAFETY: the kernel has just written there.
        unsafe { (*time).tv_sec += stepped.step_s.load(Relaxed) };
    }
    result as c_int
}
