//! The streams of one connection, as far as a relay must know them: who may still send on each, and whether it is a watch.
//!
//! Input: frame headers of both directions. Output: states and counts. Must never hold more than [`Streams::LIMIT`]
//! entries.

use std::collections::HashMap;

use super::error::ConnectionError;
use crate::wire::flow::{Flow, Flows, Slot};

/// Who may still send on a stream that is not closed (RFC 9113, section 5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sends {
    Both,
    /// The client has ended its half.
    Server,
    /// The server has ended its half.
    Client,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    watch: bool,
    sends: Sends,
    flow: Slot,
}

/// What a header block of the client's on some stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The id is higher than any before: a request.
    New,
    /// The client has not ended it: trailers.
    Open,
    /// The client has said that it sends no more on it.
    HalfClosed,
    /// It is over: ended by both, or reset by either; or its id was passed over.
    Closed,
}

/// The open streams, and the highest id the client has used.
#[derive(Debug, Default)]
pub struct Streams {
    open: HashMap<u32, Stream>,
    watches: u32,
    /// The highest id the client has used, whatever became of it.
    highest: u32,
    /// The highest id that was passed on: the server has seen none above it.
    passed: u32,
    opened: u64,
    /// Apart: what is looked at for each frame stays small.
    flows: Box<Flows>,
}

impl Streams {
    /// No client needs more: kube-apiserver allows 250 (`--http2-max-streams-per-connection`).
    pub const LIMIT: usize = 4096;

    /// Where a stream stands when the client sends a header block on it.
    pub fn standing(&self, id: u32) -> Standing {
        if id > self.highest {
            return Standing::New;
        }
        match self.open.get(&id).map(|stream| stream.sends) {
            Some(Sends::Both | Sends::Client) => Standing::Open,
            Some(Sends::Server) => Standing::HalfClosed,
            None => Standing::Closed,
        }
    }

    /// The client opens a stream, and the server will hear of it.
    ///
    /// # Errors
    ///
    /// More than [`Self::LIMIT`] are open.
    pub fn open(&mut self, id: u32, watch: bool, ended: bool) -> Result<(), ConnectionError> {
        debug_assert_eq!(self.standing(id), Standing::New);
        if self.open.len() >= Self::LIMIT {
            return Err(ConnectionError::calm("too many streams are open"));
        }
        self.highest = id;
        self.passed = id;
        self.opened += 1;
        self.watches += u32::from(watch);
        let sends = if ended { Sends::Server } else { Sends::Both };
        let flow = self.flows.opened(watch);
        self.open.insert(id, Stream { watch, sends, flow });
        self.check();
        Ok(())
    }

    /// The client opens a stream that the server never hears of: its id is used all the same.
    pub fn refuse(&mut self, id: u32) {
        debug_assert_eq!(self.standing(id), Standing::New);
        self.highest = id;
        self.check();
    }

    /// Whether the client has used the id, and the server knows nothing of it: what the client sends on it stays here.
    pub fn is_unknown_to_server(&self, id: u32) -> bool {
        self.passed < id && id <= self.highest
    }

    /// The client will send no more on it.
    pub fn client_ended(&mut self, id: u32) {
        if let Some(stream) = self.open.get_mut(&id) {
            match stream.sends {
                Sends::Both => stream.sends = Sends::Server,
                Sends::Client => self.reset(id),
                Sends::Server => {}
            }
        }
    }

    /// The server will send no more on it.
    pub fn server_ended(&mut self, id: u32) {
        if let Some(stream) = self.open.get_mut(&id) {
            match stream.sends {
                Sends::Both => stream.sends = Sends::Client,
                Sends::Server => self.reset(id),
                Sends::Client => {}
            }
        }
    }

    /// Whether the server has ended its half and the client has not.
    pub fn is_answered(&self, id: u32) -> bool {
        self.open.get(&id).is_some_and(|stream| stream.sends == Sends::Client)
    }

    /// Either side reset it.
    pub fn reset(&mut self, id: u32) {
        if let Some(stream) = self.open.remove(&id) {
            self.watches -= u32::from(stream.watch);
            self.flows.ended(stream.flow);
        }
        self.check();
    }

    /// The server has begun to answer: of which flow, and whether it refused.
    pub fn answered(&mut self, id: u32, flow: Option<Flow>, refused: bool) {
        // One that ended with the answer's head is not here any more.
        match self.open.get_mut(&id) {
            Some(stream) => stream.flow = self.flows.answered(stream.flow, flow, refused, true),
            None => {
                self.flows.answered(Slot::default(), flow, refused, false);
            }
        }
    }

    /// Octets of an answer's body.
    pub fn data(&mut self, id: u32, octets: u32) {
        // Where no answer names a flow, nothing is looked up.
        let slot = if self.flows.is_plain() {
            Slot::default()
        } else {
            self.open.get(&id).map_or(Slot::default(), |stream| stream.flow)
        };
        self.flows.add_octets(slot, u64::from(octets));
    }

    /// What each flow came to.
    pub fn flows(&mut self) -> &mut Flows {
        &mut self.flows
    }

    /// The client was told that streams above this one are not served: it has given them up.
    pub fn give_up_above(&mut self, last: u32) {
        self.open.retain(|id, stream| {
            let stays = *id <= last;
            self.watches -= u32::from(!stays && stream.watch);
            if !stays {
                self.flows.ended(stream.flow);
            }
            stays
        });
        self.check();
    }

    /// The highest id that was passed on.
    pub fn passed(&self) -> u32 {
        self.passed
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

    fn check(&self) {
        debug_assert!(
            self.passed <= self.highest,
            "the server knows no stream the client has not opened"
        );
        debug_assert!(self.watches as usize <= self.open.len());
        debug_assert!(self.open.len() <= Self::LIMIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_block_means_what_its_streams_past_says() {
        let mut streams = Streams::default();
        assert_eq!(streams.standing(1), Standing::New);
        streams.open(1, false, false).expect("room");
        assert_eq!(streams.standing(1), Standing::Open);
        streams.server_ended(1);
        assert_eq!(streams.standing(1), Standing::Open, "the client may still send");
        streams.client_ended(1);
        assert_eq!(streams.standing(1), Standing::Closed);
        streams.open(5, true, true).expect("room");
        assert_eq!(streams.standing(5), Standing::HalfClosed);
        assert_eq!(streams.standing(3), Standing::Closed, "passed over");
        streams.reset(5);
        assert_eq!(streams.standing(5), Standing::Closed);
        assert_eq!((streams.count(), streams.watches(), streams.opened()), (0, 0, 2));
    }

    #[test]
    fn a_refused_id_is_used_and_unknown_to_the_server() {
        let mut streams = Streams::default();
        streams.open(1, false, true).expect("room");
        streams.refuse(3);
        assert_eq!(streams.standing(3), Standing::Closed);
        assert!(streams.is_unknown_to_server(3));
        assert!(!streams.is_unknown_to_server(1) && !streams.is_unknown_to_server(5));
        streams.open(5, false, true).expect("room");
        assert!(
            !streams.is_unknown_to_server(3),
            "the server takes it for one that was passed over"
        );
        assert_eq!(streams.passed(), 5);
    }
}
