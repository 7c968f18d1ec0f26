//! Opens and closes: TCP state changes of the watched port (`inet_sock_set_state`, net/ipv4/af_inet.c).

use aya_ebpf::{
    cty::c_void,
    helpers::generated::{bpf_get_socket_cookie, bpf_skc_to_tcp_sock},
    macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use aya_log_ebpf::{debug, warn};
use rebalancer_common::{KIND_CLOSED, KIND_LISTENER, KIND_OPENED, LOST_EVENTS, SocketRecord};

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
    let watched = unsafe {
        u32::from(read::direct::<u16>(common, offset!(num))) == offset!(port)
            && read::direct::<u32>(read::direct::<*const u8>(common, offset!(net)), offset!(inum)) == offset!(netns)
    };
    if !watched {
        return 0;
    }
    let Some(mut entry) = EVENTS.reserve::<SocketRecord>(0) else {
        lost(LOST_EVENTS);
        warn!(&ctx, "no room for the event of a socket on port {}", offset!(port));
        return 0;
    };
    let mut record = SocketRecord {
        kind,
        ..SocketRecord::default()
    };
    if kind == KIND_CLOSED {
        // SAFETY: the helper takes any socket and answers null for one that is not TCP's; its members are read as above.
        unsafe {
            let tcp = bpf_skc_to_tcp_sock(socket) as *const u8;
            if !tcp.is_null() {
                record.bytes_in = read::direct(tcp, offset!(bytes_received));
                record.bytes_out = read::direct(tcp, offset!(bytes_acked));
            }
        }
    } else {
        // Who it is with is told once.
        // SAFETY: as above.
        unsafe { read::addresses(common, &mut record) };
    }
    // SAFETY: the helper takes the tracepoint's socket, which lives through the call.
    record.cookie = unsafe { bpf_get_socket_cookie(socket) };
    let cookie = record.cookie;
    entry.write(record);
    entry.submit(wake_beyond(&EVENTS, 1 << 17));
    debug!(&ctx, "socket {:x}: state {} to {}", cookie, old, new);
    0
}
