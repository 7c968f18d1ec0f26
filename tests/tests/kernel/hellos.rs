//! ClientHellos as the field sends them: with the end of the TCP handshake, behind a load balancer's header, twice, in
//! pieces, and from strangers who never finish.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    process::Command,
};

use rebalancer_tests::{process::wait_for, skip};
use socket2::{Domain, Socket, Type};

use crate::{
    ends::{End, crowd},
    storm::FLOOD,
    world::{Host, InNamespace as _, PATIENCE, client_hello, ebpf_or_skip, option, protocols},
};

/// Connects so that the packet that ends the TCP handshake waits for data to carry (tcp(7), TCP_QUICKACK).
pub fn lazy(to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).expect("a socket");
    lazy_from(socket, to)
}

/// A client that says this with the end of its TCP handshake, and its connection as it is accepted, where all has arrived.
pub fn says_at_once(
    host: &Host,
    listener: &TcpListener,
    octets: &[u8],
    connect: impl FnOnce() -> TcpStream + Send + 'static,
) -> (TcpStream, TcpStream) {
    let said = octets.to_vec();
    let client = Host::inside(&host.network.hub, move || {
        let mut client = connect();
        client.write_all(&said).expect("a hello");
        client
    });
    let (mut accepted, _) = listener.accept().expect("a connection");
    accepted.read_exact(&mut vec![0; octets.len()]).expect("it arrives");
    (client, accepted)
}

fn lazy_from(socket: Socket, to: SocketAddr) -> TcpStream {
    let off: libc::c_int = 0;
    // SAFETY: the pointer is to an integer that lives through the call, whose size is given.
    let failed = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_QUICKACK,
            (&raw const off).cast(),
            size_of_val(&off) as libc::socklen_t,
        )
    };
    assert_eq!(failed, 0, "{}", std::io::Error::last_os_error());
    socket.connect(&to.into()).expect("the node answers");
    socket.into()
}

#[test]
fn a_hello_that_comes_with_the_end_of_the_handshake_is_seen() {
    if !ebpf_or_skip() {
        return;
    }
    let mut host = Host::new("ebpf");
    host.start_agent();
    let listener = host.listen("0.0.0.0");
    let to = host.address();
    let mut open = Vec::new();
    // Small ones are whole at once, long ones need a second packet, which finds the connection.
    for hello in [
        client_hello(&["h2"]),
        client_hello(&["http/1.1"]),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
    ] {
        for _ in 0..4 {
            open.push(says_at_once(&host, &listener, &hello, move || lazy(to)));
        }
    }
    let expected = [["http/1.1"; 8].as_slice(), &["offered"; 4]].concat();
    host.expect("every offer", |list| protocols(list) == expected);
    // They go on in more packets than one connection may have read, and nothing of it is a hello that was lost.
    for (client, accepted) in &mut open {
        client.set_nodelay(true).expect("an option");
        for _ in 0..20 {
            client.write_all(b"more").expect("more");
            accepted.read_exact(&mut [0; 4]).expect("it arrives");
        }
    }
    let read = |host: &Host| {
        host.find_metric("rebalancer_bpf_events_total{kind=\"listed\"}")
            .unwrap_or(0)
    };
    let lists = read(&host);
    wait_for(PATIENCE, || (read(&host) > lists + 2).then_some(())).expect("the counters are read");
    for kind in ["pieces", "unfinished", "ring"] {
        let name = format!("rebalancer_bpf_hellos_lost_total{{kind=\"{kind}\"}}");
        assert_eq!(host.find_metric(&name).unwrap_or(0), 0, "{kind}");
    }
}

