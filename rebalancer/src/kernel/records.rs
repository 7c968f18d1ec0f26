//! What the kernel programs write, read: records of the rings and of the list.
//!
//! Must never take a record that is not whole for one that is.

use std::{
    mem,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use rebalancer_common::{HelloRecord, KIND_CLOSED, SocketHead, SocketRecord};
use rebalancer_core::{ids::ConnectionId, observation::Socket, subflows::Subflow};

/// Reads a record; `None` when it is not whole. A close is its head alone.
pub fn record(bytes: &[u8]) -> Option<SocketRecord> {
    let word = |at: usize| bytes.get(at..)?.first_chunk().map(|chunk| u64::from_ne_bytes(*chunk));
    let half = |at: usize| bytes.get(at..)?.first_chunk().map(|chunk| u32::from_ne_bytes(*chunk));
    let address = |at: usize| Some([word(at)?, word(at + 8)?]);
    let head = SocketHead {
        cookie: word(mem::offset_of!(SocketHead, cookie))?,
        bytes_in: word(mem::offset_of!(SocketHead, bytes_in))?,
        bytes_out: word(mem::offset_of!(SocketHead, bytes_out))?,
        kind: half(mem::offset_of!(SocketHead, kind))?,
        state: half(mem::offset_of!(SocketHead, state))?,
    };
    if head.kind == KIND_CLOSED {
        return Some(SocketRecord {
            head,
            ..SocketRecord::default()
        });
    }
    Some(SocketRecord {
        head,
        local: address(mem::offset_of!(SocketRecord, local))?,
        remote: address(mem::offset_of!(SocketRecord, remote))?,
        local_port: half(mem::offset_of!(SocketRecord, local_port))?,
        remote_port: half(mem::offset_of!(SocketRecord, remote_port))?,
        token: half(mem::offset_of!(SocketRecord, token))?,
        joined: half(mem::offset_of!(SocketRecord, joined))?,
    })
}

/// The payload of an early packet.
pub struct Hello<'a> {
    pub id: ConnectionId,
    pub offset: usize,
    pub payload: &'a [u8],
    pub local: IpAddr,
    pub remote: SocketAddr,
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
        id: ConnectionId(record.head.cookie),
        local: SocketAddr::new(address(octets(record.local)), port(record.local_port)),
        remote: SocketAddr::new(address(octets(record.remote)), port(record.remote_port)),
        bytes_in: record.head.bytes_in,
        bytes_out: record.head.bytes_out,
    };
    Subflow {
        socket,
        token: record.token,
        joined: record.joined != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rebalancer_common::KIND_OPENED;

    /// A head as the programs write it: native integers, one after the other.
    fn head(kind: u32) -> Vec<u8> {
        let mut bytes: Vec<u8> = [7_u64, 8, 9].iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.extend([kind, 1].iter().flat_map(|half| half.to_ne_bytes()));
        bytes
    }

    #[test]
    fn a_close_is_its_head_alone_and_an_open_is_more() {
        let closed = record(&head(KIND_CLOSED)).expect("a whole close");
        assert_eq!(
            (closed.head.cookie, closed.head.bytes_in, closed.head.bytes_out),
            (7, 8, 9)
        );
        for short in 0..head(KIND_CLOSED).len() {
            assert_eq!(record(&head(KIND_CLOSED)[..short]), None);
        }
        let mut open = head(KIND_OPENED);
        open.resize(mem::size_of::<SocketRecord>(), 1);
        assert_eq!(record(&open).map(|open| open.joined), Some(0x0101_0101));
        for short in 0..open.len() {
            assert_eq!(record(&open[..short]), None, "{short} octets of an open");
        }
    }
}
