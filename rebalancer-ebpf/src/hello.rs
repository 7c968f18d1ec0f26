//! The first TLS record of each watched connection, as it arrives (cgroup_skb ingress on the root cgroup).
//!
//! Every packet of the machine passes here: one for another port costs a comparison, one of a connection that is
//! classified a lookup.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    helpers::generated::{
        bpf_get_socket_cookie, bpf_sk_fullsock, bpf_sk_storage_get, bpf_skb_load_bytes, bpf_skc_to_tcp_sock,
        bpf_tcp_sock,
    },
    macros::cgroup_skb,
    programs::SkBuffContext,
};
use aya_log_ebpf::{debug, warn};
use rebalancer_common::{Early, HELLO_OCTETS, HelloRecord, LOST_HELLOS, LOST_STORAGE};

use crate::{EARLY, HELLOS, lost, offset, read, wake_beyond};

const PASS: i32 = 1;
/// include/net/tcp_states.h
const ESTABLISHED: u32 = 1;
const IPPROTO_TCP: u8 = 6;
/// TLS content type of a handshake record (RFC 8446, section 5.1).
const HANDSHAKE: u8 = 22;
/// No hello is longer: kernel and agent give up here.
const LONGEST: u32 = 16_384;
/// include/uapi/linux/if_ether.h, network order.
const ETH_P_IPV6: u32 = 0x86dd_u16.to_be() as u32;

/// Runs at each packet that arrives for a socket of the machine.
#[cgroup_skb]
pub fn client_hello(ctx: SkBuffContext) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the context's pointers are the kernel's; each is checked for null before the next step, as the verifier
    // demands.
    unsafe {
        let socket: *mut bpf_sock = core::ptr::read_volatile(&raw const (*skb).__bindgen_anon_2.sk);
        // What the rest of the machine pays ends here.
        if socket.is_null() || core::ptr::read_volatile(&raw const (*socket).src_port) != offset!(port) {
            return PASS;
        }
        let full = bpf_sk_fullsock(socket);
        if full.is_null() {
            return PASS;
        }
        let early: *mut Early = bpf_sk_storage_get(
            (&raw const EARLY).cast_mut().cast(),
            full.cast(),
            core::ptr::null_mut(),
            0,
        )
        .cast();
        let early = if early.is_null() { first(full) } else { early };
        if early.is_null() || (*early).done != 0 {
            return PASS;
        }
        capture(&ctx, early);
    }
    PASS
}

/// The storage of a socket whose packets were not seen before: where its stream begins, or that it has begun already.
///
/// # Safety
///
/// `full` is a full socket, as the verifier knows.
#[inline(always)]
unsafe fn first(full: *mut bpf_sock) -> *mut Early {
    // SAFETY: the helpers take a full socket; what they answer is checked for null before it is read or written.
    unsafe {
        // A listener has packets too: what asks it for a connection.
        if (*full).state != ESTABLISHED {
            return core::ptr::null_mut();
        }
        let tcp = bpf_tcp_sock(full);
        let kernel = bpf_skc_to_tcp_sock(full.cast()) as *const u8;
        if tcp.is_null() || kernel.is_null() {
            return core::ptr::null_mut();
        }
        let (begun, start) = ((*tcp).bytes_received, (*tcp).rcv_nxt);
        let early: *mut Early = bpf_sk_storage_get(
            (&raw const EARLY).cast_mut().cast(),
            full.cast(),
            core::ptr::null_mut(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
        .cast();
        if early.is_null() {
            lost(LOST_STORAGE);
            return early;
        }
        (*early).start = start;
        if begun != 0 || !read::in_namespace(kernel) {
            (*early).done = 1;
        }
        early
    }
}

/// Hands over the packet's payload.
///
/// # Safety
///
/// `early` is a storage of the packet's socket.
#[inline(always)]
unsafe fn capture(ctx: &SkBuffContext, early: *mut Early) {
    let skb: *mut __sk_buff = ctx.skb.skb;
    let mut ip = [0_u8; 20];
    // SAFETY: the helper copies into arrays of the given length, or fails.
    if unsafe { bpf_skb_load_bytes(skb.cast(), 0, ip.as_mut_ptr().cast(), 20) } != 0 {
        return;
    }
    // SAFETY: a field of the context.
    let (tcp_at, protocol) = if unsafe { (*skb).protocol } == ETH_P_IPV6 {
        (40, ip[6])
    } else {
        (u32::from(ip[0] & 15) * 4, ip[9])
    };
    let mut tcp = [0_u8; 20];
    // SAFETY: as above.
    if protocol != IPPROTO_TCP || unsafe { bpf_skb_load_bytes(skb.cast(), tcp_at, tcp.as_mut_ptr().cast(), 20) } != 0 {
        return;
    }
    let payload_at = tcp_at + u32::from(tcp[12] >> 4) * 4;
    // SAFETY: a field of the context.
    let total = unsafe { (*skb).len };
    if total <= payload_at {
        return;
    }
    let length = total - payload_at;
    let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
    // SAFETY: `early` is a storage of this socket.
    let early = unsafe { &mut *early };
    let offset = sequence.wrapping_sub(early.start);
    if offset > LONGEST {
        // Far ahead, or before the beginning: a keep-alive probe, or a hello that nobody sends.
        if early.seen > LONGEST {
            early.done = 1;
        }
        early.seen += 1;
        return;
    }
    let Some(mut entry) = HELLOS.reserve::<HelloRecord>(0) else {
        lost(LOST_HELLOS);
        warn!(ctx, "no room for the first octets of a connection");
        return;
    };
    let record = entry.as_mut_ptr();
    // SAFETY: the entry is reserved with that size. The length less one goes through memory, so that the compiler, which
    // knows its range, cannot remove the mask that shows it to the verifier; the helper copies so much, or fails.
    let (taken, copied) = unsafe {
        (*record).cookie = bpf_get_socket_cookie(skb.cast());
        (*record).offset = offset;
        (*record).length = if length > HELLO_OCTETS as u32 {
            HELLO_OCTETS as u32 - 1
        } else {
            length - 1
        };
        let taken = (core::ptr::read_volatile(&raw const (*record).length) & (HELLO_OCTETS as u32 - 1)) + 1;
        (*record).length = taken;
        let data = (&raw mut (*record).data).cast();
        (taken, bpf_skb_load_bytes(skb.cast(), payload_at, data, taken) == 0)
    };
    if !copied {
        entry.discard(0);
        return;
    }
    if offset == 0 && taken >= 5 {
        // SAFETY: at least five octets were copied.
        let head = unsafe { *(&raw const (*record).data).cast::<[u8; 5]>() };
        early.wanted = if head[0] == HANDSHAKE {
            5 + (u32::from(head[3]) << 8 | u32::from(head[4]))
        } else {
            1
        };
    }
    early.seen += taken;
    if (early.wanted != 0 && early.seen >= early.wanted) || early.seen > LONGEST {
        early.done = 1;
    }
    entry.submit(wake_beyond(&HELLOS, 1 << 19));
    debug!(ctx, "{} octets of a hello at {}", taken, offset);
}
