//! What strangers cost: the relay's memory, and how long others wait, under each abuse that docs/relay.md names, with Go's own
//! server behind. Memory is held to its bound; the times are told.

use std::{
    env, io,
    io::Write as _,
    net::TcpStream,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use rebalancer_tests::{
    fixture,
    h2wire::{END_HEADERS, END_STREAM, PATIENCE, Peer, block, client_config, code, frame, get, integer, kind, request},
    netns::Namespace,
    pki::Pki,
    process::{Process, wait_for},
    skip,
};

use crate::{
    abuse::made_you_reset,
    faults::bomb,
    world::{RELAY, UPSTREAM, relay_between, resident_kib},
};

/// How much more memory than idle any of them may cost.
const BOUND_KIB: u64 = 64 * 1024;

/// What one connection does again and again; its end by the relay is an error, and another takes its place.
type Act = Box<dyn FnMut(&mut Peer) -> io::Result<()> + Send>;

/// One way to do harm.
struct Abuse {
    name: &'static str,
    protocol: &'static [u8],
    begin: fn() -> Act,
}

/// Sends the same octets for ever.
fn flood(octets: Vec<u8>) -> Act {
    let piece = octets.repeat((1 << 15) / octets.len() + 1);
    Box::new(move |peer| peer.try_send(&piece))
}

/// Sends once, and then holds the connection and reads nothing.
fn hold(octets: Vec<u8>) -> Act {
    let mut octets = Some(octets);
    Box::new(move |peer| {
        octets.take().map_or(Ok(()), |octets| peer.try_send(&octets))?;
        thread::sleep(Duration::from_millis(20));
        Ok(())
    })
}

/// Sends what a new stream brings, for streams without end.
fn streams(mut of: impl FnMut(u32) -> Vec<u8> + Send + 'static) -> Act {
    let mut next = 1;
    Box::new(move |peer| {
        let piece: Vec<u8> = (0..100).flat_map(|more| of(next + 2 * more)).collect();
        next += 200;
        peer.try_send(&piece)
    })
}

fn resets(primitive: usize) -> Act {
    streams(move |stream| [request(stream, "/"), made_you_reset(stream)[primitive].1.clone()].concat())
}

/// Opens every stream that the server allows for a large body, with that window for each, and reads nothing.
fn large_bodies(window: u32) -> Act {
    let settings = [&[0, 4][..], &window.to_be_bytes()].concat();
    let begin = [
        frame(kind::SETTINGS, 0, 0, &settings),
        frame(kind::WINDOW_UPDATE, 0, 0, &0x7fff_0000_u32.to_be_bytes()),
    ];
    let requests = (0..100).flat_map(|index| request(2 * index + 1, "/transfer"));
    hold(begin.concat().into_iter().chain(requests).collect())
}

/// A header block of so many octets whose last frame never comes.
fn unfinished_block() -> Act {
    let mut begin = frame(kind::HEADERS, 0, 1, &get("/"));
    let mut literal = vec![0x00, 1, b'a'];
    integer(240_000, 7, &mut literal);
    begin.extend(frame(kind::CONTINUATION, 0, 1, &literal));
    begin.extend(frame(kind::CONTINUATION, 0, 1, &[b'a'; 16_000]).repeat(15));
    hold(begin)
}

const ABUSES: [Abuse; 19] = [
    Abuse {
        name: "header bombs",
        protocol: b"h2",
        begin: || {
            let mut first = Some([&get("/")[..], &bomb(12_000)].concat());
            let mut stream = 1;
            Box::new(move |peer| {
                let again = [&get("/")[..], &[0xbe; 12_000]].concat();
                let list = first.take().unwrap_or(again);
                stream += 2;
                peer.try_send(&frame(kind::HEADERS, END_STREAM | END_HEADERS, stream, &list))
            })
        },
    },
    Abuse {
        name: "small blocks that stand for large ones",
        protocol: b"h2",
        begin: || {
            let mut first = get("/");
            first.extend([0x40, 7]);
            first.extend(b"x-large");
            integer(4000, 7, &mut first);
            first.extend([b'1'; 4000]);
            let mut first = Some(first);
            let small = [&[0x82, 0x87, 0x84][..], &[0xbe; 12]].concat();
            streams(move |stream| {
                let list = first.take().unwrap_or_else(|| small.clone());
                frame(kind::HEADERS, END_STREAM | END_HEADERS, stream, &list)
            })
        },
    },
    Abuse {
        name: "header blocks without an end",
        protocol: b"h2",
        begin: unfinished_block,
    },
    Abuse {
        name: "heads of HTTP/1.1 without an end",
        protocol: b"http/1.1",
        begin: || hold([b"GET / HTTP/1.1\r\nHost: a\r\nLong: ".to_vec(), vec![b'x'; 900_000]].concat()),
    },
    Abuse {
        name: "rapid reset",
        protocol: b"h2",
        begin: || {
            streams(|stream| {
                let reset = frame(kind::RST_STREAM, 0, stream, &code::CANCEL.to_be_bytes());
                [request(stream, "/"), reset].concat()
            })
        },
    },
    Abuse {
        name: "MadeYouReset, a window update of zero",
        protocol: b"h2",
        begin: || resets(0),
    },
    Abuse {
        name: "MadeYouReset, a window beyond 2^31-1",
        protocol: b"h2",
        begin: || resets(1),
    },
    Abuse {
        name: "MadeYouReset, HEADERS behind the end",
        protocol: b"h2",
        begin: || resets(2),
    },
    Abuse {
        name: "MadeYouReset, DATA behind the end",
        protocol: b"h2",
        begin: || resets(3),
    },
    Abuse {
        name: "MadeYouReset, a priority below itself",
        protocol: b"h2",
        begin: || resets(4),
    },
    Abuse {
        name: "MadeYouReset, a priority that is too short",
        protocol: b"h2",
        begin: || resets(5),
    },
    Abuse {
        name: "large bodies behind windows of zero",
        protocol: b"h2",
        begin: || large_bodies(0),
    },
    Abuse {
        name: "large bodies that nobody reads",
        protocol: b"h2",
        begin: || large_bodies(0x7fff_ffff),
    },
    Abuse {
        name: "large bodies over HTTP/1.1 that nobody reads",
        protocol: b"http/1.1",
        begin: || hold(b"GET /transfer HTTP/1.1\r\nHost: a\r\n\r\n".repeat(20)),
    },
    Abuse {
        name: "CONTINUATION without end",
        protocol: b"h2",
        begin: || {
            let mut begun = false;
            let piece = frame(kind::CONTINUATION, 0, 1, b"").repeat(3000);
            Box::new(move |peer| {
                if !std::mem::replace(&mut begun, true) {
                    peer.try_send(&frame(kind::HEADERS, 0, 1, &get("/")))?;
                }
                peer.try_send(&piece)
            })
        },
    },
    Abuse {
        name: "SETTINGS without end",
        protocol: b"h2",
        begin: || flood(frame(kind::SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0])),
    },
    Abuse {
        name: "PING without end",
        protocol: b"h2",
        begin: || flood(frame(kind::PING, 0, 0, b"12345678")),
    },
    Abuse {
        name: "empty DATA without end",
        protocol: b"h2",
        begin: || {
            let mut begun = false;
            let piece = frame(kind::DATA, 0, 1, b"").repeat(3000);
            Box::new(move |peer| {
                if !std::mem::replace(&mut begun, true) {
                    peer.try_send(&frame(kind::HEADERS, END_HEADERS, 1, &get("/")))?;
                }
                peer.try_send(&piece)
            })
        },
    },
    Abuse {
        name: "long names in trailers of requests that are reset",
        protocol: b"h2",
        begin: || {
            streams(|stream| {
                let open = frame(kind::HEADERS, END_HEADERS, stream, &get("/"));
                let trailers = block(&[(&"n".repeat(200), "v")]);
                [open, frame(kind::HEADERS, END_STREAM | END_HEADERS, stream, &trailers)].concat()
            })
        },
    },
];

