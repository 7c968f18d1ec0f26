//! Whether a header block is a request, or trailers, as RFC 9113 has them, and writing it for the server.
//!
//! Input: decoded fields. Output: the fault, or a block of this relay's own. Must never let a block pass that a server may
//! take for something else than the relay does: what a server refuses without keeping it in mind could come again.

use super::{
    error::{ConnectionError, ErrorCode},
    frame::{self, FrameHeader, flag, kind},
    hpack::{self, Coding, Encoder, FieldList},
};
use crate::wire::rewrite::{FORWARDED_FOR, Fate, Policy, Rewrite};

/// What is wrong with a block, in words.
type Malformed = &'static str;

/// Whether a block is a request (RFC 9113, sections 8.2, 8.3.1 and 8.5; what golang.org/x/net/http2 refuses in frame.go,
/// `checkPseudos`, and server.go, `newWriterAndRequest`).
///
/// # Errors
///
/// A stream error of the client's.
pub fn check_request(list: &FieldList) -> Result<(), Malformed> {
    let mut pseudo: [Option<&[u8]>; 5] = [None; 5];
    let mut regular = false;
    for (name, value) in list.iter() {
        check_value(value)?;
        if !is_pseudo(name) {
            check_name(name)?;
            regular = true;
            continue;
        }
        let at = match name {
            b":method" => 0,
            b":scheme" => 1,
            b":authority" => 2,
            b":path" => 3,
            b":protocol" => 4,
            _ => return Err("a pseudo-header field that no request has"),
        };
        if regular {
            return Err("a pseudo-header field after another field");
        }
        if pseudo[at].replace(value).is_some() {
            return Err("a pseudo-header field comes twice");
        }
    }
    let is_filled = |value: Option<&[u8]>| value.is_some_and(|value| !value.is_empty());
    let [method, scheme, authority, path, protocol] = pseudo;
    if !is_filled(method) {
        return Err("a request without a method");
    }
    let connects = method == Some(b"CONNECT");
    if connects && protocol.is_none() {
        if is_filled(path) || is_filled(scheme) || !is_filled(authority) {
            return Err("CONNECT names an authority and nothing else");
        }
        return Ok(());
    }
    if protocol.is_some() && !connects {
        return Err("only CONNECT names a protocol");
    }
    if !is_filled(path) {
        return Err("a request without a path");
    }
    if !matches!(scheme, Some(b"https" | b"http")) {
        return Err("a request without a scheme of HTTP");
    }
    Ok(())
}

/// Whether a block is trailers (RFC 9113, section 8.1).
///
/// # Errors
///
/// A stream error of the client's.
pub fn check_trailers(list: &FieldList) -> Result<(), Malformed> {
    for (name, value) in list.iter() {
        if is_pseudo(name) {
            return Err("a pseudo-header field in trailers");
        }
        check_name(name)?;
        check_value(value)?;
    }
    Ok(())
}

/// Whether a block claims to be a request, malformed or not.
pub fn has_pseudo(list: &FieldList) -> bool {
    list.iter().any(|(name, _)| is_pseudo(name))
}

fn is_pseudo(name: &[u8]) -> bool {
    name.first() == Some(&b':')
}

/// The octets of a token (RFC 9110, section 5.6.2) without upper case (RFC 9113, section 8.2.1).
const TOKEN: [bool; 256] = {
    let others = b"!#$%&'*+-.^_`|~";
    let mut token = [false; 256];
    let mut at = 0;
    while at < others.len() {
        token[others[at] as usize] = true;
        at += 1;
    }
    let mut octet = 0;
    while octet < token.len() {
        token[octet] |= matches!(octet as u8, b'a'..=b'z' | b'0'..=b'9');
        octet += 1;
    }
    token
};

fn check_name(name: &[u8]) -> Result<(), Malformed> {
    if name.is_empty() || !name.iter().all(|octet| TOKEN[usize::from(*octet)]) {
        return Err("a field name is not a token in lower case");
    }
    Ok(())
}

