//! The events of one watch, as its answer's DATA brings them.
//!
//! Job: say where one event ends, and whether the client may resume there. Input: the answer's fields and its octets, in
//! pieces of any size. Must never call a place an end that is inside an event; nor let a watch end while it still tells
//! what exists: that comes in the order of names, the client resumes at the version it has seen last, and never hears of
//! what is older and had not come.

use super::{hpack::FieldList, watch::Beginning};

/// How events are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Coding {
    /// The answer's header block has not come.
    Unanswered,
    /// JSON: each event ends in a newline, and holds none.
    Lines {
        /// Whether the last octet was one.
        ended: bool,
    },
    /// Protobuf: each event follows its length in four octets, big endian
    /// (k8s.io/apimachinery/pkg/util/framer/framer.go).
    Delimited {
        /// The length's octets so far.
        head: [u8; 4],
        /// How many of them there are.
        have: u8,
        /// Octets of the event that are to come.
        left: u32,
    },
    /// Something else.
    Opaque,
}

impl Coding {
    /// What an answer's header list says.
    fn of(list: &FieldList) -> Self {
        let Some(status) = list.get(b":status") else {
            return Self::Opaque;
        };
        if status.starts_with(b"1") {
            return Self::Unanswered;
        }
        // The length of a watch is not known, and nothing follows its last event: what says otherwise is something else.
        if list.get(b"content-length").is_some() || list.get(b"trailer").is_some() {
            return Self::Opaque;
        }
        let plain = list
            .get(b"content-encoding")
            .is_none_or(|coding| coding.eq_ignore_ascii_case(b"identity"));
        if status != b"200" || !plain {
            return Self::Opaque;
        }
        let kind = list.get(b"content-type").unwrap_or_default();
        let kind = kind.split(|octet| *octet == b';').next().unwrap_or_default();
        match kind.trim_ascii().to_ascii_lowercase().as_slice() {
            b"application/json" => Self::Lines { ended: true },
            b"application/vnd.kubernetes.protobuf" => Self::Delimited {
                head: [0; 4],
                have: 0,
                left: 0,
            },
            _ => Self::Opaque,
        }
    }
}

/// What says in each coding that an event is a bookmark, and in a bookmark that what existed has been told
/// (k8s.io/apimachinery/pkg/apis/meta/v1, `WatchEvent` and `InitialEventsAnnotationKey`). A bookmark holds nothing that a
/// client wrote; whatever stands in another event is a client's text.
struct Marks {
    bookmark: &'static [u8],
    /// Its first octet comes only once in it.
    end: &'static [u8],
}

const IN_JSON: Marks = Marks {
    bookmark: b"{\"type\":\"BOOKMARK\",",
    end: b"k8s.io/initial-events-end\":\"true\"",
};

/// Field 1 of the event, and an entry of a map: its key ends, and field 2 is the value.
const IN_PROTOBUF: Marks = Marks {
    bookmark: b"\x0a\x08BOOKMARK",
    end: b"k8s.io/initial-events-end\x12\x04true",
};

/// Where the search for the end of what exists stands in the event that comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Search {
    /// So many of its octets are a bookmark's so far.
    Head(u8),
    /// It is one, and so many octets of the mark were just seen.
    Bookmark(u8),
    /// It is none.
    Other,
}

/// One watch.
#[derive(Clone, Copy, Debug)]
pub struct Events {
    coding: Coding,
    beginning: Beginning,
    search: Search,
}

impl Events {
    /// Of a watch that begins like that, and is not answered yet.
    pub fn new(beginning: Beginning) -> Self {
        Self {
            coding: Coding::Unanswered,
            beginning,
            search: Search::Head(0),
        }
    }

    /// A header block of the answer has come.
    pub fn answered(&mut self, list: &FieldList) {
        if self.coding == Coding::Unanswered {
            self.coding = Coding::of(list);
        }
    }

    /// Its octets cannot be followed.
    pub fn lose(&mut self) {
        self.coding = Coding::Opaque;
    }

