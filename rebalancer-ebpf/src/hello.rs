//! The first octets of each watched connection, as they arrive (cgroup_skb ingress).
//!
//! Every packet of the cgroup passes here: one for another port costs a comparison, one of a connection that is
//! classified a lookup.
//! Must never let one connection take more of the ring than [`PIECES`] packets and [`OCTETS`] octets, nor anybody without
//! one take of it: anyone can send a packet.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_tcp_sock},
    cty::c_void,
    helpers::generated::{
        bpf_get_socket_cookie, bpf_ringbuf_output, bpf_sk_fullsock, bpf_sk_release, bpf_sk_storage_get,
        bpf_skb_load_bytes, bpf_skc_lookup_tcp, bpf_skc_to_tcp_request_sock, bpf_skc_to_tcp_sock,
        bpf_tcp_sock as tcp_of,
    },
    macros::cgroup_skb,
    programs::SkBuffContext,
};
use aya_log_ebpf::{debug, warn};
use rebalancer_common::{Early, HELLO_HEADER, HELLO_OCTETS, HelloRecord, LOST_HELLOS, LOST_STORAGE};

use crate::{EARLY, HELLOS, SCRATCH, lost, offset, read, wake_beyond};

const PASS: i32 = 1;
/// include/net/tcp_states.h
const ESTABLISHED: u32 = 1;
const LISTEN: u32 = 10;
const NEW_SYN_RECV: u32 = 12;
/// include/uapi/linux/bpf.h, BPF_F_CURRENT_NETNS: the network namespace the packet came in.
const CURRENT_NAMESPACE: u64 = u64::MAX;
const IPPROTO_TCP: u8 = 6;
/// Headers between those of IPv6 and TCP (RFC 8200, section 4.1), and how many of them there may be.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION: u8 = 60;
const EXTENSIONS: u32 = 4;
/// The flags SYN, RST and ACK in the fourteenth octet of a TCP header (RFC 9293, section 3.1).
const SYN_OR_RST: u8 = 0x02 | 0x04;
const ACK: u8 = 0x10;
/// TLS content type of a handshake record (RFC 8446, section 5.1).
const HANDSHAKE: u8 = 22;
/// No hello is longer: kernel and agent give up here.
const LONGEST: u32 = 16_384;
/// Packets of one connection that are handed over at most.
const PIECES: u32 = 64;
/// Of these, when the beginning was not seen here, because it came with the end of the TCP handshake.
const PIECES_AFTER: u32 = 8;
/// Segments with data after which a connection is old, whatever they brought: by then its pieces are used up.
const SEGMENTS: u32 = 2 * PIECES;
/// Octets of one connection that are handed over at most, again and again where they came so.
const OCTETS: u32 = 2 * LONGEST;
/// include/uapi/linux/if_ether.h, network order.
const ETH_P_IPV6: u32 = 0x86dd_u16.to_be() as u32;

/// A packet's payload.
struct Segment {
    is_v6: bool,
    tcp_at: u32,
    payload_at: u32,
    length: u32,
    sequence: u32,
    flags: u8,
}

/// Runs at each packet that arrives for a socket of the cgroup.
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
        let tcp = tcp_of(socket);
        // What most connections pay ends here: their beginning is long past.
        if tcp.is_null() || (*tcp).bytes_received > u64::from(LONGEST) || (*tcp).data_segs_in > SEGMENTS {
            return PASS;
        }
        let mut early = storage(tcp.cast(), 0);
        if early.is_null() {
            early = beginning(&ctx, socket, tcp);
        }
        if !early.is_null() && (*early).done == 0 {
            of_connection(&ctx, tcp, early);
        }
    }
    PASS
}

/// # Safety
///
/// `socket` is a socket, as the verifier knows.
#[inline(always)]
unsafe fn storage(socket: *mut c_void, flags: u32) -> *mut Early {
    // SAFETY: the helper takes any kind of socket.
    unsafe {
        bpf_sk_storage_get(
            (&raw const EARLY).cast_mut().cast(),
            socket,
            core::ptr::null_mut(),
            u64::from(flags),
        )
        .cast()
    }
}

