//! What a process's heap keeps of memory that is free again.
//!
//! Must never keep for good what was taken for a moment, or what strangers made the relay take: a limit is of all that the
//! process has, not of what it uses.

/// Blocks from this size on are the kernel's, each for itself, and are given back as they are freed; and so is what is free
/// at the end of a heap. It is glibc's own at the start; without a word it grows with the blocks that are freed, up to 32 MiB.
#[cfg(target_env = "gnu")]
const THRESHOLD: libc::c_int = 128 * 1024;

/// Has what is free given back to the kernel. Before there are threads that work, each of which has a heap of its own.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    for option in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: the call takes two integers; malloc takes its lock for it (mallopt(3)).
        if unsafe { libc::mallopt(option, THRESHOLD) } != 1 {
            tracing::debug!(option, "malloc does not take the option");
        }
    }
}
