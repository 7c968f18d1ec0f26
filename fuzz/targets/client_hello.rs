//! The beginning of a client's stream, whole and in pieces in any order: the same answer, and no answer too early.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rebalancer_core::wire::hello::{Assembly, classify};

fuzz_target!(|data: &[u8]| {
    let [cut, data @ ..] = data else { return };
    let whole = classify(data);
    let mut assembly = Assembly::default();
    let mut answer = None;
    let cut = usize::from(*cut).max(1);
    for (index, piece) in data.chunks(cut).enumerate() {
        answer = assembly.add(index * cut, piece);
        if answer.is_some() {
            break;
        }
    }
    if data.len() <= rebalancer_core::wire::hello::LONGEST {
        assert_eq!(answer, whole);
    }
    // Pieces that overlap, come twice or ahead of others.
    let mut shuffled = Assembly::default();
    let mut offset = 0_usize;
    for piece in data.chunks(cut).rev() {
        offset = offset.wrapping_mul(31).wrapping_add(piece.len()) % 20_000;
        if shuffled.add(offset, piece).is_some() {
            break;
        }
    }
});
