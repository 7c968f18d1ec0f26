//! Large bodies through a relay whose neighbours read when they please: nothing stalls, and nothing waits for a frame
//! of the reader's.

use std::{
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use rebalancer_tests::{
    h2wire::{END_HEADERS, END_STREAM, PREFACE, Peer, frame, get, kind, request},
    process::wait_for,
};

use crate::world::{OK, RELAY, World};

/// The body of each transfer.
const BODY: usize = 64 << 20;

/// DATA as it is sent: the largest frame every peer takes.
const PIECE: usize = 16_384;

/// Sends a whole body on stream 1 from a thread; says how much the other side has taken so far.
fn send_body(mut peer: Peer) -> (JoinHandle<Peer>, Arc<AtomicUsize>) {
    let taken = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&taken);
    let sending = thread::spawn(move || {
        let piece = frame(kind::DATA, 0, 1, &[b'x'; PIECE]);
        for _ in 0..BODY / PIECE {
            peer.send(&piece);
            counted.fetch_add(PIECE, SeqCst);
        }
        peer.send(&frame(kind::DATA, END_STREAM, 1, b""));
        peer
    });
    (sending, taken)
}

/// Waits until nothing more is taken: every queue on the way is full.
fn held_back(taken: &AtomicUsize) {
    let mut last = 0;
    let mut same = 0;
    let still = wait_for(Duration::from_secs(60), || {
        let now = taken.load(SeqCst);
        same = if now == last && now > 0 { same + 1 } else { 0 };
        last = now;
        (same > 10).then_some(())
    });
    assert!(still.is_some(), "it never stops although nobody reads: {last} octets");
}

/// Reads `octets` of DATA of stream 1, and sends nothing.
fn read_body(peer: &mut Peer, octets: usize) {
    let mut have = 0;
    while have < octets {
        let got = peer.receive();
        if got.kind == kind::DATA {
            have += got.payload.len();
        }
    }
}

/// Windows of 2^31-1, on the connection and on every stream (RFC 9113, section 6.9.2).
fn open_windows() -> Vec<u8> {
    [
        frame(kind::SETTINGS, 0, 0, &[0, 4, 0x7f, 0xff, 0xff, 0xff]),
        frame(kind::WINDOW_UPDATE, 0, 0, &0x7fff_0000_u32.to_be_bytes()),
    ]
    .concat()
}

#[test]
fn a_download_goes_on_after_pauses_although_the_client_sends_no_frame() {
    let world = World::start(&[]);
    let (mut client, mut server) = world.open(None);
    client.send(&[open_windows(), request(1, "/large")].concat());
    for expected in [kind::SETTINGS, kind::WINDOW_UPDATE, kind::HEADERS] {
        server.expect(expected);
    }
    server.send(&frame(kind::HEADERS, END_HEADERS, 1, &OK));
    let (sending, taken) = send_body(server);
    client.expect(kind::HEADERS);
    // Pauses of the reader, each until everything between the two is full.
    for _ in 0..4 {
        held_back(&taken);
        read_body(&mut client, BODY / 8);
    }
    read_body(&mut client, BODY / 2);
    sending.join().expect("the server sent all of it");
}

#[test]
fn an_upload_goes_on_after_pauses_although_the_server_sends_no_frame() {
    let world = World::start(&[]);
    let (mut client, mut server) = world.open(None);
    client.send(&frame(kind::HEADERS, END_HEADERS, 1, &get("/large")));
    server.expect(kind::HEADERS);
    let (sending, taken) = send_body(client);
    for _ in 0..4 {
        held_back(&taken);
        read_body(&mut server, BODY / 8);
    }
    read_body(&mut server, BODY / 2);
    sending.join().expect("the client sent all of it");
}

/// What curl, OkHttp and browsers do: a large window that is opened again at half.
#[test]
fn a_client_with_large_windows_that_pauses_reads_everything() {
    const WINDOW: usize = 16 << 20;
    let world = World::start(&[]);
    let (mut client, mut server) = world.open(None);
    let window = u32::try_from(WINDOW).expect("a window");
    let begin = [
        frame(kind::SETTINGS, 0, 0, &[&[0, 4][..], &window.to_be_bytes()].concat()),
        frame(kind::WINDOW_UPDATE, 0, 0, &(window - 65_535).to_be_bytes()),
        request(1, "/large"),
    ];
    client.send(&begin.concat());
    for expected in [kind::SETTINGS, kind::WINDOW_UPDATE, kind::HEADERS] {
        server.expect(expected);
    }
    let taken = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&taken);
    let sending = thread::spawn(move || {
        let piece = frame(kind::DATA, 0, 1, &[b'x'; PIECE]);
        server.send(&frame(kind::HEADERS, END_HEADERS, 1, &OK));
        let mut windows = [WINDOW; 2];
        for _ in 0..BODY / PIECE {
            while windows.iter().any(|left| *left < PIECE) {
                let update = server.expect(kind::WINDOW_UPDATE);
                windows[usize::from(update.stream == 1)] += update.word(0) as usize;
            }
            server.send(&piece);
            counted.fetch_add(PIECE, SeqCst);
            windows.iter_mut().for_each(|left| *left -= PIECE);
        }
        // Closed before the client has read everything, it would reset the connection: window updates are unread.
        server
    });
    client.expect(kind::HEADERS);
    for _ in 0..BODY / (WINDOW / 2) {
        held_back(&taken);
        read_body(&mut client, WINDOW / 2);
        let update = (window / 2).to_be_bytes();
        client.send(
            &[
                frame(kind::WINDOW_UPDATE, 0, 0, &update),
                frame(kind::WINDOW_UPDATE, 0, 1, &update),
            ]
            .concat(),
        );
    }
    drop(sending.join().expect("the server sent all of it"));
}

