//! The relay's binary against scripted peers: what it puts on the wire, and what it survives.
//!
//! Each test has a relay and an apiserver of its own, on loopback in a network namespace of its own.

mod abuse;
mod certificates;
mod faults;
mod goaway;
mod handover;
mod heads;
mod health;
mod http1;
mod intercept;
mod metrics;
mod proxy_protocol;
mod requests;
mod strangers;
mod takeover;
mod transfers;
mod trust;
mod world;
