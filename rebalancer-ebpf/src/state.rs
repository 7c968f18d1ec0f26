//! Opens and closes: TCP state changes of the watched port (`inet_sock_set_state`, net/ipv4/af_inet.c).

use aya_ebpf::{
    bindings::BPF_SK_STORAGE_GET_F_CREATE,
    cty::c_void,
    helpers::generated::{bpf_get_socket_cookie, bpf_sk_storage_get, bpf_skc_to_tcp_sock},
    macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use aya_log_ebpf::{debug, warn};
use rebalancer_common::{Early, KIND_CLOSED, KIND_LISTENER, KIND_OPENED, LOST_EVENTS, LOST_STORAGE};

use crate::{EARLY, EVENTS, OFFSETS, lost, read, wake_beyond};

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
    let offsets = OFFSETS.load();
    let common = socket.cast::<u8>().cast_const();
    if u32::from(read::field::<u16>(common, offsets.num)) != offsets.port || !read::in_namespace(common, &offsets) {
        return 0;
    }
    if kind == KIND_OPENED {
        remember(socket, offsets.rcv_nxt);
    }
    let Some(mut entry) = EVENTS.reserve(0) else {
        lost(LOST_EVENTS);
        warn!(&ctx, "no room for the event of a socket on port {}", offsets.port);
        return 0;
    };
    let mut record = read::record(socket, &offsets);
    // SAFETY: the helper takes the tracepoint's socket, which lives through the call.
    record.cookie = unsafe { bpf_get_socket_cookie(socket) };
    record.kind = kind;
    entry.write(record);
    entry.submit(wake_beyond(&EVENTS, 1 << 17));
    debug!(&ctx, "socket {:x}: state {} to {}", record.cookie, old, new);
    0
}

/// Notes where the client's stream begins, so that its first packets can be told from later ones.
#[inline(always)]
fn remember(socket: *mut c_void, rcv_nxt: u32) {
    // SAFETY: the helpers take the tracepoint's socket; the storage is checked for null before it is written.
    unsafe {
        let tcp = bpf_skc_to_tcp_sock(socket) as *const u8;
        let early: *mut Early = bpf_sk_storage_get(
            (&raw const EARLY).cast_mut().cast(),
            socket,
            core::ptr::null_mut(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
        .cast();
        if tcp.is_null() || early.is_null() {
            lost(LOST_STORAGE);
            return;
        }
        (*early).start = read::field(tcp, rcv_nxt);
    }
}
