//! Header blocks of one connection, one after the other: decoded within the bound or refused, and written as literals
//! they read back the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rebalancer_core::wire::h2::hpack::{Decoder, write_literal};

const BOUND: usize = 2048;

fuzz_target!(|data: &[u8]| {
    let mut decoder = Decoder::default();
    let mut reader = Decoder::default();
    let mut rest = data;
    while let [length, after @ ..] = rest {
        let (block, after) = after.split_at(usize::from(*length).min(after.len()));
        rest = after;
        // A fault ends the connection.
        let Ok(list) = decoder.decode(block, BOUND) else { return };
        let size: usize = list.iter().map(|(name, value)| name.len() + value.len() + 32).sum();
        assert_eq!(size, list.size());
        assert!(size <= BOUND);
        let mut literals = Vec::new();
        for (name, value) in list.iter() {
            write_literal(name, value, &mut literals);
        }
        assert_eq!(reader.decode(&literals, BOUND).expect("literals can be read"), list);
    }
});
