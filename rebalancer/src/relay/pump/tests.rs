//! Every order in which four half-streams become ready, played on a scripted executor: the pump is polled only when one
//! of its wakers was called, and nothing may stay behind.

use std::{
    cell::RefCell,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::{Wake, Waker},
};

use rebalancer_core::wire::{
    h2::{
        frame::{FrameHeader, HEADER_LEN, PREFACE, flag, kind},
        relay::Settings,
    },
    rewrite::Policy,
};

use super::*;
use crate::relay::registry::Registry;

/// How much a side takes at a time: neither a whole queue nor a whole read.
const ROOM: usize = 40_000;

/// How often each side sends: more than both queues hold.
const SENDS: usize = 5;

/// How many events every order is played of; then each side does all it has not done yet, in turn.
const DEPTH: u32 = 6;

/// One connection of the pump's, as the test moves it.
#[derive(Default)]
struct Wire {
    readable: Vec<u8>,
    reader: Option<Waker>,
    room: usize,
    writer: Option<Waker>,
    written: Vec<u8>,
}

impl Wire {
    fn arrive(&mut self, octets: &[u8]) {
        self.readable.extend_from_slice(octets);
        self.reader.take().inspect(Waker::wake_by_ref);
    }

    fn make_room(&mut self) {
        self.room = ROOM;
        self.writer.take().inspect(Waker::wake_by_ref);
    }
}

struct NoApiserver;

impl Behind for NoApiserver {
    fn leaves(&self) {
        panic!("it has not said that it goes");
    }

    async fn breaks(&self) {
        panic!("it has not gone");
    }
}

#[derive(Clone, Default)]
struct Socket(Rc<RefCell<Wire>>);

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut wire = self.0.borrow_mut();
        if wire.readable.is_empty() {
            wire.reader = Some(context.waker().clone());
            return Poll::Pending;
        }
        let count = wire.readable.len().min(buffer.remaining());
        buffer.put_slice(&wire.readable[..count]);
        wire.readable.drain(..count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, octets: &[u8]) -> Poll<io::Result<usize>> {
        let mut wire = self.0.borrow_mut();
        if wire.room == 0 {
            wire.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        let count = wire.room.min(octets.len());
        wire.room -= count;
        wire.written.extend_from_slice(&octets[..count]);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, SeqCst);
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    FrameHeader {
        length: payload.len() as u32,
        kind,
        flags,
        stream,
    }
    .write(&mut out);
    out.extend_from_slice(payload);
    out
}

/// What each side sends at a time: three frames of DATA.
fn data() -> Vec<u8> {
    frame(kind::DATA, 0, 1, &[b'x'; 16_384]).repeat(3)
}

/// Octets of DATA that arrived, frames that are cut left out.
fn received(mut octets: &[u8]) -> usize {
    octets = octets.strip_prefix(&PREFACE[..]).unwrap_or(octets);
    let mut sum = 0;
    while let Some((head, rest)) = octets.split_first_chunk::<HEADER_LEN>() {
        let header = FrameHeader::parse(head);
        let Some(rest) = rest.get(header.length as usize..) else {
            break;
        };
        octets = rest;
        if header.kind == kind::DATA {
            sum += header.length as usize;
        }
    }
    sum
}

struct Play<'a> {
    client: Socket,
    server: Socket,
    sends_left: [usize; 2],
    pump: Pin<Box<dyn Future<Output = End> + 'a>>,
    woken: Arc<Woken>,
    waker: Waker,
}

impl Play<'_> {
    /// One of four things happens, and the executor does what it was woken for.
    fn event(&mut self, event: usize) {
        match event {
            0 | 1 if self.sends_left[event] > 0 => {
                self.sends_left[event] -= 1;
                [&self.client, &self.server][event].0.borrow_mut().arrive(&data());
            }
            2 => self.client.0.borrow_mut().make_room(),
            3 => self.server.0.borrow_mut().make_room(),
            _ => {}
        }
        self.settle();
    }

    fn settle(&mut self) {
        while self.woken.0.swap(false, SeqCst) {
            let polled = self.pump.as_mut().poll(&mut Context::from_waker(&self.waker));
            assert!(polled.is_pending(), "nobody has ended: {polled:?}");
        }
        let (client, server) = (self.client.0.borrow(), self.server.0.borrow());
        let waits = client.writer.is_some() || server.writer.is_some();
        assert!(
            client.readable.is_empty() || client.reader.is_some() || waits,
            "the client can be read, and nothing will wake the task"
        );
        assert!(
            server.readable.is_empty() || server.reader.is_some() || client.writer.is_some(),
            "the server can be read, and nothing will wake the task"
        );
    }
}

fn pump() -> Pump {
    Pump::new(Relay::new(Settings {
        policy: Policy::new(Arc::default(), IpAddr::from([192, 0, 2, 7])),
        max_header_bytes: 4096,
        ping: [7; 8],
        watch_handover: false,
    }))
}

