//! The kernel's socket list by netlink (sock_diag(7)), polled: for kernels without BPF.
//!
//! Input: the watched port. Output: observations by comparing two lists.
//! Must never take a partial list for a complete one.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    io::{self, Read as _, Write as _},
    mem,
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use super::addresses;
use rebalancer_core::{
    ids::ConnectionId,
    observation::Observation,
    sock_diag::{AF_INET, AF_INET6, ESTABLISHED, Fault, LISTEN, List, Listening, Progress, read, request},
    subflows::Subflows,
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

impl From<Fault> for SockdiagError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Refused(errno) => Self::Io(io::Error::from_raw_os_error(errno)),
            Fault::Malformed(at) => Self::Malformed(at),
        }
    }
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

/// All sockets that listen on a port.
///
/// # Errors
///
/// See [`SockdiagError`].
pub fn listening(port: u16) -> Result<Vec<Listening>, SockdiagError> {
    Ok(all(port, 1 << LISTEN)?.listening)
}

/// The cookie of the socket that listens on a port; of several the newest.
///
/// # Errors
///
/// See [`SockdiagError`].
pub fn listener(port: u16) -> Result<Option<ConnectionId>, SockdiagError> {
    Ok(all(port, 1 << LISTEN)?.listener)
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
    for family in [AF_INET, AF_INET6] {
        socket.write_all(&request(family, port, states))?;
        let mut done = false;
        while !done {
            let length = socket.read(&mut buffer)?;
            done = match read(&buffer[..length], port, &mut found)? {
                Progress::More => false,
                Progress::Done => true,
                Progress::Interrupted => return Ok(None),
            };
        }
    }
    Ok(Some(found))
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

    use rebalancer_core::subflows::Subflow;

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
}
