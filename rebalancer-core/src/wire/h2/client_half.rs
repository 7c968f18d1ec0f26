//! The client's half of a connection: its preface, frames and header blocks.
//!
//! Input: octets. Output: steps, whole blocks, and blocks written anew. Must never keep more of a block than it is allowed.

use super::{
    error::ConnectionError,
    frame::{self, FrameHeader, PREFACE, flag},
    hpack::{Decoder, Encoder, FieldList},
    messages::Allowance,
    scan::{Scanner, Step, take},
};

/// A header block of the client's.
#[derive(Debug)]
pub struct Block {
    /// Its stream.
    pub stream: u32,
    /// Whether the client sends no more on it.
    pub end_stream: bool,
    /// The PRIORITY flag's fields.
    pub priority: Option<[u8; 5]>,
    fragment: Vec<u8>,
    /// Octets of its frames so far, frame headers included: an endless row of empty frames ends too.
    spent: usize,
}

impl Block {
    /// Octets of its fragments.
    pub fn length(&self) -> usize {
        self.fragment.len()
    }
}

/// Where the client is in what it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// So many octets of the preface are to come.
    Preface(usize),
    Frames,
}

/// What the client has sent so far, as the next octets need it.
#[derive(Debug)]
pub struct ClientHalf {
    phase: Phase,
    scanner: Scanner,
    decoder: Decoder,
    encoder: Encoder,
    /// The block whose CONTINUATION must come next.
    block: Option<Block>,
    allowance: Allowance,
    max_header_bytes: usize,
}

impl ClientHalf {
    /// One whose first octet is to come.
    pub fn new(max_header_bytes: usize) -> Self {
        Self {
            phase: Phase::Preface(PREFACE.len()),
            scanner: Scanner::default(),
            decoder: Decoder::default(),
            encoder: Encoder::default(),
            block: None,
            allowance: Allowance::default(),
            max_header_bytes,
        }
    }

