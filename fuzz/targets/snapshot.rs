//! What a peer's agent says of itself, of any octets: a snapshot this agent can reckon with, or a fault in words. What is
//! read says the same when it is told on.
#![no_main]

#[path = "../../rebalancer/src/agent/wire/snapshot.rs"]
mod snapshot;

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use rebalancer_core::{ids::ApiserverName, policy::Policy};
use snapshot::WireSnapshot;

/// As the agent's own module beside it has it.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fuzz_target!(|data: &[u8]| {
    let policy = Policy::new(ApiserverName::new("a"), [ApiserverName::new("b")].into());
    let Ok(read) = WireSnapshot::read(data, &policy) else {
        return;
    };
    for load in [read.load, read.unmovable, read.told_load_total] {
        assert!(load.is_finite() && load >= 0.0);
    }
    assert!((0.01..=1000.0).contains(&read.capacity));
    let told = serde_json::to_vec(&WireSnapshot::of(&read, &policy)).expect("JSON");
    let mut again = WireSnapshot::read(&told, &policy).expect("it reads its own");
    for (again, read) in [
        (&mut again.load, read.load),
        (&mut again.unmovable, read.unmovable),
        (&mut again.told_load_total, read.told_load_total),
        (&mut again.capacity, read.capacity),
    ] {
        // serde_json reads numbers to within their last digit.
        assert!((*again - read).abs() <= read.abs() * 1e-12);
        *again = read;
    }
    assert_eq!(again, read);
});
