//! The program that answers an apiserver's own goaway decision: yes for victims, no for everyone else.
//!
//! It runs at the entry of `(*probabilisticGoawayDecider).Goaway(r *http.Request) bool` and returns in its place, so the
//! body, a lottery, never runs. It is an object of its own: kernels that refuse programs which write registers still
//! take the ones that count.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "the BPF target has no AtomicU64::fetch_add")]

mod decision;

use aya_ebpf::{macros::uprobe, programs::ProbeContext};

/// Runs at the function's entry. Sleepable: memory that is paged out is fetched, so no victim is missed.
#[uprobe(sleepable)]
pub fn steer(ctx: ProbeContext) -> u32 {
    if let Some((caller, yes)) = decision::decide(&ctx) {
        answer(&ctx, caller, yes);
    }
    0
}

/// Leaves the registers as RET would, the answer in AL.
#[cfg(bpf_target_arch = "x86_64")]
#[inline(always)]
fn answer(ctx: &ProbeContext, caller: u64, yes: bool) {
    // SAFETY: fields of the context; kernels that do not allow it refuse the program.
    unsafe {
        let regs = ctx.regs;
        let stack = (&raw const (*regs).rsp).read_volatile();
        (&raw mut (*regs).rax).write_volatile(yes as u64);
        (&raw mut (*regs).rip).write_volatile(caller);
        (&raw mut (*regs).rsp).write_volatile(stack + 8);
    }
}

/// The same on arm64: the answer in R0.
#[cfg(bpf_target_arch = "aarch64")]
#[inline(always)]
fn answer(ctx: &ProbeContext, caller: u64, yes: bool) {
    // SAFETY: fields of the context; kernels that do not allow it refuse the program.
    unsafe {
        let regs = ctx.regs;
        (&raw mut (*regs).regs[0]).write_volatile(yes as u64);
        (&raw mut (*regs).pc).write_volatile(caller);
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Helpers that only GPL-compatible programs may call are used.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
