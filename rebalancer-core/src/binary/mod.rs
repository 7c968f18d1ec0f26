//! What is read out of files: where an apiserver decides on GOAWAY, and where members lie in kernel structures.
//!
//! Job: parsers of Go binaries and of the kernel's type information. Input: octets of files. Output: offsets, or why not.
//! Must never guess: what is not recognised is an error with a reason.

pub mod btf;
pub mod golang;
