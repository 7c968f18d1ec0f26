//! What the kernel programs write, read: events, hellos, and records of the list.
//!
//! Must never take a record that is not whole for one that is.

use std::{
    mem,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use rebalancer_common::{Event, HelloRecord, KIND_JOINED, SocketRecord};
use rebalancer_core::{ids::ConnectionId, observation::Socket, subflows::Subflow};

/// Reads a record of the list; `None` when it is not whole.
pub fn record(bytes: &[u8]) -> Option<SocketRecord> {
    let word = |at: usize| bytes.get(at..)?.first_chunk().map(|chunk| u64::from_ne_bytes(*chunk));
    let half = |at: usize| bytes.get(at..)?.first_chunk().map(|chunk| u32::from_ne_bytes(*chunk));
    let address = |at: usize| Some([word(at)?, word(at + 8)?]);
    Some(SocketRecord {
        cookie: word(mem::offset_of!(SocketRecord, cookie))?,
        bytes_in: word(mem::offset_of!(SocketRecord, bytes_in))?,
        bytes_out: word(mem::offset_of!(SocketRecord, bytes_out))?,
        local: address(mem::offset_of!(SocketRecord, local))?,
        remote: address(mem::offset_of!(SocketRecord, remote))?,
        local_port: half(mem::offset_of!(SocketRecord, local_port))?,
        remote_port: half(mem::offset_of!(SocketRecord, remote_port))?,
        token: half(mem::offset_of!(SocketRecord, token))?,
        joined: half(mem::offset_of!(SocketRecord, joined))?,
        state: half(mem::offset_of!(SocketRecord, state))?,
        start: half(mem::offset_of!(SocketRecord, start))?,
    })
}

/// The payload of an early packet.
pub struct Hello<'a> {
    pub id: ConnectionId,
    pub offset: usize,
    pub payload: &'a [u8],
    pub local: IpAddr,
    pub remote: SocketAddr,
    pub start: u32,
}

/// Reads a hello; `None` when it is not whole.
pub fn hello(bytes: &[u8]) -> Option<Hello<'_>> {
    let half = |at: usize| bytes.get(at..)?.first_chunk().map(|chunk| u32::from_ne_bytes(*chunk));
    let ip = |at: usize| bytes.get(at..)?.first_chunk::<16>().map(|octets| address(*octets));
    let length = half(mem::offset_of!(HelloRecord, length))? as usize;
    let data = bytes.get(mem::offset_of!(HelloRecord, data)..)?;
    let remote_port = half(mem::offset_of!(HelloRecord, remote_port))?;
    Some(Hello {
        id: ConnectionId(u64::from_ne_bytes(*bytes.first_chunk()?)),
        offset: half(mem::offset_of!(HelloRecord, offset))? as usize,
        payload: data.get(..length)?,
        local: ip(mem::offset_of!(HelloRecord, local))?,
        remote: SocketAddr::new(
            ip(mem::offset_of!(HelloRecord, remote))?,
            u16::try_from(remote_port).unwrap_or(0),
        ),
        start: half(mem::offset_of!(HelloRecord, start))?,
    })
}

/// An address as the programs write it.
fn address(octets: [u8; 16]) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from(octets)).to_canonical()
}

/// The octets of an address that is kept in words, in the order of memory.
fn octets([first, second]: [u64; 2]) -> [u8; 16] {
    let (first, second) = (first.to_ne_bytes(), second.to_ne_bytes());
    std::array::from_fn(|at| if at < 8 { first[at] } else { second[at - 8] })
}

/// The socket a record is of.
pub fn subflow(record: &SocketRecord) -> Subflow {
    let port = |port: u32| u16::try_from(port).unwrap_or(0);
    let socket = Socket {
        id: ConnectionId(record.cookie),
        local: SocketAddr::new(address(octets(record.local)), port(record.local_port)),
        remote: SocketAddr::new(address(octets(record.remote)), port(record.remote_port)),
        bytes_in: record.bytes_in,
        bytes_out: record.bytes_out,
        start: record.start,
    };
    Subflow {
        socket,
        token: record.token,
        joined: record.joined != 0,
    }
}

/// The socket that opened on that port.
pub fn opened(event: &Event, port: u16) -> Subflow {
    let [local, also_local, remote, also_remote] = event.told;
    subflow(&SocketRecord {
        cookie: event.cookie,
        local: [local, also_local],
        remote: [remote, also_remote],
        local_port: u32::from(port),
        remote_port: event.remote_port,
        token: event.token,
        joined: u32::from(event.kind == KIND_JOINED),
        start: event.start,
        ..SocketRecord::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_whole_or_not_at_all() {
        let words: Vec<u64> = (1..=10).collect();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let whole = record(&bytes).expect("a whole record");
        assert_eq!((whole.cookie, whole.bytes_in, whole.bytes_out), (1, 2, 3));
        assert_eq!((whole.local, whole.remote), ([4, 5], [6, 7]));
        for short in 0..bytes.len() {
            assert_eq!(record(&bytes[..short]), None, "{short} octets");
        }
    }

    #[test]
    fn who_opened_is_in_the_event() {
        let words = |octets: [u8; 16]| {
            let (halves, _) = octets.as_chunks::<8>();
            [u64::from_ne_bytes(halves[0]), u64::from_ne_bytes(halves[1])]
        };
        let mapped = |last: u8| words([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, last]);
        let ([a, b], [c, d]) = (mapped(1), mapped(7));
        let event = Event {
            cookie: 9,
            kind: KIND_JOINED,
            remote_port: 40_000,
            token: 3,
            start: 5,
            told: [a, b, c, d],
            ..Event::default()
        };
        let Subflow { socket, token, joined } = opened(&event, 6443);
        assert_eq!((socket.id, token, joined, socket.start), (ConnectionId(9), 3, true, 5));
        assert_eq!(socket.local, "192.0.2.1:6443".parse().expect("an address"));
        assert_eq!(socket.remote, "192.0.2.7:40000".parse().expect("an address"));
        assert_eq!((socket.bytes_in, socket.bytes_out), (0, 0));
    }
}