    /// Takes what belongs to the preface, and passes it on.
    ///
    /// # Errors
    ///
    /// It is another protocol's.
    pub fn preface(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Result<(), ConnectionError> {
        if let Phase::Preface(left) = self.phase {
            let expected = &PREFACE[PREFACE.len() - left..];
            let part = take(input, left);
            if !expected.starts_with(part) {
                return Err(ConnectionError::protocol("the client's preface is not HTTP/2's"));
            }
            out.extend_from_slice(part);
            self.phase = match left - part.len() {
                0 => Phase::Frames,
                left => Phase::Preface(left),
            };
        }
        Ok(())
    }

    /// Takes what it can of the frames.
    pub fn step<'a>(&mut self, input: &mut &'a [u8]) -> Step<'a> {
        self.scanner.step(input)
    }

    /// The payload of the frame that just began is to pass, to be swallowed, or to be given in one piece.
    pub fn scanner(&mut self) -> &mut Scanner {
        &mut self.scanner
    }

    /// Whether a frame of the relay's own has a place here: between two of the client's, and behind its preface.
    pub fn has_place(&self) -> bool {
        self.phase == Phase::Frames && self.scanner.at_boundary()
    }

    /// Whether a header block has begun.
    pub fn is_in_block(&self) -> bool {
        self.block.is_some()
    }

    /// Octets of a header block that is not whole yet.
    pub fn unfinished(&self) -> usize {
        self.block.as_ref().map_or(0, |block| block.fragment.len()) + self.scanner.collected()
    }

    /// A HEADERS frame begins.
    ///
    /// # Errors
    ///
    /// It is inside another block, on a stream that is not a client's, or too large.
    pub fn begin_headers(&mut self, header: FrameHeader) -> Result<(), ConnectionError> {
        if header.stream.is_multiple_of(2) {
            return Err(ConnectionError::protocol(
                "a request on a stream that is not the client's",
            ));
        }
        if frame::HEADER_LEN + header.length as usize > self.max_block() {
            return Err(ConnectionError::calm("a header block is larger than allowed"));
        }
        self.scanner.collect(header);
        Ok(())
    }

    /// A frame begins while a block has; only its continuation may.
    ///
    /// # Errors
    ///
    /// It is another frame, or the block becomes too large.
    pub fn begin_continuation(&mut self, header: FrameHeader) -> Result<(), ConnectionError> {
        let max = self.max_block();
        let Some(block) = &mut self.block else {
            return Err(ConnectionError::protocol("CONTINUATION without HEADERS"));
        };
        block.spent += frame::HEADER_LEN + header.length as usize;
        if block.spent > max {
            return Err(ConnectionError::calm("a header block is larger than allowed"));
        }
        self.scanner.collect(header);
        Ok(())
    }

    /// Whether that frame may come now: inside a block, its continuation alone (RFC 9113, section 6.10).
    ///
    /// # Errors
    ///
    /// It may not.
    pub fn check_order(&self, header: FrameHeader) -> Result<(), ConnectionError> {
        match &self.block {
            Some(block) if header.kind != frame::kind::CONTINUATION || header.stream != block.stream => {
                Err(ConnectionError::protocol("a frame inside a header block"))
            }
            _ => Ok(()),
        }
    }

    /// The payload of a HEADERS or CONTINUATION frame; the block, when it is complete.
    ///
    /// # Errors
    ///
    /// The frame is shorter than its fields.
    pub fn headers(&mut self, header: FrameHeader, payload: Vec<u8>) -> Result<Option<Block>, ConnectionError> {
        let block = match self.block.take() {
            Some(mut block) => {
                block.fragment.extend_from_slice(&payload);
                block
            }
            None => begin_block(header, payload)?,
        };
        if header.has(flag::END_HEADERS) {
            return Ok(Some(block));
        }
        self.block = Some(block);
        Ok(None)
    }

    /// How many octets a block's frames may have: a list that is larger than allowed is answered 431, and must be read for
    /// that; one that is by far ends the connection (golang.org/x/net/http2/frame.go, `readMetaFrame`, has the same two).
    fn max_block(&self) -> usize {
        self.max_header_bytes * 2
    }

    /// Reads a block. Every block of the client's is read, whatever becomes of it: later ones refer to it. A list that is
    /// too large is cut.
    ///
    /// # Errors
    ///
    /// A compression error.
    pub fn decode(&mut self, block: &Block) -> Result<FieldList, ConnectionError> {
        self.decoder.decode(&block.fragment, self.max_header_bytes)
    }

    /// Writes a block anew for a server whose table may hold `allowed` octets, as HEADERS and what CONTINUATION it needs.
    ///
    /// # Errors
    ///
    /// The client's blocks stand for far more than it sends.
    pub fn encode(
        &mut self,
        block: &Block,
        allowed: usize,
        write: impl FnOnce(&mut Encoder, &mut Vec<u8>),
        out: &mut Vec<u8>,
    ) -> Result<(), ConnectionError> {
        self.encoder.resize(allowed.min(self.decoder.capacity()));
        let frames = frame::Headers::begin(block.stream, block.end_stream, block.priority, out);
        write(&mut self.encoder, out);
        let went = frames.finish(out);
        self.allowance.spend(frame::HEADER_LEN + block.fragment.len(), went)
    }
}

/// Reads the fields of a HEADERS frame before its fragment (RFC 9113, section 6.2).
fn begin_block(header: FrameHeader, mut payload: Vec<u8>) -> Result<Block, ConnectionError> {
    const SHORT: ConnectionError = ConnectionError::size("a HEADERS frame is shorter than its fields");
    let spent = frame::HEADER_LEN + payload.len();
    let mut lead = 0;
    if header.has(flag::PADDED) {
        let padding = usize::from(*payload.first().ok_or(SHORT)?);
        lead = 1;
        let length = payload
            .len()
            .checked_sub(lead + padding)
            .ok_or(ConnectionError::protocol(
                "a HEADERS frame has more padding than payload",
            ))?;
        payload.truncate(lead + length);
    }
    let priority = if header.has(flag::PRIORITY) {
        let fields = payload[lead..].first_chunk::<5>().ok_or(SHORT)?;
        lead += fields.len();
        Some(*fields)
    } else {
        None
    };
    payload.drain(..lead);
    Ok(Block {
        stream: header.stream,
        end_stream: header.has(flag::END_STREAM),
        priority,
        fragment: payload,
        spent,
    })
}
