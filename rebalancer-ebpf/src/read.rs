//! Reading a socket's fields at offsets that the running kernel's BTF gave.

use aya_ebpf::{
    cty::c_void,
    helpers::{bpf_probe_read_kernel, generated::bpf_skc_to_tcp_sock},
};
use rebalancer_common::{Offsets, SocketRecord};

/// include/linux/socket.h
const AF_INET: u16 = 2;

/// Reads a field; 0 when it cannot be read, which the kernel does not let happen for a live socket.
#[inline(always)]
pub fn field<T: Default>(base: *const u8, offset: u32) -> T {
    // SAFETY: the helper checks the address and copies; no reference is made.
    unsafe { bpf_probe_read_kernel(base.wrapping_add(offset as usize).cast::<T>()) }.unwrap_or_default()
}

/// Whether the socket belongs to the watched network namespace.
#[inline(always)]
pub fn in_namespace(socket: *const u8, offsets: &Offsets) -> bool {
    let net: u64 = field(socket, offsets.net);
    let inum: u32 = field(net as *const u8, offsets.inum);
    inum == offsets.netns
}

/// Everything of a record but its cookie.
#[inline(always)]
pub fn record(socket: *mut c_void, offsets: &Offsets) -> SocketRecord {
    let common = socket.cast::<u8>().cast_const();
    let mut record = SocketRecord {
        cookie: 0,
        bytes_in: 0,
        bytes_out: 0,
        local: [0; 16],
        remote: [0; 16],
        local_port: u32::from(field::<u16>(common, offsets.num)),
        remote_port: u32::from(u16::from_be(field(common, offsets.dport))),
        kind: 0,
        state: 0,
    };
    if field::<u16>(common, offsets.family) == AF_INET {
        record.local = mapped(field(common, offsets.rcv_saddr));
        record.remote = mapped(field(common, offsets.daddr));
    } else {
        record.local = field(common, offsets.v6_rcv_saddr);
        record.remote = field(common, offsets.v6_daddr);
    }
    // SAFETY: the helper takes any socket and answers null for one that is not TCP's.
    let tcp = unsafe { bpf_skc_to_tcp_sock(socket.cast()) } as *const u8;
    if !tcp.is_null() {
        record.bytes_in = field(tcp, offsets.bytes_received);
        record.bytes_out = field(tcp, offsets.bytes_acked);
    }
    record
}

/// A v4-mapped address (RFC 4291, section 2.5.5.2).
#[inline(always)]
fn mapped(v4: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, v4[0], v4[1], v4[2], v4[3]]
}