/// Nobody has told that the earlier one ended, for its events were overwritten; what it said is in another ring, and is there.
#[test]
fn what_an_earlier_client_said_is_not_said_by_the_next_one_on_its_port() {
    /// None of those that the kernel chooses from.
    const FROM: u16 = 20_000;
    if !ebpf_or_skip() {
        return;
    }
    let mut host = Host::new("ebpf");
    host.start_agent();
    let listener = host.listen("0.0.0.0");
    let to = host.address();
    // Of the next one's opening an event tells, or only a list.
    for (floods, from) in [(1, FROM), (2, FROM + 1)] {
        let agent = host.agent.as_ref().expect("it runs");
        agent.signal(libc::SIGSTOP);
        let connect = |hello: &[u8]| {
            says_at_once(&host, &listener, hello, move || {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
                socket.set_reuse_address(true).expect("an option");
                let from = SocketAddr::from(([0, 0, 0, 0], from));
                socket.bind(&from.into()).expect("the port is free again");
                lazy_from(socket, to)
            })
        };
        let flood = || {
            for _ in 0..FLOOD / 250 {
                // By RST, so that no client's port is kept for a minute.
                for (client, accepted) in crowd(&host, to, &listener, 250) {
                    End::ResetByClient.carry_out(client, accepted);
                }
            }
        };
        let (client, accepted) = connect(&client_hello(&["h2"]));
        End::ResetByClient.carry_out(client, accepted);
        flood();
        // One octet of a hello says nothing yet.
        let (client, accepted) = connect(&[22]);
        (1..floods).for_each(|_| flood());
        agent.signal(libc::SIGCONT);
        let seen = host.expect("the next client", |list| {
            list.len() == 1
                && list[0]["client"]
                    .as_str()
                    .is_some_and(|text| text.ends_with(&format!(":{from}")))
        });
        assert_eq!(protocols(&seen), ["unknown"], "{seen:?}");
        // The table may have it from the list before the events are read, and the metrics are of the last look.
        wait_for(PATIENCE, || {
            (host.metric("rebalancer_bpf_events_lost_total") > 0).then_some(())
        })
        .expect("the flood was large enough");
        End::ResetByClient.carry_out(client, accepted);
        host.expect("nobody", <[_]>::is_empty);
    }
}

#[test]
fn a_load_balancers_header_is_no_protocol() {
    if !ebpf_or_skip() {
        return;
    }
    let mut host = Host::new("ebpf");
    host.start_agent();
    let listener = host.listen("0.0.0.0");
    let line = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 6443\r\n".to_vec();
    let binary = [
        &b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"[..],
        &[192, 0, 2, 7, 198, 51, 100, 1, 0xdc, 4, 0x19, 0x2b],
    ]
    .concat();
    let local = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0".to_vec();
    let mut open = Vec::new();
    for header in [line, binary, local] {
        for protocol in ["h2", "http/1.1"] {
            let hello = client_hello(&[protocol]);
            // In one packet, and the header alone.
            for pieces in [
                vec![[&header[..], &hello].concat()],
                vec![header.clone(), hello.clone()],
            ] {
                let (mut client, mut accepted) = host.connect(host.address(), &listener);
                client.set_nodelay(true).expect("an option");
                for piece in pieces {
                    client.write_all(&piece).expect("a piece");
                    accepted.read_exact(&mut vec![0; piece.len()]).expect("it arrives");
                }
                open.push((client, accepted));
            }
        }
        // The header alone says nothing.
        let (mut client, accepted) = host.connect(host.address(), &listener);
        client.write_all(&header).expect("a header");
        open.push((client, accepted));
    }
    let expected = [["http/1.1"; 6].as_slice(), &["offered"; 6], &["unknown"; 3]].concat();
    host.expect("every offer", |list| protocols(list) == expected);
}

#[test]
fn packets_that_come_twice_end_no_hello_early() {
    if !ebpf_or_skip() {
        return;
    }
    // What is not whole after ten seconds is given up, and counted: a machine that is too slow tries once more.
    for _ in 0..5 {
        match seen_though_sent_twice() {
            Ok(0) => return,
            Ok(given_up) => eprintln!("{given_up} of 8 took longer than a hello may take"),
            Err(why) => return skip(why),
        }
    }
    panic!("no hello is whole within ten seconds, in five attempts");
}

