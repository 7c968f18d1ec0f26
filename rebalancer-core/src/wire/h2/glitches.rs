//! Glitches, as haproxy has them (`tune.h2.fe.glitches-threshold`): what costs the server work and brings its sender
//! nothing. Rapid reset, MadeYouReset and floods of SETTINGS, PING or empty DATA are made of these; who wants to be served
//! makes a few.
//!
//! Input: frame headers of both directions. Output: how many there were. Must never end anything: the edge slows who makes
//! too many.

use super::frame::{FrameHeader, flag, kind};

/// How many window updates a frame of DATA explains, whatever it holds: clients send one on the stream and one on the
/// connection for each, or for each so many octets, which is what Go's does (golang.org/x/net/http2/flow.go,
/// `inflowMinRefresh`). A frame may hold as much as its client allows, up to 16 MiB (RFC 9113, section 4.2).
const UPDATES: u32 = 2;
const REFRESH: u32 = 4096;

/// How many window updates may be left unsent.
const MOST_UPDATES: u32 = 100_000;

/// Octets of a header list beyond what its block explains that count for one.
const LIST_OCTETS: usize = 1024;

/// How many octets a list may have for each of its block's, and besides. Huffman's code makes five of eight and the table
/// holds 4,096, once: a list that is longer than that names the same fields again and again.
const LIST_FACTOR: usize = 2;
const LIST_FREE: usize = 8 * 1024;

/// What was counted and not asked for yet.
#[derive(Debug, Default)]
pub struct Glitches {
    count: u32,
    /// Window updates that requests, and what the server has sent, explain.
    updates: u32,
}

impl Glitches {
    /// A frame of the client's begins.
    pub fn client(&mut self, header: FrameHeader) {
        let is_one = match header.kind {
            // Some widen each stream's window before there is anything to read (nghttp2's users, curl among them).
            kind::HEADERS => {
                self.explain(1);
                false
            }
            kind::CONTINUATION => false,
            kind::DATA => header.length == 0 && !header.has(flag::END_STREAM),
            kind::WINDOW_UPDATE => {
                let explained = self.updates > 0;
                self.updates -= u32::from(explained);
                !explained
            }
            // PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY and what nobody knows: a few of each have their use.
            _ => true,
        };
        self.add(u32::from(is_one));
    }

    /// The server sends so many octets of DATA.
    pub fn data(&mut self, length: u32) {
        self.explain(UPDATES * (1 + length.div_ceil(REFRESH)));
    }

    /// The server resets a stream that it has not answered: its client may have seen to that.
    pub fn reset(&mut self) {
        self.add(1);
    }

    /// A header block of so many octets had a list of so many.
    pub fn list(&mut self, block: usize, list: usize) {
        let more = list.saturating_sub(block * LIST_FACTOR + LIST_FREE);
        self.add((more / LIST_OCTETS) as u32);
    }

    /// A header block comes to nothing.
    pub fn refused(&mut self) {
        self.add(1);
    }

    /// How many there were since this was asked last.
    pub fn take(&mut self) -> u32 {
        std::mem::take(&mut self.count)
    }

    fn explain(&mut self, updates: u32) {
        self.updates = (self.updates + updates).min(MOST_UPDATES);
    }

    fn add(&mut self, more: u32) {
        self.count = self.count.saturating_add(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: u8, flags: u8, length: u32) -> FrameHeader {
        FrameHeader {
            length,
            kind,
            flags,
            stream: 1,
        }
    }

    #[test]
    fn who_wants_to_be_served_makes_none() {
        let mut glitches = Glitches::default();
        for _ in 0..1000 {
            glitches.client(header(kind::HEADERS, flag::END_HEADERS, 50));
            glitches.client(header(kind::WINDOW_UPDATE, 0, 4));
            glitches.client(header(kind::DATA, 0, 1));
            glitches.client(header(kind::DATA, flag::END_STREAM, 0));
            // A watch's event, what Go sends at once, the usual largest frame, and the largest there is.
            for (length, updates) in [(1, 2), (1024, 2), (16_384, 8), ((1 << 24) - 1, 8192)] {
                glitches.data(length);
                for _ in 0..updates {
                    glitches.client(header(kind::WINDOW_UPDATE, 0, 4));
                }
            }
        }
        // A usual list by the table alone, one with 150 groups, and one of eight octets in five.
        for (block, list) in [(10, 2_000), (7_500, 16_000), (60_000, 96_000)] {
            glitches.list(block, list);
        }
        assert_eq!(glitches.take(), 0);
    }

    #[test]
    fn whatever_is_of_no_use_to_its_sender_counts() {
        for (what, frame) in [
            ("empty DATA", header(kind::DATA, 0, 0)),
            ("a reset", header(kind::RST_STREAM, 0, 4)),
            ("SETTINGS", header(kind::SETTINGS, 0, 6)),
            ("an answer to SETTINGS", header(kind::SETTINGS, flag::ACK, 0)),
            ("PING", header(kind::PING, 0, 8)),
            ("an answer to a PING", header(kind::PING, flag::ACK, 8)),
            ("PRIORITY", header(kind::PRIORITY, 0, 5)),
            ("a window update of nothing", header(kind::WINDOW_UPDATE, 0, 4)),
            ("GOAWAY", header(kind::GOAWAY, 0, 8)),
            ("an unknown frame", header(0x42, 0, 8)),
        ] {
            let mut glitches = Glitches::default();
            for _ in 0..1000 {
                glitches.client(frame);
            }
            assert_eq!(glitches.take(), 1000, "{what}");
            assert_eq!(glitches.take(), 0, "{what}");
        }
        let mut glitches = Glitches::default();
        glitches.reset();
        glitches.refused();
        assert_eq!(glitches.take(), 2);
        // Fifteen octets that stand for twelve times the table.
        glitches.list(15, 48 * 1024);
        assert_eq!(glitches.take(), 39);
    }
}
