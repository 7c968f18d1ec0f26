//! One client connection relayed to one upstream connection, frame by frame.
//!
//! Job: pass everything, follow streams and header blocks, add the identity headers, and say GOAWAY when told.
//! Input: the bytes of either side as they arrive.
//! Output: the bytes for either side, appended to [`Output`].
//! Must never put a frame of its own inside another frame or a header block, nor raise a last-stream-id it has sent.

use super::{
    answers::{Answer, Answers},
    error::{ConnectionError, ErrorCode},
    frame::{self, FrameHeader, MAX_STREAM_ID, PREFACE, flag, kind},
    handover::Handover,
    hpack::{self, Decoder},
    request,
    scan::{Scanner, Step, take},
    streams::Streams,
};

pub use super::{answers::is_refusal, request::claims_identity};

/// The largest SETTINGS or GOAWAY payload of the server that is read; larger ones pass unread.
const MAX_CONTROL_PAYLOAD: u32 = 16_384;

/// The largest dynamic table that is followed, whatever the server offers.
const MAX_TABLE_SIZE: usize = 65_536;

/// How many octets of the relay's own frames may wait for a place between the server's.
const MAX_WAITING: usize = 65_536;

/// SETTINGS_HEADER_TABLE_SIZE (RFC 9113, section 6.5.2).
const SETTINGS_HEADER_TABLE_SIZE: u16 = 0x1;

/// What a relay is told at its start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The identity fields of every request, as literals (see [`hpack::write_literal`]).
    pub identity: Vec<u8>,
    /// Fields, as literals, of every request that brings no `authorization` of its own.
    pub unless_authorized: Vec<u8>,
    /// The client's address, as `X-Forwarded-For` gives it.
    pub forwarded_for: String,
    /// How many octets a request's header list may have.
    pub max_header_bytes: usize,
    /// The payload of the PING between the two GOAWAYs: not to be guessed by either side.
    pub ping: [u8; 8],
    /// Whether watches may be handed over once the connection is told to go.
    pub watch_handover: bool,
}

/// Where the bytes go.
#[derive(Debug, Default)]
pub struct Output {
    /// To the client.
    pub to_client: Vec<u8>,
    /// To the server.
    pub to_server: Vec<u8>,
}

/// How far the connection is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    /// Nobody has said GOAWAY.
    Active,
    /// The server said GOAWAY by itself.
    ByServer,
    /// GOAWAY(2^31-1) and a PING are sent; streams are still served.
    Announced,
    /// GOAWAY(last) is sent: higher streams are refused.
    Final {
        /// The highest stream that is served.
        last: u32,
    },
}

/// A request's header block that is still coming.
#[derive(Debug)]
struct Block {
    stream: u32,
    end_stream: bool,
    priority: Option<[u8; 5]>,
    fragment: Vec<u8>,
    /// Octets of its frames so far, frame headers included: an endless row of empty frames ends too.
    spent: usize,
}

/// Both directions of one connection.
#[derive(Debug)]
pub struct Relay {
    settings: Settings,
    decoder: Decoder,
    /// The server's table no longer follows the client's blocks: every block goes on as literals.
    transcoding: bool,
    table_emptied: bool,
    preface_left: usize,
    client: Scanner,
    server: Scanner,
    block: Option<Block>,
    server_in_block: bool,
    server_began: bool,
    streams: Streams,
    drain: Drain,
    /// Frames of the relay's own, waiting for a place between two of the server's frames.
    waiting: Vec<u8>,
    /// The same, for a place between two of the client's frames.
    waiting_for_server: Vec<u8>,
    answers: Answers,
    refused: u64,
    handover: Option<Handover>,
    user_agent: Option<Box<[u8]>>,
    user_agent_changed: bool,
}

