//! HTTP/2 as a relay sees it: frames are passed on, not terminated.
//!
//! Job: follow both directions of one connection closely enough to add identity headers to requests, to count
//! streams and watches, and to say GOAWAY in two phases (RFC 9113, section 6.8) without failing a request.
//! Input: the bytes that arrived from either side.
//! Output: the bytes to send to either side.
//! Must never hold back a DATA frame, change a flow-control window of a stream it relays, or trust a length it read; and
//! never let octets of a client's header block reach the server, but blocks of its own.

mod answers;
mod client_half;
mod drain;
pub mod error;
mod events;
pub mod frame;
mod glitches;
pub mod hpack;
mod messages;
pub mod relay;
mod scan;
mod server_half;
mod streams;
pub mod watch;
mod watches;
