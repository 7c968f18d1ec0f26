//! The program that answers an apiserver's own goaway decision: yes for victims, no for everyone else.
//!
//! It runs at the entry of `(*probabilisticGoawayDecider).Goaway(r *http.Request) bool` and returns in its place, so the
//! body, a lottery, never runs. It is an object of its own: kernels that refuse programs which write registers still
//! take the ones that count.
//!
//! Must never answer yes for a request whose connection it could not read, nor touch a register before it knows where
//! to return to: then the function itself runs.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "the BPF target has no AtomicU64::fetch_add")]

use aya_ebpf::{
    Global,
    bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST},
    helpers::generated::{bpf_copy_from_user, bpf_ktime_get_ns},
    macros::{map, uprobe},
    maps::{HashMap, LruHashMap, PerCpuArray},
    programs::ProbeContext,
};
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use rebalancer_common::steer::{
    ANSWER_EXPIRED, ANSWER_HITS, ANSWER_LEFT, ANSWER_NO, ANSWER_NO_ADDRESS, ANSWER_NOT_H2, ANSWER_UNREADABLE,
    ANSWER_YES, ANSWERS, COUNTED, ClientKey, RequestOffsets, TEXT_OCTETS, VICTIMS as MOST_VICTIMS, Victim,
};

/// Set by the loader, and frozen.
#[unsafe(no_mangle)]
static OFFSETS: Global<RequestOffsets> = Global::new(RequestOffsets {
    proto: 0,
    remote_address: 0,
});

/// Who is to hear GOAWAY. Not preallocated: an entry that goes while a program holds it is not given to another victim.
#[map]
static VICTIMS: HashMap<ClientKey, Victim> = HashMap::with_max_entries(MOST_VICTIMS, BPF_F_NO_PREALLOC);

/// Requests by connection.
#[map]
static REQUESTS: LruHashMap<ClientKey, u64> = LruHashMap::with_max_entries(COUNTED, 0);

/// What was answered, by the `ANSWER_` constants.
#[map]
static ANSWERED: PerCpuArray<u64> = PerCpuArray::with_max_entries(ANSWERS, 0);

/// A Go string.
#[repr(C)]
#[derive(Clone, Copy)]
struct Text {
    begin: u64,
    length: u64,
}

/// Runs at the function's entry. Sleepable: memory that is paged out is fetched, so no victim is missed.
#[uprobe(sleepable)]
pub fn steer(ctx: ProbeContext) -> u32 {
    if let Some((caller, yes)) = decide(&ctx) {
        call::answer(&ctx, caller, yes);
    }
    0
}

/// The same without the answer, so that the function itself runs: what the program costs, on kernels that refuse it the
/// registers as well.
#[uprobe(sleepable)]
pub fn silent(ctx: ProbeContext) -> u32 {
    decide(&ctx);
    0
}

/// The same place without a program's work: what the trap alone costs.
#[uprobe]
pub fn empty(_: ProbeContext) -> u32 {
    0
}

/// Where to return to, and the answer.
#[inline(always)]
fn decide(ctx: &ProbeContext) -> Option<(u64, bool)> {
    count(ANSWER_HITS);
    let Some(caller) = call::caller(ctx) else {
        count(ANSWER_LEFT);
        return None;
    };
    let yes = is_victim(call::request(ctx));
    count(if yes { ANSWER_YES } else { ANSWER_NO });
    Some((caller, yes))
}

/// Whether the request at that address comes from a connection that is to go; counts it.
#[inline(always)]
fn is_victim(request: u64) -> bool {
    let offsets = OFFSETS.load();
    let text = |offset: u32| user::<Text>(request.wrapping_add(u64::from(offset)));
    let (Some(proto), Some(address)) = (text(offsets.proto), text(offsets.remote_address)) else {
        count(ANSWER_UNREADABLE);
        return false;
    };
    // The apiserver asks for HTTP/2 only: that this text is there shows that the argument is a request.
    if proto.length != 8 || user(proto.begin) != Some(*b"HTTP/2.0") {
        count(ANSWER_NOT_H2);
        return false;
    }
    // The mask is for the verifier: a part of a longer text is not taken for one.
    let length = (address.length & (TEXT_OCTETS as u64 - 1)) as u32;
    if address.length >= TEXT_OCTETS as u64 || length == 0 {
        count(ANSWER_NO_ADDRESS);
        return false;
    }
    let mut client = ClientKey { text: [0; TEXT_OCTETS] };
    // SAFETY: the helper writes `length` octets, fewer than there are, or fails.
    if unsafe { bpf_copy_from_user(client.text.as_mut_ptr().cast(), length, address.begin as *const _) } != 0 {
        count(ANSWER_UNREADABLE);
        return false;
    }
    count_request(&client);
    is_told(&client)
}

