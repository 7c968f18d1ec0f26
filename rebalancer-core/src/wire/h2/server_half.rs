//! The server's half of a connection: its frames pass, and a few are read.
//!
//! Job: know where a frame of the relay's own has a place, follow answers and watches, and read SETTINGS and GOAWAY.
//! Must never put a frame of the relay's inside one of the server's or inside a header block of its, nor before its
//! SETTINGS (RFC 9113, sections 3.4 and 6.10).

use super::{
    answers::{Answer, Answers, is_refusal},
    error::ConnectionError,
    frame::{FrameHeader, flag, kind},
    hpack::DEFAULT_TABLE_SIZE,
    scan::Scanner,
    watches::Watches,
};
use crate::wire::flow::{self, Flow};

/// The largest SETTINGS or GOAWAY payload of the server that is read; larger ones pass unread.
pub const MAX_CONTROL_PAYLOAD: u32 = 16_384;

/// How many octets of the relay's own frames may wait for a place between the server's.
const MAX_WAITING: usize = 65_536;

/// The largest dynamic table a client is offered, whatever the server offers: each costs two tables here.
const MAX_TABLE_SIZE: usize = DEFAULT_TABLE_SIZE;

/// SETTINGS_HEADER_TABLE_SIZE (RFC 9113, section 6.5.2).
const HEADER_TABLE_SIZE: u16 = 0x1;

/// SETTINGS_MAX_HEADER_LIST_SIZE (RFC 9113, section 6.5.2).
const MAX_HEADER_LIST_SIZE: u16 = 0x6;

/// Where the server is between its frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Its SETTINGS have not passed.
    Beginning,
    Between,
    InBlock,
}

/// What the server allows a client's header blocks.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    /// Octets of the dynamic table.
    pub table: usize,
    /// Octets of a header list, 32 for each field included, where it says.
    pub list: Option<usize>,
}

/// What the server has sent so far, as the next octets need it.
#[derive(Debug)]
pub struct ServerHalf {
    /// Its place in its frames.
    pub scanner: Scanner,
    place: Place,
    answers: Answers,
    /// What it allows.
    pub allowed: Allowed,
    /// The watches that may be handed over, where that may be.
    pub watches: Option<Watches>,
    /// Header frames of a watch that was ended, until it is known whether they can be left out.
    withheld: Option<Vec<u8>>,
    /// Frames of the relay's own for the client, waiting for a place between two of the server's.
    own: Vec<u8>,
    /// Requests that were refused for overload.
    refused: u64,
}

/// What an answer's head says of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answered {
    /// The request's stream.
    pub stream: u32,
    /// Its flow, where the server names it.
    pub flow: Option<Flow>,
    /// It was refused for overload.
    pub refused: bool,
}

impl ServerHalf {
    /// One whose first octet is to come.
    pub fn new(watch_handover: bool) -> Self {
        Self {
            scanner: Scanner::default(),
            place: Place::Beginning,
            answers: Answers::default(),
            allowed: Allowed {
                table: DEFAULT_TABLE_SIZE,
                list: None,
            },
            watches: watch_handover.then(Watches::default),
            withheld: None,
            own: Vec::new(),
            refused: 0,
        }
    }

    /// Whether the server's last frame is complete, and no header block is open.
    pub fn is_between_frames(&self) -> bool {
        self.place != Place::InBlock && self.scanner.at_boundary()
    }

    /// Where frames of the relay's own for the client are put: [`Self::flush`] sends them.
    pub fn own(&mut self) -> &mut Vec<u8> {
        &mut self.own
    }

    /// Whether frames of the relay's own wait.
    pub fn has_own(&self) -> bool {
        !self.own.is_empty()
    }

    /// A client that goes on asking for answers of the relay's while the server stands inside a frame does not make them
    /// grow.
    ///
    /// # Errors
    ///
    /// Too many wait.
    pub fn bound_own(&self) -> Result<(), ConnectionError> {
        if self.own.len() > MAX_WAITING {
            return Err(ConnectionError::calm("too many refused streams wait for their answer"));
        }
        Ok(())
    }

    /// Sends the relay's own frames, where there is a place.
    pub fn flush(&mut self, to_client: &mut Vec<u8>) {
        if !self.own.is_empty() && self.place == Place::Between && self.scanner.at_boundary() {
            to_client.append(&mut self.own);
            // An idle connection keeps no buffers.
            self.own = Vec::new();
        }
    }

