//! The kernel's answers about sockets, damaged in any way: sockets of the port that was asked for, no more than there is room
//! for, or an error; and no endless walk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rebalancer_core::sock_diag::{Fault, List, read};

/// What a socket takes at least: `struct nlmsghdr` and `struct inet_diag_msg`.
const LEAST: usize = 16 + 72;

fuzz_target!(|data: &[u8]| {
    let mut found = List::default();
    let said = read(data, 6443, &mut found);
    if let Err(Fault::Malformed(at)) = said {
        assert!(at < data.len());
    }
    assert!(found.sockets.len() * LEAST <= data.len());
    assert!(found.sockets.iter().all(|subflow| subflow.socket.local.port() == 6443));
    let mut again = List::default();
    assert_eq!(read(data, 6443, &mut again), said);
    assert_eq!(again, found);
    // A socket that is cut short is none.
    if let Some((_, cut)) = data.split_last() {
        let mut fewer = List::default();
        if let Err(Fault::Malformed(at)) = read(cut, 6443, &mut fewer) {
            assert!(at < cut.len());
        }
        assert!(fewer.sockets.len() <= found.sockets.len());
    }
});
