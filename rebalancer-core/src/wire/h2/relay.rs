//! One client connection relayed to one upstream connection, frame by frame.
//!
//! Job: pass everything, follow streams and header blocks, say requests anew with the identity, and GOAWAY when told.
//! Input: the bytes of either side as they arrive.
//! Output: the bytes for either side, appended to [`Output`].
//! Must never put a frame of its own inside another frame or a header block, let a header block of the client's reach the
//! server as anything but a whole request or trailers of its own writing, nor take more input than [`Output`] has room for.

use super::{
    client_half::{Block, ClientHalf},
    drain::Departure,
    error::{ConnectionError, ErrorCode},
    frame::{self, FrameHeader, flag, kind},
    glitches::Glitches,
    hpack::FieldList,
    messages,
    scan::Step,
    server_half::{Answered, MAX_CONTROL_PAYLOAD, ServerHalf},
    streams::{Standing, Streams},
    watch::Watch,
};
use crate::wire::{
    flow::Flows,
    rewrite::{self, Policy},
};

pub use super::{answers::is_refusal, drain::Drain};

/// How much may wait for a side before nothing more is taken for it.
pub const HIGH_WATER: usize = 64 * 1024;

/// How much more than [`HIGH_WATER`] may wait for a client whose own frames are still taken: its PINGs, window updates and
/// resets reach the server although it reads nothing itself, and what the relay answers of its own accord stays bounded.
const OWN_FRAMES: usize = 64 * 1024;

/// What a header block costs beside its list, in octets that are only passed on: a microsecond or two of a processor.
const BLOCK: usize = 1024;

/// What a frame costs beside its octets, likewise.
const FRAME: usize = 32;

/// How much of such work is done at once: others want to be served too.
const AT_ONCE: usize = 16 * 1024;

/// What a relay is told at its start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What is done to each request.
    pub policy: Policy,
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
    /// A place in [`Self::to_client`] where a write is to end, the first there is. A client that reads a complete answer
    /// together with the reset that stops its body may lose the answer (curl 7.88): directly the two come apart.
    pub cut: Option<usize>,
    /// To the server.
    pub to_server: Vec<u8>,
}

impl Output {
    /// Octets that wait for either side.
    pub fn waiting(&self) -> usize {
        self.to_client.len() + self.to_server.len()
    }

    /// Whether there is room for what the client may bring: its requests for the server, and the relay's own answers.
    pub fn has_room_for_client(&self) -> bool {
        self.to_server.len() < HIGH_WATER && self.to_client.len() < HIGH_WATER + OWN_FRAMES
    }

    /// Whether there is room for what the server may bring.
    pub fn has_room_for_server(&self) -> bool {
        self.to_client.len() < HIGH_WATER
    }
}

/// The user agent, from the first request that brings one on.
#[derive(Debug)]
enum UserAgent {
    Unknown,
    Seen(String),
    Told,
}

/// A rule that the client broke on a stream the server knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    /// It sends on a stream that it has ended: STREAM_CLOSED, as for DATA (RFC 9113, section 5.1).
    Ended,
    /// Its trailers are none: PROTOCOL_ERROR, as for a window that grows by nothing (RFC 9113, sections 8.1.1 and 6.9).
    Malformed,
}

/// Whether the client's requests are passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trust {
    Given,
    /// The identity they would carry holds no longer.
    Withdrawn,
}

/// Both directions of one connection.
#[derive(Debug)]
pub struct Relay {
    policy: Policy,
    max_header_bytes: usize,
    ping: [u8; 8],
    client: ClientHalf,
    server: ServerHalf,
    streams: Streams,
    departure: Departure,
    trust: Trust,
    /// Frames of the relay's own for the server, waiting for a place between two of the client's.
    own_to_server: Vec<u8>,
    user_agent: UserAgent,
    /// What frames and the client's header blocks have cost since it was asked last, in octets.
    work: usize,
    glitches: Glitches,
}