    /// Takes a piece of the answer's body.
    pub fn take(&mut self, mut bytes: &[u8]) {
        match &mut self.coding {
            Coding::Unanswered | Coding::Opaque => {}
            Coding::Lines { ended } => {
                if let Some(last) = bytes.last() {
                    *ended = *last == b'\n';
                }
                for line in bytes.split_inclusive(|octet| *octet == b'\n') {
                    self.search(&IN_JSON, line);
                    if line.ends_with(b"\n") {
                        self.search = Search::Head(0);
                    }
                }
            }
            Coding::Delimited { .. } => {
                while let Some(part) = self.delimited(bytes) {
                    bytes = &bytes[part..];
                }
            }
        }
    }

    /// Takes as many of these octets as are of one event or of one length.
    fn delimited(&mut self, bytes: &[u8]) -> Option<usize> {
        let Coding::Delimited { head, have, left } = &mut self.coding else {
            return None;
        };
        let first = *bytes.first()?;
        if *left > 0 {
            let part = bytes.len().min(*left as usize);
            *left -= part as u32;
            self.search(&IN_PROTOBUF, &bytes[..part]);
            return Some(part);
        }
        head[usize::from(*have)] = first;
        *have += 1;
        if *have == 4 {
            *left = u32::from_be_bytes(*head);
            *have = 0;
            self.search = Search::Head(0);
        }
        Some(1)
    }

    /// Looks for the end of what exists in a piece of an event.
    fn search(&mut self, marks: &Marks, piece: &[u8]) {
        if self.beginning == Beginning::Changes {
            return;
        }
        for octet in piece {
            self.search = match self.search {
                Search::Head(_) if self.beginning == Beginning::Told => return self.tells_changes(),
                Search::Head(seen) if *octet != marks.bookmark[usize::from(seen)] => Search::Other,
                Search::Head(seen) if usize::from(seen) + 1 < marks.bookmark.len() => Search::Head(seen + 1),
                Search::Head(_) if self.beginning == Beginning::State => return self.tells_changes(),
                Search::Head(_) => Search::Bookmark(0),
                Search::Bookmark(seen) => {
                    let seen = if *octet == marks.end[usize::from(seen)] {
                        seen + 1
                    } else {
                        u8::from(*octet == marks.end[0])
                    };
                    if usize::from(seen) == marks.end.len() {
                        self.beginning = Beginning::Told;
                        Search::Other
                    } else {
                        Search::Bookmark(seen)
                    }
                }
                Search::Other => return,
            };
        }
    }

    /// What existed has been told: from the end of this event on its client may resume.
    fn tells_changes(&mut self) {
        self.beginning = Beginning::Changes;
    }

    /// Whether this is a place between two events.
    pub fn is_between(&self) -> bool {
        match self.coding {
            Coding::Lines { ended } => ended,
            Coding::Delimited { have, left, .. } => have == 0 && left == 0,
            Coding::Unanswered | Coding::Opaque => false,
        }
    }

