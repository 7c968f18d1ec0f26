//! The watches of a connection on the server's side: ending them once it was told to go, each between two events.
//!
//! Job: follow the server's half of every watch, and say which may be ended where the stream of frames stands now.
//! Input: the server's frame headers, the fields of its answers and its DATA, in order from the connection's first.
//! Output: streams to end, and whether a frame of an ended one is swallowed.
//! Must never end a watch inside an event, nor one whose encoding it does not know, nor one whose client would not hear of
//! everything when it resumes.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    events::Events,
    frame::{FrameHeader, flag, kind},
    hpack::FieldList,
    watch::Beginning,
};

/// The watches of one connection.
#[derive(Debug, Default)]
pub struct Watches {
    /// The answers cannot be read any more: nothing is ended.
    lost: bool,
    /// The watch whose DATA is coming.
    reading: Option<u32>,
    watches: BTreeMap<u32, Events>,
    /// Those to end at their next place between two events.
    chosen: BTreeSet<u32>,
    /// How many were ever chosen.
    chosen_total: u32,
    allowance: u32,
    /// Those that are ended towards the client while the server may not know yet.
    ended: BTreeSet<u32>,
}

impl Watches {
    /// The client opened a watch that begins like that, and sends no more on it.
    pub fn open(&mut self, stream: u32, beginning: Beginning) {
        if !self.lost {
            self.watches.insert(stream, Events::new(beginning));
        }
    }

    /// Either side is done with a stream.
    pub fn close(&mut self, stream: u32) {
        self.watches.remove(&stream);
        self.chosen.remove(&stream);
    }

    /// From now on up to `total` watches may be ended, those that are already included.
    pub fn allow(&mut self, total: u32) {
        self.allowance = self.allowance.max(total);
    }

    /// Whether the client has seen the end of that watch, while the server may go on with it.
    pub fn has_ended(&self, stream: u32) -> bool {
        self.ended.contains(&stream)
    }

    /// A frame of the server begins; `true` when it is of a watch that was ended, and must not reach the client. A header
    /// block is no such frame: the client's compression state may need it.
    pub fn begin(&mut self, header: FrameHeader) -> bool {
        self.reading = None;
        let last = header.has(flag::END_STREAM) && matches!(header.kind, kind::HEADERS | kind::DATA);
        let swallowed = self.ended.contains(&header.stream)
            && matches!(header.kind, kind::DATA | kind::RST_STREAM | kind::WINDOW_UPDATE);
        if last || header.kind == kind::RST_STREAM {
            self.close(header.stream);
            self.ended.remove(&header.stream);
        }
        if header.kind == kind::DATA
            && let Some(watch) = self.watches.get_mut(&header.stream)
        {
            if header.has(flag::PADDED) {
                // Nobody pads a watch; where its octets end would have to be followed as well.
                watch.lose();
            }
            self.reading = Some(header.stream);
        }
        swallowed
    }

    /// A piece of the payload of the frame that began last.
    pub fn take(&mut self, bytes: &[u8]) {
        if let Some(stream) = self.reading
            && let Some(watch) = self.watches.get_mut(&stream)
        {
            watch.take(bytes);
        }
    }

    /// An answer's header block is complete.
    pub fn answered(&mut self, stream: u32, list: &FieldList) {
        if let Some(watch) = self.watches.get_mut(&stream) {
            watch.answered(list);
        }
    }

    /// How the answers are encoded cannot be read any more: all watches are left alone.
    pub fn lose(&mut self) {
        self.lost = true;
        self.reading = None;
        self.watches.clear();
        self.chosen.clear();
    }