/// The relay before Go's server, and a client that means well.
struct Scene {
    pki: Arc<Pki>,
    namespace: Namespace,
    relay: Process,
    _backend: Process,
    _logs: tempfile::TempDir,
}

impl Scene {
    fn start(backend: &std::path::Path) -> Self {
        let namespace = Namespace::new().expect("a network namespace");
        namespace.enter().expect("its own namespace");
        let logs = tempfile::tempdir().expect("a directory");
        let pki = Arc::new(Pki::new(&[RELAY.ip()]).expect("certificates"));
        let serving = pki.pair("apiserver");
        let mut command = Command::new(backend);
        command
            .arg(format!("-listen={UPSTREAM}"))
            .arg("-figures=127.0.0.1:6446");
        command
            .arg("-cert")
            .arg(serving.certificate)
            .arg("-key")
            .arg(serving.key);
        let backend = Process::start("backend", command, Some(namespace.fd()), logs.path()).expect("it starts");
        let control = logs.path().join("relay.sock");
        let addresses = [RELAY, UPSTREAM];
        let relay = relay_between(&pki, &namespace, logs.path(), &control, "relay", addresses, &[]);
        let open = wait_for(PATIENCE, || TcpStream::connect(RELAY).ok().map(drop));
        assert!(open.is_some(), "{}", relay.log());
        Self {
            pki,
            namespace,
            relay,
            _backend: backend,
            _logs: logs,
        }
    }