/// A packet of a socket of which nothing is kept: what to keep of it from now on, or null when it is none whose beginning
/// is to be seen. Storage is made here and not when the connection opens, where it would be most of what an open costs.
///
/// # Safety
///
/// `socket` is a socket and `tcp` what TCP has of it, as the verifier knows.
#[inline(always)]
unsafe fn beginning(ctx: &SkBuffContext, socket: *mut bpf_sock, tcp: *mut bpf_tcp_sock) -> *mut Early {
    const NOTHING: *mut Early = core::ptr::null_mut();
    // SAFETY: the helpers take a socket; what they answer is checked for null before it is read or written.
    unsafe {
        let full = bpf_sk_fullsock(socket);
        if full.is_null() {
            return NOTHING;
        }
        let state = (*full).state;
        // The packet that ends the TCP handshake may have brought data: then no segment came without but the one that the
        // kernel counts from the start (net/ipv4/tcp_minisocks.c, tcp_create_openreq_child). Any other stream that has begun
        // did so before the programs were there.
        let begun = (*tcp).bytes_received != 0;
        let with_handshake = begun && (*tcp).segs_in == (*tcp).data_segs_in.wrapping_add(1);
        if state != LISTEN && (state != ESTABLISHED || (begun && !with_handshake)) {
            return NOTHING;
        }
        let kernel = bpf_skc_to_tcp_sock(full.cast()) as *const u8;
        if kernel.is_null() || !read::in_namespace(kernel) {
            return NOTHING;
        }
        if !with_handshake {
            let Some(segment) = segment(ctx) else {
                return NOTHING;
            };
            if state == LISTEN {
                // It is filtered before there is a connection.
                if segment.flags & (SYN_OR_RST | ACK) == ACK {
                    before_connection(ctx, &segment);
                }
                return NOTHING;
            }
        }
        if !read::is_first(kernel) {
            return NOTHING;
        }
        let early = storage(full.cast(), BPF_SK_STORAGE_GET_F_CREATE);
        if early.is_null() {
            lost(LOST_STORAGE);
        } else {
            (*early).start = (*tcp).rcv_nxt.wrapping_sub((*tcp).bytes_received as u32);
        }
        early
    }
}

/// A packet of a connection whose beginning is wanted.
///
/// # Safety
///
/// `tcp` is what TCP has of a socket, as the verifier knows, and `early` that socket's storage.
#[inline(always)]
unsafe fn of_connection(ctx: &SkBuffContext, tcp: *mut bpf_tcp_sock, early: *mut Early) {
    // SAFETY: both pointers were checked for null.
    let (received, early) = unsafe { ((*tcp).rcv_nxt, &mut *early) };
    // What TCP has taken has passed here: retransmissions of it bring nothing.
    let received = received.wrapping_sub(early.start);
    if received > LONGEST || (early.wanted != 0 && received >= early.wanted) {
        early.done = 1;
        return;
    }
    let Some(segment) = segment(ctx) else {
        return;
    };
    let offset = segment.sequence.wrapping_sub(early.start);
    if offset > LONGEST {
        // Far ahead, or before the beginning, as a keep-alive probe is.
        return;
    }
    if early.pieces == 0 && received > 0 {
        early.pieces = PIECES - PIECES_AFTER;
    }
    // SAFETY: the helper takes the context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.skb.skb.cast()) };
    if early.pieces >= PIECES || early.octets >= OCTETS {
        early.done = 1;
        no_more(ctx, cookie);
        return;
    }
    early.pieces += 1;
    let taken = hand_over(ctx, &segment, cookie, offset, early);
    early.octets += taken;
    if offset <= early.seen && offset + taken > early.seen {
        early.seen = offset + taken;
    }
    if early.wanted != 0 && early.seen >= early.wanted {
        early.done = 1;
    }
    debug!(ctx, "{} octets of a hello at {}", taken, offset);
}