/// Lengths that look like chance and are the same each time.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % bound
    }
}

/// Reads by random parts with random pauses between them; says how many octets it will have read.
fn pauses(seed: u64, count: usize) -> (usize, Vec<(usize, Duration)>) {
    let mut chance = Chance(seed);
    let parts: Vec<_> = (0..count)
        .map(|_| {
            let octets = 1 + chance.below(200_000) as usize;
            // Most are shorter than it takes to fill what lies between, some are longer.
            let longest = if chance.below(40) == 0 { 40_000 } else { 1500 };
            (octets, Duration::from_micros(chance.below(longest)))
        })
        .collect();
    (parts.iter().map(|(octets, _)| octets).sum(), parts)
}

/// Both directions of one connection, each with readers that pause: 10,000 times with `REBALANCER_LONG`.
#[test]
fn pauses_of_random_length_stall_nothing() {
    let count = if std::env::var_os("REBALANCER_LONG").is_some() {
        5000
    } else {
        150
    };
    let world = World::start(&[]);
    let mut ends = Vec::new();
    for (seed, upload) in [(1, false), (2, true)] {
        let (mut client, mut server) = world.open(None);
        client.send(&[open_windows(), frame(kind::HEADERS, END_HEADERS, 1, &get("/large"))].concat());
        for expected in [kind::SETTINGS, kind::WINDOW_UPDATE, kind::HEADERS] {
            server.expect(expected);
        }
        server.send(&frame(kind::HEADERS, END_HEADERS, 1, &OK));
        client.expect(kind::HEADERS);
        let (mut sender, mut reader) = if upload { (client, server) } else { (server, client) };
        let (total, parts) = pauses(seed, count);
        ends.push(thread::spawn(move || {
            let piece = frame(kind::DATA, 0, 1, &[b'x'; PIECE]);
            (0..total.div_ceil(PIECE)).for_each(|_| sender.send(&piece));
            sender
        }));
        let reading = thread::spawn(move || {
            let (mut have, mut wanted) = (0, 0);
            for (octets, pause) in parts {
                wanted += octets;
                while have < wanted {
                    // It waits for as long as a stall lasts, and fails.
                    let got = reader.receive();
                    have += if got.kind == kind::DATA { got.payload.len() } else { 0 };
                }
                thread::sleep(pause);
            }
            reader
        });
        ends.push(reading);
    }
    for end in ends {
        drop(end.join().expect("nothing stalled"));
    }
    println!("{} pauses, none of them a stall", 2 * count);
}

/// curl itself, slower than the server: flow control is its own.
#[test]
fn curl_with_a_limited_rate_gets_everything() {
    let world = World::start(&[]);
    let found = Command::new("curl").arg("--version").output();
    let speaks_h2 = found.is_ok_and(|version| String::from_utf8_lossy(&version.stdout).contains("HTTP2"));
    if !speaks_h2 {
        println!("skipped: curl with HTTP/2 is not installed (apt-get install curl)");
        return;
    }
    let curl = Command::new("curl")
        .args(["--silent", "--show-error", "--fail", "--http2", "--limit-rate", "40M"])
        .args([
            "--max-time",
            "120",
            "--output",
            "/dev/null",
            "--write-out",
            "%{size_download}",
        ])
        .arg("--cacert")
        .arg(world.pki.file("ca.crt"))
        .arg(format!("https://{RELAY}/large"))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("curl starts");
    let mut server = world.accept().peer;
    assert_eq!(server.read(PREFACE.len()), PREFACE);
    server.send(&frame(kind::SETTINGS, 0, 0, &[]));
    // The connection's and the stream's, until SETTINGS say otherwise.
    let mut windows = [65_535_usize; 2];
    let heard = |server: &mut Peer, windows: &mut [usize; 2]| {
        let got = server.receive();
        match got.kind {
            kind::WINDOW_UPDATE => windows[usize::from(got.stream == 1)] += got.word(0) as usize,
            kind::SETTINGS => {
                if got.flags == 0 {
                    server.send(&frame(kind::SETTINGS, 1, 0, &[]));
                }
                for setting in got.payload.chunks_exact(6).filter(|setting| setting[..2] == [0, 4]) {
                    windows[1] = u32::from_be_bytes(setting[2..].try_into().expect("four octets")) as usize;
                }
            }
            kind::PING if got.flags == 0 => server.send(&frame(kind::PING, 1, 0, &got.payload)),
            _ => {}
        }
        got.kind
    };
    while heard(&mut server, &mut windows) != kind::HEADERS {}
    server.send(&frame(kind::HEADERS, END_HEADERS, 1, &OK));
    let piece = frame(kind::DATA, 0, 1, &[b'x'; PIECE]);
    for _ in 0..BODY / PIECE {
        while windows.iter().any(|left| *left < PIECE) {
            heard(&mut server, &mut windows);
        }
        server.send(&piece);
        windows.iter_mut().for_each(|left| *left -= PIECE);
    }
    server.send(&frame(kind::DATA, END_STREAM, 1, b""));
    let output = curl.wait_with_output().expect("curl ends");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), BODY.to_string());
}

#[test]
fn what_a_client_sent_before_its_end_reaches_the_server() {
    let world = World::start(&[]);
    // A fault, and the end of the connection, each in one write with a request.
    let (mut client, mut server) = world.open(None);
    client.send(&[request(1, "/last"), frame(kind::CONTINUATION, 0, 1, b"")].concat());
    assert_eq!(server.expect(kind::HEADERS).stream, 1);
    assert_eq!(server.rest(), []);
    let (mut client, mut server) = world.open(None);
    client.send(&request(1, "/last"));
    client.shut_down();
    assert_eq!(server.expect(kind::HEADERS).stream, 1);
    assert_eq!(server.rest(), []);
}
