//! A Go program that is damaged in places: an attach point inside it, or a refusal, whatever its tables say.
//!
//! The input is a row of changes to a small program of the shape Go's linker writes: a place in two octets, a length, and
//! the octets that are put there.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rebalancer_core::binary::golang::find;

const PROGRAM: &[u8] = include_bytes!("../bases/golang");

fuzz_target!(|data: &[u8]| {
    let [cut, changes @ ..] = data else { return };
    let mut rest = changes;
    let mut program = PROGRAM.to_vec();
    while let [high, low, length, after @ ..] = rest {
        let at = usize::from(u16::from_be_bytes([*high, *low])) % program.len();
        let (octets, after) = after.split_at(usize::from(*length).min(after.len()));
        rest = after;
        let octets = &octets[..octets.len().min(program.len() - at)];
        program[at..at + octets.len()].copy_from_slice(octets);
    }
    // Mostly whole, now and then cut short.
    program.truncate(program.len() - usize::from(cut.saturating_sub(200)) * 256);
    if let Ok(place) = find(&program) {
        let at = usize::try_from(place.file_offset).expect("an offset in a file");
        assert!(at < program.len(), "a probe is put inside the file");
    }
});
