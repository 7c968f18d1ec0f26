//! What a ClientHello offers (RFC 8446, section 4.1.2; RFC 7301, section 3.1).
//!
//! Input: pieces of a client's stream, in any order; a PROXY protocol header before the hello is skipped.
//! Output: a [`Protocol`]. Must never hold more than [`LONGEST`] octets a connection, nor guess from a hello that is not
//! whole.

use crate::{
    ids::Protocol,
    wire::proxy_protocol::{self, ProxyError},
};

/// A longer first record is given up.
pub const LONGEST: usize = 16_384;

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const ALPN: u16 = 16;

/// The beginning of one client's stream, as far as it has come.
#[derive(Clone, Debug, Default)]
pub struct Assembly {
    octets: Vec<u8>,
    /// Pieces that came before what lies in front of them.
    ahead: Vec<(usize, Vec<u8>)>,
    /// Whether more came than is kept, so that what the whole would have said is not known.
    is_given_up: bool,
}

impl Assembly {
    /// Takes a piece; `Some` once the answer is known.
    pub fn add(&mut self, offset: usize, piece: &[u8]) -> Option<Protocol> {
        if offset.saturating_add(piece.len()) > LONGEST {
            self.is_given_up = true;
            return Some(Protocol::Unknown);
        }
        if offset > self.octets.len() {
            // A client has few packets on their way before its hello is whole.
            if self.ahead.len() == 16 {
                self.is_given_up = true;
                return Some(Protocol::Unknown);
            }
            self.ahead.push((offset, piece.to_vec()));
            return None;
        }
        self.append(offset, piece);
        while let Some(next) = self.ahead.iter().position(|(at, _)| *at <= self.octets.len()) {
            let (at, piece) = self.ahead.swap_remove(next);
            self.append(at, &piece);
        }
        classify(&self.octets)
    }

    /// All that has come, each piece with its place.
    pub fn pieces(&self) -> impl Iterator<Item = (usize, &[u8])> {
        let begun = (!self.octets.is_empty()).then_some((0, &self.octets[..]));
        let ahead = self.ahead.iter().map(|(offset, piece)| (*offset, &piece[..]));
        begun.into_iter().chain(ahead)
    }

    /// The stream as far as it has come without a gap.
    pub fn begun(&self) -> &[u8] {
        &self.octets
    }

    /// Whether its answer is that it would take too much.
    pub fn is_given_up(&self) -> bool {
        self.is_given_up
    }

    /// Octets of memory it takes.
    pub fn held(&self) -> usize {
        let ahead = self.ahead.iter().map(|(_, piece)| piece.capacity());
        self.octets.capacity() + ahead.sum::<usize>()
    }

    fn append(&mut self, offset: usize, piece: &[u8]) {
        // A retransmission brings what is known already.
        if let Some(new) = piece.get(self.octets.len() - offset..) {
            self.octets.extend_from_slice(new);
        }
    }
}

/// Whether a stream may begin so: a TLS record, a load balancer's header, or the method of an HTTP request. What comes with
/// the end of a TCP handshake may be a later part, where the first one was lost.
pub fn may_begin(piece: &[u8]) -> bool {
    let is_method = |head: &[u8]| head.iter().all(u8::is_ascii_uppercase);
    match piece {
        [HANDSHAKE, 3, ..] | [HANDSHAKE] | [b'\r', b'\n', ..] | [b'\r'] => true,
        _ => is_method(&piece[..piece.len().min(3)]),
    }
}

