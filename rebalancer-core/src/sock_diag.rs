//! What the kernel says of sockets by netlink (sock_diag(7)).
//!
//! Input: octets of its answers. Output: sockets. Must never take what is cut short for whole.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use crate::{ids::ConnectionId, observation::Socket, subflows::Subflow};

/// Address families, as sockets have them (include/linux/socket.h).
pub const AF_INET: u8 = 2;
/// The same of IPv6.
pub const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;

/// include/uapi/linux/sock_diag.h
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// A connection (include/net/tcp_states.h).
pub const ESTABLISHED: u8 = 1;
/// A socket that accepts (include/net/tcp_states.h).
pub const LISTEN: u8 = 10;
/// include/uapi/linux/inet_diag.h: the attribute with `struct tcp_info`.
const INET_DIAG_INFO: u16 = 2;
/// The attribute of what lies above TCP, in it MPTCP's, and in that a subflow's own token and its flags
/// (include/uapi/linux/mptcp.h).
const INET_DIAG_ULP_INFO: u16 = 19;
const INET_ULP_INFO_MPTCP: u16 = 3;
const MPTCP_SUBFLOW_ATTR_TOKEN_LOC: u16 = 2;
const MPTCP_SUBFLOW_ATTR_FLAGS: u16 = 8;
/// The client made it to join its first one.
const MPTCP_SUBFLOW_FLAG_JOIN_REM: u32 = 1 << 2;
/// The attribute with the id of the socket's cgroup.
const INET_DIAG_CGROUP_ID: u16 = 21;
/// The flags of an attribute's kind (include/uapi/linux/netlink.h).
const NLA_TYPE_MASK: u16 = 0x3fff;
/// Where `struct tcp_info` has tcpi_bytes_acked and tcpi_bytes_received (include/uapi/linux/tcp.h).
const BYTES_ACKED: usize = 120;
const BYTES_RECEIVED: usize = 128;

/// Size of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Size of `struct inet_diag_req_v2`.
const REQUEST: usize = 56;
/// Size of `struct inet_diag_msg`.
const MESSAGE: usize = 72;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
const NLM_F_DUMP_INTR: u16 = 0x10;

/// Why an answer is of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The kernel refuses, with that errno.
    #[error("the kernel refuses: errno {0}")]
    Refused(i32),
    /// It cannot be what sock_diag(7) describes.
    #[error("malformed at octet {0}")]
    Malformed(usize),
}

/// A list of sockets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct List {
    /// Established connections on the port, each subflow of MPTCP by itself.
    pub sockets: Vec<Subflow>,
    /// Who listens.
    pub listener: Option<ConnectionId>,
    /// The cgroups of all sockets that listen, by id.
    pub cgroups: BTreeSet<u64>,
    /// All of them.
    pub listening: Vec<Listening>,
}

/// A socket that listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listening {
    /// Its cookie.
    pub id: ConnectionId,
    /// Where.
    pub address: IpAddr,
    /// The id of its cgroup; 0 where the kernel does not say.
    pub cgroup: u64,
}

/// Why it is not known which of those that listen on a port is the apiserver: there are services of their own at addresses
/// of their own, as a load balancer's virtual address is. One service may have several addresses, and relays that take each
/// other over have one.
pub fn shared_port(listening: &[Listening]) -> Option<String> {
    let cgroups: BTreeSet<u64> = listening.iter().map(|one| one.cgroup).collect();
    // All addresses of a family are all of the other one as well, to whoever listens there.
    let everywhere = |one: &Listening| {
        one.address
            .is_unspecified()
            .then_some(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
    };
    let addresses: BTreeSet<IpAddr> = listening
        .iter()
        .map(|one| everywhere(one).unwrap_or_else(|| one.address.to_canonical()))
        .collect();
    (cgroups.len() > 1 && addresses.len() > 1).then(|| {
        let shown: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
        format!(
            "several services listen on the port, at {}: say by --apiserver-address which is the apiserver's",
            shown.join(" and ")
        )
    })
}

/// A dump request (`struct nlmsghdr` and `struct inet_diag_req_v2`) for the sockets of a family with that local port, in
/// those states: a bit each.
pub fn request(family: u8, port: u16, states: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + REQUEST);
    out.extend_from_slice(&((HEADER + REQUEST) as u32).to_ne_bytes());
    out.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    out.extend_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&[family, IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 0]);
    out.extend_from_slice(&states.to_ne_bytes());
    // struct inet_diag_sockid: a source port that is not zero filters in the kernel.
    out.extend_from_slice(&port.to_be_bytes());
    out.resize(HEADER + REQUEST, 0);
    out
}