impl Relay {
    /// A connection whose first bytes are still to come.
    pub fn new(settings: Settings) -> Self {
        let handover = settings.watch_handover.then(Handover::default);
        Self {
            settings,
            decoder: Decoder::default(),
            transcoding: false,
            table_emptied: false,
            preface_left: PREFACE.len(),
            client: Scanner::default(),
            server: Scanner::default(),
            block: None,
            server_in_block: false,
            server_began: false,
            streams: Streams::default(),
            drain: Drain::Active,
            waiting: Vec::new(),
            waiting_for_server: Vec::new(),
            answers: Answers::default(),
            refused: 0,
            handover,
            user_agent: None,
            user_agent_changed: false,
        }
    }

    /// Takes what the client sent.
    ///
    /// # Errors
    ///
    /// The client broke the protocol so that its requests cannot be told apart any more; see [`Self::fail`].
    pub fn client_bytes(&mut self, mut input: &[u8], out: &mut Output) -> Result<(), ConnectionError> {
        if self.preface_left > 0 {
            let expected = &PREFACE[PREFACE.len() - self.preface_left..];
            let part = take(&mut input, self.preface_left);
            if !expected.starts_with(part) {
                return Err(ConnectionError::protocol("the client's preface is not HTTP/2's"));
            }
            self.preface_left -= part.len();
            out.to_server.extend_from_slice(part);
        }
        loop {
            match self.client.step(&mut input) {
                Step::Starved => break,
                Step::Header(header) => self.client_header(header, out)?,
                Step::Pass(bytes) => out.to_server.extend_from_slice(bytes),
                Step::Collected(header, payload) if header.kind == kind::PING => {
                    self.client_pong(header, &payload, out);
                }
                Step::Collected(header, payload) => self.client_headers(header, &payload, out)?,
            }
        }
        self.flush(out);
        Ok(())
    }

    /// Takes what the server sent.
    ///
    /// # Errors
    ///
    /// The server's GOAWAY or SETTINGS is malformed.
    pub fn server_bytes(&mut self, mut input: &[u8], out: &mut Output) -> Result<(), ConnectionError> {
        loop {
            self.flush(out);
            match self.server.step(&mut input) {
                Step::Starved => break,
                Step::Header(header) => self.server_header(header, out),
                Step::Pass(bytes) => {
                    let answer = self.answers.take(bytes);
                    self.answered(answer);
                    if let Some(handover) = &mut self.handover {
                        handover.take(bytes);
                    }
                    out.to_client.extend_from_slice(bytes);
                }
                Step::Collected(header, payload) => self.server_control(header, payload, out)?,
            }
        }
        self.flush(out);
        Ok(())
    }

    /// Says GOAWAY in two phases (RFC 9113, section 6.8); `false` when somebody has already said it.
    pub fn go_away(&mut self, out: &mut Output) -> bool {
        if self.drain != Drain::Active {
            return false;
        }
        self.drain = Drain::Announced;
        frame::write_goaway(MAX_STREAM_ID, ErrorCode::NoError, &mut self.waiting);
        frame::write_ping(self.settings.ping, &mut self.waiting);
        self.flush(out);
        true
    }

    /// Says the second GOAWAY without the client's answer to the PING: it has had long enough. A stream that is still on
    /// its way is refused, and the client may send it again elsewhere.
    pub fn conclude(&mut self, out: &mut Output) {
        if self.drain == Drain::Announced {
            self.say_last();
            self.flush(out);
        }
    }

    /// Ends up to `total` watches of a connection that has said its last GOAWAY, each between two of its events, those
    /// that have been ended already included. Does nothing unless it was told at its start that it may.
    pub fn hand_over(&mut self, total: u32, out: &mut Output) {
        if let (Some(handover), Drain::Final { .. }) = (&mut self.handover, self.drain) {
            handover.allow(total);
            self.flush(out);
        }
    }

    /// Tells the client, where a place is free, why its connection ends.
    pub fn fail(&mut self, error: ConnectionError, out: &mut Output) {
        let last = match self.drain {
            Drain::Final { last } => last,
            _ => self.streams.highest(),
        };
        frame::write_goaway(last, error.code, &mut self.waiting);
        self.flush(out);
    }

    /// How far it is on its way out.
    pub fn drain(&self) -> Drain {
        self.drain
    }

