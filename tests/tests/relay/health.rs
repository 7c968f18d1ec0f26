//! The port follows what a client's request would find behind the relay, and nothing that the relay itself lacks.

use std::{
    fs,
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use rebalancer_tests::{
    h2wire::{END_HEADERS, END_STREAM, PATIENCE, Peer, client_config, frame, kind, request},
    netns::Namespace,
    pki::{Pair, Pki},
    process::{Process, tail, wait_for},
    standin,
};
use socket2::{Domain, SockRef, Socket, Type};

use crate::world::{OK, RELAY, UPSTREAM, World, relay_between, serve, serve_rules};

fn is_open() -> bool {
    TcpStream::connect(RELAY).is_ok()
}

/// Waits until the log says that.
fn says(relay: &Process, what: &str) {
    let found = wait_for(PATIENCE, || relay.log().contains(what).then_some(()));
    assert!(found.is_some(), "{what:?} is not in the log:\n{}", tail(&relay.log()));
}

/// A relay whose files are changed before it starts, in a namespace that the calling thread enters.
fn relay_with(change: impl FnOnce(&Pki)) -> (Pki, Namespace, tempfile::TempDir, Process) {
    let namespace = Namespace::new().expect("a network namespace");
    namespace.enter().expect("its own namespace");
    let logs = tempfile::tempdir().expect("a directory");
    let pki = Pki::new(&[RELAY.ip()]).expect("certificates");
    drop(serve(&pki, UPSTREAM, true));
    change(&pki);
    let control = logs.path().join("relay.sock");
    let addresses = [RELAY, UPSTREAM];
    let relay = relay_between(&pki, &namespace, logs.path(), &control, "relay", addresses, &[]);
    (pki, namespace, logs, relay)
}

#[test]
fn an_apiserver_whose_certificate_is_not_vouched_for_closes_the_port_loudly() {
    let mut right = Vec::new();
    let (pki, _namespace, _logs, relay) = relay_with(|pki| {
        right = fs::read(pki.file("ca.crt")).expect("the authority");
        // The flags name one file for both: here only the upstream's matters.
        let other = fs::read(pki.file("front-proxy-ca.crt")).expect("another authority");
        fs::write(pki.file("ca.crt"), other).expect("a file");
    });
    says(&relay, "no client's request would get through");
    says(
        &relay,
        "no certificate authority that is trusted here vouches for it (--upstream-ca)",
    );
    assert!(!is_open(), "a load balancer sees it");
    fs::write(pki.file("ca.crt"), right).expect("a file");
    let opened = wait_for(PATIENCE, || is_open().then_some(()));
    assert!(opened.is_some(), "it opens when it is well:\n{}", tail(&relay.log()));
}

#[test]
fn a_front_proxy_certificate_that_the_apiserver_does_not_take_closes_the_port() {
    let (_pki, _namespace, _logs, relay) = relay_with(|pki| {
        let Pair { certificate, key } = pki.stranger("stranger", |_| {}).expect("a certificate");
        fs::copy(certificate, pki.file("front-proxy-client.crt")).expect("a file");
        fs::copy(key, pki.file("front-proxy-client.key")).expect("a file");
    });
    says(&relay, "no client's request would get through");
    assert!(!is_open(), "a load balancer sees it");
}

#[test]
fn an_apiserver_that_stops_answering_keeps_its_port() {
    let world = World::start(&[]);
    let mut bystander = world.bystander();
    // Nobody accepts on it, and its queue is short: connections to it hang, as with an apiserver that stands still.
    let deaf = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    let address: SocketAddr = (Ipv4Addr::LOCALHOST, 7444).into();
    deaf.bind(&address.into()).expect("a free port");
    deaf.listen(1).expect("it listens");
    let listen = "127.0.0.1:7443".parse().expect("an address");
    let control = world.directory().join("deaf.sock");
    let between = [listen, address];
    let relay = relay_between(
        &world.pki,
        world.namespace(),
        world.directory(),
        &control,
        "deaf",
        between,
        &[],
    );
    says(&relay, "Overloaded");
    let open = wait_for(PATIENCE, || TcpStream::connect(listen).ok().map(drop));
    assert!(open.is_some(), "its clients see its state for themselves");
    bystander.is_served();
}

#[test]
fn local_ports_that_run_out_are_taken_from_other_addresses() {
    const CLIENTS: usize = 40;
    let world = World::start(&[]);
    // Of this thread's network namespace.
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40015").expect("a setting of the namespace");
    let open: Vec<_> = (0..CLIENTS)
        .map(|index| {
            // Each client from an address of its own, so that it is the relay that runs out.
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            let own = Ipv4Addr::new(127, 1, 0, 1 + index as u8);
            socket.bind(&SocketAddr::from((own, 0)).into()).expect("an address");
            socket.connect(&RELAY.into()).expect("the port is open");
            let mut client = Peer::over(socket.into(), &world.pki, None, b"h2").expect("a handshake");
            client.begin_client(&[]);
            let mut server = world.accept().peer;
            server.begin_server();
            client.expect(kind::SETTINGS);
            client.expect(kind::SETTINGS);
            (client, server)
        })
        .collect();
    for (mut client, mut server) in open {
        client.send(&request(1, "/"));
        server.expect(kind::HEADERS);
        server.send(&frame(kind::HEADERS, END_STREAM | END_HEADERS, 1, &OK));
        assert_eq!(client.expect(kind::HEADERS).stream, 1);
    }
    assert!(is_open(), "the port stays open");
}

#[test]
fn files_that_run_out_are_named_and_close_nothing_that_works() {
    let world = World::start(&[]);
    let mut bystander = world.bystander();
    // As many as it has, and some more.
    let descriptors = format!("/proc/{}/fd", world.relay.id());
    let open = fs::read_dir(descriptors).expect("its descriptors").count() as u64;
    set_open_files(&world.relay, open + 5);
    // They are accepted as far as there are files, and say nothing.
    let waiting: Vec<_> = (0..8)
        .map(|_| TcpStream::connect(RELAY).expect("the port is open"))
        .collect();
    says(&world.relay, "may open no more files");
    assert!(TcpStream::connect(RELAY).is_ok(), "the port stays open");
    bystander.is_served();
    let log = world.relay.log();
    assert!(!log.contains("the port is closed"), "{}", tail(&log));
    // With files again, it goes on by itself.
    set_open_files(&world.relay, open + 500);
    drop(waiting);
    world.bystander();
}

/// Changes how many files a running process may have open.
fn set_open_files(process: &Process, count: u64) {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let id = process.id() as i32;
    // SAFETY: the limit is written to a variable that lives through the call.
    let read = unsafe { libc::prlimit(id, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit) };
    assert_eq!(read, 0, "{}", std::io::Error::last_os_error());
    limit.rlim_cur = count;
    // SAFETY: the limit is read from a variable that lives through the call, and nothing is written.
    let set = unsafe { libc::prlimit(id, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn whatever_a_host_says_of_ipv6_all_addresses_are_those_that_there_are() {
    for (settings, has_ipv6) in [
        (
            &[
                "conf/all/disable_ipv6",
                "conf/default/disable_ipv6",
                "conf/lo/disable_ipv6",
            ][..],
            false,
        ),
        (&["bindv6only"], true),
    ] {
        let namespace = Namespace::new().expect("a network namespace");
        namespace.enter().expect("its own namespace");
        for setting in settings {
            fs::write(format!("/proc/sys/net/ipv6/{setting}"), "1").expect("a setting of the namespace");
        }
        let logs = tempfile::tempdir().expect("a directory");
        let pki = Pki::new(&[RELAY.ip()]).expect("certificates");
        let accepted = serve(&pki, UPSTREAM, true);
        let everywhere: SocketAddr = "[::]:6443".parse().expect("an address");
        let control = logs.path().join("relay.sock");
        let flags = [everywhere, UPSTREAM];
        let relay = relay_between(&pki, &namespace, logs.path(), &control, "relay", flags, &[]);
        let open = wait_for(PATIENCE, || is_open().then_some(()));
        assert!(
            open.is_some(),
            "{settings:?}: IPv4 gets nowhere:\n{}",
            tail(&relay.log())
        );
        let mut client = Peer::connect(&pki, RELAY, None, b"h2").expect("a handshake");
        client.begin_client(&[]);
        client.send(&request(1, "/"));
        while client.receive().kind != kind::HEADERS {}
        let by_ipv6 = TcpStream::connect("[::1]:6443").is_ok();
        assert_eq!(by_ipv6, has_ipv6, "{settings:?}");
        drop(accepted);
    }
}

#[test]
fn a_connection_that_ends_before_it_is_accepted_holds_nobody_up() {
    let world = World::start(&[]);
    let mut bystander = world.bystander();
    for _ in 0..200 {
        let socket = TcpStream::connect(RELAY).expect("the port is open");
        let socket = Socket::from(socket);
        socket
            .set_linger(Some(std::time::Duration::ZERO))
            .expect("a socket option");
        drop(socket);
    }
    bystander.is_served();
    world.bystander();
}

#[test]
fn an_address_that_is_taken_is_named_with_what_to_do() {
    let namespace = Namespace::new().expect("a network namespace");
    namespace.enter().expect("its own namespace");
    let logs = tempfile::tempdir().expect("a directory");
    let pki = Pki::new(&[RELAY.ip()]).expect("certificates");
    let _taken = TcpListener::bind(RELAY).expect("a free port");
    let control = logs.path().join("relay.sock");
    let mut relay = relay_between(&pki, &namespace, logs.path(), &control, "relay", [RELAY, UPSTREAM], &[]);
    let ended = wait_for(PATIENCE, || relay.is_running().err()).expect("it gives up");
    let said = format!("{ended:#}");
    assert!(said.contains("another process listens there"), "{said}");
}

/// Relay and apiserver are started together: what it answers before it knows its rules, or under load, is no answer, and that it
/// believes a header which clients could send is found out by and by.
#[test]
fn what_a_starting_apiserver_refuses_to_say_is_asked_again() {
    const MAP: &str = r#"{"data": {"requestheader-username-headers": "[\"X-Remote-User\",\"X-Other-User\"]"}}"#;
    let world = World::start(&[]);
    for (port, status) in [
        (7444, "403 Forbidden"),
        (7445, "401 Unauthorized"),
        (7446, "429 Too Many Requests"),
    ] {
        let upstream = SocketAddr::new(UPSTREAM.ip(), port);
        serve_rules(&world.pki, upstream, status, 6, MAP);
        let addresses = [SocketAddr::new(RELAY.ip(), port + 100), upstream];
        let control = world.directory().join(format!("{port}.sock"));
        let name = format!("before-{port}");
        let mut relay = relay_between(
            &world.pki,
            world.namespace(),
            world.directory(),
            &control,
            &name,
            addresses,
            &[],
        );
        let ended = wait_for(PATIENCE, || relay.is_running().err().map(drop));
        let log = relay.log();
        assert!(ended.is_some(), "{status}: it goes on:\n{log}");
        assert!(log.contains("X-Other-User"), "{status}:\n{log}");
    }
}

/// Whoever hears that his connection ends connects anew at once, and a load balancer takes him to another apiserver only when it
/// is refused here: how an apiserver that goes ends its connections, each after it has stopped listening.
#[test]
fn the_port_is_closed_before_a_client_hears_that_its_apiserver_goes() {
    let refused = |world: &World, what: &str| {
        let error = TcpStream::connect(RELAY).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{what}: {error}");
        let log = wait_for(PATIENCE, || {
            world.relay.log().contains("the apiserver is unreachable").then_some(())
        });
        assert!(
            log.is_some(),
            "{what}: nobody is told why:\n{}",
            tail(&world.relay.log())
        );
        let again = serve(&world.pki, UPSTREAM, true);
        let opened = wait_for(PATIENCE, || is_open().then_some(()));
        assert!(opened.is_some(), "{what}: it comes back:\n{}", tail(&world.relay.log()));
        drop(again);
    };
    let all = |what: &str, ends: &dyn Fn(Peer) -> Option<Peer>| {
        let world = World::start(&[]);
        let (mut client, server) = world.open(None);
        world.stop_listening();
        let _open = ends(server);
        // A frame, the end of the stream, or a reset.
        let _ = client.try_next();
        refused(&world, what);
    };
    all("GOAWAY", &|mut server| {
        server.send(&frame(kind::GOAWAY, 0, 0, &[0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0]));
        Some(server)
    });
    all("its end", &|server| {
        server.shut_down();
        Some(server)
    });
    all("a reset", &|server| {
        let linger = SockRef::from(server.socket()).set_linger(Some(Duration::ZERO));
        linger.expect("a socket");
        None
    });

    let world = World::start(&[]);
    let mut client = Peer::connect(&world.pki, RELAY, None, b"http/1.1").expect("a handshake");
    client.send(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n");
    let mut server = world.accept().peer;
    world.stop_listening();
    server.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    assert!(client.read_head().contains("close"));
    refused(&world, "an answer that is its connection's last");

    // The kernel closes what a killed process had in an order of its own.
    let world = World::start(&[]);
    let (mut client, mut server) = world.open(None);
    client.send(&request(1, "/version"));
    assert_eq!(server.expect(kind::HEADERS).stream, 1);
    server.shut_down();
    world.stop_listening();
    let _ = client.try_next();
    refused(&world, "the end of a connection before that of the one that listens");

    // It has shaken hands with the relay while the apiserver was there, and asks when it is not.
    let world = World::start(&[]);
    let mut late = Peer::connect(&world.pki, RELAY, None, b"h2").expect("a handshake");
    world.stop_listening();
    late.begin_client(&[]);
    late.send(&request(1, "/version"));
    assert_eq!(late.expect(kind::SETTINGS).flags, 0);
    let goaway = late.expect(kind::GOAWAY);
    // It may send the request again, whatever its method (RFC 9113, section 6.8).
    assert_eq!((goaway.word(0), goaway.word(4)), (0, 0), "none was processed");
    assert_eq!(late.rest(), []);
    refused(&world, "a client that was let in");

    let world = World::start(&[]);
    let mut late = Peer::connect(&world.pki, RELAY, None, b"http/1.1").expect("a handshake");
    world.stop_listening();
    late.send(b"POST /api HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}");
    let head = late.read_head();
    assert!(
        head.contains(" 503 ") && head.contains("Retry-After: 1\r\n"),
        "who retries knows when: {head}"
    );
    refused(&world, "a client of HTTP/1.1 that was let in");
}

/// A process that is killed closes its connections one after the other, and the socket that listens after them: whoever hears of it
/// first finds the port closed.
#[test]
fn a_killed_apiserver_closes_the_port_before_the_first_of_many_hears_of_it() {
    const CLIENTS: usize = 300;
    let namespace = Namespace::new().expect("a network namespace");
    namespace.enter().expect("its own namespace");
    let logs = tempfile::tempdir().expect("a directory");
    let pki = Pki::new(&[RELAY.ip()]).expect("certificates");
    let server = standin::command(UPSTREAM, 0, &pki);
    let apiserver = Process::start("apiserver", server, Some(namespace.fd()), logs.path()).expect("an apiserver");
    let control = logs.path().join("relay.sock");
    let relay = relay_between(&pki, &namespace, logs.path(), &control, "relay", [RELAY, UPSTREAM], &[]);
    assert!(
        wait_for(PATIENCE, || is_open().then_some(())).is_some(),
        "{}",
        tail(&relay.log())
    );
    let config = client_config(&pki, Some(&pki.pair("admin")), b"h2").expect("a configuration");
    let clients: Vec<Peer> = (0..CLIENTS)
        .map(|_| {
            let mut client = Peer::connect_with(config.clone(), RELAY).expect("a handshake");
            client.begin_client(&[]);
            let watch = "/api/v1/namespaces/swarm/configmaps?watch=true&resourceVersion=1";
            client.send(&request(1, watch));
            while client.receive().kind != kind::HEADERS {}
            client
        })
        .collect();
    let late = thread::scope(|scope| {
        let waiting: Vec<_> = clients
            .into_iter()
            .map(|mut client| {
                scope.spawn(move || {
                    while let Ok(Some(_)) = client.try_next() {}
                    TcpStream::connect(RELAY).is_ok()
                })
            })
            .collect();
        apiserver.signal(libc::SIGKILL);
        waiting
            .into_iter()
            .filter_map(|one| one.join().expect("it ends").then_some(()))
            .count()
    });
    assert_eq!(
        late,
        0,
        "of {CLIENTS} came back to a port behind which nobody was:\n{}",
        tail(&relay.log())
    );
}
