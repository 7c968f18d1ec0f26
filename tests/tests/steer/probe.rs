//! The probe at work: on the small server with the apiserver's filter, on a kernel that takes it.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6},
    os::unix::{fs::FileExt as _, process::CommandExt as _},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread,
    time::Duration,
};

use rebalancer_core::binary::golang;
use rebalancer_tests::{
    h2client::Client,
    process::{Process, wait_for},
    skip,
};
use serde_json::Value;

use crate::{
    machine,
    world::{PATIENCE, PORT, World},
};

/// The highest that kube-apiserver takes.
const CHANCE: &str = "0.02";

/// Among so many requests the lottery says nothing with a chance of 3e-18.
const SURELY: u64 = 2_000;

#[test]
fn only_the_victims_are_told_and_each_once() {
    let Some(mut world) = World::get() else { return };
    world.start_server(CHANCE);
    world.start_agent("steer:auto", &[]);
    let mut clients = world.clients(20);
    world.wait_until_known(&clients);
    let is_victim = |index: usize| index.is_multiple_of(5);
    for (index, client) in clients.iter_mut().enumerate() {
        for _ in 0..10 {
            client.get("/");
        }
        if !is_victim(index) {
            continue;
        }
        let address = client.address;
        world.order(address);
        let outcomes = |world: &mut World| {
            world
                .ask("/v1/decisions?limit=1000")
                .map(|mut all| all["decisions"].take())
        };
        let pending = |world: &mut World| -> Option<u64> {
            let decisions = outcomes(world)?;
            decisions
                .as_array()?
                .iter()
                .filter_map(|decision| decision["outcomes"]["pending"].as_u64())
                .max()
        };
        assert_eq!(
            pending(&mut world),
            Some(1),
            "the outcome is pending until the next request"
        );
        assert_eq!(client.goaways(), 0, "a client that asks nothing is not told");
        client.get("/");
        client.wait_for_goaway();
        world.wait("the victim drains or is closed", |world| {
            let list = world.ask("/v1/connections?limit=1000")?;
            let own = list["connections"]
                .as_array()?
                .iter()
                .find(|known| known["client"] == address.to_string());
            own.is_none_or(|own| own["state"] == "draining").then_some(())
        });
    }
    let mut requests = 0;
    for (index, client) in clients.iter_mut().enumerate() {
        if is_victim(index) {
            assert!(
                matches!(client.goaways[..], [(_, 0)]),
                "not one GOAWAY with NO_ERROR: {:?}",
                client.goaways
            );
        } else {
            for _ in 0..10 {
                client.get("/");
            }
            assert_eq!(client.goaways(), 0);
        }
        requests += client.requests;
    }
    let sent = world.metric("rebalancer_goaways_total", "result=\"sent\"");
    assert_eq!(sent, Some(4.0));
    eprintln!("{requests} requests, 4 GOAWAYs, all to victims");
}

#[test]
fn on_a_dry_run_the_lottery_goes_on_and_requests_are_counted() {
    let Some(mut world) = World::get() else { return };
    world.start_server(CHANCE);
    world.start_agent("steer:auto", &["--dry-run"]);
    world.wait_until_ready();
    assert!(world.lottery(SURELY), "the lottery is the apiserver's own");
    let answers = |world: &mut World, answer: &str| {
        world.metric("rebalancer_steer_answers_total", &format!("answer=\"{answer}\""))
    };
    world.wait("they are counted", |world| {
        (answers(world, "rehearsed") > Some(0.0)).then_some(())
    });
    assert_eq!(
        (answers(&mut world, "yes"), answers(&mut world, "no")),
        (Some(0.0), Some(0.0))
    );
}

