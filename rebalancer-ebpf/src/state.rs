//! Opens and closes: TCP state changes of the watched port (`inet_sock_set_state`, net/ipv4/af_inet.c).
//!
//! A connection may end in one step, without a FIN: by RST from either side, by a close with unread data, by keep-alive or
//! TCP_USER_TIMEOUT, by `ss -K`. Whatever comes after ESTABLISHED is its end.

use core::{arch::asm, ptr::write_volatile};

use aya_ebpf::{
    bindings::BPF_RB_FORCE_WAKEUP, cty::c_void, helpers::generated::bpf_get_socket_cookie, macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use aya_log_ebpf::{debug, warn};
use rebalancer_common::{EVENTS as ROOM, Event, KIND_CLOSED, KIND_JOINED, KIND_OPENED, LOST_EVENTS};

use crate::{EVENTS, LISTENERS, TURNS, lost, offset, read};

/// include/net/tcp_states.h
const ESTABLISHED: i32 = 1;
const SYN_RECV: i32 = 3;
const LISTEN: i32 = 10;

/// Runs at each state change of any TCP socket of the machine.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn socket_state(ctx: BtfTracePointContext) -> i32 {
    let socket: *mut c_void = ctx.arg(0);
    let (old, new): (i32, i32) = (ctx.arg(1), ctx.arg(2));
    let is_open = new == ESTABLISHED && old == SYN_RECV;
    // LISTEN to SYN_RECV is a new connection's socket, which began as a copy of the listening one.
    let is_listener = (old == LISTEN && new != SYN_RECV) || new == LISTEN;
    if !is_open && old != ESTABLISHED && !is_listener {
        return 0;
    }
    let common = socket.cast::<u8>().cast_const();
    // SAFETY: the tracepoint's socket lives through the call, and the verifier checks each member that is read.
    let tcp = unsafe { read::watched(socket) };
    // SAFETY: as above.
    if tcp.is_null() || !unsafe { read::in_namespace(common) } {
        return 0;
    }
    if is_listener {
        // Another listening socket is another apiserver: where its first clients' hellos are read depends on it, so the
        // agent is woken.
        if LISTENERS.output::<u64>(0_u64, u64::from(BPF_RB_FORCE_WAKEUP)).is_err() {
            lost(LOST_EVENTS);
            warn!(&ctx, "no room for the event of a socket that listens on port {}", offset!(port));
        }
        return 0;
    }
    // SAFETY: the helper takes the tracepoint's socket, which lives through the call.
    let cookie = unsafe { bpf_get_socket_cookie(socket) };
    tell(|event| {
        // SAFETY: the place is this event's own; see above for the rest.
        unsafe {
            write_volatile(&raw mut (*event).cookie, cookie);
            if is_open {
                let ends = read::ends(common, tcp);
                let kind = if ends.joined == 0 { KIND_OPENED } else { KIND_JOINED };
                write_volatile(&raw mut (*event).kind, kind);
                write_volatile(&raw mut (*event).remote_port, ends.remote_port);
                write_volatile(&raw mut (*event).token, ends.token);
                write_volatile(&raw mut (*event).start, ends.start);
                write_volatile(&raw mut (*event).told[0], ends.local[0]);
                write_volatile(&raw mut (*event).told[1], ends.local[1]);
                write_volatile(&raw mut (*event).told[2], ends.remote[0]);
                write_volatile(&raw mut (*event).told[3], ends.remote[1]);
            } else {
                write_volatile(&raw mut (*event).kind, KIND_CLOSED);
                write_volatile(&raw mut (*event).told[0], read::direct(tcp, offset!(bytes_received)));
                write_volatile(&raw mut (*event).told[1], read::direct(tcp, offset!(bytes_acked)));
            }
        }
    });
    debug!(&ctx, "socket {:x}: state {} to {}", cookie, old, new);
    0
}

/// Takes the next turn, has its place filled, and says that it is.
///
/// No lock and no helper, which a ring buffer takes two of for each record, and waits in them for the memory to come: the
/// stores here are under way while the machine goes on. Nobody is woken: the agent looks in time.
#[inline(always)]
fn tell(fill: impl FnOnce(*mut Event)) {
    let Some(turns) = TURNS.get_ptr_mut(0) else { return };
    // SAFETY: the pointer is to a map's value, which nobody writes but so.
    let before = unsafe { fetch_add(turns, 1) };
    let Some(event) = EVENTS.get_ptr_mut(before as u32 & (ROOM - 1)) else {
        return;
    };
    fill(event);
    // SAFETY: as above.
    unsafe { publish(&raw mut (*event).turn, before + 1) }
}

/// Writes the turn, after all that was written before.
///
/// # Safety
///
/// The pointer is to a map's value.
#[inline(always)]
unsafe fn publish(turn: *mut u64, value: u64) {
    // SAFETY: the caller's. x86 keeps stores in order; elsewhere an exchange does, which is a full barrier too.
    unsafe {
        if cfg!(bpf_target_arch = "x86_64") {
            write_volatile(turn, value);
        } else {
            exchange(turn, value);
        }
    }
}

/// Adds, and answers with what was there before: one atomic step, and a full barrier (since Linux 5.12;
/// Documentation/bpf/standardization/instruction-set.rst, "Atomic operations": BPF_ATOMIC | BPF_DW | BPF_STX of r0 at
/// r1, BPF_ADD | BPF_FETCH). In octets, because the compiler writes it for processors `v3` only, which would change all
/// other code as well.
///
/// # Safety
///
/// The pointer is to a map's value.
#[inline(always)]
unsafe fn fetch_add(counter: *mut u64, amount: u64) -> u64 {
    let before: u64;
    // SAFETY: the instruction reads and writes the caller's word and r0, as is said here.
    unsafe {
        asm!(".8byte 0x1000001db", in("r1") counter, inout("r0") amount => before);
    }
    before
}

/// The same with BPF_XCHG: writes a value in the place of what was there before.
///
/// # Safety
///
/// The pointer is to a map's value.
#[inline(always)]
unsafe fn exchange(word: *mut u64, value: u64) {
    // SAFETY: as above.
    unsafe {
        asm!(".8byte 0xe1000001db", in("r1") word, inout("r0") value => _);
    }
}
