//! The streams of one connection, as far as a relay must know them: open or not, watch or not.
//!
//! Input: frame headers of both directions. Output: counts. Must never hold more than [`Streams::LIMIT`] entries.

use std::collections::HashMap;

use super::error::ConnectionError;

#[derive(Clone, Copy, Debug)]
struct Stream {
    watch: bool,
    client_ended: bool,
    server_ended: bool,
}

/// The open streams, and the highest id the client has used.
#[derive(Debug, Default)]
pub struct Streams {
    open: HashMap<u32, Stream>,
    watches: u32,
    highest: u32,
    opened: u64,
}

impl Streams {
    /// No client needs more: kube-apiserver allows 250 (`--http2-max-streams-per-connection`).
    pub const LIMIT: usize = 4096;

    /// Whether the id is higher than any before: a new stream and not a known one's trailers.
    pub fn is_new(&self, id: u32) -> bool {
        id > self.highest
    }

    /// The client opens a stream.
    pub fn open(&mut self, id: u32, watch: bool, ended: bool) -> Result<(), ConnectionError> {
        if self.open.len() >= Self::LIMIT {
            return Err(ConnectionError::calm("too many streams are open"));
        }
        self.highest = id;
        self.opened += 1;
        self.watches += u32::from(watch);
        self.open.insert(
            id,
            Stream {
                watch,
                client_ended: ended,
                server_ended: false,
            },
        );
        Ok(())
    }

    /// The client will send no more on it.
    pub fn client_ended(&mut self, id: u32) {
        if let Some(stream) = self.open.get_mut(&id) {
            stream.client_ended = true;
            if stream.server_ended {
                self.reset(id);
            }
        }
    }

    /// The server will send no more on it.
    pub fn server_ended(&mut self, id: u32) {
        if let Some(stream) = self.open.get_mut(&id) {
            stream.server_ended = true;
            if stream.client_ended {
                self.reset(id);
            }
        }
    }

    /// Either side reset it.
    pub fn reset(&mut self, id: u32) {
        if let Some(stream) = self.open.remove(&id) {
            self.watches -= u32::from(stream.watch);
        }
    }

    /// The highest id the client has used.
    pub fn highest(&self) -> u32 {
        self.highest
    }

    /// How many were ever opened.
    pub fn opened(&self) -> u64 {
        self.opened
    }

    /// How many are open.
    pub fn count(&self) -> u32 {
        self.open.len() as u32
    }

    /// How many of the open ones are watches.
    pub fn watches(&self) -> u32 {
        self.watches
    }
}
