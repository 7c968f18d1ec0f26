//! A client that sees frames: it asks, counts GOAWAYs, and never opens a stream after one.
//!
//! Must never forgive: whatever is not answered with 200, or is reset, is a panic.

use std::{
    net::{SocketAddr, SocketAddrV6},
    thread,
};

use crate::{
    h2wire::{END_STREAM, Frame, Peer, frame, kind, request},
    netns::Namespace,
    pki::Pki,
};

/// RFC 9113, section 6.9.1.
const WINDOW: u32 = 65_535;

/// One connection.
pub struct Client {
    peer: Peer,
    next: u32,
    unacknowledged: u32,
    /// Its own address, as the server sees it.
    pub address: SocketAddr,
    /// Requests that were answered.
    pub requests: u64,
    /// The last stream and the error code of each GOAWAY.
    pub goaways: Vec<(u32, u32)>,
}

impl Client {
    /// Connects from a namespace, speaking HTTP/2.
    ///
    /// # Panics
    ///
    /// As everything here does, when it cannot.
    pub fn connect(pki: &Pki, from: &Namespace, server: SocketAddr) -> Self {
        Self::try_connect(pki, from, server).expect("a connection")
    }

    /// The same, where the server may not be there.
    ///
    /// # Errors
    ///
    /// It is not there.
    pub fn try_connect(pki: &Pki, from: &Namespace, server: SocketAddr) -> anyhow::Result<Self> {
        let identity = pki.pair("admin");
        let mut peer = thread::scope(|scope| {
            scope
                .spawn(|| {
                    from.enter()?;
                    Peer::connect(pki, server, Some(&identity), b"h2")
                })
                .join()
                .expect("the thread ends well")
        })?;
        anyhow::ensure!(peer.protocol == b"h2", "the server does not select h2");
        peer.begin_client(&[]);
        let local = peer.local();
        let address = match local {
            // Zones are the host's own.
            SocketAddr::V6(v6) => SocketAddr::V6(SocketAddrV6::new(*v6.ip(), v6.port(), 0, 0)),
            v4 => v4,
        };
        Ok(Self {
            peer,
            next: 1,
            unacknowledged: 0,
            address,
            requests: 0,
            goaways: Vec::new(),
        })
    }

    /// Asks once, and must be answered with 200.
    pub fn get(&mut self, path: &str) -> String {
        let mut bodies = self.get_at_once(path, 1);
        bodies.pop().flatten().expect("no GOAWAY came before the request")
    }

    /// Asks once; whether the answer is 200.
    pub fn try_get(&mut self, path: &str) -> bool {
        let stream = self.next;
        self.next += 2;
        self.peer.send(&request(stream, path));
        let mut is_well = false;
        loop {
            let frame = self.receive();
            if frame.stream != stream {
                continue;
            }
            is_well |= frame.kind == kind::HEADERS && frame.payload[0] == 0x88;
            if frame.flags & END_STREAM != 0 {
                self.requests += 1;
                return is_well;
            }
        }
    }

    /// Asks so many times at once; a request that a GOAWAY left out is `None`, and every other must be answered with 200.
    pub fn get_at_once(&mut self, path: &str, count: usize) -> Vec<Option<String>> {
        let first = self.next;
        let streams: Vec<u32> = (0..count as u32).map(|index| first + 2 * index).collect();
        let octets: Vec<u8> = streams.iter().flat_map(|stream| request(*stream, path)).collect();
        self.next += 2 * count as u32;
        self.peer.send(&octets);
        let mut bodies: Vec<Option<String>> = vec![Some(String::new()); count];
        let mut open = count;
        while open > 0 {
            let before = self.goaways.len();
            let frame = self.receive();
            if self.goaways.len() > before {
                // Go's server says GOAWAY once, with the last stream it takes.
                let last = self.goaways[before].0;
                for (stream, body) in streams.iter().zip(&mut bodies) {
                    if *stream > last && body.take().is_some() {
                        open -= 1;
                    }
                }
                continue;
            }
            if frame.stream < first {
                continue;
            }
            let body = &mut bodies[(frame.stream - first) as usize / 2];
            match frame.kind {
                // Index 8 of the static table, `:status: 200` (RFC 7541, appendix A).
                kind::HEADERS => assert_eq!(frame.payload[0], 0x88, "{path} is not answered with 200"),
                kind::DATA => {
                    if let Some(body) = body {
                        body.push_str(&String::from_utf8_lossy(&frame.payload));
                    }
                }
                kind::RST_STREAM => panic!("{path}: stream {} was reset with {}", frame.stream, frame.word(0)),
                _ => {}
            }
            if matches!(frame.kind, kind::HEADERS | kind::DATA) && frame.flags & END_STREAM != 0 && body.is_some() {
                self.requests += 1;
                open -= 1;
            }
        }
        bodies
    }

    /// Opens a stream that stays open; answers with its number once the server has begun to answer.
    pub fn open(&mut self, path: &str) -> u32 {
        let stream = self.next;
        self.next += 2;
        let mut octets = request(stream, path);
        // Without END_STREAM: the body is still to come.
        octets[4] &= !END_STREAM;
        self.peer.send(&octets);
        while !matches!(self.receive(), Frame { kind: kind::DATA, stream: own, .. } if own == stream) {}
        stream
    }

    /// Ends what [`Self::open`] began, and must be answered to the end.
    pub fn finish(&mut self, stream: u32) {
        self.peer.send(&frame(kind::DATA, END_STREAM, stream, b"end"));
        loop {
            let frame = self.receive();
            if frame.stream == stream {
                assert_ne!(frame.kind, kind::RST_STREAM, "the open stream was reset");
                if frame.flags & END_STREAM != 0 {
                    self.requests += 1;
                    return;
                }
            }
        }
    }

    /// Waits for a GOAWAY.
    pub fn wait_for_goaway(&mut self) {
        while self.goaways.is_empty() {
            self.receive();
        }
    }

    /// How many GOAWAYs there are, all that was sent so far taken in.
    pub fn goaways(&mut self) -> usize {
        self.peer.send(&frame(kind::PING, 0, 0, b"are you?"));
        // The server may have closed, all its streams being done.
        while let Ok(Some(frame)) = self.take() {
            if frame.kind == kind::PING && frame.flags & 1 == 1 {
                break;
            }
        }
        self.goaways.len()
    }

    fn receive(&mut self) -> Frame {
        self.take()
            .expect("a frame in time")
            .expect("a frame and not the end of the connection")
    }

    fn take(&mut self) -> std::io::Result<Option<Frame>> {
        let Some(received) = self.peer.try_next()? else {
            return Ok(None);
        };
        match received.kind {
            kind::GOAWAY => self.goaways.push((received.word(0), received.word(4))),
            kind::SETTINGS if received.flags & 1 == 0 => self.peer.send(&frame(kind::SETTINGS, 1, 0, &[])),
            kind::PING if received.flags & 1 == 0 => self.peer.send(&frame(kind::PING, 1, 0, &received.payload)),
            kind::DATA => {
                self.unacknowledged += received.payload.len() as u32;
                if self.unacknowledged > WINDOW / 2 {
                    let more = self.unacknowledged.to_be_bytes();
                    self.peer.send(&frame(kind::WINDOW_UPDATE, 0, 0, &more));
                    self.unacknowledged = 0;
                }
            }
            _ => {}
        }
        Ok(Some(received))
    }
}
