//! The one interface both shims answer: list connections, send GOAWAY to these, report outcomes.

pub mod link;
pub mod wire;