/// A packet that ends a TCP handshake and has a payload.
#[inline(always)]
fn before_connection(ctx: &SkBuffContext, segment: &Segment) {
    // The packet's ends in the order it has them, as the lookup wants them: its sender, the listener, their ports.
    let mut ends = [0_u32; 9];
    let skb: *mut __sk_buff = ctx.skb.skb;
    let ports_at = if segment.is_v6 { 8 } else { 2 };
    // SAFETY: the helper copies into an array that has room for so many words, or fails; the lookup takes the same.
    let place = unsafe {
        let into = ends.as_mut_ptr();
        if segment.is_v6 {
            let failed = bpf_skb_load_bytes(skb.cast(), 8, into.cast(), 32)
                | bpf_skb_load_bytes(skb.cast(), segment.tcp_at, into.add(8).cast(), 4);
            if failed == 0 {
                place_in_stream(ctx, &mut ends, 36, segment)
            } else {
                None
            }
        } else {
            let failed = bpf_skb_load_bytes(skb.cast(), 12, into.cast(), 8)
                | bpf_skb_load_bytes(skb.cast(), segment.tcp_at, into.add(2).cast(), 4);
            if failed == 0 {
                place_in_stream(ctx, &mut ends, 12, segment)
            } else {
                None
            }
        }
    };
    let (Some((start, offset)), Some(scratch)) = (place, SCRATCH.get_ptr_mut(0)) else {
        return;
    };
    // SAFETY: the scratch is this CPU's, where nothing else runs meanwhile.
    let record = unsafe { &mut (*scratch).record };
    record.start = start;
    let ports = ends[ports_at].to_ne_bytes();
    record.remote_port = u32::from(u16::from_be_bytes([ports[0], ports[1]]));
    if segment.is_v6 {
        record.remote = octets([ends[0], ends[1], ends[2], ends[3]]);
        record.local = octets([ends[4], ends[5], ends[6], ends[7]]);
    } else {
        record.remote = read::mapped(ends[0].to_ne_bytes());
        record.local = read::mapped(ends[1].to_ne_bytes());
    }
    let mut nobodys = Early {
        wanted: 1,
        ..Early::default()
    };
    hand_over(ctx, segment, 0, offset, &mut nobodys);
}

/// Where the stream of its client begins and where in it a packet does that ends a TCP handshake; `None` for one that ends
/// none, which anyone can send under any address, and while the kernel keeps no handshakes (SYN cookies).
///
/// # Safety
///
/// The first `size` octets of `ends` are a `bpf_sock_tuple` of that size.
#[inline(always)]
unsafe fn place_in_stream(ctx: &SkBuffContext, ends: &mut [u32; 9], size: u32, segment: &Segment) -> Option<(u32, u32)> {
    // SAFETY: the helpers take the context and what the caller says; the socket is checked for null, and given back once,
    // after all that is read of it.
    unsafe {
        let skb: *mut c_void = ctx.skb.skb.cast();
        let socket = bpf_skc_lookup_tcp(skb, ends.as_mut_ptr().cast(), size, CURRENT_NAMESPACE, 0);
        if socket.is_null() {
            return None;
        }
        let is_handshake = core::ptr::read_volatile(&raw const (*socket).state) == NEW_SYN_RECV;
        let request = bpf_skc_to_tcp_request_sock(socket.cast()) as *const u8;
        // The kernel does not say it where listeners are for MPTCP: there what looks like the first one is taken for it.
        let start = if !request.is_null() {
            Some(read::direct::<u32>(request, offset!(rcv_isn)).wrapping_add(1))
        } else if begins(ctx, segment) {
            Some(segment.sequence)
        } else {
            None
        };
        bpf_sk_release(socket.cast());
        let start = start.filter(|_| is_handshake)?;
        let offset = segment.sequence.wrapping_sub(start);
        (offset <= LONGEST).then_some((start, offset))
    }
}