fn play(order: &[usize]) {
    let registry = Registry::new("test".to_owned());
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
    let connection = registry.open(1, nowhere, nowhere);
    let mut pump = pump();
    let (client, server) = (Socket::default(), Socket::default());
    let settings = frame(kind::SETTINGS, 0, 0, &[]);
    let request = frame(kind::HEADERS, flag::END_HEADERS, 1, &[0x83, 0x87, 0x84]);
    client
        .0
        .borrow_mut()
        .arrive(&[&PREFACE[..], &settings, &request].concat());
    server.0.borrow_mut().arrive(&settings);
    let woken = Arc::new(Woken(AtomicBool::new(true)));
    let mut ends = (client.clone(), server.clone());
    let mut play = Play {
        client,
        server,
        sends_left: [SENDS; 2],
        pump: Box::pin(async { pump.relay(&mut ends.0, &mut ends.1, &connection, &NoApiserver).await }),
        waker: Waker::from(Arc::clone(&woken)),
        woken,
    };
    play.settle();
    for event in order {
        play.event(*event);
    }
    for _ in 0..SENDS + 2 * SENDS * data().len() / ROOM {
        for event in 0..4 {
            play.event(event);
        }
    }
    let sent = SENDS * 3 * 16_384;
    assert_eq!(
        received(&play.client.0.borrow().written),
        sent,
        "to the client: {order:?}"
    );
    assert_eq!(
        received(&play.server.0.borrow().written),
        sent,
        "to the server: {order:?}"
    );
}

#[test]
fn in_whatever_order_four_half_streams_become_ready_nothing_stays_behind() {
    for number in 0..4_usize.pow(DEPTH) {
        let order: Vec<usize> = (0..DEPTH).map(|at| number / 4_usize.pow(at) % 4).collect();
        play(&order);
    }
}

#[test]
fn ten_thousand_pauses_of_random_length_leave_nothing_behind() {
    const PLAYS: usize = 250;
    const EVENTS: usize = 120;
    let mut state = 1_u64;
    let mut pauses = 0;
    for _ in 0..PLAYS {
        let order: Vec<usize> = (0..EVENTS)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 60) as usize % 4
            })
            .collect();
        // A side that reads, and then does not until something else has happened, has paused.
        pauses += order
            .windows(2)
            .filter(|pair| pair[0] >= 2 && pair[1] != pair[0])
            .count();
        play(&order);
    }
    assert!(pauses >= 10_000, "{pauses}");
}

#[test]
fn a_client_that_reads_nothing_is_still_heard() {
    // Its own frames must reach the server although its queue is full: event 1 fills it, event 0 is the client's.
    play(&[3, 1, 1, 1, 1, 0, 3, 0, 3]);
}

/// Requests of twelve octets each cost far more than octets that pass: others come first after some hundred of them.
#[test]
fn a_turn_of_small_requests_is_no_longer_than_one_of_octets_that_pass() {
    const REQUESTS: u32 = 3000;
    let registry = Registry::new("test".to_owned());
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
    let connection = registry.open(1, nowhere, nowhere);
    let mut pump = pump();
    let (client, server) = (Socket::default(), Socket::default());
    let settings = frame(kind::SETTINGS, 0, 0, &[]);
    let ends = flag::END_HEADERS | flag::END_STREAM;
    let requests = (0..REQUESTS).flat_map(|index| frame(kind::HEADERS, ends, 2 * index + 1, &[0x82, 0x87, 0x84]));
    let octets: Vec<u8> = [&PREFACE[..], &settings].concat().into_iter().chain(requests).collect();
    client.0.borrow_mut().arrive(&octets);
    server.0.borrow_mut().arrive(&settings);
    server.0.borrow_mut().room = usize::MAX;
    let woken = Arc::new(Woken(AtomicBool::new(true)));
    let waker = Waker::from(Arc::clone(&woken));
    let passed = || {
        let wire = server.0.borrow();
        let mut octets = &wire.written[wire.written.len().min(PREFACE.len())..];
        let mut count = 0;
        while let Some((head, rest)) = octets.split_first_chunk::<HEADER_LEN>() {
            let header = FrameHeader::parse(head);
            octets = &rest[header.length as usize..];
            count += u32::from(header.kind == kind::HEADERS);
        }
        count
    };
    let mut ends = (client.clone(), server.clone());
    let mut relaying = Box::pin(async { pump.relay(&mut ends.0, &mut ends.1, &connection, &NoApiserver).await });
    let (mut before, mut turns) = (0, 0);
    while woken.0.swap(false, SeqCst) {
        assert!(relaying.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        let now = passed();
        assert!(now - before <= 400, "{} in one turn", now - before);
        turns += u32::from(now > before);
        before = now;
    }
    assert_eq!(before, REQUESTS, "in {turns} turns");
}
