//! The addresses that clients chose.

use super::*;

/// Where a whole network is routed to the node, each client may choose another of its addresses.
#[test]
fn an_address_that_nobody_uses_takes_no_room() {
    let mut table = seeded(&[]);
    let at_address = |id: u64, host: u64| Socket {
        local: format!("[2001:db8::{host:x}]:6443").parse().expect("an address"),
        ..socket(id)
    };
    for id in 0..50 {
        table.observe(Observation::Opened(at_address(id, id % 10)), at(1));
    }
    assert_eq!(table.locals.len(), 10);
    for id in 0..45 {
        table.observe(closed(id), at(2));
    }
    assert_eq!(table.locals.len(), 5);
    for id in 45..50 {
        table.observe(closed(id), at(3));
    }
    assert!(table.locals.is_empty());
}
