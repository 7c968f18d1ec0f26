//! Opens and closes: TCP state changes of the watched port (`inet_sock_set_state`, net/ipv4/af_inet.c).
//!
//! A connection may end in one step, without a FIN: by RST from either side, by a close with unread data, by keep-alive or
//! TCP_USER_TIMEOUT, by `ss -K`. Whatever comes after ESTABLISHED is its end.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::BPF_RB_FORCE_WAKEUP, cty::c_void, helpers::generated::bpf_get_socket_cookie, macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use aya_log_ebpf::{debug, warn};
use rebalancer_common::{KIND_CLOSED, KIND_LISTENER, KIND_OPENED, LOST_EVENTS, SocketHead, SocketRecord};

use crate::{EVENTS, lost, offset, read, wake_beyond};

/// include/net/tcp_states.h
const ESTABLISHED: i32 = 1;
const SYN_RECV: i32 = 3;
const LISTEN: i32 = 10;

/// Runs at each state change of any TCP socket of the machine.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn socket_state(ctx: BtfTracePointContext) -> i32 {
    let socket: *mut c_void = ctx.arg(0);
    let (old, new): (i32, i32) = (ctx.arg(1), ctx.arg(2));
    let kind = if new == ESTABLISHED && old == SYN_RECV {
        KIND_OPENED
    } else if old == ESTABLISHED {
        KIND_CLOSED
    } else if (old == LISTEN && new != SYN_RECV) || new == LISTEN {
        // LISTEN to SYN_RECV is a new connection's socket, which began as a copy of the listening one.
        KIND_LISTENER
    } else {
        return 0;
    };
    let common = socket.cast::<u8>().cast_const();
    // SAFETY: the tracepoint's socket lives through the call, and the verifier checks each member that is read.
    let tcp = unsafe { read::watched(socket) };
    // SAFETY: as above.
    if tcp.is_null() || !unsafe { read::in_namespace(common) } {
        return 0;
    }
    let mut head = SocketHead {
        // SAFETY: the helper takes the tracepoint's socket, which lives through the call.
        cookie: unsafe { bpf_get_socket_cookie(socket) },
        bytes_in: 0,
        bytes_out: 0,
        kind,
        state: 0,
    };
    let told = if kind == KIND_CLOSED {
        // SAFETY: as above.
        unsafe {
            head.bytes_in = read::direct(tcp, offset!(bytes_received));
            head.bytes_out = read::direct(tcp, offset!(bytes_acked));
        }
        tell(kind, |entry: &mut MaybeUninit<SocketHead>| {
            entry.write(head);
        })
    } else {
        tell(kind, |entry: &mut MaybeUninit<SocketRecord>| {
            // SAFETY: as above.
            entry.write(unsafe { read::socket(common, tcp, head) });
        })
    };
    if told {
        debug!(&ctx, "socket {:x}: state {} to {}", head.cookie, old, new);
    } else {
        lost(LOST_EVENTS);
        warn!(&ctx, "no room for the event of a socket on port {}", offset!(port));
    }
    0
}

/// Hands an event over; false when there is no room.
#[inline(always)]
fn tell<T: 'static>(kind: u32, fill: impl FnOnce(&mut MaybeUninit<T>)) -> bool {
    let Some(mut entry) = EVENTS.reserve::<T>(0) else {
        return false;
    };
    fill(&mut entry);
    // Another listening socket is another apiserver: where its first clients' hellos are read depends on it.
    entry.submit(if kind == KIND_LISTENER {
        u64::from(BPF_RB_FORCE_WAKEUP)
    } else {
        wake_beyond(&EVENTS, 1 << 17, 1 << 10)
    });
    true
}