/// How far an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Another message follows.
    More,
    /// The list is complete.
    Done,
    /// The list changed under the kernel's hands: it is to be asked for anew.
    Interrupted,
}

/// Reads what one read(2) brought of an answer, and adds the sockets of that port to `found`.
///
/// # Errors
///
/// The kernel refuses, or the answer is malformed.
pub fn read(buffer: &[u8], port: u16, found: &mut List) -> Result<Progress, Fault> {
    let mut at = 0;
    while at + HEADER <= buffer.len() {
        let malformed = Fault::Malformed;
        let length = u32_at(buffer, at).ok_or(malformed(at))? as usize;
        let kind = u16_at(buffer, at + 4).ok_or(malformed(at))?;
        let flags = u16_at(buffer, at + 6).ok_or(malformed(at))?;
        let message = buffer
            .get(at..at + length)
            .filter(|_| length >= HEADER)
            .ok_or(malformed(at))?;
        if flags & NLM_F_DUMP_INTR != 0 {
            return Ok(Progress::Interrupted);
        }
        match kind {
            NLMSG_DONE => return Ok(Progress::Done),
            NLMSG_ERROR => {
                let code = u32_at(message, HEADER).ok_or(malformed(at))? as i32;
                return Err(Fault::Refused(code.wrapping_neg()));
            }
            SOCK_DIAG_BY_FAMILY => read_socket(&message[HEADER..], port, found).ok_or(malformed(at))?,
            _ => {}
        }
        // Messages are aligned to four octets (NLMSG_ALIGN).
        at += length.next_multiple_of(4);
    }
    Ok(Progress::More)
}

/// Reads `struct inet_diag_msg` and its attributes; `None` when it is cut short.
fn read_socket(message: &[u8], port: u16, found: &mut List) -> Option<()> {
    let (&[family, state], _) = message.split_first_chunk()?;
    let local_port = u16::from_be_bytes(*message.get(4..6)?.first_chunk()?);
    let remote_port = u16::from_be_bytes(*message.get(6..8)?.first_chunk()?);
    let local = address(family, message.get(8..24)?)?;
    let remote = address(family, message.get(24..40)?)?;
    // idiag_cookie is two words, the lower first.
    let cookie = u64::from(u32_at(message, 44)?) | u64::from(u32_at(message, 48)?) << 32;
    if local_port != port {
        return Some(());
    }
    let id = ConnectionId(cookie);
    let attributes = message.get(MESSAGE..)?;
    match state {
        LISTEN => {
            found.listener = found.listener.max(Some(id));
            let cgroup = attribute(attributes, INET_DIAG_CGROUP_ID).and_then(|value| u64_at(value, 0));
            found.cgroups.extend(cgroup);
            found.listening.push(Listening {
                id,
                address: local,
                cgroup: cgroup.unwrap_or_default(),
            });
        }
        ESTABLISHED => {
            let info = attribute(attributes, INET_DIAG_INFO).unwrap_or_default();
            let socket = Socket {
                id,
                local: SocketAddr::new(local, local_port),
                remote: SocketAddr::new(remote, remote_port),
                bytes_in: u64_at(info, BYTES_RECEIVED).unwrap_or(0),
                bytes_out: u64_at(info, BYTES_ACKED).unwrap_or(0),
                start: 0,
            };
            let (token, joined) = group(attributes);
            found.sockets.push(Subflow { socket, token, joined });
        }
        _ => {}
    }
    Some(())
}