    /// A watch that is to be ended here; the caller ends it towards both sides. Frames are complete on both sides.
    pub fn due(&mut self) -> Option<u32> {
        while self.chosen_total < self.allowance {
            let next = self
                .watches
                .iter()
                .find(|(stream, watch)| watch.can_end() && !self.chosen.contains(stream));
            let Some((stream, _)) = next else { break };
            self.chosen.insert(*stream);
            self.chosen_total += 1;
        }
        let between = |stream: &&u32| self.watches.get(stream).is_some_and(Events::is_between);
        let stream = *self.chosen.iter().find(between)?;
        self.close(stream);
        self.ended.insert(stream);
        Some(stream)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::h2::{
        answers::{Answer, Answers},
        hpack::write_literal,
    };

    fn answer(fields: &[(&str, &str)]) -> Vec<u8> {
        let mut block = Vec::new();
        for (name, value) in fields {
            write_literal(name.as_bytes(), value.as_bytes(), &mut block);
        }
        block
    }

    /// The server's side as the relay follows it.
    #[derive(Default)]
    struct Server {
        answers: Answers,
        watches: Watches,
    }

    impl Server {
        /// A whole frame; whether it is swallowed.
        fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> bool {
            let header = FrameHeader {
                length: payload.len() as u32,
                kind,
                flags,
                stream,
            };
            let swallowed = self.watches.begin(header);
            self.watches.take(payload);
            match self.answers.begin(header).or_else(|| self.answers.take(payload)) {
                Some(Answer::Fields { stream, list }) => self.watches.answered(stream, &list),
                Some(Answer::Lost) => self.watches.lose(),
                None => {}
            }
            swallowed
        }

        fn open(&mut self, stream: u32, beginning: Beginning) {
            self.watches.open(stream, beginning);
        }

        fn allow(&mut self, total: u32) {
            self.watches.allow(total);
        }

        fn due(&mut self) -> Option<u32> {
            self.watches.due()
        }
    }

    fn watching(content_type: &str) -> Server {
        let mut server = Server::default();
        server.open(1, Beginning::Changes);
        let block = answer(&[(":status", "200"), ("content-type", content_type)]);
        server.frame(kind::HEADERS, flag::END_HEADERS, 1, &block);
        server
    }

    #[test]
    fn a_watch_in_json_ends_after_a_newline_and_only_when_allowed() {
        let mut server = watching("application/json");
        assert_eq!(server.due(), None, "nothing is allowed");
        server.frame(kind::DATA, 0, 1, b"{\"type\":");
        server.allow(1);
        assert_eq!(server.due(), None, "inside an event");
        server.frame(kind::DATA, 0, 1, b"\"ADDED\"}\n");
        assert_eq!(server.due(), Some(1));
        assert_eq!(server.due(), None);
        assert!(
            server.frame(kind::DATA, 0, 1, b"late\n"),
            "what comes later is swallowed"
        );
        assert!(server.frame(kind::RST_STREAM, 0, 1, &[0; 4]));
        assert!(!server.frame(kind::DATA, 0, 1, b""), "and forgotten with the stream");
    }

    #[test]
    fn a_watch_in_protobuf_ends_after_a_whole_event() {
        let mut server = watching("application/vnd.kubernetes.protobuf;stream=watch");
        server.allow(1);
        // A newline is an octet like any other here, and lengths may be cut anywhere.
        for piece in [&b"\0\0"[..], b"\0\x03\n", b"\n"] {
            server.frame(kind::DATA, 0, 1, piece);
            assert_eq!(server.due(), None, "{piece:?}");
        }
        server.frame(kind::DATA, 0, 1, b"\n");
        assert_eq!(server.due(), Some(1));
    }

    #[test]
    fn a_quiet_watch_ends_at_once_when_its_encoding_is_known() {
        for (content_type, ends) in [
            ("application/json", true),
            ("Application/JSON; charset=utf-8", true),
            ("application/vnd.kubernetes.protobuf;stream=watch", true),
            ("application/cbor-seq", false),
            ("text/plain", false),
            ("", false),
        ] {
            let mut server = watching(content_type);
            server.allow(1);
            assert_eq!(server.due().is_some(), ends, "{content_type}");
        }
    }

    #[test]
    fn compressed_failed_padded_and_unanswered_watches_are_left_alone() {
        let json = ("content-type", "application/json");
        for fields in [
            &[(":status", "200"), json, ("content-encoding", "gzip")][..],
            &[(":status", "410"), json],
            &[(":status", "103"), json],
            &[json],
        ] {
            let mut server = Server::default();
            server.open(1, Beginning::Changes);
            server.frame(kind::HEADERS, flag::END_HEADERS, 1, &answer(fields));
            server.allow(1);
            assert_eq!(server.due(), None, "{fields:?}");
        }
        let mut padded = watching("application/json");
        padded.frame(kind::DATA, flag::PADDED, 1, &[1, b'\n', 0]);
        padded.allow(1);
        assert_eq!(padded.due(), None);
    }

    #[test]
    fn header_blocks_are_followed_from_the_first_on() {
        let mut server = Server::default();
        server.open(3, Beginning::Changes);
        // Another stream's answer puts the content type into the table; the watch's only names it, in two frames.
        let mut first = vec![0x88, 0x5f, 16];
        first.extend(b"application/json");
        server.frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, 1, &first);
        server.frame(kind::HEADERS, flag::PADDED, 3, &[1, 0x88, 0]);
        server.frame(kind::CONTINUATION, flag::END_HEADERS, 3, &[0xbe]);
        server.allow(1);
        assert_eq!(server.due(), Some(3));
    }