/// No control characters but the tab: what Go takes (golang.org/x/net/http/httpguts, `ValidHeaderFieldValue`).
fn check_value(value: &[u8]) -> Result<(), Malformed> {
    // Every octet is looked at, many at a time: faults are rare.
    if value.iter().fold(false, |found, octet| {
        found | (octet.is_ascii_control() & (*octet != b'\t'))
    }) {
        return Err("a field value holds a control character");
    }
    Ok(())
}

/// Appends the block of a request.
pub fn write_request(
    list: &FieldList,
    policy: &Policy,
    rewrite: Rewrite<'_>,
    encoder: &mut Encoder,
    out: &mut Vec<u8>,
) {
    encoder.begin(out);
    for (name, value, coding) in list.coded() {
        if rewrite.fate(name) == Fate::Passes {
            encoder.field(name, value, coding, out);
        }
    }
    let came = list.iter().filter(|(name, _)| rewrite.fate(name) == Fate::Merged);
    let chain = policy.forwarded_for(came.map(|(_, value)| value));
    // Never in the table, where they would take the place of what the client put there.
    hpack::write_literal(FORWARDED_FOR.as_bytes(), &chain, out);
    for (name, value) in rewrite.adds() {
        hpack::write_literal(name.as_bytes(), value.as_bytes(), out);
    }
}

/// Appends the block of trailers.
pub fn write_trailers(list: &FieldList, policy: &Policy, encoder: &mut Encoder, out: &mut Vec<u8>) {
    encoder.begin(out);
    let passing = list.coded().filter(|(name, ..)| policy.trailer_passes(name));
    passing.for_each(|(name, value, coding): (_, _, &Coding)| encoder.field(name, value, coding, out));
}

/// What header blocks may cost beyond what came in, over a connection's life.
///
/// An honest client's blocks go on in about as many octets as they came in, since each field goes on the way it came. What
/// is not in the server's table although the client's has it is said anew, and that is bounded here.
#[derive(Debug)]
pub struct Allowance {
    left: usize,
}

/// How much a connection may run up.
const ALLOWANCE: usize = 65_536;

/// How many octets may go out for each that came.
const FACTOR: usize = 8;

impl Default for Allowance {
    fn default() -> Self {
        Self { left: ALLOWANCE }
    }
}

impl Allowance {
    /// A block of so many octets became one of so many.
    ///
    /// # Errors
    ///
    /// The client's blocks cost far more than it sends.
    pub fn spend(&mut self, came: usize, went: usize) -> Result<(), ConnectionError> {
        // One block may go beyond what is left only by what it brings itself.
        self.left = (self.left + came * FACTOR)
            .checked_sub(went)
            .ok_or(ConnectionError::calm(
                "header blocks that stand for far more than was sent",
            ))?
            .min(ALLOWANCE);
        Ok(())
    }
}

