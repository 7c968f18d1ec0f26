//! What the answer to an apiserver's goaway decision is, for the request that is asked about.
//!
//! Must never answer yes for a request whose connection it could not read, nor touch a register where it is not alone:
//! every program at the place gets the same registers in turn, and whoever moved them has answered. Then, and when it does
//! not know where to return to, there is no answer.

use aya_ebpf::{
    Global,
    bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST},
    helpers::{
        bpf_probe_read_kernel,
        generated::{bpf_copy_from_user, bpf_get_current_task, bpf_ktime_get_ns},
    },
    macros::map,
    maps::{HashMap, PerCpuArray},
    programs::ProbeContext,
};
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use rebalancer_common::steer::{
    AGAIN_NS, ANSWER_EXPIRED, ANSWER_HITS, ANSWER_LEFT, ANSWER_NO, ANSWER_NO_ADDRESS, ANSWER_NOT_H2,
    ANSWER_REHEARSED, ANSWER_RETURN_PROBE, ANSWER_TAKEN, ANSWER_UNCOUNTED, ANSWER_UNREADABLE, ANSWER_YES, ANSWERS, COUNTED, ClientKey,
    Consumers, Place, TEXT_OCTETS, VICTIMS as MOST_VICTIMS, Victim,
};

/// Nobody has as many probes at one place.
const MOST_CONSUMERS: u32 = 16;

/// Set by the loader, and frozen.
#[unsafe(no_mangle)]
static PLACE: Global<Place> = Global::new(Place {
    address: 0,
    proto: 0,
    remote_address: 0,
    rehearses: 0,
    padding: 0,
    consumers: Consumers {
        known: 0,
        task_utask: 0,
        utask_auprobe: 0,
        uprobe_arch: 0,
        uprobe_consumers: 0,
        consumer_node: 0,
        consumer_ret_handler: 0,
        padding: 0,
    },
});

/// One of [`PLACE`]'s members, read by itself: a constant to the verifier, since the loader freezes them.
macro_rules! place {
    ($($field:ident).+) => {{
        let place = (&raw const PLACE).cast::<Place>();
        // SAFETY: the global is nothing but its value, and frozen before any program runs.
        unsafe { core::ptr::read_volatile(&raw const (*place).$($field).+) }
    }};
}

/// Who is to hear GOAWAY. Not preallocated: an entry that goes while a program holds it is not given to another victim.
#[map]
static VICTIMS: HashMap<ClientKey, Victim> = HashMap::with_max_entries(MOST_VICTIMS, BPF_F_NO_PREALLOC);

/// Requests by connection. The agent takes out who is gone: a map that made room by itself would forget living ones, the
/// earlier the more processors there are.
#[map]
static REQUESTS: HashMap<ClientKey, u64> = HashMap::with_max_entries(COUNTED, BPF_F_NO_PREALLOC);

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

/// Where to return to, and the answer.
#[inline(always)]
pub fn decide(ctx: &ProbeContext) -> Option<(u64, bool)> {
    count(ANSWER_HITS);
    if call::pointer(ctx) != place!(address) {
        count(ANSWER_TAKEN);
        return None;
    }
    if place!(consumers.known) != 0 && has_return_probe() {
        count(ANSWER_RETURN_PROBE);
        return None;
    }
    let Some(caller) = call::caller(ctx) else {
        count(ANSWER_LEFT);
        return None;
    };
    let yes = is_victim(call::request(ctx));
    if place!(rehearses) != 0 {
        count(ANSWER_REHEARSED);
        return None;
    }
    count(if yes { ANSWER_YES } else { ANSWER_NO });
    Some((caller, yes))
}