    #[test]
    fn what_cannot_be_followed_leaves_everything_alone() {
        let lost = |kind, flags, payload: &[u8]| {
            let mut server = watching("application/json");
            server.frame(kind, flags, 5, payload);
            server.open(7, Beginning::Changes);
            server.allow(9);
            server.due()
        };
        assert_eq!(
            lost(kind::HEADERS, flag::END_HEADERS, &[0xff, 0x7f]),
            None,
            "an unknown index"
        );
        assert_eq!(
            lost(kind::HEADERS, flag::END_HEADERS | flag::PADDED, &[9]),
            None,
            "padding"
        );
        assert_eq!(lost(kind::HEADERS, 0, &vec![0; 65_537]), None, "a large block");
        assert_eq!(lost(kind::PUSH_PROMISE, flag::END_HEADERS, &[0, 0, 0, 2]), None);
        assert_eq!(lost(kind::DATA, 0, b"x"), Some(1), "and otherwise it goes on");
    }

    #[test]
    fn no_more_are_ended_than_allowed_and_the_oldest_go_first() {
        let mut server = Server::default();
        let block = answer(&[(":status", "200"), ("content-type", "application/json")]);
        for stream in [5, 1, 3] {
            server.open(stream, Beginning::Changes);
            server.frame(kind::HEADERS, flag::END_HEADERS, stream, &block);
        }
        server.allow(2);
        assert_eq!([server.due(), server.due(), server.due()], [Some(1), Some(3), None]);
        server.allow(1);
        assert_eq!(server.due(), None, "an allowance never shrinks");
        server.allow(3);
        assert_eq!(server.due(), Some(5));
    }

    proptest! {
        #[test]
        fn the_end_is_always_between_two_events(
            events in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..12),
            cut in 1_usize..30,
            protobuf in any::<bool>(),
        ) {
            let mut wire = Vec::new();
            let mut ends = BTreeSet::from([0]);
            for event in &events {
                if protobuf {
                    wire.extend((event.len() as u32).to_be_bytes());
                    wire.extend(event);
                } else {
                    wire.extend(event.iter().filter(|octet| **octet != b'\n'));
                    wire.push(b'\n');
                }
                ends.insert(wire.len());
            }
            let mut server = watching(if protobuf { "application/vnd.kubernetes.protobuf" } else { "application/json" });
            let mut passed = 0;
            let from = cut % (wire.len() + 1);
            for piece in wire.chunks(cut) {
                if passed >= from {
                    server.allow(1);
                }
                if server.due().is_some() {
                    prop_assert!(ends.contains(&passed), "{passed} is inside an event");
                    return Ok(());
                }
                server.frame(kind::DATA, 0, 1, piece);
                passed += piece.len();
            }
            server.allow(1);
            prop_assert_eq!(server.due(), Some(1), "at the end of the last event at the latest");
        }
    }
}