/// Whether a payload begins as a TLS record of TLS 1.0 or later does (RFC 8446, section 5.1), a PROXY protocol header, or a
/// request without TLS (RFC 9110, section 9.3; RFC 9113, section 3.4): the middle of a hello, taken for a beginning, would be
/// a protocol of its own.
#[inline(always)]
fn begins(ctx: &SkBuffContext, segment: &Segment) -> bool {
    let (mut head, mut word) = ([0_u8; 2], [0_u8; 4]);
    let skb: *mut c_void = ctx.skb.skb.cast();
    // SAFETY: the helper copies into arrays of the given length, or fails: a payload may be shorter than a word.
    let (no_head, no_word) = unsafe {
        (
            bpf_skb_load_bytes(skb, segment.payload_at, head.as_mut_ptr().cast(), 2) != 0,
            bpf_skb_load_bytes(skb, segment.payload_at, word.as_mut_ptr().cast(), 4) != 0,
        )
    };
    let speaks = !no_head && matches!(&head, [HANDSHAKE, 3] | b"PR" | b"\r\n");
    let asks = !no_word
        && matches!(
            &word,
            b"GET " | b"HEAD" | b"POST" | b"PUT " | b"DELE" | b"CONN" | b"OPTI" | b"TRAC" | b"PATC"
        );
    speaks || asks
}

/// The octets of four words.
#[inline(always)]
fn octets(words: [u32; 4]) -> [u8; 16] {
    // SAFETY: integers of the same size altogether, of which any are a value.
    unsafe { core::mem::transmute(words) }
}

/// Says that no more of a connection is handed over.
#[inline(always)]
fn no_more(ctx: &SkBuffContext, cookie: u64) {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: the scratch is this CPU's, where nothing else runs meanwhile.
    let record: &mut HelloRecord = unsafe { &mut (*scratch).record };
    record.cookie = cookie;
    record.length = 0;
    put(ctx, record, 0);
}

/// Where the payload is; `None` without one.
#[inline(always)]
fn segment(ctx: &SkBuffContext) -> Option<Segment> {
    let skb: *mut __sk_buff = ctx.skb.skb;
    let mut ip = [0_u8; 20];
    // SAFETY: the helper copies into arrays of the given length, or fails.
    if unsafe { bpf_skb_load_bytes(skb.cast(), 0, ip.as_mut_ptr().cast(), 20) } != 0 {
        return None;
    }
    // SAFETY: a field of the context.
    let is_v6 = unsafe { (*skb).protocol } == ETH_P_IPV6;
    let (mut tcp_at, mut protocol) = if is_v6 {
        (40, ip[6])
    } else {
        (u32::from(ip[0] & 15) * 4, ip[9])
    };
    for _ in 0..EXTENSIONS {
        // IPv6's headers of extensions (RFC 8200, sections 4.3 to 4.6); an IPv4 packet with such a protocol is no TCP.
        if !matches!(protocol, HOP_BY_HOP | ROUTING | DESTINATION) {
            break;
        }
        let mut head = [0_u8; 2];
        // SAFETY: as above.
        if unsafe { bpf_skb_load_bytes(skb.cast(), tcp_at, head.as_mut_ptr().cast(), 2) } != 0 {
            return None;
        }
        protocol = head[0];
        tcp_at += 8 + 8 * u32::from(head[1]);
    }
    let mut tcp = [0_u8; 20];
    // SAFETY: as above.
    if protocol != IPPROTO_TCP || unsafe { bpf_skb_load_bytes(skb.cast(), tcp_at, tcp.as_mut_ptr().cast(), 20) } != 0 {
        return None;
    }
    let payload_at = tcp_at + u32::from(tcp[12] >> 4) * 4;
    // SAFETY: a field of the context.
    let total = unsafe { (*skb).len };
    (total > payload_at).then(|| Segment {
        is_v6,
        tcp_at,
        payload_at,
        length: total - payload_at,
        sequence: u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]),
        flags: tcp[13],
    })
}

