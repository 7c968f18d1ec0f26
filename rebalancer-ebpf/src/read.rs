//! Reading a socket's fields at offsets that the running kernel's BTF gave.
//!
//! Must never need `bpf_probe_read_kernel`: a kernel in lockdown (confidentiality) refuses it, and a load does the same.

use aya_ebpf::{
    cty::c_void,
    helpers::{bpf_probe_read_kernel, generated::bpf_skc_to_tcp_sock},
};

/// include/linux/socket.h
const AF_INET: u16 = 2;

/// Reads a member at an offset that is a constant to the verifier: it checks the access, and no helper is called.
///
/// # Safety
///
/// `base` is a kernel structure that the verifier knows.
#[inline(always)]
pub unsafe fn direct<T>(base: *const u8, offset: u32) -> T {
    // SAFETY: the verifier refuses the program unless the structure has a member there; a load of freed memory is
    // turned into 0 by the kernel's exception table.
    unsafe { core::ptr::read_volatile(base.wrapping_add(offset as usize).cast::<T>()) }
}

/// One of [`crate::OFFSETS`], read by itself: a constant to the verifier, since the loader freezes them.
#[macro_export]
macro_rules! offset {
    ($field:ident) => {{
        let offsets = (&raw const $crate::OFFSETS).cast::<rebalancer_common::Offsets>();
        #[allow(unused_unsafe, reason = "it is used inside unsafe blocks and outside of them")]
        // SAFETY: the global is nothing but its value, and frozen before any program runs.
        let value = unsafe { core::ptr::read_volatile(&raw const (*offsets).$field) };
        value
    }};
}

/// Whether the socket belongs to the watched network namespace.
///
/// # Safety
///
/// `socket` is a socket that the verifier knows.
#[inline(always)]
pub unsafe fn in_namespace(socket: *const u8) -> bool {
    // SAFETY: see `direct`; the namespace lives as long as its socket.
    unsafe { direct::<u32>(direct::<*const u8>(socket, offset!(net)), offset!(inum)) == offset!(netns) }
}

/// The socket as one of TCP's, on the watched port; null when it is not.
///
/// The port is `inet_sport`: a socket that is closed has given its `skc_num` back before it says so. MPTCP's own sockets
/// change their state beside those of TCP below them, and are none.
///
/// # Safety
///
/// `socket` is a socket that the verifier knows.
#[inline(always)]
pub unsafe fn watched(socket: *mut c_void) -> *const u8 {
    // SAFETY: the helper takes any socket and answers null for one that is not TCP's; see `direct` for the rest.
    unsafe {
        let num = u32::from(direct::<u16>(socket.cast(), offset!(num)));
        if num != offset!(port) && num != 0 {
            return core::ptr::null();
        }
        let tcp = bpf_skc_to_tcp_sock(socket) as *const u8;
        if !tcp.is_null() && u32::from(u16::from_be(direct(tcp, offset!(sport)))) != offset!(port) {
            return core::ptr::null();
        }
        tcp
    }
}

/// What MPTCP keeps of the socket; 0 for plain TCP, and where it is not asked.
///
/// # Safety
///
/// `tcp` is a `tcp_sock` that the verifier knows.
#[inline(always)]
unsafe fn mptcp(tcp: *const u8) -> u64 {
    // The offset is a constant: where it is 0 the verifier never sees what follows, nor the helper below, which a kernel
    // in lockdown (confidentiality) refuses.
    // SAFETY: see `direct`.
    unsafe {
        if offset!(is_mptcp) == 0 || direct::<u8>(tcp, offset!(is_mptcp)) == 0 {
            return 0;
        }
        direct(tcp, offset!(ulp_data))
    }
}

/// Reads what MPTCP keeps, which has no type there, so that a helper must, which checks the address and copies.
#[inline(always)]
fn kept<T>(subflow: u64, offset: u32) -> Option<T> {
    if offset!(is_mptcp) == 0 {
        return None;
    }
    // SAFETY: the helper takes any address.
    unsafe { bpf_probe_read_kernel((subflow + u64::from(offset)) as *const T) }.ok()
}

