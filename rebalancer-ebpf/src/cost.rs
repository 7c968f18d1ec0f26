//! What the probe costs: the program that answers without its answer, and none at all, at the same place.
//!
//! An object of its own, which only benchmarks load: an agent carries nothing of it.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "the BPF target has no AtomicU64::fetch_add")]

mod decision;

use aya_ebpf::{macros::uprobe, programs::ProbeContext};

/// The program that answers without the answer, so that the function itself runs: what the program costs, on kernels that
/// refuse it the registers as well.
#[uprobe(sleepable)]
pub fn silent(ctx: ProbeContext) -> u32 {
    decision::decide(&ctx);
    0
}

/// The same place without a program's work: what the trap alone costs.
#[uprobe]
pub fn empty(_: ProbeContext) -> u32 {
    0
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Helpers that only GPL-compatible programs may call are used.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
