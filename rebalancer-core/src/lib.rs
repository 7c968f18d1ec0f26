//! The pure core of rebalancer: it decides, it never acts.
//!
//! Job: keep the table of connections, compare apiservers, and answer each turn with a decision and its reason;
//! parse what the kernel and the wire hand over (ClientHello, HTTP/1.1, HTTP/2, BTF, Go binaries).
//! Three rooms: what decides is here, [`wire`] is what clients and apiservers say, [`binary`] what files say.
//! Input: values and bytes, and `now` as an argument.
//! Output: values and bytes.
//! It must never read a clock, a file, a socket, the environment or a source of randomness, and never log.
#![forbid(unsafe_code)]

pub mod agent;
pub mod binary;
pub mod budget;
pub mod decision;
pub mod fairness;
pub mod hold;
pub mod ids;
pub mod membership;
pub mod news;
pub mod observation;
pub mod planner;
pub mod policy;
pub mod release;
pub mod rho;
pub mod shim;
pub mod sock_diag;
pub mod subflows;
pub mod table;
pub mod unseen;
pub mod view;
pub mod weight;
pub mod wire;
