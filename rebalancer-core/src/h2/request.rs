//! What a request's header list tells the relay, and how it goes on when it may not pass verbatim.
//!
//! Input: decoded fields. Output: facts, and blocks of literals. Must never let an identity header of the client pass.

use super::hpack::{self, FieldList};

/// The prefix of every header that names an identity to the apiserver (kubeadm's `--requestheader-*-headers`).
const IDENTITY_PREFIX: &[u8] = b"x-remote-";

/// The header that names the client's address.
const FORWARDED_FOR: &[u8] = b"x-forwarded-for";

/// Whether a client's field claims an identity. The apiserver compares names without regard to case.
pub fn claims_identity(name: &[u8]) -> bool {
    name.get(..IDENTITY_PREFIX.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(IDENTITY_PREFIX))
}

fn is_forwarded_for(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(FORWARDED_FOR)
}

/// Whether the client's block can pass as it came: nothing in it is to be removed or merged.
pub fn passes_verbatim(list: &FieldList) -> bool {
    !list
        .iter()
        .any(|(name, _)| claims_identity(name) || is_forwarded_for(name))
}

/// Whether the request is a watch: `watch=true` in the query, or the deprecated `/watch/` path
/// (k8s.io/apiserver/pkg/endpoints/request/requestinfo.go).
pub fn is_watch(list: &FieldList) -> bool {
    let (path, query) = target(list);
    query.split(|octet| *octet == b'&').any(|pair| {
        matches!(
            pair,
            b"watch" | b"watch=true" | b"watch=1" | b"watch=True" | b"watch=TRUE"
        )
    }) || path.windows(b"/watch/".len()).any(|part| part == b"/watch/")
}

/// Whether a watch asks for what exists before what changes (KEP-3157): any value but false and 0 counts as yes.
pub fn wants_initial_events(list: &FieldList) -> bool {
    let (_, query) = target(list);
    query.split(|octet| *octet == b'&').any(|pair| {
        pair.strip_prefix(b"sendInitialEvents")
            .is_some_and(|value| !matches!(value, b"=false" | b"=0"))
    })
}

/// Path and query.
fn target(list: &FieldList) -> (&[u8], &[u8]) {
    let path = list.get(b":path").unwrap_or_default();
    match path.iter().position(|octet| *octet == b'?') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (path, &[]),
    }
}

/// Appends every field of a request that may pass as a literal, and the client's address merged into the list it
/// brought along, the way a reverse proxy does.
pub fn write_request(list: &FieldList, forwarded_for: &str, out: &mut Vec<u8>) {
    let mut chain = Vec::new();
    for (name, value) in list.iter() {
        if is_forwarded_for(name) {
            chain.extend_from_slice(value);
            chain.extend_from_slice(b", ");
        } else if !claims_identity(name) {
            hpack::write_literal(name, value, out);
        }
    }
    chain.extend_from_slice(forwarded_for.as_bytes());
    hpack::write_literal(FORWARDED_FOR, &chain, out);
}

/// Appends the client's address, to a block that passes verbatim.
pub fn write_forwarded_for(forwarded_for: &str, out: &mut Vec<u8>) {
    hpack::write_literal(FORWARDED_FOR, forwarded_for.as_bytes(), out);
}

/// Appends every trailer that may pass as a literal.
pub fn write_trailers(list: &FieldList, out: &mut Vec<u8>) {
    for (name, value) in list.iter() {
        if !claims_identity(name) && !is_forwarded_for(name) {
            hpack::write_literal(name, value, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(fields: &[(&str, &str)]) -> FieldList {
        fields
            .iter()
            .map(|(name, value)| (name.as_bytes(), value.as_bytes()))
            .collect()
    }

    #[test]
    fn watches_are_told_from_their_paths() {
        let watch = |path| is_watch(&list(&[(":method", "GET"), (":path", path)]));
        assert!(watch("/api/v1/pods?allowWatchBookmarks=true&watch=true"));
        assert!(watch("/api/v1/watch/namespaces/a/pods"));
        assert!(watch("/api/v1/pods?watch=1"));
        assert!(!watch("/api/v1/pods?watch=false"));
        assert!(!watch("/api/v1/namespaces/watch"));
        assert!(!watch("/api/v1/pods?labelSelector=watch%3Dtrue"));
    }

    #[test]
    fn initial_events_are_asked_for_in_the_query() {
        let initial = |path| wants_initial_events(&list(&[(":path", path)]));
        assert!(initial(
            "/api/v1/pods?watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan"
        ));
        assert!(!initial("/api/v1/pods?watch=true&sendInitialEvents=false"));
        assert!(!initial("/api/v1/pods?watch=true"));
        assert!(!initial("/sendInitialEvents=true"));
    }

    #[test]
    fn identity_in_any_spelling_is_removed_and_addresses_are_merged() {
        let came = list(&[
            (":path", "/"),
            ("x-remote-user", "system:admin"),
            ("X-Remote-Group", "system:masters"),
            ("x-remote-extra-a", "b"),
            ("x-forwarded-for", "10.9.9.9"),
            ("accept", "*/*"),
        ]);
        assert!(!passes_verbatim(&came));
        let mut block = Vec::new();
        write_request(&came, "192.0.2.7", &mut block);
        let went = hpack::Decoder::default().decode(&block, 4096).expect("literals decode");
        assert_eq!(
            went,
            list(&[
                (":path", "/"),
                ("accept", "*/*"),
                ("x-forwarded-for", "10.9.9.9, 192.0.2.7")
            ])
        );
    }
}
