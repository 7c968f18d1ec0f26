//! An apiserver that has too much to do: up, with its own clients, and too busy to say so in time.
//!
//! Job: tell it from one that is restarting. Input: what the shim saw of the server behind it. Output: whether it is
//! overloaded, for [`RELIEF`] after the last sign.
//! Must never outlive the process that was overloaded: who was gone, or listens on another socket, begins anew.

use std::time::Duration;

use crate::ids::Timestamp;

/// A flood comes in waves: an apiserver that answers in time between two of them is not over it. A GOAWAY would have its
/// flooders begin again elsewhere.
const RELIEF: Duration = Duration::from_secs(30);

/// What is known of it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Overload {
    last: Option<Timestamp>,
}

impl Overload {
    /// What the shim saw: whether the server is overloaded now, and whether it is another process than before, or none.
    pub fn hear(&mut self, is_overloaded: bool, is_another: bool, now: Timestamp) {
        if is_overloaded {
            self.last = Some(now);
        } else if is_another {
            self.last = None;
        }
    }

    /// Whether it is overloaded, or was a moment ago.
    pub fn lasts(&self, now: Timestamp) -> bool {
        self.last.is_some_and(|last| now.since(last) < RELIEF)
    }
}
