//! Cutting a stream of bytes into frames, without waiting for a whole frame.
//!
//! Input: bytes in pieces of any size. Output: steps. Must never buffer a payload unless told to collect it.

use super::frame::{FrameHeader, HEADER_LEN};

/// What the scanner found next.
pub enum Step<'a> {
    /// Nothing more can be said before more bytes come.
    Starved,
    /// A frame begins: the caller answers with [`Scanner::pass`], [`Scanner::skip`] or [`Scanner::collect`].
    Header(FrameHeader),
    /// A piece of a payload that passes.
    Pass(&'a [u8]),
    /// A whole payload that was to be collected.
    Collected(FrameHeader, Vec<u8>),
}

/// How much room is made for a payload before it has come.
const AT_ONCE: usize = 4096;

#[derive(Debug)]
enum State {
    Head { have: usize },
    Pass { left: usize },
    Skip { left: usize },
    Collect { header: FrameHeader, payload: Vec<u8> },
}

/// One direction's place in its frames.
#[derive(Debug)]
pub struct Scanner {
    state: State,
    head: [u8; HEADER_LEN],
}

impl Default for Scanner {
    fn default() -> Self {
        Self {
            state: State::Head { have: 0 },
            head: [0; HEADER_LEN],
        }
    }
}

impl Scanner {
    /// Whether the last frame is complete and the next has not begun.
    pub fn at_boundary(&self) -> bool {
        matches!(
            self.state,
            State::Head { have: 0 } | State::Pass { left: 0 } | State::Skip { left: 0 }
        )
    }

    /// The payload of the frame that just began is to pass.
    pub fn pass(&mut self, header: FrameHeader) {
        self.state = State::Pass {
            left: header.length as usize,
        };
    }

    /// The payload of the frame that just began is to be swallowed.
    pub fn skip(&mut self, header: FrameHeader) {
        self.state = State::Skip {
            left: header.length as usize,
        };
    }

    /// The payload of the frame that just began is to be given in one piece: the caller has bounded its length. What a
    /// header promises takes no room before it comes, but for a usual frame's.
    pub fn collect(&mut self, header: FrameHeader) {
        self.state = State::Collect {
            header,
            payload: Vec::with_capacity((header.length as usize).min(AT_ONCE)),
        };
    }

    /// How many octets of such a payload have come, while it is not whole.
    pub fn collected(&self) -> usize {
        match &self.state {
            State::Collect { payload, .. } => payload.len(),
            State::Head { .. } | State::Pass { .. } | State::Skip { .. } => 0,
        }
    }

    /// Takes what it can from `input`.
    pub fn step<'a>(&mut self, input: &mut &'a [u8]) -> Step<'a> {
        loop {
            match &mut self.state {
                State::Pass { left: 0 } | State::Skip { left: 0 } => self.state = State::Head { have: 0 },
                State::Collect { header, payload } if payload.len() == header.length as usize => {
                    let step = Step::Collected(*header, std::mem::take(payload));
                    self.state = State::Head { have: 0 };
                    return step;
                }
                _ if input.is_empty() => return Step::Starved,
                State::Head { have } => {
                    let part = take(input, HEADER_LEN - *have);
                    self.head[*have..*have + part.len()].copy_from_slice(part);
                    *have += part.len();
                    if *have == HEADER_LEN {
                        return Step::Header(FrameHeader::parse(&self.head));
                    }
                }
                State::Pass { left } => {
                    let part = take(input, *left);
                    *left -= part.len();
                    return Step::Pass(part);
                }
                State::Skip { left } => *left -= take(input, *left).len(),
                State::Collect { header, payload } => {
                    let wanted = header.length as usize - payload.len();
                    payload.extend_from_slice(take(input, wanted));
                }
            }
        }
    }
}

/// Splits up to `length` bytes off the front.
pub fn take<'a>(input: &mut &'a [u8], length: usize) -> &'a [u8] {
    let (part, rest) = input.split_at(length.min(input.len()));
    *input = rest;
    part
}