    /// Whether the relay's own GOAWAY is complete, no stream is open and no frame is cut: it may close.
    pub fn is_finished(&self) -> bool {
        matches!(self.drain, Drain::Final { .. })
            && self.streams.count() == 0
            && self.block.is_none()
            && self.waiting.is_empty()
            && self.waiting_for_server.is_empty()
            && !self.server_in_block
            && self.server.at_boundary()
    }

    /// Streams opened so far.
    pub fn requests(&self) -> u64 {
        self.streams.opened()
    }

    /// Streams open now.
    pub fn open_streams(&self) -> u32 {
        self.streams.count()
    }

    /// Watches open now.
    pub fn open_watches(&self) -> u32 {
        self.streams.watches()
    }

    /// Requests that the server refused for overload since this was asked last: 429 or 503, with Retry-After. Answers
    /// that cannot be read are not among them.
    pub fn take_refused(&mut self) -> u64 {
        std::mem::take(&mut self.refused)
    }

    /// The user agent, when a request brought another one than the last.
    pub fn take_user_agent(&mut self) -> Option<String> {
        std::mem::take(&mut self.user_agent_changed)
            .then(|| String::from_utf8_lossy(self.user_agent.as_deref().unwrap_or_default()).into_owned())
    }

    fn is_refused(&self, stream: u32) -> bool {
        matches!(self.drain, Drain::Final { last } if stream > last)
    }

    fn client_header(&mut self, header: FrameHeader, out: &mut Output) -> Result<(), ConnectionError> {
        if let Some(block) = &self.block
            && (header.kind != kind::CONTINUATION || header.stream != block.stream)
        {
            return Err(ConnectionError::protocol("a frame inside a header block"));
        }
        match header.kind {
            kind::HEADERS => {
                if header.stream.is_multiple_of(2) {
                    return Err(ConnectionError::protocol(
                        "a request on a stream that is not the client's",
                    ));
                }
                if header.length as usize > self.settings.max_header_bytes {
                    return Err(ConnectionError::calm("a header block is larger than allowed"));
                }
                self.client.collect(header);
            }
            kind::CONTINUATION => {
                let Some(block) = &mut self.block else {
                    return Err(ConnectionError::protocol("CONTINUATION without HEADERS"));
                };
                block.spent += frame::HEADER_LEN + header.length as usize;
                if block.spent > self.settings.max_header_bytes {
                    return Err(ConnectionError::calm("a header block is larger than allowed"));
                }
                self.client.collect(header);
            }
            kind::PING if header.has(flag::ACK) && header.length == 8 => self.client.collect(header),
            kind::DATA if self.is_refused(header.stream) => {
                // The client has spent its connection window on it, and the server will never give it back.
                if header.length > 0 {
                    frame::write_connection_window(header.length, &mut self.waiting);
                    self.bound_waiting()?;
                }
                self.client.skip(header);
            }
            kind::RST_STREAM | kind::WINDOW_UPDATE | kind::PRIORITY if self.is_refused(header.stream) => {
                self.client.skip(header);
            }
            _ => {
                match header.kind {
                    kind::DATA if header.has(flag::END_STREAM) => self.streams.client_ended(header.stream),
                    kind::RST_STREAM => {
                        self.streams.reset(header.stream);
                        if let Some(handover) = &mut self.handover {
                            handover.close(header.stream);
                        }
                    }
                    _ => {}
                }
                header.write(&mut out.to_server);
                self.client.pass(header);
            }
        }
        Ok(())
    }

    fn client_headers(&mut self, header: FrameHeader, payload: &[u8], out: &mut Output) -> Result<(), ConnectionError> {
        let block = match self.block.take() {
            Some(mut block) => {
                block.fragment.extend_from_slice(payload);
                block
            }
            None => begin_block(header, payload)?,
        };
        if header.has(flag::END_HEADERS) {
            self.request(block, out)
        } else {
            self.block = Some(block);
            Ok(())
        }
    }