impl Relay {
    /// A connection whose first bytes are still to come.
    pub fn new(settings: Settings) -> Self {
        Self {
            policy: settings.policy,
            max_header_bytes: settings.max_header_bytes,
            ping: settings.ping,
            client: ClientHalf::new(settings.max_header_bytes),
            server: ServerHalf::new(settings.watch_handover),
            streams: Streams::default(),
            departure: Departure::default(),
            trust: Trust::Given,
            own_to_server: Vec::new(),
            user_agent: UserAgent::Unknown,
            work: 0,
            glitches: Glitches::default(),
        }
    }

    /// Takes what the client sent, as much of it as `out` has room for and costs not too much at once; says how much. The rest
    /// is given again when what waits has gone, and others have had their turn: a few octets may stand for many.
    ///
    /// # Errors
    ///
    /// The client broke the protocol so that its requests cannot be told apart any more; see [`Self::fail`].
    pub fn client_bytes(&mut self, input: &[u8], out: &mut Output) -> Result<usize, ConnectionError> {
        let mut rest = input;
        let enough = self.work + AT_ONCE;
        let taken = self.take_client(&mut rest, enough, out);
        // What was said before a fault is said.
        self.flush(out);
        taken?;
        debug_assert!(
            rest.is_empty() || !out.has_room_for_client() || self.work >= enough,
            "what has room is taken"
        );
        Ok(input.len() - rest.len())
    }