#[test]
fn without_victims_nobody_is_told_and_after_the_agent_the_lottery_is_back() {
    let Some(mut world) = World::get() else { return };
    world.start_server(CHANCE);
    assert!(world.lottery(SURELY), "before the agent there is a lottery");
    world.start_agent("steer:auto", &[]);
    world.wait_until_ready();
    let mut clients = world.clients(10);
    for _ in 0..SURELY / 10 {
        for client in &mut clients {
            client.get("/");
        }
    }
    let told: usize = clients.iter_mut().map(Client::goaways).sum();
    let requests: u64 = clients.iter().map(|client| client.requests).sum();
    eprintln!("{requests} requests with --goaway-chance={CHANCE}, {told} GOAWAYs");
    assert_eq!(told, 0);

    // Each request was seen, and whose it was.
    let sent: BTreeMap<String, u64> = clients
        .iter()
        .map(|client| (client.address.to_string(), client.requests))
        .collect();
    let mut counted = BTreeMap::new();
    let agrees = wait_for(PATIENCE, || {
        let list = world.ask("/v1/connections?limit=1000")?;
        let of = |known: &Value| Some((known["client"].as_str()?.to_owned(), known["requests"].as_u64()?));
        counted = list["connections"].as_array()?.iter().filter_map(of).collect();
        counted.retain(|client, _| sent.contains_key(client));
        (counted == sent).then_some(())
    });
    assert!(agrees.is_some(), "counted {counted:?}, sent {sent:?}");

    assert_eq!(
        first_octet(&world),
        BREAKPOINT,
        "the probe is a breakpoint at the function's entry"
    );
    let mut agent = world.agent.take().expect("an agent");
    assert!(agent.terminate(PATIENCE).is_some_and(|status| status.success()));
    // The kernel takes it away when it has closed the agent's descriptors, a moment after the agent's end.
    world.wait("the instruction is back", |world| {
        (first_octet(world) != BREAKPOINT).then_some(())
    });
    assert!(world.lottery(SURELY), "after the agent there is a lottery");
}

/// The first octet of the instruction that a uprobe puts in the place of another: `int3`, or `brk` with the number that is the
/// kernel's own for it (arch/arm64/include/asm/debug-monitors.h).
const BREAKPOINT: u8 = if cfg!(target_arch = "aarch64") { 0xa0 } else { 0xcc };

/// What the server's memory has at the function's entry.
fn first_octet(world: &World) -> u8 {
    let file = fs::read(&world.program).expect("a binary");
    let address = golang::find(&file).expect("a place").address;
    let server = world.server.as_ref().expect("a server").id();
    let memory = fs::File::open(format!("/proc/{server}/mem")).expect("the process runs");
    let mut octet = [0];
    memory.read_exact_at(&mut octet, address).expect("its code");
    octet[0]
}

#[test]
fn every_kind_of_address_is_read_from_the_request() {
    let Some(mut world) = World::get() else { return };
    let v6: Ipv6Addr = "fd00::11".parse().expect("an address");
    world
        .node()
        .ip("addr add fd00::11/64 dev eth0 nodad")
        .expect("an address");
    world.hub().ip("addr add fd00::1/64 dev br0 nodad").expect("an address");
    let link_local: Ipv6Addr = "fe80::11".parse().expect("an address");
    world
        .node()
        .ip("addr add fe80::11/64 dev eth0 nodad")
        .expect("an address");
    world.hub().ip("addr add fe80::1/64 dev br0 nodad").expect("an address");
    let zone = interface_index(world.hub().clone(), "br0");
    world.start_server(CHANCE);
    world.start_agent("steer:auto", &[]);
    for server in [
        world.address(),
        SocketAddr::new(IpAddr::V6(v6), PORT),
        SocketAddr::V6(SocketAddrV6::new(link_local, PORT, 0, zone)),
    ] {
        let mut other = Client::connect(&world.pki, world.hub(), server);
        let mut victim = Client::connect(&world.pki, world.hub(), server);
        other.get("/");
        victim.get("/");
        world.wait_until_known(std::slice::from_ref(&victim));
        world.order(victim.address);
        other.get("/");
        victim.get("/");
        victim.wait_for_goaway();
        assert_eq!(other.goaways(), 0, "{server}");
        eprintln!("{} at {server}: told", victim.address);
    }
}

fn interface_index(namespace: rebalancer_tests::netns::Namespace, name: &str) -> u32 {
    let path = "/proc/thread-self/net/if_inet6";
    let name = name.to_owned();
    thread::spawn(move || {
        namespace.enter().expect("its own namespace");
        let text = fs::read_to_string(path).expect("a list of addresses");
        let line = text.lines().find(|line| line.ends_with(&format!(" {name}")));
        let index = line.and_then(|line| line.split_whitespace().nth(1));
        u32::from_str_radix(index.expect("the interface has an address"), 16).expect("hexadecimal")
    })
    .join()
    .expect("the thread ends well")
}

