//! What the wire hands over, and what goes onto it: TLS's first octets, HTTP/1.1 and HTTP/2 and what is done to
//! their requests, a load balancer's header, certificates, the flows that answers name, and the pace at which watches
//! are handed over.
//!
//! Job: parsers and state machines of one connection. Input: octets that strangers chose. Output: values, and octets.
//! Must never decide who moves, nor let what a stranger sends grow without a limit.

pub mod assemblies;
pub mod flow;
pub mod h1;
pub mod h2;
pub mod hello;
pub mod hellos;
pub mod pace;
pub mod proxy_protocol;
pub mod rewrite;
pub mod x509;
