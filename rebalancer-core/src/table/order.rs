//! The order in which connections are told to go where each counts as one, kept beside the table in eight octets each.
//!
//! Job: find the first few of a million without reading the million. Input: a connection whenever it changes.
//! Output: a key; of two connections that may be told the one with the lower key goes first, and of those with equal keys the
//! one with the lower id.
//! Must never let what does not fit into its bits put a connection first: it makes it equal to others.

use super::connection::Connection;
use crate::{
    ids::{ConnectionId, Protocol, Timestamp},
    policy::{NodeLocal, Weight},
};

/// Requests a second below which a connection is silent: it asks less than once in half a minute.
const SILENT: f64 = 1.0 / 30.0;

/// It may not be told at all, whoever asks: the highest bit.
const OUT: u64 = 1 << 63;

/// Open watches, and what they are from so many on.
const WATCHES_BITS: u32 = 20;
const MOST_WATCHES: u64 = (1 << WATCHES_BITS) - 1;

/// Milliseconds at which it was opened: seventy years, and what they are from then on.
const OPENED_BITS: u32 = 41;
const LAST_OPENED: u64 = (1 << OPENED_BITS) - 1;

/// It is silent; and it is, and speaks HTTP/1.1.
const IS_SILENT: u64 = 1 << 1;
const IS_SILENT_HTTP1: u64 = 1;

/// What a key says of its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key(u64);

/// Which connections are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// So many of the first.
    pub count: usize,
    /// None that was opened later.
    pub opened_until: Timestamp,
    /// Whether all are told at their next request: who is silent is the last then.
    pub at_request: bool,
    /// Only those that go after this one.
    pub beyond: Option<Turn>,
}

/// Where a connection stands among those that may be told; some share a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place(u64);

/// When its turn is: no two have the same.
pub type Turn = (Place, ConnectionId);

impl Key {
    /// Of a place in the table where no connection is.
    pub const NONE: Self = Self(OUT);

    /// Of this connection.
    pub fn of(connection: &Connection, node_local: NodeLocal) -> Self {
        let is_out = !connection.can_hear()
            || connection.protocol == Protocol::Unknown
            || connection.is_node_local() && node_local != NodeLocal::Move;
        let watches = u64::from(connection.counters.open_watches).min(MOST_WATCHES);
        // Those with too many watches to tell them apart are all equal.
        let opened = if watches == MOST_WATCHES {
            LAST_OPENED
        } else {
            connection.opened_at.as_millis().min(LAST_OPENED)
        };
        let silent = if is_silent(connection) { IS_SILENT } else { 0 };
        let silent_http1 = if silent != 0 && connection.protocol == Protocol::Http1 {
            IS_SILENT_HTTP1
        } else {
            0
        };
        let out = if is_out { OUT } else { 0 };
        Self(out | watches << (OPENED_BITS + 2) | opened << 2 | silent | silent_http1)
    }

    /// Whether it may be told by what it is: not too young, not excluded and not resting is another question.
    pub fn may_be_told(self) -> bool {
        self.0 & OUT == 0
    }

    /// Where it stands, unless it may not be told; `at_request` as in [`Wanted`].
    pub fn place(self, at_request: bool) -> Option<Place> {
        if !self.may_be_told() {
            return None;
        }
        let mask = if at_request { IS_SILENT } else { IS_SILENT_HTTP1 };
        let deaf = if self.0 & mask == 0 { 0 } else { 1 << 62 };
        Some(Place(deaf | self.0 >> 2))
    }

    /// Whether it certainly goes after those at a place: the cheapest of questions, which settles most of a large table.
    pub fn is_beyond(self, place: Place) -> bool {
        self.0 >> 2 > place.0
    }

    /// When it was opened, or nothing where the key cannot tell.
    pub fn opened_at(self) -> Option<Timestamp> {
        let opened = self.0 >> 2 & LAST_OPENED;
        (opened != LAST_OPENED).then(|| Timestamp::from_millis(opened))
    }
}

/// Whether a connection asks so seldom that an order to tell it at its next request, as a probe does and a relay for HTTP/1.1,
/// would not wait for it.
fn is_silent(connection: &Connection) -> bool {
    connection.load(Weight::Requests) < SILENT
}

impl Wanted {
    /// Where the connection of a key stands, unless it is not wanted; of those that share their place with `beyond`, some are
    /// not.
    pub(super) fn place_of(&self, key: Key) -> Option<Place> {
        let place = key.place(self.at_request)?;
        let is_late = key.opened_at().is_some_and(|at| at > self.opened_until);
        let is_before = self.beyond.is_some_and(|(beyond, _)| place < beyond);
        (!is_late && !is_before).then_some(place)
    }
}
