//! The ABI between the kernel programs and the agent: plain `repr(C)` integers, no padding.
//!
//! Must never hold an enum, a bool or a pointer: the two sides are compiled apart.
#![no_std]

pub mod intercept;
pub mod steer;

/// [`Event::kind`]: a connection was accepted.
pub const KIND_OPENED: u32 = 1;
/// [`Event::kind`]: a connection is no longer established.
pub const KIND_CLOSED: u32 = 2;
/// [`Event::kind`]: a connection was accepted that joined others, as a subflow of MPTCP.
pub const KIND_JOINED: u32 = 3;

/// How many octets of a packet one [`HelloRecord`] holds at most: it is as long as what came.
pub const HELLO_OCTETS: usize = 4096;

/// How many events are kept until they are read, a power of two: room for 8,000 connections that open and close.
pub const EVENTS: u32 = 1 << 14;

/// Index into the map `LOST`: listeners' events that found the ring buffer full.
pub const LOST_EVENTS: u32 = 0;
/// Index into the map `LOST`: ClientHello pieces that found the ring buffer full.
pub const LOST_HELLOS: u32 = 1;
/// Index into the map `LOST`: connections whose socket storage could not be made.
pub const LOST_STORAGE: u32 = 2;
/// How many counters the map `LOST` has.
pub const LOST_COUNTERS: u32 = 3;

/// An opening or a close, in the place of the map `EVENTS` that its turn has: one line of a processor's cache.
///
/// A place is used again [`EVENTS`] turns later, whether it was read or not: the map `TURNS` tells how many there were.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// How many events there were with this one, written last: until then the place holds an older one, or a part.
    pub turn: u64,
    /// The socket's cookie.
    pub cookie: u64,
    /// [`KIND_OPENED`], [`KIND_CLOSED`] or [`KIND_JOINED`].
    pub kind: u32,
    /// The peer's port, host order; of an opening.
    pub remote_port: u32,
    /// As [`SocketRecord::token`]; of an opening.
    pub token: u32,
    /// As [`SocketRecord::start`]; of an opening.
    pub start: u32,
    /// Of an opening own address and the peer's, as in [`SocketRecord`]; of a close `bytes_received` and `bytes_acked`.
    pub told: [u64; 4],
}

/// One socket: a line of the iterator's list.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketRecord {
    /// The socket's cookie.
    pub cookie: u64,
    /// `tcp_sock.bytes_received`.
    pub bytes_in: u64,
    /// `tcp_sock.bytes_acked`.
    pub bytes_out: u64,
    /// Own address, its octets in the order of memory; IPv4 is v4-mapped.
    pub local: [u64; 2],
    /// The peer's address, likewise.
    pub remote: [u64; 2],
    /// Own port, host order.
    pub local_port: u32,
    /// The peer's port, host order.
    pub remote_port: u32,
    /// The token of the MPTCP connection it is a subflow of; 0 for plain TCP.
    pub token: u32,
    /// Not 0: it joined other subflows.
    pub joined: u32,
    /// The TCP state (include/net/tcp_states.h).
    pub state: u32,
    /// TCP sequence number of the client's first octet: with both addresses, it names the connection and no earlier one.
    pub start: u32,
}

const _: () = {
    assert!(size_of::<Event>() == 64);
    assert!(size_of::<SocketRecord>() == 80);
    assert!(EVENTS.is_power_of_two());
};

/// The payload of one early packet of a connection, or a part of it.
///
/// One without octets says that no more of its connection are handed over, because it has taken as much of the ring as one
/// may. Whether its hello is whole by then the agent knows.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HelloRecord {
    /// The socket's cookie; 0 when the packet came before there was one, with the end of the TCP handshake.
    pub cookie: u64,
    /// Where in the client's stream the payload begins.
    pub offset: u32,
    /// How many octets of `data` are filled.
    pub length: u32,
    /// Own address, where there is no cookie; IPv4 is v4-mapped.
    pub local: [u8; 16],
    /// The client's address, where there is no cookie; IPv4 is v4-mapped.
    pub remote: [u8; 16],
    /// The client's port, where there is no cookie, host order.
    pub remote_port: u32,
    /// As [`SocketRecord::start`], where there is no cookie.
    pub start: u32,
    /// The program's own.
    pub scratch: u32,
    /// Nothing.
    pub unused: u32,
    /// The octets.
    pub data: [u8; HELLO_OCTETS],
}

/// Size of a [`HelloRecord`] without its data.
pub const HELLO_HEADER: usize = core::mem::offset_of!(HelloRecord, data);

const _: () = assert!(size_of::<HelloRecord>() == HELLO_HEADER + HELLO_OCTETS);

/// What the kernel programs keep with a socket whose first octets they look at.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Early {
    /// TCP sequence number of the client's first octet.
    pub start: u32,
    /// The highest offset up to which everything was handed over.
    pub seen: u32,
    /// Octets wanted, once known.
    pub wanted: u32,
    /// Not 0: nothing more is looked at.
    pub done: u32,
    /// Where TLS begins: behind a PROXY protocol header, if there is one.
    pub base: u32,
    /// Packets handed over.
    pub pieces: u32,
    /// Octets handed over, again and again where they came so.
    pub octets: u32,
    /// Nothing.
    pub unused: u32,
}

/// The offsets of kernel structures' members, read from the running kernel's BTF.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    /// `sock_common.skc_family`
    pub family: u32,
    /// `sock_common.skc_state`
    pub state: u32,
    /// `sock_common.skc_num`
    pub num: u32,
    /// `sock_common.skc_dport`
    pub dport: u32,
    /// `sock_common.skc_daddr`
    pub daddr: u32,
    /// `sock_common.skc_rcv_saddr`
    pub rcv_saddr: u32,
    /// `sock_common.skc_v6_daddr`
    pub v6_daddr: u32,
    /// `sock_common.skc_v6_rcv_saddr`
    pub v6_rcv_saddr: u32,
    /// `sock_common.skc_net`
    pub net: u32,
    /// `net.ns` and `ns_common.inum`
    pub inum: u32,
    /// `inet_sock.inet_sport`, which is where a `tcp_sock` begins: unlike `skc_num` it outlives the port's release
    pub sport: u32,
    /// `tcp_sock.bytes_received`
    pub bytes_received: u32,
    /// `tcp_sock.bytes_acked`
    pub bytes_acked: u32,
    /// `tcp_sock.is_mptcp`; 0 where it is not asked
    pub is_mptcp: u32,
    /// `inet_connection_sock.icsk_ulp_data`, which is where a `tcp_sock` begins
    pub ulp_data: u32,
    /// `mptcp_subflow_context.mp_join`, in bits
    pub mp_join_bit: u32,
    /// `mptcp_subflow_context.token`
    pub token: u32,
    /// `tcp_request_sock.rcv_isn`
    pub rcv_isn: u32,
    /// `tcp_sock.rcv_nxt`
    pub rcv_nxt: u32,
    /// The watched port.
    pub port: u32,
    /// The watched network namespace (inode number of /proc/self/ns/net).
    pub netns: u32,
}

#[cfg(feature = "user")]
mod user {
    // SAFETY: `repr(C)` integers without padding: any bytes are a value, and a value is nothing but its bytes.
    unsafe impl aya::Pod for super::Offsets {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::intercept::Steered {}
    // SAFETY: as above; the sizes are asserted to be the sums of the members'.
    unsafe impl aya::Pod for super::steer::ClientKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::steer::Victim {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::steer::Place {}
}
