//! Which requests are watches, as the apiserver's RequestInfo has it
//! (k8s.io/apiserver/pkg/endpoints/request/requestinfo.go, v0.36.2).
//!
//! Input: a request's method and target. Output: facts. Must never look for words in a text: a namespace, a pod or a
//! proxied path may be called `watch`.

use std::borrow::Cow;

/// What a request's target says of a watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch {
    /// What it begins with.
    pub beginning: Beginning,
}

/// What a watch begins with (k8s.io/apimachinery/pkg/apis/meta/v1/types.go, `ListOptions`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beginning {
    /// The changes since a version that it names: its client may resume behind every event.
    Changes,
    /// What exists, in the order of its names: where that ends nothing says, but a bookmark comes later.
    State,
    /// The same, and a bookmark says where it ends (KEP-3157).
    MarkedState,
    /// That bookmark has come, and no event since. A client puts what it was told in its store now; when its watch ends at once
    /// and without an event, client-go calls it very short and asks for everything again (k8s.io/client-go/tools/cache/
    /// reflector.go, v0.36.2, `handleAnyWatch`).
    Told,
}

impl Watch {
    /// Reads a request's `:method` and `:path`; `None` when it is no watch.
    pub fn of(method: &[u8], target: &[u8]) -> Option<Self> {
        // Most requests are none, and do not have the word at all, in letters or escaped.
        if !target.contains(&b'%') && !target.windows(5).any(|word| word == b"watch") {
            return None;
        }
        let target = without_authority(target);
        let (path, query) = match target.iter().position(|octet| *octet == b'?') {
            Some(at) => (&target[..at], &target[at + 1..]),
            None => (target, &[][..]),
        };
        if !is_watch(method, path, query) {
            return None;
        }
        let beginning = if is_true(query, b"sendInitialEvents") {
            Beginning::MarkedState
        } else if names_version(query) {
            Beginning::Changes
        } else {
            Beginning::State
        };
        Some(Self { beginning })
    }
}

/// A target in absolute form (RFC 9112, section 3.2.2) from its path on: Go takes one in HTTP/2 too.
fn without_authority(target: &[u8]) -> &[u8] {
    if target.first() == Some(&b'/') {
        return target;
    }
    let is_scheme = |octet: &u8| octet.is_ascii_alphanumeric() || b"+-.".contains(octet);
    let scheme = target.iter().take_while(|octet| is_scheme(octet)).count();
    let Some(rest) = target[scheme..].strip_prefix(b"://") else {
        return &[];
    };
    let authority = rest.iter().take_while(|octet| !matches!(octet, b'/' | b'?')).count();
    &rest[authority..]
}

fn is_watch(method: &[u8], path: &[u8], query: &[u8]) -> bool {
    let Some(path) = unescaped(path, false) else {
        return false;
    };
    let path = trimmed(&path);
    let mut parts = path.split(|octet| *octet == b'/');
    let grouped = match parts.next() {
        Some(b"api") => false,
        Some(b"apis") => true,
        _ => return false,
    };
    let rest: Vec<&[u8]> = parts.collect();
    // The version and one part more; and the group before them.
    let Some(mut rest) = rest.get(1 + usize::from(grouped)..).filter(|rest| !rest.is_empty()) else {
        return false;
    };
    if matches!(rest[0], b"watch" | b"proxy") {
        // The deprecated verb in the path, whatever the method.
        return rest[0] == b"watch" && rest.len() > 1;
    }
    if !matches!(method, b"GET" | b"HEAD") {
        return false;
    }
    // What follows a namespace is a resource of its own, unless it is the namespace's.
    if rest[0] == b"namespaces" && rest.len() > 2 && !matches!(rest[2], b"status" | b"finalize") {
        rest = &rest[2..];
    }
    let is_named = rest.get(1).is_some_and(|name| !name.is_empty());
    !is_named && is_true(query, b"watch")
}

fn trimmed(mut path: &[u8]) -> &[u8] {
    while let [b'/', rest @ ..] | [rest @ .., b'/'] = path {
        path = rest;
    }
    path
}

/// Whether a parameter is there and says neither `false` nor `0`: its first value counts, and an empty one is yes
/// (k8s.io/apimachinery/pkg/runtime/conversion.go, `Convert_Slice_string_To_bool`).
fn is_true(query: &[u8], wanted: &[u8]) -> bool {
    first(query, wanted).is_some_and(|value| *value != *b"0" && !value.eq_ignore_ascii_case(b"false"))
}

/// Whether it names a version to begin after: none and zero ask for what exists, by any number of noughts
/// (k8s.io/apiserver/pkg/storage/api_object_versioner.go, `ParseResourceVersion`).
fn names_version(query: &[u8]) -> bool {
    let version = first(query, b"resourceVersion").unwrap_or_default();
    let digits = version.iter().all(u8::is_ascii_digit);
    digits && version.iter().any(|digit| *digit != b'0')
}

/// A parameter's first value, as Go's net/url reads the query.
fn first<'q>(query: &'q [u8], wanted: &[u8]) -> Option<Cow<'q, [u8]>> {
    for pair in query.split(|octet| *octet == b'&') {
        // Go's net/url leaves such a pair out.
        if pair.is_empty() || pair.contains(&b';') {
            continue;
        }
        let (key, value) = match pair.iter().position(|octet| *octet == b'=') {
            Some(at) => (&pair[..at], &pair[at + 1..]),
            None => (pair, &[][..]),
        };
        let (Some(key), Some(value)) = (unescaped(key, true), unescaped(value, true)) else {
            continue;
        };
        if *key == *wanted {
            return Some(value);
        }
    }
    None
}

/// Takes the escapes out of a part of a URL, as Go's net/url does; `None` when one is malformed.
fn unescaped(text: &[u8], in_query: bool) -> Option<Cow<'_, [u8]>> {
    if !text.iter().any(|octet| matches!(octet, b'%' | b'+')) {
        return Some(Cow::Borrowed(text));
    }
    let digit = |octet: u8| char::from(octet).to_digit(16).map(|digit| digit as u8);
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        match first {
            b'%' => {
                let [high, low, after @ ..] = after else { return None };
                out.push(digit(*high)? << 4 | digit(*low)?);
                rest = after;
            }
            b'+' if in_query => out.push(b' '),
            octet => out.push(*octet),
        }
    }
    Some(Cow::Owned(out))
}

#[cfg(test)]
mod tests;