/// Sends eight hellos of which packets come twice: how many of them were given up for their age, of which none may be
/// unless the machine is slow; why not, where packets cannot be made to come twice.
fn seen_though_sent_twice() -> Result<u64, &'static str> {
    let mut host = Host::new("ebpf");
    host.start_agent();
    let listener = host.listen("0.0.0.0");
    let hello = client_hello(&["h2"]);
    let (first, second) = hello.split_at(900);
    let mut open = Vec::new();
    for _ in 0..8 {
        let (mut client, mut accepted) = host.connect(host.address(), &listener);
        client.set_nodelay(true).expect("an option");
        client.write_all(first).expect("a piece");
        accepted.read_exact(&mut vec![0; first.len()]).expect("it arrives");
        open.push((client, accepted));
    }
    // What the clients send comes, and nothing of what the node answers: they send it again until it is.
    let drop_answers = Command::new("tc")
        .args([
            "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "8bit", "burst", "10", "limit", "10",
        ])
        .in_namespace(&host)
        .output();
    let Some(true) = drop_answers.ok().map(|output| output.status.success()) else {
        return Err("packets cannot be dropped here: tc (iproute2) or the kernel's token bucket filter is missing");
    };
    let half = second.len() / 2;
    for (client, _) in &mut open {
        client.write_all(&second[..half]).expect("a piece");
    }
    for (client, _) in &open {
        wait_for(PATIENCE, || (retransmitted(client) >= 2).then_some(())).expect("it is sent again");
    }
    assert_eq!(
        protocols(&host.expect("all of them", |list| list.len() == 8)),
        ["unknown"; 8]
    );
    let restored = Command::new("tc")
        .args(["qdisc", "del", "dev", "eth0", "root"])
        .in_namespace(&host)
        .output();
    assert!(restored.expect("tc runs").status.success());
    for (client, _) in &mut open {
        client.write_all(&second[half..]).expect("a piece");
    }
    let mut given_up = 0;
    let seen = wait_for(PATIENCE, || {
        let answer = host.ask("/v1/connections")?;
        let list = answer["connections"].as_array()?;
        let offered = protocols(list)
            .iter()
            .filter(|protocol| **protocol == "offered")
            .count();
        given_up = host.find_metric(UNFINISHED).unwrap_or_default();
        (offered as u64 + given_up >= 8).then_some(())
    });
    seen.expect("every offer, or that it was given up");
    Ok(given_up)
}

/// Hellos that were given up because they did not end.
pub const UNFINISHED: &str = "rebalancer_bpf_hellos_lost_total{kind=\"unfinished\"}";

/// `tcpi_total_retrans` (include/uapi/linux/tcp.h).
fn retransmitted(client: &TcpStream) -> u32 {
    let info: [u8; 104] = option(client, libc::IPPROTO_TCP, libc::TCP_INFO).expect("TCP's state");
    u32::from_ne_bytes([info[100], info[101], info[102], info[103]])
}

#[test]
fn strangers_who_send_octet_by_octet_take_nothing_from_others() {
    if !ebpf_or_skip() {
        return;
    }
    let mut host = Host::new("ebpf");
    host.start_agent();
    let listener = host.listen("0.0.0.0");
    let hello = client_hello(&["h2"]);
    let mut strangers: Vec<_> = (0..16).map(|_| host.connect(host.address(), &listener)).collect();
    for (client, _) in &strangers {
        client.set_nodelay(true).expect("an option");
    }
    for octet in hello[..200].chunks(1) {
        for (client, accepted) in &mut strangers {
            client.write_all(octet).expect("an octet");
            accepted.read_exact(&mut [0]).expect("it arrives");
        }
    }
    // These say less than a hello and then nothing.
    let mut silent: Vec<_> = (0..4).map(|_| host.connect(host.address(), &listener)).collect();
    for (client, _) in &mut silent {
        client.write_all(&hello[..200]).expect("a part");
    }
    let mut others: Vec<_> = (0..16).map(|_| host.connect(host.address(), &listener)).collect();
    for (client, accepted) in &mut others {
        client.write_all(&hello).expect("a hello");
        accepted.read_exact(&mut vec![0; hello.len()]).expect("it arrives");
    }
    let expected = [["offered"; 16].as_slice(), &["unknown"; 20]].concat();
    host.expect("the others' offers", |list| protocols(list) == expected);
    // Each is counted, once: who took too many pieces for that, unless ten seconds were over before, and who fell silent
    // when they are.
    let counted = |kind| {
        let name = format!("rebalancer_bpf_hellos_lost_total{{kind=\"{kind}\"}}");
        host.find_metric(&name).unwrap_or(0)
    };
    wait_for(PATIENCE, || {
        (counted("pieces") + counted("unfinished") >= 20).then_some(())
    })
    .expect("all are counted");
    let (pieces, unfinished) = (counted("pieces"), counted("unfinished"));
    assert_eq!((pieces + unfinished, counted("ring")), (20, 0));
    assert!(unfinished >= 4, "{pieces} by their pieces, {unfinished} by their age");
    wait_for(PATIENCE, || (host.figure("/unknown") == 20).then_some(())).expect("all are unknown");
}