    fn request(&mut self, block: Block, out: &mut Output) -> Result<(), ConnectionError> {
        // Decoded in any case: later blocks refer to what this one put into the table.
        let list = self.decoder.decode(&block.fragment, self.settings.max_header_bytes)?;
        if self.is_refused(block.stream) {
            frame::write_reset(block.stream, ErrorCode::RefusedStream, &mut self.waiting);
            return self.bound_waiting();
        }
        let is_request = self.streams.is_new(block.stream);
        if is_request {
            let is_watch = request::is_watch(&list);
            self.streams.open(block.stream, is_watch, block.end_stream)?;
            if let Some(handover) = &mut self.handover
                && is_watch
                && block.end_stream
            {
                handover.open(block.stream, request::wants_initial_events(&list));
            }
            let user_agent = list.get(b"user-agent");
            if self.user_agent.as_deref() != user_agent {
                self.user_agent = user_agent.map(Into::into);
                self.user_agent_changed = true;
            }
        } else if block.end_stream {
            self.streams.client_ended(block.stream);
        }
        self.transcoding |= !request::passes_verbatim(&list);
        let mut went = if self.transcoding {
            let mut literals = Vec::with_capacity(block.fragment.len() * 2);
            if !std::mem::replace(&mut self.table_emptied, true) {
                hpack::write_empty_table(&mut literals);
            }
            if is_request {
                request::write_request(&list, &self.settings.forwarded_for, &mut literals);
            } else {
                request::write_trailers(&list, &mut literals);
            }
            literals
        } else {
            let mut verbatim = block.fragment;
            if is_request {
                request::write_forwarded_for(&self.settings.forwarded_for, &mut verbatim);
            }
            verbatim
        };
        if is_request {
            went.extend_from_slice(&self.settings.identity);
            if list.get(b"authorization").is_none() {
                went.extend_from_slice(&self.settings.unless_authorized);
            }
        }
        frame::write_headers(
            block.stream,
            block.end_stream,
            block.priority,
            &went,
            &mut out.to_server,
        );
        Ok(())
    }

    /// A client that goes on opening refused streams while the server stands inside a frame does not grow the queue.
    fn bound_waiting(&self) -> Result<(), ConnectionError> {
        if self.waiting.len() > MAX_WAITING {
            return Err(ConnectionError::calm("too many refused streams wait for their answer"));
        }
        Ok(())
    }

    fn client_pong(&mut self, header: FrameHeader, payload: &[u8], out: &mut Output) {
        if payload != self.settings.ping {
            header.write(&mut out.to_server);
            out.to_server.extend_from_slice(payload);
            return;
        }
        if self.drain == Drain::Announced {
            // Every stream the client opened before it read the first GOAWAY has arrived by now.
            self.say_last();
        }
    }

    fn say_last(&mut self) {
        let last = self.streams.highest();
        self.drain = Drain::Final { last };
        // The blocks of refused streams never reach the server: its table and the client's part here.
        self.transcoding = true;
        frame::write_goaway(last, ErrorCode::NoError, &mut self.waiting);
    }

    fn answered(&mut self, answer: Option<Answer>) {
        match answer {
            None => {}
            Some(Answer::Fields { stream, list }) => {
                let status = list.get(b":status").unwrap_or_default();
                self.refused += u64::from(is_refusal(status, list.get(b"retry-after").is_some()));
                if let Some(handover) = &mut self.handover {
                    handover.answered(stream, &list);
                }
            }
            Some(Answer::Lost) => {
                if let Some(handover) = &mut self.handover {
                    handover.lose();
                }
            }
        }
    }

    fn server_header(&mut self, header: FrameHeader, out: &mut Output) {
        let answer = self.answers.begin(header);
        self.answered(answer);
        if let Some(handover) = &mut self.handover
            && handover.begin(header)
        {
            if header.kind == kind::DATA && header.length > 0 {
                // The client never sees it, so it never gives its window back.
                frame::write_connection_window(header.length, &mut self.waiting_for_server);
            }
            self.server.skip(header);
            return;
        }
        match header.kind {
            kind::SETTINGS | kind::GOAWAY if header.length <= MAX_CONTROL_PAYLOAD => {
                self.server.collect(header);
                return;
            }
            kind::HEADERS | kind::DATA if header.has(flag::END_STREAM) => self.streams.server_ended(header.stream),
            kind::RST_STREAM => self.streams.reset(header.stream),
            _ => {}
        }
        if matches!(header.kind, kind::HEADERS | kind::PUSH_PROMISE | kind::CONTINUATION) {
            self.server_in_block = !header.has(flag::END_HEADERS);
        }
        header.write(&mut out.to_client);
        self.server.pass(header);
    }

