//! HTTP/1.1 as a relay sees it: heads are read and written anew, bodies are followed to their end.
//!
//! Input: the octets that arrived. Output: the octets to send on, and where a message ends.
//! Must never send on a head that two readers could take for two different things: what goes on is written with one
//! field a line, CRLF, and one way of saying where the body ends (RFC 9112, sections 2.2, 5 and 6).

pub mod body;
pub mod forward;
pub mod head;
