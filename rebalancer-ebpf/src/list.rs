//! The complete list of the namespace's sockets on the watched port (`iter/tcp`, net/ipv4/tcp_ipv4.c).

use aya_ebpf::{
    bindings::seq_file,
    cty::c_void,
    helpers::generated::{bpf_get_socket_cookie, bpf_seq_write},
};
use rebalancer_common::SocketRecord;

use crate::{offset, read};

const ESTABLISHED: u8 = 1;
const LISTEN: u8 = 10;

/// include/linux/bpf.h: `struct bpf_iter_meta`
#[repr(C)]
pub struct IteratorMeta {
    seq: *mut seq_file,
    session_id: u64,
    seq_num: u64,
}

/// net/ipv4/tcp_ipv4.c: `struct bpf_iter__tcp`
#[repr(C)]
pub struct IteratorContext {
    meta: *const IteratorMeta,
    socket: *mut c_void,
    uid: u32,
}

/// Runs once a socket of the reader's network namespace.
///
/// # Safety
///
/// The kernel calls it with a context of this shape.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
pub unsafe extern "C" fn list_sockets(ctx: *mut IteratorContext) -> i32 {
    // SAFETY: the context is the kernel's; the socket is null after the last one, and checked.
    unsafe {
        let socket = core::ptr::read_volatile(&raw const (*ctx).socket);
        if socket.is_null() {
            return 0;
        }
        let seq = (*core::ptr::read_volatile(&raw const (*ctx).meta)).seq;
        let common = socket.cast::<u8>().cast_const();
        let state: u8 = read::direct(common, offset!(state));
        if state != ESTABLISHED && state != LISTEN {
            return 0;
        }
        let tcp = read::watched(socket);
        if tcp.is_null() {
            return 0;
        }
        let ends = read::ends(common, tcp);
        let mut record = SocketRecord {
            cookie: bpf_get_socket_cookie(tcp.cast_mut().cast()),
            bytes_in: read::direct(tcp, offset!(bytes_received)),
            bytes_out: read::direct(tcp, offset!(bytes_acked)),
            local: ends.local,
            remote: ends.remote,
            local_port: offset!(port),
            remote_port: ends.remote_port,
            token: ends.token,
            joined: ends.joined,
            state: u32::from(state),
            start: ends.start,
        };
        bpf_seq_write(
            seq,
            (&raw mut record).cast(),
            core::mem::size_of::<SocketRecord>() as u32,
        );
    }
    0
}
