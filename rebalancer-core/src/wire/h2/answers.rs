//! What the server's answers say in their headers, which pass as they came.
//!
//! Job: follow the server's compression state from the connection's first block on.
//! Input: the server's frame headers, and the payloads of its header frames. Output: each block's fields.
//! Must never guess: once a block cannot be followed, nothing more is said of this connection.

use super::{
    frame::{FrameHeader, flag, kind},
    hpack::{Decoder, FieldList},
};

/// How large a header block of the server may be to be followed.
const MAX_BLOCK: usize = 65_536;

/// The largest dynamic table that is followed, whatever the client offers.
const MAX_TABLE: usize = 65_536;

/// A header block of the server, or that there is one which cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// An answer's fields, or its trailers.
    Fields {
        /// The request's stream.
        stream: u32,
        /// What it says.
        list: FieldList,
    },
    /// From here on no block of this connection can be read. Said once.
    Lost,
}

/// A header block that is still coming.
#[derive(Debug)]
struct Block {
    stream: u32,
    flags: u8,
    /// Octets of its last frame that are still to come.
    left: usize,
    /// How many octets its first frame has: padding and priority are in that one.
    first: usize,
    /// What has come, unless it came whole.
    octets: Vec<u8>,
}

/// Follows the answers of one connection.
#[derive(Debug)]
pub struct Answers {
    decoder: Decoder,
    lost: bool,
    block: Option<Block>,
}

impl Default for Answers {
    fn default() -> Self {
        let mut decoder = Decoder::default();
        decoder.allow(MAX_TABLE);
        Self {
            decoder,
            lost: false,
            block: None,
        }
    }
}

impl Answers {
    /// A frame of the server begins.
    pub fn begin(&mut self, header: FrameHeader) -> Option<Answer> {
        if self.lost {
            return None;
        }
        let length = header.length as usize;
        match (header.kind, &mut self.block) {
            (kind::HEADERS, None) => {
                self.block = Some(Block {
                    stream: header.stream,
                    flags: header.flags,
                    left: length,
                    first: length,
                    octets: Vec::new(),
                });
            }
            (kind::CONTINUATION, Some(block)) if block.stream == header.stream => {
                block.flags |= header.flags & flag::END_HEADERS;
                block.left = length;
            }
            // A promise's block is for a stream the client did not ask for: client-go never allows one. The others are
            // against RFC 9113, section 6.10.
            (kind::PUSH_PROMISE | kind::CONTINUATION, _) | (_, Some(_)) => return Some(self.lose()),
            _ => return None,
        }
        let block = self.block.as_ref()?;
        if block.octets.len() + block.left > MAX_BLOCK {
            return Some(self.lose());
        }
        self.take(&[])
    }

    /// A piece of the payload of the frame that began last; nothing happens unless that was a header frame.
    pub fn take(&mut self, bytes: &[u8]) -> Option<Answer> {
        let block = self.block.as_mut()?;
        block.left -= bytes.len().min(block.left);
        let complete = block.left == 0 && block.flags & flag::END_HEADERS != 0;
        // Nearly every block comes whole, and is read where it lies.
        let whole = complete && block.octets.is_empty();
        if !whole {
            block.octets.extend_from_slice(bytes);
        }
        if !complete {
            return None;
        }
        let block = self.block.take()?;
        let list = if whole {
            self.decode(&block, bytes)
        } else {
            self.decode(&block, &block.octets)
        };
        Some(match list {
            Some(list) => Answer::Fields {
                stream: block.stream,
                list,
            },
            None => self.lose(),
        })
    }

    fn decode(&mut self, block: &Block, octets: &[u8]) -> Option<FieldList> {
        let (mut first, rest) = octets.split_at_checked(block.first)?;
        if block.flags & flag::PADDED != 0 {
            let (padding, after) = first.split_first()?;
            first = after.get(..after.len().checked_sub(usize::from(*padding))?)?;
        }
        if block.flags & flag::PRIORITY != 0 {
            first = first.get(5..)?;
        }
        let list = if rest.is_empty() {
            self.decoder.decode(first, MAX_BLOCK)
        } else {
            self.decoder.decode(&[first, rest].concat(), MAX_BLOCK)
        };
        list.ok().filter(|list| !list.is_cut())
    }

    fn lose(&mut self) -> Answer {
        // What was held for it is of no use any more.
        *self = Self {
            lost: true,
            ..Self::default()
        };
        Answer::Lost
    }
}

