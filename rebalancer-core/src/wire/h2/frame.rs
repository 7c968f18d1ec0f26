//! The frame header, and the few frames the relay writes itself (RFC 9113, sections 4.1 and 6).
//!
//! Input and output: bytes. Must never allocate by a length that was read.

use super::error::ErrorCode;

/// What every client sends first (RFC 9113, section 3.4).
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The size of a frame header.
pub const HEADER_LEN: usize = 9;

/// The largest payload that every peer accepts (RFC 9113, section 6.5.2, SETTINGS_MAX_FRAME_SIZE).
pub const MAX_FRAME_SIZE: usize = 16_384;

/// The highest stream id, which a graceful GOAWAY names first.
pub const MAX_STREAM_ID: u32 = 0x7fff_ffff;

/// The frame types of RFC 9113 that the relay tells apart; any other passes.
pub mod kind {
    #![expect(missing_docs, reason = "the names are those of RFC 9113, section 6")]
    pub const DATA: u8 = 0x0;
    pub const HEADERS: u8 = 0x1;
    pub const PRIORITY: u8 = 0x2;
    pub const RST_STREAM: u8 = 0x3;
    pub const SETTINGS: u8 = 0x4;
    pub const PUSH_PROMISE: u8 = 0x5;
    pub const PING: u8 = 0x6;
    pub const GOAWAY: u8 = 0x7;
    pub const WINDOW_UPDATE: u8 = 0x8;
    pub const CONTINUATION: u8 = 0x9;
}

/// The flags of RFC 9113 that the relay reads.
pub mod flag {
    #![expect(missing_docs, reason = "the names are those of RFC 9113, section 6")]
    pub const ACK: u8 = 0x1;
    pub const END_STREAM: u8 = 0x1;
    pub const END_HEADERS: u8 = 0x4;
    pub const PADDED: u8 = 0x8;
    pub const PRIORITY: u8 = 0x20;
}

/// A frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Length of the payload: 24 bits on the wire.
    pub length: u32,
    /// One of [`kind`].
    pub kind: u8,
    /// Some of [`flag`].
    pub flags: u8,
    /// The stream, without the reserved bit.
    pub stream: u32,
}

impl FrameHeader {
    /// Reads the nine bytes.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = *bytes;
        Self {
            length: u32::from_be_bytes([0, l0, l1, l2]),
            kind,
            flags,
            stream: u32::from_be_bytes([s0, s1, s2, s3]) & MAX_STREAM_ID,
        }
    }

    /// The nine bytes.
    pub fn octets(self) -> [u8; HEADER_LEN] {
        let [_, l0, l1, l2] = self.length.to_be_bytes();
        let [s0, s1, s2, s3] = (self.stream & MAX_STREAM_ID).to_be_bytes();
        [l0, l1, l2, self.kind, self.flags, s0, s1, s2, s3]
    }

    /// Appends the nine bytes.
    pub fn write(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.octets());
    }

    /// Whether a flag is set.
    pub fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// Appends a GOAWAY frame (RFC 9113, section 6.8).
pub fn write_goaway(last_stream: u32, code: ErrorCode, out: &mut Vec<u8>) {
    write_header(kind::GOAWAY, 0, 8, out);
    out.extend_from_slice(&last_stream.to_be_bytes());
    out.extend_from_slice(&(code as u32).to_be_bytes());
}

/// Appends a PING frame (RFC 9113, section 6.7).
pub fn write_ping(payload: [u8; 8], out: &mut Vec<u8>) {
    write_header(kind::PING, 0, 8, out);
    out.extend_from_slice(&payload);
}

/// Appends a RST_STREAM frame (RFC 9113, section 6.4).
pub fn write_reset(stream: u32, code: ErrorCode, out: &mut Vec<u8>) {
    write_header(kind::RST_STREAM, stream, 4, out);
    out.extend_from_slice(&(code as u32).to_be_bytes());
}

/// Appends a WINDOW_UPDATE frame for the connection (RFC 9113, section 6.9).
pub fn write_connection_window(increment: u32, out: &mut Vec<u8>) {
    write_window(0, increment, out);
}

