//! The kernel's socket list by netlink (sock_diag(7)), polled: for kernels without BPF.
//!
//! Input: the watched port. Output: observations by comparing two lists.
//! Must never take a partial list for a complete one.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    io::{self, Read as _, Write as _},
    mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use super::addresses;
use rebalancer_core::{
    ids::ConnectionId,
    observation::{Observation, Socket},
    subflows::{Subflow, Subflows},
};
use socket2::{Domain, Protocol, Type};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

/// How often the list is read.
const POLL: Duration = Duration::from_millis(500);

/// How often the list is told as it is: it brings the byte counters.
const LIST_EVERY: u32 = 10;

/// Why no protocol is known.
pub const BLIND: &str = "the kernel's socket list says nothing of protocols: only a shim can";

const NETLINK_SOCK_DIAG: i32 = 4;
/// include/uapi/linux/sock_diag.h
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// include/net/tcp_states.h
const ESTABLISHED: u8 = 1;
const LISTEN: u8 = 10;
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

/// Why the list cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SockdiagError {
    /// The system refused.
    #[error(
        "the kernel's socket list cannot be read by netlink (sock_diag): {0}; the module tcp_diag must be loadable"
    )]
    Io(#[from] io::Error),
    /// The answer cannot be what sock_diag(7) describes.
    #[error("the kernel's answer to a sock_diag request is malformed at octet {0}")]
    Malformed(usize),
    /// The list kept changing under the kernel's hands.
    #[error("the kernel could not give a consistent socket list in {0} attempts")]
    Interrupted(u32),
}

/// A complete list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct List {
    /// Established connections on the port, each subflow of MPTCP by itself.
    pub sockets: Vec<Subflow>,
    /// Who listens.
    pub listener: Option<ConnectionId>,
    /// The cgroups of all sockets that listen, by id.
    pub cgroups: BTreeSet<u64>,
}

/// Reads the complete list of one port, IPv4 and IPv6.
///
/// # Errors
///
/// See [`SockdiagError`].
pub fn list(port: u16) -> Result<List, SockdiagError> {
    all(port, 1 << ESTABLISHED | 1 << LISTEN)
}

/// The cgroups of the sockets that listen on a port, by id.
///
/// # Errors
///
/// See [`SockdiagError`].
pub fn listeners(port: u16) -> Result<BTreeSet<u64>, SockdiagError> {
    Ok(all(port, 1 << LISTEN)?.cgroups)
}

fn all(port: u16, states: u32) -> Result<List, SockdiagError> {
    const ATTEMPTS: u32 = 5;
    for _ in 0..ATTEMPTS {
        if let Some(list) = dump(port, states)? {
            return Ok(list);
        }
    }
    Err(SockdiagError::Interrupted(ATTEMPTS))
}

/// One attempt; `None` when the kernel says that the list changed under its hands.
fn dump(port: u16, states: u32) -> Result<Option<List>, SockdiagError> {
    let mut socket = socket2::Socket::new(
        Domain::from(libc::AF_NETLINK),
        Type::DGRAM,
        Some(Protocol::from(NETLINK_SOCK_DIAG)),
    )?;
    let mut found = List::default();
    let mut buffer = vec![0; 64 * 1024];
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        socket.write_all(&request(family, port, states))?;
        let mut done = false;
        while !done {
            let length = socket.read(&mut buffer)?;
            done = match read_messages(&buffer[..length], port, &mut found)? {
                Progress::More => false,
                Progress::Done => true,
                Progress::Interrupted => return Ok(None),
            };
        }
    }
    Ok(Some(found))
}

/// A dump request (`struct nlmsghdr` and `struct inet_diag_req_v2`).
fn request(family: u8, port: u16, states: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + REQUEST);
    out.extend_from_slice(&((HEADER + REQUEST) as u32).to_ne_bytes());
    out.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    out.extend_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&[family, libc::IPPROTO_TCP as u8, 1 << (INET_DIAG_INFO - 1), 0]);
    out.extend_from_slice(&states.to_ne_bytes());
    // struct inet_diag_sockid: a source port that is not zero filters in the kernel.
    out.extend_from_slice(&port.to_be_bytes());
    out.resize(HEADER + REQUEST, 0);
    out
}