/// The token of the MPTCP connection it is a subflow of, 0 for plain TCP; and whether the client made it to join others.
fn group(attributes: &[u8]) -> (u32, bool) {
    let subflow = attribute(attributes, INET_DIAG_ULP_INFO)
        .and_then(|above| attribute(above, INET_ULP_INFO_MPTCP))
        .unwrap_or_default();
    let word = |kind| attribute(subflow, kind).and_then(|value| u32_at(value, 0)).unwrap_or(0);
    (
        word(MPTCP_SUBFLOW_ATTR_TOKEN_LOC),
        word(MPTCP_SUBFLOW_ATTR_FLAGS) & MPTCP_SUBFLOW_FLAG_JOIN_REM != 0,
    )
}

/// IPv4 addresses are in the first four octets; v4-mapped ones are given as IPv4.
fn address(family: u8, octets: &[u8]) -> Option<IpAddr> {
    Some(if family == AF_INET {
        IpAddr::V4(Ipv4Addr::from(*octets.first_chunk::<4>()?))
    } else {
        IpAddr::V6(Ipv6Addr::from(*octets.first_chunk::<16>()?)).to_canonical()
    })
}

fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16_at(attributes, 0)?);
        let kind = u16_at(attributes, 2)? & NLA_TYPE_MASK;
        let value = attributes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..at + size_of::<u16>())?
        .first_chunk()
        .map(|chunk| u16::from_ne_bytes(*chunk))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..at + size_of::<u32>())?
        .first_chunk()
        .map(|chunk| u32::from_ne_bytes(*chunk))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes
        .get(at..at + size_of::<u64>())?
        .first_chunk()
        .map(|chunk| u64::from_ne_bytes(*chunk))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_shared_by_services_at_addresses_of_their_own() {
        let told = |listening: &[(&str, u64)]| {
            let listening: Vec<Listening> = listening
                .iter()
                .map(|(address, cgroup)| Listening {
                    id: ConnectionId(1),
                    address: address.parse().expect("an address"),
                    cgroup: *cgroup,
                })
                .collect();
            shared_port(&listening)
        };
        for one in [
            &[][..],
            &[("::", 5)],
            // All of one family and of the other; an address of each family; a relay that another one takes over.
            &[("0.0.0.0", 5), ("::", 5)],
            &[("0.0.0.0", 5), ("::", 6)],
            &[("10.0.0.1", 5), ("fd00::1", 5)],
            &[("10.0.0.1", 5), ("::ffff:10.0.0.1", 6)],
            // A kernel that does not say.
            &[("10.0.0.1", 0), ("10.0.0.100", 0)],
        ] {
            assert_eq!(told(one), None, "{one:?}");
        }
        for shared in [
            &[("10.0.0.1", 5), ("10.0.0.100", 6)][..],
            &[("::", 5), ("10.0.0.100", 6)],
        ] {
            let said = told(shared).expect("it is shared");
            assert!(
                said.contains("10.0.0.100") && said.contains("--apiserver-address"),
                "{said}"
            );
        }
    }

    #[test]
    fn malformed_answers_are_refused() {
        let mut found = List::default();
        let mut answer = vec![0; 40];
        answer[0] = 200;
        assert!(matches!(read(&answer, 1, &mut found), Err(Fault::Malformed(0))));
        answer[0] = 4;
        assert!(matches!(read(&answer, 1, &mut found), Err(Fault::Malformed(0))));
        answer[0] = 40;
        answer[4] = SOCK_DIAG_BY_FAMILY as u8;
        assert!(matches!(read(&answer, 1, &mut found), Err(Fault::Malformed(0))));
    }
}