/// Appends a WINDOW_UPDATE frame for a stream, or for the connection where that is 0 (RFC 9113, section 6.9).
pub fn write_window(stream: u32, increment: u32, out: &mut Vec<u8>) {
    write_header(kind::WINDOW_UPDATE, stream, 4, out);
    out.extend_from_slice(&increment.to_be_bytes());
}

/// Appends an empty DATA frame (RFC 9113, section 6.1).
pub fn write_empty(stream: u32, out: &mut Vec<u8>) {
    write_data(0, stream, out);
}

/// Appends an empty DATA frame that ends a stream (RFC 9113, section 6.1).
pub fn write_end(stream: u32, out: &mut Vec<u8>) {
    write_data(flag::END_STREAM, stream, out);
}

fn write_data(flags: u8, stream: u32, out: &mut Vec<u8>) {
    FrameHeader {
        length: 0,
        kind: kind::DATA,
        flags,
        stream,
    }
    .write(out);
}

/// A header block that is written where it is to be sent, and becomes HEADERS and as many CONTINUATION frames as it needs
/// (RFC 9113, section 6.10).
#[derive(Debug)]
pub struct Headers {
    begin: usize,
    lead: usize,
    header: FrameHeader,
}

impl Headers {
    /// Leaves room for the frame's header, and appends the five octets of the PRIORITY flag's fields, where the client
    /// sent them. The block is appended next.
    pub fn begin(stream: u32, end_stream: bool, priority: Option<[u8; 5]>, out: &mut Vec<u8>) -> Self {
        let begin = out.len();
        let mut flags = if end_stream { flag::END_STREAM } else { 0 };
        let header = |flags| FrameHeader {
            length: 0,
            kind: kind::HEADERS,
            flags,
            stream,
        };
        header(0).write(out);
        if let Some(fields) = priority {
            flags |= flag::PRIORITY;
            out.extend_from_slice(&fields);
        }
        Self {
            begin,
            lead: out.len() - begin - HEADER_LEN,
            header: header(flags),
        }
    }

    /// Ends the block; how many octets it has.
    pub fn finish(mut self, out: &mut Vec<u8>) -> usize {
        let at = self.begin + HEADER_LEN;
        let length = out.len() - at - self.lead;
        let room = MAX_FRAME_SIZE - self.lead;
        let rest = (length > room).then(|| out.split_off(at + self.lead + room));
        self.header.length = (out.len() - at) as u32;
        if rest.is_none() {
            self.header.flags |= flag::END_HEADERS;
        }
        out[self.begin..at].copy_from_slice(&self.header.octets());
        let rest = rest.unwrap_or_default();
        let mut parts = rest.chunks(MAX_FRAME_SIZE).peekable();
        while let Some(part) = parts.next() {
            FrameHeader {
                length: part.len() as u32,
                kind: kind::CONTINUATION,
                flags: if parts.peek().is_none() { flag::END_HEADERS } else { 0 },
                stream: self.header.stream,
            }
            .write(out);
            out.extend_from_slice(part);
        }
        length
    }
}

fn write_header(kind: u8, stream: u32, length: u32, out: &mut Vec<u8>) {
    FrameHeader {
        length,
        kind,
        flags: 0,
        stream,
    }
    .write(out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_block_is_split_at_the_size_every_peer_accepts() {
        let block = vec![7; MAX_FRAME_SIZE * 2];
        let mut out = Vec::new();
        let headers = Headers::begin(3, true, Some([1, 2, 3, 4, 5]), &mut out);
        out.extend_from_slice(&block);
        assert_eq!(headers.finish(&mut out), block.len());
        let mut rest = &out[..];
        let mut seen = Vec::new();
        while let Some((head, after)) = rest.split_first_chunk::<HEADER_LEN>() {
            let header = FrameHeader::parse(head);
            assert!(header.length as usize <= MAX_FRAME_SIZE);
            seen.push((header.kind, header.flags, header.length));
            rest = &after[header.length as usize..];
        }
        assert_eq!(
            seen,
            [
                (kind::HEADERS, flag::END_STREAM | flag::PRIORITY, MAX_FRAME_SIZE as u32),
                (kind::CONTINUATION, 0, MAX_FRAME_SIZE as u32),
                (kind::CONTINUATION, flag::END_HEADERS, 5),
            ]
        );
    }
}