#[inline(always)]
fn is_told(client: &ClientKey) -> bool {
    let Some(victim) = VICTIMS.get_ptr_mut(client) else {
        return false;
    };
    // SAFETY: the pointer is to a live entry, or to one that is kept until this program ends; `told` is added to
    // atomically, the rest is written before the entry is in the map.
    unsafe {
        // Who was told once is told at every request: the server says GOAWAY once, and one whose answer was cancelled
        // did not say it.
        if (&raw const (*victim).told).read_volatile() == 0 && bpf_ktime_get_ns() > (*victim).expires_ns {
            count(ANSWER_EXPIRED);
            return false;
        }
        add(&raw mut (*victim).told);
    }
    true
}

#[inline(always)]
fn count_request(client: &ClientKey) {
    if REQUESTS.get_ptr_mut(client).is_none() {
        // Another request of the same connection may be first, or the map may be full of livelier ones.
        // On the stack: a constant's address would be resolved to the beginning of the read-only data, the offsets.
        let none = core::hint::black_box(0_u64);
        let _ = REQUESTS.insert(client, &none, u64::from(BPF_NOEXIST));
    }
    if let Some(requests) = REQUESTS.get_ptr_mut(client) {
        // SAFETY: the pointer is to an entry of a preallocated map, which stays; the counter is added to atomically.
        unsafe { add(requests) };
    }
}

fn count(answer: u32) {
    if let Some(counter) = ANSWERED.get_ptr_mut(answer) {
        // SAFETY: the verifier checked the pointer for null; this program may be preempted, so it adds atomically.
        unsafe { add(counter) };
    }
}

/// Adds one, atomically.
///
/// # Safety
///
/// The pointer is to a map's value.
#[inline(always)]
unsafe fn add(counter: *mut u64) {
    // SAFETY: the caller's.
    unsafe {
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1);
    }
}

/// Reads the probed process's memory, which may have to be fetched first.
#[inline(always)]
fn user<T: Copy>(address: u64) -> Option<T> {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: the helper writes the whole value, or fails; it is called for integers and octets only.
    unsafe {
        let failed = bpf_copy_from_user(
            value.as_mut_ptr().cast(),
            core::mem::size_of::<T>() as u32,
            address as *const _,
        );
        (failed == 0).then(|| value.assume_init())
    }
}

/// Go's register calling convention on x86_64 (go/src/cmd/compile/abi-internal.md): receiver in RAX, the request in RBX,
/// the answer in AL, the return address on the stack.
#[cfg(bpf_target_arch = "x86_64")]
mod call {
    use super::{ProbeContext, user};

    pub fn request(ctx: &ProbeContext) -> u64 {
        // SAFETY: a field of the context.
        unsafe { (&raw const (*ctx.regs).rbx).read_volatile() }
    }

    #[inline(always)]
    pub fn caller(ctx: &ProbeContext) -> Option<u64> {
        // SAFETY: a field of the context.
        user(unsafe { (&raw const (*ctx.regs).rsp).read_volatile() })
    }

    /// As RET would leave the registers.
    #[inline(always)]
    pub fn answer(ctx: &ProbeContext, caller: u64, yes: bool) {
        // SAFETY: fields of the context; kernels that do not allow it refuse the program.
        unsafe {
            let regs = ctx.regs;
            let stack = (&raw const (*regs).rsp).read_volatile();
            (&raw mut (*regs).rax).write_volatile(yes as u64);
            (&raw mut (*regs).rip).write_volatile(caller);
            (&raw mut (*regs).rsp).write_volatile(stack + 8);
        }
    }
}

/// The same on arm64: receiver in R0, the request in R1, the answer in R0, the return address in R30.
#[cfg(bpf_target_arch = "aarch64")]
mod call {
    use super::ProbeContext;

    pub fn request(ctx: &ProbeContext) -> u64 {
        // SAFETY: a field of the context.
        unsafe { (&raw const (*ctx.regs).regs[1]).read_volatile() }
    }

    #[inline(always)]
    pub fn caller(ctx: &ProbeContext) -> Option<u64> {
        // SAFETY: a field of the context.
        Some(unsafe { (&raw const (*ctx.regs).regs[30]).read_volatile() })
    }

    #[inline(always)]
    pub fn answer(ctx: &ProbeContext, caller: u64, yes: bool) {
        // SAFETY: fields of the context; kernels that do not allow it refuse the program.
        unsafe {
            let regs = ctx.regs;
            (&raw mut (*regs).regs[0]).write_volatile(yes as u64);
            (&raw mut (*regs).pc).write_volatile(caller);
        }
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
