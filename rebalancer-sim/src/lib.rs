//! A seeded simulator in virtual time: apiservers, a load balancer, clients, and the policies side by side.
//!
//! It drives the very core the agent runs; it must never read a clock or an unseeded source of randomness.
#![forbid(unsafe_code)]