/// Appends an answer of the relay's own, which leaves the client's table as it is: a status, and no body.
pub fn write_status(stream: u32, end_stream: bool, status: [u8; 3], out: &mut Vec<u8>) {
    // A literal that no table keeps, with the name of the static table's field 8 (RFC 7541, section 6.2.2, appendix A).
    let fields = [&[0x08, 3][..], &status].concat();
    FrameHeader {
        length: fields.len() as u32,
        kind: kind::HEADERS,
        flags: flag::END_HEADERS | flag::END_STREAM,
        stream,
    }
    .write(out);
    out.extend_from_slice(&fields);
    if !end_stream {
        // The body is not wanted (RFC 9113, section 8.1).
        frame::write_reset(stream, ErrorCode::NoError, out);
    }
}

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, sync::Arc};

    use super::*;

    fn list(fields: &[(&str, &str)]) -> FieldList {
        fields
            .iter()
            .map(|(name, value)| (name.as_bytes(), value.as_bytes()))
            .collect()
    }

    const WHOLE: [(&str, &str); 4] = [
        (":method", "GET"),
        (":scheme", "https"),
        (":authority", "kubernetes"),
        (":path", "/"),
    ];

    fn with(more: &[(&str, &str)]) -> FieldList {
        list(&[&WHOLE[..], more].concat())
    }

    #[test]
    fn what_gos_framer_or_server_resets_is_refused_here() {
        assert_eq!(check_request(&with(&[])), Ok(()));
        assert_eq!(
            check_request(&with(&[("te", "gzip"), ("x-tab", "a\tb"), ("x-obs", "\u{e9}")])),
            Ok(())
        );
        for (what, refused) in [
            ("upper case", with(&[("Bad-Name", "x")])),
            ("a space in a name", with(&[("x y", "x")])),
            ("a colon in a name", with(&[("x:y", "x")])),
            ("an empty name", with(&[("", "x")])),
            ("not ASCII", with(&[("x-é", "x")])),
            ("a line break", with(&[("x", "a\r\nx-remote-user: root")])),
            ("NUL", with(&[("x", "\0")])),
            ("DEL", with(&[("x", "\x7f")])),
            (
                "a control character in a pseudo-header",
                list(&[(":method", "GET"), (":scheme", "https"), (":path", "/\n")]),
            ),
            (
                "an unknown pseudo-header",
                list(&[&[(":test", "1")], &WHOLE[..]].concat()),
            ),
            ("a response's", list(&[&[(":status", "200")], &WHOLE[..]].concat())),
            ("one that is late", with(&[("accept", "*/*"), (":authority", "x")])),
            ("two paths", with(&[(":path", "/x")])),
            ("no method", list(&WHOLE[1..])),
            ("no path", list(&WHOLE[..3])),
            ("no scheme", list(&[WHOLE[0], WHOLE[3]])),
            ("a foreign scheme", list(&[WHOLE[0], (":scheme", "ftp"), WHOLE[3]])),
            ("an empty path", list(&[WHOLE[0], WHOLE[1], (":path", "")])),
            (
                "CONNECT with a path",
                list(&[(":method", "CONNECT"), (":authority", "a"), (":path", "/")]),
            ),
            ("CONNECT to nowhere", list(&[(":method", "CONNECT")])),
            (
                "a protocol without CONNECT",
                list(&[&[(":protocol", "websocket")], &WHOLE[..]].concat()),
            ),
            ("nothing at all", list(&[])),
        ] {
            assert!(check_request(&refused).is_err(), "{what}");
        }
        assert_eq!(
            check_request(&list(&[(":method", "CONNECT"), (":authority", "a:1")])),
            Ok(())
        );
    }

    #[test]
    fn trailers_hold_no_pseudo_header() {
        assert_eq!(check_trailers(&list(&[("grpc-status", "0")])), Ok(()));
        assert_eq!(check_trailers(&list(&[])), Ok(()));
        for refused in [
            (":method", "GET"),
            (":path", "/"),
            ("Upper", "x"),
            ("x", "\n"),
            (":", ""),
        ] {
            assert!(check_trailers(&list(&[refused])).is_err(), "{refused:?}");
        }
    }

    #[test]
    fn a_request_goes_on_with_the_relays_identity_and_no_other() {
        let policy = Policy::new(Arc::default(), IpAddr::from([192, 0, 2, 7]))
            .with_identity([("x-remote-user".into(), "alice".to_owned())]);
        let came = with(&[
            ("x-remote-user", "system:admin"),
            ("x-remote-group", "system:masters"),
            ("x-forwarded-for", "10.9.9.9"),
            ("accept", "*/*"),
        ]);
        let mut block = Vec::new();
        let rewrite = policy.request(|name| came.get(name.as_bytes())).expect("it goes on");
        write_request(&came, &policy, rewrite, &mut Encoder::default(), &mut block);
        let went = hpack::Decoder::default()
            .decode(&block, 4096)
            .expect("the server reads it");
        let expected = [
            ("accept", "*/*"),
            ("x-forwarded-for", "10.9.9.9, 192.0.2.7"),
            ("x-remote-user", "alice"),
        ];
        assert_eq!(went, with(&expected));
    }

    #[test]
    fn blocks_may_run_up_so_much_and_no_more() {
        let mut allowance = Allowance::default();
        for _ in 0..100_000 {
            allowance.spend(20, 160).expect("eight for one is allowed for ever");
        }
        allowance.spend(20, ALLOWANCE + 160).expect("and once all there is");
        assert!(allowance.spend(20, 161).is_err());
    }
}
