//! What a service manager is told: that this process is ready, alive, or ending (sd_notify(3)).
//!
//! Nothing happens where none listens: `NOTIFY_SOCKET` is not set then. Must never hold up what it reports on.

use std::time::Duration;

use sd_notify::NotifyState;

/// The process does its job from now on.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// The process ends, which may take as long as its connections do.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// The process is alive; to be said again within [`watchdog`]'s time.
pub fn alive() {
    tell(&[NotifyState::Watchdog]);
}

/// How long the service manager waits for [`alive`] before it ends the process; `None` where it does not.
pub fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled()
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager cannot be told how this process is");
    }
}