    fn take_client(&mut self, rest: &mut &[u8], enough: usize, out: &mut Output) -> Result<(), ConnectionError> {
        self.client.preface(rest, &mut out.to_server)?;
        // Without input a step still ends a frame without a payload.
        while rest.is_empty() || out.has_room_for_client() && self.work < enough {
            match self.client.step(rest) {
                Step::Starved => break,
                Step::Header(header) => self.client_header(header, out)?,
                Step::Pass(bytes) => out.to_server.extend_from_slice(bytes),
                Step::Collected(header, payload) if header.kind == kind::PING => {
                    self.client_pong(header, &payload, out);
                }
                Step::Collected(header, payload) => {
                    if let Some(block) = self.client.headers(header, payload)? {
                        self.client_block(&block, out)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes what the server sent.
    ///
    /// # Errors
    ///
    /// The server's GOAWAY is malformed.
    pub fn server_bytes(&mut self, mut input: &[u8], out: &mut Output) -> Result<(), ConnectionError> {
        // Nearly all of it passes.
        out.to_client.reserve(input.len());
        loop {
            self.flush(out);
            match self.server.scanner.step(&mut input) {
                Step::Starved => break,
                Step::Header(header) => self.server_header(header, out),
                Step::Pass(bytes) => {
                    let answered = self.server.take(bytes);
                    self.follow(answered);
                    out.to_client.extend_from_slice(bytes);
                }
                Step::Collected(header, payload) => self.server_frame(header, payload, out)?,
            }
        }
        self.flush(out);
        Ok(())
    }

    /// Says GOAWAY in two phases (RFC 9113, section 6.8); `false` when somebody has already said it.
    pub fn go_away(&mut self, out: &mut Output) -> bool {
        let says = self.departure.announce(self.ping, self.server.own());
        self.flush(out);
        says
    }

    /// Says the second GOAWAY without the client's answer to the PING: it has had long enough. A stream that is still on
    /// its way is refused, and the client may send it again elsewhere.
    pub fn conclude(&mut self, out: &mut Output) {
        self.say_last();
        self.flush(out);
    }

    /// Ends up to `total` watches of a connection that has said its last GOAWAY, each between two of its events, those
    /// that have been ended already included. Does nothing unless it was told at its start that it may.
    pub fn hand_over(&mut self, total: u32, out: &mut Output) {
        if let (Some(watches), Drain::Final { .. }) = (&mut self.server.watches, self.departure.drain()) {
            watches.allow(total);
            self.flush(out);
        }
    }

    /// From the next block on no request reaches the server: each is answered 401, as the apiserver answers a credential
    /// that is not good any more. What is under way stays.
    pub fn withdraw(&mut self) {
        self.trust = Trust::Withdrawn;
    }

    /// Tells the client, where a place is free, why its connection ends.
    pub fn fail(&mut self, error: ConnectionError, out: &mut Output) {
        self.departure
            .fail(self.streams.passed(), error.code, self.server.own());
        self.flush(out);
    }

    /// How far it is on its way out.
    pub fn drain(&self) -> Drain {
        self.departure.drain()
    }

    /// Whether the relay's own GOAWAY is complete, no stream is open and no frame is cut: it may close.
    pub fn is_finished(&self) -> bool {
        matches!(self.drain(), Drain::Final { .. })
            && self.streams.count() == 0
            && !self.client.is_in_block()
            && !self.server.has_own()
            && self.own_to_server.is_empty()
            && self.server.is_between_frames()
    }

    /// Octets of a client's header block that is not whole yet: held until its last frame comes.
    pub fn unfinished(&self) -> usize {
        self.client.unfinished()
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
        self.server.take_refused()
    }

    /// What each flow that answers named has come to, when that has changed since this was asked last.
    pub fn take_flows(&mut self) -> Option<&Flows> {
        let flows = self.streams.flows();
        flows.take_changed().then_some(&*flows)
    }

    /// What frames and the client's header blocks have cost since this was asked last beside their octets, as so many octets
    /// that are only passed on: a few may stand for many.
    pub fn take_work(&mut self) -> usize {
        std::mem::take(&mut self.work)
    }

    /// How much that brings the client nothing it has had the server or the relay do since this was asked last.
    pub fn take_glitches(&mut self) -> u32 {
        self.glitches.take()
    }

    /// The user agent of the first request that brought one, once: [`rewrite::MAX_USER_AGENT`] octets of it at most.
    pub fn take_user_agent(&mut self) -> Option<String> {
        match &mut self.user_agent {
            UserAgent::Seen(text) => {
                let text = std::mem::take(text);
                self.user_agent = UserAgent::Told;
                Some(text)
            }
            UserAgent::Unknown | UserAgent::Told => None,
        }
    }

    /// Whether what the client sends on that stream stays here: the server never heard of it.
    fn stays_here(&self, stream: u32) -> bool {
        self.departure.refuses(stream) || self.streams.is_unknown_to_server(stream)
    }

    fn client_header(&mut self, header: FrameHeader, out: &mut Output) -> Result<(), ConnectionError> {
        self.client.check_order(header)?;
        self.work += FRAME;
        self.glitches.client(header);
        match header.kind {
            kind::HEADERS => self.client.begin_headers(header)?,
            kind::CONTINUATION => self.client.begin_continuation(header)?,
            kind::PING if header.has(flag::ACK) && header.length == 8 => self.client.scanner().collect(header),
            kind::DATA if self.stays_here(header.stream) => {
                // The client has spent its connection window on it, and the server will never give it back.
                if header.length > 0 {
                    frame::write_connection_window(header.length, self.server.own());
                    self.server.bound_own()?;
                }
                self.client.scanner().skip(header);
            }
            kind::RST_STREAM | kind::WINDOW_UPDATE | kind::PRIORITY if self.stays_here(header.stream) => {
                self.client.scanner().skip(header);
            }
            _ => {
                match header.kind {
                    kind::DATA if header.has(flag::END_STREAM) => self.streams.client_ended(header.stream),
                    kind::RST_STREAM => self.close(header.stream),
                    _ => {}
                }
                header.write(&mut out.to_server);
                self.client.scanner().pass(header);
            }
        }
        Ok(())
    }

    fn client_block(&mut self, block: &Block, out: &mut Output) -> Result<(), ConnectionError> {
        let list = self.client.decode(block)?;
        self.work += BLOCK + list.size();
        self.glitches.list(block.length(), list.size());
        if self.departure.refuses(block.stream) {
            self.glitches.refused();
            frame::write_reset(block.stream, ErrorCode::RefusedStream, self.server.own());
            return self.server.bound_own();
        }
        match self.streams.standing(block.stream) {
            Standing::New => self.request(block, &list, out),
            Standing::Open => self.trailers(block, &list, out),
            Standing::HalfClosed => {
                self.have_reset(Broken::Ended, block.stream, out);
                Ok(())
            }
            // A server that has forgotten the stream would take it for a request.
            Standing::Closed if messages::has_pseudo(&list) => {
                Err(ConnectionError::protocol("a request on a stream that was used before"))
            }
            // Trailers that crossed a reset.
            Standing::Closed => {
                self.glitches.refused();
                Ok(())
            }
        }
    }

    fn request(&mut self, block: &Block, list: &FieldList, out: &mut Output) -> Result<(), ConnectionError> {
        if messages::check_request(list).is_err() {
            self.glitches.refused();
            self.streams.refuse(block.stream);
            frame::write_reset(block.stream, ErrorCode::ProtocolError, self.server.own());
            return self.server.bound_own();
        }
        let size = list.size() + self.policy.size();
        let is_too_large = list.is_cut() || self.server.allowed.list.is_some_and(|allowed| size > allowed);
        let rewrite = match self.trust {
            Trust::Withdrawn => Err(b"401"),
            Trust::Given if is_too_large => Err(b"431"),
            Trust::Given => self.policy.request(|name| list.get(name.as_bytes())).ok_or(b"401"),
        };
        let rewrite = match rewrite {
            Ok(rewrite) => rewrite,
            Err(status) => {
                self.glitches.refused();
                self.streams.refuse(block.stream);
                messages::write_status(block.stream, block.end_stream, *status, self.server.own());
                return self.server.bound_own();
            }
        };
        let field = |name: &[u8]| list.get(name).unwrap_or_default();
        let watch = Watch::of(field(b":method"), field(b":path"));
        self.streams.open(block.stream, watch.is_some(), block.end_stream)?;
        if let (Some(watches), Some(watch)) = (&mut self.server.watches, watch)
            && block.end_stream
        {
            watches.open(block.stream, watch.beginning);
        }
        if matches!(self.user_agent, UserAgent::Unknown)
            && let Some(value) = list.get(b"user-agent")
        {
            self.user_agent = UserAgent::Seen(rewrite::user_agent(value));
        }
        let policy = &self.policy;
        self.client.encode(
            block,
            self.server.allowed.table,
            |encoder, out| messages::write_request(list, policy, rewrite, encoder, out),
            &mut out.to_server,
        )
    }

    fn trailers(&mut self, block: &Block, list: &FieldList, out: &mut Output) -> Result<(), ConnectionError> {
        if !block.end_stream || list.is_cut() || messages::check_trailers(list).is_err() {
            self.have_reset(Broken::Malformed, block.stream, out);
            return Ok(());
        }
        self.streams.client_ended(block.stream);
        let policy = &self.policy;
        self.client.encode(
            block,
            self.server.allowed.table,
            |encoder, out| messages::write_trailers(list, policy, encoder, out),
            &mut out.to_server,
        )
    }

    /// Has the server reset a stream whose client broke a rule: it is sent a frame that breaks the same rule and carries
    /// nothing. An answer may be on its way, and nothing may follow a reset on its stream (RFC 9113, section 5.1): one of the
    /// relay's own would come before it.
    fn have_reset(&mut self, broken: Broken, stream: u32, out: &mut Output) {
        match broken {
            Broken::Ended => frame::write_empty(stream, &mut out.to_server),
            Broken::Malformed => frame::write_window(stream, 0, &mut out.to_server),
        }
        self.glitches.refused();
        self.close(stream);
    }

    fn close(&mut self, stream: u32) {
        self.streams.reset(stream);
        if let Some(watches) = &mut self.server.watches {
            watches.close(stream);
        }
    }

    fn client_pong(&mut self, header: FrameHeader, payload: &[u8], out: &mut Output) {
        if payload != self.ping {
            header.write(&mut out.to_server);
            out.to_server.extend_from_slice(payload);
            return;
        }
        // Every stream the client opened before it read the first GOAWAY has arrived by now.
        self.say_last();
    }

    fn say_last(&mut self) {
        if let Some(last) = self.departure.conclude(self.streams.passed(), self.server.own()) {
            self.streams.give_up_above(last);
        }
    }

    fn server_header(&mut self, header: FrameHeader, out: &mut Output) {
        self.work += FRAME;
        if header.kind == kind::DATA {
            self.glitches.data(header.length);
            self.streams.data(header.stream, header.length);
        }
        let withheld = header.length <= MAX_CONTROL_PAYLOAD && self.server.is_withheld(header);
        if !withheld {
            self.server.release(&mut out.to_client);
            let answered = self.server.begin(header);
            self.follow(answered);
        }
        if let Some(watches) = &mut self.server.watches
            && watches.begin(header)
        {
            if header.kind == kind::DATA && header.length > 0 {
                // The client never sees it, so it never gives its window back.
                frame::write_connection_window(header.length, &mut self.own_to_server);
            }
            self.server.scanner.skip(header);
            return;
        }
        match header.kind {
            kind::SETTINGS | kind::GOAWAY if header.length <= MAX_CONTROL_PAYLOAD => {
                return self.server.scanner.collect(header);
            }
            kind::HEADERS | kind::CONTINUATION if withheld => return self.server.scanner.collect(header),
            kind::HEADERS | kind::DATA if header.has(flag::END_STREAM) => self.streams.server_ended(header.stream),
            kind::RST_STREAM => {
                if self.streams.is_answered(header.stream) {
                    out.cut.get_or_insert(out.to_client.len());
                } else {
                    self.glitches.reset();
                }
                self.streams.reset(header.stream);
            }
            _ => {}
        }
        header.write(&mut out.to_client);
        self.server.scanner.pass(header);
    }

    /// A frame of the server's that was to be read.
    fn server_frame(
        &mut self,
        header: FrameHeader,
        mut payload: Vec<u8>,
        out: &mut Output,
    ) -> Result<(), ConnectionError> {
        match header.kind {
            kind::SETTINGS => self.server.settings(&mut payload, self.max_header_bytes),
            kind::GOAWAY => {
                let Some((last, _)) = payload.split_first_chunk_mut::<4>() else {
                    return Err(ConnectionError::size("the server's GOAWAY is too short"));
                };
                *last = self.departure.by_server(u32::from_be_bytes(*last)).to_be_bytes();
                if let Drain::Final { last } = self.departure.drain() {
                    self.streams.give_up_above(last);
                }
            }
            _ => {
                self.server.withhold(header, &payload, &mut out.to_client);
                return Ok(());
            }
        }
        header.write(&mut out.to_client);
        out.to_client.extend_from_slice(&payload);
        Ok(())
    }

    /// An answer's head may have come whole.
    fn follow(&mut self, answered: Option<Answered>) {
        if let Some(answered) = answered {
            self.streams.answered(answered.stream, answered.flow, answered.refused);
        }
    }

    /// Ends the watches that are to be handed over and stand between two events.
    fn end_watches(&mut self) {
        if !self.server.is_between_frames() {
            return;
        }
        while let Some(stream) = self.server.watches.as_mut().and_then(|watches| watches.due()) {
            frame::write_end(stream, self.server.own());
            frame::write_reset(stream, ErrorCode::Cancel, &mut self.own_to_server);
            self.streams.reset(stream);
        }
    }

    /// Sends the relay's own frames where there is a place for them.
    fn flush(&mut self, out: &mut Output) {
        self.end_watches();
        if !self.own_to_server.is_empty() && self.client.has_place() {
            out.to_server.append(&mut self.own_to_server);
            self.own_to_server = Vec::new();
        }
        self.server.flush(&mut out.to_client);
    }
}

#[cfg(test)]
mod tests;