/// Whether an answer refuses a request for overload: 429 or 503, and when to come again
/// (k8s.io/apiserver/pkg/server/filters/maxinflight.go and priority-and-fairness.go; RFC 9110, section 10.2.3).
///
/// A 429 that is no overload is an object of kind Status, in a type of the API, while filters write plain text: an eviction that
/// a disruption budget forbids (k8s.io/kubernetes/pkg/registry/core/pod/storage/eviction.go), or a request for a resource whose
/// watch cache is not filled yet, which after a restart are many (k8s.io/apiserver/pkg/storage/cacher, "storage is
/// (re)initializing"). What an aggregated API server refuses is not told apart.
pub fn is_refusal(status: &[u8], says_when: bool, kind: Option<&[u8]>) -> bool {
    let is_of_the_api = || kind.is_some_and(|kind| kind.to_ascii_lowercase().starts_with(b"application/"));
    says_when && (status == b"503" || status == b"429" && !is_of_the_api())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::h2::hpack::write_literal;

    fn block(fields: &[(&str, &str)]) -> Vec<u8> {
        let mut block = Vec::new();
        for (name, value) in fields {
            write_literal(name.as_bytes(), value.as_bytes(), &mut block);
        }
        block
    }

    fn list(fields: &[(&str, &str)]) -> FieldList {
        fields
            .iter()
            .map(|(name, value)| (name.as_bytes(), value.as_bytes()))
            .collect()
    }

    fn begin(answers: &mut Answers, kind: u8, flags: u8, payload: &[u8]) -> Option<Answer> {
        answers.begin(FrameHeader {
            length: payload.len() as u32,
            kind,
            flags,
            stream: 1,
        })
    }

    fn feed(answers: &mut Answers, kind: u8, flags: u8, payload: &[u8]) -> Option<Answer> {
        begin(answers, kind, flags, payload).or_else(|| answers.take(payload))
    }

    #[test]
    fn padding_and_priority_are_not_read_as_fields() {
        let fields = [(":status", "429"), ("retry-after", "1")];
        let payload = [&[3, 0, 0, 0, 0, 16][..], &block(&fields), &[0; 3]].concat();
        let flags = flag::END_HEADERS | flag::PADDED | flag::PRIORITY;
        assert_eq!(
            feed(&mut Answers::default(), kind::HEADERS, flags, &payload),
            Some(Answer::Fields {
                stream: 1,
                list: list(&fields)
            })
        );
    }

    #[test]
    fn a_block_of_empty_frames_is_complete_with_its_last() {
        let mut answers = Answers::default();
        let fields = [(":status", "200")];
        assert_eq!(feed(&mut answers, kind::HEADERS, 0, &block(&fields)), None);
        assert_eq!(
            begin(&mut answers, kind::CONTINUATION, flag::END_HEADERS, &[]),
            Some(Answer::Fields {
                stream: 1,
                list: list(&fields)
            })
        );
    }

    #[test]
    fn what_cannot_be_followed_is_said_once_and_nothing_after_it() {
        for (kind, payload) in [
            (kind::PUSH_PROMISE, &b"\0\0\0\x02"[..]),
            (kind::HEADERS, &[0x80]),
            (kind::HEADERS, &[0; MAX_BLOCK + 1]),
            (kind::CONTINUATION, &[0x88]),
        ] {
            let mut answers = Answers::default();
            assert_eq!(feed(&mut answers, kind, flag::END_HEADERS, payload), Some(Answer::Lost));
            let good = block(&[(":status", "200")]);
            assert_eq!(feed(&mut answers, kind::HEADERS, flag::END_HEADERS, &good), None);
        }
    }

    #[test]
    fn a_frame_inside_a_block_is_the_end_of_following_it() {
        for (kind, flags, stream) in [(kind::DATA, 0, 1), (kind::HEADERS, 0, 1), (kind::CONTINUATION, 0, 3)] {
            let mut answers = Answers::default();
            assert_eq!(feed(&mut answers, kind::HEADERS, 0, &[0x88]), None);
            let header = FrameHeader {
                length: 1,
                kind,
                flags,
                stream,
            };
            assert_eq!(answers.begin(header), Some(Answer::Lost));
        }
    }

    proptest! {
        #[test]
        fn however_it_is_cut_a_block_says_the_same(
            value in ".{0,200}",
            frame in 1_usize..40,
            piece in 1_usize..40,
        ) {
            let fields = [(":status", "200"), ("audit-id", value.as_str())];
            let block = block(&fields);
            let mut answers = Answers::default();
            let mut found = Vec::new();
            let count = block.chunks(frame).count();
            for (at, payload) in block.chunks(frame).enumerate() {
                let kind = if at == 0 { kind::HEADERS } else { kind::CONTINUATION };
                let flags = if at + 1 == count { flag::END_HEADERS } else { 0 };
                found.extend(begin(&mut answers, kind, flags, payload));
                for bytes in payload.chunks(piece) {
                    found.extend(answers.take(bytes));
                }
            }
            prop_assert_eq!(found, [Answer::Fields { stream: 1, list: list(&fields) }]);
        }
    }
}
