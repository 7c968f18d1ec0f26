//! Numbers nobody can guess, for names of processes and PING payloads; not for keys.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};

/// A number: the standard library seeds its hash keys from the system.
pub fn u64() -> u64 {
    RandomState::new().build_hasher().finish()
}
