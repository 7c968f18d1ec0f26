//! Packets as nobody's socket sends them: a client of single packets, whose own kernel knows nothing of it, and strangers
//! who have no connection at all.

use std::{
    io::{self, Read as _},
    mem,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

use rebalancer_tests::process::wait_for;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    hellos::UNFINISHED,
    world::{Host, PATIENCE, PORT, client_hello, ebpf_or_skip, is_mptcp, protocols},
};

const SYN: u8 = 2;
const PUSH: u8 = 8;
const ACK: u8 = 16;

/// An address of the network that is nobody's, so that no kernel answers for it.
const NOBODY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 200);

/// Sends packets from the hub, under any address.
struct Sender {
    socket: Socket,
    node: SocketAddrV4,
}

/// One packet of TCP.
struct Packet<'a> {
    from: SocketAddrV4,
    sequence: u32,
    acknowledged: u32,
    flags: u8,
    payload: &'a [u8],
}

impl Sender {
    fn new(host: &Host) -> Self {
        let SocketAddr::V4(node) = host.address() else {
            panic!("the node has an IPv4 address")
        };
        let socket = Host::inside(&host.network.hub, || {
            Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))
        });
        Self {
            socket: socket.expect("a raw socket"),
            node,
        }
    }

    fn send(&self, packet: &Packet<'_>) {
        let octets = packet.octets(self.node);
        let sent = self.socket.send_to(&octets, &SocketAddr::V4(self.node).into());
        assert_eq!(sent.expect("a packet"), octets.len());
    }
}

impl Packet<'_> {
    /// RFC 791, section 3.1, and RFC 9293, section 3.1; the kernel fills in IP's length and checksum (raw(7)).
    fn octets(&self, to: SocketAddrV4) -> Vec<u8> {
        let mut tcp = Vec::new();
        tcp.extend(self.from.port().to_be_bytes());
        tcp.extend(to.port().to_be_bytes());
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend(self.acknowledged.to_be_bytes());
        tcp.extend([5 << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(self.payload);
        let addresses = [self.from.ip().octets(), to.ip().octets()].concat();
        let length = u16::try_from(tcp.len()).expect("a packet");
        let pseudo = [&addresses[..], &[0, 6], &length.to_be_bytes(), &tcp].concat();
        let mut sum: u32 = pseudo
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
            .sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        tcp[16..18].copy_from_slice(&(!sum as u16).to_be_bytes());
        [&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0][..], &addresses, &tcp].concat()
    }
}

/// Hears every packet that comes to the hub (packet(7)).
fn listening(host: &Host) -> OwnedFd {
    Host::inside(&host.network.hub, || {
        let protocol = i32::from((libc::ETH_P_IP as u16).to_be());
        // SAFETY: the call takes integers.
        let descriptor = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_NONBLOCK, protocol) };
        assert!(descriptor >= 0, "{}", io::Error::last_os_error());
        // SAFETY: the call has just made it, and nobody else knows it.
        unsafe { OwnedFd::from_raw_fd(descriptor) }
    })
}

/// The sequence number with which the node answers a SYN from that address.
fn answer(heard: &OwnedFd, to: SocketAddrV4) -> u32 {
    let mut packet = [0_u8; 2048];
    wait_for(PATIENCE, || {
        loop {
            // SAFETY: the pointer is to a buffer of that length, which lives through the call.
            let length = unsafe { libc::recv(heard.as_raw_fd(), packet.as_mut_ptr().cast(), packet.len(), 0) };
            let packet = packet.get(..usize::try_from(length).ok()?)?;
            let (ip, tcp) = packet.split_at_checked(20)?;
            let is_it = ip[9] == 6 && ip[16..20] == to.ip().octets() && tcp.len() >= 20;
            if is_it && tcp[2..4] == to.port().to_be_bytes() && tcp[13] & (SYN | ACK) == SYN | ACK {
                return Some(u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]));
            }
        }
    })
    .expect("the node answers")
}