/// What the stream's beginning says; `None` while it is not whole.
pub fn classify(stream: &[u8]) -> Option<Protocol> {
    let stream = match proxy_protocol::parse(stream) {
        Ok(Some(header)) => &stream[header.length..],
        Ok(None) => return None,
        Err(ProxyError::Absent) => stream,
        // Whoever wrote that, what follows it cannot be known.
        Err(ProxyError::Line(_) | ProxyError::Binary(_)) => return Some(Protocol::Unknown),
    };
    match stream.first() {
        None => return None,
        Some(&HANDSHAKE) => {}
        // Not TLS: whatever it is, it cannot negotiate HTTP/2 with an apiserver.
        Some(_) => return Some(Protocol::Http1),
    }
    let mut handshake = Vec::new();
    let mut rest = stream;
    // A hello may span records (RFC 8446, section 5.1).
    while let Some((head, after)) = rest.split_first_chunk::<5>() {
        if head[0] != HANDSHAKE {
            return Some(Protocol::Unknown);
        }
        let length = usize::from(u16::from_be_bytes([head[3], head[4]]));
        if length == 0 || length > LONGEST {
            return Some(Protocol::Unknown);
        }
        let (record, after) = after.split_at_checked(length)?;
        handshake.extend_from_slice(record);
        rest = after;
        if let Some((&[kind, l0, l1, l2], body)) = handshake.split_first_chunk::<4>() {
            if kind != CLIENT_HELLO {
                return Some(Protocol::Unknown);
            }
            let length = u32::from_be_bytes([0, l0, l1, l2]) as usize;
            if length > LONGEST {
                return Some(Protocol::Unknown);
            }
            if let Some(body) = body.get(..length) {
                return Some(offered(body).unwrap_or(Protocol::Unknown));
            }
        }
    }
    None
}

