//! The ABI between the kernel programs and the agent: plain `repr(C)` integers, no padding.
//!
//! Must never hold an enum, a bool or a pointer: the two sides are compiled apart.
#![no_std]

pub mod intercept;
pub mod steer;

/// [`SocketRecord::kind`]: a connection was accepted.
pub const KIND_OPENED: u32 = 1;
/// [`SocketRecord::kind`]: a connection is no longer established.
pub const KIND_CLOSED: u32 = 2;
/// [`SocketRecord::kind`]: a socket began or ceased to listen.
pub const KIND_LISTENER: u32 = 3;

/// How many octets of a packet one [`HelloRecord`] holds.
pub const HELLO_OCTETS: usize = 4096;

/// Index into the map `LOST`: socket events that found the ring buffer full.
pub const LOST_EVENTS: u32 = 0;
/// Index into the map `LOST`: ClientHello pieces that found the ring buffer full.
pub const LOST_HELLOS: u32 = 1;
/// Index into the map `LOST`: connections whose socket storage could not be made.
pub const LOST_STORAGE: u32 = 2;
/// How many counters the map `LOST` has.
pub const LOST_COUNTERS: u32 = 3;

/// One socket: an event, or a line of the iterator's list. Opens have no bytes, closes neither addresses nor ports.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketRecord {
    /// The socket's cookie.
    pub cookie: u64,
    /// `tcp_sock.bytes_received`.
    pub bytes_in: u64,
    /// `tcp_sock.bytes_acked`.
    pub bytes_out: u64,
    /// Own address; IPv4 is v4-mapped.
    pub local: [u8; 16],
    /// The peer's address; IPv4 is v4-mapped.
    pub remote: [u8; 16],
    /// Own port, host order.
    pub local_port: u32,
    /// The peer's port, host order.
    pub remote_port: u32,
    /// One of the `KIND_` constants in events, 0 in the list.
    pub kind: u32,
    /// The TCP state (include/net/tcp_states.h), in the list.
    pub state: u32,
}

/// The payload of one early packet of a connection.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HelloRecord {
    /// The socket's cookie.
    pub cookie: u64,
    /// Where in the client's stream the payload begins.
    pub offset: u32,
    /// How many octets of `data` are filled.
    pub length: u32,
    /// The octets.
    pub data: [u8; HELLO_OCTETS],
}

/// What the kernel programs keep with a socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Early {
    /// TCP sequence number of the client's first octet.
    pub start: u32,
    /// Octets handed over so far.
    pub seen: u32,
    /// Octets wanted: the length of the first TLS record, once known.
    pub wanted: u32,
    /// Not 0: nothing more is looked at.
    pub done: u32,
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
    /// `tcp_sock.bytes_received`
    pub bytes_received: u32,
    /// `tcp_sock.bytes_acked`
    pub bytes_acked: u32,
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