#[test]
fn a_server_that_is_paged_out_obeys() {
    let Some(mut world) = World::get() else { return };
    if let Err(why) = machine::swap_on() {
        skip(&format!("nothing can be paged out: {why}"));
        return;
    }
    world.start_server(CHANCE);
    world.start_agent("steer:auto", &[]);
    let mut clients = world.clients(10);
    world.wait_until_known(&clients);
    let pid = world.server.as_ref().expect("a server").id();
    for (index, client) in clients.iter_mut().enumerate() {
        if index.is_multiple_of(2) {
            world.order(client.address);
        }
        let swapped = machine::page_out(pid);
        assert!(swapped > 1_000, "only {swapped} KiB are paged out");
        client.get("/");
        if index.is_multiple_of(2) {
            client.wait_for_goaway();
        } else {
            assert_eq!(client.goaways(), 0);
        }
    }
    eprintln!("5 of 5 victims told, each with the server's memory paged out");
}

/// Clients that ask many times at once, and connect again when they are told to go.
struct Load {
    requests: AtomicUsize,
    goaways: AtomicUsize,
    again: AtomicUsize,
}

impl Load {
    fn run(world: &World, connections: usize, each: usize, at_once: usize) -> Self {
        let load = Self {
            requests: AtomicUsize::new(0),
            goaways: AtomicUsize::new(0),
            again: AtomicUsize::new(0),
        };
        thread::scope(|scope| {
            for _ in 0..connections {
                scope.spawn(|| {
                    let mut client = Client::connect(&world.pki, world.hub(), world.address());
                    let mut left = each;
                    while left > 0 {
                        if !client.goaways.is_empty() {
                            load.goaways.fetch_add(1, Relaxed);
                            client = Client::connect(&world.pki, world.hub(), world.address());
                        }
                        let bodies = client.get_at_once("/", at_once.min(left));
                        let answered = bodies.iter().flatten().count();
                        load.again.fetch_add(bodies.len() - answered, Relaxed);
                        load.requests.fetch_add(answered, Relaxed);
                        left -= answered;
                    }
                });
            }
        });
        load
    }
}