    /// Whether it may be ended between two events.
    pub fn can_end(&self) -> bool {
        let is_known = matches!(self.coding, Coding::Lines { .. } | Coding::Delimited { .. });
        is_known && self.beginning == Beginning::Changes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::h2::hpack::{Decoder, write_literal};

    /// What a bookmark that ends the initial events says, in JSON and in protobuf.
    const END: [&[u8]; 2] = [
        br#"{"annotations":{"k8s.io/initial-events-end":"true"}}"#,
        b"\x62\x23\x0a\x19k8s.io/initial-events-end\x12\x04true",
    ];

    fn answered(beginning: Beginning, protobuf: bool) -> Events {
        let kind: &[u8] = if protobuf {
            b"application/vnd.kubernetes.protobuf;stream=watch"
        } else {
            b"application/json"
        };
        let mut block = Vec::new();
        write_literal(b":status", b"200", &mut block);
        write_literal(b"content-type", kind, &mut block);
        let mut events = Events::new(beginning);
        events.answered(&Decoder::default().decode(&block, 1 << 16).expect("a list"));
        events
    }

    /// An event as kube-apiserver writes it, the object's text included.
    fn event(kind: &str, object: &[u8], protobuf: bool) -> Vec<u8> {
        if !protobuf {
            let head = format!("{{\"type\":\"{kind}\",\"object\":");
            return [head.as_bytes(), object, b"}\n"].concat();
        }
        let length = |octets: &[u8]| u8::try_from(octets.len()).expect("a short text");
        let kind = kind.as_bytes();
        let body = [&[0x0a, length(kind)], kind, &[0x12, length(object)], object].concat();
        [&u32::from(length(&body)).to_be_bytes()[..], &body].concat()
    }

    #[test]
    fn what_exists_ends_with_a_bookmark_and_in_no_objects_text() {
        for (index, protobuf) in [false, true].into_iter().enumerate() {
            let forged = [END[index], &event("BOOKMARK", END[index], protobuf)].concat();
            let plain = event("BOOKMARK", b"{}", protobuf);
            let marked = event("BOOKMARK", END[index], protobuf);
            let added = |text: &[u8]| {
                // A line holds no newline, since JSON escapes it.
                let text: Vec<u8> = text.iter().copied().filter(|octet| *octet != b'\n').collect();
                event("ADDED", if protobuf { &forged } else { &text }, protobuf)
            };
            for (beginning, octets, expected) in [
                (Beginning::Changes, Vec::new(), true),
                (Beginning::State, Vec::new(), false),
                (Beginning::State, added(&forged), false),
                (Beginning::State, event("MODIFIED", END[index], protobuf), false),
                (Beginning::State, plain.clone(), true),
                (Beginning::State, marked.clone(), true),
                (Beginning::MarkedState, Vec::new(), false),
                (Beginning::MarkedState, added(&forged), false),
                (Beginning::MarkedState, plain.clone(), false),
                (Beginning::MarkedState, [plain, added(&forged)].concat(), false),
                (Beginning::MarkedState, marked.clone(), false),
                (
                    Beginning::MarkedState,
                    [&marked[..], &event("MODIFIED", b"{}", protobuf)].concat(),
                    true,
                ),
                (
                    Beginning::MarkedState,
                    [&marked[..], &event("BOOKMARK", b"{}", protobuf)].concat(),
                    true,
                ),
            ] {
                let mut events = answered(beginning, protobuf);
                events.take(&octets);
                assert!(events.is_between());
                assert_eq!(events.can_end(), expected, "{beginning:?} {}", octets.escape_ascii());
            }
        }
    }

    proptest! {
        /// A client that was cut off at any place where its watch may end, and resumes at the highest version it has seen,
        /// has heard of everything that existed.
        #[test]
        fn whoever_resumes_has_heard_of_everything(
            versions in prop::collection::vec(1_u32..1000, 0..12),
            changes in 0_usize..4,
            bookmarks in any::<bool>(),
            marked in any::<bool>(),
            cut in 1_usize..60,
            protobuf in any::<bool>(),
        ) {
            let beginning = if marked { Beginning::MarkedState } else { Beginning::State };
            let mut wire = Vec::new();
            let mut told = Vec::new();
            for version in &versions {
                wire.extend(event("ADDED", END[usize::from(protobuf)], protobuf));
                told.push((wire.len(), *version));
            }
            if bookmarks {
                wire.extend(event("BOOKMARK", END[usize::from(protobuf)], protobuf));
            }
            for change in 0..changes {
                wire.extend(event("MODIFIED", b"{}", protobuf));
                told.push((wire.len(), 1000 + change as u32));
            }
            let mut events = answered(beginning, protobuf);
            let mut passed = 0;
            for piece in wire.chunks(cut) {
                events.take(piece);
                passed += piece.len();
                if !events.can_end() || !events.is_between() {
                    continue;
                }
                let seen = told.iter().filter(|(end, _)| *end <= passed).map(|(_, version)| *version).max();
                for (end, version) in &told {
                    prop_assert!(*end <= passed || Some(*version) > seen, "{version} is never heard of");
                }
            }
            // A bookmark makes it free, behind its own mark an event, and nothing else.
            prop_assert_eq!(events.can_end(), bookmarks && (!marked || changes > 0));
        }
    }
}
