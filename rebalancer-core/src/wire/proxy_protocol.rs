//! The PROXY protocol's header, versions 1 and 2 (haproxy's doc/proxy-protocol.txt): who a load balancer's client is.
//!
//! Input: the first octets of a connection. Output: how many of them are the header, and the addresses it names.
//! Must never ask for more octets than [`MAX_HEADER`], nor guess about something malformed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// What version 2 begins with (section 2.2).
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// The longest line of version 1, with its end (section 2.1).
const MAX_LINE: usize = 107;

/// The longest header that is taken: version 2 may carry further fields, which are skipped.
pub const MAX_HEADER: usize = 4096;

/// A whole header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// How many octets it has.
    pub length: usize,
    /// The client's address; `None` when the load balancer speaks for itself, as its health checks do, or does not know.
    pub client: Option<SocketAddr>,
}

/// Why the octets are no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProxyError {
    /// Neither version begins so.
    #[error("the connection does not begin with a PROXY protocol header")]
    Absent,
    /// A line of version 1 is not as the protocol has it.
    #[error("the PROXY protocol line is malformed: {0}")]
    Line(&'static str),
    /// A header of version 2 is not as the protocol has it.
    #[error("the PROXY protocol header is malformed: {0}")]
    Binary(&'static str),
}

/// Reads the header; `None` when more octets must come first.
///
/// # Errors
///
/// See [`ProxyError`].
pub fn parse(octets: &[u8]) -> Result<Option<Header>, ProxyError> {
    let begins = |with: &[u8]| {
        let length = octets.len().min(with.len());
        octets[..length] == with[..length]
    };
    if begins(SIGNATURE) {
        if octets.len() < SIGNATURE.len() {
            return Ok(None);
        }
        return binary(octets);
    }
    if begins(b"PROXY ") {
        return line(octets);
    }
    Err(ProxyError::Absent)
}

fn line(octets: &[u8]) -> Result<Option<Header>, ProxyError> {
    let within = &octets[..octets.len().min(MAX_LINE)];
    let Some(end) = within.windows(2).position(|pair| pair == b"\r\n") else {
        return if within.len() < MAX_LINE {
            Ok(None)
        } else {
            Err(ProxyError::Line("it has no end within 107 octets"))
        };
    };
    let text = std::str::from_utf8(&within[..end]).map_err(|_| ProxyError::Line("it is not ASCII"))?;
    let length = end + 2;
    let mut words = text.split(' ').skip(1);
    let family = words.next().unwrap_or_default();
    if family == "UNKNOWN" {
        // Whatever follows is to be ignored.
        return Ok(Some(Header { length, client: None }));
    }
    let words: Vec<&str> = words.collect();
    let [source, destination, source_port, destination_port] = words[..] else {
        return Err(ProxyError::Line("it has not two addresses and two ports"));
    };
    let address = |text: &str| -> Option<IpAddr> {
        match family {
            "TCP4" => text.parse().map(IpAddr::V4).ok(),
            "TCP6" => text.parse().map(IpAddr::V6).ok(),
            _ => None,
        }
    };
    let port = |text: &str| -> Option<u16> {
        let canonical = text == "0" || !text.starts_with('0');
        (canonical && text.bytes().all(|octet| octet.is_ascii_digit())).then(|| text.parse().ok())?
    };
    let wrong = ProxyError::Line("an address or a port of it cannot be read");
    address(destination).and(port(destination_port)).ok_or(wrong)?;
    let client = SocketAddr::new(address(source).ok_or(wrong)?, port(source_port).ok_or(wrong)?);
    Ok(Some(Header {
        length,
        client: Some(client),
    }))
}

fn binary(octets: &[u8]) -> Result<Option<Header>, ProxyError> {
    let Some((&[command, family, high, low], rest)) = octets[SIGNATURE.len()..].split_first_chunk::<4>() else {
        return Ok(None);
    };
    let payload = usize::from(u16::from_be_bytes([high, low]));
    let length = SIGNATURE.len() + 4 + payload;
    if command >> 4 != 2 {
        return Err(ProxyError::Binary("its version is not 2"));
    }
    if length > MAX_HEADER {
        return Err(ProxyError::Binary("it is longer than 4096 octets"));
    }
    let is_local = match command & 0xf {
        0 => true,
        1 => false,
        _ => return Err(ProxyError::Binary("its command is neither LOCAL nor PROXY")),
    };
    let needed = match family {
        // TCP over IPv4, over IPv6; a Unix socket; unspecified.
        0x11 => 12,
        0x21 => 36,
        0x31 => 216,
        0x00 => 0,
        _ if is_local => 0,
        _ => return Err(ProxyError::Binary("it is not about a TCP connection")),
    };
    if !is_local && payload < needed {
        return Err(ProxyError::Binary("it is shorter than its addresses"));
    }
    if rest.len() < payload {
        return Ok(None);
    }
    let client = match family {
        _ if is_local => None,
        0x11 => rest.first_chunk::<4>().map(|ip| (Ipv4Addr::from(*ip).into(), 8)),
        0x21 => rest.first_chunk::<16>().map(|ip| (Ipv6Addr::from(*ip).into(), 32)),
        _ => None,
    };
    let client = client.map(|(ip, port)| SocketAddr::new(ip, u16::from_be_bytes([rest[port], rest[port + 1]])));
    Ok(Some(Header { length, client }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v2(command: u8, family: u8, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u16).to_be_bytes();
        [&SIGNATURE[..], &[0x20 | command, family], &length, payload].concat()
    }

    fn client(octets: &[u8]) -> Result<Option<String>, ProxyError> {
        let header = parse(octets)?.expect("a whole header");
        assert_eq!(header.length, octets.len());
        Ok(header.client.map(|client| client.to_string()))
    }

    #[test]
    fn lines_name_their_client() {
        let named = |line: &str| client(line.as_bytes());
        assert_eq!(
            named("PROXY TCP4 192.0.2.7 198.51.100.1 56324 6443\r\n"),
            Ok(Some("192.0.2.7:56324".into()))
        );
        assert_eq!(
            named("PROXY TCP6 2001:db8::7 2001:db8::1 56324 6443\r\n"),
            Ok(Some("[2001:db8::7]:56324".into()))
        );
        assert_eq!(named("PROXY UNKNOWN\r\n"), Ok(None));
        assert_eq!(named("PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n"), Ok(None));
    }

    #[test]
    fn malformed_lines_are_refused() {
        for line in [
            "PROXY TCP4 192.0.2.7 198.51.100.1 56324\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 56324 6443 7\r\n",
            "PROXY TCP4  192.0.2.7 198.51.100.1 56324 6443\r\n",
            "PROXY TCP4 2001:db8::7 2001:db8::1 1 2\r\n",
            "PROXY TCP6 192.0.2.7 198.51.100.1 1 2\r\n",
            "PROXY UDP4 192.0.2.7 198.51.100.1 1 2\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 65536 2\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 01 2\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 +1 2\r\n",
            "PROXY TCP4 192.0.2.007 198.51.100.1 1 2\r\n",
            "PROXY \r\n",
        ] {
            assert!(matches!(parse(line.as_bytes()), Err(ProxyError::Line(_))), "{line}");
        }
        let endless = [&b"PROXY UNKNOWN "[..], &[b'x'; 107]].concat();
        assert!(matches!(parse(&endless), Err(ProxyError::Line(_))));
        for other in [
            &b"GET / HTTP/1.1\r\n"[..],
            &[22, 3, 1, 2, 0],
            b"proxy TCP4",
            b"PROXYTCP4",
        ] {
            assert_eq!(parse(other), Err(ProxyError::Absent));
        }
    }

    #[test]
    fn binary_headers_name_their_client() {
        let v4 = [192, 0, 2, 7, 198, 51, 100, 1, 0xdc, 4, 0x19, 0x2b];
        assert_eq!(client(&v2(1, 0x11, &v4)), Ok(Some("192.0.2.7:56324".into())));
        // Further fields are skipped: PP2_TYPE_UNIQUE_ID here (section 2.2.5).
        assert_eq!(
            client(&v2(1, 0x11, &[&v4[..], &[5, 0, 1, 9]].concat())),
            Ok(Some("192.0.2.7:56324".into()))
        );
        let mut v6 = vec![0x20, 1, 0xd, 0xb8];
        v6.extend([0; 11]);
        v6.push(7);
        v6.extend([0; 16]);
        v6.extend([0xdc, 4, 0x19, 0x2b]);
        assert_eq!(client(&v2(1, 0x21, &v6)), Ok(Some("[2001:db8::7]:56324".into())));
        assert_eq!(
            client(&v2(0, 0x00, &[])),
            Ok(None),
            "a health check of the load balancer's own"
        );
        assert_eq!(client(&v2(0, 0x11, &v4)), Ok(None));
        assert_eq!(client(&v2(1, 0x00, &[])), Ok(None));
        assert_eq!(client(&v2(1, 0x31, &[0; 216])), Ok(None));
    }

    #[test]
    fn malformed_binary_headers_are_refused() {
        let mut version = v2(1, 0x11, &[0; 12]);
        version[12] = 0x11;
        for octets in [
            version,
            v2(2, 0x11, &[0; 12]),
            v2(1, 0x12, &[0; 12]),
            v2(1, 0x11, &[0; 11]),
            v2(1, 0x21, &[0; 35]),
            v2(1, 0x41, &[0; 12]),
            v2(1, 0x11, &[0; MAX_HEADER]),
        ] {
            assert!(matches!(parse(&octets), Err(ProxyError::Binary(_))), "{octets:?}");
        }
    }

    proptest! {
        #[test]
        fn every_beginning_of_a_header_asks_for_more(tail in prop::collection::vec(any::<u8>(), 0..20), second in any::<bool>()) {
            let header = if second {
                v2(1, 0x11, &[&[10, 0, 0, 1, 10, 0, 0, 2, 1, 2, 3, 4], &tail[..]].concat())
            } else {
                b"PROXY TCP4 10.0.0.1 10.0.0.2 258 772\r\n".to_vec()
            };
            for end in 0..header.len() {
                prop_assert_eq!(parse(&header[..end]), Ok(None), "{}", end);
            }
            let whole = parse(&[&header[..], &tail].concat()).expect("a header").expect("a whole one");
            prop_assert_eq!(whole.length, header.len());
            prop_assert_eq!(whole.client, Some("10.0.0.1:258".parse().expect("an address")));
        }

        #[test]
        fn any_octets_are_survived_and_no_more_than_the_bound_is_asked_for(octets in prop::collection::vec(any::<u8>(), 0..200), second in any::<bool>()) {
            let begun = [if second { &SIGNATURE[..] } else { b"PROXY " }, &octets].concat();
            if let Ok(Some(header)) = parse(&begun) {
                prop_assert!(header.length <= begun.len());
            }
            let padded = [&begun[..], &[0; MAX_HEADER]].concat();
            prop_assert!(!matches!(parse(&padded), Ok(None)), "it never asks beyond its bound");
        }
    }
}
