//! What goes on of a request's head: the writer of [`crate::wire::rewrite`] for HTTP/1.1.
//!
//! Input: a head that [`super::head::Finder`] found, and the policy. Output: the head that goes on, or why none does.
//! Must never decide anything about a field itself.

use super::{
    body::Framing,
    head::{Field, HeadError, RequestHead, write_field},
};
use crate::wire::{
    h2::watch::Watch,
    rewrite::{Fate, Policy, user_agent},
};

/// A request as it goes on.
#[derive(Debug, PartialEq, Eq)]
pub struct Passed {
    /// Its head.
    pub head: Vec<u8>,
    /// How its body is sent on.
    pub framing: Framing,
    /// Whether it wants to speak something else from here on.
    pub upgrades: bool,
    /// Whether its answer has no body whatever it says.
    pub to_head: bool,
    /// Whether it is a POST: old clients send a line too much behind its body.
    pub posts: bool,
    /// Whether it is a watch.
    pub watch: bool,
    /// Its user agent, cut.
    pub user_agent: Option<String>,
}

/// Why a request does not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stays {
    /// Its head is none.
    Malformed(HeadError),
    /// It names nobody where somebody must be named.
    Nobody,
}

/// Reads a head and writes what goes on of it.
///
/// # Errors
///
/// See [`Stays`].
pub fn pass(head: &[u8], policy: &Policy) -> Result<Passed, Stays> {
    let parsed = RequestHead::parse(head).map_err(Stays::Malformed)?;
    let framing = parsed.framing().map_err(Stays::Malformed)?;
    let rewrite = policy.request(|name| parsed.value(name)).ok_or(Stays::Nobody)?;
    let came = parsed.fields.iter();
    let came = came.filter(|field| rewrite.fate(field.name) == Fate::Merged);
    let chain = policy.forwarded_for(came.map(|field| &*field.value));
    let mut more = Vec::new();
    write_field(b"X-Forwarded-For", &chain, &mut more);
    for (name, value) in rewrite.adds() {
        write_field(name.as_bytes(), value.as_bytes(), &mut more);
    }
    let mut out = Vec::with_capacity(head.len() + more.len());
    let passes = |field: &Field<'_>| rewrite.fate(field.name) == Fate::Passes;
    parsed.write(framing, passes, &more, &mut out);
    Ok(Passed {
        head: out,
        framing,
        upgrades: parsed.upgrades(),
        to_head: parsed.method == b"HEAD",
        posts: parsed.method == b"POST",
        watch: Watch::of(parsed.method, parsed.target).is_some(),
        user_agent: parsed.values("user-agent").last().map(user_agent),
    })
}