/// Hands over the payload, in records as long as what there is: how many octets, lost ones included.
#[inline(always)]
fn hand_over(ctx: &SkBuffContext, segment: &Segment, cookie: u64, offset: u32, early: &mut Early) -> u32 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: the scratch is this CPU's, where nothing else runs meanwhile.
    let record: &mut HelloRecord = unsafe { &mut (*scratch).record };
    record.cookie = cookie;
    let mut handed = 0;
    for _ in 0..LONGEST / HELLO_OCTETS as u32 {
        if handed >= segment.length {
            break;
        }
        let left = segment.length - handed;
        record.offset = offset + handed;
        record.length = if left > HELLO_OCTETS as u32 {
            HELLO_OCTETS as u32 - 1
        } else {
            left - 1
        };
        // SAFETY: the length less one goes through memory, so that the compiler, which knows its range, cannot remove the
        // mask that shows it to the verifier; the helper copies so much, or fails.
        let (taken, copied) = unsafe {
            let taken = (core::ptr::read_volatile(&raw const record.length) & (HELLO_OCTETS as u32 - 1)) + 1;
            let data = (&raw mut record.data).cast();
            let copied = bpf_skb_load_bytes(ctx.skb.skb.cast(), segment.payload_at + handed, data, taken) == 0;
            (taken, copied)
        };
        if !copied {
            break;
        }
        record.length = taken;
        if early.wanted == 0 {
            look(record, early);
        }
        put(ctx, record, taken);
        handed += taken;
    }
    handed
}

/// Puts a record with so many octets into the ring, of which there are no more than it has room for.
#[inline(always)]
fn put(ctx: &SkBuffContext, record: &mut HelloRecord, octets: u32) {
    // SAFETY: the record has its header and as many octets of data.
    let full = unsafe {
        bpf_ringbuf_output(
            (&raw const HELLOS).cast_mut().cast(),
            (&raw mut *record).cast(),
            u64::from(HELLO_HEADER as u32 + octets),
            wake_beyond(&HELLOS, 1 << 19, 1 << 14),
        )
    };
    if full != 0 {
        lost(LOST_HELLOS);
        warn!(ctx, "no room for the first octets of a connection");
    }
}

/// Learns from the first octets how many are wanted: the whole hello, behind a PROXY protocol header if there is one.
#[inline(always)]
fn look(record: &mut HelloRecord, early: &mut Early) {
    let (offset, taken) = (record.offset, record.length);
    let data = &record.data;
    if offset == 0 && early.base == 0 {
        // haproxy's doc/proxy-protocol.txt, sections 2.1 and 2.2.
        if taken >= 6 && data[..6] == *b"PROXY " {
            for at in 6..107 {
                if at < taken as usize && data[at] == b'\n' {
                    early.base = at as u32 + 1;
                    break;
                }
            }
        } else if taken >= 16 && data[..4] == *b"\r\n\r\n" {
            early.base = 16 + (u32::from(data[14]) << 8 | u32::from(data[15]));
        } else if data[0] != HANDSHAKE && data[0] != b'P' && data[0] != b'\r' {
            // Not TLS: that is all there is to know.
            early.wanted = 1;
            return;
        }
    }
    if early.base == 0 && (offset != 0 || data[0] != HANDSHAKE) {
        return;
    }
    let at = early.base.wrapping_sub(offset);
    if at >= taken || taken - at < 5 {
        return;
    }
    record.scratch = at;
    // SAFETY: the offset goes through memory, so that the compiler cannot remove the mask that shows the verifier where
    // it ends; behind the record there is room for what is read.
    let head = unsafe {
        let at = core::ptr::read_volatile(&raw const record.scratch) & (HELLO_OCTETS as u32 - 1);
        (&raw const record.data)
            .cast::<u8>()
            .add(at as usize)
            .cast::<[u8; 9]>()
            .read_unaligned()
    };
    if head[0] != HANDSHAKE {
        early.wanted = early.base + 1;
        return;
    }
    let tls = u32::from(head[3]) << 8 | u32::from(head[4]);
    let hello = 4 + (u32::from(head[6]) << 16 | u32::from(head[7]) << 8 | u32::from(head[8]));
    // A hello that spans records (RFC 8446, section 5.1) ends somewhere: the bounds end it here.
    if taken - at < 9 || hello <= tls {
        early.wanted = early.base + 5 + tls;
    }
}