    /// Asks one request after the other for that long; how long each took, sorted.
    fn times(&self, client: &mut Bystander, length: Duration) -> Vec<Duration> {
        let until = Instant::now() + length;
        let mut times = Vec::new();
        while Instant::now() < until || times.is_empty() {
            let began = Instant::now();
            client.asks();
            times.push(began.elapsed());
        }
        times.sort_unstable();
        times
    }

    /// Lets so many connections do that on threads of the lowest priority, until it is to stop.
    fn abuse(&self, abuse: &Abuse, connections: usize, stop: &Arc<AtomicBool>) -> Vec<thread::JoinHandle<u64>> {
        let config = client_config(&self.pki, None, abuse.protocol).expect("certificates");
        let one = |_| {
            let (begin, stop, config) = (abuse.begin, Arc::clone(stop), config.clone());
            let h2 = abuse.protocol == b"h2";
            thread::spawn(move || {
                lowest_priority();
                let mut times = 0;
                while !stop.load(Relaxed) {
                    let Ok(mut peer) = Peer::connect_with(config.clone(), RELAY) else {
                        continue;
                    };
                    peer.impatient(Duration::from_millis(300));
                    if h2 && peer.try_begin_client(&[]).is_err() {
                        continue;
                    }
                    let mut act = begin();
                    while !stop.load(Relaxed) {
                        match act(&mut peer) {
                            Ok(()) => times += 1,
                            // It is held back; an end is something else.
                            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                                thread::sleep(Duration::from_millis(20));
                            }
                            Err(_) => break,
                        }
                    }
                }
                times
            })
        };
        (0..connections).map(one).collect()
    }

    /// The relay's memory at its highest until the threads end, which are told after that long.
    fn highest_kib(&self, highest: &Arc<AtomicU64>, stop: &Arc<AtomicBool>) -> thread::JoinHandle<()> {
        let (highest, stop) = (Arc::clone(highest), Arc::clone(stop));
        let path = format!("/proc/{}/status", self.relay.id());
        thread::spawn(move || {
            while !stop.load(Relaxed) {
                let status = std::fs::read_to_string(&path).unwrap_or_default();
                let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
                let now = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
                highest.fetch_max(now.unwrap_or(0), Relaxed);
                thread::sleep(Duration::from_millis(20));
            }
        })
    }
}

/// Those who do harm shall not take the processor from those who are measured.
fn lowest_priority() {
    // SAFETY: a number is set for the calling thread; no memory is read or written.
    unsafe { libc::setpriority(libc::PRIO_PROCESS as _, 0, 19) };
}

/// A client with one request at a time.
struct Bystander {
    peer: Peer,
    stream: u32,
}

impl Bystander {
    fn connect(pki: &Pki) -> Self {
        let alice = pki.client("alice", "alice", &[]).expect("a certificate");
        let mut peer = Peer::connect(pki, RELAY, Some(&alice), b"h2").expect("a handshake");
        peer.begin_client(&[]);
        peer.send(&frame(kind::WINDOW_UPDATE, 0, 0, &0x7fff_0000_u32.to_be_bytes()));
        Self { peer, stream: 1 }
    }