#[test]
fn twenty_thousand_requests_at_once_and_victims_among_them() {
    let Some(mut world) = World::get() else { return };
    world.start_server(CHANCE);
    world.start_agent("steer:auto", &[]);
    world.wait_until_ready();
    let loaded = thread::scope(|scope| {
        let shared = &world;
        let load = scope.spawn(|| Load::run(shared, 16, 1_250, 50));
        let mut orders = 0;
        while !load.is_finished() {
            // Whoever is the oldest; with a plan in flight the next one waits.
            orders += usize::from(shared.post("/v1/goaway", r#"{"count": 1}"#).0 == 200);
            thread::park_timeout(Duration::from_millis(200));
        }
        (load.join().expect("every request is answered"), orders)
    });
    let (load, orders) = loaded;
    let (requests, goaways) = (load.requests.into_inner(), load.goaways.into_inner());
    eprintln!(
        "{requests} requests, {} of them sent again, {orders} orders, {goaways} GOAWAYs",
        load.again.into_inner()
    );
    assert_eq!(requests, 20_000);
    assert!(
        goaways > 0 && goaways <= orders,
        "{goaways} GOAWAYs for {orders} orders"
    );
    let server = world.server.as_mut().expect("a server");
    server.is_running().expect("the server lives");
    for word in ["panic", "fatal error", "SIGSEGV", "SIGILL", "unexpected fault"] {
        assert!(!server.log().contains(word), "{}", server.log());
    }
}

#[test]
fn an_agent_that_is_killed_leaves_nothing_behind() {
    let Some(mut world) = World::get() else { return };
    world.start_server(CHANCE);
    world.start_agent("steer:auto", &[]);
    world.wait_until_ready();
    let mut open = Client::connect(&world.pki, world.hub(), world.address());
    let stream = open.open("/hold");
    let mut agent = world.agent.take().expect("an agent");
    let load = thread::scope(|scope| {
        let load = scope.spawn(|| Load::run(&world, 4, 500, 10));
        agent.kill();
        load.join().expect("every request is answered")
    });
    assert_eq!(load.requests.into_inner(), 2_000);
    assert!(world.lottery(SURELY), "after the agent there is a lottery");
    open.finish(stream);
    // Another agent takes over.
    world.start_agent("steer:auto", &[]);
    let mut clients = world.clients(2);
    world.wait_until_known(&clients);
    world.order(clients[0].address);
    for client in &mut clients {
        client.get("/");
    }
    clients[0].wait_for_goaway();
    assert_eq!(clients[1].goaways(), 0);
}

#[test]
fn an_apiserver_that_restarts_or_is_replaced_gets_a_new_probe() {
    let Some(mut world) = World::get() else { return };
    world.start_server(CHANCE);
    world.start_agent("steer:auto", &[]);
    let replaced = world.directory.join("another-server");
    let attached = |world: &World| {
        let log = world.agent.as_ref().expect("an agent").log();
        log.matches("the probe is on the apiserver").count()
    };
    for round in 0..3 {
        world.wait("the probe is on this apiserver", |world| {
            (attached(world) > round).then_some(())
        });
        let mut clients = world.clients(2);
        world.wait_until_known(&clients);
        // A victim that is pending when its server dies is nobody's business any more.
        world.order(clients[0].address);
        if round < 2 {
            world.server.as_mut().expect("a server").kill();
            world.wait("the agent sees that nobody listens", |world| {
                let status = world.ask("/v1/status")?;
                (status["view"][0]["state"] == "down").then_some(())
            });
            if round == 1 {
                // Another file with the same content: another inode, as an upgrade leaves it.
                fs::copy(&world.program, &replaced).expect("a copy");
                world.program.clone_from(&replaced);
            }
            world.start_server(CHANCE);
            world.wait_until_ready();
            continue;
        }
        for client in &mut clients {
            client.get("/");
        }
        clients[0].wait_for_goaway();
        assert_eq!(clients[1].goaways(), 0);
    }
    assert_eq!(attached(&world), 3, "one probe for each apiserver");
}

#[test]
fn an_apiserver_in_a_container_is_probed_by_its_own_path() {
    let Some(mut world) = World::get() else { return };
    // A root of its own, as a container has it.
    let root = world.directory.join("root");
    let inside = |path: &str| root.join(path.trim_start_matches('/'));
    fs::create_dir_all(inside("/usr/local/bin")).expect("a directory");
    fs::create_dir_all(inside("/dev")).expect("a directory");
    fs::copy(&world.program, inside("/usr/local/bin/apiserver")).expect("a copy");
    for name in ["apiserver.crt", "apiserver.key"] {
        fs::copy(world.pki.file(name), inside(name)).expect("a copy");
    }
    let mut command = Command::new("/usr/local/bin/apiserver");
    command
        .arg(format!("--listen=[::]:{PORT}"))
        .args([
            "--tls-cert-file=/apiserver.crt",
            "--tls-private-key-file=/apiserver.key",
        ])
        .args(["--goaway-chance", CHANCE]);
    let path = std::ffi::CString::new(root.to_str().expect("UTF-8")).expect("no zeros");
    // SAFETY: the closure makes two system calls with paths that live in it.
    unsafe {
        command.pre_exec(move || {
            if libc::chroot(path.as_ptr()) == 0 && libc::chdir(c"/".as_ptr()) == 0 {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        });
    }
    let server = Process::start("server", command, Some(world.node().fd()), &world.directory).expect("a server");
    world.server = Some(server);
    world.wait("the server answers", |world| {
        Client::try_connect(&world.pki, world.hub(), world.address()).ok()
    });
    world.start_agent("steer:/usr/local/bin/apiserver", &[]);
    let mut clients = world.clients(2);
    world.wait_until_known(&clients);
    world.order(clients[1].address);
    for client in &mut clients {
        client.get("/");
    }
    clients[1].wait_for_goaway();
    assert_eq!(clients[0].goaways(), 0);
}

#[test]
fn a_victim_that_never_asks_is_given_up() {
    let Some(mut world) = World::get() else { return };
    world.start_server(CHANCE);
    world.start_agent("steer:auto", &[]);
    let mut clients = world.clients(1);
    world.wait_until_known(&clients);
    world.order(clients[0].address);
    world.wait("the order expires", |world| {
        let expired = world.metric("rebalancer_goaways_total", "result=\"expired\"")?;
        (expired == 1.0).then_some(())
    });
    clients[0].get("/");
    assert_eq!(clients[0].goaways(), 0, "an expired order is not carried out");
}
