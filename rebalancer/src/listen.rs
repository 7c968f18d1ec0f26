//! Listening as Go's net package does it: an address of all interfaces is one of both families, whatever the host's
//! settings say of IPv6.
//!
//! Must never listen more narrowly than it was told without saying so.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::BorrowedFd,
};

use socket2::{Domain, Protocol, SockFilter, SockRef, Socket, Type};
use tokio::net::TcpListener;

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 4096;

/// Listens on an address. `[::]` takes IPv4 too, also where `net.ipv6.bindv6only` is set; where the kernel has no IPv6,
/// it is `0.0.0.0`, as Go's `:PORT` is (net/ipsock_posix.go, `favoriteAddrFamily`).
///
/// # Errors
///
/// What the system says.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    match bind(address) {
        Err(error) if is_without_ipv6(&error) && address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) => {
            let instead = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port());
            tracing::warn!(%address, %instead, "this kernel has no IPv6: listening on IPv4 alone");
            bind(instead)
        }
        bound => bound,
    }
}

/// Listens for clients that the kernel steers here (sk_lookup), of both families also where only this host's own can reach
/// the address: an IPv4 address is taken as IPv6 writes it, `::ffff:127.0.0.1`. A socket on `::1`, as on every other
/// address of IPv6 but `::`, is one for IPv6 alone whatever it is told (net/ipv6/af_inet6.c, `__inet6_bind`).
///
/// # Errors
///
/// What the system says.
pub fn listen_for_steered(address: SocketAddr) -> io::Result<TcpListener> {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_loopback() => match bind(SocketAddr::new(ip.to_ipv6_mapped().into(), address.port())) {
            Err(error) if is_without_ipv6(&error) => bind(address),
            bound => bound,
        },
        _ => listen(address),
    }
}

/// Whether the kernel can give a listening socket no clients of IPv4.
pub fn is_only_v6(socket: BorrowedFd<'_>) -> bool {
    // Of a socket of IPv4 nobody can say it.
    SockRef::from(&socket).only_v6().unwrap_or(false)
}

/// An address as people write it: one of IPv4 that a socket of IPv6 has is one of IPv4.
pub fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Whether two addresses are one to [`listen`] and [`listen_for_steered`]: `[::]` may have become `0.0.0.0`.
pub fn is_same(asked: SocketAddr, has: SocketAddr) -> bool {
    let all = |address: SocketAddr| address.ip().is_unspecified() && address.is_ipv6();
    plain(asked) == plain(has)
        || asked.port() == has.port() && all(asked) && has.ip() == IpAddr::V4(Ipv4Addr::UNSPECIFIED)
}

/// What to do about an address that cannot be listened on.
pub fn hint(address: SocketAddr, error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EAFNOSUPPORT) if address.is_ipv6() => "this kernel has no IPv6; give an IPv4 address",
        Some(libc::EADDRINUSE) => "another process listens there",
        Some(libc::EADDRNOTAVAIL) => "the address is none of this node's",
        Some(libc::EACCES) => "this process may not use that port",
        _ => "is the address this node's, and the port free?",
    }
}

fn is_without_ipv6(error: &io::Error) -> bool {
    // No such family (ipv6.disable=1), or no such address (the family without any).
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Goes on with another process's socket: whatever filter it left is taken off.
///
/// # Errors
///
/// What the system says.
pub fn inherit(socket: std::net::TcpListener) -> io::Result<TcpListener> {
    socket.set_nonblocking(true)?;
    unfilter(&SockRef::from(&socket));
    TcpListener::from_std(socket)
}

/// A classic BPF filter that drops segments with SYN and without ACK, and passes all others: on a listening socket the
/// kernel looks at it before a handshake begins (net/ipv4/tcp_ipv4.c, `tcp_v4_rcv`), and the segment begins with TCP's
/// header. The client sends its SYN again, and by then the port is closed.
const NO_SYN: [SockFilter; 5] = {
    const FLAGS_AT: u32 = 13;
    const SYN: u32 = 0x02;
    const ACK: u32 = 0x10;
    [
        SockFilter::new((libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16, 0, 0, FLAGS_AT),
        SockFilter::new((libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16, 0, 0, SYN | ACK),
        SockFilter::new((libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, 0, 1, SYN),
        SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0),
        SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, u32::MAX),
    ]
};

/// No handshake of TCP begins on a socket that listens any more; those that have begun end as they would.
///
/// # Errors
///
/// What the kernel says.
pub fn begin_no_handshake(socket: &Socket) -> io::Result<()> {
    socket.attach_filter(&NO_SYN)
}

/// Takes a filter off, if there is one (socket(7), SO_DETACH_FILTER).
pub fn unfilter(socket: &Socket) {
    // Without one it fails, and there is nothing to do.
    let _ = socket.detach_filter();
}

/// As whom an address counts where strangers have a bound each: one network of IPv6 (/64) has as many addresses as it likes.
pub fn counted_as(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[tokio::test]
    async fn who_is_steered_to_loopback_may_be_of_either_family() {
        let asked: SocketAddr = "127.0.0.1:0".parse().expect("an address");
        let listener = listen_for_steered(asked).expect("a port");
        let has = listener.local_addr().expect("its address");
        assert!(!is_only_v6(listener.as_fd()), "{has}");
        assert!(is_same(SocketAddr::new(asked.ip(), has.port()), has), "{has}");
        std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, has.port())).expect("IPv4 gets there");
        let narrow = listen_for_steered("[::1]:0".parse().expect("an address")).expect("a port");
        assert!(is_only_v6(narrow.as_fd()), "which the agent refuses");
    }

    #[tokio::test]
    async fn an_address_of_all_interfaces_takes_both_families() {
        let listener = listen("[::]:0".parse().expect("an address")).expect("a port");
        let port = listener.local_addr().expect("its address").port();
        std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("IPv4 gets there");
        assert!(is_same(
            SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 1),
            SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 1)
        ));
        assert!(!is_same(
            SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 1),
            SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 1)
        ));
    }
}