enum Progress {
    More,
    Done,
    Interrupted,
}

fn read_messages(buffer: &[u8], port: u16, found: &mut List) -> Result<Progress, SockdiagError> {
    let mut at = 0;
    while at + HEADER <= buffer.len() {
        let malformed = SockdiagError::Malformed;
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
                return Err(io::Error::from_raw_os_error(-code).into());
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
        }
        ESTABLISHED => {
            let info = attribute(attributes, INET_DIAG_INFO).unwrap_or_default();
            let socket = Socket {
                id,
                local: SocketAddr::new(local, local_port),
                remote: SocketAddr::new(remote, remote_port),
                bytes_in: u64_at(info, BYTES_RECEIVED).unwrap_or(0),
                bytes_out: u64_at(info, BYTES_ACKED).unwrap_or(0),
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
    Some(if family == libc::AF_INET as u8 {
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
        .get(at..at + mem::size_of::<u16>())?
        .first_chunk()
        .map(|chunk| u16::from_ne_bytes(*chunk))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..at + mem::size_of::<u32>())?
        .first_chunk()
        .map(|chunk| u32::from_ne_bytes(*chunk))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes
        .get(at..at + mem::size_of::<u64>())?
        .first_chunk()
        .map(|chunk| u64::from_ne_bytes(*chunk))
}

/// The polling source.
pub struct Sockdiag {
    port: u16,
    /// Whether somebody would want to know protocols.
    classify: bool,
    ticks: Interval,
    tick: u32,
    known: HashMap<ConnectionId, (u64, u64)>,
    subflows: Subflows,
    /// Those that the last list lacked: a list is not made at one instant, and may lack what is there.
    missing: HashSet<ConnectionId>,
    listener: Option<ConnectionId>,
    own: Vec<IpAddr>,
    resync: bool,
    confirm: bool,
    said: bool,
}

impl Sockdiag {
    /// Checks that the list can be read.
    ///
    /// # Errors
    ///
    /// See [`SockdiagError`].
    pub fn open(port: u16, classify: bool) -> Result<Self, SockdiagError> {
        list(port)?;
        let mut ticks = interval_at(Instant::now(), POLL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            port,
            classify,
            ticks,
            tick: 0,
            known: HashMap::new(),
            subflows: Subflows::default(),
            missing: HashSet::new(),
            listener: None,
            own: Vec::new(),
            resync: true,
            confirm: false,
            said: false,
        })
    }

    /// Makes the next observation a complete list.
    pub fn resync(&mut self) {
        self.resync = true;
    }

    /// Tells the next list as it is.
    pub fn confirm(&mut self) {
        self.confirm = true;
    }

    /// Waits until the list has changed.
    ///
    /// # Errors
    ///
    /// See [`SockdiagError`].
    pub async fn next(&mut self) -> Result<Vec<Observation>, SockdiagError> {
        loop {
            self.ticks.tick().await;
            // Some milliseconds for tens of thousands of sockets, and no await: nothing is lost when this is dropped.
            let found = list(self.port)?;
            let observations = self.compare(found);
            if !observations.is_empty() {
                return Ok(observations);
            }
        }
    }

    fn compare(&mut self, found: List) -> Vec<Observation> {
        self.tick += 1;
        let mut observations = Vec::new();
        if !mem::replace(&mut self.said, true) && self.classify {
            tracing::warn!("which connections speak HTTP/2 is not seen: {BLIND}");
            observations.push(Observation::Blind(Some(Arc::from(BLIND))));
        }
        observations.extend(super::changed_addresses(&mut self.own, addresses::own()));
        let another_listener = mem::replace(&mut self.listener, found.listener) != found.listener;
        let sockets = self.subflows.listed(found.sockets, true);
        let mut before = mem::take(&mut self.known);
        let mut opened = Vec::new();
        for socket in &sockets {
            if before.remove(&socket.id).is_none() {
                opened.push(socket.clone());
            }
            self.known.insert(socket.id, (socket.bytes_in, socket.bytes_out));
        }
        if mem::take(&mut self.resync) || another_listener {
            self.missing.clear();
            observations.push(Observation::Resync {
                sockets,
                listener: found.listener,
            });
            return observations;
        }
        // Whoever is missing in two lists is gone.
        let missing_before = mem::take(&mut self.missing);
        for (id, (bytes_in, bytes_out)) in before {
            if missing_before.contains(&id) {
                observations.push(Observation::Closed {
                    id,
                    bytes_in,
                    bytes_out,
                });
            } else {
                self.missing.insert(id);
                self.known.insert(id, (bytes_in, bytes_out));
            }
        }
        observations.extend(opened.into_iter().map(Observation::Opened));
        if mem::take(&mut self.confirm) || self.tick.is_multiple_of(LIST_EVERY) {
            observations.push(Observation::Listed {
                sockets,
                listener: found.listener,
            });
        }
        observations
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        os::fd::AsFd as _,
    };

    use super::*;
    use crate::sys::socket_cookie;

    #[test]
    fn the_list_names_listener_and_connections_by_their_cookies() {
        let listener = TcpListener::bind("[::1]:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let mut client = TcpStream::connect(address).expect("a connection");
        let (mut accepted, _) = listener.accept().expect("a connection");
        client.write_all(b"hello").expect("a write");
        accepted.read_exact(&mut [0; 5]).expect("a read");
        let cookie = |socket: std::os::fd::BorrowedFd<'_>| ConnectionId(socket_cookie(socket).expect("a cookie"));

        let found = list(address.port()).expect("a list");
        assert_eq!(found.listener, Some(cookie(listener.as_fd())));
        assert_eq!(found.sockets.len(), 1);
        let Subflow { socket, token, .. } = &found.sockets[0];
        assert_eq!(*token, 0, "plain TCP");
        assert_eq!(socket.id, cookie(accepted.as_fd()));
        assert_eq!(socket.local, address);
        assert_eq!(socket.remote, client.local_addr().expect("an address"));
        assert_eq!(socket.bytes_in, 5);
    }

    #[tokio::test]
    async fn lists_are_compared() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let mut source = Sockdiag::open(address.port(), true).expect("a source");
        let first = source.next().await.expect("a list");
        let [
            Observation::Blind(Some(_)),
            Observation::Addresses(own),
            Observation::Resync {
                sockets,
                listener: Some(_),
            },
        ] = &first[..]
        else {
            panic!("{first:?}");
        };
        assert!(sockets.is_empty() && own.contains(&address.ip()));
        let client = TcpStream::connect(address).expect("a connection");
        let (accepted, _) = listener.accept().expect("a connection");
        let opened = source.next().await.expect("a change");
        assert!(matches!(&opened[..], [Observation::Opened(socket), ..] if socket.local == address));
        drop((client, accepted));
        let gone = loop {
            let told = source.next().await.expect("a change");
            if told.iter().any(|told| matches!(told, Observation::Closed { .. })) {
                break told;
            }
        };
        assert_eq!(gone.len(), 1, "{gone:?}");
    }

    #[test]
    fn malformed_answers_are_refused() {
        let mut found = List::default();
        let mut answer = vec![0; 40];
        answer[0] = 200;
        assert!(matches!(
            read_messages(&answer, 1, &mut found),
            Err(SockdiagError::Malformed(0))
        ));
        answer[0] = 4;
        assert!(matches!(
            read_messages(&answer, 1, &mut found),
            Err(SockdiagError::Malformed(0))
        ));
        answer[0] = 40;
        answer[4] = SOCK_DIAG_BY_FAMILY as u8;
        assert!(matches!(
            read_messages(&answer, 1, &mut found),
            Err(SockdiagError::Malformed(0))
        ));
    }
}