#[test]
fn a_hello_in_two_packets_of_which_either_ends_the_handshake_is_seen_whole() {
    if !ebpf_or_skip() {
        return;
    }
    let mut host = Host::new("ebpf");
    host.start_agent();
    let listener = host.listen("0.0.0.0");
    // Answers to nobody go to the hub, which drops them.
    let link = host
        .network
        .hub
        .output("ip", "-o link show br0")
        .expect("the hub's link");
    let words: Vec<&str> = link.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "link/ether").expect("an address");
    let neighbour = format!("neigh add {NOBODY} lladdr {} dev eth0 nud permanent", words[at + 1]);
    host.node().ip(&neighbour).expect("a neighbour");
    let (heard, sender) = (listening(&host), Sender::new(&host));
    let hello = client_hello(&["h2"]);
    assert!((1_400..2_800).contains(&hello.len()), "two packets hold it");
    let mut open = Vec::new();
    // A word may begin there.
    let letter = hello.len() - 1_400
        + hello[hello.len() - 1_400..1_400]
            .iter()
            .position(u8::is_ascii_alphabetic)
            .expect("among a hundred random octets there is a letter");
    // In order; and after both the packet that has nothing but the acknowledgement and the first one with data were lost.
    for (port, cut, in_order) in [
        (40_001, letter, false),
        (40_002, hello.len() / 2, false),
        (40_003, 1_400, false),
        (40_004, 1_400, true),
        (40_005, hello.len() / 2, true),
    ] {
        let from = SocketAddrV4::new(NOBODY, port);
        let begin = 10_000 * u32::from(port);
        let (first, second) = hello.split_at(cut);
        let packet = |sequence, acknowledged, flags, payload| {
            let packet = Packet {
                from,
                sequence,
                acknowledged,
                flags,
                payload,
            };
            sender.send(&packet);
        };
        packet(begin, 0, SYN, &[]);
        let acknowledged = answer(&heard, from).wrapping_add(1);
        let parts = [(begin + 1, first), (begin + 1 + cut as u32, second)];
        let [ends, follows] = if in_order { parts } else { [parts[1], parts[0]] };
        packet(ends.0, acknowledged, ACK | PUSH, ends.1);
        let (mut accepted, _) = listener.accept().expect("the handshake is done");
        packet(follows.0, acknowledged, ACK | PUSH, follows.1);
        accepted.set_read_timeout(Some(PATIENCE)).expect("an option");
        let mut read = vec![0; hello.len()];
        accepted.read_exact(&mut read).expect("all of it arrives");
        assert_eq!(read, hello);
        open.push(accepted);
    }
    // The kernel does not say where a client of such a listener begins: what was not seen first is left to a shim to name,
    // and is not taken for what it is not.
    let found_out = if is_mptcp() { "unknown" } else { "offered" };
    let mut expected = [found_out, found_out, found_out, "offered", "offered"];
    expected.sort_unstable();
    host.expect("every offer", |list| protocols(list) == expected);
}

#[test]
fn strangers_without_a_connection_take_nothing_from_others() {
    if !ebpf_or_skip() {
        return;
    }
    let mut host = Host::new("ebpf");
    host.start_agent();
    let listener = host.listen("0.0.0.0");
    let sender = Sender::new(&host);
    // Nothing is taken out of the ring meanwhile: three times as much comes as it has room for.
    let agent = host.agent.as_ref().expect("it runs");
    agent.signal(libc::SIGSTOP);
    let payload = [&b"GET / HTTP/1.1\r\nhost: "[..], &[b'x'; 1_400]].concat();
    for number in 0..9_000_u32 {
        let from = SocketAddrV4::new(Ipv4Addr::new(10, 77, 0, 1), 20_000 + (number % 10_000) as u16);
        sender.send(&Packet {
            from,
            sequence: number,
            acknowledged: number,
            flags: ACK | PUSH,
            payload: &payload,
        });
    }
    let hello = client_hello(&["h2"]);
    let mut open: Vec<_> = (0..16).map(|_| host.connect(host.address(), &listener)).collect();
    for (client, accepted) in &mut open {
        io::Write::write_all(client, &hello).expect("a hello");
        accepted.read_exact(&mut vec![0; hello.len()]).expect("it arrives");
    }
    host.agent.as_ref().expect("it runs").signal(libc::SIGCONT);
    host.expect("the others' offers", |list| protocols(list) == ["offered"; 16]);
    for kind in ["ring", "pieces", "early"] {
        let name = format!("rebalancer_bpf_hellos_lost_total{{kind=\"{kind}\"}}");
        assert_eq!(host.find_metric(&name).unwrap_or(0), 0, "{kind}");
    }
    assert_eq!(host.find_metric(UNFINISHED).unwrap_or(0), 0);
}

#[test]
fn headers_between_ipv6_and_tcp_hide_no_hello() {
    if !ebpf_or_skip() {
        return;
    }
    let mut host = Host::new("ebpf");
    host.start_agent();
    let (listener, [_, v6]) = crate::ends::dual(&host);
    let hello = client_hello(&["h2"]);
    let mut open = Vec::new();
    for options in [&[libc::IPV6_DSTOPTS][..], &[libc::IPV6_HOPOPTS, libc::IPV6_DSTOPTS]] {
        let options = options.to_vec();
        let client = Host::inside(&host.network.hub, move || {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, None).expect("a socket");
            for option in options {
                // RFC 8200, section 4.2: the next header, which the kernel fills in, no further eight octets, and PadN.
                let header = [0_u8, 0, 1, 4, 0, 0, 0, 0];
                // SAFETY: the pointer is to as many octets as are told, which live through the call.
                let failed = unsafe {
                    libc::setsockopt(
                        socket.as_raw_fd(),
                        libc::IPPROTO_IPV6,
                        option,
                        header.as_ptr().cast(),
                        mem::size_of_val(&header) as libc::socklen_t,
                    )
                };
                assert_eq!(failed, 0, "{}", io::Error::last_os_error());
            }
            socket
                .connect_timeout(&v6.into(), Duration::from_secs(60))
                .expect("the node answers");
            std::net::TcpStream::from(socket)
        });
        let (mut accepted, _) = listener.accept().expect("a connection");
        io::Write::write_all(&mut &client, &hello).expect("a hello");
        accepted.read_exact(&mut vec![0; hello.len()]).expect("it arrives");
        open.push((client, accepted));
    }
    host.expect("every offer", |list| protocols(list) == ["offered"; 2]);
    assert_eq!(PORT, v6.port());
}