/// Whether somebody else wants to hear of the function's return: once all programs have run, the kernel would replace the
/// word on top of the stack by the address of its own return, and after an answer that word is the caller's.
///
/// Who is added while this runs is put before this program in the list, and is not run for this hit.
#[inline(always)]
fn has_return_probe() -> bool {
    // SAFETY: the helper takes nothing.
    let task = unsafe { bpf_get_current_task() };
    let Some(arch) = kernel(task.wrapping_add(u64::from(place!(consumers.task_utask))))
        .and_then(|utask| kernel(utask.wrapping_add(u64::from(place!(consumers.utask_auprobe)))))
        .filter(|arch| *arch != 0)
    else {
        return true;
    };
    let probe = arch.wrapping_sub(u64::from(place!(consumers.uprobe_arch)));
    let list = probe.wrapping_add(u64::from(place!(consumers.uprobe_consumers)));
    let Some(mut node) = kernel(list) else { return true };
    for _ in 0..MOST_CONSUMERS {
        if node == list {
            return false;
        }
        let consumer = node.wrapping_sub(u64::from(place!(consumers.consumer_node)));
        let handler = kernel(consumer.wrapping_add(u64::from(place!(consumers.consumer_ret_handler))));
        let (Some(0), Some(next)) = (handler, kernel(node)) else {
            return true;
        };
        node = next;
    }
    true
}

/// A word of the kernel's memory.
#[inline(always)]
fn kernel(address: u64) -> Option<u64> {
    // SAFETY: the helper checks the address and copies; no reference is made.
    unsafe { bpf_probe_read_kernel(address as *const u64) }.ok()
}

/// Whether the request at that address comes from a connection that is to go; counts it.
#[inline(always)]
fn is_victim(request: u64) -> bool {
    let text = |offset: u32| user::<Text>(request.wrapping_add(u64::from(offset)));
    let (Some(proto), Some(address)) = (text(place!(proto)), text(place!(remote_address))) else {
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
        // Who was told is told again for a while: the server says GOAWAY once, and one whose answer was cancelled did
        // not say it.
        let again = (&raw const (*victim).told).read_volatile() != 0;
        let until = (*victim).expires_ns.saturating_add(if again { AGAIN_NS } else { 0 });
        if bpf_ktime_get_ns() > until {
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
        // Another request of the same connection may be first.
        // On the stack: a constant's address would be resolved to the beginning of the read-only data, the offsets.
        let none = core::hint::black_box(0_u64);
        let _ = REQUESTS.insert(client, &none, u64::from(BPF_NOEXIST));
    }
    if let Some(requests) = REQUESTS.get_ptr_mut(client) {
        // SAFETY: the pointer is to a live entry, or to one that is kept until this program ends; the counter is added
        // to atomically.
        unsafe { add(requests) };
    } else {
        count(ANSWER_UNCOUNTED);
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
pub mod call {
    use super::{ProbeContext, user};

    pub fn pointer(ctx: &ProbeContext) -> u64 {
        // SAFETY: a field of the context.
        unsafe { (&raw const (*ctx.regs).rip).read_volatile() }
    }

    pub fn request(ctx: &ProbeContext) -> u64 {
        // SAFETY: a field of the context.
        unsafe { (&raw const (*ctx.regs).rbx).read_volatile() }
    }

    #[inline(always)]
    pub fn caller(ctx: &ProbeContext) -> Option<u64> {
        // SAFETY: a field of the context.
        user(unsafe { (&raw const (*ctx.regs).rsp).read_volatile() })
    }
}

/// The same on arm64: receiver in R0, the request in R1, the answer in R0, the return address in R30.
#[cfg(bpf_target_arch = "aarch64")]
pub mod call {
    use super::ProbeContext;

    pub fn pointer(ctx: &ProbeContext) -> u64 {
        // SAFETY: a field of the context.
        unsafe { (&raw const (*ctx.regs).pc).read_volatile() }
    }

    pub fn request(ctx: &ProbeContext) -> u64 {
        // SAFETY: a field of the context.
        unsafe { (&raw const (*ctx.regs).regs[1]).read_volatile() }
    }

    #[inline(always)]
    pub fn caller(ctx: &ProbeContext) -> Option<u64> {
        // SAFETY: a field of the context.
        Some(unsafe { (&raw const (*ctx.regs).regs[30]).read_volatile() })
    }
}