/// Whether a client's connection is this one: with MPTCP it has further ones, which have joined the first.
///
/// # Safety
///
/// `tcp` is a `tcp_sock` that the verifier knows.
#[inline(always)]
pub unsafe fn is_first(tcp: *const u8) -> bool {
    // SAFETY: as the caller says.
    let subflow = unsafe { mptcp(tcp) };
    subflow == 0 || !has_joined(subflow)
}

#[inline(always)]
fn has_joined(subflow: u64) -> bool {
    let bit = offset!(mp_join_bit);
    kept::<u8>(subflow, bit / 8).unwrap_or(0) >> (bit % 8) & 1 == 1
}

/// Which MPTCP connection it is of, and whether it joined others; zeros for plain TCP.
///
/// # Safety
///
/// `tcp` is a `tcp_sock` that the verifier knows.
#[inline(always)]
unsafe fn group(tcp: *const u8) -> (u32, u32) {
    // SAFETY: as the caller says.
    match unsafe { mptcp(tcp) } {
        0 => (0, 0),
        subflow => (
            kept(subflow, offset!(token)).unwrap_or(0),
            u32::from(has_joined(subflow)),
        ),
    }
}

/// TCP sequence number of the first octet of an established connection's client: no FIN has come there, which is one more.
///
/// # Safety
///
/// `tcp` is a `tcp_sock` that the verifier knows.
#[inline(always)]
unsafe fn start(tcp: *const u8) -> u32 {
    // SAFETY: see `direct`.
    unsafe {
        let received = direct::<u64>(tcp, offset!(bytes_received)) as u32;
        direct::<u32>(tcp, offset!(rcv_nxt)).wrapping_sub(received)
    }
}

/// Whose connection a socket is.
#[derive(Clone, Copy)]
pub struct Ends {
    pub local: [u64; 2],
    pub remote: [u64; 2],
    pub remote_port: u32,
    pub token: u32,
    pub joined: u32,
    pub start: u32,
}

/// The ends of a socket's connection. Every member is a word that was just read, so that it goes straight to where it is
/// kept: a record that is cleared first, or copied, costs a fourth of an event.
///
/// # Safety
///
/// `common` is a socket and `tcp` the same as one of TCP's, as the verifier knows.
#[inline(always)]
pub unsafe fn ends(common: *const u8, tcp: *const u8) -> Ends {
    // SAFETY: see `direct`.
    unsafe {
        let (local, remote) = if direct::<u16>(common, offset!(family)) == AF_INET {
            (
                v4(direct(common, offset!(rcv_saddr))),
                v4(direct(common, offset!(daddr))),
            )
        } else {
            (v6(common, offset!(v6_rcv_saddr)), v6(common, offset!(v6_daddr)))
        };
        let (token, joined) = group(tcp);
        Ends {
            local,
            remote,
            remote_port: u32::from(u16::from_be(direct(common, offset!(dport)))),
            token,
            joined,
            start: start(tcp),
        }
    }
}

/// An IPv6 address, word by word: the verifier lets nobody load more than a member of a member at once.
///
/// # Safety
///
/// As for [`direct`].
#[inline(always)]
unsafe fn v6(common: *const u8, at: u32) -> [u64; 2] {
    // SAFETY: see `direct`.
    unsafe {
        [
            words(direct(common, at), direct(common, at + 4)),
            words(direct(common, at + 8), direct(common, at + 12)),
        ]
    }
}

/// A v4-mapped address (RFC 4291, section 2.5.5.2), from how the kernel keeps it.
#[inline(always)]
fn v4(address: u32) -> [u64; 2] {
    [0, words(u32::from_ne_bytes([0, 0, 0xff, 0xff]), address)]
}

/// Two words as they follow each other in memory.
#[inline(always)]
fn words(first: u32, second: u32) -> u64 {
    if cfg!(target_endian = "little") {
        u64::from(first) | u64::from(second) << 32
    } else {
        u64::from(first) << 32 | u64::from(second)
    }
}

/// A v4-mapped address (RFC 4291, section 2.5.5.2).
#[inline(always)]
pub fn mapped(v4: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, v4[0], v4[1], v4[2], v4[3]]
}