    fn asks(&mut self) {
        self.peer
            .send(&request(self.stream, "/api/v1/namespaces/default/pods/web-0"));
        loop {
            let got = self.peer.receive();
            if got.stream == self.stream && got.flags & END_STREAM != 0 {
                break;
            }
        }
        self.stream += 2;
    }
}

fn p99(times: &[Duration]) -> Duration {
    times[times.len() * 99 / 100]
}

#[test]
fn no_abuse_costs_more_memory_than_the_bound_and_others_are_served() {
    let backend = match fixture::backend() {
        Ok(backend) => backend,
        Err(error) => return skip(&format!("{error:#}")),
    };
    let long = env::var_os("REBALANCER_LONG").is_some();
    let (connections, length) = if long {
        (100, Duration::from_secs(4))
    } else {
        (20, Duration::from_millis(250))
    };
    let scene = Scene::start(&backend);
    let mut client = Bystander::connect(&scene.pki);
    scene.times(&mut client, Duration::from_millis(300));
    let idle = resident_kib(&scene.relay);
    println!(
        "idle: {} MiB; {connections} connections for {length:?} each",
        idle / 1024
    );
    for abuse in &ABUSES {
        let before = p99(&scene.times(&mut client, length));
        let stop = Arc::new(AtomicBool::new(false));
        let highest = Arc::new(AtomicU64::new(0));
        let watching = scene.highest_kib(&highest, &stop);
        let threads = scene.abuse(abuse, connections, &stop);
        let times = scene.times(&mut client, length);
        stop.store(true, Relaxed);
        let acts: u64 = threads.into_iter().map(|thread| thread.join().expect("it ends")).sum();
        watching.join().expect("it ends");
        let grown = highest.load(Relaxed).saturating_sub(idle);
        println!(
            "{}: {acts} times; memory {:+.1} MiB; others' p99 {:.1} ms, before {:.1} ms: {:.1} x, {} requests",
            abuse.name,
            grown as f64 / 1024.0,
            p99(&times).as_secs_f64() * 1e3,
            before.as_secs_f64() * 1e3,
            p99(&times).as_secs_f64() / before.as_secs_f64(),
            times.len()
        );
        assert!(grown <= BOUND_KIB, "{}: {grown} KiB more than idle", abuse.name);
    }
    unfinished_handshakes(&scene, &mut client, if long { 3000 } else { 300 }, idle);
    drop(scene.namespace);
}

/// More handshakes than may be unfinished, each with most of a message that never ends.
fn unfinished_handshakes(scene: &Scene, client: &mut Bystander, count: usize, idle: u64) {
    let begun = Instant::now();
    // A ClientHello of 60,000 octets, in records of 16 KiB, of which the last is missing.
    let record = |first: bool| {
        let mut record = vec![22, 3, 1, 0x40, 0];
        let mut body = vec![0; 16_384];
        if first {
            body[..4].copy_from_slice(&[1, 0, 0xea, 0x60]);
            body[4..6].copy_from_slice(&[3, 3]);
        }
        record.extend(body);
        record
    };
    let hello = [record(true), record(false), record(false)].concat();
    let mut held = Vec::new();
    let mut highest = 0;
    for _ in 0..count {
        let Ok(mut socket) = TcpStream::connect(RELAY) else {
            continue;
        };
        socket.set_nonblocking(true).expect("a socket option");
        let _ = socket.write(&hello);
        held.push(socket);
        if held.len() % 50 == 0 {
            client.asks();
            highest = highest.max(resident_kib(&scene.relay));
        }
    }
    let times = scene.times(client, Duration::from_millis(300));
    let grown = highest.max(resident_kib(&scene.relay)).saturating_sub(idle);
    println!(
        "{count} handshakes without an end in {:.1} s: memory {:+.1} MiB; others' p99 {:.1} ms",
        begun.elapsed().as_secs_f64(),
        grown as f64 / 1024.0,
        p99(&times).as_secs_f64() * 1e3
    );
    assert!(grown <= BOUND_KIB, "{grown} KiB more than idle");
    drop(held);
}