    fn server_control(
        &mut self,
        header: FrameHeader,
        mut payload: Vec<u8>,
        out: &mut Output,
    ) -> Result<(), ConnectionError> {
        if header.kind == kind::SETTINGS {
            self.server_began = true;
            for setting in payload.chunks_exact(6) {
                let (id, value) = setting.split_at(2);
                if id == SETTINGS_HEADER_TABLE_SIZE.to_be_bytes() {
                    let value = value.iter().fold(0_usize, |sum, octet| sum << 8 | usize::from(*octet));
                    self.decoder.allow(value.min(MAX_TABLE_SIZE));
                }
            }
        } else {
            let Some((last, _)) = payload.split_first_chunk_mut::<4>() else {
                return Err(ConnectionError::size("the server's GOAWAY is too short"));
            };
            match self.drain {
                // RFC 9113, section 6.8: an endpoint must not increase the last stream id it has sent.
                Drain::Final { last: sent } => {
                    *last = (u32::from_be_bytes(*last) & MAX_STREAM_ID).min(sent).to_be_bytes();
                }
                Drain::Active => self.drain = Drain::ByServer,
                Drain::Announced | Drain::ByServer => {}
            }
        }
        header.write(&mut out.to_client);
        out.to_client.extend_from_slice(&payload);
        Ok(())
    }

    /// Ends the watches that are to be handed over and stand between two events.
    fn end_watches(&mut self) {
        let Some(handover) = &mut self.handover else { return };
        if self.server_in_block || !self.server.at_boundary() {
            return;
        }
        while let Some(stream) = handover.due() {
            frame::write_end(stream, &mut self.waiting);
            frame::write_reset(stream, ErrorCode::Cancel, &mut self.waiting_for_server);
            self.streams.reset(stream);
        }
    }

    /// Sends the relay's own frames when the server's are complete and its SETTINGS, which must come first (RFC 9113,
    /// section 3.4), have passed.
    fn flush(&mut self, out: &mut Output) {
        self.end_watches();
        if !self.waiting_for_server.is_empty() && self.preface_left == 0 && self.client.at_boundary() {
            out.to_server.append(&mut self.waiting_for_server);
            self.waiting_for_server = Vec::new();
        }
        if !self.waiting.is_empty() && self.server_began && !self.server_in_block && self.server.at_boundary() {
            out.to_client.append(&mut self.waiting);
            // An idle connection keeps no buffers.
            self.waiting = Vec::new();
        }
    }
}

/// Reads the fields of a HEADERS frame before its fragment (RFC 9113, section 6.2).
fn begin_block(header: FrameHeader, payload: &[u8]) -> Result<Block, ConnectionError> {
    const SHORT: ConnectionError = ConnectionError::size("a HEADERS frame is shorter than its fields");
    let mut rest = payload;
    if header.has(flag::PADDED) {
        let (&padding, after) = rest.split_first().ok_or(SHORT)?;
        let length = after
            .len()
            .checked_sub(usize::from(padding))
            .ok_or(ConnectionError::protocol(
                "a HEADERS frame has more padding than payload",
            ))?;
        rest = &after[..length];
    }
    let priority = if header.has(flag::PRIORITY) {
        let (fields, after) = rest.split_first_chunk::<5>().ok_or(SHORT)?;
        rest = after;
        Some(*fields)
    } else {
        None
    };
    Ok(Block {
        stream: header.stream,
        end_stream: header.has(flag::END_STREAM),
        priority,
        fragment: rest.to_vec(),
        spent: frame::HEADER_LEN + payload.len(),
    })
}

#[cfg(test)]
mod tests;