    /// A frame begins: its header blocks are followed. The answer whose head is whole with that.
    pub fn begin(&mut self, header: FrameHeader) -> Option<Answered> {
        let answer = self.answers.begin(header);
        self.begin_block(header);
        self.answered(answer)
    }

    fn begin_block(&mut self, header: FrameHeader) {
        if matches!(header.kind, kind::HEADERS | kind::PUSH_PROMISE | kind::CONTINUATION) {
            self.place = if header.has(flag::END_HEADERS) {
                Place::Between
            } else {
                Place::InBlock
            };
        }
    }

    /// A piece of the payload of the frame that began last. The answer whose head is whole with that.
    pub fn take(&mut self, bytes: &[u8]) -> Option<Answered> {
        let answer = self.answers.take(bytes);
        let answered = self.answered(answer);
        if let Some(watches) = &mut self.watches {
            watches.take(bytes);
        }
        answered
    }

    /// Whether that header frame is of a watch the client has seen the end of, and so is collected.
    pub fn is_withheld(&self, header: FrameHeader) -> bool {
        match header.kind {
            kind::HEADERS => self
                .watches
                .as_ref()
                .is_some_and(|watches| watches.has_ended(header.stream)),
            kind::CONTINUATION => self.withheld.is_some(),
            _ => false,
        }
    }

    /// A block of such frames goes on in one that is not collected: all of it passes.
    pub fn release(&mut self, to_client: &mut Vec<u8>) {
        if let Some(frames) = self.withheld.take() {
            to_client.extend_from_slice(&frames);
        }
    }

    /// Such a frame is whole. A block that leaves no trace in the client's table is left out; another has to pass.
    pub fn withhold(&mut self, header: FrameHeader, payload: &[u8], to_client: &mut Vec<u8>) {
        let withheld = self.withheld.get_or_insert_default();
        header.write(withheld);
        withheld.extend_from_slice(payload);
        let begun = self.answers.begin(header);
        let answer = begun.or_else(|| self.answers.take(payload));
        self.begin_block(header);
        if header.has(flag::END_HEADERS) {
            let frames = self.withheld.take().unwrap_or_default();
            let leaves_no_trace = matches!(&answer, Some(Answer::Fields { list, .. }) if list.leaves_no_trace());
            if !leaves_no_trace {
                to_client.extend_from_slice(&frames);
            }
        }
        if matches!(answer, Some(Answer::Lost)) {
            self.answered(answer);
        }
    }

    /// Reads SETTINGS, and offers the client no more than the relay can keep to.
    pub fn settings(&mut self, payload: &mut [u8], max_header_bytes: usize) {
        if self.place == Place::Beginning {
            self.place = Place::Between;
        }
        for setting in payload.chunks_exact_mut(6) {
            let Some((id, value)) = setting.split_first_chunk_mut::<2>() else {
                continue;
            };
            let Some(value) = value.first_chunk_mut::<4>() else {
                continue;
            };
            let said = u32::from_be_bytes(*value) as usize;
            let offered = match u16::from_be_bytes(*id) {
                HEADER_TABLE_SIZE => {
                    self.allowed.table = said.min(MAX_TABLE_SIZE);
                    self.allowed.table
                }
                MAX_HEADER_LIST_SIZE => {
                    self.allowed.list = Some(said);
                    said.min(max_header_bytes)
                }
                _ => continue,
            };
            *value = u32::try_from(offered).unwrap_or(u32::MAX).to_be_bytes();
        }
    }

    /// Requests that the server refused for overload since this was asked last.
    pub fn take_refused(&mut self) -> u64 {
        std::mem::take(&mut self.refused)
    }

    fn answered(&mut self, answer: Option<Answer>) -> Option<Answered> {
        match answer {
            None => None,
            Some(Answer::Fields { stream, list }) => {
                let status = list.get(b":status").unwrap_or_default();
                let says_when = list.get(b"retry-after").is_some();
                let refused = is_refusal(status, says_when, list.get(b"content-type"));
                self.refused += u64::from(refused);
                if let Some(watches) = &mut self.watches {
                    watches.answered(stream, &list);
                }
                // Trailers have no status, and after an interim answer another one comes.
                let is_answer = !matches!(status, [] | [b'1', ..]);
                let field = |name: &str| list.get(name.as_bytes());
                is_answer.then(|| Answered {
                    stream,
                    flow: Flow::of(field(flow::SCHEMA), field(flow::LEVEL)),
                    refused,
                })
            }
            Some(Answer::Lost) => {
                if let Some(watches) = &mut self.watches {
                    watches.lose();
                }
                None
            }
        }
    }
}
