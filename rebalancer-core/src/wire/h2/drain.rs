//! How far a connection is on its way out, and the last stream id that its client was told (RFC 9113, section 6.8).
//!
//! Job: the one owner of every GOAWAY towards the client, the relay's two, its last words and the server's own.
//! Output: frames, and which streams are refused. Must never raise a last stream id: clients end the connection at that.

use super::{
    error::ErrorCode,
    frame::{self, MAX_STREAM_ID},
};

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

/// How far it is, and the lowest id that was said.
#[derive(Debug)]
pub struct Departure {
    drain: Drain,
    said: u32,
}

impl Default for Departure {
    fn default() -> Self {
        Self {
            drain: Drain::Active,
            said: MAX_STREAM_ID,
        }
    }
}

impl Departure {
    /// How far it is.
    pub fn drain(&self) -> Drain {
        self.drain
    }

    /// Whether a new stream of that id is not served any more.
    pub fn refuses(&self, stream: u32) -> bool {
        matches!(self.drain, Drain::Final { last } if stream > last)
    }

    /// Says the first GOAWAY, and the PING whose answer tells that the client has read it; `false` when somebody said
    /// GOAWAY before.
    pub fn announce(&mut self, ping: [u8; 8], out: &mut Vec<u8>) -> bool {
        if self.drain != Drain::Active {
            return false;
        }
        self.drain = Drain::Announced;
        self.say(MAX_STREAM_ID, ErrorCode::NoError, out);
        frame::write_ping(ping, out);
        true
    }

    /// Says the second GOAWAY, when the first is said: streams up to `highest` are served. Answers what it said.
    pub fn conclude(&mut self, highest: u32, out: &mut Vec<u8>) -> Option<u32> {
        if self.drain != Drain::Announced {
            return None;
        }
        let last = self.say(highest, ErrorCode::NoError, out);
        self.drain = Drain::Final { last };
        Some(last)
    }

    /// Says why the connection ends.
    pub fn fail(&mut self, highest: u32, code: ErrorCode, out: &mut Vec<u8>) {
        self.say(highest, code, out);
    }

    /// The server says GOAWAY with that id; answers the one that may reach the client.
    pub fn by_server(&mut self, last: u32) -> u32 {
        if self.drain == Drain::Active {
            self.drain = Drain::ByServer;
        }
        self.lower(last)
    }

    fn say(&mut self, last: u32, code: ErrorCode, out: &mut Vec<u8>) -> u32 {
        let last = self.lower(last);
        frame::write_goaway(last, code, out);
        last
    }

    fn lower(&mut self, last: u32) -> u32 {
        self.said = self.said.min(last & MAX_STREAM_ID);
        if let Drain::Final { last } = &mut self.drain {
            *last = self.said;
        }
        self.said
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Says {
        Announce,
        Conclude(u32),
        Fail(u32),
        Server(u32),
    }

    proptest! {
        #[test]
        fn whoever_says_goaway_in_whatever_order_no_id_is_raised(
            says in prop::collection::vec(
                prop_oneof![
                    Just(Says::Announce),
                    (0_u32..20).prop_map(Says::Conclude),
                    (0_u32..20).prop_map(Says::Fail),
                    prop_oneof![0_u32..20, Just(MAX_STREAM_ID), any::<u32>()].prop_map(Says::Server),
                ],
                1..12,
            )
        ) {
            let mut departure = Departure::default();
            let mut last = MAX_STREAM_ID;
            for say in says {
                let mut out = Vec::new();
                match say {
                    Says::Announce => { departure.announce([0; 8], &mut out); }
                    Says::Conclude(highest) => { departure.conclude(highest, &mut out); }
                    Says::Fail(highest) => departure.fail(highest, ErrorCode::ProtocolError, &mut out),
                    Says::Server(id) => frame::write_goaway(departure.by_server(id), ErrorCode::NoError, &mut out),
                }
                if let Some(id) = out.get(9..13) {
                    let id = u32::from_be_bytes([id[0], id[1], id[2], id[3]]);
                    prop_assert!(id <= last, "{say:?}: {id} after {last}");
                    last = id;
                }
                if let Drain::Final { last: served } = departure.drain() {
                    prop_assert_eq!(served, last, "what is served is what was said");
                }
            }
        }
    }
}
