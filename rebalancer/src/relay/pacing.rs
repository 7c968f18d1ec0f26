//! Lets draining connections hand their watches over, at a pace.
//!
//! Input: the registry. Output: orders to pumps. Must never order anything of a connection that may still be given
//! new watches.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rebalancer_core::{ids::ConnectionId, wire::pace::Pace};
use tokio::time::{MissedTickBehavior, interval};

use super::registry::Registry;

/// How often connections are looked at.
const TURN: Duration = Duration::from_millis(100);

/// `--watch-handover` and `--watch-handover-rate`.
#[derive(Clone, Copy, Debug)]
pub struct WatchHandover {
    /// Over how long one connection's watches are spread.
    pub over: Duration,
    /// How many watches are ended in a second, of all connections.
    pub per_second: u32,
}

/// Runs as long as the relay.
pub async fn run(registry: Arc<Registry>, settings: WatchHandover) {
    let mut pace = Pace::new(settings.over, settings.per_second);
    let mut ticks = interval(TURN);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let began = Instant::now();
    loop {
        ticks.tick().await;
        let open = registry.handing_over();
        let open = open.into_iter().map(|(id, watches)| (ConnectionId(id), watches));
        for (id, total) in pace.turn(began.elapsed(), open) {
            registry.hand_over(id.0, total);
        }
    }
}