/// Reads a whole ClientHello; `None` when it is malformed.
fn offered(hello: &[u8]) -> Option<Protocol> {
    // legacy_version and random
    let mut reader = Reader(hello.get(34..)?);
    reader.vector::<1>()?;
    reader.vector::<2>()?;
    reader.vector::<1>()?;
    if reader.0.is_empty() {
        // TLS 1.2 without extensions.
        return Some(Protocol::Http1);
    }
    let mut extensions = Reader(reader.vector::<2>()?);
    while !extensions.0.is_empty() {
        let kind = extensions.number::<2>()?;
        let body = extensions.vector::<2>()?;
        if kind != usize::from(ALPN) {
            continue;
        }
        let mut names = Reader(Reader(body).vector::<2>()?);
        while !names.0.is_empty() {
            if names.vector::<1>()? == b"h2" {
                return Some(Protocol::H2Offered);
            }
        }
    }
    Some(Protocol::Http1)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn number<const N: usize>(&mut self) -> Option<usize> {
        let (octets, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(octets.iter().fold(0, |sum, octet| sum << 8 | usize::from(*octet)))
    }

    /// A vector with a length of `N` octets before it (RFC 8446, section 3.4).
    fn vector<const N: usize>(&mut self) -> Option<&'a [u8]> {
        let length = self.number::<N>()?;
        let (vector, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(vector)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vector(length: usize, body: &[u8]) -> Vec<u8> {
        let size = (body.len() as u64).to_be_bytes();
        [&size[8 - length..], body].concat()
    }

    /// A ClientHello with these protocols, after `padding` octets of another extension, cut into records of `record`.
    fn hello(protocols: &[&str], padding: usize, record: usize) -> Vec<u8> {
        let names: Vec<u8> = protocols.iter().flat_map(|name| vector(1, name.as_bytes())).collect();
        let mut extensions = [vec![0, 21], vector(2, &vec![0; padding])].concat();
        if !protocols.is_empty() {
            extensions.extend([vec![0, 16], vector(2, &vector(2, &names))].concat());
        }
        let body = [
            vec![3, 3],
            vec![7; 32],
            vector(1, &[1; 32]),
            vector(2, &[0x13, 1]),
            vector(1, &[0]),
            vector(2, &extensions),
        ]
        .concat();
        let handshake = [vec![CLIENT_HELLO], vector(3, &body)].concat();
        handshake
            .chunks(record)
            .flat_map(|part| [vec![HANDSHAKE, 3, 1], vector(2, part)].concat())
            .collect()
    }

    #[test]
    fn offers_are_read() {
        assert_eq!(
            classify(&hello(&["h2", "http/1.1"], 10, 16_000)),
            Some(Protocol::H2Offered)
        );
        assert_eq!(classify(&hello(&["http/1.1"], 10, 16_000)), Some(Protocol::Http1));
        assert_eq!(classify(&hello(&[], 10, 16_000)), Some(Protocol::Http1));
        assert_eq!(classify(&hello(&["h2"], 3000, 700)), Some(Protocol::H2Offered));
        assert_eq!(classify(b"GET / HTTP/1.1"), Some(Protocol::Http1));
        assert_eq!(classify(&[HANDSHAKE, 3, 1, 0, 0]), Some(Protocol::Unknown));
    }

    #[test]
    fn beginnings_are_told_from_later_parts() {
        let whole = hello(&["h2"], 10, 16_000);
        for begin in [
            &whole[..],
            &whole[..1],
            b"PROXY TCP4",
            b"\r\n\r\n\0",
            b"\r",
            b"GET / ",
            b"G",
            b"POST",
        ] {
            assert!(may_begin(begin), "{begin:?}");
        }
        for later in [&whole[3..], &whole[40..], &[HANDSHAKE, 7], b"h2\x08http/1.1", &[0; 20]] {
            assert!(!may_begin(later), "{later:?}");
        }
    }

    #[test]
    fn a_header_of_the_load_balancer_is_no_protocol() {
        let line = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 6443\r\n".to_vec();
        let binary = [b"\r\n\r\n\0\r\nQUIT\n", &[0x21, 0x11, 0, 12][..], &[1; 12]].concat();
        for header in [line, binary] {
            for (rest, expected) in [
                (hello(&["h2"], 10, 16_000), Protocol::H2Offered),
                (hello(&["http/1.1"], 10, 16_000), Protocol::Http1),
                (b"GET / HTTP/1.1".to_vec(), Protocol::Http1),
            ] {
                let stream = [&header[..], &rest].concat();
                assert_eq!(classify(&stream), Some(expected));
                for end in 0..=header.len() {
                    assert_eq!(classify(&stream[..end]), None, "{end}");
                }
            }
        }
        assert_eq!(classify(b"PROXY TCP4 nonsense\r\n\x16"), Some(Protocol::Unknown));
        assert_eq!(classify(b"PUT / HTTP/1.1"), Some(Protocol::Http1));
    }

    proptest! {
        #[test]
        fn pieces_in_any_order_give_the_same_answer(
            padding in 0_usize..3000,
            record in 100_usize..4000,
            piece in 300_usize..2000,
            order in prop::collection::vec(any::<u16>(), 16),
        ) {
            let stream = hello(&["h2", "http/1.1"], padding, record);
            let mut pieces: Vec<(usize, &[u8])> = stream.chunks(piece).enumerate().map(|(index, part)| (index * piece, part)).collect();
            pieces.sort_by_key(|(at, _)| order[(at / piece) % order.len()]);
            let mut assembly = Assembly::default();
            let answers: Vec<_> = pieces.iter().map(|(at, part)| assembly.add(*at, part)).collect();
            prop_assert_eq!(answers.last(), Some(&Some(Protocol::H2Offered)));
            prop_assert!(answers[..answers.len() - 1].iter().all(Option::is_none));
        }

        #[test]
        fn any_bytes_are_survived(stream in prop::collection::vec(any::<u8>(), 0..400), tls in any::<bool>()) {
            let mut stream = stream;
            if tls && !stream.is_empty() {
                stream[0] = HANDSHAKE;
            }
            let _ = classify(&stream);
        }

        #[test]
        fn damaged_hellos_are_survived(at in 0_usize..200, value in any::<u8>()) {
            let mut stream = hello(&["h2"], 10, 16_000);
            let at = at % stream.len();
            stream[at] = value;
            let _ = classify(&stream);
        }
    }
}
